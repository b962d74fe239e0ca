"""From what a caller passes to what the operators take: the same checks for every function that calls attention.

    caller                          place                               inputs
    ring_attention                  read off the DTensors' placements   DTensors (B, S, H, D)
    F.scaled_dot_product_attention  read off the DTensors' placements   this rank's tensors, their dims in our order
    functional, transformers        a process group and a layout        this rank's tensors

`prepare` refuses what is wrong, compares the call with the other ranks, and returns the operator's arguments. What depends on
shapes and arguments alone is worked out once and remembered, so that a call like one before costs a look-up. Nothing is remembered
while a compiler traces, where lengths are symbols.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtensor_ring._torch import constant_number, constant_when_compiled, local_of
from dtensor_ring.cache import Cache
from dtensor_ring.captures import check_not_capturing
from dtensor_ring.ops.agree import Facts, check_agreement
from dtensor_ring.ops.arguments import (
    Arguments,
    check_extras,
    check_numbers,
    check_stages,
    check_strategy_name,
    factor_of,
    plain_numbers,
)
from dtensor_ring.ops.call import AUTO, AttentionCall
from dtensor_ring.ops.kernels import check_kernel_name, settings
from dtensor_ring.ops.place import Place
from dtensor_ring.ops.sharding import sink_placements
from dtensor_ring.planning.cost_model import CostModel
from dtensor_ring.planning.documents import Documents, Slices, encoded_of
from dtensor_ring.planning.head_sharing import refuses
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band, mask_text
from dtensor_ring.planning.problem import AttentionProblem

# Planning takes about 50 microseconds a tile.
MANY_STRIPE_TILES = 20_000
MOST_STRIPE_TILES = 2_000_000

_CALL_BYTES = 4 << 10  # of a call that is remembered: its text, what ranks compare, and its key


class Inputs(NamedTuple):
    """The tensors and documents of one attention.

    q is (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv): DTensors, or this rank's tensors. `sinks` (H,) and `alibi` (H,) or
    (B, H) are those of all heads and rows of the batch; sinks may be a DTensor beside DTensors.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None = None
    alibi: Tensor | None = None
    documents: Documents | Slices | Tensor | Sequence[int] | None = None


class Prepared(NamedTuple):
    """What the operators take after q, k and v, in their order: this rank's part of sinks, slopes and documents."""

    sinks: Tensor | None
    alibi: Tensor | None
    documents: Tensor
    lengths: tuple[int, int]
    origin: tuple[int, int]
    call: str
    group: str


class _Checked(NamedTuple):
    """What is remembered of a call that was right: its text, and what ranks compare."""

    call: str
    facts: Facts


_CALLS = Cache("calls that were checked", most_bytes=1 << 20, most_entries=128)


def prepare(inputs: Inputs, asked: Arguments, place: Place, name: str, *, training: bool | None = None) -> Prepared:
    """Check a call, compare it over the ranks that share the sequence, and give the operator's arguments.

    Args:
        inputs: the tensors, of one dtype and of shapes that fit together.
        asked: the arguments.
        place: where the attention happens.
        name: what errors call the function.
        training: whether a backward pass may follow; None reads it off the tensors.

    Raises:
        TypeError: documents, sinks or slopes of a kind that does not fit.
        ValueError: window, numbers, documents, sinks or slopes that do not fit; documents that stripes would take minutes to plan;
            or ranks that do not agree.
        NotImplementedError: no kernel does what is asked; the text has each kernel's reason.
    """
    asked = plain_numbers(asked)
    check_numbers(asked)
    check_stages(asked)
    check_extras(place.q_shape[0], place.q_shape[2], inputs.sinks, inputs.alibi)
    documents = _documents(inputs.documents, place)
    _check_stripes(asked.strategy, documents, place)
    if training is None:
        training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:4])
    if torch.compiler.is_compiling():
        _check_strategy(asked.strategy, inputs, place)
        kind = inputs.q.device.type, inputs.q.dtype, constant_number(inputs.q.shape[3]), constant_number(inputs.v.shape[3])
        call = _constant(_as_constants(asked), str(place.layout), kind, training, inputs.alibi is not None)
    else:
        checked = _remembered(inputs, asked, place, documents, name, training)
        call = checked.call
        # Ranks meet before what follows, which looks at this rank's part of batch and heads: what raises there on one rank only
        # would leave the others waiting in attention itself.
        if place.transport is not None:
            check_agreement(place.transport, checked.facts, str(documents) if isinstance(documents, Documents) else "")
    # Only the hash of dropout reads the origin. Zeros elsewhere keep the calls, and the compiled graphs, of all ranks alike.
    lengths, origin = (place.q_shape[1], place.k_shape[1]), place.origin if asked.dropout_p else (0, 0)
    bounds = encoded_of(_mine(documents, inputs.q, place))
    return Prepared(_sinks(inputs, place), _slopes(inputs, place), bounds, lengths, origin, call, place.group)


