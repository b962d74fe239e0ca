"""Cross entropy in chunks against its definition in float64, and what the operator tells compilers."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import slow
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from dtensor_ring import chunked_cross_entropy
from dtensor_ring.losses import Terms, chunk_tokens, chunked_losses, token_losses

TERMS = [Terms(), Terms(0.2, 1e-2, 5.0), Terms(softcap=3.0, scale=0.5), Terms(z_loss=1e-2, scale=3.0)]
WHOLE = 1000  # a chunk that holds all tokens


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 13, 8), (40, 8), (40,))]
    labels = torch.randint(0, 40, (2, 13), generator=generator)
    labels[0, 3:5] = labels[1, 12] = -100
    return [x.to(dtype).double() for x in tensors], labels, torch.rand(2, 13, generator=generator)


def defined(hidden, weight, bias, labels, terms):
    """Losses from whole logits, as the module's docstring says."""
    x = nn.functional.linear(hidden, weight, bias) * terms.scale
    x = terms.softcap * torch.tanh(x / terms.softcap) if terms.softcap else x
    log_p, counts = x.log_softmax(-1), labels != -100
    own = log_p.gather(2, labels.clamp_min(0)[..., None])[..., 0]
    each = -(1 - terms.label_smoothing) * own - terms.label_smoothing * log_p.mean(-1) + terms.z_loss * x.logsumexp(-1).square()
    return each * counts


