"""Phi-3 (arXiv 2404.14219), and Phi-4 mini: fused projections, rotary positions on a share of a head, windows."""

import dataclasses
from typing import Any

from dpojax.models.config import DecoderConfig, Rope
from dpojax.models.families.base import Family, linear, read_rope, rope_fields, write_rope
from dpojax.models.families.fields import Fields
from dpojax.models.families.llama import QWEN_TENSORS, one_window, read_like_llama, write_like_llama

TENSORS = {path: tensor for path, tensor in QWEN_TENSORS.items() if not path.endswith("_bias")} | {
    f"blocks/{name}": linear("self_attn.qkv_proj", "attn_qkv", after=("q", "k", "v")[:i])
    for i, name in enumerate(("q", "k", "v"))
}
TENSORS |= {
    f"blocks/{name}": linear("mlp.gate_up_proj", "ffn_up", after=("gate", "up")[:i])
    for i, name in enumerate(("gate", "up"))
}


def phi3_config(fields: Fields) -> DecoderConfig:
    """Phi-3. LongRoPE is read, and texts beyond its short factors' reach are refused."""
    share = fields.number("partial_rotary_factor", 1.0)
    rope = rope_fields(fields)
    if rope.get("rope_type", rope.get("type")) in ("su", "yarn"):  # as early files call it
        rope = {**rope, "rope_type": "longrope"}
    for name in ("full_attn_mod", "interpolate_factor"):  # of Phi-4 mini's own code
        fields.only(name, 1, why="transformers' Phi-3 has no such choice")
    original = fields.integer("original_max_position_embeddings", 4096)  # of LongRoPE; transformers' goes before
    if rope.get("rope_type", rope.get("type")) == "longrope":
        rope = {**rope, "original_max_position_embeddings": original}
    config = read_like_llama(
        fields.without("rope_parameters", "rope_scaling", "partial_rotary_factor"), eps=1e-5, max_positions=4096
    )
    positions = read_rope(
        fields, rope, theta=fields.number("rope_theta", 10_000.0), share=share, types=("default", "longrope")
    )
    factors = positions.scaling and len(positions.scaling.short)
    rotated = int(config.attention.head_dim * positions.share) // 2
    if factors is not None and factors != rotated:
        name = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
        fields.refuse(name, f"it has {factors} factors for {rotated} frequencies; fix it")
    return one_window(fields, dataclasses.replace(config, positions=positions), None)


def phi3_fields(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of :func:`phi3_config`."""
    assert isinstance(config.positions, Rope)
    raw = write_like_llama(config) | {"sliding_window": config.kinds[0].window}
    raw |= {"rope_parameters": write_rope(config.positions, partial=True)}
    if config.positions.scaling is not None:
        raw["original_max_position_embeddings"] = config.positions.scaling.original_max_positions
    return raw


FAMILIES = {"phi3": Family("phi3", "Phi3", phi3_config, phi3_fields, TENSORS)}
