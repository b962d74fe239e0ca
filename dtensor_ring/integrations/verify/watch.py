"""What every module of a model is given and returns, and the gradients of that: kept from one run, compared with in the next.

    under the plan    Kept: this rank's tokens, (B, S/W, ...), of every module
    one process       Compared: all tokens, of which those of this rank are compared at once, and copied
    one process,      OwnError: compared with these copies
    weights nudged

Modules return tokens in several forms: (B, S, H), heads (B, H, S, D), rows put one after another (B*S, H). `tokens_first` finds
the form that fits both runs. What fits in none (experts that get some of the tokens) is not compared; what the module around it
returns is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dtensor_ring._torch import tensors_in
from dtensor_ring.integrations.verify.batches import Piece
from dtensor_ring.ops.dtypes import accumulate_dtype

Part = Literal["input", "output", "gradient"]


class Key(NamedTuple):
    """One tensor of a run: which module, in which of its calls, what of it, and under which name."""

    module: str
    call: int
    part: Part
    slot: str


class Sees(Protocol):
    """What is told of every tensor, in the order in which they come."""

    def see(self, key: Key, tensor: Tensor) -> None:
        """One tensor; it must not be changed."""
        ...


class Watch:
    """Hooks on all modules of a model, which tell `sees` of a forward pass and of the backward pass after it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sees: Sees | None = None
        self._calls: dict[str, int] = {}
        self._forward = False

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around one forward pass. Checkpointed layers run again in backward, which is no call of its own."""
        self._calls.clear()
        self._forward = True
        try:
            yield
        finally:
            self._forward = False

    @contextmanager
    def telling(self, sees: Sees) -> Iterator[Watch]:
        """Around forward and backward passes that `sees` is told of."""
        handles = []
        self._sees = sees
        try:
            for name, module in self._model.named_modules():
                handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
                handles.append(module.register_forward_hook(self._after(name)))
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._sees = None

    def _before(self, name: str) -> Callable[..., None]:
        @torch.compiler.disable
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._forward:
                return
            call = self._calls[name] = self._calls.get(name, -1) + 1
            for slot, value in [*((str(i), arg) for i, arg in enumerate(args)), *kwargs.items()]:
                self._tell(Key(name, call, "input", slot), value, gradients=False)

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        @torch.compiler.disable
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
            if self._forward:
                self._tell(Key(name, self._calls[name], "output", ""), output, gradients=True)

        return hook

    def _tell(self, key: Key, value: Any, *, gradients: bool) -> None:  # noqa: ANN401
        for i, tensor in enumerate(tensors_in(value)):
            one = key._replace(slot=f"{key.slot}{i}")
            if tensor.dim() < 2 or tensor.dtype == torch.bool:
                continue  # losses and counts are compared elsewhere, and masks are not the same thing in both runs
            if self._sees is not None and (tensor.is_floating_point() or key.part == "input"):
                self._sees.see(one, tensor.detach())
            if gradients and tensor.requires_grad:
                tensor.register_hook(self._gradient(one._replace(part="gradient")))

    def _gradient(self, key: Key) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if self._sees is not None:
                self._sees.see(key, gradient.detach())

        return hook


@dataclass
class Kept:
    """Keeps what it is told of: the run under the plan. Tensors that were changed in place since are left out."""

    tensors: dict[Key, tuple[Tensor, int]] = field(default_factory=dict)

    def see(self, key: Key, tensor: Tensor) -> None:
        """Keeps the tensor itself, without a copy: autograd holds most of them anyway."""
        self.tensors[key] = tensor, tensor._version

    def get(self, key: Key) -> Tensor | None:
        """The tensor; None where there was none, or it was overwritten."""
        tensor, version = self.tensors.get(key, (None, 0))
        return tensor if tensor is not None and tensor._version == version else None


class Place(NamedTuple):
    """Which tokens of this rank lie in a piece that one process runs.

    Attributes:
        piece: the rows and tokens.
        rows: rows of the whole batch.
        held: tokens that this rank holds.
        here: places among these, of those in the piece.
        there: the same tokens' places in the piece.
        real: (rows of the piece, len(here)), false at padding, which is not compared; None for all.
        scale: what gradients under the plan are times those of one process.
    """

    piece: Piece
    rows: int
    held: int
    here: Tensor
    there: Tensor
    real: Tensor | None
    scale: float


@dataclass
class Deviation:
    """How one tensor differs, over this rank's tokens.

    Attributes:
        tokens: (held,) largest absolute difference of each token, over rows and everything else.
        scale: largest absolute value of one process.
        mine: largest absolute value under the plan.
        own: largest absolute difference that nudged weights made in one process.
    """

    tokens: Tensor
    scale: Tensor
    mine: Tensor
    own: Tensor


class Compared:
    """Compares one process with what was kept of the plan's run, and keeps copies of this rank's tokens, for `OwnError`."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self.copies: dict[tuple[Piece, Key], Tensor] = {}
        self.deviations: dict[Key, Deviation] = {}  # in the order in which modules end, and backward in that of gradients
        self.place: Place | None = None

    def see(self, key: Key, tensor: Tensor) -> None:
        """Compares the tensor, if the plan's run has it in a form that can be cut alike."""
        assert self.place is not None, "a piece is being run"
        mine, place = self.kept.get(key), self.place
        pair = None if mine is None else tokens_first(mine, tensor, place)
        if pair is None:
            return
        ours, theirs = pair
        if key.part == "gradient":
            ours = ours / place.scale
        if key.part != "input":
            self.copies[place.piece, key] = theirs
        found = self.deviations.get(key)
        if found is None:
            zero = torch.zeros((), dtype=torch.float64, device=tensor.device)
            found = self.deviations[key] = Deviation(zero.repeat(place.held), zero, zero, zero)
        by_token = largest(difference(ours, theirs), place.real)
        found.tokens[place.here] = torch.maximum(found.tokens[place.here], by_token)
        found.scale = torch.maximum(found.scale, _most(theirs, place.real))
        found.mine = torch.maximum(found.mine, _most(ours, place.real))