def gradients(losses_of, tensors, weights, dtype):
    """Losses, and gradients of their sum weighed token by token."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    losses = losses_of(*leaves)
    return losses.detach(), *torch.autograd.grad((losses * weights).sum(), leaves)


def from_whole_logits(hidden, weight, bias, labels, terms):
    """As a model does it: logits in their dtype, the loss in float32."""
    x = nn.functional.linear(hidden, weight, bias) * terms.scale
    return token_losses(terms.softcap * torch.tanh(x / terms.softcap) if terms.softcap else x, labels, terms)


def errors(found, exact):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_losses_and_gradients_are_as_exact_as_those_of_whole_logits(dtype, terms):
    tensors, labels, weights = inputs(dtype)
    exact = gradients(lambda *t: defined(*t, labels, terms), tensors, weights, torch.float64)
    own = errors(gradients(lambda *t: from_whole_logits(*t, labels, terms), tensors, weights, dtype), exact)
    names = dict(zip(("label_smoothing", "z_loss", "softcap", "scale"), terms, strict=True))
    for chunk in (1, 7, WHOLE):
        found = gradients(
            lambda *t, c=chunk: chunked_cross_entropy(t[0], t[1], labels, t[2], chunk=c, **names), tensors, weights, dtype
        )
        assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not found[0][labels == -100].any()
        recomputed = gradients(
            lambda *t, c=chunk: chunked_losses(lambda h, y: from_whole_logits(h, *t[1:], y, terms), t[0], labels, t[1:], c),
            tensors,
            weights,
            dtype,
        )
        for mine in (errors(found, exact), errors(recomputed, exact)):
            # In float64 whole logits are the definition itself. Backward has p = exp(x - lse), whose lse is rounded once more.
            limits = [1e-14 if dtype == torch.float64 else 2 * error + torch.finfo(dtype).eps / 2 for error in own]
            assert all(a <= b for a, b in zip(mine, limits, strict=True)), f"chunks of {chunk}: {mine} of {limits}"


def test_sums_of_chunks_and_gradients_that_nobody_wants():
    (hidden, weight, bias), labels, _ = inputs(torch.float64)
    weight.requires_grad_()
    sums = chunked_losses(lambda h, y: defined(h[None], weight, bias, y[None], Terms()).sum(), hidden, labels, [weight, bias], 7)
    assert sums.shape == (4,)
    (found,) = torch.autograd.grad(sums.sum(), [weight])
    losses = chunked_cross_entropy(hidden, weight, labels, bias, chunk=7)
    (other,) = torch.autograd.grad(losses.sum(), [weight])
    torch.testing.assert_close(found, other, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert not chunked_cross_entropy(hidden, weight, labels).requires_grad
    frozen = hidden.detach().requires_grad_()
    (found,) = torch.autograd.grad(chunked_cross_entropy(frozen, weight.detach(), labels).sum(), [frozen])
    assert found.shape == hidden.shape


def test_dropout_within_a_head_is_the_same_when_it_is_computed_again():
    (hidden, weight, bias), labels, _ = inputs(torch.float64)
    masks = []

    def losses_of(h, y):
        dropped = nn.functional.dropout(torch.ones(40, dtype=h.dtype), 0.5)
        masks.append(dropped)
        return defined(h[None], weight * dropped[:, None], bias, y[None], Terms())[0]

    hidden.requires_grad_()
    losses = chunked_losses(losses_of, hidden, labels, [], 7)
    torch.rand(3)
    before = torch.get_rng_state()
    losses.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(masks[:4], masks[4:], strict=True))
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(torch.get_rng_state(), before), "the random numbers of others go on as they were"


@pytest.mark.parametrize(("bias", "wanted"), [(True, True), slow(False, True), slow(True, False)])
def test_compilers_are_told_the_truth_about_the_operator(bias, wanted):
    (hidden, weight, vector), labels, _ = inputs(torch.float32)
    flat = hidden.flatten(0, 1).float().requires_grad_(), weight.float().requires_grad_(wanted), vector.float() if bias else None
    operator = torch.ops.dtensor_ring.chunked_cross_entropy.default
    torch.library.opcheck(operator, (*flat, labels.flatten(), 0.1, 0.01, 5.0, 1.0, 7, torch.float32))


def test_a_chunk_is_a_gibibyte_of_logits():
    assert chunk_tokens(128_256) == 2048
    assert chunk_tokens(1 << 30) == 128
    assert chunk_tokens(128_256, 5) == 5


def test_shapes_dtypes_and_dtensors_that_do_not_fit_are_refused():
    (hidden, weight, _), labels, _ = inputs(torch.float64)
    for tensors, error, text in [
        ((hidden, weight, labels[:, 1:]), ValueError, "do not fit: found (2, 13, 8), (40, 8), (2, 12) and None"),
        ((hidden, weight, labels, weight), ValueError, "(40, 8)"),
        ((hidden, weight.float(), labels), ValueError, "hidden is torch.float64 and weight torch.float32: they need one dtype"),
    ]:
        with pytest.raises(error, match=re.escape(text)):
            chunked_cross_entropy(*tensors)


def dtensors_are_refused():
    (hidden, weight, _), labels, _ = inputs(torch.float64)
    placed = DTensor.from_local(weight, init_device_mesh("cpu", (1,)), [Replicate()])
    with pytest.raises(TypeError, match="takes plain tensors, found a DTensor: call it where weights are whole"):
        chunked_cross_entropy(hidden, placed, labels)


def test_dtensors_are_refused(pools):
    pools.run(1, dtensors_are_refused)


@pytest.mark.gpu
@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_gpus_add_up_weight_gradients_of_sixteen_bits_without_rounding_each_chunk(terms):
    tensors, labels, weights = ([x.cuda() for x in inputs(torch.bfloat16)[0]], *(x.cuda() for x in inputs(torch.bfloat16)[1:]))
    exact = gradients(lambda *t: defined(*t, labels, terms), tensors, weights, torch.float64)
    own = errors(gradients(lambda *t: from_whole_logits(*t, labels, terms), tensors, weights, torch.bfloat16), exact)
    names = terms._asdict()
    for chunk in (1, 7, WHOLE):
        found = gradients(
            lambda *t, c=chunk: chunked_cross_entropy(t[0], t[1], labels, t[2], chunk=c, **names), tensors, weights, torch.bfloat16
        )
        mine, limits = errors(found, exact), [1.3 * error + torch.finfo(torch.bfloat16).eps / 8 for error in own]
        assert all(a <= b for a, b in zip(mine, limits, strict=True)), f"chunks of {chunk}: {mine} of {limits}"
