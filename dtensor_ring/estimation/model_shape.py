"""What a model's `config.json` says of its size: dimensions by field name, and how many weights follow from them.

    llama, a layer      q_proj (H D, h)   k_proj, v_proj (Hk D, h)   o_proj (h, H D)   gate, up (i, h)   down (h, i)   2 norms (h)
    the whole           + embedding (V, h) + norm (h) + head (V, h), which is the embedding itself where weights are tied

Nothing of transformers is imported, and nothing is downloaded: `read_model` takes a file, a folder, the fields themselves, or a
name of `shapes.json`, which has published configs as numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES = Path(__file__).parent / "shapes.json"


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts that stands in place of a layer's MLP.

    Attributes:
        count: experts of a layer.
        chosen: experts that a token is sent to.
        intermediate: numbers inside an expert.
        biased: whether its linear layers add a bias.
        clamped: whether gate and up are clamped, as in gpt-oss.
        wide_weights: whether what experts return is weighed in float32, as in Mixtral.
    """

    count: int
    chosen: int
    intermediate: int
    biased: bool = False
    clamped: bool = False
    wide_weights: bool = False


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only model as numbers.

    Attributes:
        name: what it is called in tables.
        model_type: as its config has it.
        hidden: numbers of a token between layers.
        intermediate: numbers inside a dense MLP.
        layers: decoder layers.
        heads: query heads.
        kv_heads: key heads.
        head_dim: numbers in a head.
        vocab: tokens of the vocabulary.
        tied: whether the head's weight is the embedding.
        windows: for each layer the tokens that a query sees, itself among them; 0 for all.
        sparse: for each layer whether it has experts.
        experts: those of sparse layers; None where there are none.
        qkv_bias: whether q, k and v add a bias.
        out_bias: whether the output projection of attention does.
        mlp_bias: whether those of a dense MLP do.
        head_norms: whether queries and keys are normalised head by head.
        four_norms: whether a layer has two more norms, after attention and after the MLP.
        wide_norms: whether norms multiply with their weight in float32, as Gemma's and gpt-oss's do.
        fused: whether q, k, v are one matrix, and gate and up another, as Phi-3's are.
        gelu: whether the MLP's function is GELU, and not SiLU.
        sinks: whether each query head has a sink.
        softcap: whether attention caps scores.
        logit_softcap: whether logits are capped.
        scaled_embedding: whether embeddings are multiplied by a number.
    """

    name: str
    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    windows: tuple[int, ...]
    sparse: tuple[bool, ...]
    experts: Experts | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    four_norms: bool = False
    wide_norms: bool = False
    fused: bool = False
    gelu: bool = False
    sinks: bool = False
    softcap: bool = False
    logit_softcap: bool = False
    scaled_embedding: bool = False

    @property
    def q(self) -> int:
        """Numbers of a token's queries."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Numbers of a token's keys; as many as of its values."""
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        """Weights of the embedding; as many as of the head."""
        return self.vocab * self.hidden

    def attention_weights(self) -> int:
        """Weights of a layer's attention and norms."""
        h, q, kv = self.hidden, self.q, self.kv
        weights = 2 * h * q + 2 * h * kv + (q + 2 * kv) * self.qkv_bias + h * self.out_bias
        norms = (4 if self.four_norms else 2) * h + 2 * self.head_dim * self.head_norms
        return weights + norms + self.heads * self.sinks

    def mlp_weights(self, sparse: bool) -> int:
        """Weights of a layer's MLP, or of its experts and router."""
        h, i, e = self.hidden, self.intermediate, self.experts
        if not sparse or e is None:
            return 3 * h * i + (2 * i + h) * self.mlp_bias
        each = 3 * h * e.intermediate + (2 * e.intermediate + h) * e.biased
        return e.count * (each + h + e.biased)

    def layer_weights(self, layer: int) -> int:
        """Weights of a layer."""
        return self.attention_weights() + self.mlp_weights(self.sparse[layer])

    @property
    def outer_weights(self) -> int:
        """Weights outside of layers: embedding, head, last norm."""
        return self.embedding * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """All weights, tied ones once."""
        return self.outer_weights + sum(self.layer_weights(layer) for layer in range(self.layers))

    @property
    def active(self) -> int:
        """Weights that a token is multiplied with: no embedding, of experts those it is sent to."""
        unused = 0
        if self.experts is not None:
            each = self.mlp_weights(True) // self.experts.count - self.hidden - self.experts.biased
            unused = sum(self.sparse) * (self.experts.count - self.experts.chosen) * each
        return self.parameters - unused - (0 if self.tied else self.embedding)


