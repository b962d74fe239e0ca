"""Every private PyTorch name this package uses, each with the reason, and what would let us drop it.

Nothing else imports one, but for `_torch_dispatch`, `_torch_groups` and `_torch_symmetric`. Ran on torch 2.11 and 2.13. Features
are asked for by name, once, here; versions are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import ref

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd import forward_ad, profiler
from torch.distributed._functional_collectives import _are_we_tracing
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, _dtensor_spec
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._op_schema import OpSchema, OutputSharding, RuntimeSchemaInfo
from torch.distributed.tensor._ops.utils import register_prop_rule
from torch.distributed.tensor._sharding_prop import LocalLRUCache
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from typing_extensions import override

__all__ = [
    "DTensorSpec",
    "NotDecodableError",
    "OpSchema",
    "OutputSharding",
    "PartialNorm",
    "PlacementBase",
    "Version",
    "below_autograd",
    "complete_cache_keys",
    "dtensor_of",
    "dtensor_with",
    "has_tangent",
    "install_rule",
    "is_capturing",
    "is_tracing",
    "lasting",
    "named_in_profiles",
    "ops_named",
    "refuse_methods",
    "register",
    "register_attention_rule",
    "replicated",
    "spec_of",
]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])
Rule = Callable[[OpSchema], OutputSharding | None]

# What `split_factor` of our placements raises. PyTorch's redistribute planner catches just this class and falls back to its
# greedy path (since 2.12; 2.11 has no such class and raises). Gone once PyTorch has placements by users.
NotDecodableError: type[Exception] = getattr(_dtensor_spec, "_StridedShardNotDecodableError", ValueError)

# Inductor leaves an op with this tag out of the CUDA graphs that it captures; a PyTorch without it what has inputs on the CPU.
OUTSIDE_OF_GRAPHS: tuple[torch.Tag, ...] = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))


class PlacementBase(_StridedShard):
    """The one base class that DTensor lets a foreign layout stand on.

    A subclass of `Shard` counts as `Shard` in most rules and is silently wrong; a bare `Placement` breaks the backward of
    `to_local`. `_StridedShard` carries through `from_local` and `to_local`, and every rule that would reason about its layout
    first reads `split_factor`, which raises here. Gone once PyTorch has placements by users (pytorch#169320).
    """

    def __init__(self, dim: int) -> None:
        # Straight to the C++ class that holds the dim. The Python initializer is about the factor, which has no meaning here and
        # raises when it is read.
        torch._C._distributed.StridedShard.__init__(self, dim, split_factor=1)

    @property
    @override
    def split_factor(self) -> int:
        """Raises: PyTorch has no rule for this layout."""
        raise NotDecodableError(
            f"{self!r}: PyTorch has no rule for this layout here. Move tensors with dtensor_ring.distribute_tensor, redistribute "
            "or full_tensor, or work on x.to_local()"
        )

    @override
    def _split_factor_int(self) -> int:
        return self.split_factor


class PartialNorm(Partial):
    """Each rank holds the p-norm of its own elements; the norm over the axis is the p-norm of these.

        2-norm of 3 | 4 over two ranks    rank 0: 3    rank 1: 4    reduced: (3**2 + 4**2) ** (1/2) = 5

    PyTorch's own `_NormPartial` does the same for finite orders, but `.item()` on it gives this rank's part without a word. A
    class of ours lets that be refused. `Partial` is public, its methods are not: gone once PyTorch has placements
    by users.
    """

    order: float

    def __init__(self, order: float) -> None:
        # A norm of infinite order is the largest or smallest part; all others add up powers, of which `_reduce_value` takes the
        # root.
        super().__init__({math.inf: "max", -math.inf: "min"}.get(order, "sum"))
        object.__setattr__(self, "order", float(order))  # `Partial` is frozen

    @override
    def _reduce_value(self, tensor: Tensor, mesh: DeviceMesh, mesh_dim: int) -> Tensor:
        if self.order == 0 or math.isinf(self.order):  # a count of elements, the largest, the smallest
            return super()._reduce_value(tensor, mesh, mesh_dim)
        return super()._reduce_value(tensor**self.order, mesh, mesh_dim) ** (1 / self.order)

    @override
    def _partition_value(self, tensor: Tensor, mesh: DeviceMesh, mesh_dim: int) -> Tensor:
        if self.order == 0 or math.isinf(self.order):
            return super()._partition_value(tensor, mesh, mesh_dim)
        return tensor / mesh.size(mesh_dim) ** (1 / self.order)

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, PartialNorm) and other.order == self.order

    @override
    def __ne__(self, other: object) -> bool:
        return not self == other

    @override
    def __hash__(self) -> int:
        return hash((type(self).__name__, self.order))

    @override
    def __repr__(self) -> str:
        return f"PartialNorm({self.order})"

    @override
    def __str__(self) -> str:
        return f"Norm({self.order})"


def install_rule(rule: Rule, cares: Callable[[OpSchema], bool]) -> None:
    """Consult `rule` before PyTorch's own rules for ops matching `cares`; other ops are unaffected.

    DTensor has one strategy a generic op (clone, add, ...) and no way to add one for a new placement. Both entry points of the
    propagator are called on cache misses only, so a warm op of any DTensor costs what it did before. Gone once PyTorch has
    placements by users.
    """
    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    stock: Callable[[OpSchema], OutputSharding] = propagator.propagate_op_sharding_non_cached

    def propagate(schema: OpSchema) -> OutputSharding:
        sharding = rule(schema) if cares(schema) else None
        return stock(schema) if sharding is None else sharding

    # The second is the first behind a cache, made when DTensor was imported: left as it is, it would go on asking PyTorch's rule
    # alone.
    propagator.propagate_op_sharding_non_cached = propagate
    propagator.propagate_op_sharding = LocalLRUCache(propagate)


def complete_cache_keys(ops: Iterable[OpOverload]) -> None:
    """Let DTensor's cache of shardings distinguish calls of ops that it has no strategy for, but a rule of ours has.

    For an op that DTensor does not know, the cache's key has tensors alone: neither the tensors in lists (on torch 2.11), so that
    a call whose gradients lie elsewhere would take the decision for those that do not, nor numbers, which decide on a result's
    dtype. What DTensor knows stays as it is. Gone once PyTorch has placements by users.
    """
    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    known = {**propagator.op_to_schema_info, **getattr(propagator, "op_to_schema_info_for_single_dim_strategy", {})}
    for op in ops:
        if op not in known:
            kinds = [str(argument.type) for argument in op._schema.arguments]
            lists = any(kind.startswith("List[") and "Tensor" in kind for kind in kinds)
            # a step of an optimizer has other numbers each time, which do not change its placements
            propagator.op_to_schema_info[op] = RuntimeSchemaInfo(100 if lists else 0, needs_pytree=lists)


def ops_named(prefix: str) -> list[OpOverload]:
    """Every op of aten whose name begins so; `dir(torch.ops.aten)` lists only what was used before."""
    names = [name.removeprefix("aten::") for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"aten::{prefix}")]
    pairs = [name.partition(".")[::2] for name in names]
    return [getattr(getattr(torch.ops.aten, packet), kind or "default") for packet, kind in pairs]


def refuse_methods(names: Sequence[str], reason: Callable[[DTensor], str | None]) -> None:
    """Make methods of DTensor raise on the tensors that `reason` gives a text for; on others they do what they did before.

    `apply_` and `share_memory_` are C functions on the storage of a tensor, and a DTensor has none: the process dies of a
    segmentation fault. They never reach DTensor's dispatch, where a rule could refuse them, and results of ops are plain
    DTensors, so no subclass can stand in: what is left is the attribute of the class. Gone once PyTorch checks for subclasses
    in these methods, as it does in `map_`, `numpy` and `tolist`.

    Raises (from the methods):
        NotImplementedError: `reason` has a text for the tensor.
    """
    for name in names:
        setattr(DTensor, name, _refusing(getattr(DTensor, name), reason))


def _refusing(stock: Callable[..., object], reason: Callable[[DTensor], str | None]) -> Callable[..., object]:
    @wraps(stock)
    def method(self: DTensor, *args: object, **kwargs: object) -> object:
        text = reason(self)
        if text is not None:
            raise NotImplementedError(f"x.{stock.__name__} on {list(self.placements)}: {text}")
        return stock(self, *args, **kwargs)

    return method


def with_meta(schema: OpSchema, specs: Any) -> Any:  # noqa: ANN401  one spec or a tuple of them
    """Output specs completed with the shapes, strides and dtypes that the op has on global fake tensors."""
    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    metas = propagator._propagate_tensor_meta_non_cached(schema)
    return propagator._create_output_spec_with_new_tensor_meta(schema.op, specs, metas)


def register_attention_rule(op: OpOverload, rule: Callable[[OpSchema], OutputSharding], static_argnum: int) -> None:
    """Make `rule` the sharding rule of an op of ours; arguments from `static_argnum` on are part of the cache key.

    The public `register_sharding` asks placements whether they can shard a tensor and so trips over ours.
    """
    register_prop_rule(op, schema_info=RuntimeSchemaInfo(static_argnum=static_argnum))(rule)


def local_of(tensor: Tensor) -> Tensor:
    """A DTensor's local tensor, for use inside autograd functions: without the node of `to_local()`. Other tensors as they are."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def dtensor_of(
    local: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...], shape: Sequence[int], stride: tuple[int, ...]
) -> DTensor:
    """A DTensor of known global shape and strides, for use inside autograd functions: `DTensor.from_local` without its checks.

    It requires a gradient where `local` does: autograd functions give their results the gradients they have.
    """
    meta = TensorMeta(torch.Size(shape), stride, local.dtype)
    return DTensor(local.detach(), DTensorSpec(mesh, placements, tensor_meta=meta), requires_grad=local.requires_grad)


