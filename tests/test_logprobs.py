"""Log-probabilities: the shared prompt against two separate rows, masks, precision, and memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.logprobs import completion_logps, logits_of, pair_logps, token_logps
from dpojax.losses import ipo, sigmoid
from dpojax.models import make_apply
from dpojax.packing import pack
from tests.conftest import plain_input, random_batch


def two_row_logps(apply_fn, params, batch):
    """The slow form: every completion in a row of its own behind its prompt, all logits at once."""
    out = np.zeros((batch.completions.shape[0], batch.completions.shape[1]), object)
    for b, n in np.ndindex(*out.shape):
        P, C = int(batch.prompt_len[b]), int(batch.completion_len[b, n])
        tokens = jnp.concatenate([batch.prompt[b, -P:], batch.completions[b, n, :C]])[None]
        h, head = apply_fn(params, plain_input(tokens))
        logps = jax.nn.log_softmax(logits_of(h, head), axis=-1)
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


@pytest.mark.parametrize("N", [1, 3, 4])
@pytest.mark.parametrize("sequences", [1, 2])
def test_any_number_of_completions_shares_the_prompt(config, params, N, sequences):
    batch = random_batch(np.random.default_rng(N), B=4, P=5, C=6, N=N, sequences=sequences)
    apply_fn = make_apply(config)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(4, N)), jnp.float32)
    fast = jax.value_and_grad(lambda p: (completion_logps(apply_fn, p, batch) * weights).sum())(params)
    slow = jax.value_and_grad(lambda p: (two_row_logps(apply_fn, p, batch) * weights).sum())(params)
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.abs(b).max()))


def test_padding_never_matters(config, params, batch):
    """Other token ids in the padding, no packing, more padding, empty rows: the same sums, and finite gradients."""
    apply_fn = make_apply(config)
    plain = pair_logps(apply_fn, params, batch)
    wide = dataclasses.replace(
        batch,
        prompt=jnp.pad(batch.prompt, ((0, 0), (3, 0)), constant_values=77),
        completions=jnp.pad(batch.completions, ((0, 0), (0, 0), (0, 5)), constant_values=99),
        packing=None,
    )
    loose = pack(np.asarray(batch.prompt_len), np.asarray(batch.completion_len), 7, 6, sequences=3, T=40, Z=30)
    for padded in (wide, dataclasses.replace(batch, packing=jax.tree.map(jnp.asarray, loose))):
        got = pair_logps(apply_fn, params, padded)
        np.testing.assert_allclose(got.chosen, plain.chosen, rtol=1e-5)
        np.testing.assert_allclose(got.rejected, plain.rejected, rtol=1e-5)

    empty = dataclasses.replace(wide, prompt_len=batch.prompt_len * 0, completion_len=batch.completion_len * 0)
    grads = jax.grad(lambda p: pair_logps(apply_fn, p, empty).chosen.sum())(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_masked_nan_has_no_gradient(config, params, batch):
    """Hidden states of padding may be anything: nothing that is computed depends on them."""

    def poisoned(p, inputs):
        h, head = make_apply(config)(p, inputs)
        return jnp.where((inputs.padded_index < inputs.packed_index.shape[1])[..., None], h, jnp.nan), head

    loose = pack(np.asarray(batch.prompt_len), np.asarray(batch.completion_len), 7, 6, sequences=1, T=90, Z=60)
    wide = dataclasses.replace(batch, packing=jax.tree.map(jnp.asarray, loose))
    value, grads = jax.value_and_grad(lambda p: pair_logps(poisoned, p, wide).chosen.sum())(params)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("chunk_tokens", [1, 5, 7, 1000])
def test_chunks_change_neither_values_nor_gradients(chunk_tokens):
    rng = np.random.default_rng(1)
    h = jnp.asarray(rng.normal(size=(2, 9, 16)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(50, 16)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 50, (2, 9)))
    weights = jnp.asarray(rng.normal(size=(2, 9)), jnp.float32)

    def plain(h, head):
        logps = jax.nn.log_softmax(jnp.einsum("rzd,vd->rzv", h, head), axis=-1)
        return (weights * jnp.take_along_axis(logps, targets[..., None], -1)[..., 0]).sum()

    def chunked(h, head):
        return (weights * token_logps(h, head, targets, chunk_tokens)).sum()

    got, expected = (jax.value_and_grad(f, argnums=(0, 1))(h, head) for f in (chunked, plain))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_logsumexp_is_float32_under_bfloat16():
    # 4096 equal logits: bfloat16 accumulation could not count them.
    h, head = jnp.ones((1, 1, 8), jnp.bfloat16), jnp.ones((4096, 8))
    got = token_logps(h, head, jnp.zeros((1, 1), jnp.int32), 1)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, -np.log(4096), rtol=1e-6)


def test_no_array_of_all_logits_exists():
    """Compiled forward and backward: temporary memory is a few chunks of logits, and grows with the chunk."""
    R, Z, D, V = 2, 128, 16, 8192
    h, head = jax.ShapeDtypeStruct((R, Z, D), jnp.float32), jax.ShapeDtypeStruct((V, D), jnp.float32)
    targets = jax.ShapeDtypeStruct((R, Z), jnp.int32)
    all_logits = R * Z * V * 4

    def temporary(chunk_tokens):
        grad = jax.grad(lambda h, w, t: token_logps(h, w, t, chunk_tokens).sum(), argnums=(0, 1))
        return jax.jit(grad).lower(h, head, targets).compile().memory_analysis().temp_size_in_bytes

    small, large, whole = temporary(8), temporary(32), temporary(R * Z)
    assert whole > all_logits  # the measure sees the array where it does exist
    assert large < 0.75 * all_logits
    assert small < 0.25 * all_logits
    assert small < large < whole