def read_model(model: str | Path | Mapping[str, Any], name: str | None = None) -> ModelShape:
    """The shape of a model.

    Args:
        model: a `config.json`, a folder that has one, its fields, or a name of `shapes.json`, such as "llama-3.1-8b".
        name: what it is called in tables; None takes the model type, or the file's folder.

    Raises:
        ValueError: no such file or name, no JSON, a field that is missing or no size, or an architecture without attention in
            every layer.
    """
    if isinstance(model, Mapping):
        return _shape(model, name or str(model.get("model_type", "model")))
    known: dict[str, Any] = json.loads(SHAPES.read_text())["models"]
    if str(model) in known:
        return _shape(known[str(model)]["config"], name or str(model))
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{model} is neither a config.json, nor a folder with one, nor one of {', '.join(known)}; nothing is downloaded"
        )
    try:
        fields = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} holds no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no config, which is a JSON object, but {type(fields).__name__}")
    return _shape(fields, name or path.resolve().parent.name)


# What configs of these types leave out: the defaults of their classes in transformers.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"head_dim": 128, "head_norms": True},
    "qwen3_moe": {"head_norms": True, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8},
    "mixtral": {"num_key_value_heads": 8, "num_experts": 8, "num_experts_per_tok": 2},
    "gemma2": {
        "head_dim": 256,
        "sliding_window": 4096,
        "every": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {"head_dim": 256, "sliding_window": 4096, "every": 6, "head_norms": True},
    "gpt_oss": {"head_dim": 64, "sliding_window": 128, "every": 2, "attention_bias": True, "sinks": True, "num_experts": 128},
    "phi3": {"fused": True},
}
_GEMMAS = ("gemma2", "gemma3_text")


def is_known(model_type: str) -> bool:
    """Whether a model type's layers are described here; others are taken for Llama's."""
    return model_type in _DEFAULTS


class _Fields:
    """Fields of a config, then defaults of its type."""

    def __init__(self, fields: Mapping[str, Any], model_type: str) -> None:
        self.given, self.defaults = fields, _DEFAULTS.get(model_type, {})

    def get(self, *names: str) -> Any:  # noqa: ANN401  whatever JSON holds
        """The first of some names that is given, or has a default; None else."""
        for source in (self.given, self.defaults):
            for name in names:
                if source.get(name) is not None:
                    return source[name]
        return None

    def size(self, *names: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.get(*names)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"the config has no {' or '.join(names)}: found {', '.join(sorted(self.given))}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{names[0]} of a config is a whole number above 0, found {value!r}")
        return value

    def list_of(self, name: str) -> list[Any] | None:
        """A list; None where the config has none."""
        value = self.given.get(name)
        if value is not None and not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} of a config is a list, found {value!r}")
        return None if value is None else list(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name)
        return default if value is None else bool(value)


