"""The operators `dtensor_ring::attention` and `dtensor_ring::attention_backward`: fakes, autograd and the choice of an executor.

    per rank    q_BSHD (B, Sq/W, H, D), k_BSHD (B, Sk/W, Hk, D), v_BSHD (B, Sk/W, Hk, Dv) -> out (B, Sq/W, H, Dv), lse (B, H, Sq/W)

    sinks       (H,) of this rank's heads, or None                alibi     slopes (H,) or (B, H) of this rank's part, or None
    documents   an int64 CPU tensor, `Documents.encoded`; no elements for no documents
    lengths     global tokens of queries and of keys              origin    first batch row and head of this rank's part
    call        the text of an `AttentionCall`                    group     the name of the process group, "" for this rank alone
    replay      int64 on the CPU, what backward must do as forward did: the number of the kernel, and of dropout masks the seed

Neither DTensor's caches nor compiled graphs depend on the values of `documents`, and `lengths` and `origin` may be symbols. The
operators take no defaults: DTensor's dispatch drops arguments equal to one. They are defined by schema and implementation, since a
call costs twice as much under the decorator `torch.library.custom_op`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor

from dtensor_ring._torch import OUTSIDE_OF_GRAPHS, below_autograd, is_capturing, lasting, local_of, named_in_profiles
from dtensor_ring._torch_dispatch import is_unobserved
from dtensor_ring._torch_groups import resolve_group
from dtensor_ring.cache import cached
from dtensor_ring.captures import check_not_capturing
from dtensor_ring.comm import Transport, transport_of
from dtensor_ring.ops.call import AttentionCall
from dtensor_ring.ops.dtypes import accumulate_dtype
from dtensor_ring.ops.executors.exchange import Direction
from dtensor_ring.ops.executors.head_groups import in_groups
from dtensor_ring.ops.executors.plan_executor import Executor
from dtensor_ring.ops.executors.protocol import AttentionExecutor
from dtensor_ring.ops.executors.ulysses import UlyssesExecutor
from dtensor_ring.ops.kernels import Kernel, KernelRequirements, Saved, SoftmaxParams, kernel_number, kernel_numbered, settings
from dtensor_ring.placements import SequencePlacement, redistribute
from dtensor_ring.placements.redistribute import wrap
from dtensor_ring.planning.cost_model import Link
from dtensor_ring.planning.costs import AttentionShape
from dtensor_ring.planning.documents import Documents, Slices
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import plan

Pair = Sequence[int]

# Neither documents nor lengths nor origin are constants of a graph: see the module's docstring.
_FORWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? alibi, Tensor documents, SymInt[] lengths, SymInt[] origin, str call, "
    "str group) -> (Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? alibi, Tensor out, Tensor lse, Tensor replay, "
    "Tensor documents, SymInt[] lengths, SymInt[] origin, str call, str group) -> (Tensor, Tensor, Tensor, Tensor)"
)
NO_GRADIENT_OF_LSE = "the lse of ring_attention has no gradient: use lse.detach(), or compute the term from scores"


def attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    """The operator: out, lse and replay of q, k, v and a `Prepared`."""
    return torch.ops.dtensor_ring.attention.default(*arguments)


def attention_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: ANN401
    """The operator of the gradients: dq, dk, dv and dsinks."""
    return torch.ops.dtensor_ring.attention_backward.default(*arguments)


def attention_here(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    """As `attention`, inside autograd functions: past the dispatcher where nobody would see the operator there."""
    with below_autograd():
        return (_attention if is_unobserved(arguments[:5]) else attention)(*arguments)


def attention_backward_here(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: ANN401
    """As `attention_backward`, inside autograd functions: past the dispatcher where nobody would see the operator there."""
    with below_autograd():
        return (_attention_backward if is_unobserved(arguments[:9]) else attention_backward)(*arguments)


def without_gradient_of_lse(dout: Tensor, dlse: Tensor) -> Tensor:
    """The operator of compiled code that returns a copy of dout, or raises NotImplementedError if dlse is not zero."""
    return torch.ops.dtensor_ring.without_gradient_of_lse.default(dout, dlse)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    documents: Tensor,
    lengths: Pair,
    origin: Pair,
    call: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Out and lse of this rank's queries, and what backward must do alike."""
    if is_capturing():
        _check_captured(call)
    transport = transport_of(resolve_group(group) if group else None)
    resolved = _resolved_call(call, q, v, alibi, documents, lengths, transport)
    executor = _executor(resolved, transport, (sinks, alibi), origin)
    replay = _replay(AttentionCall.parse(call), resolved.kernel)
    with _without_autocast(q.device.type), _named(resolved, executor, transport, (q, k, v), "forward"):
        return *executor.forward(_inner(q), _inner(k), _inner(v), _seed(replay)), replay


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulate_dtype(q.dtype))
    replay = torch.empty(_replay_length(AttentionCall.parse(rest[5])), dtype=torch.int64)
    return q.new_empty((*q.shape[:3], v.shape[3])), lse, replay


