"""What a decoder layer keeps for backward, and what its backward pass makes and frees, op by op, as transformers' modules run.

    bytes a token of a Llama's layer in bfloat16 (h hidden, q and kv numbers of queries and keys, i of the MLP, H heads)

    each norm        4h + 2h + 4    its input in float32, the normalised input, the root; and 2h, its output, which is multiplied
    attention        2q + 2 * 2kv + 2q + 4H       q and k after rotation, v, out, lse
    MLP              4 * 2i         gate, its SiLU, up, their product

Eager modules are meant: compiled ones keep less. Sizes are those of one rank's tokens; with tensor parallelism those of its part of
heads and of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dtensor_ring.estimation.ledger import Ledger
from dtensor_ring.estimation.model_shape import Experts, ModelShape

_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Layer:
    """The sizes of a layer on one rank.

    Attributes:
        model: the model's shape.
        tokens: tokens of all batch rows on this rank.
        itemsize: bytes of a number of the activations.
        sparse: whether it has experts.
        tp: ranks that share heads and MLP.
        attention_backward: bytes that attention's backward pass holds at most beside q, k, v, out, lse and their gradients.
        attention_forward: the same of the forward pass.
    """

    model: ModelShape
    tokens: int
    itemsize: int
    sparse: bool = False
    tp: int = 1
    attention_forward: float = 0.0
    attention_backward: float = 0.0

    @property
    def h(self) -> int:
        """Bytes of a tensor as wide as the model."""
        return self.tokens * self.model.hidden * self.itemsize

    @property
    def q(self) -> float:
        """Bytes of the queries."""
        return self.tokens * self.model.q * self.itemsize / self.tp

    @property
    def kv(self) -> float:
        """Bytes of the keys, or of the values."""
        return self.tokens * self.model.kv * self.itemsize / self.tp

    @property
    def lse(self) -> float:
        """Bytes of the log-sum-exp."""
        return self.tokens * self.model.heads * _FLOAT32 / self.tp

    @property
    def wide(self) -> float:
        """How much larger a tensor is in float32."""
        return _FLOAT32 / self.itemsize

    # What is kept for backward.

    def norm_saved(self, size: float, rows: float | None = None) -> float:
        """Of a norm over a tensor of `size` bytes, without its output; `rows` are its vectors."""
        normalised = size * self.wide if self.model.wide_norms else size
        return size * self.wide + normalised + _FLOAT32 * (self.tokens if rows is None else rows)

    @property
    def head_norms_saved(self) -> float:
        """Of the norms of queries and keys."""
        if not self.model.head_norms:
            return 0.0
        heads = (self.model.heads + self.model.kv_heads) / self.tp
        return self.norm_saved(self.q + self.kv, heads * self.tokens)

    @property
    def attention_saved(self) -> float:
        """Of attention: q, k, v, out and lse."""
        # Where q, k and v are one matrix, v is a part of its output, which is kept whole.
        fused = self.q + self.kv if self.model.fused else 0.0
        return 2 * self.q + 2 * self.kv + fused + self.lse

    @property
    def mlp_saved(self) -> float:
        """Of the MLP or the experts, without their input."""
        if self.sparse and self.model.experts is not None:
            return self._experts_saved(self.model.experts)
        # gate, its activation, up, product
        return 4 * self.tokens * self.model.intermediate * self.itemsize / self.tp

    def _experts_saved(self, experts: Experts) -> float:
        rows, inside = self.tokens * experts.chosen, experts.intermediate / self.tp
        # The rows sent, gate and up together, what is made of them (activation and product; gpt-oss: both clamped, sigmoid, their
        # product, and the product), and the rows that come back before they are weighed.
        numbers = 2 * self.model.hidden + (2 + (5 if experts.clamped else 2)) * inside
        return rows * (numbers * self.itemsize + _ROUTED) + self.tokens * self._router_bytes(experts)

    def _router_bytes(self, experts: Experts) -> float:
        """A token's probabilities of all experts in float32, and those chosen; gpt-oss takes only the chosen ones' softmax."""
        return experts.chosen * (8 + 2 * self.itemsize) + (0 if experts.clamped else _FLOAT32 * experts.count)

    @property
    def saved(self) -> float:
        """Of the whole layer."""
        norms = (4 if self.model.four_norms else 2) * self.norm_saved(self.h) + 2 * self.h
        return norms + self.head_norms_saved + self.attention_saved + self.mlp_saved

    # The passes.

    def forward(self, ledger: Ledger, kept: float) -> None:
        """The layer's forward pass, of which `kept` bytes stay; its output, as large as its input, takes the input's place."""
        inside = self.tokens * self.model.intermediate * self.itemsize / self.tp
        with ledger.passing("attention buffers", self.attention_forward):
            pass
        if kept < self.saved:  # recomputed later: what one half of the layer needs exists while it runs
            mlp = self.mlp_saved if self.sparse else (4 if self.model.fused else 3) * inside
            # Of queries: as projected, and what rotation makes of them; or their norm in float32.
            attention = (1 + 2 * self.wide) * self.q if self.model.head_norms else 4 * self.q + 2 * self.kv
            with ledger.passing("temporaries", 2 * self.h + max(mlp, attention)):
                pass
        else:
            with ledger.passing("temporaries", self.h):
                pass
        ledger.hold("activations", kept)

    def backward(self, ledger: Ledger, weights: LayerGradients) -> None:
        """The layer's backward pass: given what `saved` says and the gradient of its output, which is held as a temporary."""
        self._mlp_backward(ledger, weights)
        self._attention_backward(ledger, weights)

    def _mlp_backward(self, ledger: Ledger, weights: LayerGradients) -> None:
        if self.model.four_norms:
            self.norm_backward(ledger, self.h)
        if self.sparse and self.model.experts is not None:
            self._experts_backward(ledger, self.model.experts, weights)
        else:
            self._dense_backward(ledger, weights)
        ledger.release("activations", self.h)  # the input of the MLP
        self.norm_backward(ledger, self.h)

    def _dense_backward(self, ledger: Ledger, weights: LayerGradients) -> None:
        inside = self.tokens * self.model.intermediate * self.itemsize / self.tp
        ledger.hold("temporaries", inside)  # of the product
        ledger.hold("gradients", weights.mlp / 3)
        ledger.release("activations", inside)
        with ledger.passing("temporaries", 2 * inside):  # of the activation and of up, while that of the product is still there
            pass
        ledger.release("activations", 2 * inside)
        with ledger.passing("temporaries", inside + self.h):
            ledger.hold("gradients", weights.mlp * 2 / 3)
        ledger.release("activations", inside)
        ledger.release("temporaries", inside)

    def _experts_backward(self, ledger: Ledger, experts: Experts, weights: LayerGradients) -> None:
        rows, inside = self.tokens * experts.chosen, experts.intermediate / self.tp
        wide, narrow = rows * self.model.hidden * self.itemsize, rows * inside * self.itemsize
        # Gradients of the rows that came back: put in order, weighed, masked; in float32 where weights of experts are.
        with ledger.passing("temporaries", 3 * wide * (self.wide if experts.wide_weights else 1)):
            pass
        ledger.release("activations", wide)
        with ledger.passing("temporaries", wide + narrow):
            ledger.hold("gradients", weights.mlp / 3)
        ledger.release("activations", narrow)  # the product
        with ledger.passing("temporaries", (4 if experts.clamped else 3) * narrow):
            pass
        ledger.release("activations", (6 if experts.clamped else 3) * narrow)  # all that it was made of
        with ledger.passing("temporaries", 4 * narrow):
            pass
        with ledger.passing("temporaries", 2 * narrow + 2 * wide):
            ledger.hold("gradients", weights.mlp * 2 / 3)
        ledger.release("activations", self.mlp_saved - wide - (7 if experts.clamped else 4) * narrow)

    def _attention_backward(self, ledger: Ledger, weights: LayerGradients) -> None:
        if self.model.four_norms:
            self.norm_backward(ledger, self.h)
        q, kv = self.q, self.kv
        each = weights.attention / (2 * q + 2 * kv)  # projections are as large as what they make, or take
        ledger.hold("gradients", each * q)
        ledger.hold("temporaries", q)  # of out
        with ledger.passing("attention buffers", self.attention_backward):
            ledger.hold("temporaries", q + 2 * kv)
        ledger.release("temporaries", q)
        ledger.release("activations", self.attention_saved)
        with ledger.passing("temporaries", 3.5 * q):  # rotation
            pass
        # The projections follow each other, v first; the gradients of their common input are added up.
        for number, (size, heads) in enumerate(((kv, 0), (kv, self.model.kv_heads), (q, self.model.heads))):
            if heads and self.model.head_norms:
                ledger.release("temporaries", size)
                self.norm_backward(ledger, size, self.tokens * heads / self.tp)
                ledger.hold("temporaries", size)
            ledger.hold("temporaries", self.h)
            ledger.hold("gradients", each * size)
            ledger.release("temporaries", size + (self.h if number else 0))
        ledger.release("temporaries", self.h)
        ledger.release("activations", self.h)  # the input of q, k and v
        self.norm_backward(ledger, self.h)

    def norm_backward(self, ledger: Ledger, size: float, rows: float | None = None) -> None:
        """The backward pass of a norm over a tensor of `size` bytes: frees what it kept, and makes five tensors in float32."""
        normalised = size * self.wide if self.model.wide_norms else size
        ledger.release("activations", normalised)
        with ledger.passing("temporaries", 5 * size * self.wide):
            pass
        ledger.release("activations", self.norm_saved(size, rows) - normalised)

    def of(self, sparse: bool, forward: float, backward: float) -> Layer:
        """Another layer of the same tokens."""
        return replace(self, sparse=sparse, attention_forward=forward, attention_backward=backward)


# Bytes of a row that is sent to an expert: where it comes from and goes to (int64 each), its weight, and whether it counts.
_ROUTED = 8 + 8 + 8


@dataclass(frozen=True, slots=True)
class LayerGradients:
    """Bytes of the gradients of a layer's weights, as they are made."""

    attention: float
    mlp: float


__all__ = ["Layer", "LayerGradients"]
