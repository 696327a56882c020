"""Published objectives against float64 oracles, written from the papers and their authors' code alone, and theory."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.losses import LOSSES, traits_of
from dpojax.types import STATISTICS, PairLogps, Sides
from tests.losses.fields import flat, put

B, C = 8, 12
PRECISIONS = [(True, jnp.float64, 1e-9, 0.0), (False, jnp.float32, 2e-5, 5e-6)]

softplus = functools.partial(np.logaddexp, 0.0)


def dpo(h, beta):  # Rafailov et al. 2023 (arXiv 2305.18290), equation 7
    return softplus(-beta * h)


def ratio(c, r, rc, rr):
    return (c - rc) - (r - rr)


def np_unlikelihood(c, r, rc, rr, nc, nr, alpha=1.0):  # DPO's baseline (arXiv 2305.18290, section 6)
    return -c + alpha * r


def np_preferred_ft(c, r, rc, rr, nc, nr):  # another: supervised learning of y_w
    return -c


def np_unweighted(c, r, rc, rr, nc, nr, beta=0.1):  # DPO's gradient (section 4 there) without its weight sigma(-beta h)
    return -beta * ratio(c, r, rc, rr)


def np_orpo(c, r, rc, rr, nc, nr, beta=0.1):
    # Hong et al. 2024 (arXiv 2403.07691), equations 4 and 7: odds of the mean log-probability; NLL of the pair's own
    p_w, p_l = np.exp(c / nc), np.exp(r / nr)
    odds_w, odds_l = p_w / (1 - p_w), p_l / (1 - p_l)
    return -c / nc + beta * softplus(-np.log(odds_w / odds_l))


def np_simpo(c, r, rc, rr, nc, nr, beta=2.0, simpo_gamma=1.0):  # Meng et al. 2024 (arXiv 2405.14734), equation 6
    return softplus(-(beta * c / nc - beta * r / nr - simpo_gamma))


def np_cpo(c, r, rc, rr, nc, nr, beta=0.1, cpo_alpha=1.0):
    # Xu et al. 2024 (arXiv 2401.08417), section 3; the NLL of the authors' code is the mean over the batch's tokens
    return softplus(-beta * (c - r)) + cpo_alpha * (-c / nc.mean())


def np_alphapo(c, r, rc, rr, nc, nr, beta=2.0, alpha=0.25, simpo_gamma=1.0):
    # Gupta et al. 2025 (arXiv 2501.03884) and TRL: reward beta (1 - pi^(-alpha / |y|)) / alpha in SimPO's loss
    reward = lambda logp, n: beta * (1 - np.exp(logp) ** (-alpha / n)) / alpha  # noqa: E731
    return softplus(-(reward(c, nc) - reward(r, nr) - simpo_gamma))


def np_rpo(c, r, rc, rr, nc, nr, beta=0.1, rpo_alpha=1.0):  # Pang et al. 2024 (arXiv 2404.19733 v3), equation 1
    return dpo(ratio(c, r, rc, rr), beta) + rpo_alpha * (-c / nc)


def np_dpop(c, r, rc, rr, nc, nr, beta=0.1, dpop_lambda=50.0):  # Pal et al. 2024 (arXiv 2402.13228), equation 3
    return dpo(ratio(c, r, rc, rr) - dpop_lambda * np.maximum(0.0, rc - c), beta)


def np_r_dpo(c, r, rc, rr, nc, nr, beta=0.1, alpha=0.01):
    # Park et al. 2024 (arXiv 2403.19159): maximising r - alpha |y| gives r = beta log pi/ref + alpha |y| + Z(x)
    reward = lambda logp, ref, n: beta * (logp - ref) + alpha * n  # noqa: E731
    return softplus(-(reward(c, rc, nc) - reward(r, rr, nr)))


def np_cal_dpo(c, r, rc, rr, nc, nr, beta=0.1):
    # Xiao et al. 2024 (arXiv 2412.14516), equation 10, and the authors' code with shift 0.5: DPO at beta 1
    u, v = c - rc, r - rr
    return dpo(u - v, 1.0) + (u - 1 / (2 * beta)) ** 2 + (v + 1 / (2 * beta)) ** 2


def np_odpo(c, r, rc, rr, nc, nr, beta=0.1, alpha=1.0, *, margin):
    # Amini et al. 2024 (arXiv 2402.10571) and the authors' code: offset alpha log(score_w - score_l)
    return softplus(-(beta * ratio(c, r, rc, rr) - alpha * np.log(margin)))


def np_dr_dpo(c, r, rc, rr, nc, nr, beta=0.1, beta_prime=1.0):  # Wu et al. 2024 (arXiv 2407.07880), authors' code
    return -beta_prime * np.log(np.mean(np.exp(-dpo(ratio(c, r, rc, rr), beta) / beta_prime)))


def np_wpo(c, r, rc, rr, nc, nr, beta=0.1, *, squares):
    # Zhou et al. 2024 (arXiv 2406.11827), equation 2, without the cap of 1 that the authors' code puts on a weight
    weight = np.exp((c - squares[0]) / nc) * np.exp((r - squares[1]) / nr)
    return weight * dpo(ratio(c, r, rc, rr), beta)


def np_ld_dpo(c, r, rc, rr, nc, nr, beta=0.1, ld_alpha=0.5, *, tokens):
    # Liu et al. 2024 (arXiv 2409.06411), and TRL's ld_alpha: tokens beyond the shorter length count alpha
    place = np.arange(tokens[0].shape[1])
    weight = np.where(place[None] < np.minimum(nc, nr)[:, None], 1.0, ld_alpha)
    c, r, rc, rr = ((weight * t).sum(1) for t in tokens)
    return dpo(ratio(c, r, rc, rr), beta)


def np_tdpo2(c, r, rc, rr, nc, nr, beta=0.1, alpha=0.5, *, kl):
    # Zeng et al. 2024 (arXiv 2404.11999) and the authors' code: u - alpha (beta D(y_l) - sg(beta D(y_w)))
    return softplus(-(beta * ratio(c, r, rc, rr) - alpha * (beta * kl[1] - beta * kl[0])))


def np_tdpo1(c, r, rc, rr, nc, nr, beta=0.1, *, kl):  # the same without alpha, and without sg
    return np_tdpo2(c, r, rc, rr, nc, nr, beta, 1.0, kl=kl)


def np_mpo(c, r, rc, rr, nc, nr, beta=0.1, sigmoid_weight=0.8, bco_weight=0.2, sft_weight=1.0):
    # Wang et al. 2024 (arXiv 2411.10442), the NLL as in the authors' code; the reward shift delta 0, as in TRL
    quality = softplus(-beta * (c - rc)) + softplus(beta * (r - rr))
    return sigmoid_weight * dpo(ratio(c, r, rc, rr), beta) + bco_weight * quality + sft_weight * (-c / nc.mean())


CASES = {  # two settings of every option; what an oracle reads beyond sums and lengths are its keyword-only arguments
    np_unlikelihood: {"alpha": (1.0, 0.3)},
    np_preferred_ft: {},
    np_unweighted: {"beta": (0.1, 0.7)},
    np_orpo: {"beta": (0.1, 1.3)},
    np_simpo: {"beta": (2.0, 2.5), "simpo_gamma": (1.0, 0.3)},
    np_cpo: {"beta": (0.1, 0.4), "cpo_alpha": (1.0, 0.2)},
    np_alphapo: {"beta": (2.5, 1.5), "alpha": (0.25, -0.5), "simpo_gamma": (0.1, 1.0)},
    np_rpo: {"beta": (0.1, 0.4), "rpo_alpha": (1.0, 0.2)},
    np_dpop: {"beta": (0.1, 0.3), "dpop_lambda": (50.0, 2.0)},
    np_r_dpo: {"beta": (0.1, 0.3), "alpha": (0.01, 0.2)},
    np_cal_dpo: {"beta": (0.1, 0.5)},
    np_odpo: {"beta": (0.1, 0.7), "alpha": (1.0, 0.5)},
    np_dr_dpo: {"beta": (0.1, 0.5), "beta_prime": (1.0, 0.3)},
    np_wpo: {"beta": (0.1, 0.01)},
    np_ld_dpo: {"beta": (0.1, 0.3), "ld_alpha": (0.5, 0.0)},
    np_tdpo1: {"beta": (0.1, 0.6)},
    np_tdpo2: {"beta": (0.1, 0.6), "alpha": (0.5, 0.2)},
    np_mpo: {"beta": (0.1, 0.3), "sigmoid_weight": (0.8, 1.5), "bco_weight": (0.2, 0.7), "sft_weight": (1.0, 0.1)},
}
ORACLES = {oracle.__name__.removeprefix("np_"): oracle for oracle in CASES}
PARAMS = [
    pytest.param(name, {option: values[i] for option, values in CASES[oracle].items()}, id=f"{name}-{i}")
    for name, oracle in ORACLES.items()
    for i in range(2 if CASES[oracle] else 1)
]


def binary(x):  # multiples of 1/1024: their sums are exact in float32 too, so that both dtypes see the same numbers
    return np.round(np.asarray(x) * 1024) / 1024


def draw(seed: int, equal_lengths: bool = False) -> dict:
    """Float64 inputs of B pairs: lengths from 1 to 12, and sums that are the sums of the tokens."""
    rng = np.random.default_rng(seed)
    nc, nr = rng.integers(1, C + 1, (2, B))
    nr = nc if equal_lengths else nr
    masks = [np.arange(C)[None] < n[:, None] for n in (nc, nr, nc, nr)]
    nats = np.abs(np.tile(rng.gamma(2.0, 0.6, (2, B, C)), (2, 1, 1)) + rng.normal(0.0, 0.5, (4, B, C)))
    tokens = np.where(masks, binary(-nats - 0.01), 0.0)
    inputs = {
        "lengths": (nc, nr),
        "tokens": tokens,
        "sums": tokens.sum(2),
        "margin": binary(rng.gamma(2.0, 1.0, B) + 0.05),
    }
    inputs["squares"] = [binary(-rng.gamma(2.0, 0.5, B)) * n for n in (nc, nr)]
    for name in STATISTICS:
        inputs.setdefault(name, [binary(rng.gamma(2.0, 0.1, B)) * n for n in (nc, nr)])
    return inputs


def pairs(data: dict, dtype) -> tuple[PairLogps, PairLogps]:
    a = lambda x: jnp.asarray(x, dtype)  # noqa: E731
    (c, r, rc, rr), (tc, tr, trc, trr) = data["sums"], data["tokens"]
    lengths = [jnp.asarray(n, jnp.int32) for n in data["lengths"]]
    own = {name: Sides(*map(a, data[name])) for name in STATISTICS if name != "tokens" and name in data}
    shared = {"margin": a(data["margin"]), "key": jax.random.split(jax.random.key(0), len(c))}
    policy = PairLogps(a(c), a(r), *lengths, tokens=Sides(a(tc), a(tr)), **own, **shared)
    return policy, PairLogps(a(rc), a(rr), *lengths, tokens=Sides(a(trc), a(trr)), **shared)


def expected(name: str, data: dict, options: dict):
    oracle = ORACLES[name]
    reads = [k for k, p in inspect.signature(oracle).parameters.items() if p.kind is p.KEYWORD_ONLY]
    return oracle(*data["sums"], *data["lengths"], **options, **{k: data[k] for k in reads})


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name, options", PARAMS)
def test_value_is_the_papers(name, options, seed):
    data = draw(seed)
    for x64, dtype, rtol, atol in PRECISIONS:
        with jax.enable_x64(x64):
            got = LOSSES[name](*pairs(data, dtype), **options)
            assert got.dtype == dtype and got.shape == (B,)
            got = got.mean() if name == "dr_dpo" else got  # one value for the batch, the mean of what its rows give
            np.testing.assert_allclose(got, expected(name, data, options), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name, options", [p for p in PARAMS if p.values[0] not in ("wpo", "ld_dpo")])
def test_gradient_is_the_papers(name, options):
    """By the sums: WPO's weight is a constant and LD-DPO reads tokens, which have tests of their own below."""
    data = draw(3)
    with jax.enable_x64(True):
        policy, ref = pairs(data, jnp.float64)
        f = lambda x: LOSSES[name](policy.replace(chosen=x[0], rejected=x[1]), ref, **options).mean()  # noqa: E731
        got = jax.grad(f)(jnp.stack([policy.chosen, policy.rejected]))
    for side, i in np.ndindex(2, B):
        step = 1e-5 * (np.arange(4) == side)[:, None] * (np.arange(B) == i)
        up, down = (expected(name, data | {"sums": data["sums"] + sign * step}, options).mean() for sign in (1, -1))
        np.testing.assert_allclose(got[side, i], (up - down) / 2e-5, rtol=1e-6, atol=1e-8)


