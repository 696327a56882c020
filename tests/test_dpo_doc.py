"""The derivation in docs/dpo.md: what it names is there, and the proofs that no other test has."""

import importlib
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax import theory
from dpojax.evaluate import best_of_n_kl, best_of_n_reward
from tests.test_theory import BETAS, random_policy, space

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "dpo.md").read_text()


def test_every_function_and_test_named_is_there():
    functions = re.findall(r"`(dpojax(?:\.\w+)+)\.(\w+)`", PAGE)
    tests = re.findall(r"`(tests/[\w/.]+)::(\w+)`", PAGE)
    assert len(functions) > 25 and len(tests) > 20
    for module, name in functions:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    for file, name in tests:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_equations_of_the_paper_are_all_there_and_math_is_closed():
    for number in range(1, 11):
        assert re.search(rf"[Ee]quations? {number}\b", PAGE), number
    assert PAGE.count("$$") % 2 == 0
    assert re.sub(r"\$\$.*?\$\$", "", PAGE, flags=re.DOTALL).count("$") % 2 == 0
    assert PAGE.count("{") == PAGE.count("}")
    # What Markdown takes for an escape would lose its backslash.
    formulas = re.findall(r"\$\$.*?\$\$|\$[^$]+\$", PAGE, flags=re.DOTALL)
    assert len(formulas) > 50 and not any(re.search(r"\\[^a-zA-Z\s]", formula) for formula in formulas)


def shifted(reward: jax.Array) -> jax.Array:
    """An equivalent reward: another function of the prompt."""
    return reward + jnp.asarray([[3.0], [-1.5], [0.25]])


@pytest.mark.parametrize("beta", BETAS)
def test_equivalent_rewards(beta):
    """Lemmas 1 and 2, and that a reward which differs by the completion is another class."""
    reward, ref, preferences = space(20)
    np.testing.assert_allclose(theory.preference_probability(shifted(reward)), preferences, atol=1e-5)
    optimum = theory.optimal_policy(reward, ref, beta)
    np.testing.assert_allclose(theory.optimal_policy(shifted(reward), ref, beta), optimum, atol=1e-4)
    other = reward.at[0, 0].add(0.5)
    assert float(jnp.abs(theory.preference_probability(other) - preferences).max()) > 0.05
    assert float(jnp.abs(theory.optimal_policy(other, ref, beta) - optimum).max()) > 0.1


@pytest.mark.parametrize("beta", BETAS)
def test_projection(beta):
    """Theorem 1: of the same class, normalised (equation 9), the log-ratio of the optimum, and one for the class."""
    reward, ref, _ = space(21)
    projected = theory.projected_reward(reward, ref, beta)
    spread = reward - projected
    np.testing.assert_allclose(spread, jnp.broadcast_to(spread[:, :1], spread.shape), atol=1e-5)
    np.testing.assert_allclose(theory.log_partition(projected, ref, beta), 0, atol=1e-5)
    implied = theory.implied_reward(theory.optimal_policy(reward, ref, beta), ref, beta)
    np.testing.assert_allclose(projected, implied, atol=2e-5)
    np.testing.assert_allclose(theory.projected_reward(shifted(reward), ref, beta), projected, atol=2e-5)
    policy = random_policy(22)  # any policy is the optimum of the reward that it implies
    own = theory.implied_reward(policy, ref, beta)
    np.testing.assert_allclose(theory.projected_reward(own, ref, beta), own, atol=2e-5)
    np.testing.assert_allclose(theory.optimal_policy(own, ref, beta), policy, atol=2e-5)


def test_rankings():
    reward, ref, preferences = space(23)
    orders = jnp.asarray(list(itertools.permutations(range(5))))
    every = jax.vmap(lambda order: theory.plackett_luce(reward, jnp.broadcast_to(order, (3, 5))))(orders)
    np.testing.assert_allclose(jnp.exp(every).sum(axis=0), 1, rtol=1e-5)
    of_two = jnp.broadcast_to(jnp.asarray([3, 1]), (3, 2))
    np.testing.assert_allclose(jnp.exp(theory.plackett_luce(reward, of_two)), preferences[:, 3, 1], rtol=1e-5)
    first = jnp.stack([jnp.exp(every)[orders[:, 0] == y].sum(axis=0) for y in range(5)], axis=1)
    np.testing.assert_allclose(first, jax.nn.softmax(reward, axis=1), rtol=1e-4)  # the best is drawn by exp r
    implied = theory.implied_reward(theory.optimal_policy(reward, ref, 0.5), ref, 0.5)
    whole = jnp.broadcast_to(orders[17], (3, 5))
    np.testing.assert_allclose(theory.plackett_luce(implied, whole), every[17], atol=1e-5)  # beta log Z cancels


def test_the_normaliser_is_the_best_baseline():
    """Policy gradients at the optimum: their mean is 0 with any baseline, each sample's with ``beta log Z`` alone."""
    reward, ref, _ = space(24)
    beta = 0.5
    optimum = theory.optimal_policy(reward, ref, beta)
    shaped = reward - beta * (optimum - ref)
    np.testing.assert_allclose(
        shaped, jnp.broadcast_to(beta * theory.log_partition(reward, ref, beta)[:, None], (3, 5)), atol=1e-5
    )
    score = jnp.eye(5)[None] - jnp.exp(optimum)[:, None, :]  # of each completion, by logit

    def moments(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        each = weights[:, :, None] * score
        mean = jnp.einsum("xy,xyk->xk", jnp.exp(optimum), each)
        return mean, jnp.einsum("xy,xyk->x", jnp.exp(optimum), jnp.square(each - mean[:, None, :]))

    mean, noise = moments(shaped)
    assert float(jnp.abs(mean).max()) < 1e-5 and float(noise.min()) > 1e-3
    assert float(moments(shaped - shaped.mean(axis=1, keepdims=True))[1].max()) < 1e-9


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_best_of_n(n):
    """Exact Best-of-N of completions in the order of their rewards: the bound, and that it is reached."""

    def best(p: np.ndarray) -> np.ndarray:
        return np.diff(np.cumsum(p) ** n, prepend=0.0)

    def kl(q: np.ndarray, p: np.ndarray) -> float:
        return float(np.sum(np.where(q > 0, q * np.log(np.maximum(q, 1e-300) / p), 0)))

    rng = np.random.default_rng(25)
    for Y in (2, 5, 50):
        p = rng.dirichlet(np.ones(Y))
        assert kl(best(p), p) <= best_of_n_kl(n) + 1e-12
    many = np.full(20_000, 1 / 20_000)
    assert kl(best(many), many) == pytest.approx(best_of_n_kl(n), abs=2e-3)
    rewards = np.linspace(0, 1, 20_000)
    drawn = best_of_n_reward(rng.choice(rewards, (1, 4000)), n)[0]
    assert drawn == pytest.approx(best(many) @ rewards, abs=0.02)  # N / (N + 1)
