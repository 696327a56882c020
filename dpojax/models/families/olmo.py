"""OLMo 2 (arXiv 2501.00656): norms behind both halves of a layer, and norms of queries and keys over all heads."""

import dataclasses
from typing import Any

from dpojax.models.config import DecoderConfig
from dpojax.models.families.base import Family, back
from dpojax.models.families.fields import Fields
from dpojax.models.families.llama import QK_NORMS, QWEN_TENSORS, read_like_llama, with_attention, write_like_llama

TENSORS = {path: tensor for path, tensor in QWEN_TENSORS.items() if path != "blocks/attn_norm"}
TENSORS |= {path: dataclasses.replace(tensor, flat=True) for path, tensor in QK_NORMS.items()}
TENSORS |= {
    "blocks/attn_post_norm": back("post_attention_layernorm", "post_attention_norm"),
    "blocks/mlp_post_norm": back("post_feedforward_layernorm", "post_ffw_norm"),
}
del TENSORS["blocks/mlp_norm"]


def olmo2_config(fields: Fields) -> DecoderConfig:
    """OLMo 2."""
    config = dataclasses.replace(read_like_llama(fields, eps=1e-5), residual="post")
    return with_attention(config, bias=fields.attention_bias(), qk_norm=config.norm, qk_norm_over="all")


def olmo2_fields(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of :func:`olmo2_config`."""
    return write_like_llama(config) | {"attention_bias": config.attention.bias == "all"}


FAMILIES = {"olmo2": Family("olmo2", "Olmo2", olmo2_config, olmo2_fields, TENSORS)}
