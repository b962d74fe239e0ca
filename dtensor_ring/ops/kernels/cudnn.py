"""`cudnn`: cuDNN's attention as PyTorch has it built in, for Hopper: about twice as fast there as FlashAttention-2.

It takes full and square causal blocks whose queries and keys both count a multiple of `TILE`. What it would get wrong, it refuses:

    rectangular causal      its mask begins top-left, without a word
    other lengths           of a full block it lets scores of 0 past the last key, or the last query, take part in the gradients:
                            NaN where the lse is below -88, which is where exp(0 - lse) is no float32 any more
    windows, varlen         the ops have no windows; varlen makes a plan in every call
    deterministic           the order in which dq is added up changes from run to run
    a q above 2**31         numbers: dq and dk are wrong from there on

Every new shape costs: cuDNN compiles a plan for it, forward and backward each, which takes the host about 70 ms and 1.6 MiB on an
H100, and PyTorch keeps it as long as the process lives. So as the default it is taken only where shapes are few: see `unasked`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring.ops.kernels.base import Kernel, KernelRequirements, has_no
from dtensor_ring.ops.kernels.block import Block, BlockKind, Gradients, Result, Saved
from dtensor_ring.ops.kernels.flash import is_causal, lacks_hopper, lacks_tensors

TILE = 128  # tokens of the largest tile of its kernels, forward and backward
_OLDEST = 91900  # the cuDNN that all this was tried with, 9.19.0


class CudnnKernel(Kernel):
    """`aten::_scaled_dot_product_cudnn_attention` and its backward, which takes the out and lse of a larger attention."""

    name: ClassVar[str] = "cudnn"

    @override
    def unavailable(self, need: KernelRequirements) -> str | None:
        """It needs a Hopper GPU and a PyTorch built with cuDNN 9.19 or newer."""
        reason = lacks_hopper(need)
        if reason is not None:
            return reason
        # A build for AMD GPUs has the same names for other libraries.
        version = torch.backends.cudnn.version() if torch.version.hip is None and torch.backends.cudnn.is_available() else None
        if version is None:
            return "this build of PyTorch has no cuDNN"
        return f"needs cuDNN 9.19 or newer, found {version}" if version < _OLDEST else None

    @override
    def lacks(self, need: KernelRequirements) -> str | None:
        """It needs 16-bit tensors, one head dim and blocks of whole tiles, and has neither extras nor a repeatable dq."""
        reason = lacks_tensors(need) or has_no(need, "softcap", "dropout", "ALiBi") or _lacks_index(need)
        if reason is not None:
            return reason
        if 128 < need.head_dim < 256:
            return f"needs a head dim up to 128, or of 256, found {need.head_dim}"
        if need.grain is not None and need.grain % TILE:
            return (
                f"needs blocks of whole tiles of {TILE} tokens, as full or causal attention without documents has over chunks of a "
                f"multiple of {TILE} tokens; here the largest number known to divide all blocks is {need.grain}"
            )
        if need.training and (need.deterministic or torch.are_deterministic_algorithms_enabled()):
            return "its backward is not deterministic"
        return None

    @override
    def unasked(self, need: KernelRequirements) -> str | None:
        """As the default it is for batches and chunks that have at most 4 significant binary digits: shapes are few then."""
        if not torch.backends.cuda.cudnn_sdp_enabled():
            return "is no default under torch.backends.cuda.enable_cudnn_sdp(False), or where sdpa_kernel leaves it out"
        if need.grain is None or need.rows is None:
            return "is no default before lengths are known"
        # 1, 2, ... 15, 16, 18, ... 30, 32, 36, ...: eight numbers for each power of two. So however lengths vary, there are a few
        # dozen of them in all, and what plans take in host time and memory is bounded. A number of shapes seen so far would be
        # another on ranks that have not made the same calls, and would make a result depend on the calls before it.
        if _is_round(need.grain) and _is_round(need.rows):
            return None
        return (
            f"compiles a plan for every new shape, and is the default only for numbers of tokens that have few binary digits, such "
            f"as 8 to 15 times a power of two: found {need.rows} batch rows, and chunks that are multiples of {need.grain} tokens"
        )

    @override
    def refuses_block(self, kind: BlockKind) -> str | None:
        """It takes dense blocks without a mask, and square causal ones."""
        if kind.varlen:
            return "takes no varlen blocks"
        if kind.mask == "window":
            return "has no windows"
        return "aligns causal masks top-left" if kind.mask == "rectangular causal" else None

    @override
    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> Result:
        """Compute out in the input dtype and lse in float32."""
        if not q.numel():  # no batch rows, for which the op returns nothing at all
            return Result(torch.empty_like(q), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32))
        op = torch.ops.aten._scaled_dot_product_cudnn_attention
        inputs, causal = [_by_heads(x) for x in (q, k, v)], _causal(q, k, block)
        out, lse, *_ = op(*inputs, None, True, 0.0, causal, False, scale=block.softmax.scale)
        return Result(_by_tokens(out), lse.reshape(lse.shape[:3]))

    @override
    def backward(self, saved: Saved, dout: Tensor, block: Block) -> Gradients:
        """Compute dq, dk and dv in the input dtype."""
        q, k, v, out, lse = saved
        if not q.numel():
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        # Plans are looked up by shapes and strides of q, k and v alone, but read out, dout and lse by the strides that these had in
        # the call that the plan was made for. So they must always have the same: those of contiguous tensors.
        inputs = [_by_heads(x) for x in (dout.contiguous(), q, k, v, out.contiguous())]
        unused = q.new_empty((), dtype=torch.int64)  # where the seed and the offset of a dropout mask would be
        extras = unused, unused, None, None, None
        lengths = q.shape[1], k.shape[1]
        op = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
        stats, causal = lse.contiguous().unsqueeze(-1), _causal(q, k, block)
        dq, dk, dv = op(*inputs, stats, *extras, *lengths, 0.0, causal, scale=block.softmax.scale)
        return _by_tokens(dq), _by_tokens(dk), _by_tokens(dv)


def _lacks_index(need: KernelRequirements) -> str | None:
    """Why it cannot count the numbers of a q in its backward pass, or None."""
    if not need.training or need.rows is None or need.heads is None or need.tokens is None:
        return None
    numbers = need.rows * need.heads * need.tokens * need.head_dim
    return f"gets dq and dk wrong where q has more than 2**31 numbers, found {numbers}" if numbers > 2**31 else None


def _causal(q: Tensor, k: Tensor, block: Block) -> bool:
    """Whether a block is causal, and not without a mask."""
    causal = is_causal(block.window)
    # The ops have no argument for anything else, and would leave a window out, or begin the mask of a rectangle top-left.
    taken = q.shape[1] == k.shape[1] if causal else block.window == (-1, -1)
    assert taken and block.varlen is None, "refused otherwise"
    return causal


def _by_heads(x_BSHD: Tensor) -> Tensor:
    """A view with dims (B, H, S, D); of a copy where the kernels would read other memory than the tensor's."""
    # They load 16 bytes at a time, 8 numbers, from addresses that are multiples of 16, and take them for such without a check.
    batch, tokens, heads, _ = x_BSHD.stride()
    aligned = not (x_BSHD.data_ptr() % 16 or batch % 8 or tokens % 8 or heads % 8)
    return (x_BSHD if aligned else x_BSHD.clone(memory_format=torch.contiguous_format)).transpose(1, 2)


def _by_tokens(x_BHSD: Tensor) -> Tensor:
    """A contiguous tensor (B, S, H, D), as the ops return it in memory unless q, k or v lie otherwise."""
    return x_BHSD.transpose(1, 2).contiguous()


def _is_round(number: int) -> bool:
    """Whether a number has at most 4 significant binary digits."""
    return number % (1 << max(0, number.bit_length() - 4)) == 0
