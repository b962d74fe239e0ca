"""The training steps that `benchmarks.estimate` measures, and what `dtensor_ring.estimate` says of them.

They are published shapes with fewer layers, so that one GPU holds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dtensor_ring import Estimate, estimate
from dtensor_ring.planning.devices import device_named

GIB = 2**30
_LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@dataclass(frozen=True)
class Case:
    """A model and a step of it.

    Attributes:
        name: for tables.
        config: fields of its `config.json`.
        tokens: of a row.
        rows: in the batch.
        checkpoint: "full" recomputes every layer in backward, "none" saves everything.
        loss: "whole" logits, or "chunked".
        precision: "bf16" for all, or "mixed": weights, gradients and AdamW in float32, computed in bfloat16 under FSDP2.
        held_out: whether it had no part in finding formulas and constants.
    """

    name: str
    config: dict[str, Any]
    tokens: int
    rows: int = 1
    checkpoint: str = "none"
    loss: str = "whole"
    precision: str = "bf16"
    held_out: bool = False


def _of(fields: dict[str, Any], **more: object) -> dict[str, Any]:
    return {**fields, **more}


_QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
_LLAMA_1B = _of(_LLAMA_8B, hidden_size=2048, intermediate_size=8192, head_dim=64, num_hidden_layers=8, tie_word_embeddings=True)
_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 3,
    "vocab_size": 151936,
}
_GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "num_hidden_layers": 8,
    "sliding_window": 512,
    "vocab_size": 65536,
}
_QWEN2_3B = {
    "model_type": "qwen2",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "num_hidden_layers": 12,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
_MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 5,
    "sliding_window": 4096,
    "vocab_size": 32768,
}
_LLAMA_13B = {
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "num_hidden_layers": 4,
    "vocab_size": 32000,
}
_MIXTRAL = _of(_MISTRAL, model_type="mixtral", num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=2, sliding_window=None)
_TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 256,
}
CASES = (
    Case("llama-8b, 4 layers", _of(_LLAMA_8B, num_hidden_layers=4), 8192),
    Case("llama-8b, 4 layers", _of(_LLAMA_8B, num_hidden_layers=4), 8192, checkpoint="full"),
    Case("llama-8b, 2 layers", _of(_LLAMA_8B, num_hidden_layers=2), 32768, checkpoint="full", loss="chunked"),
    Case("llama-1b, 8 layers", _LLAMA_1B, 8192, rows=2),
    Case("qwen3-8b, 3 layers", _of(_QWEN3, num_hidden_layers=3), 16384, checkpoint="full"),
    Case("qwen3-moe, 3 layers", _MOE, 8192),
    Case("gemma3-1b, 8 layers", _GEMMA3, 16384),
    Case("llama-8b, 4 layers", _of(_LLAMA_8B, num_hidden_layers=4), 8192, checkpoint="full", precision="mixed"),
    Case("llama-8b, 4 layers", _of(_LLAMA_8B, num_hidden_layers=4), 16384, loss="chunked"),
    Case("llama-8b, 4 layers", _of(_LLAMA_8B, num_hidden_layers=4), 32768, checkpoint="full", loss="chunked", precision="mixed"),
    Case("qwen2.5-3b, 12 layers", _QWEN2_3B, 16384, checkpoint="full", held_out=True),
    Case("mistral-7b, 5 layers", _MISTRAL, 12288, held_out=True),
    Case("llama-13b, 4 layers", _LLAMA_13B, 8192, rows=2, held_out=True),
    Case("qwen2.5-3b, 12 layers", _QWEN2_3B, 65536, checkpoint="full", loss="chunked", held_out=True),
    Case("mistral-7b, 5 layers", _MISTRAL, 12288, rows=2, loss="chunked", held_out=True),
    Case("gemma3-1b, 8 layers", _GEMMA3, 32768, loss="chunked", held_out=True),
    Case("mixtral, 2 layers", _MIXTRAL, 8192, loss="chunked", held_out=True),
    Case("llama-13b, 8 layers", _of(_LLAMA_13B, num_hidden_layers=8), 32768, checkpoint="full", held_out=True),
)
_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
TINY = (
    Case("tiny", _TINY, 64),
    Case("tiny qwen3", _of(_QWEN3, **_SMALL, head_dim=16, vocab_size=256), 64, rows=2, checkpoint="full", held_out=True),
    Case("tiny moe", _of(_MOE, **_SMALL, head_dim=16, vocab_size=256, num_experts=4, num_experts_per_tok=2), 64),
    Case("tiny gemma3", _of(_GEMMA3, **_SMALL, head_dim=16, vocab_size=256, sliding_window=16), 64),
    Case("tiny", _TINY, 64, checkpoint="full", loss="chunked"),
    Case("tiny", _TINY, 64, checkpoint="full", precision="mixed"),
)


@dataclass(frozen=True)
class Compared:
    """A measured case beside its estimate.

    Attributes:
        case: what ran.
        measured: bytes of the peak.
        estimated: the same, estimated.
        ms: milliseconds of a step.
        estimated_ms: the same, estimated; 0 where the device has no figures.
    """

    case: Case
    measured: int
    estimated: int
    ms: float
    estimated_ms: float

    def line(self) -> str:
        """As the table prints it."""
        case = self.case
        memory = f"{self.measured / GIB:>9.2f}{self.estimated / GIB:>9.2f}{self.estimated / self.measured - 1:>+9.1%}"
        times = f"{self.ms:>9.1f}{self.estimated_ms:>9.1f}{self.estimated_ms / self.ms - 1:>+9.1%}"
        held_out = "held out" if case.held_out else ""
        about = f"{case.checkpoint:<5}{case.loss:<8}{case.precision:<6}"
        return f"{case.name:<22}{case.rows * case.tokens:>6} {about}{memory}{times} {held_out}"


COMPARED = f"{'model':<22}{'tokens':>6} {'':<19}{'GiB':>9}{'est.':>9}{'':>9}{'ms':>9}{'est.':>9}"


def estimated(case: Case, device: str | None) -> Estimate:
    """What `estimate` says of a case."""
    mixed = case.precision == "mixed"
    how = {"parallel": "fsdp" if mixed else "none", "precision": case.precision, "checkpoint": case.checkpoint, "loss": case.loss}
    return estimate(case.config, None, case.tokens, batch=case.rows, device=device, **how)


def beside(run: dict[str, Any]) -> list[Compared]:
    """The rows of a run beside estimates, without those that ran out of memory."""
    compared = []
    for row in run["rows"]:
        case = Case(**row["case"])
        if not row["note"] and row["peak"]:
            made = estimated(case, device_named(run["device"]) or None)
            ms = 0.0 if made.time is None else made.time.step * 1e3
            compared.append(Compared(case, row["peak"], made.peak, row["ms"], ms))
    return compared
