"""Milliseconds of an attention on a named GPU or by a user's figures, for people and as values for JSON."""

from __future__ import annotations

from dataclasses import replace

from dtensor_ring.planning.cost_model import CostModel, Link
from dtensor_ring.planning.costs import AttentionShape, costs
from dtensor_ring.planning.devices import KNOWN, LINKS
from dtensor_ring.planning.predict import Predictor
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.stage_choice import choose_stages
from dtensor_ring.planning.stages import asked_stages


def predictor_for(
    shape: AttentionShape, device: str | None, cost_model: CostModel | None, kernel: str | None = None, ranks_per_host: int = 0
) -> Predictor | None:
    """What predicts times on a device or by a model; None where neither is named.

    Args:
        shape: sizes of the tensors.
        device: a name of `devices.KNOWN`; with a model the link is that of this device, unless the model has one.
        cost_model: figures of one's own.
        kernel: one of the model's kernels; None is "torch_flash", which needs no package, or the model's first.
        ranks_per_host: ranks on each host; 0 is all of them.

    Raises:
        ValueError: no such device, a kernel that the model lacks, or a number of ranks below 0.
    """
    if device is not None and device not in KNOWN:
        raise ValueError(
            f"no figures of device {device!r}: use {', '.join(KNOWN)}, or measure it with python -m dtensor_ring calibrate"
        )
    if ranks_per_host < 0:
        raise ValueError(f"ranks on each host are 1 or more, or 0 for all on one, found {ranks_per_host}")
    model = cost_model or (None if device is None else KNOWN[device])
    if model is None:
        return None
    names = [name for name, _ in model.kernels]
    if kernel is not None and kernel not in names:
        raise ValueError(f"kernel {kernel!r} is not among those of the cost model: {', '.join(names)}")
    chosen = kernel or ("torch_flash" if "torch_flash" in names else names[0])
    asked: Link | None = None if device is None else replace(LINKS[device], host=ranks_per_host)
    link = model.over(asked)
    if link is not None and ranks_per_host:
        link = replace(link, host=ranks_per_host)
    return Predictor(model, chosen, shape, link)


def staged_by(problem: AttentionProblem, predictor: Predictor | None, stages: int | None) -> AttentionProblem:
    """The problem in the stages asked for, or in those that `ring_attention` takes on the predictor's machine.

    Raises:
        ValueError: less than one stage, or stages of a strategy that has none.
    """
    asked = asked_stages(stages, problem.strategy)
    if asked or predictor is None:
        return problem.staged(asked)
    return choose_stages(problem, predictor)


def predicted(problem: AttentionProblem, predictor: Predictor, rank: int | None = None) -> dict[str, object]:
    """What a rank, or the most loaded one, is predicted to take, as values that JSON can hold; milliseconds."""
    rank = costs(problem, predictor.shape).most_loaded if rank is None else rank
    seconds = predictor.rank(problem, rank)
    return {
        "rank": rank,
        "forward_ms": round(seconds.forward * 1e3, 3),
        "forward_backward_ms": round(seconds.both * 1e3, 3),
        "kernel": predictor.kernel,
        "device": predictor.model.device,
        "source": predictor.model.source,
        "link": None if predictor.link is None else str(predictor.link),
    }


def predicted_text(problem: AttentionProblem, predictor: Predictor) -> str:
    """The same of the most loaded rank as text of 80 columns."""
    facts = predicted(problem, predictor)
    link = facts["link"] or "not known: transfers are left out"
    return "\n".join(
        [
            f"predicted for rank {facts['rank']}, by figures and not by running it",
            f"  forward:                   {facts['forward_ms']} ms",
            f"  forward and backward:      {facts['forward_backward_ms']} ms",
            f"  kernel:                    {facts['kernel']} on {facts['device']}",
            f"  figures:                   {facts['source']}",
            f"  link:                      {link}",
        ]
    )
