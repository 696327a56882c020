"""The optimum and Best-of-N from samples, against a space where both are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax import theory
from dpojax.evaluate import best_of_n_kl, best_of_n_reward, estimate, reward_at, tilted
from experiments.figures import Curve, Frontier, compared, frontier_of, matched, shortfalls

X, Y, M = 40, 30, 4000


@pytest.fixture(scope="module")
def space():
    """Reference and rewards of every completion, and the rewards of M samples of the reference."""
    keys = jax.random.split(jax.random.key(0), 3)
    ref = jax.nn.log_softmax(jax.random.normal(keys[0], (X, Y)), axis=-1)
    rewards = jax.random.uniform(keys[1], (X, Y))
    drawn = jax.random.categorical(keys[2], ref, shape=(M, X)).T
    return ref, rewards, np.asarray(jnp.take_along_axis(rewards, drawn, axis=1))


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.1])
def test_the_optimum_from_samples(space, beta):
    """Reward and KL are the exact optimum's, within three standard errors over prompts."""
    ref, rewards, drawn = space
    best, found = theory.optimal_policy(rewards, ref, beta), tilted(drawn, beta)
    for name, exact in (("reward", theory.expected_reward(best, rewards)), ("kl", theory.kl(best, ref))):
        difference = estimate(getattr(found, name) - np.asarray(exact))
        assert abs(difference.mean) < 3 * difference.error + 1e-3, name
    assert (found.effective <= M).all() and (tilted(drawn, 1e9).effective > 0.999 * M).all()


def test_best_of_n_is_the_mean_over_subsets():
    rewards = np.random.default_rng(0).normal(size=(3, 7))
    for n in range(1, 8):
        subsets = [rewards[:, list(rows)].max(axis=1) for rows in itertools.combinations(range(7), n)]
        np.testing.assert_allclose(best_of_n_reward(rewards, n), np.mean(subsets, axis=0), rtol=1e-12)
    with pytest.raises(ValueError, match="best of 8"):
        best_of_n_reward(rewards, 8)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_best_of_n_is_the_exact_policys(space, n):
    ref, rewards, drawn = space
    policy = theory.best_of_n_policy(rewards, ref, n)
    np.testing.assert_allclose(jnp.exp(policy).sum(axis=1), 1, rtol=1e-5)
    difference = estimate(best_of_n_reward(drawn, n) - np.asarray(theory.expected_reward(policy, rewards)))
    assert abs(difference.mean) < 3 * difference.error + 1e-3
    kl = theory.kl(policy, ref)
    assert float(kl.max()) <= best_of_n_kl(n) + 1e-6
    assert n == 1 or float(kl.min()) > 0.1


def test_ties_share_what_falls_to_them():
    """Two completions of one reward keep their ratio."""
    ref = jnp.log(jnp.array([[0.2, 0.3, 0.5]]))
    p = jnp.exp(theory.best_of_n_policy(jnp.array([[1.0, 1.0, 0.0]]), ref, 2))[0]
    np.testing.assert_allclose(p, [0.75 * 0.4, 0.75 * 0.6, 0.25], rtol=1e-6)


def result(name: str, method: str, seed: int, kl: float, reward: float) -> dict:
    figures = {"kl": kl, "reward": reward, "length": 1.0, "repeated": 0.0, "entropy": 2.0}
    curve = [{"step": 1, **{k: {"mean": v, "error": 0.0, "n": 2} for k, v in figures.items()}}]
    return {"name": f"{name}-seed{seed}", "method": method, "seed": seed, "curve": curve}


def test_rewards_at_matched_kl():
    """By hand, with an optimum of 2 nats' reach: what falls short of it is joined by straight lines in the square root
    of the KL, seed by seed."""
    kls = np.array([0.0, 0.25, 1.0, 2.25, 4.0])
    optimum = Curve(kls, np.sqrt(kls), kls)
    frontier = Frontier(optimum, kls, optimum)
    results = [result("a", "DPO", 0, 1.0, 0.5), result("b", "DPO", 0, 4.0, 1.9), result("a", "DPO", 1, 1.0, 0.7)]
    results += [result("c", "other", seed, 1.0, 0.62) for seed in (0, 1)]
    results += [result("d", "other", seed, 99.0, 5.0) for seed in (0, 1)]  # beyond what is known of the optimum
    table = matched(results, frontier, kls=(0.25, 1.0, 2.25))
    assert table["DPO"]["seeds"] == [[0.25, 0.5, 1.2], [0.35, 0.7, None]]
    assert table["DPO"]["mean"][:2] == [0.3, 0.6] and table["DPO"]["error"][1] == pytest.approx(0.1)
    assert table["DPO"]["mean"][2] is None and table["other"]["mean"] == [0.31, 0.62, None]
    verdicts = compared(table, "DPO", kls=(0.25, 1.0, 2.25))
    assert [(v["other"], v["kl"], v["difference"], v["holds"]) for v in verdicts] == [
        ("other", 0.25, -0.01, True),
        ("other", 1.0, -0.02, True),
    ]
    worse = compared(matched(results, frontier, kls=(1.0,)), "other", kls=(1.0,))
    assert worse[0]["holds"] and worse[0]["difference"] == 0.02
    assert compared(table, "RLOO") == []


def test_how_far_below_the_optimum(space):
    _, _, drawn = space
    frontier = frontier_of(drawn, scale=1.0)
    kl = 0.5
    best = float(reward_at(kl, frontier.optimum.kl, frontier.optimum.reward))
    row = shortfalls([result("a", "DPO", 0, kl, best - 0.05)], frontier)["a"]
    assert row["below the optimum"] == [0.05, None] and row["reward"][0] == pytest.approx(best - 0.05, abs=1e-4)
    order = np.argsort(frontier.optimum.kl)
    assert (np.diff(frontier.optimum.reward[order]) >= -1e-9).all()
    assert np.isnan(reward_at(99.0, frontier.optimum.kl, frontier.optimum.reward))
