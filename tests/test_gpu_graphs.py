"""Laws of CUDA graphs: a replay on new inputs is bitwise what the same call gives without a graph. `pytest -m gpu`, one GPU or two.

On one GPU a mesh has one rank; the plans of more are walked with an `Echo`, which gives a rank its own messages back.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from captured import (
    TOKENS,
    Act,
    Captured,
    attention,
    bitwise,
    check_captured_layers,
    doubled,
    gradients,
    make_inputs,
    refused_in_a_graph,
    small_llama,
)
from helpers import LAYOUTS, PLACEMENTS, line
from pool import free_port
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from dtensor_ring import Documents, Zigzag, debug, from_local, full_tensor, functional, redistribute, ring_attention, ring_plan
from dtensor_ring.cache import _CACHES, Cache
from dtensor_ring.captures import _HELD, RingCaptureError
from dtensor_ring.comm import Pending, Transport
from dtensor_ring.ops.executors.plan_executor import Executor
from dtensor_ring.ops.kernels import KERNELS, Saved, SoftmaxParams
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import plan

pytestmark = pytest.mark.gpu
DOCUMENTS, OTHERS = Documents.from_lengths([100, 7, 1, 200, 204]), Documents.from_lengths([300, 212])
ROWS = Documents(((0, 90, 512), (0, 211, 512)))


@pytest.fixture(scope="module")
def mesh():
    """A mesh of one rank over NCCL."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), RANK="0", WORLD_SIZE="1")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    yield init_device_mesh("cuda", (1,), mesh_dim_names=("cp",))
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def with_repeated_bits():
    with bitwise():
        yield


def check_replays(act: Act, make: Callable[[], list[Tensor]], prepare: Callable[[], object] = lambda: None) -> None:
    graph = Captured(act, make())
    for number in range(3):
        prepare()
        inputs = make()
        found, wanted = graph(inputs), act(*inputs)
        assert len(found) == len(wanted)
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            assert not b.isnan().any()
            assert torch.equal(a, b), f"result {i} of replay {number}: {(a.float() - b.float()).abs().max().item():.1e} apart"


def forget_everything() -> None:
    """Every cache is emptied, and the memory that they held is taken and overwritten."""
    for cache in list(_CACHES.values()):
        if isinstance(cache, Cache) and cache is not _HELD:
            cache.clear()
    gc.collect()
    junk = [torch.full((1 << size,), 1 << 30, device="cuda", dtype=torch.int32) for size in range(1, 15) for _ in range(64)]
    torch.cuda.synchronize()
    del junk


OPTIONS = {
    "causal": {},
    "full": {"is_causal": False},
    "window": {"window": (64, 0)},
    "packed": {"documents": DOCUMENTS},
    "packed window": {"documents": DOCUMENTS, "window": (64, 0)},
    "gather": {"strategy": "gather"},
    "ulysses": {"strategy": "ulysses", "documents": DOCUMENTS},
    "math": {"kernel": "math", "documents": OTHERS},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "stripe"])
def test_replays_of_a_call_and_its_backward_are_bitwise_those_without_a_graph(mesh, layout, options):
    check_replays(attention(mesh, PLACEMENTS[layout], **OPTIONS[options]), make_inputs)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (4, 1)])
def test_replays_with_grouped_heads(mesh, heads):
    check_replays(attention(mesh, Zigzag(1)), lambda: make_inputs(heads))


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_replays_with_sinks_and_their_gradient(mesh, documents):
    check_replays(attention(mesh, Zigzag(1), documents=documents), lambda: make_inputs(sinks=True))


def test_replays_with_documents_of_each_row_and_documents_cut_one_by_one(mesh):
    check_replays(attention(mesh, Zigzag(1), documents=ROWS), lambda: make_inputs(rows=2))
    check_replays(attention(mesh, Zigzag(1, per_document=True), documents=DOCUMENTS), make_inputs)


def test_replays_read_what_left_the_caches(mesh):
    check_replays(attention(mesh, Zigzag(1), documents=DOCUMENTS), make_inputs, forget_everything)