def spec_of(tensor: DTensor) -> DTensorSpec:
    """Give the spec of a DTensor: its mesh, placements, global shape, strides and dtype."""
    return tensor._spec


def dtensor_with(local: Tensor, spec: DTensorSpec) -> DTensor:
    """As `dtensor_of`, sharing the spec of a DTensor that is alike in all that it says, as DTensor's dispatch shares them."""
    return DTensor(local, spec, requires_grad=False)


def below_autograd() -> AbstractContextManager[None]:
    """Operators called inside go to their kernels at once: for use inside autograd functions, where no gradient is recorded.

    Python kernels for autograd cost the host as much as DTensor's dispatch. Gone once `torch.autograd.Function` excludes autograd's
    dispatch keys in its forward.
    """
    return torch._C._AutoDispatchBelowAutograd()


def has_tangent(tensors: Iterable[Tensor | None]) -> bool:
    """Whether forward-mode differentiation follows one of the tensors, which nothing below autograd would notice.

    PyTorch says only by asking each tensor; that no level is entered, as nearly always, is one look at a private number.
    """
    if forward_ad._current_level < 0:
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def replicated(tensor: Tensor, like: DTensor) -> DTensor:
    """A small CPU tensor, equal on all ranks, as a DTensor on the mesh of `like`: `from_local` would move it to the GPU.

    Dynamo cannot trace the constructor of DTensor, so compiled code calls an operator, for which `_replicate` runs once tensors are
    real or fake. `torch.compiler.allow_in_graph` would do as well, but imports torch._dynamo into every program.
    """
    if torch.compiler.is_compiling():
        return torch.ops.dtensor_ring.replicated(tensor, like.detach())
    return _replicated(tensor, like)


