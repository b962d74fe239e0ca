"""What `verify` compares, row by row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dtensor_ring._torch import local_of
from dtensor_ring.comm.rank_checks import checksum
from dtensor_ring.data.batch import IGNORED
from dtensor_ring.integrations.transformers.attention import KEYWORD, STATE, AttentionState, RingBatch
from dtensor_ring.integrations.transformers.plan import RingPlan
from dtensor_ring.integrations.verify.batches import LABELS, Case, changes, padded_for, without_labels_of
from dtensor_ring.integrations.verify.judgement import Judge, Pair
from dtensor_ring.integrations.verify.runs import Runner
from dtensor_ring.integrations.verify.state import Ranks, nudged, parameters_of
from dtensor_ring.integrations.verify.watch import Compared, Kept, OwnError, difference
from dtensor_ring.placements import SequencePlacement
from dtensor_ring.tools.verification import (
    Difference,
    Judged,
    Row,
    Verification,
    first_culprit,
    on_ranks,
    relative,
    tolerance,
    worst_row,
)

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_SINGLE = torch.finfo(torch.float32).eps
_NUDGES = 2


class Verifier:
    """Runs and compares one model under one plan."""

    def __init__(self, model: PreTrainedModel, plan: RingPlan, placement: SequencePlacement, ranks: Ranks) -> None:
        self._model, self._plan, self._placement, self._ranks = model, plan, placement, ranks
        self._world = ranks.mesh.size()
        self._runner = Runner(model, plan, placement, ranks)
        self._classes = {name: type(module).__name__ for name, module in model.named_modules()}
        self._judge = Judge(ranks, _SINGLE)

    def verify(self, case: Case, title: str, *, edge_cases: bool) -> Verification:
        """All rows for a case, and where the two runs part."""
        compared = Compared(Kept())
        pair = self._run(case, compared, _NUDGES)
        outputs, gradients = self._judge.modules(compared, self._runner.tokens(case))
        by_parameter, parameters = self._judge.gradients("gradients", pair)
        loss = self._loss("loss", pair)
        rows = [
            self._weights(),
            *self._shares(pair),
            loss,
            self._logits(pair),
            worst_row("outputs of modules", outputs),
            worst_row("gradients of outputs", gradients),
            parameters,
            self._number("gradient norm", pair, pair.ring.norm, pair.alone.norm, [run.norm for run in pair.nudges]),
        ]
        first = self._first(outputs, loss, gradients, by_parameter)
        del compared
        if edge_cases:
            rows += self._edges(pair)
        if first is None and (row := next((row for row in rows if not row.ok), None)) is not None:
            first = Difference("", self._classes[""], "edge case", row.deviation, row.tolerance, note=f"{row.name}: {row.note}")
        return Verification(title, tuple(rows), first)

    def _run(self, case: Case, compared: Compared | None, nudges: int) -> Pair:
        ring = self._runner.ring(case, None if compared is None else compared.kept)
        if compared is not None:
            self._judge.unit = self._coarsest(compared.kept)
        with self._plan.paused():
            alone = self._runner.alone(case, compared, compared)
            moved = []
            for seed in range(nudges):
                with nudged(self._model, self._judge.unit, seed + 1):
                    moved.append(self._runner.alone(case, None if compared is None else OwnError(compared), compared))
        return Pair(case, ring, alone, moved)

    def _coarsest(self, kept: Kept) -> float:
        """One unit in the last place, relative, of the coarsest dtype that weights or outputs have."""
        dtypes = {parameter.dtype for parameter in parameters_of(self._model).values() if parameter.is_floating_point()}
        dtypes |= {tensor.dtype for key, (tensor, _) in kept.tensors.items() if key.part == "output"}
        # Also of float64: transformers computes norms, softmax and losses in float32 all the same.
        return self._most(max(_SINGLE, *(torch.finfo(dtype).eps for dtype in dtypes)))

    def _most(self, value: float) -> float:
        """The largest over all ranks."""
        return self._ranks.most({"": (value,)})[""][0]

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
        # Of this axis: another data-parallel rank may hold another shard.
        told = self._ranks.on_axis(mine)
        mine_apart = [name for name in mine if len({theirs.get(name) for theirs in told}) > 1]
        apart = list(dict.fromkeys(name for _, names in self._ranks.tell(mine_apart) for name in names))
        return Row(f"weights, of {len(mine)} tensors", len(apart), 0, f"ranks hold different {', '.join(apart[:3])}")

    def _shares(self, pair: Pair) -> list[Row]:
        """Which tokens, positions and labels each rank got, and in which layout its layers attend."""
        case, share, mine = pair.case, pair.ring.share or {}, self._runner.tokens(pair.case)
        key = "shift_labels" if case.shifted else "labels"
        held = share.get(KEYWORD)
        if key not in share and isinstance(held, RingBatch):  # labels that the plan keeps, and does not pass on to the model
            kept = held.loss.labels if held.targets is None else held.targets.labels
            share = share if kept is None else {**share, key: kept}
        targets, labels = case.targets(), share.get(key)
        wrong = {
            "tokens": _apart(share, case.given, ("input_ids", "inputs_embeds"), mine),
            "positions": _apart(share, {"position_ids": _positions(case)}, ("position_ids",), mine),
            "labels": _apart(share, {key: targets}, (key,), mine),
        }
        told = self._ranks.tell(wrong)
        rows: list[Row] = []
        for name in wrong:
            total, ranks = sum(each[name] for _, each in told), sorted({rank for rank, each in told if each[name]})
            note = f"{total} {name} are not those that {self._placement!r} gives {on_ranks(ranks)}"
            rows.append(Row(f"{name} of each rank", total, 0, note))
        held = sum(self._ranks.on_axis(len(mine)))
        rows.append(Row("tokens held by all ranks", self._most(abs(held - case.length)), 0, f"{held} of {case.length}"))
        if isinstance(labels, Tensor) and targets is not None:
            count = sum(self._ranks.on_axis(int((labels != IGNORED).sum())))
            note = f"{count} over all ranks, {case.count()} in one process"
            rows.append(Row("labels that count", self._most(abs(count - case.count())), 0, note))
        else:
            rows[2] = replace(rows[2], left_out="the model was given none")
        states = {
            name: state for name, m in self._model.named_modules() if isinstance(state := getattr(m, STATE, None), AttentionState)
        }
        other = [name for name, state in states.items() if state.layout != self._placement.layout]
        layouts = list(dict.fromkeys(name for _, names in self._ranks.tell(other) for name in names))
        note = f"{', '.join(layouts[:3])}: attends in another layout than {self._placement.layout}, by which the batch is cut"
        return [*rows, Row(f"layout of {len(states)} attention modules", len(layouts), 0, note)]

    def _number(self, name: str, pair: Pair, value: float, wanted: float, own: Sequence[float]) -> Row:
        """An average over labels: a loss, or the norm of gradients."""
        unit = max(_SINGLE, self._judge.unit / max(pair.case.count(), 1) ** 0.5)
        judged = self._judge.number(own, value, wanted, unit)
        # Ranks whose weights differ come to numbers of their own, also NaN: all ask the others, and then write the same.
        told = [numbers for _, numbers in self._ranks.tell((value, wanted))]
        broken = next((wanted for _, wanted in told if not math.isfinite(wanted)), None)
        if broken is not None:
            return Row(name, math.inf, 0, f"one process itself gives {broken}")
        value, wanted = max(told, key=lambda numbers: math.inf if math.isnan(numbers[0]) else abs(numbers[0] - numbers[1]))
        return Row(name, *judged, f"{value:.6g} under the plan, {wanted:.6g} in one process")

    def _loss(self, name: str, pair: Pair) -> Row:
        return self._number(name, pair, pair.ring.loss, pair.alone.loss, [run.loss for run in pair.nudges])

    def _logits(self, pair: Pair) -> Row:
        """All tokens in order, as the plan gathers them."""
        ours, theirs = pair.ring.logits, pair.alone.logits
        if ours is None or theirs is None:
            return Row("logits", left_out="the model gives none")
        if ours.shape != theirs.shape:
            return Row("logits", math.inf, 0, f"gathered as {tuple(ours.shape)}, {tuple(theirs.shape)} in one process")
        found = _by_token(ours, theirs, pair.case)
        nudges = [_by_token(run.logits, theirs, pair.case) for run in pair.nudges if run.logits is not None]
        own = max((float(nudge.max()) for nudge in nudges), default=0.0)
        scale = float(_by_token(theirs, torch.zeros_like(theirs), pair.case).max())
        size, own, scale = self._ranks.most({"": (float(found.max()), own, scale)})[""]
        bound = tolerance(own, scale, self._judge.unit)
        return Row("logits", relative(size, scale), bound, _tokens_note(found, bound * scale))

    def _edges(self, pair: Pair) -> list[Row]:
        """Batches made of the user's."""
        return [*self._with_items(pair), *self._isolation(pair), *self._masked_ranks(pair.case)]

    def _with_items(self, pair: Pair) -> list[Row]:
        case, name = pair.case, "loss with num_items_in_batch"
        if case.given.get("labels") is None or "num_items_in_batch" in case.given:
            return [Row(name, left_out="the batch has one" if "num_items_in_batch" in case.given else "no labels")]
        out = self._runner.ring_forward({**case.given, "num_items_in_batch": torch.as_tensor(case.count())})
        loss = out[0] if isinstance(out, tuple) else out.loss
        return [self._loss(name, pair._replace(ring=replace(pair.ring, loss=sum(self._ranks.on_axis(float(loss))))))]

    def _isolation(self, pair: Pair) -> list[Row]:
        """Logits of what is not changed stay, bit by bit."""
        case, config = pair.case, self._model.config.get_text_config()
        rows: list[Row] = []
        before: Tensor | None = None
        for change in changes(case, int(config.vocab_size)):
            if before is None:
                plain = {key: case.given[key] for key in case.given if key not in LABELS}
                before = self._runner.gathered(self._runner.ring_forward(plain))
            after = self._runner.gathered(self._runner.ring_forward(change.given))
            if before is None or after is None:
                break
            moved = difference(before, after).amax(-1).masked_fill(~change.still.to(before.device), 0)
            scale = float(before.abs().max())
            # A product of an expert's matrix with other tokens beside may round otherwise, in one process too.
            bound = self._logits(pair).tolerance if any(getattr(config, name, None) for name in _EXPERTS) else 0.0
            note = _tokens_note(moved, bound * scale)
            rows.append(Row(f"others, when {change.what} changes", relative(self._most(float(moved.max())), scale), bound, note))
        return rows or [Row("isolation", left_out="one row of one document")]

    def passes(self, case: Case, *, edge_cases: bool) -> tuple[int, ...]:
        """How many pieces and edge cases are run, which ranks that gather weights together must have alike."""
        if not edge_cases:
            return (len(case.pieces()),)
        vocabulary = int(self._model.config.get_text_config().vocab_size)
        given = [
            case.given.get("labels") is not None,
            "num_items_in_batch" in case.given,
            sum(1 for _ in changes(case, vocabulary)),
        ]
        made = [0 if isinstance(made, str) else len(made.pieces()) for _, made in self._made(case)]
        return len(case.pieces()), *map(int, given), *made

    def _made(self, case: Case) -> list[tuple[str, Case | str]]:
        """Batches with a rank without labels, and with ranks that have nothing but padding; or why there are none."""
        tokens_of = case.tokens_of(self._placement, self._world)
        silent = without_labels_of(case, tokens_of[0])
        cases: list[tuple[str, Case | str]] = [("rank 0 without labels", silent), ("padding only", padded_for(case, tokens_of))]
        if case.given.get("labels") is None:
            return [(name, made if isinstance(made, str) else "no label would count") for name, made in cases]
        return [(name, made if isinstance(made, str) or made.count() else "no label would count") for name, made in cases]

    def _masked_ranks(self, case: Case) -> list[Row]:
        """A rank without labels, and ranks with nothing but padding."""
        rows: list[Row] = []
        for name, made in self._made(case):
            if isinstance(made, str):
                rows.append(Row(name, left_out=made))
            else:
                if "num_items_in_batch" in made.given:
                    made = replace(made, given={**made.given, "num_items_in_batch": torch.as_tensor(made.count())})
                pair = self._run(made, None, 1)
                is_finite = math.isfinite(pair.alone.loss) and math.isfinite(pair.alone.norm)
                if not all(finite for _, finite in self._ranks.tell(is_finite)):
                    rows.append(Row(name, left_out="one process itself gives NaN"))  # some masks leave a query without keys
                    continue
                rows += [self._loss(f"{name}: loss", pair), self._judge.gradients(f"{name}: gradients", pair)[1]]
        return rows


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


def _by_token(a: Tensor, b: Tensor, case: Case) -> Tensor:
    """(B, S) the largest difference of each real token."""
    by_token = difference(a, b).amax(-1)
    return by_token if case.real is None else by_token.masked_fill(~case.real.to(by_token.device), 0)


def _tokens_note(by_token: Tensor, bound: float) -> str:
    tokens = (by_token > bound).any(0).nonzero()[:, 0].tolist()
    return f"{len(tokens)} token{'s' * (len(tokens) != 1)} from {tokens[0]} on" if tokens else ""
