"""Objectives at points where theory says what they are."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.losses import LOSSES, hinge, implicit_rewards, ipo, sft, sigmoid, traits_of
from dpojax.types import STATISTICS, LabelledLogps, PairLogps
from tests.losses.fields import flat, pair_logps, put


def pair(chosen, rejected, chosen_len, rejected_len, dtype=jnp.float32) -> PairLogps:
    lengths = (jnp.asarray(chosen_len, jnp.int32), jnp.asarray(rejected_len, jnp.int32))
    return PairLogps(jnp.asarray(chosen, dtype), jnp.asarray(rejected, dtype), *lengths)


def random_pair(seed: int, B: int = 5) -> tuple[PairLogps, PairLogps]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, (2, B))
    policy, ref = -rng.gamma(4.0, 5.0, (2, 2, B))
    return pair(*policy, *lengths), pair(*ref, *lengths)


def test_equal_policies_give_the_exact_constants():
    policy, _ = random_pair(0)
    assert (sigmoid(policy, policy, beta=0.3) == jnp.float32(math.log(2))).all()
    assert (hinge(policy, policy, beta=0.3) == 1).all()
    np.testing.assert_allclose(ipo(policy, policy, beta=0.3), 1 / (4 * 0.3**2), rtol=1e-6)
    chosen, rejected = implicit_rewards(policy, policy, beta=0.3)
    assert (chosen == 0).all() and (rejected == 0).all()


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


# Better for the chosen side, or worse for the rejected one, is never worse: the pull has one direction everywhere. Of
# beta_dpo and wpo that is the gradient alone: beta and the weights, which move too, are held.
FALLS = {
    *("sigmoid", "hinge", "robust", "bco_pair", "aot", "aot_unpaired", "apo_zero", "sft", "sigmoid_norm"),
    *("orpo", "simpo", "cpo", "alphapo", "rpo", "dpop", "r_dpo", "odpo", "mpo", "beta_dpo", "dr_dpo"),
    *("tdpo1", "tdpo2", "ld_dpo", "wpo", "sampo", "unlikelihood", "preferred_ft", "unweighted", "reward_model"),
}
HELD = {"beta_dpo", "wpo"}
# And so by their labels.
LABELLED = {"kto", "apo_zero_unpaired", "bco"}

EPSILON, BETA = 0.2, 0.3
CALIBRATED = 1 / (2 - 1 / (1 + math.exp(2)))  # 1 / (2 beta) = 1 - sigma(-2) / 2 puts cal_dpo's least at (1, -1)
# Log-ratios of two completions of 2 and 4 tokens at which an objective is least; both slopes are 0 there.
LEAST = {
    "ipo": ({"beta": BETA}, 2 * 1.0 + 2 / (2 * BETA), 4 * 1.0),  # h = 1 / (2 beta), per token
    "sppo_hard": ({"beta": BETA}, 1 / (2 * BETA), -1 / (2 * BETA)),
    "cal_dpo": ({"beta": CALIBRATED}, 1.0, -1.0),
    # sigma(beta h) = 1 - epsilon; both have two labels' worth of it
    "exo_pair": ({"beta": BETA, "label_smoothing": EPSILON}, math.log(1 / EPSILON - 1) / BETA + 2.0, 2.0),
    # sigma(r_w) = 2/3; the rejected side falls without end
    "nca_pair": ({"beta": BETA}, math.log(2) / BETA, None),
    # The chosen side's two terms balance where |r_w| = |r_l - r_w|: at r_l = 2 r_w it is least for r_l < 0
    "apo_down": ({"beta": BETA}, -2.0, None),
}
SMOOTHED = {  # these fall too, without smoothing
    name: ({"beta": BETA, "label_smoothing": EPSILON}, math.log(1 / EPSILON - 1) / BETA + 2.0, 2.0)
    for name in ("sigmoid", "aot", "aot_unpaired")
}
NEITHER = {
    "discopop": "it is not convex: between two falling stretches it rises, near 0 (test_discopop_rises_only_near_0)",
}


def test_every_objective_has_its_theory():
    groups = (FALLS, LABELLED, set(LEAST), set(NEITHER))
    assert set().union(*groups) == set(LOSSES) and sum(map(len, groups)) == len(LOSSES)


def along(name: str, chosen, rejected) -> tuple[PairLogps, PairLogps]:
    """Pairs of 3 and 3 tokens with these sums, each token a third, and a reference of -20 nats."""
    B = len(chosen)
    n, ones, key = jnp.full(B, 3), jnp.ones(B), jax.random.split(jax.random.key(0), B)
    shared = dict(zip(("chosen_len", "rejected_len", "margin", "key"), (n, n, 2 * ones, key), strict=True))
    shared |= {f"{side}_{word}": -ones for side in ("chosen", "rejected") for word in STATISTICS}

    def sums(chosen, rejected):
        tokens = {"chosen_tokens": jnp.tile(chosen[:, None] / 3, (1, 3))}
        tokens |= {"rejected_tokens": jnp.tile(rejected[:, None] / 3, (1, 3))}
        return pair_logps(chosen=chosen, rejected=rejected, **shared | tokens)

    return sums(chosen, rejected), sums(-20 * ones, -20 * ones)


@pytest.mark.parametrize("name", sorted(FALLS))
def test_loss_falls_as_the_chosen_side_gains_and_rises_as_the_rejected_one_does(name):
    grid, still = jnp.linspace(-60.0, -0.5, 60), jnp.full(60, -20.0)
    for chosen, rejected, sign in ((grid, still, -1), (still, grid, 1)):
        policy, ref = along(name, chosen, rejected)
        f = lambda x, p=policy, r=ref: LOSSES[name](put(p, **x), r)  # noqa: E731
        fields = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
        losses, back = jax.vjp(f, {field: flat(policy)[field] for field in fields})
        grads = back(jnp.ones(60))[0]
        chosen_pull, rejected_pull = (grads[side] + grads[f"{side}_tokens"].sum(1) for side in ("chosen", "rejected"))
        assert (chosen_pull <= 0).all() and (chosen_pull < 0).any() and (rejected_pull >= 0).all()
        assert all((-grads["chosen_tokens"] >= 0).ravel()) and all((grads["rejected_tokens"] >= 0).ravel())
        assert (rejected_pull > 0).any() or name in ("sft", "preferred_ft")
        if name not in HELD and not traits_of(LOSSES[name]).batch:
            steps = sign * jnp.diff(losses)
            assert (steps >= -1e-6 * jnp.abs(losses[1:])).all() and (steps.sum() > 0 or name in ("sft", "preferred_ft"))


@pytest.mark.parametrize("name", sorted(LABELLED))
def test_a_desirable_completion_is_pulled_up_and_an_undesirable_one_down(name):
    logps, label = jnp.linspace(-60.0, 20.0, 41), (jnp.arange(41) % 2).astype(jnp.float32)
    policy = LabelledLogps(logps, jnp.full(41, 3), label, mismatched=logps)
    ref = policy.replace(logps=jnp.full(41, -20.0), mismatched=jnp.full(41, -25.0))
    pull = jax.grad(lambda x: LOSSES[name](policy.replace(logps=x), ref).sum())(logps)
    assert (pull * jnp.where(label > 0, 1, -1) <= 0).all() and (pull != 0).sum() > 20


@pytest.mark.parametrize("name, case", [*LEAST.items(), *SMOOTHED.items()])
def test_loss_is_least_where_its_theory_says(name, case):
    options, chosen, rejected = case
    with jax.enable_x64(True):
        x = jnp.array([chosen, 2 * chosen if rejected is None else rejected])
        ref = pair([-3.0], [-5.0], [2], [4], jnp.float64)

        def f(x):
            return LOSSES[name](pair(x[:1] - 3, x[1:] - 5, [2], [4], jnp.float64), ref, **options)[0]

        free = jnp.array([1.0, float(rejected is not None)])  # a side that has no least value stays where it is
        np.testing.assert_allclose(free * jax.grad(f)(x), 0.0, atol=1e-12)
        around = [f(x + step * free * jnp.array(way)) for step in (0.1, -0.1) for way in ((1.0, 0.0), (1.0, -1.0))]
        assert min(around) > f(x)


def test_discopop_rises_only_near_0():
    x = jnp.linspace(-5.0, 5.0, 401)  # beta h
    ref = pair(0 * x, 0 * x, [1] * 401, [1] * 401)
    slope = jax.grad(lambda c: LOSSES["discopop"](ref.replace(chosen=c), ref, beta=1.0).sum())(x)
    assert (slope > 0).any() and (jnp.abs(x[slope > 0]) < 0.2).all()
