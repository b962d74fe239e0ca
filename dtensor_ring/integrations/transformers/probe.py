"""A model run on eight tokens with an attention that stays within each token: what then still reaches another is no attention.

    row     t0 t1 t2 t3 t4 t5 t6 t7      positions 0..7
    1       t0 t1 t2 xx t4 t5 t6 t7      one token is another: no other output may change, and its own must
    2       t0 t1             t6 t7      a rank's share with its positions: the outputs of these tokens may not change
    3       without position_ids         must be as with 0..7, which is what a plan fills in

In 1 and 3 equal means bit for bit, but for experts, whose groups of tokens change; in 2 matrices have another shape, so that equal
is up to rounding. What layers ask of attention is looked at too: masks must be those that causality and window tell, and no
argument may be one that ring attention does not read.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.utils.generic import TransformersKwargs

from dtensor_ring.integrations.transformers.attention import KEYWORD, NO_MASK
from dtensor_ring.integrations.transformers.layer_call import LayerCall, read_layer_call
from dtensor_ring.integrations.transformers.structure import reads_interface

NAME = "dtensor_ring_probe"
_LENGTH, _OTHER, _SHARE = 8, 3, (0, 1, 6, 7)
# Layers pass these beside what `read_layer_call` reads; they say nothing that decides what is attended to.
_KNOWN = (*TransformersKwargs.__annotations__, "position_ids", "cache_position", "use_cache", "target_dtype", "deterministic")
_NEAR = (0, 1, 2, 3, 7, 100, 999, 4000, 8192, 9000, 50_000)  # distances at which masks are asked; borders of windows come to them
_PLACES = (3, 1000, 10_000, 100_001)


@dataclass
class _Seen:
    """What was seen in the runs of one probe.

    Attributes:
        modules: attention modules that were called.
        masks: masks that were handed out, with the function that each stands for; kept so that no other gets its id.
        reasons: what ring attention would get wrong.
    """

    modules: set[int] = field(default_factory=set)
    masks: dict[int, tuple[Tensor, Callable[..., Any]]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def attend(self, module: nn.Module, *tensors: Any, **keywords: Any) -> tuple[Tensor, None]:  # noqa: ANN401
        """Attention of each token to itself, of q, k and v all; rotated q and k bring positions in."""
        if keywords.pop(KEYWORD, None) is None:
            self.reasons.append(f"{type(module).__name__} does not get the keywords of the model's call")
        call = read_layer_call(module, *tensors, **keywords)
        self.modules.add(id(module))
        names = read_layer_call.__annotations__
        self.reasons += [
            f"{type(module).__name__} gives its attention {name!r}, which ring attention does not read"
            for name, value in keywords.items()
            if name not in names and name not in _KNOWN and value is not None
        ]
        if call.mask is not None and call.mask.numel():
            self.check_mask(module, call)
        groups = call.q.shape[2] // call.k.shape[2]
        k, v = (x.repeat_interleave(groups, dim=2) for x in (call.k, call.v))
        return v + call.q.sin().mean(-1, keepdim=True) + k.sin().mean(-1, keepdim=True), None

    def mask(self, *_shapes: object, mask_function: Callable[..., Any], q_length: int, kv_length: int, **_rest: object) -> Tensor:
        """A mask that only stands for its function."""
        made = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool)
        self.masks[id(made)] = (made, mask_function)
        return made

    def check_mask(self, module: nn.Module, call: LayerCall) -> None:
        """Compare what a mask lets through, at some distances and places, with what causality and window do."""
        if id(call.mask) not in self.masks:
            self.reasons.append(f"{type(module).__name__} gets a mask that the model makes by itself")
            return
        left, right = call.window
        ends = [end + more for end in (left, right) if end >= 0 for more in (0, 1)]
        far = torch.tensor(sorted({sign * distance for distance in (*_NEAR, *ends) for sign in (1, -1)}))
        q, k = (x.flatten() for x in torch.broadcast_tensors(torch.tensor(_PLACES)[:, None], torch.tensor(_PLACES)[:, None] - far))
        q, k = q[k >= 0], k[k >= 0]
        zero = torch.tensor(0)
        _, function = self.masks[id(call.mask)]
        allowed = torch.as_tensor(function(zero, zero, q, k)).expand_as(q)
        wanted = torch.ones_like(allowed)
        if call.is_causal:
            wanted &= k <= q
        if left >= 0:
            wanted &= k >= q - left
        if right >= 0:
            wanted &= k <= q + right
        if bool((allowed != wanted).any()):
            at = int((allowed != wanted).nonzero()[0])
            self.reasons.append(
                f"the mask of {type(module).__name__} {'shows' if allowed[at] else 'hides'} key {int(k[at])} to query "
                f"{int(q[at])}, which its is_causal={call.is_causal} and window {call.window} do not say"
            )


def check_tokenwise(model: PreTrainedModel) -> None:
    """Run a model on a few tokens and refuse it where a token is reached by another one outside of attention.

    Four forward passes of eight tokens without gradients, in evaluation mode, on the device of the parameters; the model is left as
    it was. `ring_plan(model, unlisted=True)` calls it. What only longer rows or training show, it cannot see: compare loss and
    gradients with one process before training.

    Raises:
        NotImplementedError: the text says what was seen.
        ValueError: the parameters are on the meta device.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        raise ValueError(
            f"{type(model).__name__} is on the meta device, where nothing can be run: call check_tokenwise(model) where it has "
            "weights"
        )
    seen = _Seen()
    draw = torch.Generator().manual_seed(0)
    config: Any = model.config
    words = [word for word in range(config.vocab_size) if word != getattr(config, "pad_token_id", None)]
    row = torch.tensor(words)[torch.randperm(len(words), generator=draw)[: _LENGTH + 1] % len(words)]
    if len(row) <= _LENGTH:
        row = torch.tensor(words).repeat(_LENGTH + 1)[: _LENGTH + 1]
    ids, other = row[None, :_LENGTH].to(device), row[-1]
    positions, share = torch.arange(_LENGTH, device=device)[None], list(_SHARE)
    with _attention_within_tokens(model, seen):
        whole = _outputs(model, ids, positions)
        changed = ids.clone()
        changed[0, _OTHER] = other
        moved = _outputs(model, changed, positions) - whole
        part = _outputs(model, ids[:, share], positions[:, share]) - whole[share]
        default = _outputs(model, ids, None) - whole
    attention = [(name, module) for name, module in model.named_modules() if reads_interface(module)]
    seen.reasons += [f"{name} was not called by a forward pass" for name, module in attention if id(module) not in seen.modules]
    # Norms and routers compute in float32 also where weights are in float64.
    rounding = min(0.1, 64 * max(torch.finfo(whole.dtype).eps, torch.finfo(torch.float32).eps))
    # Experts take the tokens that chose them, so that with another token the shapes of their matrices change.
    exact = 0.0 if not any(re.search("expert|moe", type(part).__name__, re.IGNORECASE) for part in model.modules()) else rounding
    seen.reasons += _differences(moved, part, default, whole, (exact, rounding))
    if seen.reasons:
        raise NotImplementedError(
            f"{type(model).__name__} cannot be made sequence parallel: {'; '.join(dict.fromkeys(seen.reasons))}"
        )


