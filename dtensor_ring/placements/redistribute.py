"""Making DTensors with our placements, and moving them between placements, on meshes of any number of axes.

PyTorch's own `DTensor.redistribute` does not order such moves rightly on a mesh of more than one axis, so these functions
carry every move out themselves, one mesh axis at a time, and only fall back on PyTorch where none of our placements is
involved. All are differentiable: the backward pass moves gradients back. A gradient of a `Partial` or `Replicate`
input is the whole gradient, on every rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from typing_extensions import override

from dtensor_ring._renamed import renamed
from dtensor_ring._torch import dtensor_of, local_of
from dtensor_ring.cache import Cache
from dtensor_ring.comm import Transport, axis_name, collectives, transport_along, transports_of
from dtensor_ring.comm.rank_checks import refused_together
from dtensor_ring.placements.compare import check_documents, check_shares, check_whole
from dtensor_ring.placements.mesh_moves import move
from dtensor_ring.placements.placement import SequencePlacement, dim_of, holds_sequence, split_of
from dtensor_ring.planning.documents import Documents

Placements = tuple[Placement, ...]
DocumentsLike = Documents | Tensor | Sequence[int]

# Keys have placements and numbers of dims, not meshes: a mesh in a cache would outlive its process group.
_SEQUENCES = Cache("placements of from_local", most_bytes=128 << 10, most_entries=128)


@renamed(local="local_tensor", mesh="device_mesh", check="run_check")
def from_local(
    local_tensor: Tensor,
    device_mesh: DeviceMesh,
    placements: Sequence[Placement],
    *,
    length: int | None = None,
    run_check: bool = True,
) -> DTensor:
    """A DTensor from every rank's share of it; differentiable, sends nothing but the check.

    Args:
        local_tensor: this rank's share; its sequence dim holds as many tokens as the layout gives this rank.
        device_mesh: the mesh.
        placements: one placement a mesh axis, exactly one of them ours; dims under `Shard` are split evenly.
        length: global size of the sequence dim, always needed: it does not follow from uneven shares, and
            `DTensor.from_local` guesses it wrong.
        run_check: compare length, shape and dtype over the sequence axis, a few integers a rank for which the host waits. Without
            it ranks that disagree hang or compute nonsense later. Compiled graphs never check.

    Raises:
        TypeError: no length.
        ValueError: the share has the wrong size, or ranks disagree on length, shape or dtype (raised on all of them).
    """
    with refused_together(lambda: _sequence_axis_or_all(device_mesh, placements) if run_check else []):
        if length is None:
            raise TypeError(
                "from_local needs length=, the number of tokens of the whole sequence: ranks hold shares of different sizes where "
                f"it does not divide, so that this rank's share of shape {tuple(local_tensor.shape)} does not tell it. Pass "
                "length=S, or the batch.length of shard_batch"
            )
        if not isinstance(length, (int, torch.SymInt)):
            raise TypeError(f"from_local: length is the number of tokens of the whole sequence, found {length!r}")
        axis, placement, targets = _sequence_of(device_mesh, placements, local_tensor.ndim)
    # Outside of the block above, since it meets the other ranks itself, and what it finds is raised on all of them.
    if run_check and not torch.compiler.is_compiling():
        check_shares(local_tensor, device_mesh, axis, placement, length)
    shape = list(local_tensor.shape)
    # Batch and heads are sharded by PyTorch's placements, evenly by contract: their global size follows from the local one.
    for i, target in enumerate(targets):
        if isinstance(target, Shard):
            shape[target.dim] *= device_mesh.size(i)
    shape[placement.dim] = length
    return wrap(local_tensor, device_mesh, targets, shape)


@renamed(mesh="device_mesh")
def distribute_tensor(
    tensor: Tensor,
    device_mesh: DeviceMesh,
    placements: Sequence[Placement],
    *,
    src_data_rank: int | None = 0,
    documents: DocumentsLike | None = None,
) -> DTensor:
    """Spread a whole tensor over a mesh, as `torch.distributed.tensor.distribute_tensor`, but differentiable.

    The gradient of `tensor` is the whole gradient, on every rank.

    Args:
        tensor: the whole tensor, of the same shape and dtype on every rank.
        device_mesh: the mesh.
        placements: `Replicate`, `Shard` or ours, one a mesh axis.
        src_data_rank: whose data counts, as a rank of each mesh axis; it sends every other rank its share. None: every rank
            has the same data and cuts its own share, so nothing is sent.
        documents: bounds of packed documents in the dim of `Zigzag(dim, per_document=True)`, which needs them.

    Raises:
        TypeError: a DTensor.
        ValueError: a placement does not fit the tensor or the mesh, or ranks that receive data hold a tensor of another shape or
            dtype (raised on all ranks).
    """
    _refuse_compiling("distribute_tensor")
    # Without a source nothing is sent, and without documents nothing compared: no rank waits for one that refuses.
    meets = src_data_rank is not None or documents is not None
    with refused_together(lambda: transports_of(device_mesh) if meets else []):
        targets = _checked_for_distribution(tensor, device_mesh, placements, src_data_rank)
        given = _documents(documents, targets, tensor.shape)
    if src_data_rank is not None:
        check_whole(tensor, device_mesh, targets, src_data_rank)
    local = _Distribute.apply(tensor, device_mesh, targets, src_data_rank, _agreed(given, device_mesh))
    return wrap(local, device_mesh, targets, tensor.shape)


def redistribute(
    tensor: DTensor,
    placements: Sequence[Placement],
    *,
    mesh: DeviceMesh | None = None,
    documents: DocumentsLike | None = None,
) -> DTensor:
    """The same global tensor under other placements; only what must move is sent.

    Layout to layout of one dim is an all-to-all of the tokens that change rank; sequence to another dim (heads) an all-to-all
    of blocks; `Partial` to a layout a reduce-scatter; anything to `Replicate` an all-gather or all-reduce. `documents` are the
    bounds of packed documents, which `Zigzag(dim, per_document=True)` needs on either side. The mesh stays that of the tensor;
    `mesh` is deprecated, does nothing and will be removed.

    Raises:
        TypeError: not a DTensor.
        ValueError: a placement does not fit the tensor or the mesh, or two mesh axes would split one dim.
    """
    _refuse_compiling("redistribute")
    if not isinstance(tensor, DTensor):
        raise TypeError(f"redistribute takes a DTensor, found {type(tensor).__name__}: make one with dtensor_ring.from_local")
    if mesh is not None and mesh != tensor.device_mesh:
        raise ValueError(f"the tensor lies on {tensor.device_mesh}, not on {mesh}: redistribute keeps the mesh")
    if mesh is not None:
        text = "mesh= of redistribute does nothing, since a tensor stays on its mesh, and will be removed: leave it out"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
    if not holds_sequence((*tensor.placements, *_listed(placements))):
        return tensor.redistribute(placements=normalized(tensor.device_mesh, placements, tensor.ndim))
    with refused_together(partial(_sequence_axis_or_all, tensor.device_mesh, tensor.placements)):
        targets = normalized(tensor.device_mesh, placements, tensor.ndim)
        normalized(tensor.device_mesh, tensor.placements, tensor.ndim)
        given = _documents(documents, (*tensor.placements, *targets), tensor.shape)
    return _Redistribute.apply(tensor, targets, _agreed(given, tensor.device_mesh))


def full_tensor(tensor: DTensor, *, documents: DocumentsLike | None = None) -> Tensor:
    """The whole tensor, in token order, on every rank; its gradient counts once, as that of a replicated tensor.

    `documents` are needed where the tensor is `Zigzag(dim, per_document=True)`.
    """
    _refuse_compiling("full_tensor")
    if not isinstance(tensor, DTensor):
        raise TypeError(f"full_tensor takes a DTensor, found {type(tensor).__name__}")
    return redistribute(tensor, [Replicate()] * tensor.device_mesh.ndim, documents=documents).to_local()


def wrap(local: Tensor, mesh: DeviceMesh, placements: Placements, shape: Sequence[int]) -> DTensor:
    """A DTensor of known global shape; strides keep the order of dims that the local tensor has in memory."""
    # Compilers can trace `DTensor.from_local` and not the constructor. Outside of them an autograd node is made only where a
    # gradient is wanted, since every layer wraps three tensors and the host pays for each node.
    stride = _strides(local, shape)
    if torch.compiler.is_compiling():
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
    if local.requires_grad and torch.is_grad_enabled():
        return _Wrap.apply(local, mesh, placements, shape, stride)
    return dtensor_of(local.detach(), mesh, placements, shape, stride)


def _strides(local: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor of `shape` whose dims lie in memory in the order of those of the local tensor."""
    stride, dims = [1] * local.ndim, range(local.ndim)
    if local.is_contiguous():
        for i in dims[-2::-1]:
            stride[i] = stride[i + 1] * max(shape[i + 1], 1)
        return tuple(stride)
    # A dim is outside of another where its stride is larger. Equal strides (of dims of one element) keep the order of the dims.
    at = local.stride()
    for i in dims:
        for j in dims:
            if at[j] < at[i] or (at[j] == at[i] and j > i):
                stride[i] = stride[i] * max(shape[j], 1)
    return tuple(stride)