def _remembered(
    inputs: Inputs, asked: Arguments, place: Place, documents: Documents | Slices | None, name: str, training: bool
) -> _Checked:
    """The text of the call and what ranks compare; worked out where no call like it was checked before."""
    q, k, v = (local_of(x) for x in inputs[:3])
    # With ALiBi, strategy and kernel depend on where documents end. Without it documents stay out of the key: every batch of a run
    # has others, and each would be checked anew.
    bounds = documents if inputs.alibi is not None else None
    beside = inputs.sinks is None, inputs.alibi is None, documents is None
    # equal numbers of other types are other arguments: a window of (2.0, 0) is refused, one of (2, 0) is not
    kinds = tuple(map(type, asked.window)) if isinstance(asked.window, tuple) else (list,)
    rest = training, settings(), name
    # The group is left out, and its transport with it: what is checked does not depend on them, and a cache must not keep a group
    # alive. What errors call it is in the key, since it tells a rank alone, which may say strategy="local", from a group of one.
    key = asked, kinds, *place[1:7], q.shape, k.shape, v.shape, q.dtype, q.device.type, bounds, *beside, *rest
    try:
        entry = _CALLS.find(key)
    except TypeError:  # an argument that is wrong, or a list where a tuple is meant
        return _check(inputs, asked, place, documents, name, training)
    if entry is not None:
        return entry[0]  # pyrefly: ignore[bad-return]  # nothing else is kept there
    checked = _check(inputs, asked, place, documents, name, training)
    _CALLS.keep(key, checked, _CALL_BYTES + (0 if bounds is None else bounds.nbytes))
    return checked


def _check(
    inputs: Inputs, asked: Arguments, place: Place, documents: Documents | Slices | None, name: str, training: bool
) -> _Checked:
    _check_strategy(asked.strategy, inputs, place)
    q, k, v = (local_of(x) for x in inputs[:3])
    call = _call(asked, place.layout, q.shape[3], training)
    token_bytes = k.shape[0] * k.shape[2] * (q.shape[3] + v.shape[3]) * q.dtype.itemsize
    problem = call.problem((place.q_shape[1], place.k_shape[1]), place.world, documents, token_bytes)
    need = call.need(q.device.type, q.dtype, q.shape[3], v.shape[3], q.shape[0], q.shape[2])
    # Chosen here only to be compared: ranks may have other packages, and so another kernel for "auto". The operator chooses again.
    strategy, kernel = call.choose(need, inputs.alibi is not None, problem)
    words = (
        str(q.dtype),
        f"mask {call.band.text}",
        replace(problem, strategy=strategy).exchange,
        f"cost model {CostModel.of_text(call.cost_model).digest if call.cost_model else 'of the device'}",
        kernel.name,
        f"scale {call.scale}, softcap {call.softcap}, dropout_p {call.dropout_p}, deterministic {call.deterministic}",
        f"{'no ' if inputs.sinks is None else ''}sinks, {'no ' if inputs.alibi is None else ''}ALiBi",
    )
    shapes = *place.q_shape, *place.k_shape, *place.v_shape
    return _Checked(str(call), Facts(name, place.layout, shapes, (q.shape[1], k.shape[1]), words))


def _call(asked: Arguments, layout: Layout, head_dim: int, training: bool) -> AttentionCall:
    """The call as a value; raises TypeError or ValueError for a mask, scale, strategy or kernel that does not fit."""
    check_strategy_name(asked.strategy)
    check_kernel_name(asked.kernel)
    return AttentionCall(
        Band.parse(mask_text(asked.is_causal, asked.window)),
        factor_of(asked.scale, head_dim),
        layout,
        # "local" attends on one rank, where there is nothing to choose from; elsewhere it was refused.
        AUTO if asked.strategy in (None, "local") else asked.strategy,
        asked.kernel or AUTO,
        float(asked.softcap),
        float(asked.dropout_p),
        bool(asked.deterministic),
        training,
        asked.kv_head_group_size,
        asked.stages or 0,
        asked.memory or 0,
        asked.cost_model or "",
    )


def _as_constants(asked: Arguments) -> tuple[object, ...]:
    """The arguments, no number of them a symbol.

    A compiler takes a number that changes from call to call for a symbol, and the text of a call cannot hold one: the scale or the
    window are part of the graph, which another value compiles anew.
    """
    window = asked.window
    if isinstance(window, (tuple, list)):
        window = tuple(constant_number(side) for side in window)
    return asked[0], window, *(constant_number(argument) for argument in asked[2:])


@constant_when_compiled
def _constant(asked: tuple[Any, ...], layout: str, kind: tuple[str, torch.dtype, int, int], training: bool, has_alibi: bool) -> str:
    """The text of the call; `kind` is what the kernel is asked of tensors.

    The compiler runs this and keeps the text as a constant, so the arguments must be hashable constants themselves: a layout comes
    as its text. What the call leaves open is chosen here once, so that refusals are raised while compiling; with ALiBi the choice
    depends on lengths, symbols here, and is made inside the operator.
    """
    call = _call(Arguments(*asked), Layout.parse(layout), kind[2], training)
    if not has_alibi:
        call.choose(call.need(*kind))
    return str(call)


