"""Figures of GPUs that we know: what stages are chosen by where nobody passes a `CostModel` of their own.

    h100    H100 SXM    kernels, merging and copying measured by `python -m dtensor_ring calibrate` with torch 2.11: `torch_flash`,
                        whose kernels `flash_attn_2` has too, and cuDNN's. `flash_attn_4` takes .91 of cuDNN's time forward and
                        .84 backward, as it did on 8192 causal tokens. `flash_attn_3` was not measured, and is taken for as fast as
                        cuDNN: its authors found it 8 to 14 % faster forward (arXiv:2407.08608)
    h200    H200 SXM    those of h100: the same chip with faster memory, on which plans were found to take the same time within 5 %
    a100    A100 SXM    not measured: h100's, kernels scaled by what FlashAttention-2 reaches at best, 73 % of 312 TFLOP/s
                        (arXiv:2307.08691) beside 370 on H100 (arXiv:2407.08608), memory by the bandwidths of the data sheets

What a step takes beside its calls is no kernel's time: 60 microseconds come closest to plans of 8 ranks in 7 stages.

Chips: `peak` is the dense 16-bit rate of NVIDIA's data sheets, and memory what the driver reports. `matmul` is what products of a
model's layers reach with many tokens: 690 to 830 TFLOP/s on H200 at 8192 to 32768 tokens and widths of 2048 to 14336, 730 in a
training step, where the chip is warm (`benchmarks/estimate.py`); A100's is the same share of its peak, not measured.

Links: 200 GB/s each way inside a host is what point-to-point transfers of NCCL reach between two H200 (half of NVLink's 450 GB/s,
since a message of keys is a few MiB); A100's NVLink has two thirds of that. Between hosts one network card a GPU is assumed, of 400
Gbit/s, or of 200 for A100, used to 90 %. A transfer takes 20 microseconds beside its bytes.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

from dtensor_ring.planning.cost_model import CostModel, KernelSpeed, Link, Speed


def _slower(speed: Speed, factor: float) -> Speed:
    times = {name: getattr(speed, name) * factor for name in ("call", "row", "edge", "column", "block")}
    return replace(speed, **times)


_CUDNN = KernelSpeed(
    forward=Speed(call=16377, row=0.0, edge=33.3, column=0.0, block=12.81, narrow=0.667, wide=1.85),
    backward=Speed(call=20472, row=75.0, edge=87.9, column=56.6, block=37.47, narrow=0.603, wide=2.50),
)
_FLASH_2 = KernelSpeed(
    forward=Speed(call=11436, row=7.7, edge=23.8, column=10.4, block=23.77, narrow=0.569, wide=2.03),
    backward=Speed(call=24672, row=120.2, edge=4.4, column=49.5, block=67.15, narrow=0.568, wide=2.33),
)
_FLASH_4 = KernelSpeed(_slower(_CUDNN.forward, 0.91), _slower(_CUDNN.backward, 0.84))

_H100 = CostModel(
    device="h100",
    source="H100 80GB HBM3, torch 2.11; see planning/devices.py",
    kernels=(
        ("cudnn", _CUDNN),
        ("flash_attn_2", _FLASH_2),
        ("flash_attn_3", _CUDNN),
        ("flash_attn_4", _FLASH_4),
        ("torch_flash", _FLASH_2),
    ),
    multiprocessors=132,
    merge=2.83e12,
    copy=2.81e12,
    step=60e3,
    host_forward=153e3,
    host_backward=288e3,
)

_A100_SLOWER = 370 / (0.73 * 312)
_A100 = replace(
    _H100,
    device="a100",
    source="scaled from H100's; see planning/devices.py",
    kernels=tuple(
        (name, KernelSpeed(_slower(speed.forward, _A100_SLOWER), _slower(speed.backward, _A100_SLOWER)))
        for name, speed in _H100.kernels
        if name in ("flash_attn_2", "torch_flash")
    ),
    multiprocessors=108,
    merge=_H100.merge * 2.0 / 3.35,
    copy=_H100.copy * 2.0 / 3.35,
)

KNOWN: dict[str, CostModel] = {
    "h100": _H100,
    "h200": replace(_H100, device="h200", source="H100's figures; see planning/devices.py"),
    "a100": _A100,
}

LINKS: dict[str, Link] = {
    "h100": Link(200e9, 45e9, 20e-6, device="h100"),
    "h200": Link(200e9, 45e9, 20e-6, device="h200"),
    "a100": Link(133e9, 22e9, 20e-6, device="a100"),
}


class Chip(NamedTuple):
    """What training steps depend on beside attention.

    Attributes:
        peak: dense 16-bit operations a second, by the data sheet.
        matmul: those that matrix products reach.
        memory: bytes that programs can use.
    """

    peak: float
    matmul: float
    memory: int


CHIPS: dict[str, Chip] = {
    "h100": Chip(989.4e12, 730e12, 79 * 2**30),
    "h200": Chip(989.4e12, 730e12, 139 * 2**30),
    "a100": Chip(312e12, 312e12 * 730 / 989.4, 79 * 2**30),
}


def device_named(name: str) -> str:
    """Which of `KNOWN` a GPU is, by the name that its driver gives it, such as "NVIDIA H100 80GB HBM3"; "" for none.

    Cards in PCIe slots are none of them: their links are others.
    """
    lower = name.lower()
    if "pcie" in lower or "nvl" in lower:
        return ""
    return next((device for device in KNOWN if re.search(rf"\b{device}\b", lower)), "")


def link_of_hosts(hosts: list[int], devices: list[str]) -> Link | None:
    """The link of a group whose ranks are on these hosts, given as a number for each rank, and have these GPUs.

    None where nothing is known of it: GPUs that are not known, or of several kinds, or hosts that ranks do not fill one after
    another with equally many.
    """
    if len(set(devices)) != 1 or devices[0] not in LINKS:
        return None
    link = LINKS[devices[0]]
    each = hosts.count(hosts[0])
    if each == len(hosts):
        return link
    grouped = all(len(set(hosts[i : i + each])) == 1 for i in range(0, len(hosts), each))
    return replace(link, host=each) if grouped and len(hosts) == each * len(set(hosts)) else None


def model_for(text: str, link: Link | None) -> CostModel | None:
    """The model of a text that `CostModel.text` has, or for "" that of the link's GPU; None where neither is known."""
    if text:
        return CostModel.of_text(text)
    return KNOWN.get(link.device) if link is not None else None


__all__ = ["CHIPS", "KNOWN", "LINKS", "Chip", "device_named", "link_of_hosts", "model_for"]
