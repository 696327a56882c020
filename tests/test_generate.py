"""Sampling: the cache against no cache, the drawn distribution against the model's, and where completions end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.configs import MeshConfig
from dpojax.generate import DrawOptions, make_sampler, next_token, pad_left, sample_all
from dpojax.generate.sampler import Decoding
from dpojax.models import init_params, make_apply, param_shardings
from dpojax.models.config import LayerKind
from dpojax.sharding import make_mesh
from tests.conftest import plain_input
from tests.test_stop import Letters

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]


def logits(config, params, row):
    h, head = make_apply(config)(params, plain_input(jnp.array([row])))
    return h[0] @ head.T


def test_greedy_with_cache_is_greedy_without(config, params):
    sampler = make_sampler(config, max_new_tokens=7, eos_ids=(), temperature=0.0)
    got = sample_all(sampler, params, PROMPTS, batch_size=2, seed=0).lists()
    for prompt, (completion,) in zip(PROMPTS, got, strict=True):
        best = logits(config, params, prompt + completion).argmax(axis=-1)
        assert best[len(prompt) - 1 : -1].tolist() == completion


@pytest.mark.parametrize("window", [1, 3, 8, 11, 14, 40])
def test_a_windows_cache_is_as_long_as_the_window(window, config):
    """Prompts of 5, 1 and 3 tokens in 8 columns and 7 new tokens: windows below, between and above these."""
    kinds = (LayerKind(window=window), LayerKind())
    config = dataclasses.replace(config, layers=3, kinds=kinds, kind_of_layer=(0, 1, 0))
    params = jax.tree.map(lambda x: x if (x == 1).all() else 10 * x, init_params(config, seed=1))
    sampler = make_sampler(config, max_new_tokens=7, eos_ids=(), num_samples=2)
    drawn = sample_all(sampler, params, PROMPTS, batch_size=3, seed=0)
    for i, prompt in enumerate(PROMPTS):
        for k, completion in enumerate(drawn.lists()[i]):
            logps = jax.nn.log_softmax(logits(config, params, prompt + completion))[len(prompt) - 1 : -1]
            expected = np.take_along_axis(np.asarray(logps), np.array(completion)[:, None], axis=1)[:, 0]
            np.testing.assert_allclose(drawn.logps[i, k], expected, atol=1e-4)
    decoding = Decoding(config, 7, (), 2, DrawOptions(), jnp.dtype("float32"))
    prompt = map(jnp.asarray, pad_left(PROMPTS, 8))
    caches = jax.eval_shape(lambda *inputs: decoding.begin(*inputs)[1].caches, params, *prompt, jax.random.key(0))
    assert [values.shape[2] for _, values in caches] == [min(window, 15), 15, min(window, 15)]


def test_samples_follow_the_models_distribution(config, params):
    n = 4000
    sampler = make_sampler(config, max_new_tokens=1, eos_ids=())
    drawn = sample_all(sampler, params, [PROMPTS[0]] * n, batch_size=1000, seed=0)
    counts = np.bincount(drawn.tokens[:, 0, 0], minlength=config.vocab_size)
    probs = np.asarray(jax.nn.softmax(logits(config, params, PROMPTS[0])[-1]))
    error = np.sqrt(probs * (1 - probs) / n)
    assert (np.abs(counts / n - probs) < 5 * error + 1e-3).all()


def test_an_eos_ends_a_completion_and_counts(config, params):
    greedy = make_sampler(config, max_new_tokens=7, eos_ids=(), temperature=0.0)
    free = [row for (row,) in sample_all(greedy, params, PROMPTS, batch_size=3, seed=0).lists()]
    eos = free[0][2]
    ended = make_sampler(config, max_new_tokens=7, eos_ids=(eos,), temperature=0.0)
    got = sample_all(ended, params, PROMPTS, batch_size=3, seed=0)
    for (a,), b in zip(got.lists(), free, strict=True):
        assert a == (b[: b.index(eos) + 1] if eos in b else b)
    assert got.ended[:, 0].tolist() == [eos in b for b in free]


def test_seeds_and_order(config, params):
    sampler = make_sampler(config, max_new_tokens=5, eos_ids=(1,))
    a, b, c = (sample_all(sampler, params, PROMPTS, batch_size=2, seed=s).lists() for s in (0, 0, 1))
    assert a == b != c and len(a) == 3


def test_temperature_and_nucleus():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 2000)

    def drawn(**options):
        return np.bincount(
            np.asarray(jax.vmap(lambda k: next_token(logits, k, **options)[0])(keys)), minlength=4
        ) / len(keys)

    np.testing.assert_allclose(drawn(temperature=1.0, top_p=0.8), [0.625, 0.375, 0, 0], atol=0.04)
    np.testing.assert_allclose(drawn(temperature=1.0, top_p=0.81), [0.526, 0.316, 0.158, 0], atol=0.04)
    squared = np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365
    np.testing.assert_allclose(drawn(temperature=0.5, top_p=1.0), squared, atol=0.04)
    assert (drawn(temperature=0.0, top_p=1.0) == [1, 0, 0, 0]).all()


def test_pad_left():
    rows, lengths = pad_left([[1, 2], [3]], 3)
    assert rows.tolist() == [[0, 1, 2], [0, 0, 3]] and lengths.tolist() == [2, 1]


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_compute_dtype_reaches_the_cache(config, params, dtype):
    sampler = make_sampler(config, max_new_tokens=2, eos_ids=(), temperature=0.0, dtype=dtype)
    text = sampler.lower(params, jnp.ones((1, 3), jnp.int32), jnp.array([3]), jax.random.key(0)).as_text()
    assert "1x2x5x8xbf16" in text


@pytest.mark.parametrize("more", [{}, {"top_k": 5, "repetition_penalty": 1.1, "stop": ("h",), "tokenizer": Letters()}])
def test_samples_on_a_mesh_are_those_of_one_device(config, params, more):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    options = {"max_new_tokens": 6, "eos_ids": (1,), "num_samples": 2}
    options |= more
    prompts = [*PROMPTS, [20, 21]]
    alone = sample_all(make_sampler(config, **options), params, prompts, batch_size=4, seed=0)
    spread = jax.tree.map(jax.device_put, params, param_shardings(mesh, config))
    there = sample_all(make_sampler(config, **options, mesh=mesh), spread, prompts, batch_size=4, seed=0)
    assert there.lists() == alone.lists() and alone.tokens.shape == (4, 2, 6)
    np.testing.assert_allclose(there.logps, alone.logps, atol=1e-4)
