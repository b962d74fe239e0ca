"""What `verify` compares, row by row, and the judgement that all ranks come to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dtensor_ring._torch import local_of
from dtensor_ring.comm.rank_checks import checksum
from dtensor_ring.data.batch import IGNORED
from dtensor_ring.integrations.transformers.attention import STATE, AttentionState
from dtensor_ring.integrations.transformers.plan import RingPlan
from dtensor_ring.integrations.transformers.verify_batches import Case, changes, padded_for, without_labels_of
from dtensor_ring.integrations.transformers.verify_runs import Run, Runner, local_gradients
from dtensor_ring.integrations.transformers.verify_state import Ranks, nudged, parameters_of
from dtensor_ring.integrations.transformers.verify_watch import Compared, Key, Kept, OwnError, difference, local_summary
from dtensor_ring.placements import SequencePlacement
from dtensor_ring.tools.verification import (
    Difference,
    Judged,
    Row,
    Verification,
    first_culprit,
    on_ranks,
    ratio_note,
    relative,
    tolerance,
    worst,
    worst_row,
)

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_SINGLE = torch.finfo(torch.float32).eps
_NUDGES = 2


class Pair(NamedTuple):
    """A case under the plan and in one process, and what nudged weights made of the latter."""

    case: Case
    ring: Run
    alone: Run
    nudges: list[Run]


class Verifier:
    """Runs and compares one model under one plan."""

    def __init__(self, model: PreTrainedModel, plan: RingPlan, placement: SequencePlacement, ranks: Ranks) -> None:
        self._model, self._plan, self._placement, self._ranks = model, plan, placement, ranks
        self._world = ranks.mesh.size()
        self._runner = Runner(model, plan, placement, ranks)
        self._classes = {name: type(module).__name__ for name, module in model.named_modules()}
        self._unit = 0.0

    def verify(self, case: Case, title: str, *, edge_cases: bool) -> Verification:
        """All rows for a case, and where the two runs part."""
        compared = Compared(Kept())
        pair = self._run(case, compared, _NUDGES)
        outputs, gradients = self._judge_modules(compared, case)
        by_parameter, parameters = self._gradients("gradients", pair)
        loss = self._loss("loss", pair)
        rows = [
            self._weights(),
            *self._shares(pair),
            loss,
            *self._logits(pair),
            worst_row("outputs of modules", outputs),
            worst_row("gradients of outputs", gradients),
            parameters,
            self._norm("gradient norm", pair),
        ]
        first = self._first(outputs, loss, gradients, by_parameter)
        del compared
        if edge_cases:
            rows += self._edges(pair)
        if first is None and (row := next((row for row in rows if not row.ok), None)) is not None:
            first = Difference("", self._classes[""], "edge case", row.deviation, row.tolerance, note=f"{row.name}: {row.note}")
        return Verification(title, tuple(rows), first)

    def _run(self, case: Case, compared: Compared | None, nudges: int) -> Pair:
        kept = None if compared is None else compared.kept
        ring = self._runner.ring(case, kept)
        self._unit = self._unit or self._coarsest(kept)
        with self._plan.paused():
            alone = self._runner.alone(case, compared, compared)
            moved = []
            for seed in range(nudges):
                with nudged(self._model, self._unit, seed + 1):
                    moved.append(self._runner.alone(case, None if compared is None else OwnError(compared), compared))
        return Pair(case, ring, alone, moved)

    def _coarsest(self, kept: Kept | None) -> float:
        """One unit in the last place, relative, of the coarsest dtype that weights or outputs have."""
        assert kept is not None, "the first case is watched"
        dtypes = {parameter.dtype for parameter in parameters_of(self._model).values() if parameter.is_floating_point()}
        dtypes |= {tensor.dtype for key, (tensor, _) in kept.tensors.items() if key.part == "output"}
        (unit,) = self._ranks.most({"": (max(torch.finfo(dtype).eps for dtype in dtypes),)})[""]
        return max(unit, _SINGLE)

    def _judge_modules(self, compared: Compared, case: Case) -> tuple[list[Judged], list[Judged]]:
        """Outputs in forward order and their gradients in backward order, judged over all ranks."""
        mine = {_text(key): numbers for key, numbers in local_summary(compared.deviations).items()}
        order = dict.fromkeys(text for _, theirs in self._ranks.tell(list(mine)) for text in theirs)
        most = self._ranks.most(mine)
        bounds, sizes = {}, {}
        for text in order:
            size, scale, own, _ = most[text]
            sizes[text], bounds[text] = relative(size, scale), tolerance(own, scale, self._unit)
        apart = {text for text in order if _part(text) != "input" and not sizes[text] <= bounds[text]}
        tokens = self._runner.tokens(case)
        places = self._ranks.tell({_text(k): _places(one.tokens, bounds[_text(k)] * most[_text(k)][1], tokens, one.mine) for k, one in compared.deviations.items() if _text(k) in apart})
        inputs: dict[str, float] = {}
        for text in order:
            if _part(text) == "input":
                call = _call(text)
                inputs[call] = max(inputs.get(call, 0.0), sizes[text])
        judged: dict[str, list[Judged]] = {"output": [], "gradient": []}
        for text in order:
            if _part(text) == "input":
                continue
            module, call = text.split("|")[:2]
            found = Judged(module, int(call), sizes[text], bounds[text], inputs.get(_call(text), 0.0))
            judged[_part(text)].append(_placed(found, text, places) if text in apart else found)
        return judged["output"], judged["gradient"]

    def _first(
        self, outputs: Sequence[Judged], loss: Row, gradients: Sequence[Judged], parameters: Sequence[Judged]
    ) -> Difference | None:
        """Where the runs part first: forward, in the loss, backward, or in a parameter's own gradient."""
        if (found := first_culprit(outputs, self._classes)) is not None:
            return found
        if not loss.ok:
            return Difference("", self._classes[""], "loss", loss.deviation, loss.tolerance, note=loss.note)
        if (first := next((each for each in gradients if not each.ok), None)) is not None:
            inside = self._classes.get(first.module.rpartition(".")[0], "")
            return first.difference(self._classes, "output gradient", f"made by what comes after it in {inside}" if inside else "")
        if (first := next((each for each in parameters if not each.ok), None)) is not None:
            module = first.module.rpartition(".")[0]
            return first._replace(module=module).difference(self._classes, "parameter gradient", first.module)
        return None

    def _weights(self) -> Row:
        """Weights that ranks should hold alike, bit by bit."""
        mine = {n: checksum(local_of(p)) for n, p in parameters_of(self._model).items() if n not in self._ranks.reduced}
        mine |= {name: checksum(buffer) for name, buffer in self._model.named_buffers()}
        told = self._ranks.tell(mine)
        apart = [name for name in mine if len({theirs.get(name) for _, theirs in told}) > 1]
        return Row(f"weights, of {len(mine)} tensors", len(apart), 0, f"ranks hold different {', '.join(apart[:3])}")

    def _shares(self, pair: Pair) -> list[Row]:
        """Which tokens, positions and labels each rank got, and in which layout its layers attend."""
        case, share, mine = pair.case, pair.ring.share or {}, self._runner.tokens(pair.case)
        wrong = {"tokens": _apart(share, case.given, ("input_ids", "inputs_embeds"), mine)}
        wrong["positions"] = _apart(share, {"position_ids": _positions(case)}, ("position_ids",), mine)
        targets = case.targets()
        labels = None if targets is None or share.get("shift_labels") is None else targets
        wrong["labels"] = 0 if labels is None else _apart(share, {"shift_labels": labels}, ("shift_labels",), mine)
        counted = 0 if labels is None else int((share["shift_labels"] != IGNORED).sum())
        states = {n: state for n, m in self._model.named_modules() if (state := getattr(m, STATE, None)) is not None}
        other = [n for n, state in states.items() if isinstance(state, AttentionState) and state.layout != self._placement.layout]
        told = self._ranks.tell((wrong, len(mine), counted, other))
        rows = []
        for name in wrong:
            total, ranks = sum(each[0][name] for _, each in told), tuple(rank for rank, each in told if each[0][name])
            rows.append(Row(f"{name} of each rank", total, 0, f"{total} {name} are not those that {self._placement!r} gives {on_ranks(ranks)}"))
        if labels is None:
            rows[-1] = Row("labels of each rank", left_out="the model was given none")
        on_axis = {rank: each for rank, each in told}
        held, count = sum(each[1] for each in on_axis.values()), sum(each[2] for each in on_axis.values())
        rows.append(Row("tokens held by all ranks", abs(held - case.length), 0, f"{held} of {case.length}"))
        if labels is not None:
            rows.append(Row("labels that count", abs(count - case.count()), 0, f"{count} over all ranks, {case.count()} in one process"))
        layouts = sorted({name for _, each in told for name in each[3]})
        note = f"{', '.join(layouts[:3])}: attends in another layout than {self._placement.layout}, by which the batch is cut"
        rows.append(Row(f"layout of {len(states)} attention modules", len(layouts), 0, note))
        return rows

    def _loss(self, name: str, pair: Pair) -> Row:
        value, wanted = pair.ring.loss, pair.alone.loss
        own = max((abs(run.loss - wanted) for run in pair.nudges), default=0.0)
        size, own = self._ranks.most({"": (abs(value - wanted), own)})[""]
        scale = abs(wanted) or 1.0
        if not math.isfinite(wanted):
            return Row(name, math.inf, 0, f"one process itself gives {wanted}")
        note = f"{value:.6g} under the plan, {wanted:.6g} in one process"
        return Row(name, relative(size, scale), tolerance(own, scale, self._averaged(pair.case)), note)

    def _averaged(self, case: Case) -> float:
        """One unit in the last place of an average over labels."""
        return max(_SINGLE, self._unit / max(case.count(), 1) ** 0.5)

    def _norm(self, name: str, pair: Pair) -> Row:
        value, wanted = pair.ring.norm, pair.alone.norm
        own = max((abs(run.norm - wanted) for run in pair.nudges), default=0.0)
        size, own = self._ranks.most({"": (abs(value - wanted), own)})[""]
        note = f"{value:.6g} under the plan, {wanted:.6g} in one process"
        return Row(name, relative(size, wanted), tolerance(own, wanted, self._averaged(pair.case)), note)

    def _logits(self, pair: Pair) -> list[Row]:
        """All tokens in order, as the plan gathers them."""
        ours, theirs = pair.ring.logits, pair.alone.logits
        if ours is None or theirs is None:
            return [Row("logits", left_out="the model gives none")]
        if ours.shape != theirs.shape:
            return [Row("logits", 1, 0, f"gathered as {tuple(ours.shape)}, {tuple(theirs.shape)} in one process")]
        found = _real_difference(ours, theirs, pair.case)
        own = max((float(_real_difference(run.logits, theirs, pair.case).max()) for run in pair.nudges if run.logits is not None), default=0.0)
        scale = float(_real(theirs, pair.case).abs().max())
        size, own, scale = self._ranks.most({"": (float(found.max()), own, scale)})[""]
        bound = tolerance(own, scale, self._unit)
        apart = (found > bound * scale).any(0).nonzero()[:, 0].tolist()
        note = f"{len(apart)} tokens from {apart[0]} on" if apart else ""
        return [Row("logits", relative(size, scale), bound, note)]

    def _gradients(self, name: str, pair: Pair) -> tuple[list[Judged], Row]:
        """Every parameter's gradient."""
        ours, theirs, nudges = local_gradients(pair.ring), local_gradients(pair.alone), [local_gradients(run) for run in pair.nudges]
        mine: dict[str, tuple[float, ...]] = {}
        product = square = 0.0
        for parameter in dict.fromkeys((*theirs, *ours)):
            a, b = ours.get(parameter), theirs.get(parameter)
            like = a if b is None else b
            assert like is not None, "one of the two runs has it"
            a, b = (torch.zeros_like(like) if each is None else each for each in (a, b))
            own = [difference(run.get(parameter, torch.zeros_like(like)), b) for run in nudges]
            mine[parameter] = (_max(difference(a, b)), _max(b.abs()), max(map(_max, own), default=0.0), _max(a.abs()))
            product += float((a.double() * b.double()).sum())
            square += float((b.double() ** 2).sum())
        judged = []
        for parameter, (size, scale, own, _) in self._ranks.most(mine).items():
            judged.append(Judged(parameter, 0, relative(size, scale), tolerance(own, scale, self._unit)))
        told = self._ranks.tell((product, square, [p for p, numbers in mine.items() if not numbers[3] and numbers[1]]))
        apart = sum(not each.ok for each in judged)
        found = worst(judged)
        if found is None:
            return judged, Row(name, left_out="no parameter has one")
        square = sum(each[1] for _, each in told)
        ratio = sum(each[0] for _, each in told) / square if square else 0.0
        note = f"{apart} of {len(judged)} part, furthest {found.module}"
        if apart == len(judged) and _is_multiple(ours, theirs, ratio):
            note += f"; {ratio_note(ratio, self._world)}"
        return judged, Row(f"{name}, of {len(judged)} parameters", found.deviation, found.tolerance, note)

    def _edges(self, pair: Pair) -> list[Row]:
        """Batches made of the user's."""
        return [*self._with_items(pair), *self._isolation(pair), *self._masked_ranks(pair.case)]

    def _with_items(self, pair: Pair) -> list[Row]:
        case = pair.case
        name = "loss with num_items_in_batch"
        if case.given.get("labels") is None or "num_items_in_batch" in case.given:
            return [Row(name, left_out="the batch has one" if "num_items_in_batch" in case.given else "no labels")]
        out = self._runner.ring_forward({**case.given, "num_items_in_batch": torch.as_tensor(case.count())})
        loss = out[0] if isinstance(out, tuple) else out.loss
        value = sum(part for part in self._runner.on_axis(float(loss)))
        return [self._loss(name, pair._replace(ring=replace(pair.ring, loss=value)))]

    def _isolation(self, pair: Pair) -> list[Row]:
        case, vocabulary = pair.case, int(self._model.config.get_text_config().vocab_size)
        rows = []
        before: Tensor | None = None
        for change in changes(case, vocabulary):
            if before is None:
                plain = {k: v for k, v in case.given.items() if k not in ("labels", "shift_labels", "num_items_in_batch")}
                before = self._runner.gathered(self._runner.ring_forward(plain))
            after = self._runner.gathered(self._runner.ring_forward(change.given))
            if before is None or after is None:
                break
            still = change.still.to(before.device)
            moved = difference(before, after).amax(-1).masked_fill(~still, 0)
            scale = float(before.abs().max())
            bound = self._logits(pair)[0].tolerance if any(getattr(self._model.config, name, None) for name in _EXPERTS) else 0.0
            tokens = (moved > bound * scale).any(0).nonzero()[:, 0].tolist()
            note = f"{len(tokens)} tokens of others move, from {tokens[0]} on" if tokens else ""
            ((size,),) = self._ranks.most({"": (float(moved.max()),)}).values()
            rows.append(Row(f"others, when {change.what} changes", relative(size, scale), bound, note))
        return rows or [Row("isolation", left_out="one row of one document")]

    def _masked_ranks(self, case: Case) -> list[Row]:
        """A rank without labels, and ranks with nothing but padding."""
        tokens_of = case.tokens_of(self._placement, self._world)
        silent = without_labels_of(case, tokens_of[0])
        cases: list[tuple[str, Case | str]] = [("rank 0 without labels", silent), ("padding only", padded_for(case, tokens_of))]
        rows: list[Row] = []
        for name, made in cases:
            if isinstance(made, str):
                rows.append(Row(name, left_out=made))
            elif case.given.get("labels") is None or not made.count():
                rows.append(Row(name, left_out="no label would count"))
            else:
                if "num_items_in_batch" in made.given:
                    made = replace(made, given={**made.given, "num_items_in_batch": torch.as_tensor(made.count())})
                pair = self._run(made, None, 1)
                if not math.isfinite(pair.alone.loss) or not math.isfinite(pair.alone.norm):
                    rows.append(Row(name, left_out="one process itself gives NaN"))  # some masks leave a query without keys
                    continue
                rows += [self._loss(f"{name}: loss", pair), self._gradients(f"{name}: gradients", pair)[1]]
        return rows