def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    out: Tensor,
    lse: Tensor,
    replay: Tensor,
    documents: Tensor,
    lengths: Pair,
    origin: Pair,
    call: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv of this rank's shares, and its part of dsinks, empty without sinks."""
    if is_capturing():
        _check_captured(call)
    transport = transport_of(resolve_group(group) if group else None)
    resolved = _resolved_call(call, q, v, alibi, documents, lengths, transport, _kernel_name(replay))
    executor = _executor(resolved, transport, (sinks, alibi), origin)
    # Gradients may be expanded: that of `out.sum()` has stride 0 in every dim, which kernels do not take.
    saved, dout = Saved(_inner(q), _inner(k), _inner(v), out, lse), dout.contiguous()
    with _without_autocast(q.device.type), _named(resolved, executor, transport, (q, k, v), "backward"):
        dq, dk, dv, dsinks = executor.backward(saved, dout, _seed(replay))
    # The schema has four tensors, so no gradient is an empty one.
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    *_rest: Any,  # noqa: ANN401
) -> tuple[Tensor, ...]:
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
    q, k, v, sinks, alibi, documents, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, sinks, alibi, *output, documents)
    # Neither the lse nor the replay has a gradient here, and none must be asked for.
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dout: Tensor, *_others: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    q, k, v, sinks, alibi, out, lse, replay, documents = ctx.saved_tensors
    if isinstance(dout, DTensor):
        dout = placed_as(dout, out.placements, documents)
    dq, dk, dv, dsinks = attention_backward(dout, q, k, v, sinks, alibi, out, lse, replay, documents, *ctx.rest)
    return dq, dk, dv, None if sinks is None else dsinks, None, None, *(None for _ in ctx.rest)


def _without_gradient_of_lse(dout: Tensor, dlse: Tensor) -> Tensor:
    if dlse.any():  # the host waits for a GPU here, in compiled code that returns lse without lse.detach()
        raise NotImplementedError(NO_GRADIENT_OF_LSE)
    return dout.clone()


def _fake_without_gradient_of_lse(dout: Tensor, dlse: Tensor) -> Tensor:
    return torch.empty_like(dout)


def _on_local_tensors(_mode: object, op: OpOverload, _types: object, args: tuple[DTensor, DTensor], _kwargs: object) -> DTensor:
    dout, dlse = args
    return wrap(op(local_of(dout), local_of(dlse)), dout.device_mesh, dout.placements, dout.shape)


def refuse_second_gradient(*_context: object) -> NoReturn:
    """The backward of the gradients of attention."""
    raise NotImplementedError(
        "the gradients of ring_attention have no gradient themselves: leave create_graph=True out, or keep what is differentiated "
        "twice away from attention"
    )