class _Wrap(torch.autograd.Function):
    """A local tensor as a DTensor, whose gradient is brought to the same placements.

    As `DTensor.from_local`, which however would move the gradient by PyTorch's own redistribute: that is unsound for our placements
    on meshes of several axes.
    """

    @staticmethod
    @override
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, local: Tensor, mesh: DeviceMesh, placements: Placements, shape: Sequence[int], stride: tuple[int, ...]
    ) -> DTensor:
        # Each summand of a partial sum has the whole sum's gradient.
        ctx.whole = tuple(Replicate() if isinstance(p, Partial) else p for p in placements)
        return dtensor_of(local, mesh, placements, shape, stride)

    @staticmethod
    @override
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, grad: DTensor
    ) -> tuple[Tensor, None, None, None, None]:
        if grad.placements != ctx.whole:
            grad = redistribute(grad, ctx.whole)
        # with create_graph the gradient has a graph of its own, which must not be cut
        return grad.to_local() if torch.is_grad_enabled() else local_of(grad), None, None, None, None


def _listed(placements: Sequence[Placement]) -> Sequence[Placement]:
    """The placements that a caller passed, as far as they can be looked through: `normalized` refuses the rest."""
    return placements if isinstance(placements, Sequence) else ()


def _sequence_of(mesh: DeviceMesh, placements: Sequence[Placement], ndim: int) -> tuple[int, SequencePlacement, Placements]:
    """The axis that holds the sequence, its placement, and all placements normalized; remembered for the next call."""
    # What is checked depends on the numbers of axes and dims only; the mesh plays a part in errors, which are not kept.
    key = (mesh.ndim, ndim, *placements) if isinstance(placements, (list, tuple)) else ()
    remembers = bool(key) and not torch.compiler.is_compiling()
    entry = _SEQUENCES.find(key) if remembers else None
    if entry is not None:
        return entry[0]  # pyrefly: ignore[bad-return]  # nothing else is kept there
    targets = normalized(mesh, placements, ndim)
    sequence = *sequence_axis(mesh, targets), targets
    if remembers:
        _SEQUENCES.keep(key, sequence, 1 << 10)
    return sequence


