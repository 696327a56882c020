"""The decoder, its configuration, and its weights in and out."""

from dpojax.models.attention import make_attention
from dpojax.models.config import DecoderConfig
from dpojax.models.decoder import init_params, make_apply, param_axes
from dpojax.models.load import Model, as_reward_model, check_model, load_model, load_tokenizer
from dpojax.models.safetensors import save_directory

__all__ = [
    "DecoderConfig",
    "Model",
    "as_reward_model",
    "check_model",
    "init_params",
    "load_model",
    "load_tokenizer",
    "make_apply",
    "make_attention",
    "param_axes",
    "save_directory",
]