def try_tokenwise(model: PreTrainedModel) -> None:
    """`check_tokenwise` where there are weights; where there are none, a warning that it has to be called."""
    if next(model.parameters()).is_meta:
        warnings.warn(
            f"{type(model).__name__} is on the meta device, so that only its modules and config were looked at: call "
            "dtensor_ring.integrations.transformers.check_tokenwise(model) where it has weights, before parallelize_module",
            stacklevel=3,
        )
    else:
        check_tokenwise(model)


def _differences(moved: Tensor, part: Tensor, default: Tensor, whole: Tensor, limits: tuple[float, float]) -> Iterator[str]:
    """What differs in the three comparisons though it may not; rows of (tokens, width), in which equal is 0."""
    (exact, rounding), size = limits, _rms(whole)
    own = _rms(moved[_OTHER])
    if own <= rounding * size:
        yield f"token {_OTHER} does not decide its own output, so that nothing can be seen"
    others = [token for token in range(_LENGTH) if token != _OTHER and _rms(moved[token]) > exact * own]
    if others:
        yield f"token {_OTHER} changes the outputs of tokens {others} outside of attention"
    if _rms(part) > rounding * size:
        yield f"tokens {list(_SHARE)} of a row, with their positions, do not give what they give in the whole row"
    if _rms(default) > exact * size:
        yield "without position_ids it does not count tokens from 0"


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _outputs(model: PreTrainedModel, ids: Tensor, positions: Tensor | None) -> Tensor:
    """Outputs (tokens, width) of one row; without positions the masks that the model asks for are seen."""
    # With positions as a plan calls it, also with its mask.
    given: dict[str, Any] = (
        {KEYWORD: True}
        if positions is None
        else {
            KEYWORD: True,
            "position_ids": positions,
            "attention_mask": ids.new_empty(NO_MASK).bool(),
        }
    )
    return model(input_ids=ids, use_cache=False, **given)[0][0]


@contextmanager
def _attention_within_tokens(model: PreTrainedModel, seen: _Seen) -> Iterator[None]:
    """The model in evaluation mode with our attention, without gradients; left as it was."""
    before, training = model.config._attn_implementation, [part for part in model.modules() if part.training]
    AttentionInterface.register(NAME, seen.attend)
    AttentionMaskInterface.register(NAME, seen.mask)
    model.eval()
    try:
        model.set_attn_implementation(NAME)
        with torch.no_grad():
            yield
    finally:
        model.set_attn_implementation(before or "sdpa")
        for part in training:
            part.training = True
