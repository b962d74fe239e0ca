"""CUDA graphs, as far as a CPU shows: what is refused while one is captured, and what stays in memory for its replays.

Nothing is captured here: `capturing` makes PyTorch say that something is. `test_gpu_graphs.py` captures and replays.
"""

from __future__ import annotations

import gc
import time
import weakref
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import line, make_case, refused
from models import make_batch, make_model
from torch.distributed.tensor.parallel import parallelize_module

from dtensor_ring import Documents, Zigzag, debug, from_local, ring_attention, ring_plan
from dtensor_ring.cache import cached
from dtensor_ring.captures import _HELD, RingCaptureError, check_not_capturing, kept_for_graphs
from dtensor_ring.comm import AloneTransport, LoopbackTransport, Message, transport_along
from dtensor_ring.integrations.transformers.attention import STATE
from dtensor_ring.ops.executors.routes import routes
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.problem import AttentionProblem

DOCUMENTS = Documents.from_lengths([5, 8, 3])


@contextmanager
def capturing():
    with patch.multiple(torch.cuda, is_initialized=lambda: True, is_current_stream_capturing=lambda: True):
        yield


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    debug.forget_captured()


def share_of_16_tokens(grad: bool = False):
    """q, k and v of this rank, as DTensors."""
    case = make_case(16)
    tokens = 16 // dist.get_world_size()
    shares = [x[:, :tokens].clone().requires_grad_(grad) for x in case.inputs]
    return [from_local(x, line(), [Zigzag(1)], length=16, run_check=False) for x in shares]


def captured(act, *texts: str) -> None:
    with capturing():
        refused(act, RingCaptureError, *texts)


def new_calls() -> None:
    placed = share_of_16_tokens()
    new = "ranks compare a call that is new", "make the same call once before capturing"
    captured(lambda: ring_attention(*placed), "ring_attention over mesh axis 'cp'", *new)
    wanted = ring_attention(*placed)
    captured(lambda: ring_attention(*placed, window=(3, 0)), *new)
    captured(lambda: ring_attention(*placed, documents=DOCUMENTS), *new)
    with debug.check_every_call():
        captured(lambda: ring_attention(*placed), "outside of check_every_call")
    # Nothing was sent or left behind: what is refused so does not part the ranks.
    assert torch.equal(ring_attention(*placed).to_local(), wanted.to_local())
    ring_attention(*placed, documents=DOCUMENTS)
    if dist.get_world_size() > 1:
        captured(lambda: ring_attention(*placed), "the transport 'process_group' of mesh axis 'cp' is on gloo")
        return
    with capturing():
        assert torch.equal(ring_attention(*placed).to_local(), wanted.to_local())
        ring_attention(*placed, documents=DOCUMENTS)


@pytest.mark.parametrize("world", [1, 2])
def test_a_call_that_ranks_have_not_compared_is_refused_on_every_rank_while_a_graph_is_captured(pools, world):
    pools.run(world, new_calls)