def _sequence_axis_or_all(mesh: DeviceMesh, placements: Sequence[Placement]) -> list[Transport]:
    """Where the other ranks learn that this one refuses a call: on the sequence axis, or on every axis where that is not clear."""
    # Arguments may be anything here: this runs after one of them was refused, and must not hide that error by one of its own.
    if not isinstance(mesh, DeviceMesh):
        return []
    axes = [i for i, p in enumerate(_listed(placements)) if isinstance(p, SequencePlacement)]
    if len(axes) == 1 and axes[0] < mesh.ndim:
        return [transport_along(mesh, axes[0])]
    return transports_of(mesh)


def _checked_for_distribution(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], source: int | None) -> Placements:
    """The placements that a plain tensor can be distributed as; raises what `distribute_tensor` raises."""
    if isinstance(tensor, DTensor):
        raise TypeError("distribute_tensor takes a plain tensor, found a DTensor: move it with dtensor_ring.redistribute")
    targets = normalized(mesh, placements, tensor.ndim)
    for i, target in enumerate(targets):
        if not isinstance(target, (Replicate, Shard, SequencePlacement)):
            raise ValueError(
                f"mesh axis {axis_name(mesh, i)}: a tensor cannot be distributed as {target!r}: use Replicate, Shard or ours"
            )
        if source is not None and not 0 <= source < mesh.size(i):
            raise ValueError(f"src_data_rank={source} is no rank of mesh axis {axis_name(mesh, i)}, which has {mesh.size(i)}")
    return targets


