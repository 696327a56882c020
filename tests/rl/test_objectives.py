"""The objectives against their definitions in NumPy loops, and their expected gradients against that of J itself."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax import theory
from dpojax.logprobs import completion_stats, completion_values
from dpojax.models import init_params, make_apply
from dpojax.rl.objectives import (
    gae,
    leave_one_out,
    ppo_loss,
    rloo_loss,
    shaped_rewards,
    token_mask,
    token_rewards,
    value_loss,
)
from dpojax.rl.program import value_config
from tests.rl.small import CONFIG, LENGTHS, PARAMS, PROMPTS, REWARD, TOKENS, C, Y, batch_of, table

BETA, EPS = 0.7, 0.2


@pytest.fixture(scope="module")
def case():
    """Three prompts with four samples each of up to five tokens, and a policy that has moved since."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 6, (3, 4))
    inside = np.arange(5) < lengths[..., None]
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    of_tokens = {name: draw(3, 4, 5) * inside for name in ("old", "ref", "new", "values", "new_values")}
    arrays = {"rewards": draw(3, 4), "lengths": lengths, "inside": inside, **of_tokens}
    return {name: jnp.asarray(x) for name, x in arrays.items()}


def test_rewards_and_baseline_by_loops(case):
    shaped = shaped_rewards(case["rewards"], case["old"], case["ref"], BETA)
    tokens = token_rewards(case["rewards"], case["old"], case["ref"], case["lengths"], BETA)
    advantages = leave_one_out(shaped)
    case = jax.tree.map(np.asarray, case)
    for b, i in np.ndindex(3, 4):
        n, ratio = case["lengths"][b, i], case["old"][b, i] - case["ref"][b, i]
        assert shaped[b, i] == pytest.approx(case["rewards"][b, i] - BETA * ratio.sum(), abs=1e-5)
        expected = [-BETA * ratio[t] + (case["rewards"][b, i] if t == n - 1 else 0) for t in range(n)]
        np.testing.assert_allclose(tokens[b, i], expected + [0] * (5 - n), atol=1e-6)
        others = [float(shaped[b, j]) for j in range(4) if j != i]
        assert advantages[b, i] == pytest.approx(float(shaped[b, i]) - np.mean(others), abs=1e-5)
    with pytest.raises(ValueError, match="draw 2 or more"):
        leave_one_out(jnp.ones((3, 1)))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_advantages_are_the_sums_of_their_definition(case, gamma, lam):
    """Generalised advantages as the weighted mean of k-step advantages, each from the rewards themselves."""
    got = gae(
        case["ref"], jnp.where(case["inside"], case["values"], 7.0), case["inside"], gamma, lam
    )  # what lies beyond the end counts for nothing
    case = jax.tree.map(np.asarray, case)
    rewards, values = case["ref"], case["values"]
    for b, i in np.ndindex(3, 4):
        n = case["lengths"][b, i]
        r, v = rewards[b, i, :n], np.append(values[b, i, :n], 0.0)
        for t in range(n):
            left = n - t
            steps = [
                sum(gamma**j * r[t + j] for j in range(k)) + gamma**k * v[t + k] - v[t] for k in range(1, left + 1)
            ]
            weights = [(1 - lam) * lam ** (k - 1) for k in range(1, left)] + [lam ** (left - 1)]
            assert got[b, i, t] == pytest.approx(np.dot(weights, steps), abs=1e-5)
        assert not np.asarray(got[b, i, n:]).any()


def test_clipped_losses_by_loops(case):
    advantages, returns = case["values"], case["ref"]
    whole = rloo_loss(case["new"], case["old"], case["rewards"], EPS)
    single = ppo_loss(case["new"], case["old"], advantages, EPS)
    of_values = value_loss(case["new_values"], case["values"], returns, case["inside"], EPS)
    case, advantages, returns = jax.tree.map(np.asarray, (case, advantages, returns))
    bounded = lambda q, a: min(q * a, min(max(q, 1 - EPS), 1 + EPS) * a)  # noqa: E731
    for b, i in np.ndindex(3, 4):
        n, q = case["lengths"][b, i], np.exp(case["new"][b, i] - case["old"][b, i])
        assert whole[b, i] == pytest.approx(-bounded(q.prod(), case["rewards"][b, i]), rel=1e-4)
        assert single[b, i] == pytest.approx(-sum(bounded(q[t], advantages[b, i, t]) for t in range(n)), rel=1e-4)
        v, old, aim = (x[b, i, :n] for x in (case["new_values"], case["values"], returns))
        worse = np.maximum((v - aim) ** 2, (np.clip(v, old - EPS, old + EPS) - aim) ** 2)
        assert of_values[b, i] == pytest.approx(worse.sum() / 2, rel=1e-4)


@jax.jit
def logps_of(batch, params):
    return completion_stats(make_apply(CONFIG), params, batch, reads=frozenset({"tokens"})).tokens


@pytest.fixture(scope="module")
def pairs():
    """Every pair of completions of a prompt, how likely a policy that is not the reference draws each, and the gradient
    of -J at this policy, through the table of all completions."""
    x, pairs = 1, np.array(list(itertools.product(range(Y), repeat=2)))
    moved = jax.tree.map(lambda p, q: 0.8 * p + 0.4 * q, PARAMS, init_params(CONFIG, seed=1))
    reference = table(PARAMS)

    @jax.jit
    @jax.grad
    def gradient(params):
        return -theory.regularised_objective(table(params), REWARD, reference, BETA)[x]

    batch = batch_of(TOKENS[pairs], LENGTHS[pairs], [PROMPTS[x]] * len(pairs))
    return {
        "batch": batch,
        "policy": moved,
        "gradient": gradient(moved),
        "chance": jnp.exp(table(moved))[x][pairs].prod(axis=1),
        "rewards": REWARD[x][pairs],
        "old": logps_of(batch, moved),
        "ref": logps_of(batch, PARAMS),
    }


def assert_expected_gradient(pairs, losses_of):
    """The gradient of losses [B, n], weighted by the chance of their pairs, is that of -J."""

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(pairs["chance"] * losses_of(logps_of(pairs["batch"], params)).mean(axis=1))

    want = pairs["gradient"]
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    assert scale > 0.05
    close = functools.partial(np.testing.assert_allclose, atol=2e-5 * scale)
    jax.tree.map(close, gradient(pairs["policy"]), want)


def test_the_expected_gradient_of_rloo_is_that_of_the_objective(pairs):
    advantages = leave_one_out(shaped_rewards(pairs["rewards"], pairs["old"], pairs["ref"], BETA))
    assert_expected_gradient(pairs, lambda logps: rloo_loss(logps, pairs["old"], advantages))


def test_the_expected_gradient_of_ppo_is_that_of_the_objective(pairs):
    """At lambda 1, whatever the value model says: a value that had seen its own token would make it another."""
    shape, batch = value_config(CONFIG), pairs["batch"]
    critic = jax.tree.map(lambda x: 5 * x, init_params(shape, seed=2)) | {"score": jnp.ones((1, CONFIG.width))}
    values = jax.jit(functools.partial(completion_values, make_apply(shape)))(critic, batch)
    assert float(jnp.abs(values).max()) > 1 and not values[0, 0, 1]  # the first completion has one token
    rewards = token_rewards(pairs["rewards"], pairs["old"], pairs["ref"], batch.completion_len, BETA)
    advantages = gae(rewards, values, token_mask(batch.completion_len, C), lam=1.0)
    assert_expected_gradient(pairs, lambda logps: ppo_loss(logps, pairs["old"], advantages))
