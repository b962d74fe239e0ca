"""One call of attention on this rank's plain tensors: what all the functions of this package come down to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from dtensor_ring.attention import choose_for_alibi
from dtensor_ring.comm import transport_of
from dtensor_ring.documents import Documents, Slices, packed_of
from dtensor_ring.layout import Layout
from dtensor_ring.ops.agree import check_agreement
from dtensor_ring.ops.arguments import check_extras, check_tensors, factor_of, need_of
from dtensor_ring.ops.kernels import choose_kernel
from dtensor_ring.ops.library import attention
from dtensor_ring.ops.mask import Band, mask_text
from dtensor_ring.ops.schedule import Problem

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

    @property
    def mask(self) -> str:
        """The mask as `Band.parse` reads it."""
        left, right = self.window_size
        return mask_text(self.causal, (left, min(right, 0) if self.causal else right))


def attend(
    q_BSHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    settings: Settings,
    layout: Layout,
    strategy: str = "ring",
    documents: Documents | Slices | None = None,
    heads_at_once: int = 0,
) -> tuple[Tensor, Tensor]:
    """Out (B, S/W, H, Dv) and lse (B, H, S/W) of this rank's tokens.

    Every rank holds as many tokens, unless documents tell the length of the whole. `heads_at_once` key heads travel at a time, 0 is
    all.

    Raises:
        ValueError: shapes that do not fit together.
        NotImplementedError: no kernel does what is asked; the text has each one's reason.
    """
    check_tensors(q_BSHD, k_BSHD, v_BSHD)
    check_extras(q_BSHD, settings.sinks, settings.softcap, settings.dropout_p, settings.alibi_slopes)
    scale = factor_of(settings.softmax_scale, q_BSHD.shape[3])
    world, mask = settings.world, settings.mask
    q_length, k_length = world * q_BSHD.shape[1], world * k_BSHD.shape[1]
    if isinstance(documents, Documents):
        q_length = k_length = documents.length
    softcap, dropout_p, deterministic = float(settings.softcap), float(settings.dropout_p), settings.deterministic
    tensors = q_BSHD, k_BSHD, v_BSHD
    need = need_of(*tensors, settings.sinks, softcap=softcap, deterministic=deterministic, dropout_p=dropout_p)
    if settings.alibi_slopes is not None:
        problem = Problem(layout, Band.parse(mask), q_length, k_length, world, strategy, documents)
        strategy, alignment = choose_for_alibi(None if strategy == "ring" else strategy, problem)
        need = replace(need, alibi=alignment)
    kernel = choose_kernel(None, need).name
    bounds = packed_of(documents)
    group = settings.process_group.group_name
    if not torch.compiler.is_compiling():
        numbers = f"scale {scale}, softcap {softcap}, dropout_p {dropout_p}, deterministic {deterministic}"
        whole = str(documents) if isinstance(documents, Documents) else ""
        words = str(q_BSHD.dtype), f"mask {mask}", strategy, kernel, numbers, whole
        shapes = [(x.shape[0], length, *x.shape[2:]) for x, length in zip(tensors, (q_length, k_length, k_length), strict=True)]
        rows = q_BSHD.shape[1], k_BSHD.shape[1]
        transport = transport_of(settings.process_group)
        check_agreement(transport, "attention over a process group", layout, (*shapes[0], *shapes[1], *shapes[2]), rows, words)
    options = scale, softcap, dropout_p, deterministic, mask, str(layout), strategy, kernel, heads_at_once, group
    out, lse, _ = attention(*tensors, settings.sinks, settings.alibi_slopes, bounds, q_length, k_length, 0, 0, *options)
    return out, lse


def answer(out: Tensor, lse: Tensor, settings: Settings) -> Output:
    """What flash-attn's functions return."""
    return (out, lse, None) if settings.return_attn_probs else out
