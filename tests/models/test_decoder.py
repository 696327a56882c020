"""The decoder against transformers with torch, live, over the family's variants; weights out and in again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.errors import UserError
from dpojax.models import Model, init_params, load_model, make_apply, save_model
from dpojax.models.decoder import REMAT
from dpojax.packing import completion_mask
from tests.conftest import HF_CONFIG, decoder_config, plain_input, random_batch

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "one kv head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 16},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
}


def logits(config, params, tokens, **options):
    h, head = make_apply(config, **options)(params, plain_input(tokens))
    return jnp.einsum("btd,vd->btv", h.astype(jnp.float32), head)


def random_model(raw):
    config = decoder_config(raw)
    return config, jax.tree.map(lambda x: x if (x == 1).all() else 10 * x, init_params(config, seed=3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_logits_are_transformers(variant, tmp_path):
    torch = pytest.importorskip("torch", reason="live parity needs torch, which CI installs")
    from transformers import AutoModelForCausalLM

    raw = HF_CONFIG | VARIANTS[variant]
    config, params = random_model(raw)
    save_model(Model(config, params, raw), tmp_path / "out", shard_bytes=20_000)
    tokens = np.random.default_rng(0).integers(0, 384, (2, 100))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits(config, params, jnp.asarray(tokens)), expected, atol=1e-3)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
def test_saved_and_loaded_is_the_same(config, params, tmp_path, shard_bytes):
    save_model(Model(config, params, HF_CONFIG), tmp_path / "m", shard_bytes=shard_bytes)
    assert (tmp_path / "m" / "model.safetensors.index.json").exists() == (shard_bytes < 1 << 30)
    loaded = load_model(str(tmp_path / "m"))
    assert loaded.config == config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), params, loaded.params))


def test_saving_over_a_sharded_model_leaves_no_stale_file(config, params, tmp_path):
    save_model(Model(config, params, HF_CONFIG), tmp_path / "m", shard_bytes=20_000)
    save_model(Model(config, params, HF_CONFIG), tmp_path / "m")
    assert sorted(p.name for p in tmp_path.joinpath("m").iterdir()) == ["config.json", "model.safetensors"]


def test_bfloat16_export_is_half_the_size(config, params, tmp_path):
    for dtype in ("float32", "bfloat16"):
        save_model(Model(config, params, HF_CONFIG), tmp_path / dtype, dtype=dtype)
    sizes = [(tmp_path / d / "model.safetensors").stat().st_size for d in ("float32", "bfloat16")]
    assert 1.8 < sizes[0] / sizes[1] < 2.2
    back = load_model(str(tmp_path / "bfloat16")).params["embed"]
    np.testing.assert_allclose(back, params["embed"], rtol=1e-2)


def test_remat_changes_memory_and_not_values(config, params):
    batch = random_batch(np.random.default_rng(1), B=2, P=16, C=32)
    deep = dataclasses.replace(config, layers=8)
    params = init_params(deep, seed=1)

    def loss(remat):
        from dpojax.logprobs import pair_logps

        return lambda p: pair_logps(make_apply(deep, remat=remat), p, batch).chosen.sum()

    grads = {remat: jax.jit(jax.grad(loss(remat)))(params) for remat in REMAT}
    memory = {
        remat: jax.jit(jax.grad(loss(remat))).lower(params).compile().memory_analysis().temp_size_in_bytes
        for remat in REMAT
    }
    assert memory["block"] < memory["dots"] < memory["none"]
    assert memory["block"] < memory["attention"] < memory["qkv"] < memory["mlp"] < memory["none"]
    for remat in REMAT:
        for a, b in zip(jax.tree.leaves(grads[remat]), jax.tree.leaves(grads["none"]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_compute_is_close_and_differs(config, params):
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 384, (1, 12)))
    exact, rough = (logits(config, params, tokens, dtype=d) for d in ("float32", "bfloat16"))
    assert not (exact == rough).all()
    assert float(jnp.abs(exact - rough).max()) < 0.1 * float(jnp.abs(exact).max())


def test_completion_mask_comes_from_lengths():
    batch = random_batch(np.random.default_rng(3), B=3, P=2, C=4)
    assert (completion_mask(batch).sum(-1) == batch.completion_len).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported; use a model with gelu, "),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn' is not supported"),
    ],
)
def test_unsupported_models_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        decoder_config(HF_CONFIG | change)


def test_missing_config_field_is_named():
    raw = {k: v for k, v in HF_CONFIG.items() if k != "vocab_size"}
    with pytest.raises(UserError, match="no field 'vocab_size'"):
        decoder_config(raw)


def test_wrong_shape_is_named(config, params, tmp_path):
    save_model(Model(config, params, HF_CONFIG), tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(HF_CONFIG | {"intermediate_size": 96}))
    with pytest.raises(UserError, match=r"gate_proj\.weight has shape \(64, 32\)"):
        load_model(str(tmp_path / "m"))
