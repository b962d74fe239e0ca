"""Cross entropy token by token, from logits or straight from hidden states, so that logits of all tokens never exist at once.

    tokens  hidden (N, E)      logits of a chunk      losses (N)
    0..c    h h h h h h   ->   c x V, gone after   -> l l l l l l      backward makes each chunk's logits again, from its
    c..2c   h h h h h h   ->   c x V               -> l l l l l l      log-sum-exp the gradient, and adds up dW in float32

    loss of a token = (1 - s) * -log p[label] + s * mean over the vocabulary of -log p + z * logsumexp(logits)^2

`s` is label smoothing as `transformers.trainer_pt_utils.LabelSmoother` has it (and `F.cross_entropy`), `z` the z-loss of PaLM
(Chowdhery et al. 2022, section 5, "Loss function": 1e-4 there). Tokens whose label is -100 have the loss 0 and no gradient.

Memory is bounded by a chunk of logits, a few times, beside dhidden and dW; what is saved for backward is hidden, weight and a
number for each token. That logits are not kept but made again, chunk by chunk, is the idea of Cut Cross-Entropy (Wijmans et al.
2024) and of Liger's fused linear cross entropy (Hsu et al. 2024); here it is plain PyTorch: three matrix products, and one of them
once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtensor_ring.losses.terms import IGNORED, Terms, check_terms, chunk_tokens, chunks
from dtensor_ring.ops.dtypes import accumulate_dtype


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    shift_labels: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    scale: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """The cross entropy of every token, from hidden states and the weight of a language-model head; logits are made in chunks.

        batch = shard_batch({"input_ids": ids, "labels": ids}, mesh["cp"], Zigzag(1))
        losses = chunked_cross_entropy(hidden, head.weight, batch["shift_labels"])      # (B, S/W), 0 where the label is -100
        loss = losses.sum() / batch.num_items                                           # this rank's part of the batch's mean

    Matrix products are in the dtype of `hidden`, or that of autocast where it is on; everything after them in float32 (float64
    for float64), and so is the sum of the weight's gradient over chunks. Losses may be weighed token by token. Compilers see one
    operator.

    Args:
        hidden: (..., E), such as (B, S/W, E).
        weight: (V, E), a plain tensor.
        shift_labels: (...), of the next tokens, int64; -100 does not count.
        bias: (V,) or None.
        label_smoothing: the share of the mean over the vocabulary of -log p, from 0 to below 1.
        z_loss: the factor of logsumexp(logits)^2.
        softcap: logits x become softcap * tanh(x / softcap); 0 for none.
        scale: what logits are multiplied by before that.
        chunk: tokens whose logits are made at a time; by default as many as take 1 GiB in float32.

    Returns:
        (...) in float32, or float64.

    Raises:
        TypeError: a DTensor, or a chunk that is no whole number.
        ValueError: shapes or dtypes that do not fit, or numbers that make no loss.
    """
    terms = Terms(label_smoothing, z_loss, softcap, scale)
    check_terms(terms)
    _check_head(hidden, weight, shift_labels, bias)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    flat = hidden.flatten(0, -2), weight, bias, shift_labels.flatten()
    tokens = chunk_tokens(weight.shape[0], chunk)
    losses, _lse = torch.ops.dtensor_ring.chunked_cross_entropy.default(*flat, *terms, tokens, dtype)
    return losses.view(shift_labels.shape)


def _check_head(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    if any(isinstance(tensor, DTensor) for tensor in (hidden, weight, labels, bias)):
        raise TypeError(
            "chunked_cross_entropy takes plain tensors, found a DTensor: call it where weights are whole, as inside the forward "
            "pass of the FSDP2 module that holds the head"
        )
    rows, width = weight.shape
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != width or (bias is not None and bias.shape != (rows,)):
        raise ValueError(
            f"hidden (..., E), weight (V, E), shift_labels (...) and bias (V,) do not fit: found {tuple(hidden.shape)}, "
            f"{tuple(weight.shape)}, {tuple(labels.shape)} and {None if bias is None else tuple(bias.shape)}"
        )
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: they need one dtype, or autocast")


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> Tensor:
    """Logits of a chunk, a tensor of its own that may be written into; in the wide dtype where the model changes them."""
    x = torch.nn.functional.linear(hidden, weight, bias)
    if terms.scale == 1 and not terms.softcap:
        return x  # widened where they are first read for something else: a copy less
    x = x.to(accumulate_dtype(x.dtype))
    if terms.scale != 1:
        x.mul_(terms.scale)
    if terms.softcap:
        x.div_(terms.softcap).tanh_().mul_(terms.softcap)
    return x


def _exp_of_difference(x: Tensor, row: Tensor) -> Tensor:
    """exp(x - row[:, None]) in the dtype of `row`, in place where that is x's own."""
    return (x.sub_(row[:, None]) if x.dtype == row.dtype else torch.sub(x, row[:, None])).exp_()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to total, which may be wider."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right  # rounded once for each chunk, as the product of all tokens is once


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
    chunk: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each token."""
    terms = Terms(label_smoothing, z_loss, softcap, scale)
    with _without_autocast(hidden):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        losses = hidden.new_empty(labels.shape, dtype=accumulate_dtype(dtype))
        lse = torch.empty_like(losses)
        for part in chunks(labels.shape[0], chunk):
            x = _logits(hidden[part].to(dtype), weight, bias, terms)
            skipped = labels[part] == IGNORED
            own = x.gather(1, labels[part].masked_fill(skipped, 0)[:, None])[:, 0].to(lse.dtype)
            expected = own * (1 - label_smoothing) + x.mean(1, dtype=lse.dtype) * label_smoothing if label_smoothing else own
            most = x.amax(1).to(lse.dtype)
            lse[part] = _exp_of_difference(x, most).sum(1).log_().add_(most)
            loss = lse[part] - expected
            losses[part] = (loss + z_loss * lse[part].square() if z_loss else loss).masked_fill(skipped, 0)
            del x  # else the next chunk's logits are made while these are there
    return losses, lse


def _backward_of(
    dlosses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
    chunk: int,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where not wanted."""
    terms = Terms(label_smoothing, z_loss, softcap, scale)
    own_weight, own_bias = weight, bias
    with _without_autocast(hidden):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        wide = accumulate_dtype(dtype)
        dhidden = torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0)
        dweight = weight.new_zeros(weight.shape if wanted[1] else 0, dtype=wide)
        dbias = weight.new_zeros(weight.shape[0] if wanted[2] else 0, dtype=wide)
        for part in chunks(labels.shape[0], chunk):
            h = hidden[part].to(dtype)
            d = _logits(h, weight, bias, terms)
            d, factor = _gradient(d, labels[part], lse[part], dlosses[part], terms)
            if wanted[2]:
                dbias.addmv_(d.T, factor)
            d = torch.mul(d, factor[:, None], out=d if dtype == wide else d.new_empty(d.shape, dtype=dtype))
            if wanted[0]:
                dhidden[part] = d @ weight
            if wanted[1]:
                _add_product(dweight, d.T, h)
            del d
    return dhidden, dweight.to(own_weight.dtype), dbias if own_bias is None else dbias.to(own_bias.dtype)


