"""What a plan does, told in a few lines, and how balanced the last packed batch was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from dtensor_ring.comm import transport_along
from dtensor_ring.data.batch import GOOD_BALANCE, balance_remedy
from dtensor_ring.integrations.transformers.token_loss import labels_are_unshifted
from dtensor_ring.ops.arguments import Arguments
from dtensor_ring.placements import SequencePlacement
from dtensor_ring.planning.cost_model import CostModel
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import work_balance


def describe(
    model: PreTrainedModel,
    placement: SequencePlacement,
    asked: Arguments,
    attention: Sequence[str],
    mesh: DeviceMesh | None,
    packed: Documents | None,
    loss: str,
) -> str:
    """The text of `RingPlan.describe`.

    Args:
        model: what the plan was made for.
        placement: how it cuts sequences.
        asked: what its attention was asked for.
        attention: names of its attention modules, in their order.
        mesh: the axis it is applied over, or None.
        packed: the documents of the last batch where that was packed, or None.
        loss: what is computed, in a few words.
    """
    where = "not applied yet" if mesh is None else f"over {mesh.size()} ranks of axis {axis_text(mesh)}"
    transport = "that of the axis" if mesh is None else transport_along(mesh).name
    return "\n".join(
        [
            f"{type(model).__name__}: sequence parallel as {placement!r}, {where}",
            f"  attention: {len(attention)} modules, {attention[0]} to {attention[-1]}",
            f"  strategy:  {asked.strategy or 'ring (chosen: memory does not grow with the ranks)'}",
            f"  stages:    {asked.stages or _stages(asked)}",
            f"  kernel:    {asked.kernel or 'the first that does not refuse'}",
            f"  transport: {transport}",
            f"  batch:     input_ids, inputs_embeds, position_ids and labels are cut; labels {_labels(model)}",
            f"  loss:      {loss}",
            "             mean over the whole batch; with num_items_in_batch this rank's sum / num_items_in_batch",
            "  gradients: to be averaged over the axis: fully_shard or DDP over it, or average_gradients(model, mesh)",
            f"  balance:   {_balance(placement, mesh, packed, reach_of(model))}",
        ]
    )


def reach_of(model: PreTrainedModel) -> int | None:
    """Keys that a query of any layer sees at most; None where a layer sees the whole document."""
    # One layer without a window decides how long a step takes, since its work grows with the square of a document.
    config: Any = model.config
    kinds = set(getattr(config, "layer_types", None) or ("sliding_attention",))  # without types a window is every layer's
    return getattr(config, "sliding_window", None) if kinds == {"sliding_attention"} else None


def axis_text(mesh: DeviceMesh) -> str:
    """The name of a mesh of one axis, quoted."""
    return repr(mesh.mesh_dim_names[0]) if mesh.mesh_dim_names else "0"


def _labels(model: PreTrainedModel) -> str:
    return "stay with their tokens" if labels_are_unshifted(model) else "are shifted first"


def _stages(asked: Arguments) -> str:
    bound = "512k tokens' keys and values" if asked.memory is None else f"{asked.memory} bytes"
    model = "of the GPU" if asked.cost_model is None else CostModel.of_text(asked.cost_model).digest
    return f"the fastest by cost model {model} that keep their buffers within {bound}"


def _balance(placement: SequencePlacement, mesh: DeviceMesh | None, packed: Documents | None, reach: int | None) -> str:
    """Mean work over the most loaded rank's, of the last batch if it was packed."""
    if mesh is None or packed is None:
        return "of packed batches it depends on where documents end: ask again after one"
    share = work_balance(placement.layout, packed, mesh.size(), reach)
    remedy = "" if share >= GOOD_BALANCE else f". {balance_remedy(packed, placement, mesh.size(), reach)}"
    return f"{share:.2f} (mean work / most loaded rank) on the last batch, {packed}{remedy}"
