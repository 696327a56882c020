"""Shapes of published models by short names: the facts of their ``config.json``, and no weights.

They are read by the families' own readers, as a file would be. Where a field stands for its family's usual value it is
left out. ``tests/models/test_presets.py`` compares parameter counts with the published ones.
"""

from typing import Any

from dpojax.models.config import DecoderConfig
from dpojax.models.families import config_from_hf

Raw = dict[str, Any]
"""A parsed ``config.json``."""


def _llama(width: int, mlp: int, layers: int, heads: int, *, factor: float | None = None, **more: Any) -> Raw:
    """Llama 3 (arXiv 2407.21783); ``factor`` stretches the rotary positions of 3.1 and later."""
    scaling = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"factor": factor, "original_max_position_embeddings": 8192}
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "max_position_embeddings": 8192 if factor is None else 131_072,
        **({} if factor is None else {"rope_scaling": scaling}),
        **more,
    }


def _qwen3(width: int, mlp: int, layers: int, heads: int, *, tied: bool = False, **more: Any) -> Raw:
    """Qwen3 (arXiv 2505.09388)."""
    return {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": tied,
        **more,
    }


def _gemma2(width: int, mlp: int, layers: int, heads: int, kv_heads: int, head_dim: int, scalar: int) -> Raw:
    """Gemma 2 (arXiv 2408.00118)."""
    return {
        "model_type": "gemma2",
        "vocab_size": 256_000,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": scalar,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
    }


def _gemma3(width: int, mlp: int, layers: int, heads: int, kv_heads: int, head_dim: int = 256, **more: Any) -> Raw:
    """Gemma 3, the text model (arXiv 2503.19786)."""
    return {
        "model_type": "gemma3_text",
        "vocab_size": 262_208,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "max_position_embeddings": 131_072,
        **({} if "vocab_size" in more else {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        **more,
    }


def _pythia(vocab: int, width: int, layers: int) -> Raw:
    """Pythia (arXiv 2304.01373); the original DPO repository fine-tunes its 2.8B."""
    return {
        "model_type": "gpt_neox",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "rotary_pct": 0.25,
        "max_position_embeddings": 2048,
    }


MOE: Raw = {"model_type": "qwen3_moe", "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8}
GPTJ = {"model_type": "gptj", "vocab_size": 50_400, "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_positions": 2048}
GPT2 = {"model_type": "gpt2", "vocab_size": 50_257, "n_embd": 1280, "n_layer": 36, "n_head": 20, "n_positions": 1024}

PRESETS: dict[str, Raw] = {
    "llama3-8b": _llama(4096, 14336, 32, 32),
    "llama3-70b": _llama(8192, 28672, 80, 64),
    "llama3.1-8b": _llama(4096, 14336, 32, 32, factor=8.0),
    "llama3.1-70b": _llama(8192, 28672, 80, 64, factor=8.0),
    "llama3.2-1b": _llama(2048, 8192, 16, 32, factor=32.0, tie_word_embeddings=True),
    "llama3.2-3b": _llama(3072, 8192, 28, 24, factor=32.0, tie_word_embeddings=True),
    "llama3.3-70b": _llama(8192, 28672, 80, 64, factor=8.0),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64),
    "qwen3-30b-a3b": _qwen3(2048, 6144, 48, 32, **MOE, moe_intermediate_size=768, norm_topk_prob=True),
    "gemma2-2b": _gemma2(2304, 9216, 26, 8, 4, 256, 256),
    "gemma2-9b": _gemma2(3584, 14336, 42, 16, 8, 256, 256),
    "gemma2-27b": _gemma2(4608, 36864, 46, 32, 16, 128, 144),
    "gemma3-1b": _gemma3(1152, 6912, 26, 4, 1, vocab_size=262_144, sliding_window=512, max_position_embeddings=32_768),
    "gemma3-4b": _gemma3(2560, 10240, 34, 8, 4),
    "gemma3-12b": _gemma3(3840, 15360, 48, 16, 8),
    "gemma3-27b": _gemma3(5376, 21504, 62, 32, 16, 128, query_pre_attn_scalar=168),
    "pythia-2.8b": _pythia(50_304, 2560, 32),
    "pythia-6.9b": _pythia(50_432, 4096, 32),
    "gptj-6b": {**GPTJ, "rotary_dim": 64, "activation_function": "gelu_new", "tie_word_embeddings": False},
    "gpt2-large": {**GPT2, "activation_function": "gelu_new"},
}
"""Name -> the facts of its ``config.json``."""


def preset(name: str) -> tuple[DecoderConfig, Raw]:
    """A preset's choices, and the ``config.json`` that they are of; ``name`` is a key of :data:`PRESETS`."""
    return config_from_hf(PRESETS[name], f"preset {name}"), PRESETS[name]
