"""Planning the attention of a batch before its turn comes."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from dtensor_ring.data.batch import check_mesh, check_placement
from dtensor_ring.placements.placement import SequencePlacement, Zigzag
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.mask import Band, mask_text
from dtensor_ring.planning.problem import AttentionProblem, StrategyName
from dtensor_ring.planning.schedule import plan


def plan_ahead(
    documents: Documents,
    device_mesh: DeviceMesh,
    placement: SequencePlacement | None = None,
    *,
    is_causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    strategy: StrategyName = "ring",
    stages: int | None = None,
) -> None:
    """Plan the attention of a packed batch now, so that its first layer need not wait until this is done.

        with ThreadPoolExecutor(1) as planner:
            for batch in batches:
                planned = planner.submit(plan_ahead, documents_of(next_batch), mesh["cp"], Zigzag(1))
                train(batch)                                       # meanwhile the host waits for the GPU now and then

    A plan depends on the documents, so that every packed batch has another; one serves all layers with the same mask, forward and
    backward. Thousands of documents take milliseconds, tens of thousands a tenth of a second or more. The plan is kept in this
    process, where attention finds it: call this in a thread of the trainer. What a worker process of a data loader planned would
    be lost with it. Nothing is sent, so that ranks may call it whenever they like. A call of attention that asks for something else
    is planned when it comes, as it would be without this.

    Args:
        documents: bounds of the whole batch.
        device_mesh: the mesh axis that holds the sequence, such as `mesh["cp"]`.
        placement: how the sequence is cut; `Zigzag(1)` by default.
        is_causal: as attention will be asked.
        window: as attention will be asked.
        strategy: as attention will be asked; "ring" is its default.
        stages: as attention will be asked; where it is asked with `memory`, the number of stages that this comes to. Left open it
            is the fewest. On GPUs whose figures are known attention may choose more for some batches, over slow links above all:
            pass the same `stages` to both, or what was planned here is of no use to it.

    Raises:
        ValueError: the mesh has more than one axis, the placement is not of dim 1 or cannot cut these documents, or the mask
            makes no sense.
    """
    placement = Zigzag(1) if placement is None else placement
    check_mesh(device_mesh)
    check_placement(placement)
    band, length, world = Band.parse(mask_text(is_causal, window)), documents.length, device_mesh.size()
    problem = AttentionProblem(placement.layout, band, length, length, world, strategy, documents).staged(stages or 0)
    # With heads shared out each rank plans as if it were alone, and has all tokens.
    plan(problem.planned, device_mesh.get_local_rank() if problem.planned.world > 1 else 0)
