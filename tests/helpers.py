"""Meshes, refusals, inputs, shares and error laws that tests have in common."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TypeVar, get_args

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dtensor_ring import Contiguous, Stripe, Zigzag, from_local, ring_attention
from dtensor_ring.cache import _CACHES, CacheOfEach
from dtensor_ring.comm import LoopbackTransport
from dtensor_ring.ops.call import AttentionCall
from dtensor_ring.ops.executors.plan_executor import Executor
from dtensor_ring.ops.kernels import KERNELS, Kernel, Saved, SoftmaxParams
from dtensor_ring.ops.kernels.math import keep_mask
from dtensor_ring.ops.reference import reference_attention
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Kind, Layout
from dtensor_ring.planning.mask import Band, mask_text
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import plan

SEED = 5
LAYOUTS = (*get_args(Kind), "stripe:3")
MASKS = {"causal": (True, (-1, -1)), "full": (False, (-1, -1)), "window": (True, (5, 0)), "two-sided": (False, (9, 3))}
PER_DOCUMENT = "zigzag/documents"
PLACEMENTS = {
    "contiguous": Contiguous(1),
    "zigzag": Zigzag(1),
    "stripe": Stripe(1),
    "stripe:3": Stripe(1, block=3),
    PER_DOCUMENT: Zigzag(1, per_document=True),
}

# Sweeps run a part by default, which has each value of each argument, and everything as a slow test.
some_or_every = pytest.mark.parametrize(
    "every", [pytest.param(False, id="some"), pytest.param(True, id="every", marks=pytest.mark.slow)]
)
# A compiler's backend runs on one rank by default, and on all of them as a slow test.
one_or_all = pytest.mark.parametrize(
    "everywhere", [pytest.param(False, id="one"), pytest.param(True, id="all", marks=pytest.mark.slow)]
)
Answer = TypeVar("Answer")


def examples(number: int) -> settings:
    """A property is tried on so many examples where slow tests run too, else on a quarter of them."""
    return settings(max_examples=number if settings.get_current_profile_name() == "thorough" else number // 4)


def slow(*values: object):
    """A case that runs as a slow test, where cheaper ones show the same by default."""
    return pytest.param(*values, marks=pytest.mark.slow)


def blocks_touched(bounds: Sequence[int], chunks: Sequence[tuple[int, int]]) -> float:
    """Blocks of 128 x 128 causal scores of chunks (start, count) of packed documents, counted row by row.

    The last block of a row counts half, and so does the start of a segment.
    """
    blocks = 0.0
    for start, count in chunks:
        while count:
            first = max(bound for bound in bounds if bound <= start)
            size = min(count, min(bound for bound in bounds if bound > start) - start)
            ends = range(start - first, start - first + size, 128)
            blocks += 0.5 + sum(-(-min(row + 128, start - first + size) // 128) - 0.5 for row in ends)
            start, count = start + size, count - size
    return blocks


def made_once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """A file that one of the test processes makes for all of them."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each has a folder of its own in one for all
        folder = folder.parent
    path, claim = folder / name, folder / f"{name}.claim"
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        deadline = time.monotonic() + 200
        while not path.exists():
            if claim.read_text() or time.monotonic() > deadline:
                pytest.fail(f"another test process could not make {name}")
            time.sleep(0.1)
        return path
    try:
        make(folder / f"{name}.part")
    except BaseException:
        claim.write_text("failed")
        raise
    return (folder / f"{name}.part").rename(path)


def line(device: str = "cpu") -> DeviceMesh:
    """All ranks on one mesh axis, "cp"."""
    return init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("cp",))


def grid(first: str = "dp", last: str = "cp", rows: int = 2) -> DeviceMesh:
    """All ranks on two mesh axes, `rows` of them along the first; one mesh for all tests, as each group has threads of its own."""
    return _grid(dist.group.WORLD, first, last, rows)


