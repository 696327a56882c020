"""The unpaired objectives and the reward model's against TRL's own values, by hand, extremes, finite differences."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.losses import apo_zero, bco_pair, traits_of
from dpojax.losses.reward import reward_model
from dpojax.losses.unpaired import apo_zero_unpaired, bco, kto, labelled_rewards, reward_shift
from dpojax.types import LabelledLogps
from tests.conftest import GOLDENS
from tests.losses.test_losses import pair

MADE = json.loads((GOLDENS / "trl_kto.json").read_text())
UNPAIRED = {loss.__name__: loss for loss in (kto, apo_zero_unpaired, bco)}


def labelled(logps, lengths, label, mismatched=None, dtype=jnp.float32) -> LabelledLogps:
    mismatched = None if mismatched is None else jnp.asarray(mismatched, dtype)
    return LabelledLogps(jnp.asarray(logps, dtype), jnp.asarray(lengths, jnp.int32), jnp.asarray(label), mismatched)


def random_labelled(seed: int, B: int = 6, dtype=jnp.float32) -> tuple[LabelledLogps, LabelledLogps]:
    rng = np.random.default_rng(seed)
    lengths, label = rng.integers(1, 9, B), np.arange(B) % 3 > 0
    x = -rng.gamma(4.0, 2.0, (4, B))
    return tuple(labelled(x[i], lengths, label.astype(np.float32), x[i + 1], dtype) for i in (0, 2))


def mean_and_gradient(objective, policy, ref):
    return jax.value_and_grad(lambda p: objective(p, ref).mean(), allow_int=True)(policy)


def id_of(case: dict) -> str:
    return f"{case['loss_type']}-{case['beta']}-{case['desirable_weight']}-{sum(case['label'])}-{case['kl']:.2f}"


@pytest.mark.parametrize("case", MADE["cases"], ids=id_of)
def test_value_and_gradient_are_trls(case):
    policy = labelled(case["logps"], case["lengths"], np.float32(case["label"]), case["mismatched"])
    ref = labelled(case["ref_logps"], case["lengths"], np.float32(case["label"]), case["ref_mismatched"])
    options = {name: case[name] for name in ("beta", "desirable_weight", "undesirable_weight")}
    value, grads = mean_and_gradient(functools.partial(UNPAIRED[case["loss_type"]], **options), policy, ref)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grads.logps, case["grad"], rtol=1e-5, atol=1e-7)
    assert (grads.mismatched == 0).all()


@pytest.mark.parametrize(
    "case", MADE["rewards"], ids=lambda c: f"{c['center_rewards_coefficient']}-{bool(c['margin'])}"
)
def test_reward_model_is_trls(case):
    scores = pair(case["chosen"], case["rejected"], [1] * 6, [1] * 6)
    scores = dataclasses.replace(scores, margin=None if case["margin"] is None else jnp.asarray(case["margin"]))
    objective = functools.partial(reward_model, center_rewards_coefficient=case["center_rewards_coefficient"])
    value, grads = mean_and_gradient(objective, scores, scores)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grads.chosen, case["grad_chosen"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grads.rejected, case["grad_rejected"], rtol=1e-5, atol=1e-7)


def test_they_are_the_paired_ones_where_nothing_is_shifted():
    policy, ref = labelled([-3.0, -9.0], [2, 3], [1.0, 0.0]), labelled([-5.0, -8.0], [2, 3], [1.0, 0.0])
    pairs = pair([-3.0], [-9.0], [2], [3]), pair([-5.0], [-8.0], [2], [3])
    np.testing.assert_allclose(apo_zero_unpaired(policy, ref).sum(), apo_zero(*pairs)[0], rtol=1e-6)
    unshifted = dataclasses.replace(policy, running={"bco": {"mean": jnp.float32(0), "count": jnp.float32(1)}})
    np.testing.assert_allclose(bco(unshifted, ref).sum(), bco_pair(*pairs)[0], rtol=1e-6)
    np.testing.assert_allclose(labelled_rewards(policy, ref, beta=0.5), [1.0, -0.5])
    zero = dataclasses.replace(policy, mismatched=jnp.zeros(2))
    assert (kto(zero, zero, desirable_weight=3.0) == jnp.array([1.5, 0.5])).all()
    assert (bco(policy, policy) == jnp.float32(math.log(2))).all()


@pytest.mark.parametrize("name", UNPAIRED)
@pytest.mark.parametrize("value", [0.0, 1e4, -1e4, np.nan])
def test_rows_that_fill_up_do_not_matter(name, value):
    policy, ref = random_labelled(0)
    filled = [
        labelled(*(np.append(x, extra) for x, extra in zip(fields, (value, 0, 1.0, value), strict=True)))
        for fields in ((p.logps, p.lengths, p.label, p.mismatched) for p in (policy, ref))
    ]
    losses, grads = UNPAIRED[name](*filled), mean_and_gradient(UNPAIRED[name], *filled)[1]
    assert losses.shape == (7,) and losses.dtype == jnp.float32 and losses[-1] == 0 and grads.logps[-1] == 0
    np.testing.assert_allclose(losses[:-1], UNPAIRED[name](policy, ref), rtol=1e-6)
    np.testing.assert_allclose(7 * grads.logps[:-1], 6 * mean_and_gradient(UNPAIRED[name], policy, ref)[1].logps, 1e-5)
    empty = [dataclasses.replace(p, lengths=jnp.zeros_like(p.lengths)) for p in filled]
    assert (UNPAIRED[name](*empty) == 0).all()


@pytest.mark.parametrize("name", UNPAIRED)
def test_jit_is_eager_and_extremes_are_finite(name):
    policy, ref = random_labelled(1)
    np.testing.assert_allclose(jax.jit(UNPAIRED[name])(policy, ref), UNPAIRED[name](policy, ref), rtol=1e-6)
    far = jnp.array([1e4, -1e4, 1e4, -1e4, 0.0, 1e4])
    for mismatched in (far, jnp.full(6, 1e4), jnp.full(6, -1e4)):
        far_policy = dataclasses.replace(policy, logps=far, mismatched=mismatched)
        value, grads = mean_and_gradient(UNPAIRED[name], far_policy, dataclasses.replace(ref, logps=-far))
        assert np.isfinite(value) and np.isfinite(grads.logps).all()
    scores = pair(far, -far[::-1], [1] * 6, [1] * 6)
    value, grads = mean_and_gradient(functools.partial(reward_model, center_rewards_coefficient=0.01), scores, scores)
    assert np.isfinite(value) and np.isfinite(grads.chosen).all() and np.isfinite(grads.rejected).all()


@pytest.mark.parametrize("name", UNPAIRED)
def test_gradient_against_finite_differences(name):
    with jax.enable_x64(True):
        policy, ref = random_labelled(2, dtype=jnp.float64)
        # The shift and the KL estimate have no gradient: the one is held, the other reads other completions.
        policy = dataclasses.replace(policy, running={"bco": reward_shift(policy, ref, None)})
        f = lambda x: UNPAIRED[name](dataclasses.replace(policy, logps=x), ref).sum()  # noqa: E731
        grad = jax.grad(f)(policy.logps)
        assert grad.dtype == jnp.float64
        for step in 1e-6 * np.eye(6):
            slope = (f(policy.logps + step) - f(policy.logps - step)) / 2e-6
            np.testing.assert_allclose(grad[step > 0][0], slope, atol=1e-8)


def test_reward_shift_is_the_mean_of_all_so_far():
    update, old, seen = traits_of(bco).running["bco"], None, []
    for seed, B in enumerate((6, 3, 5)):
        policy, ref = random_labelled(seed, B)
        policy = dataclasses.replace(policy, lengths=policy.lengths.at[0].set(0))
        seen.extend(np.asarray(policy.logps - ref.logps)[1:])
        old = jax.jit(update)(policy, ref, old)
        assert {name: (x.shape, x.dtype) for name, x in old.items()} == dict.fromkeys(
            ("mean", "count"), ((), "float32")
        )
        np.testing.assert_allclose(old["mean"], np.mean(seen), rtol=1e-5)
        assert old["count"] == len(seen)
        x = 0.3 * (policy.logps - ref.logps - np.mean(seen)) * np.where(policy.label > 0.5, 1, -1)
        losses = bco(dataclasses.replace(policy, running={"bco": old}), ref, beta=0.3)
        np.testing.assert_allclose(losses[1:], np.log1p(np.exp(-np.asarray(x)))[1:], rtol=1e-5)


def test_bad_options_and_missing_fields_are_said():
    policy, ref = random_labelled(3)
    with pytest.raises(ValueError, match="kto: undesirable_weight"):
        kto(policy, ref, undesirable_weight=-1.0)
    with pytest.raises(ValueError, match="mismatched"):
        kto(dataclasses.replace(policy, mismatched=None), ref)
    with pytest.raises(ValueError, match="reward_model: center_rewards_coefficient"):
        reward_model(*[pair([0.0], [0.0], [1], [1])] * 2, center_rewards_coefficient=-1.0)
