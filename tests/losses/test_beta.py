"""Beta as an input: given late, to whatever an objective is made of, and traced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.losses import (
    LOSSES,
    WRAPPERS,
    at_beta,
    spelled,
    takes_beta,
    traits_of,
    weighted_sum,
    with_divergence,
    with_label_smoothing,
    with_options,
)
from tests.losses.test_catalogue import batch

hinge, ipo, sft, sigmoid = (LOSSES[name] for name in ("hinge", "ipo", "sft", "sigmoid"))
BOTH = batch("sigmoid", 0)
BETAS = (0.03, 0.7)
close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
part = functools.partial


def at(objective, beta: float):
    """The losses at a beta that a compiled program takes as its input."""
    return jax.jit(part(at_beta, objective, *BOTH))(jnp.float32(beta))


@pytest.mark.parametrize("name", LOSSES)
def test_a_traced_beta_gives_what_the_number_gives(name):
    policy, ref = batch(name, 2)
    traced = jax.jit(part(at_beta, LOSSES[name]))
    for beta in map(float, np.float32(BETAS)):
        fixed = with_options(LOSSES[name], beta=beta)
        np.testing.assert_allclose(traced(policy, ref, jnp.float32(beta)), jax.jit(fixed)(policy, ref), rtol=1e-6)
        np.testing.assert_array_equal(at_beta(LOSSES[name], policy, ref, beta), fixed(policy, ref))
    np.testing.assert_array_equal(at_beta(LOSSES[name], policy, ref, None), LOSSES[name](policy, ref))


AROUND = WRAPPERS | {
    "with_divergence": part(with_divergence, kind="js_divergence"),
    "with_label_smoothing": part(with_label_smoothing, label_smoothing=0.1),
    "weighted_sum": lambda x: weighted_sum((0.5, x), (2.0, x)),
}


@pytest.mark.parametrize("name", AROUND)
def test_what_is_made_of_objectives_passes_beta_on(name):
    wrapper = AROUND[name]
    mixed = lambda first: weighted_sum((1.0, first), (0.2, sft), (0.3, part(hinge, beta=0.4)))  # noqa: E731
    for beta in BETAS:
        for free, bound in ((sigmoid, part(sigmoid, beta=beta)), (mixed(sigmoid), mixed(part(sigmoid, beta=beta)))):
            want = wrapper(bound)(*BOTH)
            close(at(wrapper(free), beta), want)
            close(with_options(wrapper(free), beta=beta)(*BOTH), want)
            np.testing.assert_array_equal(at_beta(wrapper(bound), *BOTH, 5.0), want)
            assert takes_beta(wrapper(free)) and not takes_beta(wrapper(bound))
    assert not takes_beta(with_options(wrapper(sigmoid), beta=0.2))
    assert traits_of(with_options(wrapper(sigmoid), beta=0.2)) == traits_of(wrapper(sigmoid))
    without = wrapper(part(sigmoid, beta=0.2) if name == "reference_free" else sft)
    assert not takes_beta(without)
    with pytest.raises(TypeError, match="beta"):
        without(*BOTH, beta=0.1)


def test_a_function_of_ones_own_with_and_without_beta():
    def plain(policy, ref):
        return policy.rejected - policy.chosen

    def mine(policy, ref, *, beta=0.1):
        return beta * plain(policy, ref)

    close(at(plain, 0.5), plain(*BOTH))
    close(at(mine, 0.5), 0.5 * plain(*BOTH))
    close(at(part(mine, beta=0.3), 0.5), 0.3 * plain(*BOTH))
    close(at(weighted_sum((1.0, plain), (2.0, mine)), 0.5), 2.0 * plain(*BOTH))


SPELLED = {  # its own beta; that of its rewards where 0.5 is given; whether a run takes one, without and with 0.5 given
    "sigmoid+0.2*ipo(beta=0.3)": (0.1, 0.5, True, True),
    "ipo(beta=0.3)+sigmoid": (0.3, 0.3, False, False),
    "ipo(beta=0.3)": (0.3, 0.3, False, False),
    "sft+simpo": (2.0, 0.5, True, True),
    "sft": (0.1, 0.1, False, False),
    "simpo+sigmoid": (2.0, 0.5, False, True),
    "length_desensitized(with_weights(hinge)+sft, 0.3)": (0.1, 0.5, True, True),
    "kto+bco": (0.1, 0.5, True, True),
}


@pytest.mark.parametrize("text", SPELLED)
def test_a_spelled_objective_takes_beta_later(text):
    spec, bound = spelled(text), spelled(text, beta=0.5)
    own, given, *free = SPELLED[text]
    assert spec.beta == own and spec.takes_beta == (text[4:] != "beta=0.3)" and text != "sft")
    policy, ref = batch("kto" if "kto" in text else "sigmoid", 0)
    close(at_beta(spec.objective, policy, ref, jnp.float32(0.5)), bound.objective(policy, ref))
    np.testing.assert_array_equal(at_beta(spec.objective, policy, ref, None), spec.objective(policy, ref))
    assert not bound.takes_beta and bound.beta == given and bound.unused == (("beta",) if text == "sft" else ())
    # A run has one beta, of which its losses and its rewards are functions.
    for beta, of_rewards, want, takes in ((None, own, spec, free[0]), (0.5, given, bound, free[1])):
        objective, at_once = spec.resolved(beta)
        assert at_once == of_rewards and takes_beta(objective) == takes
        assert traits_of(objective) == traits_of(spec.objective)
        close(at_beta(objective, policy, ref, jnp.float32(at_once)), want.objective(policy, ref))


def test_each_term_has_its_own_beta_or_the_given_one():
    spec = spelled("sigmoid+0.2*ipo(beta=0.3)")
    close(at(spec.objective, 0.5), sigmoid(*BOTH, beta=0.5) + 0.2 * ipo(*BOTH, beta=0.3))