def _replicated(tensor: Tensor, like: DTensor) -> DTensor:
    placements = (Replicate(),) * like.device_mesh.ndim
    meta = TensorMeta(tensor.shape, tensor.stride(), tensor.dtype)
    return DTensor(tensor, DTensorSpec(like.device_mesh, placements, tensor_meta=meta), requires_grad=False)


def _replicate(_mode: object, _op: object, _types: object, args: tuple[Tensor, DTensor], _kwargs: object) -> DTensor:
    return _replicated(*args)


def register() -> None:
    """Define the operator that `replicated` is in compiled code."""
    torch.library.define("dtensor_ring::replicated", "(Tensor tensor, Tensor like) -> Tensor")
    torch.library.register_torch_dispatch("dtensor_ring::replicated", DTensor, _replicate)


def is_tracing() -> bool:
    """Whether a compiler runs the code on fake tensors, inside DTensor's dispatch too, where `is_compiling()` is False."""
    return _are_we_tracing()


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream. No name of it is private: tests say here that one is."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def constant_when_compiled(function: F) -> F:
    """A function that compilers call instead of tracing it, taking what it returns for a constant.

    As `torch.compiler.assume_constant_result`, which sets the same mark but imports torch._dynamo for it, and so doubles what
    importing this package costs. Gone once that import is lazy in PyTorch.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010
    return function


def constant_number(number: Any) -> Any:  # noqa: ANN401
    """A number as it is; for compilers, which take one that changes from call to call for a symbol, a constant from here on.

    They have no public way to ask for that where a symbol may be a float, but make constants of the keys of a dict.
    """
    return next(iter({number: None}))


_UNNAMED = nullcontext()


def named_in_profiles(name: Callable[[], str]) -> AbstractContextManager[object]:
    """What runs inside has a name in the profile that is being taken; where none is, `name` is not called.

    `record_function` costs the host some 5 us also where nobody profiles, so the flag is asked first (since 2.1; gone once
    `record_function` asks it). Under `torch.autograd.profiler.emit_nvtx` the names are NVTX ranges.
    """
    return profiler.record_function(name()) if profiler._is_profiler_enabled else _UNNAMED


@contextmanager
def lasting() -> Iterator[None]:
    """Tensors made here are ordinary CPU tensors, whatever modes are on, and so can be kept: no inference tensors, no fakes."""
    # The device too: under `torch.device("cuda")` or `set_default_device` a tensor made here would lie on a GPU.
    with unset_fake_temporarily(), torch.inference_mode(False), torch.device("cpu"):
        yield


class Version(NamedTuple):
    """A tensor, and how often it had been changed in place when this was made (`Tensor._version`).

    A DTensor counts its own changes: its local tensor is changed below autograd, where nothing is counted.
    """

    tensor: ref[Tensor]
    count: int

    @classmethod
    def of(cls, tensor: Tensor) -> Version:
        """That of a tensor now. The reference is weak, so that an autograd node may keep it of a tensor that holds the node."""
        return cls(ref(tensor), tensor._version)

    def has_changed(self) -> bool:
        """Whether the tensor was changed in place since; False if it is gone."""
        tensor = self.tensor()
        return tensor is not None and tensor._version != self.count


class TensorCache(Generic[T]):
    """Values worked out from tensors, kept as long as the tensor lives unchanged (`Tensor._version` counts in-place changes)."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[ref[Tensor], int, T]] = {}

    def get(self, tensor: Tensor) -> T | None:
        """The value put for this very tensor, None if there is none or the tensor was changed since."""
        entry = self._entries.get(id(tensor))
        return entry[2] if entry is not None and entry[0]() is tensor and entry[1] == tensor._version else None

    def put(self, tensor: Tensor, value: T) -> None:
        """Keep a value for the tensor until the tensor changes or ends."""
        # The address of a tensor that ended may be another's soon: the entry goes with the tensor, and `get` asks for the very one.
        key = id(tensor)
        self._entries[key] = ref(tensor, lambda _: self._entries.pop(key, None)), tensor._version, value


def tensors_in(value: object) -> list[Tensor]:
    """Every tensor in nested tuples, lists, dicts and registered classes, such as the outputs of transformers."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def specs_of(schema: OpSchema) -> Sequence[DTensorSpec]:
    """Collect the specs of all DTensors among the arguments of an op, in lists and keywords too."""
    leaves = pytree.tree_leaves((schema.args_schema, schema.kwargs_schema))
    return [leaf for leaf in leaves if isinstance(leaf, DTensorSpec)]
