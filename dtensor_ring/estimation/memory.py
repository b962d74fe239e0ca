"""The memory of one training step on one GPU, phase by phase: a ledger that walks through the step as PyTorch runs it.

    between steps   parameters, optimizer states
    forward         + what layers keep for backward, or their inputs where they are recomputed; logits
    backward        + gradients, while what was kept goes; a layer at a time is recomputed
    optimizer       parameters, optimizer states, gradients

The step begins without gradients, as after `optimizer.zero_grad()`, and keeps nothing of the model's output but the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dtensor_ring.estimation.layers import Layer, LayerGradients
from dtensor_ring.estimation.ledger import PARTS, Ledger, Part
from dtensor_ring.estimation.model_shape import ModelShape

Checkpoint = Literal["none", "full", "attention"]
Loss = Literal["whole", "chunked"]
Parallel = Literal["none", "ddp", "fsdp"]
Optimizer = Literal["adamw", "adamw_foreach", "sgd"]
PhaseName = Literal["between steps", "forward", "backward", "optimizer"]

# cuBLAS has a workspace of 32 MiB for each thread that multiplies on a Hopper GPU: that of forward, and that of autograd.
LIBRARIES = 64 * 2**20
_INT64, _FLOAT32 = 8, 4


class Precision(NamedTuple):
    """Bytes of a number of weights and of their gradients, of optimizer states, of activations, and of gradients between ranks."""

    weight: int
    state: int
    compute: int
    reduce: int


PRECISIONS = {
    "bf16": Precision(2, 2, 2, 2),  # everything in bfloat16
    "mixed": Precision(4, 4, 2, 4),  # float32 weights, computed with in bfloat16: FSDP2's MixedPrecisionPolicy
    "fp32": Precision(4, 4, 4, 4),
}


@dataclass(frozen=True, slots=True)
class Training:
    """What is trained, and how, as one GPU sees it.

    Attributes:
        model: the model.
        tokens: tokens of all batch rows on this GPU.
        batch_tokens: tokens of all batch rows that this GPU is given: those of the whole sequence.
        precision: which numbers are how large.
        checkpoint: what layers keep: everything, their input, or their input and what attention returns.
        loss: whether logits exist whole.
        chunk: tokens whose logits exist at a time where they do not.
        parallel: how weights are spread: not at all, alike with gradients in buckets, or in shards.
        shards: GPUs that share the weights.
        copies: GPUs that hold the same part of the weights, for other tokens.
        tp: GPUs that share heads and MLPs.
        optimizer: which states there are.
    """

    model: ModelShape
    tokens: int
    batch_tokens: int
    precision: Precision
    checkpoint: Checkpoint = "none"
    loss: Loss = "whole"
    chunk: int = 2048
    parallel: Parallel = "none"
    shards: int = 1
    copies: int = 1
    tp: int = 1
    optimizer: Optimizer = "adamw"


@dataclass(frozen=True, slots=True)
class Phase:
    """The largest moment of a phase.

    Attributes:
        name: of the phase.
        bytes: what is held then.
        parts: the same by what it is for.
        moment: what goes on then.
    """

    name: PhaseName
    bytes: int
    parts: tuple[tuple[Part, int], ...]
    moment: str


@dataclass(frozen=True, slots=True)
class StepMemory:
    """The memory of a step.

    Attributes:
        phases: the largest moment of each.
        saved: bytes that are held between forward and backward, beside those between steps.
    """

    phases: tuple[Phase, ...]
    saved: int

    @property
    def peak(self) -> Phase:
        """The phase with the largest moment."""
        return max(self.phases, key=lambda phase: phase.bytes)

    def phase(self, name: PhaseName) -> Phase:
        """One of them."""
        return next(phase for phase in self.phases if phase.name == name)


# Of a layer's attention, by its window: bytes that forward and backward hold beside what is kept.
AttentionBytes = Callable[[int], tuple[float, float]]


def step_memory(training: Training, attention: AttentionBytes) -> StepMemory:
    """Walk through a step.

    Args:
        training: what is trained.
        attention: buffers and workspaces of a layer's attention by its window, 0 for none.
    """
    return _Step(training, attention).run()


class _Step:
    def __init__(self, training: Training, attention: AttentionBytes) -> None:
        self.training, self.model, self.size = training, training.model, training.precision
        self.ledger = Ledger()
        self._sent = 0.0  # bytes of gradients that are on their way to other shards
        by_window = {window: attention(window) for window in set(self.model.windows)}
        plain = Layer(self.model, training.tokens, self.size.compute, tp=training.tp)
        self.plain = plain
        self.layers = [
            plain.of(sparse, *by_window[window]) for sparse, window in zip(self.model.sparse, self.model.windows, strict=True)
        ]

    def run(self) -> StepMemory:
        """All phases."""
        ledger, saved = self.ledger, 0
        acts: dict[PhaseName, Callable[[], None]] = {
            "between steps": self.between,
            "forward": self.forward,
            "backward": self.backward,
            "optimizer": self.optimizer,
        }
        phases = []
        for name, act in acts.items():
            before = ledger.total
            ledger.turn(name)
            act()
            saved = ledger.total - before if name == "forward" else saved
            phases.append(Phase(name, ledger.most_total, tuple((part, ledger.most[part]) for part in PARTS), ledger.moment))
        return StepMemory(tuple(phases), saved)

    # Weights.

    def _attention_weights(self) -> float:
        """Of a layer's attention and norms on this GPU, before they are spread over shards."""
        norms = (4 if self.model.four_norms else 2) * self.model.hidden
        return norms + (self.model.attention_weights() - norms) / self.training.tp

    def _layer_weights(self, layer: int) -> float:
        return self._attention_weights() + self.model.mlp_weights(self.model.sparse[layer]) / self.training.tp

    @property
    def _head_weights(self) -> float:
        """Of a head of its own; 0 where it is the embedding."""
        return 0.0 if self.model.tied else self.model.embedding / self.training.tp

    @property
    def _outer_weights(self) -> float:
        return self.model.embedding + self.model.hidden + self._head_weights

    @property
    def weights(self) -> float:
        """Of the whole model, before they are spread over shards."""
        return self._outer_weights + sum(map(self._layer_weights, range(self.model.layers)))

    # Phases.

    def between(self) -> None:
        """What stays."""
        ledger, size, shards = self.ledger, self.size, self.training.shards
        ledger.hold("libraries", LIBRARIES)
        ledger.hold("batch", 2 * _INT64 * self.training.batch_tokens)  # ids and labels
        ledger.hold("parameters", self.weights * size.weight / shards)
        states = 0 if self.training.optimizer == "sgd" else 2
        ledger.hold("optimizer", states * self.weights * size.state / shards)
        if self.training.parallel == "ddp":
            ledger.hold("sharding buffers", self.weights * size.weight)  # buckets, as large as the gradients

    def forward(self) -> None:
        """Embedding, layers, norm, head and loss."""
        ledger, size = self.ledger, self.size
        ledger.doing("forward, embedding")
        ledger.hold("batch", 3 * _INT64 * self.training.tokens)  # this rank's ids, labels and positions
        outer = self._whole(self._outer_weights)  # stays whole until its gradients are there
        ledger.hold("sharding buffers", outer)
        ledger.hold("activations", 2 * self.training.tokens * self.model.head_dim * size.compute)  # cosines and sines
        ledger.hold("temporaries", self.plain.h)  # what goes from layer to layer
        for index, layer in enumerate(self.layers):
            ledger.doing(f"forward, layer {index}")
            weights = self._whole(self._layer_weights(index))
            before = outer if index == 0 else self._whole(self._layer_weights(index - 1))
            # What was fetched for the layer before is freed once that of this one has been copied to its weights.
            with ledger.passing("sharding buffers", 2 * weights):
                with ledger.passing("sharding buffers", before):
                    pass
                layer.forward(ledger, self._kept(layer))
        ledger.doing("forward, last norm")
        ledger.hold("activations", self.plain.norm_saved(self.plain.h) + self.plain.h)
        ledger.release("temporaries", self.plain.h)
        self._loss_forward()

    def _kept(self, layer: Layer) -> float:
        """What a layer keeps from forward to backward."""
        if self.training.checkpoint == "none":
            return layer.saved
        return layer.h + (layer.q + layer.lse if self.training.checkpoint == "attention" else 0.0)

    def _whole(self, weights: float) -> float:
        """Bytes of weights that FSDP2 has put together from all shards, 0 elsewhere."""
        return weights * self.size.compute if self.training.parallel == "fsdp" else 0.0

    def _logits(self, tokens: int) -> int:
        """Numbers of the logits of some tokens."""
        return tokens * self.model.vocab

    def _loss_forward(self) -> None:
        ledger, size = self.ledger, self.size
        ledger.doing("forward, loss")
        logits = self._logits(self._chunk)
        if self.training.loss == "chunked":
            ledger.hold("logits and loss", 2 * _FLOAT32 * self.training.tokens)  # a loss and a log-sum-exp of each token
            with ledger.passing("logits and loss", 8 * logits):  # in float32, and their exponentials
                pass
            return
        capped = logits * size.compute * self.model.logit_softcap  # the tanh is kept
        ledger.hold("logits and loss", logits * 4 + capped)  # the log-softmax is kept
        # The logits as the head made them, and in float32.
        with ledger.passing("logits and loss", logits * (size.compute + (4 if size.compute != 4 else 0))):
            pass

    @property
    def _chunk(self) -> int:
        """Tokens whose logits exist at a time."""
        return self.training.tokens if self.training.loss == "whole" else min(self.training.chunk, self.training.tokens)

    def backward(self) -> None:
        """From the loss to the embedding."""
        self._loss_backward()
        ledger = self.ledger
        ledger.doing("backward, last norm")
        ledger.release("activations", self.plain.h)
        ledger.release("temporaries", self.plain.h)
        self.plain.norm_backward(ledger, self.plain.h)
        ledger.hold("gradients", self.model.hidden * self._gradient)
        ledger.hold("temporaries", self.plain.h)
        for index in reversed(range(self.model.layers)):
            self._layer_backward(index)
        ledger.doing("backward, embedding")
        embedding = self.model.embedding * self._gradient
        ledger.hold("gradients" if not self.model.tied else "temporaries", embedding)
        if self.model.tied:  # its gradient is made apart from that of the head, to which it is added
            ledger.release("temporaries", embedding)
        ledger.release("temporaries", self.plain.h)
        ledger.release("activations", 2 * self.training.tokens * self.model.head_dim * self.size.compute)
        ledger.release("batch", 3 * _INT64 * self.training.tokens)
        ledger.release("sharding buffers", self._whole(self._outer_weights))
        self._scattered(self._outer_weights)
        ledger.release("sharding buffers", self._sent)

    @property
    def _gradient(self) -> int:
        """Bytes of a number of a gradient as backward makes it."""
        return self.size.compute if self.training.parallel == "fsdp" else self.size.weight

    def _loss_backward(self) -> None:
        """From the loss to the head's input."""
        ledger, size = self.ledger, self.size
        ledger.doing("backward, loss")
        logits = self._logits(self._chunk)
        if self.training.loss == "whole":
            with ledger.passing("logits and loss", 8 * logits):  # gradients of the log-softmax, and of the logits in float32
                pass
            ledger.release("logits and loss", (4 + size.compute * self.model.logit_softcap) * logits)
            ledger.doing("backward, head")
            with ledger.passing("logits and loss", logits * size.compute):
                self._head_gradients()
            return
        head = self.model.embedding / self.training.tp
        with ledger.passing("logits and loss", head * _FLOAT32):  # the gradient of the head's weight is added up
            ledger.hold("temporaries", self.plain.h)
            softcap = 8 * self.model.logit_softcap
            with ledger.passing("logits and loss", (4 + (size.compute if size.compute != 4 else 0) + softcap) * logits):
                pass
            with ledger.passing("logits and loss", size.compute * logits + (head * size.compute if size.compute != 4 else 0)):
                pass
            ledger.release("temporaries", self.plain.h)
            self._head_gradients()
        ledger.release("logits and loss", 2 * _FLOAT32 * self.training.tokens)

    def _head_gradients(self) -> None:
        """The gradients of the head's input and weight, which is the embedding's where these are tied."""
        self.ledger.hold("temporaries", self.plain.h)
        head = self.model.embedding if self.model.tied else self._head_weights
        self.ledger.hold("gradients", head * self._gradient)

    def _layer_backward(self, index: int) -> None:
        ledger, layer = self.ledger, self.layers[index]
        ledger.doing(f"backward, layer {index}")
        weights = self._layer_weights(index)
        fetched = self._whole(self._layer_weights(index - 1)) if index else 0.0  # for the layer that comes next
        ledger.hold("sharding buffers", self._whole(weights) + fetched)
        kept = self._kept(layer)
        if self.training.checkpoint != "none":
            ledger.doing(f"backward, layer {index} recomputed")
            # The input stays until the layer is done: in float32 it is what the first norm keeps. What attention returned is not
            # made again.
            again = kept - (0 if self.size.compute == _FLOAT32 else layer.h)
            ledger.hold("activations", layer.saved - again)
        gradients = LayerGradients(
            self._attention_weights() * self._gradient,
            self.model.mlp_weights(self.model.sparse[index]) / self.training.tp * self._gradient,
        )
        layer.backward(ledger, gradients)
        if self.training.checkpoint != "none" and self.size.compute != _FLOAT32:
            ledger.release("activations", layer.h)
        ledger.release("sharding buffers", self._whole(weights))
        ledger.doing(f"backward, gradients of layer {index} sent")
        self._scattered(weights)
        ledger.release("sharding buffers", fetched)

    def _scattered(self, weights: float) -> None:
        """In FSDP2 gradients are copied for the other ranks, while the copies before are on their way, and a shard comes back."""
        if self.training.parallel != "fsdp":
            return
        ledger, size = self.ledger, self.size
        copied = weights * size.reduce
        ledger.hold("sharding buffers", copied)
        ledger.release("gradients", weights * self._gradient)
        ledger.release("sharding buffers", self._sent)
        self._sent = copied
        ledger.hold("gradients", weights * size.weight / self.training.shards)

    def optimizer(self) -> None:
        """The optimizer's step."""
        ledger = self.ledger
        # Unfused AdamW makes the denominators of all weights at once.
        spare = self.weights * self.size.state / self.training.shards if self.training.optimizer == "adamw_foreach" else 0.0
        with ledger.passing("temporaries", spare):
            pass


__all__ = ["LIBRARIES", "PRECISIONS", "AttentionBytes", "Phase", "Precision", "StepMemory", "Training", "step_memory"]