class Echo(Transport):
    """A rank, 0 of two by default, whose peers send what they are sent, on a stream of its own, as NCCL does."""

    name = "echo"

    def __init__(self, rank: int = 0, world: int = 2) -> None:
        super().__init__(rank, world)
        self.side = torch.cuda.Stream()

    @classmethod
    def refuses(cls, need):
        return "is for tests"

    @classmethod
    def connect(cls, need):
        raise AssertionError("made by tests")

    def _beside(self, copy_all: Callable[[], Tensor | None], *sent: Tensor) -> Pending:
        kept = list(sent)  # until they have been read: memory given back before would be another tensor's while the copy runs
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            result = copy_all()

        def finish():
            torch.cuda.current_stream().wait_stream(self.side)
            kept.clear()
            return result

        return Pending(finish)

    def _exchange(self, sends, receives):
        def echo() -> None:
            for number, message in enumerate(receives):
                whole = message.tensor.view(-1)
                whole.fill_(0.5)
                if sends:
                    sent = sends[number % len(sends)].tensor.reshape(-1)[: len(whole)]
                    whole[: len(sent)].copy_(sent)

        return self._beside(echo, *(message.tensor for message in sends))

    def _all_gather(self, tensor):
        return self._beside(lambda: torch.stack([tensor, tensor / 2]), tensor)

    def _reduce_scatter(self, tensor):
        return self._beside(lambda: tensor[0] + tensor[1], tensor)

    def _all_reduce(self, tensor, op):
        return tensor * 2


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("strategy", ["ring", "gather"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_replays_of_a_plan_with_transfers_read_what_left_the_caches(layout, strategy, documents):
    problem = AttentionProblem(Layout.parse(layout), Band(0), 2 * TOKENS, 2 * TOKENS, 2, strategy, documents and doubled(documents))
    kernel, softmax = KERNELS["torch_flash"], SoftmaxParams(0.125)
    sinks = torch.randn(4, device="cuda")
    executor = Executor(plan(problem, 0), Echo(), kernel, softmax, sinks)

    def act(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
        out, lse = executor.forward(q, k, v)
        return [out, lse, *executor.backward(Saved(q, k, v, out, lse), dout)]

    check_replays(act, make_inputs, forget_everything)


@pytest.mark.parametrize("documents", [None, (5000, 3192)])
def test_replays_of_calls_on_other_ranks_keys_that_two_streams_share(documents):
    """A rank between others has two calls on their keys: the capture ends with both streams joined."""
    tokens, bounds = 2048, documents and Documents.from_lengths(documents)
    layout = Layout.parse("zigzag/documents" if documents else "zigzag")
    todo = plan(AttentionProblem(layout, Band(0), 4 * tokens, 4 * tokens, 4, "ring", bounds, 1), 1)
    assert todo.is_on_two_streams("torch_flash")
    assert len(todo.steps[1].calls) == 2
    executor = Executor(todo, Echo(1, 4), KERNELS["torch_flash"], SoftmaxParams(0.125))

    def act(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
        out, lse = executor.forward(q, k, v)
        return [out, lse, *executor.backward(Saved(q, k, v, out, lse), dout)[:3]]

    check_replays(act, lambda: make_inputs(tokens=tokens))


def test_what_cannot_be_captured_is_refused_by_name_and_can_be_captured_after_a_call(mesh):
    q, k, v, dout = make_inputs()
    documents = Documents.from_lengths([11, 501])
    act, once = attention(mesh, Zigzag(1), documents=documents), "make the same call once before capturing"
    refused_in_a_graph(lambda: act(q, k, v, dout), RingCaptureError, "ranks compare a call that is new", once)
    refused_in_a_graph(
        lambda: ring_attention(q, k, v, strategy="local", documents=documents), RingCaptureError, "segments of packed calls", once
    )
    check_replays(act, make_inputs)
    dropped = attention(mesh, Zigzag(1), dropout_p=0.1)
    dropped(q, k, v, dout)
    refused_in_a_graph(
        lambda: dropped(q, k, v, dout), RingCaptureError, "dropout_p=0.1", "every replay would drop the same weights"
    )
    bounds = torch.tensor([0, 12, 512], dtype=torch.int32, device="cuda")
    refused_in_a_graph(
        lambda: ring_attention(q, k, v, strategy="local", documents=bounds), RingCaptureError, "reads documents= off the GPU"
    )
    scale = torch.tensor(0.1, device="cuda")
    refused_in_a_graph(lambda: ring_attention(q, k, v, strategy="local", scale=scale), RingCaptureError, "reads scale off the GPU")
    refused_in_a_graph(
        lambda: functional.ring_flash_attn_varlen_func(q[0], k[0], v[0], bounds, 500, causal=True, group=mesh.get_group()),
        RingCaptureError,
        "reads cu_seqlens off the GPU",
        "the very same tensor",
    )


class Projected(nn.Module):
    """A linear layer and attention."""

    def __init__(self, mesh) -> None:
        super().__init__()
        self.mesh, self.inner = mesh, nn.Linear(64, 8 * 64, bias=False, device="cuda", dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.inner(x).unflatten(-1, (8, 64)).split([4, 2, 2], 2)
        q, k, v = (from_local(part, self.mesh, [Zigzag(1)], length=TOKENS, run_check=False) for part in parts)
        return ring_attention(q, k, v, documents=DOCUMENTS).to_local()


# PyTorch keeps the autograd graph of its last warm-up, which ran on another stream, while it captures the backward pass.
KEPT_BY_PYTORCH = pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")


@KEPT_BY_PYTORCH
def test_a_module_of_make_graphed_callables_trains_as_without(mesh):
    module = Projected(mesh)
    sample = torch.randn(1, TOKENS, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(module), (sample,))
    for _ in range(3):
        x, dout = torch.randn_like(sample).detach(), make_inputs()[3]
        for a, b in zip(gradients(graphed, x, dout=dout), gradients(module, x, dout=dout), strict=True):
            assert torch.equal(a, b)


@KEPT_BY_PYTORCH
def test_layers_of_a_parallelized_model_train_as_without_graphs_and_another_packing_is_found(mesh):
    model = small_llama(TOKENS)
    parallelize_module(model, mesh, ring_plan(model, Zigzag(1)))
    check_captured_layers(model, TOKENS, DOCUMENTS, OTHERS)


@pytest.mark.filterwarnings("ignore")  # compilers warn of much that is not ours
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_with_reduce_overhead_attention_is_that_of_each_batch(mesh, packed):
    """Packings change from call to call: in a graph attention would keep that of the first."""

    def attend(x: Tensor, y: Tensor, documents: Documents | None) -> Tensor:
        tensors = x * 2, y, y + 1
        placed = [from_local(z, mesh, [Zigzag(1)], length=TOKENS, run_check=False) for z in tensors]
        return ring_attention(*placed, documents=documents).to_local() * 3

    torch._dynamo.reset()
    compiled = torch.compile(attend, mode="reduce-overhead", fullgraph=True)
    for number in range(6):
        documents = (DOCUMENTS, OTHERS)[number % 2] if packed else None
        x, y, _, dout = make_inputs()
        results = []
        for run in (compiled, attend):
            torch.compiler.cudagraph_mark_step_begin()
            leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
            out = run(*leaves, documents)
            results.append([out.detach().clone(), *(g.clone() for g in torch.autograd.grad(out, leaves, dout))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def moves(mesh, length: int) -> Act:
    """A tensor moved from layout to layout, and put together."""

    def act(x: Tensor, *_others: Tensor) -> list[Tensor]:
        placed = from_local(x.detach(), mesh, [Zigzag(1)], length=length, run_check=False)
        moved = redistribute(placed, [PLACEMENTS["stripe"]])
        return [moved.to_local(), full_tensor(moved)]

    return act


def over_nccl(layout: str, options: str) -> None:
    """The law of one rank, with transfers that NCCL carries; traffic is counted at the capture alone."""
    mesh, length = line("cuda"), dist.get_world_size() * TOKENS
    if options == "moves":
        act = moves(mesh, length)
    else:
        chosen = dict(OPTIONS[options])
        if "documents" in chosen:
            chosen["documents"] = doubled(chosen["documents"])
        act = attention(mesh, PLACEMENTS[layout], length, **chosen)
    with bitwise():
        inputs = make_inputs()
        if options != "moves":
            refused_in_a_graph(lambda: act(*inputs), RingCaptureError, "ranks compare a call that is new")
        graph = Captured(act, inputs)
        for _ in range(3):
            inputs = make_inputs()
            before = debug.traffic(mesh)
            found = graph(inputs)
            assert debug.traffic(mesh).since(before).bytes == 0
            for a, b in zip(found, act(*inputs), strict=True):
                assert torch.equal(a, b)
            assert debug.traffic(mesh).since(before).bytes > 0


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "stripe"])
def test_replays_over_two_gpus_are_bitwise_those_without_a_graph(pools, layout, options):
    pools.run(2, over_nccl, layout, options, device="cuda")


def test_moves_between_placements_over_two_gpus_can_be_captured(pools):
    pools.run(2, over_nccl, "zigzag", "moves", device="cuda")
