"""Gemma 2 and Gemma 3 (text): norms of ``1 + w`` around both halves of a layer, scaled embeddings, alternating
windows, and capped scores and logits."""

import dataclasses
from typing import Any

from dpojax.models.config import DecoderConfig, LayerKind, Rope
from dpojax.models.families.base import (
    FULL,
    SLIDING,
    Family,
    Tensor,
    alternate,
    back,
    read_rope,
    types_of,
    write_rope,
)
from dpojax.models.families.fields import Fields
from dpojax.models.families.llama import QWEN_TENSORS, read_like_llama, with_attention, write_like_llama

GEMMA2_TENSORS = {path: tensor for path, tensor in QWEN_TENSORS.items() if "norm" not in path} | {
    "final_norm": Tensor("model.norm.weight", "output_norm", gguf_plus=1.0),
    "blocks/attn_norm": back("input_layernorm", "attn_norm", gguf_plus=1.0),
    "blocks/attn_post_norm": back("post_attention_layernorm", "post_attention_norm", gguf_plus=1.0),
    "blocks/mlp_norm": back("pre_feedforward_layernorm", "ffn_norm", gguf_plus=1.0),
    "blocks/mlp_post_norm": back("post_feedforward_layernorm", "post_ffw_norm", gguf_plus=1.0),
}
GEMMA3_TENSORS = GEMMA2_TENSORS | {
    "blocks/q_norm": back("self_attn.q_norm", "attn_q_norm", gguf_plus=1.0),
    "blocks/k_norm": back("self_attn.k_norm", "attn_k_norm", gguf_plus=1.0),
}
ACT = ("hidden_activation", "gelu_pytorch_tanh")


def _read(fields: Fields, types: list[str], kinds: dict[str, LayerKind], **more: Any) -> DecoderConfig:
    """What both have."""
    fields.get("hidden_act")  # of early files; transformers reads hidden_activation
    fields.only("use_bidirectional_attention", False, why="use a model that writes text")
    config = read_like_llama(fields, act=ACT, tied=True, kv_heads=4, head_dim=256, **more)
    scalar = fields.number("query_pre_attn_scalar", 256)
    if scalar <= 0:
        fields.refuse("query_pre_attn_scalar", "use a number above 0")
    config = with_attention(
        config,
        bias=fields.attention_bias(),
        scale=scalar**-0.5,
    )
    return dataclasses.replace(
        config,
        norm=dataclasses.replace(config.norm, offset=1.0),
        residual="pre_post",
        embed_scale=config.width**0.5,
        logits_softcap=_cap(fields, "final_logit_softcapping", more.get("logits_cap")),
        **alternate(fields, types, config.layers, kinds),
    )


def _cap(fields: Fields, name: str, default: float | None) -> float | None:
    cap = fields.optional(name, default)
    if cap is not None and cap <= 0:
        fields.refuse(name, "use a number above 0, or null")
    return cap


def _write(config: DecoderConfig) -> dict[str, Any]:
    scale = config.attention.scale
    assert scale is not None
    scalar = round(scale**-2, 6)
    windows = [kind.window for kind in config.kinds if kind.window is not None]
    return write_like_llama(config, ACT[0]) | {
        "attention_bias": config.attention.bias == "all",
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,  # transformers wants an int
        "attn_logit_softcapping": config.attention.softcap,
        "final_logit_softcapping": config.logits_softcap,
        "sliding_window": windows[0] if windows else 4096,  # transformers makes a mask of it at any rate
        "layer_types": types_of(config),
    }


def gemma2_config(fields: Fields) -> DecoderConfig:
    """Gemma 2 (arXiv 2408.00118): every other layer, from the first on, sees a window."""
    layers = fields.integer("num_hidden_layers")
    types = fields.get("layer_types") or [FULL if i % 2 else SLIDING for i in range(layers)]
    kinds = {FULL: LayerKind(), SLIDING: LayerKind(window=fields.window(4096))}
    config = _read(fields, types, kinds, max_positions=8192, logits_cap=30.0)
    return with_attention(config, softcap=_cap(fields, "attn_logit_softcapping", 50.0))


GEMMA2 = Family("gemma2", "Gemma2", gemma2_config, _write, GEMMA2_TENSORS)


def gemma3_config(fields: Fields) -> DecoderConfig:
    """Gemma 3, text (arXiv 2503.19786): a full layer behind every five of windows, each kind with rotary positions of
    its own, of which the full layers' may be scaled; norms of queries and keys."""
    layers, every = fields.integer("num_hidden_layers"), fields.integer("sliding_window_pattern", 6)
    if every < 1:
        fields.refuse("sliding_window_pattern", "use the number of layers from one full layer to the next")
    fields.get("_sliding_window_pattern")  # transformers notes what layer_types were made of
    types = fields.get("layer_types") or [FULL if (i + 1) % every == 0 else SLIDING for i in range(layers)]
    rope, scaling = fields.get("rope_parameters") or {}, fields.get("rope_scaling") or {}
    # transformers passes over both of these.
    if rope and not {FULL, SLIDING} & rope.keys():
        fields.refuse("rope_parameters", f"name those of {FULL} and of {SLIDING}")
    if "type" in scaling and "rope_type" not in scaling:
        fields.refuse("rope_scaling", "name its type rope_type")
    # Earlier files name the full layers' alone, beside the base of the others.
    of_full, of_window = {**(rope.get(FULL) or {}), **scaling}, rope.get(SLIDING) or {}
    global_rope = read_rope(fields, of_full, theta=fields.number("rope_theta", 1_000_000.0))
    local_rope = read_rope(fields, of_window, theta=fields.number("rope_local_base_freq", 10_000.0))
    kinds = {FULL: LayerKind(), SLIDING: LayerKind(window=fields.window(4096), rope=local_rope)}
    fields.get("attn_logit_softcapping")  # transformers' Gemma 3 has the field and never caps scores
    alone = fields.without("rope_parameters", "rope_scaling")
    config = _read(alone, types, kinds, max_positions=131_072)
    config = dataclasses.replace(config, positions=global_rope)
    return with_attention(config, qk_norm=config.norm)


def gemma3_fields(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of :func:`gemma3_config`."""
    assert isinstance(config.positions, Rope)
    raw = _write(config)
    del raw["rope_theta"]
    local = next((kind.rope for kind in config.kinds if kind.rope is not None), Rope(theta=10_000.0))
    return raw | {"rope_parameters": {FULL: write_rope(config.positions), SLIDING: write_rope(local)}}


GEMMA3 = Family(
    "gemma3_text",
    "Gemma3",
    gemma3_config,
    gemma3_fields,
    GEMMA3_TENSORS,
    classifier="TextForSequenceClassification",
)

FAMILIES = {family.model_type: family for family in (GEMMA2, GEMMA3)}
