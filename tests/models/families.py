"""A tiny model of every family, in the form of its ``config.json``: what tests and their goldens are made of."""

import numpy as np

from tests.conftest import HF_CONFIG

QWEN3 = {
    **{k: v for k, v in HF_CONFIG.items() if k != "mlp_bias"},
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 16,  # not hidden_size / heads
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "num_hidden_layers": 3}
FAMILIES = {
    "llama": HF_CONFIG,
    "qwen3": QWEN3,
    "qwen3 tied": QWEN3 | {"tie_word_embeddings": True},
    "qwen3 biases": QWEN3 | {"attention_bias": True},
    "qwen3 window": QWEN3 | WINDOW,
}
TOKENS = np.random.default_rng(0).integers(0, 384, (2, 40)).tolist()


def random_tensor(i: int, shape: tuple[int, ...]) -> np.ndarray:
    """The i-th tensor of a model, far from what a fresh one would have."""
    spread = 0.2 if len(shape) > 1 else 0.1
    mean = 0.0 if len(shape) > 1 else 1.0
    return (mean + spread * np.random.default_rng(i).normal(size=shape)).astype(np.float32)
