"""The time of one training step on the slowest GPU: matrix products, attention, all else by its bytes, and what GPUs exchange.

matrix products   2 N T forward and 4 N T backward, over the rate that a GPU reaches
attention         as `planning/predict` has it, of the most loaded rank, for each window that layers have
elementwise       bytes that eager modules read and write, over the rate of copies
recomputed        the forward pass of layers once more
FSDP2             a layer's weights are gathered, twice, and its gradients scattered, while another layer computes

model FLOPs a token = 6 N + 6 L H D S     N weights that a token is multiplied with, L layers, S keys that a causal query may see
MFU                 = tokens a second a GPU x model FLOPs a token / the GPU's peak; what is recomputed does not count
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dtensor_ring.estimation.memory import Training
from dtensor_ring.planning.cost_model import Link
from dtensor_ring.planning.devices import Chip
from dtensor_ring.planning.predict import Seconds

# Bytes that are read and written for each number, in 16 bits where none of it is in float32; counted from the modules' code.
_NORM = Seconds(36, 92)
_ROTATION = Seconds(20, 30)
_ACTIVATION = Seconds(10, 18)  # of the MLP: the function, and its product with up
_RESIDUALS = Seconds(12, 30)  # two sums; in backward also those of gradients that come from gate and up, and from q, k and v
_ROUTED = Seconds(22, 32)  # of rows that are sent to experts: taken out, masked, weighed, put back
_WHOLE_LOSS = Seconds(14, 22)  # of logits
_CHUNKED_LOSS = Seconds(28, 38)
_FUSED_ADAMW = 0.9  # of the rate of copies
_FEW_TOKENS = 650  # matrix products of so many tokens reach half of what those of many do


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step, by what takes them.

    Attributes:
        matmul: matrix products, forward and backward.
        attention: of the most loaded rank.
        elementwise: norms, rotation, activations, sums, the loss.
        recomputed: what is computed once more in backward.
        exchange: weights and gradients on their way while nothing is computed.
        optimizer: its step.
        tokens: tokens of the batch on one GPU, its share of the sequence.
        flops: model FLOPs of one GPU.
        peak: of the GPU, in FLOP/s.
        hidden: seconds of exchange behind computing.
    """

    matmul: float
    attention: float
    elementwise: float
    recomputed: float
    exchange: float
    optimizer: float
    tokens: int
    flops: float
    peak: float
    hidden: float

    @property
    def step(self) -> float:
        """Seconds of the step."""
        return self.matmul + self.attention + self.elementwise + self.recomputed + self.exchange + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second and GPU."""
        return self.tokens / self.step

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the GPU could do in that time."""
        return self.flops / self.step / self.peak


class Rates(NamedTuple):
    """What a GPU and its links reach: of the chip, bytes a second of copies, and how ranks exchange (None: in no time)."""

    chip: Chip
    copy: float
    link: Link | None


@dataclass(frozen=True, slots=True)
class _Work:
    """Seconds of one layer, forward and backward: products, attention, all else."""

    matmul: Seconds
    attention: Seconds
    elementwise: Seconds

    @property
    def forward(self) -> float:
        return self.matmul.forward + self.attention.forward + self.elementwise.forward

    @property
    def backward(self) -> float:
        return self.matmul.backward + self.attention.backward + self.elementwise.backward


def step_time(training: Training, attention: dict[int, Seconds], rates: Rates, seen: dict[int, float]) -> StepTime:
    """The time of a step.

    Args:
        training: what is trained.
        attention: what attention takes, by the window of a layer.
        rates: of the GPU and its links.
        seen: keys that a query of a layer sees on average, by its window.
    """
    model = training.model
    works = [_layer(training, rates, sparse, attention[w]) for sparse, w in zip(model.sparse, model.windows, strict=True)]
    head = _head(training, rates)
    recomputed = 0.0
    if training.checkpoint != "none":
        recomputed = sum(w.forward - (w.attention.forward if training.checkpoint == "attention" else 0.0) for w in works)
    exposed, hidden = _exchange(training, rates, works)
    flops = training.tokens / training.tp * (6 * model.active + sum(12 * model.q * seen[w] for w in model.windows))
    return StepTime(
        matmul=sum(w.matmul.both for w in works) + head.matmul.both,
        attention=sum(w.attention.both for w in works),
        elementwise=sum(w.elementwise.both for w in works) + head.elementwise.both,
        recomputed=recomputed,
        exchange=exposed,
        optimizer=_optimizer(training, rates),
        tokens=training.tokens,
        flops=flops,
        peak=rates.chip.peak,
        hidden=hidden,
    )


def _products(training: Training, rates: Rates, weights: float, together: float | None = None) -> Seconds:
    """Seconds of multiplying every token with so many weights; `together` tokens with each, if not all of them."""
    rows = training.tokens if together is None else together
    few = rows / (rows + _FEW_TOKENS)
    # Long products are bound by power: those of more tokens are not faster than `matmul`.
    rate = min(rates.chip.matmul, rates.chip.matmul * 1.1 * few) * (1 if training.precision.compute == 2 else 0.5)
    once = 2 * weights / training.tp * training.tokens / rate
    return Seconds(once, 2 * once)