class OwnError:
    """Compares one process whose weights were nudged with the copies: what the model's own rounding makes of each tensor."""

    def __init__(self, compared: Compared) -> None:
        self._compared = compared

    def see(self, key: Key, tensor: Tensor) -> None:
        """Notes how far the tensor moved."""
        place = self._compared.place
        assert place is not None, "a piece is being run"
        before = self._compared.copies.get((place.piece, key))
        if before is None:
            return
        like = self._compared.kept.get(key)
        pair = None if like is None else tokens_first(like, tensor, place)
        if pair is None:
            return
        found = self._compared.deviations[key]
        by_token = largest(difference(pair[1], before), place.real)
        found.own = torch.maximum(found.own, by_token.max() if by_token.numel() else found.own)


def tokens_first(mine: Tensor, theirs: Tensor, place: Place) -> tuple[Tensor, Tensor] | None:
    """The same tokens of both, as (rows, tokens, everything else); None where they are not of one form.

    Args:
        mine: of the plan's run, all rows and this rank's tokens.
        theirs: of one process, the rows and tokens of the piece.
        place: which tokens are which.
    """
    piece = place.piece
    rows, tokens = piece.last - piece.first, piece.stop - piece.start
    for dim in (1, 0, *range(2, mine.dim())):
        ours, alone = _moved(mine, dim, place.rows, place.held), _moved(theirs, dim, rows, tokens)
        if ours is None or alone is None or ours.shape[2:] != alone.shape[2:]:
            continue
        if ours.shape[0] == place.rows and alone.shape[0] == rows:
            ours = ours[piece.first : piece.last]
        if ours.shape[0] == alone.shape[0]:
            return ours.index_select(1, place.here), alone.index_select(1, place.there)
    return None


def _moved(tensor: Tensor, dim: int, rows: int, tokens: int) -> Tensor | None:
    """(rows or 1, tokens, the rest) of a tensor whose tokens are in `dim`, where 0 is for rows put one after another."""
    if dim >= tensor.dim():
        return None
    if dim == 0:
        return tensor.reshape(rows, tokens, -1) if tensor.shape[0] == rows * tokens else None
    if tensor.shape[dim] != tokens or tensor.shape[0] not in (1, rows):
        return None
    return tensor.movedim(dim, 1).reshape(tensor.shape[0], tokens, -1)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Absolute differences in a wide dtype; infinite where one is NaN, 0 where both are equal infinities."""
    wide = accumulate_dtype(torch.promote_types(a.dtype, b.dtype)) if a.is_floating_point() else torch.float64
    a, b = a.to(wide), b.to(wide)
    return torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)


def largest(values: Tensor, real: Tensor | None) -> Tensor:
    """(tokens,) the largest of (rows, tokens, rest) over rows and the rest, in float64; tokens that are not real count as 0."""
    by_row = values.amax(2) if values.shape[2] else values.new_zeros(values.shape[:2])
    if real is not None:
        by_row = by_row.expand(real.shape).masked_fill(~real, 0)
    return by_row.amax(0).double()


def _most(values: Tensor, real: Tensor | None) -> Tensor:
    by_token = largest(values.abs().double(), real)
    return by_token.max() if by_token.numel() else by_token.new_zeros(())


def largest_values(deviations: Mapping[Key, Deviation]) -> dict[Key, tuple[float, ...]]:
    """Largest difference, scale and own error as numbers."""
    found: dict[Key, tuple[float, ...]] = {}
    for key, one in deviations.items():
        worst = one.tokens.max() if one.tokens.numel() else torch.zeros(())
        found[key] = float(worst), float(one.scale), float(one.own)
    return found
