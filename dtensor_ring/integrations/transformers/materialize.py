"""From the meta device to weights: memory, rotary buffers, and the weights themselves, after plan and sharding were applied.

with torch.device("meta"):                                        # no memory
    model = AutoModelForCausalLM.from_config(config)
parallelize_module(model, mesh["cp"], ring_plan(model))
fully_shard(model, mesh=mesh["dp", "cp"]._flatten("dp_cp"))       # a rank's shards, still without memory
materialize(model, "cuda", weights if rank == 0 else {})          # its shards alone, filled from rank 0's weights
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dtensor_ring._torch import local_of

Weights = Mapping[str, Tensor] | Literal["random", "later"]


def materialize(model: PreTrainedModel, device: torch.device | str, weights: Weights = "random") -> None:
    """Give a model on the meta device its memory, its buffers and its weights, in place.

    Buffers such as the frequencies of rotary embeddings stand in no checkpoint: `to_empty` leaves memory in them that nobody has
    written, and a model trains on it without an error. Here they are computed anew, and checked.

    Args:
        model: a model of transformers whose parameters are all on the meta device, sharded or not.
        device: where its memory is to be: "cpu" with FSDP2's CPU offload.
        weights: the whole state dict on rank 0 of the world, anything else on the others, to which it is sent: a collective call.
            "random" for the model's own `init_weights`: shards on GPUs draw different numbers by themselves, ranks that hold the
            same weights need the same seed. "later" where a distributed checkpoint is loaded next: parameters are NaN until then.

    Raises:
        ValueError: a parameter has values already, which would be lost; or a word for weights that is neither of the two.
        NotImplementedError: random weights of shards on the CPU, for which PyTorch draws the same numbers on every rank; or a
            buffer that the model cannot compute anew.
    """
    if isinstance(weights, str) and weights not in ("random", "later"):
        raise ValueError(f"weights are a state dict, 'random' or 'later', found {weights!r}")
    parameters = dict(model.named_parameters())
    if real := [name for name, parameter in parameters.items() if not parameter.is_meta]:
        raise ValueError(
            f"{len(real)} of {len(parameters)} parameters of this {type(model).__name__} have values, such as {real[0]}, which "
            "would be lost: build the model under torch.device('meta')"
        )
    sharded = [name for name, parameter in parameters.items() if _is_sharded(parameter)]
    if weights == "random" and sharded and torch.device(device).type == "cpu":
        raise NotImplementedError(
            f"random weights of {len(sharded)} sharded parameters on the CPU, such as {sharded[0]}: PyTorch would draw the same "
            "numbers for the shard of every rank. Pass weights= of a model that rank 0 has made whole"
        )
    model.to_empty(device=device)
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    with torch.no_grad():
        for buffer in buffers.values():
            buffer.fill_(torch.nan)  # so that one which nobody computes is found
    with warnings.catch_warnings():
        # Of random numbers for shards on the CPU, which are used in no case.
        warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support on cpu")
        model.init_weights()
    if left := [name for name, buffer in buffers.items() if local_of(buffer).isnan().any()]:
        raise NotImplementedError(
            f"{type(model).__name__} does not compute its buffers {', '.join(left)} in init_weights: build it on {device} instead "
            "of the meta device, or copy them from a model that was"
        )
    if weights == "later":
        with torch.no_grad():
            for parameter in model.parameters():
                local_of(parameter).fill_(torch.nan)
    elif not isinstance(weights, str):
        set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def _is_sharded(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) and any(p.is_shard() for p in parameter.placements) and parameter.device_mesh.size() > 1
