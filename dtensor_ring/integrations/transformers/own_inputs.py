"""Inputs of some models that are cut beside those of every batch.

token_type_ids (B, S)                      of encoders that embed them
position_ids   (3, B, S) or (4, B, S)      of models that place images: time, height and width of each token, and before these,
                                           where there are four, its position in the row
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from dtensor_ring.comm import Transport
from dtensor_ring.comm.collectives import take_shard
from dtensor_ring.placements import SequencePlacement
from dtensor_ring.placements.placement import split_of
from dtensor_ring.planning.documents import Documents

_AXES = (3, 4)


def embeds_token_types(model: PreTrainedModel) -> bool:
    """Whether `token_type_ids` choose an embedding, as in BERT; elsewhere they tell image tokens, or nothing."""
    return any(name.endswith("token_type_embeddings") for name, _ in model.named_modules())


def take_own(model: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Take out of a whole batch, in place, what `cut_own` cuts, and leave what documents are read from.

    Raises:
        ValueError: token types are not (B, S), or positions on three axes restart, which does not tell documents.
        NotImplementedError: positions on several axes for a model that has one.
    """
    own: dict[str, Tensor] = {}
    types = batch.get("token_type_ids")
    if isinstance(types, Tensor) and embeds_token_types(model):
        own["token_type_ids"] = _checked_types(batch)
        del batch["token_type_ids"]
    positions = batch.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 3:
        own["position_ids"] = batch.pop("position_ids")
        _check_axes(model, positions)
        if positions.shape[0] == 4:
            batch["position_ids"] = positions[0]
        elif all(batch.get(name) is None for name in ("documents", "cu_seq_lens_q", "seq_idx")) and bool(
            (positions[0].diff(dim=-1) < 0).any()
        ):
            raise ValueError(
                "position_ids (3, B, S) go back within a row, where a document may begin or an image: pass documents=, or "
                "position_ids (4, B, S) whose first are the positions in the document"
            )
    return own


def cut_own(
    own: dict[str, Tensor], placement: SequencePlacement, transport: Transport, documents: Documents | None
) -> dict[str, Tensor]:
    """This rank's tokens of what `take_own` took out; tokens are the last dim. Nothing is sent."""
    split = split_of(placement, documents)
    return {key: take_shard(value, value.dim() - 1, split, transport.world, transport.rank) for key, value in own.items()}


def _checked_types(batch: dict[str, Any]) -> Tensor:
    types, tokens = batch["token_type_ids"], batch.get("input_ids", batch.get("inputs_embeds"))
    if isinstance(tokens, Tensor) and types.shape != tokens.shape[:2]:
        raise ValueError(
            f"token_type_ids must have the shape (B, S) of the tokens, {tuple(tokens.shape[:2])}, found {tuple(types.shape)}"
        )
    return types


def _check_axes(model: PreTrainedModel, positions: Tensor) -> None:
    config: Any = model.config
    if "mrope_section" not in (getattr(config, "rope_parameters", None) or {}) or positions.shape[0] not in _AXES:
        raise NotImplementedError(
            f"position_ids of shape {tuple(positions.shape)}: {type(model).__name__} takes (B, S)"
            + (", or (3, B, S) or (4, B, S)" if "mrope_section" in (getattr(config, "rope_parameters", None) or {}) else "")
        )