def register() -> None:
    """Define the operators, for every backend: the implementation asks the tensors for their device."""
    # In a CUDA graph the host's part of a call would be that of the capture: its documents, its kernel, its seed of dropout.
    tags = torch.Tag.pt2_compliant_tag, *OUTSIDE_OF_GRAPHS
    # `nondeterministic_seeded` keeps compilers from merging or repeating calls with dropout as if they drew the same mask.
    torch.library.define("dtensor_ring::attention", _FORWARD, tags=(*tags, torch.Tag.nondeterministic_seeded))
    torch.library.define("dtensor_ring::attention_backward", _BACKWARD, tags=tags)
    torch.library.impl("dtensor_ring::attention", "CompositeExplicitAutograd", _attention)
    torch.library.impl("dtensor_ring::attention_backward", "CompositeExplicitAutograd", _attention_backward)
    torch.library.register_fake("dtensor_ring::attention", _fake)
    torch.library.register_fake("dtensor_ring::attention_backward", _fake_backward)
    # For compilers, and for direct calls of the operator; `ring_attention` has an autograd function of its own.
    torch.library.register_autograd("dtensor_ring::attention", _backward, setup_context=_setup_context)
    torch.library.register_autograd("dtensor_ring::attention_backward", refuse_second_gradient)
    name = "dtensor_ring::without_gradient_of_lse"
    torch.library.define(name, "(Tensor dout, Tensor dlse) -> Tensor", tags=tags)
    torch.library.impl(name, "CompositeExplicitAutograd", _without_gradient_of_lse)
    torch.library.register_fake(name, _fake_without_gradient_of_lse)
    torch.library.register_torch_dispatch(name, DTensor, _on_local_tensors)


def placed_as(dout: DTensor, placements: tuple[Any, ...], documents: Tensor) -> DTensor:
    """The gradient of out, placed as out is; `documents` are those that the operator was given."""
    if dout.placements == placements:
        return dout
    cut = any(isinstance(p, SequencePlacement) and p.layout.cut for p in placements)
    bounds = Documents.unpack(local_of(documents)) if cut else None
    assert not isinstance(bounds, Slices), "slices come with plain tensors only"
    return redistribute(dout, placements, documents=bounds)


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """Kernels choose their own dtypes. Entering autocast costs the host as much as a launch, so only where it is on."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _replay(asked: AttentionCall, kernel: Kernel) -> Tensor:
    # On the CPU, since the host needs its values: read off a GPU they would make the host wait. A tensor, since it is a result of
    # the operator, and saved as such it gives backward, and a compiled graph, the same kernel and the same masks.
    number = kernel_number(kernel)
    if asked.dropout_p:
        return torch.cat((_noted(number, 1), torch.randint(1 << 62, (1,))))
    return _noted(number, _replay_length(asked))


@cache
def _noted(number: int, length: int) -> Tensor:
    """A replay without a seed. Nobody writes into one, so all calls return the same: making it would cost them a microsecond."""
    with lasting():
        return torch.full((length,), number)


def _replay_length(asked: AttentionCall) -> int:
    """How many numbers a `replay` has: none where no backward follows, unless masks need a seed."""
    return 2 if asked.dropout_p else int(asked.training)


def _kernel_name(replay: Tensor) -> str | None:
    return kernel_numbered(replay.tolist()[0]) if replay.numel() else None


def _seed(replay: Tensor) -> int:
    return replay.tolist()[1] if replay.numel() == 2 else 0


def _inner(x: Tensor) -> Tensor:
    """Kernels need the last dim contiguous, no more."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _executor(
    resolved: _Resolved, transport: Transport, extras: tuple[Tensor | None, Tensor | None], origin: Pair
) -> AttentionExecutor:
    row, head = origin  # the first batch row and the first head
    rest = resolved.kernel, resolved.softmax, *extras, (row, head)
    # Ulysses exchanges heads, not tokens: each rank then has a whole sequence, and there is no plan to walk.
    if resolved.problem.strategy == "ulysses":
        return UlyssesExecutor(resolved.problem, transport, *rest)
    whole = Executor(plan(resolved.problem, transport.rank), transport, *rest)
    return in_groups(whole, resolved.kv_head_group_size)