def _documents(given: DocumentsLike | None, placements: Sequence[Placement], shape: Sequence[int]) -> Documents | None:
    """The documents for the dim that is cut by them.

    Raises:
        ValueError: there is such a dim and no documents, or they end elsewhere; or they are given, and nothing is cut by them.
    """
    cut = next((p for p in placements if isinstance(p, SequencePlacement) and p.layout.cut), None)
    if cut is None:
        if given is not None:
            raise ValueError(f"documents cut tensors under Zigzag(dim, per_document=True) only, found {list(placements)}")
        return None
    if given is None:
        raise ValueError(f"{cut!r} lays tokens out document by document: pass documents= (one document: [0, {shape[cut.dim]}])")
    return Documents.of(given, shape[cut.dim])


def _agreed(documents: Documents | None, mesh: DeviceMesh) -> Documents | None:
    """The documents, after all ranks of the mesh have compared them; raises ValueError on every rank if they differ."""
    # Each rank works out by itself whose tokens go where: with other documents it would expect other messages, and wait for ever.
    if documents is not None:
        check_documents(transports_of(mesh), documents)
    return documents


def _refuse_compiling(name: str) -> None:
    # Moves compare ranks on the host and send messages of sizes that only the host knows: no part of that can be in a graph.
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{name} is not compiled: move tensors outside of the compiled function, and make DTensors inside it with from_local"
        )


def normalized(mesh: DeviceMesh, placements: Sequence[Placement], ndim: int) -> Placements:
    """The placements as a tuple, checked against mesh and tensor, `Shard` dims counted from the front."""
    if isinstance(placements, Placement):
        raise TypeError(f"placements is a sequence, one a mesh axis: [{placements!r}], found {placements!r} alone")
    if len(placements) != mesh.ndim:
        raise ValueError(f"the mesh has {mesh.ndim} axes, but {len(placements)} placements were given: {tuple(placements)}")
    checked: list[Placement] = []
    for i, placement in enumerate(placements):
        # Two spellings of one dim would compare as different placements, and a move be planned where there is nothing to move.
        if isinstance(placement, Shard) and placement.dim < 0:
            placement = Shard(placement.dim + ndim)
        # subclasses of PyTorch's placements (_StridedShard, _MaskPartial, ...) mean more than their attributes say
        if not isinstance(placement, SequencePlacement) and type(placement) not in (Shard, Replicate, Partial):
            raise ValueError(
                f"mesh axis {axis_name(mesh, i)}: {placement!r} is not supported: use Replicate, Shard, Partial or ours"
            )
        if isinstance(placement, (Shard, SequencePlacement)) and not 0 <= placement.dim < ndim:
            raise ValueError(f"mesh axis {axis_name(mesh, i)}: {placement!r} on a tensor of {ndim} dims")
        checked.append(placement)
    _refuse_nesting(mesh, checked)
    return tuple(checked)


