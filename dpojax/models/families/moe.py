"""Mixtral and Qwen3-MoE: a mixture of experts in place of the MLP."""

import dataclasses
from typing import Any

from dpojax.models.config import DecoderConfig, Experts
from dpojax.models.families.base import Family, Tensor
from dpojax.models.families.fields import Fields
from dpojax.models.families.llama import (
    LLAMA_TENSORS,
    QK_NORMS,
    QWEN_TENSORS,
    one_window,
    read_like_llama,
    with_attention,
    write_like_llama,
)


def _experts(name: str, gate: str, up: str, down: str) -> dict[str, Tensor]:
    """The experts' tensors, each expert's its own; in GGUF a layer's are stacked."""
    form = f"model.layers.{{}}.{name}.{{}}."
    return {
        "blocks/experts_gate": Tensor(f"{form}{gate}.weight", "blk.{}.ffn_gate_exps", outputs_first=True),
        "blocks/experts_up": Tensor(f"{form}{up}.weight", "blk.{}.ffn_up_exps", outputs_first=True),
        "blocks/experts_down": Tensor(f"{form}{down}.weight", "blk.{}.ffn_down_exps"),
    }


def _router(name: str) -> Tensor:
    return Tensor(f"model.layers.{{}}.{name}.weight", "blk.{}.ffn_gate_inp")


MIXTRAL_TENSORS = {path: tensor for path, tensor in LLAMA_TENSORS.items() if not path.endswith("_bias")}
MIXTRAL_TENSORS |= {"blocks/router": _router("block_sparse_moe.gate")}
MIXTRAL_TENSORS |= _experts("block_sparse_moe.experts", "w1", "w3", "w2")
QWEN3_MOE_TENSORS = QWEN_TENSORS | QK_NORMS | {"blocks/router": _router("mlp.gate")}
QWEN3_MOE_TENSORS |= _experts("mlp.experts", "gate_proj", "up_proj", "down_proj")


def _number(fields: Fields, default: int) -> int:
    """How many experts there are; transformers knows both names."""
    fields.get("num_local_experts")
    return fields.integer("num_experts", fields.integer("num_local_experts", default))


def _checked(fields: Fields, experts: Experts) -> Experts:
    if not 0 < experts.per_token <= experts.number:
        fields.refuse("num_experts_per_tok", f"use a number up to that of the experts, {experts.number}")
    return experts


def mixtral_config(fields: Fields) -> DecoderConfig:
    """Mixtral (arXiv 2401.04088): experts in every layer, weights that add up to 1."""
    config = read_like_llama(fields, eps=1e-5, theta=1e6, max_positions=131_072, kv_heads=8)
    experts = Experts(
        number=_number(fields, 8), per_token=fields.integer("num_experts_per_tok", 2), width=config.mlp.width
    )
    return one_window(fields, dataclasses.replace(config, experts=_checked(fields, experts)), None)


def mixtral_fields(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of :func:`mixtral_config`."""
    assert config.experts is not None
    return write_like_llama(config) | {
        "sliding_window": config.kinds[0].window,
        "num_local_experts": config.experts.number,
        "num_experts_per_tok": config.experts.per_token,
    }


def qwen3_moe_config(fields: Fields) -> DecoderConfig:
    """Qwen3-MoE (arXiv 2505.09388): Qwen3 with experts, in every layer or with MLPs in between."""
    config = read_like_llama(fields, max_positions=32_768, kv_heads=4)
    config = with_attention(config, qk_norm=config.norm, bias=fields.attention_bias())
    fields.get("max_window_layers")  # transformers' Qwen3-MoE has windows in all layers or in none
    on = fields.flag("use_sliding_window")
    config = one_window(fields if on else fields.without("sliding_window"), config, 4096 if on else None)
    experts = Experts(
        number=_number(fields, 128),
        per_token=fields.integer("num_experts_per_tok", 8),
        width=fields.integer("moe_intermediate_size", 768),
        renormalize=fields.flag("norm_topk_prob"),
    )
    step, only = fields.integer("decoder_sparse_step", 1), fields.get("mlp_only_layers") or []
    dense = tuple(i for i in range(config.layers) if i in only or (i + 1) % max(step, 1))
    if step < 1 or not isinstance(only, list) or len(dense) == config.layers:
        fields.refuse("mlp_only_layers" if step > 0 else "decoder_sparse_step", "use a model with experts, or qwen3")
    return dataclasses.replace(config, experts=_checked(fields, experts), dense_layers=dense)


def qwen3_moe_fields(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of :func:`qwen3_moe_config`."""
    assert config.experts is not None
    window = config.kinds[0].window
    return write_like_llama(config) | {
        "attention_bias": config.attention.bias == "all",
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "num_experts": config.experts.number,
        "num_experts_per_tok": config.experts.per_token,
        "moe_intermediate_size": config.experts.width,
        "norm_topk_prob": config.experts.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.dense_layers),
    }


MIXTRAL = Family("mixtral", "Mixtral", mixtral_config, mixtral_fields, MIXTRAL_TENSORS)
QWEN3_MOE = Family("qwen3_moe", "Qwen3Moe", qwen3_moe_config, qwen3_moe_fields, QWEN3_MOE_TENSORS)

FAMILIES = {family.model_type: family for family in (MIXTRAL, QWEN3_MOE)}
