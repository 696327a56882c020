"""Log-probabilities: the shared prompt against two separate rows, masks, precision, and memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.logprobs import chunked_logps, pair_logps
from dpojax.losses import ipo, sigmoid
from dpojax.models import make_apply
from tests.conftest import random_batch


def two_row_logps(apply_fn, params, batch):
    """The slow form: every completion in a row of its own behind its prompt, all logits at once."""
    out = np.zeros((batch.completions.shape[0], batch.completions.shape[1]), object)
    for b, n in np.ndindex(*out.shape):
        P, C = int(batch.prompt_len[b]), int(batch.completion_len[b, n])
        tokens = jnp.concatenate([batch.prompt[b, -P:], batch.completions[b, n, :C]])[None]
        h, head = apply_fn(params, tokens, jnp.arange(P + C)[None], jnp.zeros((1, P + C), jnp.int32))
        logps = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", h, head), axis=-1)
        out[b, n] = jnp.take_along_axis(logps[0, P - 1 : -1], tokens[0, P:, None], axis=-1).sum()
    return jnp.stack([jnp.stack(list(row)) for row in out])


@pytest.fixture(scope="module")
def batch():
    return random_batch(np.random.default_rng(0), B=3, P=7, C=6)


def test_shared_prompt_equals_two_rows(config, params, batch):
    apply_fn = make_apply(config)
    slow = two_row_logps(apply_fn, params, batch)
    fast = pair_logps(apply_fn, params, batch, chunk_tokens=8)
    np.testing.assert_allclose(jnp.stack([fast.chosen, fast.rejected], 1), slow, rtol=1e-5)
    assert (fast.chosen_len == batch.completion_len[:, 0]).all()
    assert (fast.rejected_len == batch.completion_len[:, 1]).all()


@pytest.mark.parametrize("objective", [sigmoid, ipo])
def test_shared_prompt_has_the_gradient_of_two_rows(config, params, batch, objective):
    apply_fn = make_apply(config)
    ref = jax.tree.map(lambda x: x * 0 - 20, pair_logps(apply_fn, params, batch))

    def slow(p):
        sums = two_row_logps(apply_fn, p, batch)
        policy = dataclasses.replace(ref, chosen=sums[:, 0], rejected=sums[:, 1])
        return objective(with_lengths(policy, batch), ref).mean()

    def fast(p):
        return objective(with_lengths(pair_logps(apply_fn, p, batch), batch), ref).mean()

    for a, b in zip(jax.tree.leaves(jax.grad(fast)(params)), jax.tree.leaves(jax.grad(slow)(params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.abs(b).max()))


def with_lengths(pair, batch):
    return dataclasses.replace(pair, chosen_len=batch.completion_len[:, 0], rejected_len=batch.completion_len[:, 1])


def test_padding_never_matters(config, params, batch):
    """Other token ids in the padding, more padding, rows that are all padding: the same sums, and finite gradients."""
    apply_fn = make_apply(config)
    plain = pair_logps(apply_fn, params, batch)
    wide = jax.tree.map(jnp.asarray, batch)
    wide = dataclasses.replace(
        wide,
        prompt=jnp.pad(batch.prompt, ((0, 0), (3, 0)), constant_values=77),
        completions=jnp.pad(batch.completions, ((0, 0), (0, 0), (0, 5)), constant_values=99),
    )
    padded = pair_logps(apply_fn, params, wide)
    np.testing.assert_allclose(padded.chosen, plain.chosen, rtol=1e-5)
    np.testing.assert_allclose(padded.rejected, plain.rejected, rtol=1e-5)

    empty = dataclasses.replace(batch, prompt_len=batch.prompt_len * 0, completion_len=batch.completion_len * 0)
    grads = jax.grad(lambda p: pair_logps(apply_fn, p, empty).chosen.sum())(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_masked_nan_has_no_gradient():
    h = jnp.ones((1, 1, 4, 8)).at[0, 0, 3].set(jnp.nan)
    mask = jnp.arange(4)[None, None] < 3
    targets = jnp.zeros((1, 1, 4), jnp.int32)
    head = jnp.ones((5, 8))
    f = lambda h, w: chunked_logps(h, w, targets, mask, chunk_tokens=2).sum()  # noqa: E731
    value, grads = jax.value_and_grad(f, argnums=(0, 1))(h, head)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 7, 1000])
def test_chunks_do_not_change_the_sum(chunk_tokens):
    rng = np.random.default_rng(1)
    h = jnp.asarray(rng.normal(size=(2, 2, 9, 16)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(50, 16)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 50, (2, 2, 9)))
    mask = jnp.asarray(rng.random((2, 2, 9)) < 0.7)
    logps = jax.nn.log_softmax(jnp.einsum("bncd,vd->bncv", h, head), axis=-1)
    whole = jnp.where(mask, jnp.take_along_axis(logps, targets[..., None], -1)[..., 0], 0).sum(-1)
    np.testing.assert_allclose(chunked_logps(h, head, targets, mask, chunk_tokens=chunk_tokens), whole, rtol=1e-5)


def test_logsumexp_is_float32_under_bfloat16():
    # 4096 equal logits: bfloat16 accumulation could not count them.
    h, head = jnp.ones((1, 1, 1, 8), jnp.bfloat16), jnp.ones((4096, 8))
    targets, mask = jnp.zeros((1, 1, 1), jnp.int32), jnp.ones((1, 1, 1), bool)
    got = chunked_logps(h, head, targets, mask, chunk_tokens=1)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, -np.log(4096), rtol=1e-6)


def test_no_array_of_all_logits_exists():
    """Compiled forward and backward: temporary memory is a few chunks of logits, and grows with the chunk."""
    B, N, C, D, V = 2, 2, 64, 16, 8192
    h = jax.ShapeDtypeStruct((B, N, C, D), jnp.float32)
    head = jax.ShapeDtypeStruct((V, D), jnp.float32)
    targets, mask = jax.ShapeDtypeStruct((B, N, C), jnp.int32), jax.ShapeDtypeStruct((B, N, C), bool)
    all_logits = B * N * C * V * 4

    def temporary(chunk_tokens):
        f = functools.partial(chunked_logps, chunk_tokens=chunk_tokens)
        grad = jax.grad(lambda h, w, t, m: f(h, w, t, m).sum(), argnums=(0, 1))
        return jax.jit(grad).lower(h, head, targets, mask).compile().memory_analysis().temp_size_in_bytes

    small, large, whole = temporary(8), temporary(64), temporary(B * N * C)
    assert whole > all_logits  # the measure sees the array where it does exist
    assert large < 0.75 * all_logits
    assert small < 0.25 * all_logits
    assert small < large < whole