def moving(gaps, momentum=0.9):
    # Wu et al. 2024, beta-DPO (arXiv 2407.08639), the authors' code: from zero; torch's std divides by B - 1
    kept = np.zeros(2)
    for gap in gaps:
        kept = momentum * kept + (1 - momentum) * np.array([gap.mean(), gap.std(ddof=1)])
    return kept


def np_beta_dpo(c, r, rc, rr, nc, nr, beta, alpha, mean):
    # the same, where no pair is left out: beta (1 + alpha (E gap - mean)), at least 0.001 and without a gradient
    gap = ratio(c, r, rc, rr)
    beta = max(beta * (1 + alpha * (gap.mean() - mean)), 1e-3)
    return dpo(gap, beta), -beta / (1 + np.exp(beta * gap))


def running(name: str, policy: PairLogps, ref: PairLogps) -> tuple[PairLogps, PairLogps]:
    state = {kept: update(policy, ref, None) for kept, update in traits_of(LOSSES[name]).running.items()}
    return policy.replace(running=state), ref


def test_beta_dpo_keeps_the_authors_moving_averages():
    gaps, state = [], None
    with jax.enable_x64(True):
        for seed in range(3):
            data = draw(seed)
            gaps.append(ratio(*data["sums"]))
            state = traits_of(LOSSES["beta_dpo"]).running["beta_dpo"](*pairs(data, jnp.float64), state)
            for want in moving(gaps):
                assert any(np.allclose(value, want, rtol=1e-9) for value in state.values()), (seed, want, state)


