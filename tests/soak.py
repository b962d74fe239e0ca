"""Hundreds of batches, each packed in another way, through the public calls; and what they leave behind.

Every rank draws the same batches from one seed, and tensors of its own. Results are judged by sums over all ranks that cost one
all-reduce, and every fiftieth batch by what one process computes.

    out = P v          so   <out, dout> = <v, dv>      a gradient or a value that went to another token, or was lost, breaks it
    scores = q k       so   <q, dq> = <k, dk>          the same of queries and keys
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from helpers import PER_DOCUMENT, PLACEMENTS, line, refused, short_caches, together
from models import packed_mask
from torch import Tensor, nn
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig

from dtensor_ring import Documents, Zigzag, average_gradients, cache, check_replicas, from_local, ring_attention, ring_plan
from dtensor_ring.checkpointing import save_attention
from dtensor_ring.comm import rank_checks
from dtensor_ring.debug import caches
from dtensor_ring.ops.reference import reference_attention
from dtensor_ring.planning.layout import Layout

LAYOUTS = ("zigzag", PER_DOCUMENT, "contiguous")
KINDS = ("attention", "checkpointed", "attention saved", "model", "refused by all", "refused by one")
WEIGHTS = (60, 7, 7, 20, 3, 3)
EVERY = 50  # batches, of which one is compared with one process


@dataclass(frozen=True)
class Size:
    """What batches are made of.

    Attributes:
        lengths: tokens of a batch; each is drawn often.
        typical: the median length of documents, whose longest are tens of times as long.
        heads: of queries and of keys.
        dim: of a head.
        dtype: of tensors and weights.
        sums: how far the two sides of a law of sums may be apart, as a share of the sum's standard deviation.
        one_process: how far results may be from those of one process, as a share of their norm.
    """

    lengths: tuple[int, ...]
    typical: int
    heads: tuple[int, int]
    dim: int
    dtype: torch.dtype
    sums: float
    one_process: float


# In bfloat16 a product has a relative error of 2**-9, of which a sum of products has about as much; P and dS are rounded as well.
# Of many products some are wrong by more, the more the larger they are beside their sum: 8 and 100 times, in two dtypes.
SIZES = {
    "cpu": Size((384, 501, 512, 640), 12, (4, 2), 32, torch.float32, 1e-5, 1e-5),
    "cuda": Size((4096, 6144, 7001, 8192), 150, (4, 2), 64, torch.bfloat16, 2**-5, 2**-5),
}


@dataclass(frozen=True)
class Held:
    """What a process holds while its caches are empty.

    Attributes:
        resident: bytes of the host's memory.
        tensors: bytes of tensors on the GPU.
        beside: bytes that the GPU has given out otherwise: to NCCL, to code.
        objects: Python objects that the garbage collector knows.
        threads: of the process.
        files: open ones, with sockets.
    """

    resident: int
    tensors: int
    beside: int
    objects: int
    threads: int
    files: int


class Soak:
    """Batches one after the other on this rank."""

    def __init__(self, device: str) -> None:
        self.device, self.size, self.mesh = device, SIZES[device], line(device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        here = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
        self.same, self.own = random.Random(7), torch.Generator(here).manual_seed(100 + self.rank)
        self.worst = torch.zeros(
            3, device=device, dtype=torch.float64
        )  # of the laws of sums, and how far losses of ranks are apart
        self.apart, self.kinds, self.packings = [], Counter(), set()
        self.models = {layout: self._model(layout) for layout in LAYOUTS[:2]}
        self.alone = self._llama()

    def _llama(self) -> nn.Module:
        heads, kv_heads, dim = *self.size.heads, self.size.dim
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=heads * dim,
            intermediate_size=2 * heads * dim,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=max(self.size.lengths),
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        return model.to(self.device, self.size.dtype)

    def _model(self, layout: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = self._llama()
        parallelize_module(model, self.mesh, ring_plan(model, PLACEMENTS[layout]))
        return model, torch.optim.SGD(model.parameters(), lr=1e-3)

    def run(self, first: int, last: int) -> None:
        for number in range(first, last):
            length = self.same.choice(self.size.lengths)
            documents = self._packing(length)
            kind = self.same.choices(KINDS, WEIGHTS)[0]
            self.kinds[kind] += 1
            if kind == "model":
                self._train(documents, compared=number % EVERY < 5)  # about one of five is a model's
            elif kind.startswith("refused"):
                self._refused(documents, by_all=kind.endswith("all"))
            else:
                self._attend(documents, kind, compared=number % EVERY == 0)

    def _packing(self, length: int) -> Documents:
        """Documents of log-normal lengths that no batch before has."""
        while True:
            lengths: list[int] = []
            while (left := length - sum(lengths)) > 0:
                lengths.append(min(left, 1 + int(self.size.typical * self.same.lognormvariate(0, 1.4))))
            documents = Documents.from_lengths(lengths)
            if documents.digest not in self.packings:
                self.packings.add(documents.digest)
                return documents

    def _shares(self, layout: str, documents: Documents) -> list[Tensor]:
        """This rank's tokens of q, k and v, and of the gradient of out."""
        runs = Layout.parse(layout).runs(documents.length, self.world, self.rank, documents.bounds[0])
        tokens, (heads, kv_heads) = sum(run.count for run in runs), self.size.heads
        shapes = [(1, tokens, count, self.size.dim) for count in (heads, kv_heads, kv_heads, heads)]
        return [torch.randn(shape, device=self.device, dtype=self.size.dtype, generator=self.own) for shape in shapes]

    def _attend(self, documents: Documents, kind: str, compared: bool) -> None:
        layout, strategy = self.same.choice(LAYOUTS), self.same.choice(["ring", "ring", "gather", None])
        window = (documents.length // 8, 0) if self.same.random() < 0.2 else (-1, -1)
        run_check = self.same.random() < 0.5
        *leaves, dout = self._shares(layout, documents)
        for leaf in leaves:
            leaf.requires_grad_()

        def attend(*shares: Tensor) -> Tensor:
            length, placements = documents.length, [PLACEMENTS[layout]]
            placed = [from_local(x, self.mesh, placements, length=length, run_check=run_check) for x in shares]
            return ring_attention(*placed, documents=documents, window=window, strategy=strategy).to_local()

        if kind == "attention":
            out = attend(*leaves)
        else:
            options = {"context_fn": save_attention} if kind == "attention saved" else {}
            out = checkpoint(attend, *leaves, use_reentrant=False, **options)
        grads = torch.autograd.grad(out, leaves, dout)
        self._check_sums([x.detach() for x in (*leaves, dout)], out.detach(), grads)
        if compared:
            self._compare_attention(layout, documents, window, [x.detach() for x in (*leaves, dout, out, *grads)])

    def _check_sums(self, inputs: list[Tensor], out: Tensor, grads: tuple[Tensor, ...]) -> None:
        q, k, v, dout = inputs
        products = [(a.double() * b) for a, b in ((out, dout), (v, grads[2]), (q, grads[0]), (k, grads[1]))]
        sums = torch.stack([x.sum() for x in products] + [products[0].square().sum(), products[2].square().sum()])
        dist.all_reduce(sums)
        values, scores = (sums[0] - sums[1]) / sums[4].sqrt(), (sums[2] - sums[3]) / sums[5].sqrt()
        self._keep_worst(torch.stack([values, scores, torch.zeros_like(values)]).abs())

    def _keep_worst(self, found: Tensor) -> None:
        """Without the host waiting for it; NaN stays."""
        self.worst = torch.maximum(self.worst, found)

    def _compare_attention(self, layout: str, documents: Documents, window: tuple[int, int], shares: list[Tensor]) -> None:
        whole = together([x.float() for x in shares], layout, documents, [1] * len(shares))
        q, k, v = (x.detach().requires_grad_() for x in whole[:3])
        exact, _ = reference_attention(q, k, v, is_causal=True, window=window, documents=documents)
        wanted = exact.detach(), *torch.autograd.grad(exact, (q, k, v), whole[3])
        self._note_distances(whole[4:], wanted)

    def _note_distances(self, found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
        for a, b in zip(found, wanted, strict=True):
            self.apart.append(((a.float() - b.float()).norm() / b.float().norm()).item())

    def _train(self, documents: Documents, compared: bool) -> None:
        """A step of a model on a packed batch, which every rank has whole."""
        model, optimizer = self.models[self.same.choice(LAYOUTS[:2])]
        ids = torch.tensor([self.same.choices(range(64), k=documents.length)], device=self.device)
        labels, positions = ids.clone(), documents.position_ids().to(self.device)
        labels[positions == 0] = -100  # the first token of a document follows from no other
        loss = model(input_ids=ids, labels=labels, position_ids=positions).loss
        loss.backward()
        average_gradients(model, self.mesh)
        ends = torch.stack([loss.detach(), -loss.detach()]).double()
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        self._keep_worst(torch.stack([torch.zeros_like(ends[0]), torch.zeros_like(ends[0]), ends.sum()]))
        if compared:
            self.alone.load_state_dict(model.state_dict())
            mask = packed_mask(documents, 1).to(self.device)
            alone = self.alone(input_ids=ids, labels=labels, position_ids=positions, attention_mask=mask, use_cache=False).loss
            alone.backward()
            grads = ([p.grad for p in each.parameters()] for each in (model, self.alone))
            pairs = [torch.cat([x.flatten().float() for x in each]) for each in grads]
            self._note_distances((loss.detach(), pairs[0]), (alone.detach(), pairs[1]))
            self.alone.zero_grad()
        optimizer.step()
        optimizer.zero_grad()

    def _refused(self, documents: Documents, by_all: bool) -> None:
        """A call that is wrong on all ranks, or on the last one alone: every rank raises, and goes on."""
        q, k, v, _ = self._shares("zigzag", documents)
        length, place = (
            documents.length,
            partial(from_local, device_mesh=self.mesh, placements=[Zigzag(1)], length=documents.length),
        )
        if by_all:
            placed = [place(x) for x in (q, k, v)]
            wrong = Documents.from_lengths([length, 3])
            refused(lambda: ring_attention(*placed, documents=wrong), ValueError, str(length + 3), str(length))
        else:
            short = k[:, 1:] if self.rank == self.world - 1 else k
            refused(lambda: place(short), ValueError, "" if short is not k else f"rank {self.world - 1} ")

    def held(self) -> Held:
        """What this process holds now, its caches emptied."""
        for kept in list(cache._CACHES.values()):
            for each in list(kept._of.values()) if isinstance(kept, cache.CacheOfEach) else [kept]:
                each.clear()
        dist.all_reduce(torch.zeros(1, device=self.device))  # nobody works any more
        tensors = beside = 0
        if self.device == "cuda":
            torch.cuda.synchronize()
        time.sleep(0.5)  # threads of process groups let go of what they carried
        gc.collect()
        gc.collect()  # what finalizers of the first let go of
        if self.device == "cuda":
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            tensors, beside = torch.cuda.memory_allocated(), total - free - torch.cuda.memory_reserved()
        ctypes.CDLL(None).malloc_trim(0)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        threads, files = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("task", "fd"))
        return Held(resident, tensors, beside, len(gc.get_objects()), threads, files)


@contextmanager
def short_memories(most: int) -> Iterator[None]:
    """No cache keeps more than `most` values, and no group more than so many agreements: they are full after few batches."""
    with short_caches(most), patch.object(rank_checks, "_AGREEMENTS", min(most, rank_checks._AGREEMENTS)):
        yield


def check_caches() -> None:
    for use in caches():
        assert use.entries <= use.most_entries, use
        assert use.bytes <= use.most_bytes, use


@dataclass(frozen=True)
class Result:
    """What one rank reports.

    Attributes:
        marks: what it held after the warm-up, and after each third of the batches that followed.
        batches: how many a third has, or one more.
        sums: how far the two laws of sums were off at most, and how far ranks' losses were apart.
        one_process: the farthest distance from one process.
        compared: how many results were compared with one process.
        kinds: how many batches of each kind there were.
        milliseconds: a batch, on this rank.
    """

    marks: tuple[Held, ...]
    batches: int
    sums: list[float]
    one_process: float
    compared: int
    kinds: dict[str, int]
    milliseconds: float

    def growth(self, name: str) -> int:
        """How much more of something there was after the third in which it grew least.

        What batches leave behind is left in every third; what comes once, such as a kernel that is compiled late, in one.
        """
        held = [getattr(mark, name) for mark in self.marks]
        return min(after - before for before, after in pairwise(held))


def soak(device: str, warm_up: int, batches: int, most: int) -> Result:
    """`warm_up` batches, and as many more as make `batches`, with caches of at most `most` values."""
    soaking = Soak(device)
    with short_memories(most):
        soaking.run(0, warm_up)
        check_caches()
        marks, start, thirds = [soaking.held()], time.monotonic(), [warm_up + i * (batches - warm_up) // 3 for i in range(4)]
        for first, last in pairwise(thirds):
            soaking.run(first, last)
            check_caches()
            marks.append(soaking.held())
        seconds = time.monotonic() - start
    for model, _ in soaking.models.values():
        check_replicas(model, soaking.mesh)
    return Result(
        tuple(marks),
        (batches - warm_up) // 3,
        soaking.worst.tolist(),
        torch.tensor(soaking.apart).max().item(),  # NaN where any is
        len(soaking.apart),
        dict(soaking.kinds),
        1e3 * seconds / (batches - warm_up),
    )