def comparisons() -> None:
    x = torch.ones(1, 8 // dist.get_world_size(), 2, 4)
    captured(
        lambda: from_local(x, line(), [Zigzag(1)], length=8), "from_local: ranks of mesh axis 'cp' compare it", "run_check=False"
    )
    placed = from_local(x, line(), [Zigzag(1)], length=8)
    start = time.monotonic()
    with capturing():
        # Nobody waits in a meeting: the error is raised at once, and no record is sent that a later call would take for its own.
        refused(lambda: ring_attention(placed, placed, placed, window=(3, 1)), ValueError, "window")
    assert time.monotonic() - start < 4
    transport = transport_along(line())
    assert "window" in transport.note_of(transport.rank, transport.note)
    dist.barrier()
    ring_attention(placed, placed, placed)


def test_what_compares_ranks_is_refused_and_what_one_rank_refuses_is_not_sent(pools):
    pools.run(2, comparisons)


def dropped() -> None:
    placed = share_of_16_tokens(grad=True)
    options = {"dropout_p": 0.25, "kernel": "math"}
    texts = "dropout_p=0.25", "every replay would drop the same weights", "leave this layer out of the graph"
    out = ring_attention(*placed, **options)
    captured(lambda: ring_attention(*placed, **options), *texts)
    captured(lambda: torch.autograd.grad(out, placed, torch.ones_like(out), retain_graph=True), *texts)
    assert all(x is not None for x in torch.autograd.grad(out, placed, torch.ones_like(out)))


def test_dropout_is_refused_forward_and_backward(pools):
    pools.run(1, dropped)


def test_without_a_graph_nothing_is_refused():
    check_not_capturing("something", "something else")
    captured(lambda: check_not_capturing("a cannot b", "do c"), "a cannot b, and a CUDA graph is being captured: do c")


def test_threads_are_refused_in_every_kind_of_transfer_and_one_rank_in_none():
    x = torch.ones(2, 3)

    def transfers(transport):
        yield lambda: transport.exchange([Message(1 - transport.rank, x)], [Message(1 - transport.rank, x.clone())])
        yield lambda: transport.all_gather(x)
        yield lambda: transport.reduce_scatter(x[: transport.world])
        yield lambda: transport.all_reduce(x)

    def body(transport):
        for act in transfers(transport):
            refused(act, RingCaptureError, "a transfer: the transport 'loopback'", "threads of one process")

    with capturing():
        LoopbackTransport.run(2, body)
        alone = AloneTransport()
        alone.exchange([], []).wait()
        for act in list(transfers(alone))[1:]:
            act()


class Value:
    """Something that may be referred to weakly."""


def make_cached(most_entries: int = 1):
    @kept_for_graphs
    @cached("of graphs", most_bytes=100, most_entries=most_entries, size=lambda value, key: 10)
    def value_of(key: int) -> Value:
        return Value()

    return value_of


def test_what_is_read_under_capture_stays_when_it_leaves_its_cache_until_it_is_forgotten():
    value_of = make_cached()
    read, other = (weakref.ref(value_of(key)) for key in (1, 2))
    value_of(1)
    assert read() is None, "nothing captured it, so it left the cache of one entry"
    read = weakref.ref(value_of(1))
    with capturing():
        assert value_of(1) is read()
    value_of(3)
    value_of.cache_clear()
    gc.collect()
    assert other() is None
    assert read() is not None
    (use,) = (use for use in debug.caches() if use.name == "held by CUDA graphs")
    assert (use.entries, use.bytes, use.most_bytes) == (1, 10, 256 << 20)
    with capturing():
        assert value_of(1) is read(), "a second graph reads what the first holds"
    assert value_of(1) is not read(), "out of graphs a cache goes by its own rule"
    assert debug.forget_captured() == 10
    gc.collect()
    assert read() is None
    assert debug.forget_captured() == 0


def test_what_is_not_on_the_device_yet_is_refused_by_name():
    value_of = make_cached()
    captured(lambda: value_of(1), "of graphs of this call", "once before capturing, forward and backward", "more than 100 bytes")
    value_of(1)
    with capturing():
        value_of(1)


def test_more_than_graphs_may_hold_is_refused_and_nothing_that_they_hold_leaves(monkeypatch):
    value_of = make_cached(most_entries=5)
    kept = [weakref.ref(value_of(key)) for key in range(4)]
    monkeypatch.setattr(_HELD, "_most_bytes", 25)
    with capturing():
        for key in (0, 1, 0):
            value_of(key)
    captured(lambda: value_of(2), "hold 2 sets of index tensors of 20 bytes", "one more of 10 bytes", "debug.forget_captured()")
    monkeypatch.setattr(_HELD, "_most_bytes", 1000)
    monkeypatch.setattr(_HELD, "_most_entries", 3)
    with capturing():
        value_of(2)
    captured(lambda: value_of(3), "3 sets, 1000 bytes")
    value_of.cache_clear()
    gc.collect()
    assert [ref() is not None for ref in kept] == [True, True, True, False]


def test_index_tensors_of_a_captured_call_are_never_another_tensor_s_memory():
    problem = AttentionProblem(Layout("stripe"), Band(0), 16, 16, 2, "ring", DOCUMENTS)
    device = torch.device("cpu")
    routes.cache_clear()
    captured(lambda: routes(problem, 0, 1, device), "places of transfers of this call")
    tensors = [weakref.ref(x) for route in routes(problem, 0, 1, device) for x in route.tensors]
    assert tensors, "there is something to keep"
    with capturing():
        routes(problem, 0, 1, device)
    routes.cache_clear()
    gc.collect()
    assert all(ref() is not None for ref in tensors)
    assert debug.forget_captured() > 0
    gc.collect()
    assert all(ref() is None for ref in tensors)


def test_compilers_leave_attention_out_of_the_graphs_that_they_capture():
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    if tag is None:
        pytest.skip("this PyTorch has no such tag")
    ours = torch.ops.dtensor_ring
    for op in (ours.attention, ours.attention_backward, ours.without_gradient_of_lse):
        assert tag in op.default.tags


def replayed_layers() -> None:
    """A layer that gives what it gave before stands for one that is replayed: its code does not run."""
    model, mesh = make_model("llama"), line()
    plan = ring_plan(model, Zigzag(1))
    parallelize_module(model, mesh, plan)
    batch, packed = make_batch(16, rows=1), Documents.from_lengths([6, 10])
    captured(lambda: model(**batch), "LlamaForCausalLM reads its batch on the host", "capture its layers")
    wanted = model(**batch).loss
    attention = model.model.layers[0].self_attn
    original, given = attention.forward, []

    def record(*args, **kwargs):
        with capturing():
            given.append(original(*args, **kwargs))
        return given[-1]

    attention.forward = record
    model(**batch)
    attention.forward = lambda *args, **kwargs: given[-1]
    assert torch.equal(model(**batch).loss, wanted)
    refused(
        lambda: model(**batch, documents=packed),
        RingCaptureError,
        "LlamaAttention of layer 0 was replayed",
        f"16 tokens in {packed}, and was captured with 16 tokens in one document",
        "capture one for each",
    )
    attention.forward = original
    model(**batch, documents=packed)  # not replayed
    assert getattr(attention, STATE).graphs.ran.documents == packed
    attention.forward = record
    model(**batch, documents=packed)
    attention.forward = lambda *args, **kwargs: given[-1]
    model(**batch, documents=packed)
    model(**batch)


def test_a_layer_that_is_replayed_on_a_batch_it_was_not_captured_with_is_found(pools):
    pools.run(1, replayed_layers)