def _shape(fields: Mapping[str, Any], name: str) -> ModelShape:
    text = fields.get("text_config")
    if isinstance(text, Mapping):  # the language model inside a larger one
        fields = {**text, "tie_word_embeddings": text.get("tie_word_embeddings", fields.get("tie_word_embeddings"))}
    model_type = str(fields.get("model_type", "llama"))
    read = _Fields(fields, model_type)
    layers, heads, hidden = read.size("num_hidden_layers"), read.size("num_attention_heads"), read.size("hidden_size")
    # Classes that have a default for key heads take it where the config has none; the others as many as query heads.
    kv_heads = read.size("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise ValueError(f"the {kv_heads} key heads of a config must divide its {heads} query heads")
    experts = _experts(read, model_type)
    is_gemma = model_type in _GEMMAS
    return ModelShape(
        name=name,
        model_type=model_type,
        hidden=hidden,
        intermediate=read.size("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=read.size("head_dim", default=max(1, hidden // heads)),
        vocab=read.size("vocab_size"),
        tied=read.flag("tie_word_embeddings", default=is_gemma),
        windows=_windows(read, model_type, layers),
        sparse=tuple(experts is not None and _is_sparse(read, layer) for layer in range(layers)),
        experts=experts,
        qkv_bias=read.flag("qkv_bias") or read.flag("attention_bias"),
        out_bias=read.flag("attention_bias"),
        mlp_bias=read.flag("mlp_bias"),
        head_norms=read.flag("head_norms"),
        four_norms=is_gemma,
        wide_norms=is_gemma or model_type == "gpt_oss",
        fused=read.flag("fused"),
        gelu=str(read.get("hidden_activation", "hidden_act") or ("gelu" if is_gemma else "silu")).startswith("gelu"),
        sinks=read.flag("sinks"),
        softcap=read.flag("attn_logit_softcapping"),
        logit_softcap=read.flag("final_logit_softcapping"),
        scaled_embedding=is_gemma,
    )


def _experts(read: _Fields, model_type: str) -> Experts | None:
    if read.get("num_local_experts", "num_experts") is None:
        return None
    count = read.size("num_local_experts", "num_experts")
    chosen = read.size("num_experts_per_tok", default=4 if model_type == "gpt_oss" else None)
    if chosen > count:
        raise ValueError(f"a token of a config is sent to num_experts_per_tok={chosen} of its {count} experts")
    is_gpt_oss = model_type == "gpt_oss"
    names = ("intermediate_size",) if model_type in ("gpt_oss", "mixtral") else ("moe_intermediate_size", "intermediate_size")
    return Experts(count, chosen, read.size(*names), is_gpt_oss, is_gpt_oss, model_type == "mixtral")


def _is_sparse(read: _Fields, layer: int) -> bool:
    return layer not in (read.list_of("mlp_only_layers") or ()) and (layer + 1) % read.size("decoder_sparse_step", default=1) == 0


def _windows(read: _Fields, model_type: str, layers: int) -> tuple[int, ...]:
    """The tokens that a query of each layer sees."""
    window, types = read.get("sliding_window"), read.list_of("layer_types")
    if window:
        read.size("sliding_window")
    if types is not None:
        odd = sorted({str(each) for each in types} - {"full_attention", "sliding_attention"})
        if odd or len(types) < layers:
            raise ValueError(f"layer_types of a config are full_attention or sliding_attention, one a layer, found {odd or types}")
        slides = [each == "sliding_attention" for each in types[:layers]]
    elif read.get("every"):
        every = read.size("sliding_window_pattern", "every")
        slides = [(layer + 1) % every != 0 for layer in range(layers)]
    elif read.given.get("use_sliding_window") is False or model_type.startswith("qwen"):
        first = layers
        if read.flag("use_sliding_window") and read.get("max_window_layers") != 0:  # 0: every layer has a window
            first = read.size("max_window_layers", default=28)
        elif read.flag("use_sliding_window"):
            first = 0
        slides = [layer >= first for layer in range(layers)]
    else:
        # A config that says null has no window, though its class has a default.
        slides = [read.given.get("sliding_window", window) is not None] * layers
    if any(slides) and not window:
        raise ValueError("the config has layers with a window, and no sliding_window")
    return tuple(int(window) if each else 0 for each in slides)


__all__ = ["SHAPES", "Experts", "ModelShape", "is_known", "read_model"]
