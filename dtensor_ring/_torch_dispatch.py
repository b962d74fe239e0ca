"""The private PyTorch names of its dispatcher, as `_torch` has the others: each with its reason, and what would let us drop it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.nn import Parameter


def is_unobserved(tensors: Iterable[Tensor | None]) -> bool:
    """Whether nobody would see an operator of ours on these tensors: then its function can be called past the dispatcher.

    The dispatcher takes the host as long as a launch, forward and backward. It is needed where a mode (of checkpointing that saves
    attention, of fake tensors, of a count of FLOPs), a transform of `torch.func`, or a tensor of a class of its own must be asked,
    and where a profile names operators. Gone once operators of Python cost no more than functions.
    """
    if torch._C._len_torch_dispatch_stack() or profiler._is_profiler_enabled:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(x is None or type(x) is Tensor or type(x) is Parameter for x in tensors)
