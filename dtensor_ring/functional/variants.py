"""The three forms in which flash-attn takes q, k and v: apart, keys with values (`kvpacked`), all together (`qkvpacked`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dtensor_ring.comm import Transport, transport_of
from dtensor_ring.comm.rank_checks import refused_together
from dtensor_ring.functional.call import Output

Function = Callable[..., Output]


def refusing_together(func: Function) -> Function:
    """Wraps `func` so that its refusal of arguments on one rank is raised on all ranks of its `group`."""

    @wraps(func)
    def wrapped(*args: Any, **kwargs: Any) -> Output:  # noqa: ANN401
        # While a graph is traced no other rank is in this call, and none could be sent an error.
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        with refused_together(partial(_group_of, wrapped, args, kwargs)):
            return func(*args, **kwargs)

    return wrapped


def _group_of(func: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> list[Transport]:
    # `group` may come by place, anywhere among a dozen arguments: the signature knows where.
    if not dist.is_initialized():
        return []
    try:
        group = inspect.signature(func).bind(*args, **kwargs).arguments.get("group")
    except TypeError:  # wrong arguments: the very error that the others are to get
        group = kwargs.get("group")
    group = dist.group.WORLD if group is None else group
    return [transport_of(group)] if isinstance(group, dist.ProcessGroup) else []


def packed_variants(func: Function, name: str) -> tuple[Function, Function]:
    """`kvpacked_func` and `qkvpacked_func` of `func`: the same function on stacked inputs, named and documented after it.

    `kv` is (..., 2, Hk, D), `qkv` (..., 3, H, D), stacked in the dim before the heads.
    """

    @refusing_together
    def kvpacked(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Output:  # noqa: ANN401
        _check(name, "kv", kv, 2)
        return func(q, kv.select(-3, 0), kv.select(-3, 1), *args, **kwargs)

    @refusing_together
    def qkvpacked(qkv: Tensor, *args: Any, **kwargs: Any) -> Output:  # noqa: ANN401
        _check(name, "qkv", qkv, 3)
        return func(qkv.select(-3, 0), qkv.select(-3, 1), qkv.select(-3, 2), *args, **kwargs)

    _describe(kvpacked, func, f"{name}_kvpacked_func", {"k": "kv", "v": None}, "`kv` stacks keys and values: (..., 2, Hk, D)")
    _describe(
        qkvpacked, func, f"{name}_qkvpacked_func", {"q": "qkv", "k": None, "v": None}, "`qkv` stacks all three: (..., 3, H, D)"
    )
    return kvpacked, qkvpacked


def _check(name: str, argument: str, tensor: Tensor, parts: int) -> None:
    if tensor.dim() < 4 or tensor.shape[-3] != parts:
        raise ValueError(
            f"{name}_{argument}packed_func: {argument} must have shape (..., {parts}, heads, D), found {tuple(tensor.shape)}"
        )


def _describe(variant: Function, func: Function, name: str, renamed: dict[str, str | None], what: str) -> None:
    # The variants take *args: without a signature of their own neither help() nor `_group_of` would see their arguments.
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(func).parameters.values():
        new = renamed.get(parameter.name, parameter.name)
        parameters += [] if new is None else [parameter.replace(name=new)]
    variant.__name__ = variant.__qualname__ = name
    variant.__module__ = "dtensor_ring.functional"
    variant.__doc__ = f"As `{func.__name__}`; {what}."
    variant.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