def _check_strategy(strategy: str | None, inputs: Inputs, place: Place) -> None:
    """Raises ValueError unless the ranks of the place can follow the strategy."""
    if not place.group:
        return
    if strategy == "local":
        raise ValueError(
            f"strategy='local' attends to this rank's tokens alone, but {place.axis} holds the sequence as {place.layout}: leave "
            "strategy out, or pass x.to_local()"
        )
    if strategy == "ulysses":
        reason = refuses(place.world, local_of(inputs.q).shape[2], local_of(inputs.k).shape[2])
        if reason is not None:
            raise ValueError(f"{place.axis}: {reason}")


def _documents(documents: Documents | Slices | Tensor | Sequence[int] | None, place: Place) -> Documents | Slices | None:
    """The documents of the whole batch, checked to fit it."""
    if documents is not None and not isinstance(documents, Slices):
        documents = _whole(documents, place)
    if place.layout.cut and (not isinstance(documents, Documents) or documents.rows != 1):
        raise ValueError(
            f"q is laid out document by document ({place.layout}): pass documents=, one row for the whole batch, found {documents}"
        )
    return documents


def _whole(documents: Documents | Tensor | Sequence[int], place: Place) -> Documents:
    batch, q_length, k_length = place.q_shape[0], place.q_shape[1], place.k_shape[1]
    # Documents are checked by their numbers, and while a compiler traces a tensor has none.
    if torch.compiler.is_compiling() and not isinstance(documents, Documents):
        raise TypeError("inside torch.compile documents must be a Documents, made outside of the compiled function")
    if q_length != k_length:
        raise ValueError(f"documents need queries and keys of one length, found {q_length} and {k_length}")
    if isinstance(documents, Tensor) and documents.is_cuda:
        check_not_capturing("the host reads documents= off the GPU", "pass a Documents, which a replay then goes on with")
    documents = Documents.of(documents, q_length)
    if documents.rows not in (1, batch):
        raise ValueError(
            f"documents have {documents.rows} rows, but the batch has {batch}: give one row, or one for each batch row"
        )
    return documents


def _check_stripes(strategy: str | None, documents: Documents | Slices | None, place: Place) -> None:
    """Raises ValueError where stripes of so many documents take minutes to plan for each batch, and warns of seconds."""
    if place.layout.in_order or place.world == 1 or not isinstance(documents, Documents) or torch.compiler.is_compiling():
        return
    length, name = place.q_shape[1], "gather" if strategy == "gather" else "ring"
    tiles = AttentionProblem(place.layout, Band(), length, length, place.world, name, documents).tiles_of_stripes
    if strategy == "ulysses" or tiles <= MANY_STRIPE_TILES:
        return
    remedy = "cut packed documents with Zigzag(1, per_document=True), which is planned in milliseconds"
    if tiles > MOST_STRIPE_TILES:
        raise ValueError(
            f"{place.layout} over {place.world} ranks cuts {documents} into about {tiles} tiles, which take the host minutes to "
            f"plan for each batch; up to {MOST_STRIPE_TILES} are planned: {remedy}"
        )
    # The text is that of every batch, so that Python shows it once.
    warnings.warn(
        f"{place.layout} cuts packed documents into more than {MANY_STRIPE_TILES} tiles, which take the host seconds to plan for "
        f"each batch: {remedy}",
        stacklevel=2,
    )


def _mine(documents: Documents | Slices | None, q: Tensor, place: Place) -> Documents | Slices | None:
    """The documents of this rank's batch rows."""
    if documents is None or documents.rows == 1:
        return documents
    first, rows = place.origin[0], local_of(q).shape[0]
    return documents.select(first, first + rows) if rows else documents.select(0, 1)  # a rank without batch rows: any row will do


def _slopes(inputs: Inputs, place: Place) -> Tensor | None:
    """The slopes of this rank's heads and batch rows."""
    slopes, (row, head), local = inputs.alibi, place.origin, local_of(inputs.q)
    if slopes is None or tuple(local.shape[::2]) == (place.q_shape[0], place.q_shape[2]):
        return slopes
    # Sliced here and not by the kernel, which is given this rank's tensors alone and counts heads and rows from 0.
    mine = slopes[..., head : head + local.shape[2]]
    return mine if mine.dim() == 1 else mine[row : row + local.shape[0]]


def _sinks(inputs: Inputs, place: Place) -> Tensor | None:
    """The sinks of this rank's heads, differentiable; DTensors are checked to lie as q does."""
    sinks, q = inputs.sinks, inputs.q
    if not isinstance(sinks, DTensor):
        heads = local_of(q).shape[2]
        return sinks if sinks is None or heads == place.q_shape[2] else sinks[place.origin[1] : place.origin[1] + heads]
    if not isinstance(q, DTensor):
        raise TypeError("sinks are a DTensor, but q, k and v are plain tensors")
    needed = sink_placements(q.placements)
    if sinks.device_mesh != q.device_mesh or sinks.placements != needed:
        raise ValueError(
            f"sinks are placed {sinks.placements} on {sinks.device_mesh}, beside q they must be {needed} on {q.device_mesh}"
        )
    return sinks
