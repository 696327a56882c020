"""A saved model has its logits in MLX, which reads config.json and safetensors by its own code (where it is there)."""

import numpy as np
import pytest

from dpojax.models import save_model
from tests.models.families import FAMILIES, GEMMA2, PHI3, TOKENS
from tests.models.test_families import logits, random_model

SAME = ("llama", "llama biases", "llama linear", "mistral", "qwen2", "qwen3", "qwen3 tied", "olmo2", "phi3", "mixtral")
"""Families that MLX has, in what it has of them: it knows no windows of Mistral and Qwen, for one."""
THEIRS = {name: FAMILIES[name] for name in SAME} | {
    "llama3": FAMILIES["llama3"] | {"hidden_act": "silu"},
    "gemma2": GEMMA2 | {"sliding_window": 100},
    "phi3 partial": PHI3 | {"rope_parameters": FAMILIES["phi3 partial"]["rope_parameters"]},
    "qwen3_moe": FAMILIES["qwen3_moe"] | {"decoder_sparse_step": 1},
    "base of rope_parameters alone": {k: v for k, v in FAMILIES["llama"].items() if k != "rope_theta"}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
}


@pytest.mark.parametrize("name", THEIRS)
def test_a_saved_model_has_its_logits(name, tmp_path):
    pytest.importorskip("mlx_lm", reason='MLX is not there; pip install "mlx[cpu]" mlx-lm')
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model = random_model(THEIRS[name])
    save_model(model, tmp_path, shard_bytes=20_000)
    theirs = np.array(load_model(tmp_path)[0](mx.array(TOKENS)))
    ours = logits(model, TOKENS)
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.abs(ours).max(), rtol=0)