def _gradient(x: Tensor, labels: Tensor, lse: Tensor, dlosses: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Gradient of logits (n, V) in the wide dtype, and the factors (n) of its rows; x is written over, or too narrow."""
    skipped = labels == IGNORED
    slope = (x / terms.softcap).square_().neg_().add_(1) if terms.softcap else None
    p = _exp_of_difference(x, lse)
    if terms.z_loss:
        p.mul_(1 + 2 * terms.z_loss * lse[:, None])
    if terms.label_smoothing:
        p.sub_(terms.label_smoothing / x.shape[1])
    minus = p.new_full((1, 1), terms.label_smoothing - 1).expand(p.shape[0], 1)
    p.scatter_add_(1, labels.masked_fill(skipped, 0)[:, None], minus)
    if slope is not None:
        p.mul_(slope)
    return p, dlosses.masked_fill(skipped, 0) * terms.scale


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _fake(hidden: Tensor, _weight: Tensor, _bias: Tensor | None, labels: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    losses = hidden.new_empty(labels.shape, dtype=accumulate_dtype(rest[-1]))
    return losses, torch.empty_like(losses)


def _fake_backward(_dlosses: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    wanted: Sequence[bool] = rest[-1]
    empty = hidden.new_empty(0)
    return (
        torch.empty_like(hidden) if wanted[0] else empty,
        torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[1] else weight.new_empty(0),
        torch.empty_like(bias) if bias is not None and wanted[2] else weight.new_empty(0, dtype=accumulate_dtype(rest[-2])),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    hidden, weight, bias, labels, *ctx.rest = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dlosses: Tensor, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    hidden, weight, bias, labels, lse = ctx.saved_tensors
    wanted = [bool(need) for need in ctx.needs_input_grad[:3]]
    operator = torch.ops.dtensor_ring.chunked_cross_entropy_backward.default
    grads = operator(dlosses, hidden, weight, bias, labels, lse, *ctx.rest, wanted)
    return *(grad if need else None for grad, need in zip(grads, wanted, strict=True)), None, *(None for _ in ctx.rest)


_NUMBERS = "float label_smoothing, float z_loss, float softcap, float scale, int chunk, ScalarType dtype"


def register() -> None:
    """Define the operators: compilers take a call as one node, whatever its number of chunks."""
    name, tags = "dtensor_ring::chunked_cross_entropy", (torch.Tag.pt2_compliant_tag,)
    torch.library.define(
        name, f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, {_NUMBERS}) -> (Tensor, Tensor)", tags=tags
    )
    torch.library.define(
        f"{name}_backward",
        "(Tensor dlosses, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor lse, "
        f"{_NUMBERS}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
        tags=tags,
    )
    torch.library.impl(name, "CompositeExplicitAutograd", _forward)
    torch.library.impl(f"{name}_backward", "CompositeExplicitAutograd", _backward_of)
    torch.library.register_fake(name, _fake)
    torch.library.register_fake(f"{name}_backward", _fake_backward)
    torch.library.register_autograd(name, _backward, setup_context=_setup_context)
