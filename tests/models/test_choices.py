"""A decoder's choices beyond the rows that are there: a family unlike Llama is a row too (GPT-2, written here)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.generate import make_sampler, sample_all
from dpojax.logprobs import completion_logps
from dpojax.models import Attention, DecoderConfig, Learned, Mlp, Model, Norm, fingerprint, init_params, make_apply
from dpojax.models.families import FAMILIES, Family, Tensor
from dpojax.models.load import load_model, save_model
from tests.conftest import plain_input, random_batch
from tests.test_logprobs import two_row_logps

RAW = {"model_type": "gpt2", "vocab_size": 384, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48}
RAW |= {"n_positions": 64, "n_ctx": 64, "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"]}


def gpt2_config(raw, source) -> DecoderConfig:
    heads, D = raw["n_head"], raw["n_embd"]
    return DecoderConfig(
        vocab_size=raw["vocab_size"],
        width=D,
        layers=raw["n_layer"],
        attention=Attention(heads=heads, kv_heads=heads, head_dim=D // heads, bias="all"),
        mlp=Mlp(width=raw["n_inner"], act="gelu_tanh", gated=False, bias=True),
        norm=Norm(kind="layer", eps=1e-5, bias=True),
        positions=Learned(size=raw["n_positions"]),
        max_positions=raw["n_positions"],
        tied=True,
    )


def layer(name: str, **form) -> Tensor:
    return Tensor(f"transformer.h.{{}}.{name}", **form)


QKV = {name: layer("attn.c_attn.weight", after=("q", "k", "v")[:i]) for i, name in enumerate(("q", "k", "v"))}
QKV |= {
    f"{name}_bias": layer("attn.c_attn.bias", flat=True, after=("q_bias", "k_bias", "v_bias")[:i])
    for i, name in enumerate(("q", "k", "v"))
}
GPT2 = {
    "embed": Tensor("transformer.wte.weight"),
    "positions": Tensor("transformer.wpe.weight"),
    "final_norm": Tensor("transformer.ln_f.weight"),
    "final_norm_bias": Tensor("transformer.ln_f.bias"),
    **{f"blocks/{name}": tensor for name, tensor in QKV.items()},
    "blocks/o": layer("attn.c_proj.weight", outputs_first=True),  # Conv1D: inputs first, and ours has the width first
    "blocks/o_bias": layer("attn.c_proj.bias"),
    "blocks/up": layer("mlp.c_fc.weight"),
    "blocks/up_bias": layer("mlp.c_fc.bias"),
    "blocks/down": layer("mlp.c_proj.weight", outputs_first=True),
    "blocks/down_bias": layer("mlp.c_proj.bias"),
    **{
        f"blocks/{ours}{kind}": layer(f"{theirs}.{name}")
        for ours, theirs in (("attn_norm", "ln_1"), ("mlp_norm", "ln_2"))
        for kind, name in (("", "weight"), ("_bias", "bias"))
    },
}


@pytest.fixture
def model(monkeypatch) -> Model:
    monkeypatch.setitem(FAMILIES, "gpt2", Family("gpt2", "GPT2", gpt2_config, lambda config: RAW, GPT2))
    config = gpt2_config(RAW, "test")
    leaves, tree = jax.tree.flatten(init_params(config, seed=0))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [x + 0.2 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    return Model(config, jax.tree.unflatten(tree, noise), RAW)


def test_gpt2_is_a_row(model, tmp_path):
    torch = pytest.importorskip("torch", reason="live parity needs torch, which CI installs")
    from transformers import AutoModelForCausalLM

    save_model(model, tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(0, 384, (2, 30))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    h, head = make_apply(model.config)(model.params, plain_input(jnp.asarray(tokens)))
    np.testing.assert_allclose(jnp.einsum("btd,vd->btv", h, head), expected, atol=1e-4 * np.abs(expected).max())
    assert fingerprint(load_model(str(tmp_path / "m")).params) == fingerprint(model.params)


@pytest.mark.parametrize("residual", ["pre", "post", "pre_post", "parallel"])
def test_sampling_and_shared_prompts_run_the_same_block(model, residual):
    config = dataclasses.replace(model.config, residual=residual)
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 2 else x, init_params(config, seed=2))
    batch = random_batch(np.random.default_rng(0), B=2, P=5, C=6)
    apply_fn = make_apply(config)
    slow = two_row_logps(apply_fn, params, batch)
    np.testing.assert_allclose(completion_logps(apply_fn, params, batch), slow, rtol=2e-5, atol=1e-4)
    sampler = make_sampler(config, max_new_tokens=6, eos_ids=(), temperature=0.0)
    prompt = [5, 6, 7, 8]
    ((drawn,),) = sample_all(sampler, params, [prompt], batch_size=1, seed=0).lists()
    h, head = apply_fn(params, plain_input(jnp.array([prompt + drawn])))
    assert (h[0] @ head.T).argmax(axis=-1)[len(prompt) - 1 : -1].tolist() == drawn
