"""The decoder, its choices and parameters, and its weights in and out."""

from dpojax.models.attention import make_attention
from dpojax.models.config import (
    Attention,
    DecoderConfig,
    LayerKind,
    Learned,
    Lora,
    LowRank,
    Mlp,
    Norm,
    Rope,
    RopeScaling,
)
from dpojax.models.decoder import make_apply, unembedding_of
from dpojax.models.families import FAMILIES, config_from_hf
from dpojax.models.identity import fingerprint
from dpojax.models.load import (
    Model,
    ModelFiles,
    as_reward_model,
    load_model,
    load_tokenizer,
    new_model,
    open_model,
    save_model,
)
from dpojax.models.lora import merge, new_lora, with_adapter, without_adapter
from dpojax.models.params import (
    abstract_params,
    check_divides,
    combine,
    init_params,
    param_shardings,
    param_specs,
    partition,
)

__all__ = [
    "FAMILIES",
    "Attention",
    "DecoderConfig",
    "LayerKind",
    "Learned",
    "Lora",
    "LowRank",
    "Mlp",
    "Model",
    "ModelFiles",
    "Norm",
    "Rope",
    "RopeScaling",
    "abstract_params",
    "as_reward_model",
    "check_divides",
    "combine",
    "config_from_hf",
    "fingerprint",
    "init_params",
    "load_model",
    "load_tokenizer",
    "make_apply",
    "make_attention",
    "merge",
    "new_lora",
    "new_model",
    "open_model",
    "param_shardings",
    "param_specs",
    "partition",
    "save_model",
    "unembedding_of",
    "with_adapter",
    "without_adapter",
]
