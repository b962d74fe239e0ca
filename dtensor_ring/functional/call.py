"""One call of attention on this rank's plain tensors: what all the functions of this package come down to."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from dtensor_ring.ops import attend as operators
from dtensor_ring.ops.arguments import Arguments, Strategy
from dtensor_ring.ops.place import place_in_group
from dtensor_ring.ops.prepare import Inputs, prepare
from dtensor_ring.planning.documents import Documents, Slices
from dtensor_ring.planning.layout import Layout

Output = Tensor | tuple[Tensor, Tensor, None]


@dataclass(frozen=True, slots=True)
class Settings:
    """The arguments that all functions share, as flash-attn names them.

    Attributes:
        dropout_p: probability of dropping an attention weight.
        softmax_scale: multiplies q.k; None is D ** -0.5.
        causal: a query sees keys up to its own position.
        window_size: (L, R) tokens back and ahead; -1 is unbounded. With `causal` R counts as 0, as in flash-attn.
        alibi_slopes: (H,) or (B, H), float32.
        deterministic: gradients are bitwise the same from run to run.
        return_attn_probs: return (out, lse, None), as flash-attn does.
        group: the ranks that share the sequence; None is the default group.
        softcap: c > 0 bounds scores to c * tanh(score / c).
        sinks: (H,) scores without a value, one of each head.
    """

    dropout_p: float = 0.0
    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    alibi_slopes: Tensor | None = None
    deterministic: bool = False
    return_attn_probs: bool = False
    group: dist.ProcessGroup | None = None
    softcap: float = 0.0
    sinks: Tensor | None = None

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The group, or the default one."""
        # Asked at each call: a default group may be destroyed and made anew in between.
        if self.group is not None:
            return self.group
        if not dist.is_initialized():
            raise RuntimeError("no process group: call torch.distributed.init_process_group first, or pass group=")
        group = dist.group.WORLD
        assert group is not None, "there is a default group once it is initialized"
        return group

    @property
    def world(self) -> int:
        """Ranks that share the sequence."""
        return dist.get_world_size(self.process_group)

    def arguments(self, strategy: Strategy | None, kv_head_group_size: int) -> Arguments:
        """The same settings as `ring_attention` takes them."""
        left, right = self.window_size  # flash-attn lets a causal window look ahead in its arguments, and never does
        return Arguments(
            self.causal,
            (left, min(right, 0) if self.causal else right),
            self.softmax_scale,
            self.softcap,
            self.dropout_p,
            self.deterministic,
            strategy,
            kv_head_group_size=kv_head_group_size,
        )


def attend(
    q_BSHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    settings: Settings,
    layout: Layout,
    strategy: Strategy | None = None,
    documents: Documents | Slices | None = None,
    kv_head_group_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attends with this rank's tokens: returns out (B, S/W, H, Dv) and lse (B, H, S/W).

    Every rank holds as many tokens, unless documents give the length of the whole. `kv_head_group_size` key heads travel at a
    time, 0 is all.

    Raises:
        ValueError: shapes that do not fit together.
        NotImplementedError: no kernel does what is asked; the text has each one's reason.
    """
    tensors = q_BSHD, k_BSHD, v_BSHD
    # Where every rank holds as many tokens the whole length is W times that. Documents know it, and allow for ranks that hold less.
    lengths = (documents.length, documents.length) if isinstance(documents, Documents) else None
    place = place_in_group(tensors, settings.process_group, layout, lengths)
    inputs = Inputs(*tensors, settings.sinks, settings.alibi_slopes, documents)
    prepared = prepare(inputs, settings.arguments(strategy, kv_head_group_size), place, "attention")
    return operators.attend(*tensors, prepared, return_lse=True)


def answer(out: Tensor, lse: Tensor, settings: Settings) -> Output:
    """What flash-attn's functions return. Their third value is the dropout mask, which is never held whole here."""
    return (out, lse, None) if settings.return_attn_probs else out
