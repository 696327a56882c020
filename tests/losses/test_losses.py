"""Objectives against theory, extremes and finite differences."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.losses import LOSSES, bound, hinge, implicit_rewards, ipo, sft, sigmoid, weighted_sum
from dpojax.types import PairLogps

BOUND = {
    name: bound(f, beta=0.1) for name, f in LOSSES.items()
}  # every objective by name, so that a new one cannot miss these tests


def pair(chosen, rejected, chosen_len, rejected_len, dtype=jnp.float32) -> PairLogps:
    lengths = (jnp.asarray(chosen_len, jnp.int32), jnp.asarray(rejected_len, jnp.int32))
    return PairLogps(jnp.asarray(chosen, dtype), jnp.asarray(rejected, dtype), *lengths)


def random_pair(seed: int, B: int = 5, scale: float = 1.0) -> tuple[PairLogps, PairLogps]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, (2, B))
    policy, ref = -rng.gamma(4.0, 5.0, (2, 2, B))
    return pair(*policy * scale, *lengths), pair(*ref * scale, *lengths)


def test_equal_policies_give_the_exact_constants():
    policy, _ = random_pair(0)
    assert (sigmoid(policy, policy, beta=0.3) == jnp.float32(math.log(2))).all()
    assert (hinge(policy, policy, beta=0.3) == 1).all()
    np.testing.assert_allclose(ipo(policy, policy, beta=0.3), 1 / (4 * 0.3**2), rtol=1e-6)
    chosen, rejected = implicit_rewards(policy, policy, beta=0.3)
    assert (chosen == 0).all() and (rejected == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_label_smoothing_is_the_expectation_over_flips(smoothing):
    policy, ref = random_pair(1)

    def swapped(p):
        return PairLogps(p.rejected, p.chosen, p.rejected_len, p.chosen_len)

    expected = (1 - smoothing) * sigmoid(policy, ref) + smoothing * sigmoid(swapped(policy), swapped(ref))
    np.testing.assert_allclose(sigmoid(policy, ref, label_smoothing=smoothing), expected, rtol=1e-6)


def test_smoothed_loss_is_least_where_its_theory_says():
    # d/dh = 0 at sigma(beta h) = 1 - epsilon
    beta, epsilon = 0.5, 0.2
    h = math.log((1 - epsilon) / epsilon) / beta
    one = pair([h], [0.0], [1], [1]), pair([0.0], [0.0], [1], [1])
    grad = jax.grad(lambda p: sigmoid(p, one[1], beta=beta, label_smoothing=epsilon).sum(), allow_int=True)(one[0])
    assert abs(float(grad.chosen[0])) < 1e-6


def test_ipo_forms_differ_by_length_only():
    policy, ref = random_pair(2)
    ones = jnp.ones_like(policy.chosen_len)
    unit = [PairLogps(p.chosen, p.rejected, ones, ones) for p in (policy, ref)]
    summed = ipo(policy, ref, beta=0.2, length_normalize=False)
    np.testing.assert_allclose(summed, ipo(*unit, beta=0.2), rtol=1e-6)
    assert not np.allclose(summed, ipo(policy, ref, beta=0.2))


def test_sft_mean_is_over_tokens_and_micro_batches_agree():
    policy, ref = random_pair(3, B=6)
    total = -policy.chosen.sum() / policy.chosen_len.sum()
    np.testing.assert_allclose(sft(policy, ref).mean(), total, rtol=1e-6)
    mean_len = policy.chosen_len.mean()
    halves = [jax.tree.map(lambda x, s=s: x[s], policy) for s in (slice(0, 3), slice(3, 6))]
    parts = [sft(PairLogps(h.chosen, h.rejected, h.chosen_len, h.rejected_len, mean_len), ref) for h in halves]
    np.testing.assert_allclose(jnp.concatenate(parts), sft(policy, ref), rtol=1e-6)


def test_weighted_sum_is_an_objective_and_composes():
    policy, ref = random_pair(4)
    inner = weighted_sum((1.0, BOUND["sigmoid"]), (0.2, sft))
    outer = weighted_sum((0.5, inner), (2.0, BOUND["ipo"]))
    expected = 0.5 * (sigmoid(policy, ref) + 0.2 * sft(policy, ref)) + 2 * ipo(policy, ref)
    np.testing.assert_allclose(outer(policy, ref), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="at least one"):
        weighted_sum()


@pytest.mark.parametrize("name", LOSSES)
def test_jit_is_eager(name):
    policy, ref = random_pair(5)
    np.testing.assert_allclose(jax.jit(BOUND[name])(policy, ref), BOUND[name](policy, ref), rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_one_loss_a_pair_and_rows_do_not_mix(name):
    policy, ref = random_pair(6, B=4)
    mean_len = policy.chosen_len.mean()
    policy = PairLogps(policy.chosen, policy.rejected, policy.chosen_len, policy.rejected_len, mean_len)
    losses = BOUND[name](policy, ref)
    assert losses.shape == (4,) and losses.dtype == jnp.float32
    changed = PairLogps(
        policy.chosen.at[0].add(-3.0), policy.rejected, policy.chosen_len, policy.rejected_len, mean_len
    )
    assert (BOUND[name](changed, ref)[1:] == losses[1:]).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extremes_are_finite(name, extreme):
    policy = pair([extreme], [-extreme], [3], [4])
    ref = pair([0.0], [0.0], [3], [4])
    value, grads = jax.value_and_grad(lambda p: BOUND[name](p, ref).sum(), allow_int=True)(policy)
    assert np.isfinite(value) and np.isfinite(grads.chosen).all() and np.isfinite(grads.rejected).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_against_finite_differences(name):
    with jax.enable_x64(True):
        rng = np.random.default_rng(7)
        lengths = rng.integers(1, 9, (2, 5))
        policy_x, ref_x = -rng.gamma(4.0, 5.0, (2, 2, 5))
        ref = pair(*ref_x, *lengths, dtype=jnp.float64)

        def f(x):
            return BOUND[name](pair(x[0], x[1], *lengths, dtype=jnp.float64), ref).sum()

        grad = jax.grad(f)(jnp.asarray(policy_x))
        step = 1e-6
        for i, j in np.ndindex(2, 5):
            bump = np.zeros((2, 5))
            bump[i, j] = step
            slope = (f(jnp.asarray(policy_x + bump)) - f(jnp.asarray(policy_x - bump))) / (2 * step)
            np.testing.assert_allclose(grad[i, j], slope, atol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "hinge"])
def test_loss_falls_as_the_margin_grows(name):
    margins = jnp.linspace(-30.0, 30.0, 61)
    zeros, ones = jnp.zeros(61), jnp.ones(61, jnp.int32)
    losses = BOUND[name](PairLogps(margins, zeros, ones, ones), PairLogps(zeros, zeros, ones, ones))
    assert (jnp.diff(losses) <= 0).all() and losses[0] > losses[-1]
