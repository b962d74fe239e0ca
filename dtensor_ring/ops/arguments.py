"""What every call of attention checks of its arguments, and what it asks of a kernel; for DTensors and plain tensors alike."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dtensor_ring.captures import check_not_capturing
from dtensor_ring.ops.kernels import KernelName
from dtensor_ring.planning.cost_model import CostModel
from dtensor_ring.planning.problem import StrategyName

Strategy = Literal[StrategyName, "local"]


class Order(NamedTuple):
    """Which dim of q, k, v and out is which; the batch is dim 0, the head dim is dim 3."""

    sequence: int
    heads: int

    def text(self, sequence: str = "S", heads: str = "H", head: str = "D") -> str:
        """Spell the dims of a tensor in this order, such as `(B, S, H, D)`."""
        middle = (sequence, heads) if self.sequence == 1 else (heads, sequence)
        return f"({', '.join(('B', *middle, head))})"


BSHD, BHSD = Order(1, 2), Order(2, 1)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, order: Order = BSHD) -> None:
    """Raises ValueError or TypeError unless q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv) fit together."""
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
        raise ValueError(f"q, k and v must have shape {order.text()}, found {_listed(q, k, v)}")
    if q_shape[0] != k_shape[0] or k_shape[:3] != v_shape[:3] or q_shape[3] != k_shape[3]:
        needed = f"q {order.text('Sq')}, k {order.text('Sk', 'Hk')}, v {order.text('Sk', 'Hk', 'Dv')}"
        raise ValueError(f"needed {needed}, found {_listed(q, k, v)}")
    q_heads, k_heads = q_shape[order.heads], k_shape[order.heads]
    if k_heads == 0 or q_heads % k_heads:
        raise ValueError(f"query heads must be a multiple of key heads, found {q_heads} and {k_heads}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, found {q.dtype}, {k.dtype}, {v.dtype}")


def _listed(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def check_strategy_name(strategy: str | None) -> None:
    """Raises ValueError unless `strategy` is that of a strategy, or None, which leaves it open."""
    if strategy is not None and strategy not in get_args(Strategy):
        raise ValueError(f"unknown strategy {strategy!r}: use {', '.join(map(repr, get_args(Strategy)))} or None")


def factor_of(scale: float | None, head_dim: int) -> float:
    """What multiplies q.k: the scale, or D ** -0.5 for None. Raises ValueError unless it is finite and D is above 0."""
    if head_dim == 0:
        raise ValueError("q and k have head dim 0: attention compares queries and keys by at least one number")
    # A NaN or infinite scale would go through every rank and come out as NaN, far from where it was given.
    factor = head_dim**-0.5 if scale is None else float(scale)
    if not math.isfinite(factor):
        raise ValueError(f"scale multiplies q.k and must be a finite number, found {scale}")
    return factor


class Arguments(NamedTuple):
    """The arguments of a caller as they were given; see `dtensor_ring.ring_attention`."""

    is_causal: bool = True
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    deterministic: bool = False
    strategy: Strategy | None = None
    kernel: KernelName | None = None
    kv_head_group_size: int = 0
    stages: int | None = None
    memory: int | None = None
    cost_model: str | None = None  # the text of a `CostModel`


# What cannot change once a call is remembered by it.
_PLAIN = frozenset((float, int, bool, type(None)))
_NUMBERS: dict[str, type] = {"is_causal": bool, "scale": float, "softcap": float, "dropout_p": float, "deterministic": bool}


def plain_numbers(asked: Arguments) -> Arguments:
    """The arguments with numbers of Python's own, also where a tensor of one element or another object was given for one.

    Calls are remembered by their arguments, and a tensor is equal to itself after its value has changed.

    Raises:
        NotImplementedError: a tensor that requires a gradient, which it would not get.
        TypeError, ValueError: what is no number.
    """
    is_causal, _, scale, softcap, dropout_p, deterministic, *_ = asked
    if _PLAIN.issuperset((type(is_causal), type(scale), type(softcap), type(dropout_p), type(deterministic))):
        return asked  # as nearly always: every call of attention passes here
    plain = {name: _plain(name, getattr(asked, name), kind) for name, kind in _NUMBERS.items()}
    return asked._replace(**plain)


def _plain(name: str, number: Any, kind: type) -> Any:  # noqa: ANN401
    if type(number) in _PLAIN:
        return number
    if isinstance(number, Tensor) and number.requires_grad:
        raise NotImplementedError(f"{name} gets no gradient: pass {name}.item(), or multiply q, or out, by what is learned")
    if isinstance(number, Tensor) and number.is_cuda:
        check_not_capturing(f"the host reads {name} off the GPU", f"pass {name} as a number, which a replay then goes on with")
    return kind(number)


def check_numbers(asked: Arguments) -> None:
    """Raises ValueError unless the dropout probability and the softcap are in their range."""
    if not 0 <= asked.dropout_p < 1:
        raise ValueError(f"dropout_p is a probability below 1, found {asked.dropout_p}")
    if not 0 <= asked.softcap < math.inf:
        raise ValueError(f"softcap bounds scores and is positive, or 0 for none, found {asked.softcap}")


def check_stages(asked: Arguments) -> None:
    """Raises TypeError or ValueError unless stages and memory are whole numbers from 1 up, of the strategy that has stages."""
    for name, unit in (("stages", "transfers"), ("memory", "bytes")):
        number = getattr(asked, name)
        if number is None:
            continue
        if type(number) is not int:
            raise TypeError(f"{name} is a whole number of {unit}, found {number!r}")
        if number < 1:
            raise ValueError(f"{name} is a number of {unit} from 1 up, found {number}: leave it out for the default")
        if asked.strategy not in (None, "ring"):
            raise ValueError(f"{name}={number} is for strategy='ring', found strategy={asked.strategy!r}: leave one of them out")
    if asked.stages is not None and asked.memory is not None:
        raise ValueError(
            f"memory={asked.memory} chooses the stages, and stages={asked.stages} are chosen already: pass one of them"
        )


def text_of_model(cost_model: CostModel | None) -> str | None:
    """What calls have of a model; raises TypeError for anything else."""
    if cost_model is None:
        return None
    if not isinstance(cost_model, CostModel):
        raise TypeError(
            f"cost_model is a dtensor_ring.CostModel, found {type(cost_model).__name__}: read a file with CostModel.load(path)"
        )
    return cost_model.text


def check_extras(batch: int, heads: int, sinks: Tensor | None, alibi_slopes: Tensor | None) -> None:
    """Raises an error unless sinks are (H,), slopes (H,) or (B, H) in float32, for all heads and batch rows."""
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise ValueError(f"sinks must have shape (H,) = ({heads},), found {tuple(sinks.shape)}")
    if alibi_slopes is None:
        return
    if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(f"alibi_slopes must have shape ({heads},) or ({batch}, {heads}), found {tuple(alibi_slopes.shape)}")
    # Slopes are sliced by this rank's heads and rows, which a DTensor would do to its own share; kernels read float32.
    if type(alibi_slopes) is not Tensor or alibi_slopes.dtype != torch.float32:
        raise TypeError(f"alibi_slopes must be a plain float32 tensor, found {type(alibi_slopes).__name__} {alibi_slopes.dtype}")
    # No kernel gives a gradient of slopes, and silence would train nothing.
    if alibi_slopes.requires_grad:
        raise NotImplementedError("alibi_slopes get no gradient: pass alibi_slopes.detach()")
