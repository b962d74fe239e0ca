"""`estimate`: the memory and the time of a training step, before any GPU is asked.

    >>> print(estimate("llama-3.1-8b", {"dp": 2, "cp": 8}, 262144, checkpoint="full", loss="chunked", device="h100"))
    llama-3.1-8b, 8.03e9 weights, on 16 GPUs: dp=2 x cp=8 ...

No torch is loaded: the command line starts with this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dtensor_ring.estimation.attention_bytes import attention_bytes
from dtensor_ring.estimation.memory import PRECISIONS, Checkpoint, Loss, Optimizer, Parallel, StepMemory, Training, step_memory
from dtensor_ring.estimation.model_shape import ModelShape, is_known, read_model
from dtensor_ring.estimation.result import Estimate
from dtensor_ring.estimation.step_time import Rates, StepTime, step_time
from dtensor_ring.planning.cost_model import CostModel, Link
from dtensor_ring.planning.costs import AttentionShape, costs
from dtensor_ring.planning.devices import CHIPS, KNOWN
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.head_sharing import refuses
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band, mask_text
from dtensor_ring.planning.predict import Predictor, Seconds
from dtensor_ring.planning.problem import AttentionProblem, StrategyName
from dtensor_ring.planning.totals import totals
from dtensor_ring.tools.explain import shape_of_heads
from dtensor_ring.tools.predicted import predictor_for, staged_by

if TYPE_CHECKING:
    from torch import Tensor

AXES = ("dp_replicate", "dp", "cp", "tp")
_TILE = 128  # tokens of cuDNN's blocks
_LOGITS = 1 << 28  # of a chunk of a chunked loss by default: 1 GiB in float32


def estimate(
    model: str | Path | Mapping[str, Any],
    mesh: Mapping[str, int] | None = None,
    length: int = 8192,
    documents: Documents | Tensor | Sequence[int] | None = None,
    *,
    batch: int = 1,
    parallel: Parallel = "fsdp",
    precision: str | None = None,
    checkpoint: Checkpoint = "none",
    loss: Loss = "whole",
    loss_chunk: int | None = None,
    optimizer: Optimizer = "adamw",
    layout: str = "zigzag",
    strategy: StrategyName = "ring",
    stages: int | None = None,
    device: str | None = None,
    cost_model: CostModel | None = None,
    kernel: str | None = None,
    gpus_per_host: int = 8,
) -> Estimate:
    """The memory of a training step by phase and part, and its time on a device: of the GPU that has the most to do.

        print(estimate("llama-3.1-8b", {"dp": 2, "cp": 8}, 262144, checkpoint="full", loss="chunked", device="h100"))
        estimate("path/to/config.json", {"cp": 4}, 65536).peak                       # bytes

    What is meant is a step of an eager transformers model under `ring_plan` that begins without gradients (`zero_grad()`), and of
    whose output only the loss is kept. Peaks are those of PyTorch's allocator (`torch.cuda.max_memory_allocated`); the CUDA
    context, NCCL's buffers and what the allocator keeps beside take more.

    Args:
        model: a `config.json` of transformers, its folder, its fields, or a name such as "llama-3.1-8b" (`shapes.json`).
        mesh: ranks by axis: "cp" shares sequences, "dp" batches and, with FSDP2, weights, "dp_replicate" batches alone (HSDP),
            "tp" heads and MLPs (transformers' plan). None is one GPU.
        length: tokens of a row, over all ranks of cp.
        documents: bounds of packed documents of a row, as for `ring_attention`.
        batch: rows that each rank of dp has in a step.
        parallel: "fsdp" (FSDP2, each layer a group, weights in shards over dp x cp), "ddp", or "none": whole weights, gradients
            averaged after backward (`average_gradients`).
        precision: "mixed": weights, gradients and states in float32, computed with in bfloat16 by FSDP2's policy, which is the
            default there; "bf16", the default elsewhere, or "fp32" for everything.
        checkpoint: "none", "full" (every layer recomputed, `gradient_checkpointing_enable`), or "attention" (that but for what
            attention returned, `save_attention`).
        loss: "whole" logits, or "chunked" (`ring_plan(loss="chunked")`).
        loss_chunk: tokens of a chunk; None for as many as take 1 GiB of logits in float32.
        optimizer: "adamw" (fused), "adamw_foreach", or "sgd" without momentum.
        layout: "contiguous", "zigzag", "stripe:BLOCK", "zigzag/documents".
        strategy: as for `ring_attention`.
        stages: as for `ring_attention`.
        device: "h100", "h200" or "a100": then times are estimated too.
        cost_model: figures of one's own for attention and copies, beside the device's.
        kernel: of these figures; None for what the library takes by default there.
        gpus_per_host: for the links; hosts hold tp, then cp, then dp.

    Raises:
        ValueError: a model, mesh, length, name or number that does not fit, or a combination that PyTorch does not have.
    """
    precision = precision or ("mixed" if parallel == "fsdp" else "bf16")
    shape = read_model(model)
    axes = _axes(mesh, shape)
    _check_names(parallel, precision, checkpoint, loss, optimizer, strategy)
    _check_numbers(length, batch, gpus_per_host, loss_chunk, loss)
    if cost_model is not None and device is None:
        raise ValueError("a cost_model has no rates of matrix products: name a device too, such as device='h100'")
    if parallel != "fsdp" and precision == "mixed":
        raise ValueError(f"precision='mixed' is FSDP2's policy: use parallel='fsdp', or precision='bf16' with {parallel!r}")
    cp, tp = axes["cp"], axes["tp"]
    reason = refuses(cp, shape.heads // tp, shape.kv_heads // tp) if strategy == "ulysses" else None
    if reason is not None:
        raise ValueError(reason)
    packed = None if documents is None else Documents.of(documents, length)
    laid_out = Layout.parse(layout)
    if laid_out.cut and (packed is None or packed.rows != 1):
        raise ValueError(f"{layout} is cut document by document: pass documents=, one row for the whole batch, found {packed}")
    local = max(laid_out.local_length(length, cp, rank) for rank in {0, cp - 1})
    is_sharded = parallel == "fsdp"
    training = Training(
        shape,
        tokens=local * batch,
        batch_tokens=length * batch,
        precision=PRECISIONS[precision],
        checkpoint=checkpoint,
        loss=loss,
        chunk=loss_chunk or max(_TILE, _LOGITS // shape.vocab // _TILE * _TILE),
        parallel=parallel,
        shards=axes["dp"] * cp if is_sharded else 1,
        copies=axes["dp_replicate"] * (1 if is_sharded else axes["dp"] * cp),
        tp=tp,
        optimizer=optimizer,
    )
    sizes = shape_of_heads(shape.heads // tp, shape.kv_heads // tp, shape.head_dim, None, batch, training.precision.compute)
    attention = _Attention(laid_out, length, cp, strategy, packed, stages, sizes, shape)
    per_host = max(1, gpus_per_host // tp)
    attention = attention.on(device, cost_model, kernel, per_host)
    problems = {window: attention.problem(window) for window in sorted(set(shape.windows))}
    memory, peaks = _memories(training, problems, attention)
    time = None if device is None else _time(training, problems, attention, device, per_host)
    kernels = tuple(sorted({attention.kernel_of(window) for window in problems})) if device else ()
    notes = tuple(_notes(shape, axes, attention))
    mesh_sizes = tuple((axis, axes[axis]) for axis in AXES if axes[axis] > 1)
    return Estimate(training, mesh_sizes, problems[min(problems)], memory, peaks, time, device or "", kernels, notes)


@dataclass(frozen=True, slots=True)
class _Attention:
    """The attention of layers: the same but for their windows.

    Attributes:
        layout: of the sequence.
        length: of a row.
        world: ranks of cp.
        strategy: who gets what.
        documents: packed ones.
        stages: asked for.
        sizes: of the tensors on one rank.
        model: the model.
        predictors: what predicts times, by kernel; empty without a device.
        kernel: the one that was asked for.
    """

    layout: Layout
    length: int
    world: int
    strategy: StrategyName
    documents: Documents | None
    stages: int | None
    sizes: AttentionShape
    model: ModelShape
    predictors: tuple[tuple[str, Predictor], ...] = ()
    kernel: str | None = None

    def on(self, device: str | None, cost_model: CostModel | None, kernel: str | None, per_host: int) -> _Attention:
        """The same on a device."""
        if device is None:
            if kernel is not None:
                raise ValueError(f"kernel={kernel!r} is for times: name a device")
            return self
        per_host = per_host if self.world > per_host else 0
        names = [name for name, _ in (cost_model or KNOWN.get(device, next(iter(KNOWN.values())))).kernels]
        made = {name: predictor_for(self.sizes, device, cost_model, name, per_host) for name in [kernel] * bool(kernel) + names}
        known = tuple((name, predictor) for name, predictor in made.items() if name is not None and predictor is not None)
        return replace(self, predictors=known, kernel=kernel)

    def kernel_of(self, window: int) -> str:
        """The kernel that the library takes by default, of those that need no package."""
        names = [name for name, _ in self.predictors]
        if self.kernel is not None:
            return self.kernel
        chunk = self.length // (self.world * max(1, self.layout.chunks))
        whole = not self.layout.cut and self.documents is None and self.length % (self.world * max(1, self.layout.chunks)) == 0
        is_plain = not (window or self.model.softcap) and (self.sizes.head_dim <= 128 or self.sizes.head_dim == 256)
        if "cudnn" in names and is_plain and whole and chunk % _TILE == 0 and _is_round(chunk) and _is_round(self.sizes.batch):
            return "cudnn"
        return "torch_flash" if "torch_flash" in names else names[0]

    def predictor(self, window: int) -> Predictor | None:
        """What predicts times of layers with this window."""
        return dict(self.predictors).get(self.kernel_of(window)) if self.predictors else None

    def problem(self, window: int) -> AttentionProblem:
        """The attention of layers with this window, 0 for none."""
        seen = (window - 1, 0) if window and window < self.length else (-1, -1)
        band = Band.parse(mask_text(seen == (-1, -1), seen))
        problem = AttentionProblem(self.layout, band, self.length, self.length, self.world, self.strategy, self.documents)
        return staged_by(problem, self.predictor(window), self.stages)


def _is_round(number: int) -> bool:
    """Whether a number has few binary digits, as `cudnn` is the default for."""
    return number % (1 << max(0, number.bit_length() - 4)) == 0


def _memories(
    training: Training, problems: dict[int, AttentionProblem], attention: _Attention
) -> tuple[StepMemory, tuple[tuple[Checkpoint, int], ...]]:
    """The memory of the step, and the peaks of each way of checkpointing."""
    # float32 has no flash kernel.
    flash = training.precision.compute == 2
    held = {window: attention_bytes(problem, attention.sizes, flash) for window, problem in problems.items()}

    def of_window(window: int) -> tuple[float, float]:
        return held[window].forward, held[window].backward

    ways: tuple[Checkpoint, ...] = get_args(Checkpoint)
    all_of = {way: step_memory(replace(training, checkpoint=way), of_window) for way in ways}
    return all_of[training.checkpoint], tuple((way, memory.peak.bytes) for way, memory in all_of.items())


def _time(training: Training, problems: dict[int, AttentionProblem], attention: _Attention, device: str, per_host: int) -> StepTime:
    """The time of the step."""
    seconds: dict[int, Seconds] = {}
    seen: dict[int, float] = {}
    link: Link | None = None
    copy = 1.0
    for window, problem in problems.items():
        predictor = attention.predictor(window)
        assert predictor is not None, "a device has predictors"
        seconds[window] = predictor.rank(problem, costs(problem, attention.sizes).most_loaded)
        # Documents that differ from row to row are counted for all rows, those of all alike for one.
        rows = problem.segmentation.rows
        seen[window] = sum(totals(problem.planned).scores) / problem.q_length / rows
        copy = predictor.model.copy
        # Weights travel among other ranks than keys do, of which a host holds others.
        link = None if predictor.link is None else replace(predictor.link, host=per_host)
    return step_time(training, seconds, Rates(CHIPS[device], copy, link), seen)


def _axes(mesh: Mapping[str, int] | None, model: ModelShape) -> dict[str, int]:
    axes = dict.fromkeys(AXES, 1)
    for axis, ranks in (mesh or {}).items():
        if axis not in axes:
            raise ValueError(f"mesh axis {axis!r} is none of {', '.join(AXES)}")
        if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
            raise ValueError(f"mesh axis {axis} has a whole number of ranks above 0, found {ranks!r}")
        axes[axis] = ranks
    tp = axes["tp"]
    if model.heads % tp or model.kv_heads % tp or model.intermediate % tp:
        raise ValueError(
            f"tp={tp} must divide the {model.heads} query heads, {model.kv_heads} key heads and {model.intermediate} numbers of "
            "the MLP"
        )
    if tp > 1 and model.experts is not None:
        raise ValueError(f"tp={tp} of {model.name}: how experts are spread is not described here; leave tp out")
    return axes


def _check_names(parallel: str, precision: str, checkpoint: str, loss: str, optimizer: str, strategy: str) -> None:
    for name, value, known in (
        ("parallel", parallel, get_args(Parallel)),
        ("precision", precision, tuple(PRECISIONS)),
        ("checkpoint", checkpoint, get_args(Checkpoint)),
        ("loss", loss, get_args(Loss)),
        ("optimizer", optimizer, get_args(Optimizer)),
        ("strategy", strategy, get_args(StrategyName)),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}: use one of {', '.join(map(repr, known))}")


def _check_numbers(length: int, batch: int, gpus_per_host: int, loss_chunk: int | None, loss: str) -> None:
    sizes = {
        "length": length,
        "batch": batch,
        "gpus_per_host": gpus_per_host,
        "loss_chunk": 1 if loss_chunk is None else loss_chunk,
    }
    wrong = [f"{name}={size!r}" for name, size in sizes.items() if not isinstance(size, int) or size < 1]
    if wrong:
        raise ValueError(f"sizes are whole numbers from 1 up, found {', '.join(wrong)}")
    if loss_chunk is not None and loss != "chunked":
        raise ValueError(f"loss_chunk={loss_chunk} is of loss='chunked', found loss={loss!r}")


def _notes(model: ModelShape, axes: Mapping[str, int], attention: _Attention) -> list[str]:
    """What was assumed, in a sentence each."""
    notes = []
    if not is_known(model.model_type):
        notes.append(f"model type {model.model_type!r} is not known: its layers are taken for Llama's")
    if model.softcap:
        notes.append("attention caps scores: a kernel with softcap, flash_attn_2, is taken for installed")
    if model.experts is not None:
        notes.append("experts run as grouped products, and tokens spread evenly over them")
    if axes["tp"] > 1:
        notes.append("tp: heads, MLPs and the head's weight are spread; embedding, norms and logits are whole on each rank")
    if attention.strategy == "ulysses":
        notes.append("ulysses: copies of exchanged heads are counted at their most")
    return notes


__all__ = ["AXES", "estimate"]