def _moved(numbers: float, each: Seconds, training: Training, rates: Rates) -> Seconds:
    """Seconds of reading and writing for so many numbers of every token."""
    wide = 1 if training.precision.compute == 2 else 1.5
    factor = numbers * training.tokens * wide / rates.copy
    return Seconds(each.forward * factor, each.backward * factor)


def _sum(*each: Seconds) -> Seconds:
    return Seconds(sum(s.forward for s in each), sum(s.backward for s in each))


def _layer(training: Training, rates: Rates, sparse: bool, attention: Seconds) -> _Work:
    model, tp = training.model, training.tp
    h, heads = model.hidden, (model.q + model.kv) / tp
    norms = (4 if model.four_norms else 2) * h + (heads if model.head_norms else 0)
    inside, weights = model.intermediate / tp, model.attention_weights() + model.mlp_weights(False)
    moved = [
        _moved(norms, _NORM, training, rates),
        _moved(heads, _ROTATION, training, rates),
        _moved(h, _RESIDUALS, training, rates),
    ]
    products = _products(training, rates, weights)
    if sparse and model.experts is not None:
        e = model.experts
        inside = e.chosen * e.intermediate / tp
        of_experts = _products(training, rates, 3 * h * e.intermediate * e.chosen, training.tokens * e.chosen / e.count)
        products = _sum(_products(training, rates, model.attention_weights() + h * e.count), of_experts)
        moved.append(_moved(h * e.chosen, _ROUTED, training, rates))
    moved.append(_moved(inside, _ACTIVATION, training, rates))
    return _Work(products, attention, _sum(*moved))


def _head(training: Training, rates: Rates) -> _Work:
    model = training.model
    products = _products(training, rates, model.embedding)
    vocab, loss = model.vocab, _WHOLE_LOSS
    if training.loss == "chunked":  # logits are made once more in backward
        products = Seconds(products.forward, products.backward + products.forward)
        loss = _CHUNKED_LOSS
    norm = _moved(model.hidden, _NORM, training, rates)
    return _Work(products, Seconds(0.0, 0.0), _sum(_moved(vocab, loss, training, rates), norm))


def _optimizer(training: Training, rates: Rates) -> float:
    """Weights are read and written, gradients read, both states read and written."""
    size, weights = training.precision, training.model.parameters / training.shards / training.tp
    states = 0 if training.optimizer == "sgd" else 2
    passes = 3 if training.optimizer == "adamw_foreach" else 1  # unfused, a dozen kernels read and write them
    return weights * (3 * size.weight + 2 * states * size.state) * passes / (_FUSED_ADAMW * rates.copy)


def _exchange(training: Training, rates: Rates, works: list[_Work]) -> tuple[float, float]:
    """Seconds in which weights and gradients travel while nothing is computed, and those behind computing."""
    link, model, size = rates.link, training.model, training.precision
    if link is None:
        return 0.0, 0.0
    exposed = hidden = 0.0
    if training.tp > 1:  # the sums over heads and over the MLP's parts, forward and backward, wait for nothing else
        each = training.tokens * model.hidden * size.compute
        exposed += 4 * model.layers * 2 * _collective(link, each, training.tp)
    if training.shards == 1 and training.copies == 1:
        return exposed, hidden
    if training.parallel != "fsdp":
        total = 2 * _collective(link, model.parameters / training.tp * size.weight, training.copies)
        behind = sum(work.backward for work in works) if training.parallel == "ddp" else 0.0
        return exposed + max(0.0, total - behind), min(total, behind)
    for index, work in enumerate(works):
        weights = model.layer_weights(index) / training.tp
        gather, scatter = (_collective(link, weights * each, training.shards) for each in (size.compute, size.reduce))
        if training.copies > 1:
            scatter += 2 * _collective(link, weights / training.shards * size.reduce, training.copies)
        again = work.forward if training.checkpoint != "none" else 0.0
        for travels, computes in ((gather, work.forward), (gather + scatter, work.backward + again)):
            exposed += max(0.0, travels - computes)
            hidden += min(travels, computes)
    outer = model.outer_weights / training.tp  # gathered before all else, scattered after it
    exposed += sum(_collective(link, outer * each, training.shards) for each in (size.compute, size.reduce))
    return exposed, hidden


def _collective(link: Link, nbytes: float, ranks: int) -> float:
    """Seconds of gathering, or scattering, so many bytes over ranks."""
    if ranks == 1:
        return 0.0
    # Over hosts a ring runs through each network card of a host, so that all of them carry a part.
    rate = min(link.near, link.far * link.host) if link.host and ranks > link.host else link.near
    return link.latency + nbytes * (ranks - 1) / ranks / rate


__all__ = ["Rates", "StepTime", "step_time"]
