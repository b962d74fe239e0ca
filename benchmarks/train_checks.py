"""Whether a contender trains as plain attention does: its loss, and the gradient of every weight by itself.

Of all weights together queries and keys are a hundredth: with wrong positions their gradients are off by half of their norm, and
those of the whole model by less than bfloat16 rounds. What rounding does to the weight that it does most to is measured, as the
difference between plain attention by two kernels; a contender may differ four times as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

WRONG = "WRONG"  # what a difference begins with
_MORE = 4.0  # times what two kernels of plain attention differ
_MOST = 0.4  # of a norm: gradients with wrong positions start at 0.5


@dataclass(frozen=True)
class Training:
    """What a pass over one batch gives.

    Attributes:
        loss: the mean over the batch.
        grads: of every weight, what this rank has.
    """

    loss: float
    grads: Sequence[Tensor]


def gap(exact: Training, other: Training, group: dist.ProcessGroup) -> float:
    """The largest difference of a weight's gradient, in terms of its norm. A collective call, alike on all ranks."""
    pairs = zip(exact.grads, other.grads, strict=True)
    squares = [torch.stack([(b.float() - a).square().sum(), a.float().square().sum()]).double() for a, b in pairs]
    total = torch.stack(squares)
    dist.all_reduce(total, group=group)
    # A gradient of nothing but zeros, or one that is not finite, differs from all others by infinity.
    return (total[:, 0] / total[:, 1]).sqrt().nan_to_num(torch.inf, torch.inf).max().item()


def difference(exact: Training, other: Training, rounding: float, group: dist.ProcessGroup) -> str:
    """What is wrong with `other`; empty if nothing is. A collective call, alike on all ranks.

    Args:
        exact: plain attention's.
        other: a contender's.
        rounding: the gap between plain attention by two kernels.
        group: the ranks.
    """
    eps = torch.finfo(exact.grads[0].dtype).eps
    allowed = min(max(8 * eps, _MORE * rounding), _MOST)
    found = gap(exact, other, group)
    if abs(other.loss - exact.loss) <= 8 * eps * abs(exact.loss) and found <= allowed:
        return ""
    return (
        f"{WRONG}: loss {other.loss:.6f} beside {exact.loss:.6f}; the gradient of a weight differs by {found:.2g} of its norm, "
        f"that of plain attention by another kernel by {rounding:.2g}"
    )