@lru_cache(8)
def _grid(_world: dist.ProcessGroup, first: str, last: str, rows: int) -> DeviceMesh:
    return init_device_mesh("cpu", (rows, dist.get_world_size() // rows), mesh_dim_names=(first, last))


def backend_here(backend: str, everywhere: bool) -> str:
    """The compiler's backend on this rank: on the last rank the one that is meant, on the others the cheapest, in fast tests.

    All of them trace the code. What a backend makes of it is nothing that other ranks see, and it costs each rank seconds.
    """
    return backend if everywhere or dist.get_rank() == dist.get_world_size() - 1 else "eager"


def once(compute: Callable[[], Answer]) -> Answer:
    """What `compute` returns, computed by rank 0 alone and sent to the others: all ranks judge by it, and one pays for it."""
    answer = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answer)
    return answer[0]


@cache
def kept_mesh(axes: int = 1) -> DeviceMesh:
    """A line, or a grid; one for all calls, for tests of single ops, which make thousands of DTensors."""
    return line() if axes == 1 else grid()


def refused(act: Callable[[], object], error: type[Exception], *texts: str) -> None:
    """`act` raises `error`, whose message has all `texts`. For ranks: pytest.raises and its match are for patterns."""
    try:
        act()
    except error as failure:
        for text in texts:
            assert text in str(failure), f"{text!r} is not in: {failure}"
    else:
        raise AssertionError(f"nothing was raised for {texts}")


@dataclass
class Case:
    """Whole tensors of one attention with its exact results."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    is_causal: bool = True
    window: tuple[int, int] = (-1, -1)
    documents: Documents | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    alibi: Tensor | None = None
    seed: int = SEED

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def exact(self) -> tuple[Tensor, ...]:
        """out, lse, dq, dk, dv from the reference, in float64 for float64 and else in float32."""
        wide = torch.float64 if self.q.dtype == torch.float64 else torch.float32
        inputs = [x.detach().to(wide).requires_grad_() for x in self.inputs]
        masks = {"is_causal": self.is_causal, "window": self.window, "documents": self.documents}
        kept = self.kept().to(wide) if self.dropout_p else None
        out, lse = reference_attention(*inputs, **masks, softcap=self.softcap, alibi_slopes=self.alibi, kept=kept)
        return out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, self.dout.to(wide))

    def kept(self) -> Tensor:
        """What dropout leaves of every weight, with the mask of the math kernel for whole sequences."""
        batch, q_length, heads, _ = self.q.shape
        q_positions = torch.arange(q_length) + self.k.shape[1] - q_length
        mask = keep_mask(self.seed, range(batch), range(heads), q_positions, torch.arange(self.k.shape[1]), self.dropout_p)
        return mask.double() / (1 - self.dropout_p)

    def problem(self, layout: str, world: int, strategy: str, stages: int = 0) -> AttentionProblem:
        band, lengths = Band.parse(mask_text(self.is_causal, self.window)), (self.q.shape[1], self.k.shape[1])
        return AttentionProblem(Layout.parse(layout), band, *lengths, world, strategy, self.documents, stages)


def make_case(
    length: int,
    *,
    heads: tuple[int, int] = (4, 2),
    dim: int = 8,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
    mask: str = "causal",
    documents: Documents | None = None,
    k_length: int | None = None,
    v_dim: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    softcap: float = 0.0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    k_length, v_dim = k_length or length, v_dim or dim
    shapes = [(length, heads[0], dim), (k_length, heads[1], dim), (k_length, heads[1], v_dim), (length, heads[0], v_dim)]
    q, k, v, dout = (torch.randn((batch, *shape), generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes)
    is_causal, window = MASKS[mask]
    return Case(q, k, v, dout, is_causal, window, documents, softcap)


@lru_cache(maxsize=128)
def solved(length: int, **options) -> tuple[Case, tuple[Tensor, ...]]:
    """A case as `make_case` makes it and its exact results; kept, since sweeps ask for the same ones over and over. Read only."""
    case = make_case(length, **options)
    return case, case.exact()


def share(x: Tensor, layout: str, world: int, rank: int, dim: int = 1, documents: Documents | None = None) -> Tensor:
    """A rank's tokens of a whole tensor."""
    tokens = Layout.parse(layout).tokens(x.shape[dim], world, rank, documents and documents.bounds[0])
    return x.index_select(dim, torch.tensor(tokens, dtype=torch.int64, device=x.device))


def whole(shares: list[Tensor], layout: str, dim: int = 1, documents: Documents | None = None) -> Tensor:
    """The whole tensor from all ranks' shares."""
    world, length = len(shares), sum(x.shape[dim] for x in shares)
    bounds = documents and documents.bounds[0]
    tokens = [token for rank in range(world) for token in Layout.parse(layout).tokens(length, world, rank, bounds)]
    return torch.cat(shares, dim).index_select(dim, torch.argsort(torch.tensor(tokens, dtype=torch.int64, device=shares[0].device)))


def together(
    parts: Sequence[Tensor], layout: str, documents: Documents | None = None, dims: Sequence[int] = (1, 2, 1, 1, 1)
) -> tuple[Tensor, ...]:
    """Whole tensors, on every rank, from the shares that this rank and the others have of them; `dims` are the sequence's."""
    wholes = []
    for part, dim in zip(parts, dims, strict=True):
        every = [torch.empty(0)] * dist.get_world_size()
        dist.all_gather_object(every, part.detach().cpu())
        wholes.append(whole(every, layout, dim, documents).to(part.device))
    return tuple(wholes)


def over_ranks(case: Case, layout: str, *, sinks: Tensor | None = None, **options) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv of the whole sequence, attended over all ranks from local shares; with sinks also their gradient."""
    world, rank, mesh = dist.get_world_size(), dist.get_rank(), line(case.q.device.type)
    mine = [share(x, layout, world, rank, documents=case.documents).contiguous() for x in (*case.inputs, case.dout)]
    shares, dout = [x.requires_grad_() for x in mine[:3]], mine[3]
    placed = [from_local(x, mesh, [PLACEMENTS[layout]], length=case.q.shape[1]) for x in shares]
    masks = {"is_causal": case.is_causal, "window": case.window, "documents": case.documents, "softcap": case.softcap}
    more = {"dropout_p": case.dropout_p, "alibi_slopes": case.alibi, "sinks": sinks}
    out, lse = ring_attention(*placed, return_lse=True, **masks, **more, **options)
    grads = torch.autograd.grad(out.to_local(), shares if sinks is None else [*shares, sinks], dout)
    results = together((out.to_local(), lse.to_local(), *grads[:3]), layout, case.documents)
    if sinks is None:
        return results
    dist.all_reduce(grads[3])
    return *results, grads[3]


def run_loopback(
    case: Case, layout: str, world: int, strategy: str, kernel: str | Kernel, stages: int = 0
) -> tuple[tuple[Tensor, ...], list[tuple[int, int]]]:
    """out, lse, dq, dk, dv put together from ranks run as threads, and what each sent: (forward, whole) bytes."""
    problem = case.problem(layout, world, strategy, stages)
    softmax = SoftmaxParams(case.q.shape[-1] ** -0.5, case.softcap, dropout_p=case.dropout_p)

    def rank_body(transport: LoopbackTransport):
        q, k, v, dout = (
            share(x, layout, world, transport.rank, documents=case.documents).contiguous() for x in (*case.inputs, case.dout)
        )
        computes = kernel if isinstance(kernel, Kernel) else KERNELS[kernel]
        executor = Executor(plan(problem, transport.rank), transport, computes, softmax, alibi=case.alibi)
        out, lse = executor.forward(q, k, v, seed=SEED)
        sent = transport.traffic.bytes
        grads = executor.backward(Saved(q, k, v, out, lse), dout, seed=SEED)[:3]
        return (out, lse, *grads), (sent, transport.traffic.bytes)

    results = LoopbackTransport.run(world, rank_body)
    dims = (1, 2, 1, 1, 1)
    parts = [whole([result[0][i] for result in results], layout, dim, case.documents) for i, dim in enumerate(dims)]
    return tuple(parts), [result[1] for result in results]


def default_kernel(case: Case, layout: str, world: int) -> str:
    """The kernel of a call with gradients that leaves it open, and the strategy too."""
    q, _, v = case.inputs
    problem = case.problem(layout, world, "ring")
    call = AttentionCall(problem.band, q.shape[-1] ** -0.5, problem.layout, training=True)
    need = call.need(q.device.type, q.dtype, q.shape[3], v.shape[3], q.shape[0], q.shape[2])
    return call.choose(need, problem=problem).kernel.name


def single_device(case: Case, kernel: str) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv of the kernel on whole tensors."""
    return run_loopback(case, "contiguous", 1, "ring", kernel)[0]


def assert_exact(found: tuple[Tensor, ...], exact: tuple[Tensor, ...], tolerance: float = 1e-10) -> None:
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, exact, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def error_ratios(
    found: tuple[Tensor, ...], single: tuple[Tensor, ...], exact: tuple[Tensor, ...]
) -> dict[str, tuple[float, float]]:
    """For out, dq, dk, dv: rms error over the single-device kernel's, and the largest error over 2.5 x the kernel's + 1 ulp."""
    ratios = {}
    for name, index in (("out", 0), ("dq", 2), ("dk", 3), ("dv", 4)):
        mine, one, reference = found[index].double(), single[index].double(), exact[index].double()
        ulp = torch.finfo(found[index].dtype).eps * reference.abs().max().item()
        most = 2.5 * (one - reference).abs().max().item() + ulp
        ratios[name] = (rms(mine - reference) / max(rms(one - reference), 1e-30), (mine - reference).abs().max().item() / most)
    return ratios


def assert_like_kernel(
    found: tuple[Tensor, ...], single: tuple[Tensor, ...], exact: tuple[Tensor, ...]
) -> dict[str, tuple[float, float]]:
    """The invariants: rms error at most 1.3 x (out) and 1.5 x (gradients) the kernel's own, no error past 2.5 x + 1 ulp."""
    ratios = error_ratios(found, single, exact)
    for name, (mean, most) in ratios.items():
        assert mean <= (1.3 if name == "out" else 1.5), f"{name}: rms error is {mean:.2f} x the single-device kernel's"
        assert most <= 1, f"{name}: the largest error is {most:.2f} x what is allowed"
    lse_error = (found[1].double() - exact[1].double()).abs().nan_to_num(0.0).max().item()
    assert lse_error < 2e-2, f"lse is off by {lse_error}"
    return ratios


@contextmanager
def short_caches(most: int) -> Iterator[None]:
    """No cache of the package keeps more than `most` values, so that few calls fill them. Those of objects are there already."""
    each_of = [kept._of.values() if isinstance(kept, CacheOfEach) else [kept] for kept in _CACHES.values()]
    limits = {each: each._most_entries for each in itertools.chain.from_iterable(each_of)}
    for each, entries in limits.items():
        each._most_entries = min(entries, most)
    try:
        yield
    finally:
        for each, entries in limits.items():
            each._most_entries = entries
