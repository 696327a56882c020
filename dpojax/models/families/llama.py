"""Llama, and the families that differ from it in a few choices: Mistral, Qwen2, Qwen3."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dpojax.models.config import Attention, DecoderConfig, LayerKind, Mlp, Norm, Rope
from dpojax.models.families.base import (
    FULL,
    SLIDING,
    Family,
    Tensor,
    alternate,
    back,
    bias,
    linear,
    read_rope,
    rope_fields,
    types_of,
    write_rope,
)
from dpojax.models.families.fields import Fields, activation_name

LLAMA_TENSORS = {
    "embed": Tensor("model.embed_tokens.weight", "token_embd"),
    "final_norm": Tensor("model.norm.weight", "output_norm"),
    "head": Tensor("lm_head.weight", "output"),
    "score": Tensor("score.weight"),
    "blocks/attn_norm": back("input_layernorm", "attn_norm"),
    "blocks/q": linear("self_attn.q_proj", "attn_q", gguf_pairs=True),
    "blocks/k": linear("self_attn.k_proj", "attn_k", gguf_pairs=True),
    "blocks/v": linear("self_attn.v_proj", "attn_v"),
    "blocks/o": back("self_attn.o_proj", "attn_output"),
    "blocks/q_bias": bias("self_attn.q_proj", "attn_q", gguf_pairs=True),
    "blocks/k_bias": bias("self_attn.k_proj", "attn_k", gguf_pairs=True),
    "blocks/v_bias": bias("self_attn.v_proj", "attn_v"),
    "blocks/o_bias": bias("self_attn.o_proj", "attn_output"),
    "blocks/mlp_norm": back("post_attention_layernorm", "ffn_norm"),
    "blocks/gate": linear("mlp.gate_proj", "ffn_gate"),
    "blocks/up": linear("mlp.up_proj", "ffn_up"),
    "blocks/down": back("mlp.down_proj", "ffn_down"),
    "blocks/gate_bias": bias("mlp.gate_proj", "ffn_gate"),
    "blocks/up_bias": bias("mlp.up_proj", "ffn_up"),
    "blocks/down_bias": bias("mlp.down_proj", "ffn_down"),
}
QWEN_TENSORS = {path: dataclasses.replace(tensor, gguf_pairs=False) for path, tensor in LLAMA_TENSORS.items()}
QK_NORMS = {
    "blocks/q_norm": back("self_attn.q_norm", "attn_q_norm"),
    "blocks/k_norm": back("self_attn.k_norm", "attn_k_norm"),
}


def read_like_llama(fields: Fields, **defaults: Any) -> DecoderConfig:
    """The choices that Llama's fields name; other families start from them.

    Args:
      fields: of the model.
      defaults: of ``eps``, ``theta``, ``max_positions``, ``tied``, ``head_dim`` and ``act`` (its field and its value),
        where the file does not say.
    """
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    by_width = width // heads if heads > 0 else 0
    act = defaults.get("act", ("hidden_act", "silu"))
    fields.only("partial_rotary_factor", 1, why="this family turns whole heads")
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        width=width,
        layers=fields.integer("num_hidden_layers"),
        attention=Attention(
            heads=heads,
            kv_heads=fields.integer("num_key_value_heads", defaults.get("kv_heads", heads)),
            head_dim=fields.integer("head_dim", defaults.get("head_dim", by_width)),
        ),
        mlp=Mlp(width=fields.integer("intermediate_size"), act=fields.activation(*act)),
        norm=Norm(eps=fields.number("rms_norm_eps", defaults.get("eps", 1e-6))),
        positions=read_rope(
            fields, rope_fields(fields), theta=fields.number("rope_theta", defaults.get("theta", 10_000.0))
        ),
        max_positions=fields.integer("max_position_embeddings", defaults.get("max_positions", 2048)),
        tied=fields.flag("tie_word_embeddings", defaults.get("tied", False)),
        head=fields.head(),
    )


def write_like_llama(config: DecoderConfig, act: str = "hidden_act") -> dict[str, Any]:
    """The inverse of :func:`read_like_llama`."""
    assert isinstance(config.positions, Rope)
    return {
        act: activation_name(config.mlp.act, "gelu_pytorch_tanh"),
        "hidden_size": config.width,
        "intermediate_size": config.mlp.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.attention.heads,
        "num_key_value_heads": config.attention.kv_heads,
        "head_dim": config.attention.head_dim,
        "rms_norm_eps": config.norm.eps,
        "rope_theta": config.positions.theta,
        "rope_parameters": write_rope(config.positions),
        "max_position_embeddings": config.max_positions,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
    }


def with_attention(config: DecoderConfig, **choices: Any) -> DecoderConfig:
    """The config with other choices of attention."""
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, **choices))


# ---- Llama ----------------------------------------------------------------------------------------------------------


def llama_config(fields: Fields) -> DecoderConfig:
    """Llama 2 and 3: biases if the config says so, linear and Llama 3's scaling of rotary positions."""
    config = read_like_llama(fields)
    mlp = dataclasses.replace(config.mlp, bias=fields.flag("mlp_bias"))
    config = dataclasses.replace(config, mlp=mlp)
    return with_attention(config, bias=fields.attention_bias())