def _text(key: Key) -> str:
    return f"{key.module}|{key.call}|{key.part}|{key.slot}"


def _part(text: str) -> str:
    return text.split("|")[2]


def _call(text: str) -> str:
    return "|".join(text.split("|")[:2])


def _places(by_token: Tensor, bound: float, tokens: Sequence[int], mine: Tensor) -> tuple[list[int], bool]:
    """The tokens that part, and whether this rank has nothing but zeros."""
    apart = (~(by_token <= bound)).nonzero()[:, 0].tolist()
    return [tokens[i] for i in apart], bool(mine == 0)


def _placed(found: Judged, text: str, told: Sequence[tuple[int, Mapping[str, tuple[list[int], bool]]]]) -> Judged:
    here = {rank: theirs[text] for rank, theirs in told if text in theirs and theirs[text][0]}
    tokens = {token for apart, _ in here.values() for token in apart}
    zero = tuple(rank for rank, (_, is_zero) in here.items() if is_zero)
    return found._replace(ranks=tuple(sorted(here)), tokens=len(tokens), first_token=min(tokens, default=None), zero_on=zero)


def _apart(share: Mapping[str, Any], whole: Mapping[str, Any], names: Sequence[str], tokens: Sequence[int]) -> int:
    """How many tokens of a share are not the whole's."""
    for name in names:
        wanted, found = whole.get(name), share.get(name)
        if isinstance(wanted, Tensor) and isinstance(found, Tensor):
            wanted = wanted[:, list(tokens)].to(found.device)
            if found.shape[1] != wanted.shape[1]:
                return len(tokens)
            apart = wanted != found
            return int(apart.flatten(2).any(2).sum() if apart.dim() > 2 else apart.sum())
    return 0


def _positions(case: Case) -> Tensor:
    """The positions of one process."""
    given = case.given.get("position_ids")
    if isinstance(given, Tensor):
        return given
    return torch.arange(case.length)[None] if case.documents is None else case.documents.position_ids()


def _real(values: Tensor, case: Case) -> Tensor:
    return values if case.real is None else values * case.real.to(values.device)[..., None]


def _real_difference(a: Tensor, b: Tensor, case: Case) -> Tensor:
    """(B, S) the largest difference of each real token."""
    by_token = difference(a, b).amax(-1)
    return by_token if case.real is None else by_token.masked_fill(~case.real.to(by_token.device), 0)


def _max(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _is_multiple(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], ratio: float) -> bool:
    """Whether every gradient is one multiple of the right one."""
    return all(_max(difference(ours[name], ratio * grad)) <= 0.01 * abs(ratio) * _max(grad.abs()) for name, grad in theirs.items() if name in ours)
