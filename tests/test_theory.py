"""The theory of DPO, checked sentence by sentence on random spaces that are enumerated whole."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpojax import theory
from dpojax.losses import LOSSES, with_label_smoothing
from dpojax.types import PairLogps
from experiments import closed_form

BETAS = (0.1, 0.5, 2.0)


def space(seed: int, X: int = 3, Y: int = 5):
    """Random rewards, a random reference, and the Bradley-Terry preferences of the rewards."""
    rng = np.random.default_rng(seed)
    reward = jnp.asarray(rng.normal(size=(X, Y)), jnp.float32)
    ref = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(X, Y)), jnp.float32), axis=-1)
    return reward, ref, theory.preference_probability(reward)


def random_policy(seed: int, scale: float = 2.0, X: int = 3, Y: int = 5):
    logits = scale * np.random.default_rng(seed).normal(size=(X, Y))
    return jax.nn.log_softmax(jnp.asarray(logits, jnp.float32), axis=-1)


def distance(logps, other) -> float:
    return float(theory.total_variation(logps, other).max())


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", range(3))
def test_optimum_and_partition_function(seed, beta):
    reward, ref, _ = space(seed)
    weights = np.exp(np.asarray(ref, np.float64)) * np.exp(np.asarray(reward, np.float64) / beta)
    z = weights.sum(axis=-1)
    np.testing.assert_allclose(theory.log_partition(reward, ref, beta), np.log(z), rtol=1e-5, atol=1e-5)
    optimum = np.exp(theory.optimal_policy(reward, ref, beta))
    np.testing.assert_allclose(optimum, weights / z[:, None], rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(optimum.sum(axis=-1), 1, rtol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_implied_reward_is_the_reward_and_z_cancels(beta):
    reward, ref, preferences = space(1)
    optimum = theory.optimal_policy(reward, ref, beta)
    whole = theory.implied_reward(optimum, ref, beta, theory.log_partition(reward, ref, beta))
    without = theory.implied_reward(optimum, ref, beta)
    np.testing.assert_allclose(whole, reward, atol=2e-5)
    assert float(jnp.abs(whole - without).max()) > 0.05  # the term that cancels is there
    for implied in (whole, without):
        np.testing.assert_allclose(theory.preference_probability(implied), preferences, atol=1e-5)
    np.testing.assert_allclose(preferences + jnp.swapaxes(preferences, 1, 2), 1, rtol=1e-6)


@pytest.mark.parametrize("beta", (0.01, *BETAS))
@pytest.mark.parametrize("seed", range(2))
def test_dpo_converges_to_the_optimum(seed, beta):
    reward, ref, preferences = space(seed)
    trained = theory.train(partial(LOSSES["sigmoid"], beta=beta), ref, preferences)[-1]
    optimum = theory.optimal_policy(reward, ref, beta)
    assert distance(ref, optimum) > 0.05
    assert distance(trained, optimum) < 1e-3


def test_dpo_converges_whatever_pairs_are_drawn():
    reward, ref, preferences = space(4)
    trained = theory.train(partial(LOSSES["sigmoid"], beta=0.5), ref, preferences, theory.pair_probabilities(ref))[-1]
    assert distance(trained, theory.optimal_policy(reward, ref, 0.5)) < 1e-3


def test_robust_converges_to_the_optimum_on_flipped_labels():
    reward, ref, p = space(5)
    flipped = 0.9 * p + 0.1 * (1 - p)
    trained = theory.train(partial(LOSSES["robust"], beta=0.5, label_smoothing=0.1), ref, flipped)[-1]
    assert distance(trained, theory.optimal_policy(reward, ref, 0.5)) < 1e-3


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("drawn_by_reference", [False, True])
def test_ipo_converges_to_its_own_optimum(beta, drawn_by_reference):
    reward, ref, preferences = space(2)
    weights = theory.pair_probabilities(ref) if drawn_by_reference else None
    objective = partial(LOSSES["ipo"], beta=beta, length_normalize=False)
    own = theory.ipo_optimum(ref, preferences, beta, weights)
    assert distance(theory.train(objective, ref, preferences, weights)[-1], own) < 1e-3
    assert distance(own, theory.optimal_policy(reward, ref, beta)) > 1e-3  # and it is not DPO's
    if not drawn_by_reference:
        mean = jnp.mean((2 * preferences - 1) / (2 * beta), axis=-1)
        np.testing.assert_allclose(own, jax.nn.log_softmax(ref + mean, axis=-1), atol=2e-4)
    gradient = jax.grad(lambda logits: theory.expected_loss(objective, logits, ref, preferences, weights))(own)
    start = jax.grad(lambda logits: theory.expected_loss(objective, logits, ref, preferences, weights))(ref)
    assert float(jnp.abs(gradient).max()) < 1e-4 * float(jnp.abs(start).max())


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", range(2))
def test_hinge_converges_to_its_own_optimum(seed, beta):
    _, ref, preferences = space(seed)
    objective = partial(LOSSES["hinge"], beta=beta)
    trained, own = theory.train(objective, ref, preferences)[-1], theory.hinge_optimum(ref, preferences, beta)
    losses = [float(theory.expected_loss(objective, logps, ref, preferences)) for logps in (trained, own)]
    assert abs(losses[0] - losses[1]) < 1e-4
    assert distance(trained, own) < 1e-3
    k = beta * (own - ref)
    np.testing.assert_allclose(k - k[:, :1], np.round(k - k[:, :1]), atol=1e-4)  # whole multiples of 1 / beta


def test_two_completions_in_closed_form():
    _, ref, preferences = space(3, X=4, Y=2)
    beta, p = 0.5, preferences[:, 0, 1]
    wanted = {"hinge": jnp.sign(p - 0.5) / beta, "ipo": (2 * p - 1) / (2 * beta)}
    solved = {"hinge": theory.hinge_optimum, "ipo": theory.ipo_optimum}
    options = {"hinge": {}, "ipo": {"length_normalize": False}}
    for name, margin in wanted.items():
        trained = theory.train(partial(LOSSES[name], beta=beta, **options[name]), ref, preferences)[-1]
        for logps in (solved[name](ref, preferences, beta), trained):
            u = logps - ref
            np.testing.assert_allclose(u[:, 0] - u[:, 1], margin, atol=2e-3)


@pytest.mark.parametrize("beta", BETAS)
def test_gibbs_no_policy_beats_the_optimum(beta):
    reward, ref, _ = space(6)
    optimum = theory.optimal_policy(reward, ref, beta)
    best = theory.regularised_objective(optimum, reward, ref, beta)
    np.testing.assert_allclose(best, beta * theory.log_partition(reward, ref, beta), rtol=1e-5, atol=1e-5)
    for seed in range(100):
        near = jax.nn.log_softmax(optimum + random_policy(seed, 0.1 if seed % 2 else 0.01), axis=-1)
        for policy in (random_policy(seed), near):
            short = best - theory.regularised_objective(policy, reward, ref, beta)
            assert float(short.min()) > -1e-5
            np.testing.assert_allclose(short, beta * theory.kl(policy, optimum), rtol=1e-4, atol=1e-5)


def test_frontier_rises_is_concave_and_has_dpo_on_it():
    reward, ref, preferences = space(7)
    kl, mean = (np.asarray(v, np.float64) for v in theory.frontier(reward, ref, jnp.geomspace(5.0, 0.1, 30)))
    slopes = np.diff(mean) / np.diff(kl)
    assert (np.diff(kl) > 0).all() and (np.diff(mean) > 0).all() and (np.diff(slopes) < 1e-3).all()

    def gap(policy) -> float:
        at = theory.kl(policy, ref).mean()
        return float(theory.frontier_reward(reward, ref, at) - theory.expected_reward(policy, reward).mean())

    assert abs(gap(theory.train(partial(LOSSES["sigmoid"], beta=0.5), ref, preferences)[-1])) < 1e-5
    assert gap(theory.ipo_optimum(ref, preferences, 0.2)) > 1e-4
    assert gap(theory.hinge_optimum(ref, preferences, 0.5)) > 1e-3
    assert min(gap(random_policy(seed)) for seed in range(20)) > 0


def test_frontier_ends_at_the_best_completion():
    reward, ref, _ = space(8)
    assert float(theory.frontier_reward(reward, ref, 50.0)) == pytest.approx(float(reward.max(axis=-1).mean()), 1e-5)
    at_reference = float(theory.expected_reward(ref, reward).mean())
    assert float(theory.frontier_reward(reward, ref, 0.0)) == pytest.approx(at_reference, abs=2e-3)


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_is_the_formula(beta):
    _, ref, preferences = space(9)
    weights = theory.pair_probabilities(ref)
    objective = partial(LOSSES["sigmoid"], beta=beta)
    for seed in range(3):
        logits = random_policy(seed) + 1.0  # logits need not be normalised
        autodiff = jax.grad(lambda t: theory.expected_loss(objective, t, ref, preferences, weights))(logits)
        formula = theory.dpo_gradient(logits, ref, preferences, beta, weights)
        assert float(jnp.linalg.norm(autodiff - formula)) < 1e-5 * float(jnp.linalg.norm(formula))


def test_without_its_weight_the_policy_degenerates():
    _, ref, preferences = space(10)
    rate = optax.sgd(closed_form.gradient_rate(*ref.shape, 0.5))
    paths = {
        name: theory.train(partial(LOSSES[name], beta=0.5), ref, preferences, steps=2000, optimizer=rate)
        for name in ("sigmoid", "unweighted")
    }
    reverse = {name: jax.vmap(lambda p: theory.kl(ref, p).mean())(path) for name, path in paths.items()}
    dpo, ablation = reverse["sigmoid"], reverse["unweighted"]
    assert float(jnp.abs(dpo[2000] - dpo[1000])) < 1e-3 * float(dpo[2000])  # DPO has converged
    assert float(ablation[2000]) > 100 * float(dpo[2000])
    assert float(ablation[2000] / ablation[1000]) == pytest.approx(2, abs=0.02)  # in proportion to the steps
    away = theory.kl(paths["unweighted"][-1], ref).mean()
    assert float(away) > 1.5 * float(theory.kl(paths["sigmoid"][-1], ref).mean())
    assert float(jnp.exp(paths["unweighted"][-1]).max(axis=-1).min()) > 0.999  # one completion is left


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_objective_is_evaluated_or_refused(name):
    _, ref, preferences = space(11)
    declared = LOSSES[name].traits
    alone = declared.on == "pairs" and not (declared.batch or declared.running)
    if not alone:
        with pytest.raises(ValueError, match="expected_loss: the objective must be"):
            theory.expected_loss(LOSSES[name], ref, ref, preferences)
        return
    exact, *_ = theory.all_pairs(ref, ref, preferences)
    if all(getattr(exact, field) is not None for field in declared.reads):
        assert bool(jnp.isfinite(theory.expected_loss(LOSSES[name], ref, ref, preferences)))
    else:  # the data's margins and weights, random keys, or a statistic that theory has no exact value of
        with pytest.raises(ValueError, match="which these log-probabilities do not carry"):
            theory.expected_loss(LOSSES[name], ref, ref, preferences)


def test_the_expectation_is_a_sum_over_pairs():
    """By hand, with lengths: every unlike ordered pair once, in a loop."""
    _, ref, preferences = space(12)
    policy, lengths = random_policy(0), jnp.arange(1, 16, dtype=jnp.int32).reshape(3, 5)
    total, n = 0.0, 3 * 5 * 4
    for x, y, z in np.ndindex(3, 5, 5):
        if y != z:
            side = lambda t: PairLogps(t[x, y][None], t[x, z][None], lengths[x, y][None], lengths[x, z][None])  # noqa
            total += 2 / n * float(preferences[x, y, z] * LOSSES["ipo"](side(policy), side(ref), beta=0.5)[0])
    found = theory.expected_loss(partial(LOSSES["ipo"], beta=0.5), policy, ref, preferences, None, lengths)
    assert float(found) == pytest.approx(total, rel=1e-5)
    mirrored = with_label_smoothing(partial(LOSSES["sigmoid"], beta=0.5), 0.1)
    smoothed = theory.expected_loss(mirrored, policy, ref, preferences)
    flipped = 0.9 * preferences + 0.1 * jnp.swapaxes(preferences, 1, 2)
    assert float(smoothed) == pytest.approx(
        float(theory.expected_loss(partial(LOSSES["sigmoid"], beta=0.5), policy, ref, flipped)), rel=1e-5
    )


def test_experiment(tmp_path, capsys):
    config = closed_form.ClosedFormConfig(output=str(tmp_path / "out"), preset="tiny")
    assert closed_form.run(config) == 0
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"closed_form.png", "config.json", "metrics.json"}
    assert "sigmoid" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "value"), [("beta", 0.0), ("prompts", 0), ("completions", 1), ("steps", 1)])
def test_experiment_refuses(tmp_path, capsys, name, value):
    assert closed_form.run(closed_form.ClosedFormConfig(output=str(tmp_path / "out"), **{name: value})) == 2
    said = capsys.readouterr().err
    assert f"--{name} {value}" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