def _named(
    resolved: _Resolved, executor: AttentionExecutor, transport: Transport, qkv: tuple[Tensor, Tensor, Tensor], direction: Direction
) -> AbstractContextManager[object]:
    """The name of a pass in profiles: the rank, what it computes, and the bytes that it sends."""

    def name() -> str:
        sent = getattr(executor.explain(*qkv), direction)
        return (
            f"dtensor_ring, rank {transport.rank} of {transport.world}, {direction}, {resolved.problem}, sends {sent.bytes} bytes"
        )

    return named_in_profiles(name)


class _Resolved(NamedTuple):
    """How a call is carried out on tensors of some lengths."""

    problem: AttentionProblem
    kernel: Kernel
    softmax: SoftmaxParams
    kv_head_group_size: int


def _check_captured(call: str) -> None:
    """Raises RingCaptureError for a call that a replay would get wrong."""
    dropout_p = AttentionCall.parse(call).dropout_p
    if dropout_p:
        check_not_capturing(
            f"attention with dropout_p={dropout_p} draws its seed on the host, so that every replay would drop the same weights",
            "capture it with dropout_p=0, or leave this layer out of the graph",
        )


def _resolved_bytes(resolved: _Resolved, *_others: object) -> int:
    return 2000 + resolved.problem.nbytes


@cached("calls resolved to kernels", most_bytes=2 << 20, most_entries=64, size=_resolved_bytes)
def _resolved(
    call: str,
    kind: tuple[str, torch.dtype],
    sizes: tuple[int, int, int],
    shape: AttentionShape,
    link: Link | None,
    documents: Documents | Slices | None,
    has_alibi: bool,
    _settings: tuple[bool, bool],
) -> _Resolved:
    """What `AttentionCall.choose` decides.

    `kind` is the device type and dtype of tensors, `sizes` the lengths of queries and of keys, and the world; kernels are judged by
    `kind` and `shape`, stages chosen by `shape` and `link`. The last argument is what kernels read of PyTorch's settings: a choice
    that is remembered without it would outlive it.
    """
    asked = AttentionCall.parse(call)
    *lengths, world = sizes
    problem = asked.problem(lengths, world, documents, shape.kv_numbers * shape.itemsize)
    need = asked.need(*kind, shape.head_dim, shape.v_head_dim, shape.batch, shape.heads)
    strategy, kernel = asked.choose(need, has_alibi, problem)
    problem = replace(problem, strategy=strategy)
    if not has_alibi:
        staged = asked.by_speed(problem, kernel.name, shape, link)
        # Other stages may give the kernel other kinds of blocks. Ranks have compared the one that is chosen above.
        if staged != problem and _is_chosen(kernel, asked, need, staged):
            problem = staged
    return _Resolved(problem, kernel, asked.softmax, asked.kv_head_group_size)


def _is_chosen(kernel: Kernel, asked: AttentionCall, need: KernelRequirements, problem: AttentionProblem) -> bool:
    try:
        return asked.choose(need, False, problem).kernel is kernel
    except NotImplementedError:
        return False


def _resolved_call(
    call: str,
    q: Tensor,
    v: Tensor,
    alibi: Tensor | None,
    documents: Tensor,
    lengths: Pair,
    transport: Transport,
    kernel: str | None = None,
) -> _Resolved:
    """How a call is carried out; in backward by the `kernel` that forward has used.

    Raises:
        NotImplementedError: the kernel of forward refuses in backward, since a setting that it reads was changed in between.
    """
    q_length, k_length = lengths
    kind, size = (q.device.type, q.dtype), q.dtype.itemsize
    shape = AttentionShape(q.shape[2], v.shape[2], q.shape[3], v.shape[3], q.shape[0], size, size)
    bounds, sizes = Documents.unpack(documents), (q_length, k_length, transport.world)
    rest = kind, sizes, shape, transport.known_link, bounds, alibi is not None, settings()
    resolved = _resolved(call, *rest)
    # Another kernel has other dropout masks. Where forward's is no longer the one to choose, it is asked for, and may refuse.
    if kernel is not None and resolved.kernel.name != kernel:
        resolved = _resolved(str(replace(AttentionCall.parse(call), kernel=kernel)), *rest)
    return resolved