@pytest.mark.parametrize("options", [{"beta": 0.1, "alpha": 0.6}, {"beta": 0.3, "alpha": 5.0}])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_beta_dpo_with_every_pair_is_the_authors(seed, options):
    data = draw(seed)
    value, slope = np_beta_dpo(*data["sums"], *data["lengths"], **options, mean=moving([ratio(*data["sums"])])[0])
    for x64, dtype, rtol, atol in PRECISIONS:
        with jax.enable_x64(x64):
            policy, ref = running("beta_dpo", *pairs(data, dtype))
            f = lambda c, p=policy, r=ref: LOSSES["beta_dpo"](p.replace(chosen=c), r, keep=1.0, **options)  # noqa: E731
            got, back = jax.vjp(f, policy.chosen)
            np.testing.assert_allclose(got, value, rtol=rtol, atol=atol)
            np.testing.assert_allclose(back(jnp.ones_like(got))[0], slope, rtol=rtol, atol=atol)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sampo_draws_a_subset_of_the_longer_side(seed):
    # Lu et al. 2024, SamPO (arXiv 2406.10957), authors' code: as many tokens of the longer side as the shorter has
    data, beta = draw(seed), 0.1
    with jax.enable_x64(True):
        got = np.asarray(LOSSES["sampo"](*pairs(data, jnp.float64), beta=beta))
    for i in range(B):
        (n_w, n_l), (tc, tr, trc, trr) = (n[i] for n in data["lengths"]), (t[i] for t in data["tokens"])
        drawn = [itertools.combinations(range(n), min(n_w, n_l)) for n in (n_w, n_l)]
        w, l = ([t[list(s)].sum() for s in drawn[side]] for side, t in enumerate((tc - trc, tr - trr)))  # noqa: E741
        gaps = np.subtract.outer(w, l)
        assert np.isclose(dpo(gaps, beta), got[i], rtol=1e-9).any(), (i, n_w, n_l)


