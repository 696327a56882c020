"""The shape of a decoder, read from a Hugging Face ``config.json``; GGUF metadata is brought to the same form."""

import dataclasses
from typing import Any

from dpojax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the rotary frequencies (``rope_type: llama3``), or linear scaling."""

    kind: str  # "linear" or "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that shapes the program; hashable, so it can be a static argument."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    tied: bool
    rope_scaling: RopeScaling | None = None
    reward: bool = False
    """A reward model: in place of the unembedding, one score of the hidden state at a completion's end."""


def _rope(raw: dict[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    # transformers 5 writes `rope_parameters`; earlier versions `rope_theta` and `rope_scaling`.
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise UserError(f"{source}: rope type {kind!r} is not supported; use a model with default, linear or llama3")
    fields = {
        "low_freq_factor": rope.get("low_freq_factor"),
        "high_freq_factor": rope.get("high_freq_factor"),
        "original_max_positions": rope.get("original_max_position_embeddings"),
    }
    given = {k: v for k, v in fields.items() if v is not None}
    return theta, RopeScaling(kind=kind, factor=float(rope["factor"]), **given)


def llama_config(raw: dict[str, Any], source: str) -> DecoderConfig:
    """``config.json`` of ``model_type: llama`` -> :class:`DecoderConfig`."""
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise UserError(f"{source}: {key} is true, and biases are not supported; use a Llama model without them")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"{source}: hidden_act {raw['hidden_act']!r} is not supported; Llama models use 'silu'")
    theta, scaling = _rope(raw, source)
    reward = "LlamaForSequenceClassification" in (raw.get("architectures") or ())
    if reward and raw.get("num_labels", len(raw.get("id2label", "ab"))) != 1:
        raise UserError(f"{source}: a classifier of several labels is no reward model; use one with num_labels 1")
    try:
        heads = int(raw["num_attention_heads"])
        return DecoderConfig(
            vocab_size=int(raw["vocab_size"]),
            width=int(raw["hidden_size"]),
            layers=int(raw["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            mlp_width=int(raw["intermediate_size"]),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            max_positions=int(raw.get("max_position_embeddings", 2048)),
            tied=bool(raw.get("tie_word_embeddings", False)),
            reward=reward,
        )
    except KeyError as missing:
        raise UserError(f"{source}: no field {missing}; a Llama config.json has it") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{source}: a field has a value that makes no model ({error}); mend it") from None


FAMILIES = {"llama": llama_config}
"""``model_type`` -> reader. A new family is a reader here, its tensor names in ``safetensors.py``, and, where it
computes something new, a field of :class:`DecoderConfig` that ``decoder.py`` reads."""


def config_from_hf(raw: dict[str, Any], source: str) -> DecoderConfig:
    """Read a Hugging Face ``config.json`` that has been parsed into ``raw``; ``source`` names it in errors."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{source}: model_type {family!r} is not supported; use one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[family](raw, source)