def llama_fields(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of :func:`llama_config`."""
    biases = {"attention_bias": config.attention.bias == "all", "mlp_bias": config.mlp.bias}
    return write_like_llama(config) | biases


LLAMA = Family("llama", "Llama", llama_config, llama_fields, LLAMA_TENSORS)


# ---- Mistral --------------------------------------------------------------------------------------------------------


def one_window(fields: Fields, config: DecoderConfig, default: int | None) -> DecoderConfig:
    """The config with one window for all layers, or none, as ``sliding_window`` says."""
    return dataclasses.replace(config, kinds=(LayerKind(window=fields.window(default)),))


def mistral_config(fields: Fields) -> DecoderConfig:
    """Mistral: one window for all layers, or none."""
    config = one_window(fields, read_like_llama(fields, max_positions=131_072, kv_heads=8), 4096)
    wanted = FULL if config.kinds[0].window is None else SLIDING
    types = fields.get("layer_types")
    if types is not None and set(types) != {wanted}:
        fields.refuse("layer_types", f"the layers of a mistral model are all of {wanted}, by its sliding_window")
    return config


def mistral_fields(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of :func:`mistral_config`."""
    return write_like_llama(config) | {"sliding_window": config.kinds[0].window}


MISTRAL = Family("mistral", "Mistral", mistral_config, mistral_fields, LLAMA_TENSORS)


# ---- Qwen -----------------------------------------------------------------------------------------------------------


def with_qwen_windows(fields: Fields, config: DecoderConfig) -> DecoderConfig:
    """The config with windows from a layer on, or in the layers that ``layer_types`` names."""
    on, first = fields.flag("use_sliding_window"), fields.integer("max_window_layers", 28)
    window = fields.window(4096) if on else fields.get("sliding_window") and None
    types = fields.get("layer_types") or [SLIDING if i >= first else FULL for i in range(config.layers)]
    kinds = {FULL: LayerKind(), SLIDING: LayerKind(window=window)}
    return dataclasses.replace(config, **alternate(fields, types, config.layers, kinds))


def qwen_windows(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of :func:`with_qwen_windows`."""
    windows = {kind.window for kind in config.kinds} - {None}
    if not windows:
        return {}
    (window,) = windows
    layers = {"max_window_layers": 0, "layer_types": types_of(config)}
    return {"use_sliding_window": True, "sliding_window": window, **layers}


def qwen2_config(fields: Fields) -> DecoderConfig:
    """Qwen2: biases of queries, keys and values, and windows from a layer on."""
    config = read_like_llama(fields, max_positions=32_768)
    return with_attention(with_qwen_windows(fields, config), bias="qkv")


def qwen2_fields(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of :func:`qwen2_config`."""
    return write_like_llama(config) | qwen_windows(config)


QWEN2 = Family("qwen2", "Qwen2", qwen2_config, qwen2_fields, QWEN_TENSORS)


def qwen3_config(fields: Fields) -> DecoderConfig:
    """Qwen3: norms of queries and keys, head size of its own, and windows from a layer on."""
    config = read_like_llama(fields, max_positions=32_768, head_dim=128)
    config = with_attention(config, qk_norm=config.norm, bias=fields.attention_bias())
    return with_qwen_windows(fields, config)


def qwen3_fields(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of :func:`qwen3_config`."""
    biases = {"attention_bias": config.attention.bias == "all"}
    return write_like_llama(config) | biases | qwen_windows(config)


QWEN3 = Family("qwen3", "Qwen3", qwen3_config, qwen3_fields, QWEN_TENSORS | QK_NORMS)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}