def test_sampo_draws_every_subset_equally_often():
    rows, zero = 3000, np.zeros(3000)
    t = np.zeros((rows, C))
    t[:, :5] = [-1.0, -2.0, -4.0, -8.0, -16.0]
    data = {"tokens": [t, 0 * t, 0 * t, 0 * t], "sums": [t.sum(1), zero, zero, zero], "margin": zero}
    data |= {"lengths": (np.full(rows, 5), np.full(rows, 2)), "squares": [zero, zero], "kl": [zero, zero]}
    losses = np.asarray(LOSSES["sampo"](*pairs(data, jnp.float32), beta=1.0)).round(2)
    counts = np.unique(losses, return_counts=True)[1]
    assert len(counts) == 10  # 5 choose 2
    assert ((counts - rows / 10) ** 2 / (rows / 10)).sum() < 27.9  # chi squared of 9 degrees, 1 in 1000


PLAIN, EQUAL = draw(4), draw(4, equal_lengths=True)
GAINED = np.stack([PLAIN["sums"][2] + np.abs(PLAIN["sums"][0] - PLAIN["sums"][2]), *PLAIN["sums"][1:]])
LIKE_SIGMOID = [
    ("rpo", PLAIN, {"rpo_alpha": 0.0}),  # no NLL
    ("odpo", PLAIN, {"alpha": 0.0}),  # no offset
    ("odpo", PLAIN | {"margin": np.ones(B)}, {}),  # an offset of log 1 = 0
    ("r_dpo", PLAIN, {"alpha": 0.0}),  # no length's reward
    ("r_dpo", EQUAL, {"alpha": 0.5}),  # the lengths' rewards cancel
    ("ld_dpo", PLAIN, {"ld_alpha": 1.0}),  # every token counts one
    ("ld_dpo", EQUAL, {"ld_alpha": 0.2}),  # no token lies beyond the shorter length
    ("sampo", EQUAL, {}),  # all tokens are drawn
    ("dpop", PLAIN | {"sums": GAINED}, {"dpop_lambda": 50.0}),  # the penalty is 0 where pi(y_w) is above the reference
    ("wpo", PLAIN | {"squares": PLAIN["sums"][:2]}, {}),  # tokens as probable as sampled ones: weights of 1
    ("tdpo1", PLAIN | {"kl": [np.zeros(B)] * 2}, {}),  # only log-ratios are left of the token-level reward
    ("tdpo2", PLAIN | {"kl": [np.zeros(B)] * 2}, {"alpha": 0.7}),  # the same
]