def _refuse_nesting(mesh: DeviceMesh, placements: Sequence[Placement]) -> None:
    # A second axis would split this rank's tokens, which are no run of the sequence any more: no layout says what that means.
    for i, a in enumerate(placements):
        for j, b in enumerate(placements[:i]):
            if isinstance(a, (Shard, SequencePlacement)) and isinstance(b, (Shard, SequencePlacement)) and a.dim == b.dim:
                if isinstance(a, Shard) and isinstance(b, Shard):
                    continue  # PyTorch says what this means, and `mesh_moves` does it
                raise ValueError(
                    f"mesh axes {axis_name(mesh, j)} ({b!r}) and {axis_name(mesh, i)} ({a!r}) both split dim {a.dim}: one axis may "
                    "hold the sequence; flatten the two axes into one with mesh[...]._flatten()"
                )


def sequence_axis(mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[int, SequencePlacement]:
    """The mesh axis that holds the sequence, and its placement.

    Raises:
        ValueError: no placement of ours, or more than one.
    """
    axes = [(i, p) for i, p in enumerate(placements) if isinstance(p, SequencePlacement)]
    if len(axes) != 1:
        listed = ", ".join(f"{axis_name(mesh, i)}: {p!r}" for i, p in enumerate(placements))
        raise ValueError(f"exactly one mesh axis must hold the sequence as Contiguous, Zigzag or Stripe, found {listed}")
    return axes[0]


class _Distribute(torch.autograd.Function):
    """Cuts a whole tensor to this rank's share, axis by axis; backward gathers the whole gradient."""

    @staticmethod
    @override
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, tensor: Tensor, mesh: DeviceMesh, targets: Placements, source: int | None, documents: Documents | None
    ) -> Tensor:
        ctx.mesh, ctx.targets, ctx.shape, ctx.documents = mesh, targets, tensor.shape, documents
        local = tensor
        # Outer axes first: two shards of one dim mean that the inner axis splits what the outer one has left.
        for i, target in enumerate(targets):
            transport = transport_along(mesh, i)
            with transport.during(f"distribute_tensor as {target!r}"):
                if isinstance(target, Replicate):
                    local = local if source is None else collectives.broadcast(local, source, transport)
                elif source is None:
                    local = collectives.take_shard(
                        local, dim_of(target), split_of(target, documents), transport.world, transport.rank
                    )
                else:
                    local = collectives.scatter_shards(local, dim_of(target), split_of(target, documents), source, transport)
        return local.view_as(local) if local is tensor else local  # an autograd function must not return its input itself

    @staticmethod
    @override
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        whole = (Replicate(),) * ctx.mesh.ndim
        return move(grad, ctx.mesh, ctx.shape, ctx.targets, whole, ctx.documents), None, None, None, None


class _Redistribute(torch.autograd.Function):
    """A DTensor under other placements; backward moves the gradient to those that it came from."""

    @staticmethod
    @override
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, tensor: DTensor, targets: Placements, documents: Documents | None
    ) -> DTensor:
        ctx.documents = documents
        # The gradient of a partial sum is the whole gradient on every rank, as of each of its summands.
        ctx.sources = tuple(Replicate() if isinstance(p, Partial) else p for p in tensor.placements)
        # Below, tensors are local and outside of autograd, so that no op of the move meets DTensor's rules or is recorded.
        local = move(local_of(tensor), tensor.device_mesh, tensor.shape, tensor.placements, targets, documents)
        return wrap(local, tensor.device_mesh, targets, tensor.shape)

    @staticmethod
    @override
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, grad: DTensor
    ) -> tuple[DTensor, None, None]:
        local = move(local_of(grad), grad.device_mesh, grad.shape, grad.placements, ctx.sources, ctx.documents)
        return wrap(local, grad.device_mesh, ctx.sources, grad.shape), None, None
