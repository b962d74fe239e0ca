"""The attention function and mask function that a parallelized model calls, and what each attention module knows.

Activations of the model are plain local tensors, and so are q, k and v: mesh and placement are those of the plan, and the length of
the whole comes with the batch.

    module    hands over q (B, H, S/W, D), k and v (B, Hk, S/W, D): this rank's tokens
    returns   out (B, S/W, H, D)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AttentionInterface, AttentionMaskInterface

from dtensor_ring._torch import is_capturing
from dtensor_ring.integrations.transformers.layer_call import NO_LOSS, LossCall, read_layer_call
from dtensor_ring.integrations.transformers.token_loss import Targets
from dtensor_ring.ops.agree import refused_in_group
from dtensor_ring.ops.arguments import Arguments
from dtensor_ring.ops.attend import attend
from dtensor_ring.ops.place import place_in_group
from dtensor_ring.ops.prepare import Inputs, prepare
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Layout

NAME = "dtensor_ring"
NO_MASK = (0, 0, 0, 0)  # a mask of four dims is passed on as it is, so that transformers builds none of its own
STATE = "_dtensor_ring"  # the attribute of an attention module: an attention function is given the module, and no object of ours
KEYWORD = "ring_batch"


@dataclass(frozen=True, slots=True)
class RingBatch:
    """What the layers need to know of a batch; the model passes it on to every attention call as the keyword `ring_batch`.

    Attributes:
        length: global tokens of a row.
        documents: bounds of packed documents, or None.
        loss: what the call asks of the loss.
        targets: this rank's labels, where the plan and not the model computes the loss.
    """

    # A keyword and not a field of the plan: activation checkpointing and pipelines run a layer again after another batch has come,
    # and must find the batch that the layer was called with.
    length: int
    documents: Documents | None
    loss: LossCall = NO_LOSS
    targets: Targets | None = None

    @property
    def has_part_of_loss(self) -> bool:
        """Whether the loss of this call is this rank's sum over the caller's number of items: there is one, and it is not whole."""
        if self.targets is not None:
            return self.targets.items is not None
        return self.loss.has_labels and self.loss.count is None


@dataclass(slots=True)
class Graphs:
    """What the CUDA graphs of one attention module were captured with.

    Attributes:
        batches: length and documents of each batch that the module was captured with.
        ran: the batch that the module last ran with on the host; in a later batch it ran not, or was replayed.
    """

    batches: set[tuple[int, Documents | None]] = field(default_factory=set)
    ran: RingBatch | None = None

    def refuses(self, batch: RingBatch) -> str | None:
        """Why what the module gave for a batch was wrong, where a graph gave it; None where it may be right."""
        if not self.batches or self.ran is batch or (batch.length, batch.documents) in self.batches:
            return None
        known = "; ".join(_batch_text(*captured) for captured in self.batches)
        return (
            f"was replayed from a CUDA graph on a batch of {_batch_text(batch.length, batch.documents)}, and was captured with "
            f"{known}: a graph holds the length and documents of its batch, so capture one for each, or run this batch without"
        )


def _batch_text(length: int, documents: Documents | None) -> str:
    return f"{length} tokens in {'one document' if documents is None else documents}"


@dataclass(frozen=True, slots=True)
class AttentionState:
    """How one attention module runs: set on it by `parallelize_module`."""

    mesh: DeviceMesh
    layout: Layout
    asked: Arguments
    graphs: Graphs = field(default_factory=Graphs)


def register() -> None:
    """Add our attention under its name to the registries of transformers; models that do not ask for it are unaffected."""
    AttentionInterface.register(NAME, ring_attention_forward)
    AttentionMaskInterface.register(NAME, _no_mask)


def ring_attention_forward(
    module: nn.Module,
    *tensors: Any,  # noqa: ANN401
    ring_batch: RingBatch | None = None,
    **keywords: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """Attention over the ranks in the form that transformers calls; `read_layer_call` has the arguments.

    The sinks of a layer are a parameter, whose gradient is this rank's part, as that of other parameters.

    Raises:
        RuntimeError: the module was not parallelized, or the model was entered below the module that was.
        NotImplementedError: a mask, or an argument that `ring_attention` does not support.
    """
    state: AttentionState | None = getattr(module, STATE, None)
    # transformers reads the name of the attention off the config, and another model may have that config too.
    if state is None:
        raise RuntimeError(
            f"{type(module).__name__} uses attn_implementation={NAME!r} but was not parallelized (or shares its config with a "
            "model that was): call parallelize_module(model, mesh['cp'], ring_plan(model))"
        )
    if ring_batch is None:
        raise RuntimeError(
            f"{type(module).__name__} was called without {KEYWORD!r}: call the parallelized model itself with the whole batch, not "
            "a module inside it, and call backward() of what paused() gave before the pause ends"
        )
    if not torch.compiler.is_compiling():
        if is_capturing():
            state.graphs.batches.add((ring_batch.length, ring_batch.documents))
        else:
            state.graphs.ran = ring_batch
    layer = read_layer_call(module, *tensors, **keywords)
    # The empty mask is the one that `_enter` passed. Any other was made inside the model, of this rank's tokens alone.
    if layer.mask is not None and layer.mask.numel():
        raise NotImplementedError("attention masks are not supported: pack rows without padding and pass documents")
    asked = state.asked._replace(
        is_causal=layer.is_causal, window=layer.window, scale=layer.scale, softcap=layer.softcap, dropout_p=layer.dropout_p
    )
    q, k, v = layer.q, layer.k, layer.v
    # The length comes with the batch: shares of ranks differ by a token where the ranks do not divide it.
    group, lengths = state.mesh.get_group(), (ring_batch.length, ring_batch.length)
    with refused_in_group(group):
        place = place_in_group((q, k, v), group, state.layout, lengths)
        prepared = prepare(Inputs(q, k, v, layer.sinks, documents=ring_batch.documents), asked, place, "attention")
    return attend(q, k, v, prepared, return_lse=False)[0], None


def _no_mask(*_shapes: object, **_mask: object) -> None:
    """Builds no mask: causality, windows and documents reach attention as arguments, and padding as documents of its own.

    It is registered since transformers drops a mask in silence where an attention has no mask function.
    """
