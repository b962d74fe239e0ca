"""The private PyTorch names of its dispatcher, as `_torch` has the others: each with its reason, and what would let us drop it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.nn import Parameter

_PLAIN_DEVICES = ("cpu", "cuda")


def is_unobserved(tensors: Iterable[Tensor | None]) -> bool:
    """Whether nobody would see an operator of ours on these tensors: then its function can be called past the dispatcher.

    The dispatcher takes the host as long as a launch, forward and backward. It is needed where a mode (of checkpointing that saves
    attention, of fake tensors, of a count of FLOPs), a transform of `torch.func`, or a tensor of a class or kind of its own
    (batched, on the meta device) must be asked, and where a profile names operators. An `ExecutionTraceObserver` alone cannot be
    asked for: it sees what the function launches. Gone once operators of Python cost no more than functions.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or profiler._is_profiler_enabled:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch):
        return False
    return all(x is None or _is_plain(x) for x in tensors)


def _is_plain(x: Tensor) -> bool:
    if type(x) is not Tensor and type(x) is not Parameter:
        return False
    # Batched, functionalized, negated tensors and the like are of PyTorch's own class: what they are stands in their keys.
    device = x.device.type
    return device in _PLAIN_DEVICES and torch._C._dispatch_keys(x).raw_repr() in _plain_keys(device)


@cache
def _plain_keys(device: str) -> frozenset[int]:
    """The dispatch keys of ordinary tensors on a device, those made in inference mode among them."""
    keys = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            keys.append(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
    return frozenset(keys)