@pytest.mark.parametrize("name, data, options", LIKE_SIGMOID)
def test_it_is_sigmoid(name, data, options):
    with jax.enable_x64(True):
        batch = pairs(data, jnp.float64)
        want = LOSSES["sigmoid"](*batch, beta=0.3)
        np.testing.assert_allclose(LOSSES[name](*batch, beta=0.3, **options), want, rtol=1e-9)


def test_simpo_is_length_normalised_reference_free_sigmoid_with_a_shifted_margin():
    data, beta, gamma = draw(5), 2.0, 0.6  # beta (a - gamma / beta) = beta a - gamma
    (c, r, _, _), (nc, nr) = data["sums"], data["lengths"]
    moved = data | {"sums": [c / nc - gamma / beta, r / nr, np.zeros(B), np.zeros(B)]}
    with jax.enable_x64(True):
        want = LOSSES["sigmoid"](*pairs(moved, jnp.float64), beta=beta)
        got = LOSSES["simpo"](*pairs(data, jnp.float64), beta=beta, simpo_gamma=gamma)
        np.testing.assert_allclose(got, want, rtol=1e-9)
        # (1 - p^-a) / a tends to log p as a falls to 0, which is SimPO's reward
        limit = LOSSES["alphapo"](*pairs(data, jnp.float64), beta=beta, simpo_gamma=gamma, alpha=1e-7)
        np.testing.assert_allclose(limit, want, rtol=1e-5)


def test_dr_dpo_lies_between_the_least_loss_and_the_mean():
    # -b log E exp(-l / b) falls from E l (b to infinity, Jensen's equality) to min l (b to 0): noisy pairs count less
    with jax.enable_x64(True):
        batch = pairs(draw(6), jnp.float64)
        each = np.asarray(LOSSES["sigmoid"](*batch, beta=0.5))
        values = [float(LOSSES["dr_dpo"](*batch, beta=0.5, beta_prime=b).mean()) for b in (1e-3, 0.1, 1.0, 10.0, 1e5)]
    np.testing.assert_allclose(values[0], each.min() + 1e-3 * np.log(B), rtol=1e-6)
    np.testing.assert_allclose(values[-1], each.mean(), rtol=1e-4)
    assert (np.diff(values) > 0).all()


