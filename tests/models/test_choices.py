"""Choices that no other test sees: bare decoders' files, learned positions, every residual form."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import ByT5Tokenizer

from dpojax.data import Batches, Example
from dpojax.errors import UserError
from dpojax.generate import make_sampler, sample_all
from dpojax.logprobs import completion_logps
from dpojax.models import Learned, Model, fingerprint, init_params, load_model, load_tokenizer, make_apply
from dpojax.train.inputs import check_fit
from tests.conftest import plain_input, random_batch
from tests.models.families import FAMILIES as TINY
from tests.models.families import GPT2
from tests.models.test_families import random_model
from tests.models.test_quantized import saved, tensors_of
from tests.test_logprobs import two_row_logps


@pytest.fixture
def model() -> Model:
    return random_model(GPT2)


def test_a_bare_decoder_is_read_by_the_names_it_has(model, tmp_path):
    """GPT-2's files on the hub lack the base's name, and hold the causal masks."""
    tensors = {name.removeprefix("transformer."): x for name, x in tensors_of(model).items()}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 512, 512), np.float32)
    directory = saved(tmp_path / "m", tensors)
    (tmp_path / "m" / "config.json").write_text(json.dumps(GPT2))
    assert fingerprint(load_model(directory).params) == fingerprint(model.params)
    assert load_model(directory).config == model.config


def test_rows_beyond_the_learned_positions_are_refused(model):
    rows = [Example(np.arange(500, dtype=np.int32) % 300, (np.arange(13, dtype=np.int32),) * 2)]
    examples = Batches(rows, 1).examples
    check_fit(dataclasses.replace(model.config, positions=Learned(size=513)), [examples], "x")
    with pytest.raises(UserError, match="x: a row has 513 tokens, the model has positions for 512; lower --max-length"):
        check_fit(model.config, [examples], "x")


@pytest.mark.parametrize("residual", ["pre", "post", "pre_post", "parallel", "parallel_shared"])
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


@pytest.mark.parametrize("family", ["qwen2", "mistral", "llama"])
def test_a_tokenizer_is_of_the_class_that_it_names(family, tmp_path):
    """transformers' AutoTokenizer gives Qwen2's class here, which has read no token."""
    ByT5Tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY[family]))
    assert load_tokenizer(str(tmp_path))("a film").input_ids == ByT5Tokenizer()("a film").input_ids


def test_a_tokenizer_without_tokens_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY["qwen2"]))
    with pytest.raises(UserError, match=r"no usable tokenizer|its tokenizer has no tokens"):
        load_tokenizer(str(tmp_path))