def test_dr_dpo_and_beta_dpo_leave_out_rows_that_only_fill_up():
    data = draw(7)
    fill = lambda x: np.concatenate([x, np.zeros((2, *x.shape[1:]), x.dtype)])  # noqa: E731
    filled = {k: fill(v) if v is data["margin"] else [fill(x) for x in v] for k, v in data.items()}
    for name, options in (("dr_dpo", {}), ("beta_dpo", {"keep": 1.0})):
        losses = [LOSSES[name](*running(name, *pairs(d, jnp.float32)), **options)[:B] for d in (data, filled)]
        np.testing.assert_allclose(*losses, rtol=1e-6)


def slopes(name: str, data: dict, *fields: str, beta: float = 0.3) -> dict:
    """The gradients of an objective's sum by fields of the policy, in float64."""
    with jax.enable_x64(True):
        policy, ref = pairs(data, jnp.float64)
        loss = lambda x: LOSSES[name](put(policy, **x), ref, beta=beta).sum()  # noqa: E731
        grads = jax.grad(loss)({field: flat(policy)[field] for field in fields})
    return {field: np.asarray(grad) for field, grad in grads.items()}


def test_wpo_weighs_the_gradient_by_a_constant():
    data = draw(8)  # the weight says how likely the policy is to have written the pair; it is not trained
    weight = expected("wpo", data, {"beta": 0.3}) / dpo(ratio(*data["sums"]), 0.3)
    ours = slopes("wpo", data, "chosen", "rejected", "chosen_squares", "rejected_squares")
    for side, theirs in slopes("sigmoid", data, "chosen", "rejected").items():
        np.testing.assert_allclose(ours[side], weight * theirs, rtol=1e-9)
        assert (ours[f"{side}_squares"] == 0).all()


def test_tdpo2_stops_the_chosen_divergences_gradient_and_tdpo1_does_not():
    one, two = (slopes(name, draw(9), "chosen_kl", "rejected_kl") for name in ("tdpo1", "tdpo2"))
    assert (two["chosen_kl"] == 0).all() and (two["rejected_kl"] > 0).all()
    np.testing.assert_allclose(one["chosen_kl"], -one["rejected_kl"], rtol=1e-12)


def test_ld_dpo_weighs_the_gradient_of_the_tokens_beyond_the_shorter_length():
    data = draw(11)  # every token of a pair has the same slope, times alpha (0.5) in the longer completion's tail
    weight = np.where(np.arange(C)[None] < np.minimum(*data["lengths"])[:, None], 1.0, 0.5)
    with jax.enable_x64(True):
        policy, ref = pairs(data, jnp.float64)
        f = lambda t: LOSSES["ld_dpo"](put(policy, chosen_tokens=t, chosen=t.sum(1)), ref, ld_alpha=0.5).sum()  # noqa: E731
        grad = np.asarray(jax.grad(f)(policy.tokens.chosen))
    real = np.arange(C)[None] < data["lengths"][0][:, None]
    np.testing.assert_allclose(grad * real, grad[:, :1] * weight * real, rtol=1e-9)


def test_mpo_is_the_weighted_sum_of_its_parts():
    weights = {"sigmoid": 0.7, "bco": 0.4, "sft": 0.9}  # it is linear in them, and two are objectives of their own
    with jax.enable_x64(True):
        batch = pairs(draw(10), jnp.float64)
        mpo = lambda *on: LOSSES["mpo"](*batch, beta=0.3, **{f"{k}_weight": w * (k in on) for k, w in weights.items()})  # noqa: E731
        np.testing.assert_allclose(mpo(*weights), mpo("sigmoid") + mpo("bco") + mpo("sft"), rtol=1e-9)
        np.testing.assert_allclose(mpo("sigmoid"), 0.7 * LOSSES["sigmoid"](*batch, beta=0.3), rtol=1e-9)
        np.testing.assert_allclose(mpo("bco"), 0.4 * LOSSES["bco_pair"](*batch, beta=0.3), rtol=1e-9)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_cal_dpo_is_least_where_its_equations_say(beta):
    a = 0.0  # by symmetry at log-ratios (a, -a) with 0 = -2 sigma(-2 a) + 4 (a - 1 / (2 beta)), which is a fixed point
    for _ in range(100):
        a = 1 / (2 * beta) + 0.5 / (1 + np.exp(2 * a))
    data = draw(0) | {"sums": np.outer([a, -a, 0, 0], np.ones(B))}
    for grad in slopes("cal_dpo", data, "chosen", "rejected", beta=beta).values():
        np.testing.assert_allclose(grad, 0.0, atol=1e-9)
