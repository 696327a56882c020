"""Objectives made of objectives, and their spelling on a command line."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.losses import (
    DIVERGENCES,
    LOSSES,
    length_normalized,
    reference_free,
    spelled,
    traits_of,
    weighted_sum,
    with_divergence,
    with_label_smoothing,
    with_margins,
    with_options,
    with_weights,
)
from dpojax.losses.compose import swapped
from dpojax.losses.spelling import probe
from dpojax.losses.tokenwise import down_sampled, length_desensitized
from dpojax.losses.wpo import wpo_weighted
from dpojax.types import STATISTICS
from tests.losses.fields import flat, put
from tests.losses.test_catalogue import SUMS, batch

hinge, ipo, kto, ld_dpo, sft, sigmoid = (LOSSES[n] for n in ("hinge", "ipo", "kto", "ld_dpo", "sft", "sigmoid"))
BOTH = batch("sigmoid", 0)
POLICY, REF = BOTH
close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
MIXED = weighted_sum((1.0, functools.partial(sigmoid, beta=0.3)), (0.2, sft))


def test_weighted_sum_is_an_objective_and_composes():
    outer = weighted_sum((0.5, MIXED), (2.0, ipo))
    close(outer(*BOTH), 0.5 * (sigmoid(*BOTH, beta=0.3) + 0.2 * sft(*BOTH)) + 2 * ipo(*BOTH))
    traits = traits_of(weighted_sum((1.0, LOSSES["sampo"]), (1.0, LOSSES["beta_dpo"]), (0.0, sigmoid)))
    assert traits.reads == {"tokens", "key"} and traits.batch and traits.lengths and set(traits.running) == {"beta_dpo"}
    assert traits.divergence and not traits_of(weighted_sum((1.0, sigmoid), (1.0, LOSSES["dpop"]))).divergence
    assert traits_of(MIXED).reference and not traits_of(weighted_sum((1.0, sft), (1.0, LOSSES["simpo"]))).reference
    with pytest.raises(ValueError, match="at least one"):
        weighted_sum()
    for other in (kto, LOSSES["reward_model"]):
        with pytest.raises(ValueError, match="all of pairs, all of labelled completions, or all of rewards"):
            weighted_sum((1.0, sigmoid), (1.0, other))


def test_with_options_binds_what_is_taken_and_not_bound_yet():
    close(with_options(sigmoid, beta=0.3, alpha=7.0)(*BOTH), sigmoid(*BOTH, beta=0.3))
    close(with_options(functools.partial(sigmoid, beta=0.3), beta=0.5, label_smoothing=0.1)(*BOTH),
          sigmoid(*BOTH, beta=0.3, label_smoothing=0.1))  # fmt: skip
    assert traits_of(with_options(ld_dpo, beta=0.3)) == traits_of(ld_dpo)
    close(with_options(MIXED, beta=9.0)(*BOTH), MIXED(*BOTH))


# Generators f(t) of the divergences, whose derivatives at the ratio t are the scores, up to a constant that cancels.
GENERATORS = {
    "reverse_kl": lambda t, a: t * jnp.log(t),
    "forward_kl": lambda t, a: -jnp.log(t),
    "js_divergence": lambda t, a: t * jnp.log(t) - (t + 1) * jnp.log((t + 1) / 2),
    "alpha_divergence": lambda t, a: (t**a - a * t - (1 - a)) / (a * (a - 1)),
}


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_divergence_makes_derivatives_of_its_generator_of_ratios(kind):
    slope = jax.vmap(jax.grad(lambda t: GENERATORS[kind](t, 0.3)))
    scores = [slope(jnp.exp((getattr(POLICY, s) - getattr(REF, s)) / 4)) for s in ("chosen", "rejected")]
    near = POLICY.replace(
        **{s: REF.__dict__[s] + (POLICY.__dict__[s] - REF.__dict__[s]) / 4 for s in ("chosen", "rejected")}
    )
    want = -jax.nn.log_sigmoid(0.3 * (scores[0] - scores[1]))
    under = with_divergence(functools.partial(sigmoid, beta=0.3), kind, alpha=0.3)
    np.testing.assert_allclose(under(near, REF), want, rtol=1e-5, atol=1e-6)
    # Around a sum, the NLL term stays what it is.
    mixed = with_divergence(MIXED, kind, alpha=0.3)
    np.testing.assert_allclose(mixed(near, REF), want + 0.2 * sft(near, REF), rtol=1e-5, atol=1e-6)
    assert traits_of(mixed).lengths and not traits_of(mixed).divergence and not traits_of(under).lengths


def test_alpha_divergences_limits_are_the_kl_divergences():
    for alpha, kind in ((1.0, "reverse_kl"), (0.0, "forward_kl")):
        close(with_divergence(sigmoid, "alpha_divergence", alpha=alpha)(*BOTH), with_divergence(sigmoid, kind)(*BOTH))
    with pytest.raises(ValueError, match="use one of reverse_kl, forward_kl, js_divergence, alpha_divergence"):
        with_divergence(sigmoid, "kl")


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_label_smoothing_is_the_expectation_over_flips(smoothing):
    close(with_label_smoothing(sigmoid, smoothing)(*BOTH), sigmoid(*BOTH, label_smoothing=smoothing))
    for name in ("ipo", "ld_dpo", "tdpo1", "apo_down", "reward_model"):  # swapped: every side's fields, and the margin
        want = (1 - smoothing) * LOSSES[name](*BOTH) + smoothing * LOSSES[name](swapped(POLICY), swapped(REF))
        close(with_label_smoothing(LOSSES[name], smoothing)(*BOTH), want)
    np.testing.assert_array_equal(swapped(POLICY).margin, -POLICY.margin)
    for name in STATISTICS:
        np.testing.assert_array_equal(getattr(swapped(POLICY), name).chosen, getattr(POLICY, name).rejected)
    # The data's margin is a property of the label: a flipped pair is asked for minus it.
    flipped = with_label_smoothing(with_margins(hinge, 0.5), smoothing)(*BOTH)
    h = (POLICY.chosen - REF.chosen) - (POLICY.rejected - REF.rejected) - 0.5 * POLICY.margin
    close(flipped, (1 - smoothing) * jax.nn.relu(1 - 0.1 * h) + smoothing * jax.nn.relu(1 + 0.1 * h))


def test_length_normalized_is_what_has_it_built_in():
    plain = functools.partial(ipo, length_normalize=False)
    close(length_normalized(plain)(*BOTH), ipo(*BOTH))
    close(length_normalized(sigmoid)(*BOTH), LOSSES["sigmoid_norm"](*BOTH))
    close(length_normalized(length_normalized(hinge))(*BOTH), length_normalized(hinge)(*BOTH))
    close(length_normalized(sft)(*BOTH), -POLICY.chosen / POLICY.chosen_len)  # every pair's own mean
    assert traits_of(length_normalized(hinge)).lengths and traits_of(length_normalized(hinge)).divergence


def test_reference_free_reads_no_reference():
    zeros = {name: 0 * x for name, x in flat(REF).items() if name in SUMS or name.endswith("_tokens")}
    zero = put(REF, **zeros)
    for name in ("sigmoid", "ipo", "ld_dpo", "wpo"):
        free = reference_free(LOSSES[name])
        close(free(*BOTH), LOSSES[name](POLICY, zero))
        close(free(POLICY, batch("sigmoid", 9)[1]), free(*BOTH))
        assert not traits_of(free).reference and traits_of(free).reads == traits_of(LOSSES[name]).reads
    close(reference_free(MIXED)(*BOTH), MIXED(POLICY, zero))


def test_weights_and_margins_are_the_datas():
    close(with_weights(MIXED)(*BOTH), POLICY.weight * MIXED(*BOTH))
    shifted = POLICY.replace(chosen=POLICY.chosen - 2.0 * POLICY.margin)
    close(with_margins(sigmoid, 2.0)(*BOTH), sigmoid(shifted, REF))
    both = with_weights(with_margins(length_normalized(hinge)))
    assert traits_of(both).reads == {"weight", "margin"} and traits_of(both).lengths
    for wrapped, field in ((with_weights(hinge), "weight"), (with_margins(hinge), "margin")):
        with pytest.raises(ValueError, match=f"reads '{field}'"):
            wrapped(POLICY.replace(**{field: None}), REF)


def test_token_wrappers_on_sums_are_sums_of_token_wrappers():
    for wrapper, reads in (
        (functools.partial(length_desensitized, ld_alpha=0.3), {"tokens"}),
        (down_sampled, {"tokens", "key"}),
        (wpo_weighted, {"squares"}),
    ):
        wrapped = wrapper(MIXED)
        close(wrapped(*BOTH), wrapper(functools.partial(sigmoid, beta=0.3))(*BOTH) + 0.2 * wrapper(sft)(*BOTH))
        assert traits_of(wrapped).reads == reads and traits_of(wrapped).lengths and traits_of(wrapped).divergence
    close(length_desensitized(hinge, 1.0)(*BOTH), hinge(*BOTH))
    for made, name in ((length_desensitized, "ld_dpo"), (down_sampled, "sampo"), (wpo_weighted, "wpo")):
        close(made(sigmoid)(*BOTH), LOSSES[name](*BOTH))


REFUSED = [
    (lambda: with_label_smoothing(sigmoid, 0.5), "epsilon 0.5 must be"),
    (lambda: with_divergence(MIXED, "kl"), "no divergence 'kl'"),
    (lambda: with_divergence(with_margins(sigmoid), "forward_kl"), "allows none"),
    (lambda: length_normalized(ld_dpo), "reads single tokens"),
    (lambda: length_normalized(LOSSES["reward_model"]), "rewards"),
    (lambda: reference_free(LOSSES["tdpo1"]), "whole distributions"),
    (lambda: reference_free(LOSSES["simpo"]), "reads no reference already"),
    (lambda: with_margins(ld_dpo), "put with_margins around what it wraps"),
    (lambda: with_margins(wpo_weighted(sigmoid)), "put with_margins around what it wraps"),
    (lambda: length_desensitized(sigmoid, 1.5), "ld_alpha 1.5 must be"),
    (lambda: down_sampled(LOSSES["tdpo1"]), "reads more than"),
    *(
        (lambda wrapper=wrapper: wrapper(kto), "labelled completions|reads more than|must be of pairs")
        for wrapper in (
            *(length_normalized, reference_free, with_weights, with_margins, wpo_weighted, down_sampled),
            *(length_desensitized, functools.partial(with_label_smoothing, label_smoothing=0.1)),
        )
    ),
]


@pytest.mark.parametrize("make, said", REFUSED)
def test_what_cannot_be_composed_is_refused_in_one_sentence(make, said):
    with pytest.raises(ValueError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


part = functools.partial
SPELLINGS = {
    "sigmoid": sigmoid,
    " ( sigmoid ) ": sigmoid,
    "sigmoid()": sigmoid,
    "sigmoid + 1e-1*sft": weighted_sum((1.0, sigmoid), (0.1, sft)),
    "sft*-0.5+2*(sigmoid+3*(ipo))": weighted_sum((-0.5, sft), (2.0, sigmoid), (6.0, ipo)),
    "ipo(beta=0.3, length_normalize=false)": part(ipo, beta=0.3, length_normalize=False),
    "with_divergence(sigmoid, js_divergence)": with_divergence(sigmoid, "js_divergence"),
    "with_divergence(sigmoid+.2*sft, 'forward_kl')": with_divergence(
        weighted_sum((1.0, sigmoid), (0.2, sft)), "forward_kl"
    ),
    "with_divergence(sigmoid, alpha_divergence, alpha=0.3)": with_divergence(sigmoid, "alpha_divergence", alpha=0.3),
    "with_weights(length_normalized(hinge(beta=2.0))+0.5*sft)": with_weights(
        weighted_sum((1.0, length_normalized(part(hinge, beta=2.0))), (0.5, sft))
    ),
    "with_margins(sigmoid, 2.0)": with_margins(sigmoid, 2.0),
    "with_label_smoothing(hinge, label_smoothing=0.1)": with_label_smoothing(hinge, 0.1),
    "length_desensitized(ipo, 0.3)": length_desensitized(ipo, 0.3),
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_spelling_is_what_it_says(text):
    close(spelled(text).objective(*BOTH), SPELLINGS[text](*BOTH))
    assert traits_of(spelled(text).objective) == traits_of(SPELLINGS[text])


def test_common_options_are_for_terms_that_do_not_bind_them():
    found = spelled(
        "sft+hinge(beta=0.7)+with_weights(sigmoid)", beta=0.5, label_smoothing=0.2, alpha=None, rpo_alpha=2.0
    )
    want = sft(*BOTH) + hinge(*BOTH, beta=0.7) + POLICY.weight * sigmoid(*BOTH, beta=0.5, label_smoothing=0.2)
    close(found.objective(*BOTH), want)
    assert (found.beta, found.unused, found.files) == (0.7, ("rpo_alpha",), ())
    assert spelled("sft", beta=0.5).beta == 0.1 and spelled("sft", beta=0.5).unused == ("beta",)
    assert spelled("simpo").beta == 2.0


MINE = """
import functools
def mine(policy, ref, *, beta=0.1, scale=1.0): return scale * beta * (policy.rejected - policy.chosen)
def mean(policy, ref): return policy.chosen.mean()
def none(policy, ref): return None
def broken(policy, ref): raise NotImplementedError
def branches(policy, ref, *, beta=0.1): return policy.chosen if beta > 0 else policy.rejected
half = functools.partial(mine, scale=0.5)
third = functools.partial(mine, beta=0.3)
"""


def test_a_file_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "losses.py").write_text(MINE)
    (tmp_path / "bad.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    for path in ("losses.py", "./losses.py", f"{tmp_path}/losses.py"):
        found = spelled(f"sigmoid+0.5*with_weights({path}:mine(scale=2.0))", beta=0.3)
        close(found.objective(*BOTH), sigmoid(*BOTH, beta=0.3)
              + 0.5 * POLICY.weight * 0.6 * (POLICY.rejected - POLICY.chosen))  # fmt: skip
        assert found.files == (path,)
    assert spelled("losses.py:half").beta == 0.1
    third = spelled("losses.py:third", beta=0.5)  # what the file binds stays bound
    assert (third.beta, third.unused, third.takes_beta) == (0.3, (), False)
    close(third.objective(*BOTH), 0.3 * (POLICY.rejected - POLICY.chosen))
    assert spelled("losses.py:third(beta=0.5)").beta == 0.5
    for text, said in {
        "losses.py:none_there": "losses.py: defines no function none_there",
        "no.py:mine": "no.py: no such file; give a Python file that defines mine",
        "bad.py:mine": r"bad.py: cannot be run \(ModuleNotFoundError",
        "losses.py:mean": r"gives \(\) for 3 pairs; it must give one loss a pair",
        "losses.py:none": "gives None for 3 pairs; it must give one loss a pair",
        "losses.py:branches": r"fails where beta is an array; use jnp.where",
        "losses.py:broken": r"fails on a batch of pairs \(NotImplementedError\)",
        "losses.py:half(gamma=1)": "losses.py:half has no option 'gamma'; it takes beta, scale",
        "losses.py:mine*losses.py:mine": r"'losses.py:mine \* losses.py:mine': one side of \* must be a number",
        "my losses.py:mine": "cannot be read; .* path may hold no spaces",
    }.items():
        with pytest.raises(ValueError, match=said) as error:
            spelled(text)
        assert "\n" not in str(error.value)


def test_a_file_runs_once_a_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counted.py").write_text(MINE + "with open('runs', 'a') as runs: runs.write('x')\n")
    found = spelled("counted.py:mine+0.5*with_weights(./counted.py:half)+counted.py:mine(beta=0.3)")
    found.objective(*BOTH)
    assert (tmp_path / "runs").read_text() == "x" and found.files == ("counted.py", "./counted.py")


BAD = {
    "": "cannot be read; write for example",
    "sig moid": "cannot be read; write for example",
    "sigmoid+": "cannot be read; write for example",
    "sigmoid\n+sft": "cannot be read; write for example",
    "\0": "cannot be read; write for example",
    "sigmoyd": "no objective 'sigmoyd'; perhaps sigmoid",
    "2": "'2' is no objective; use names",
    "'sigmoid'": "is no objective; use names",
    "sigmoid-0.2*sft": r"is no objective; use names, name\(option=value\), \+ and number \*",
    "sigmoid*ipo": r"one side of \* must be a number",
    "True*ipo": r"one side of \* must be a number",
    "1e999*sft": "no finite number; give a smaller one",
    "9" * 4000 + "*sft": "no finite number; give a smaller one",
    "sigmoid(beta=1e999)": "no finite number; give a smaller one",
    "sigmoid(0.1)": "give its options by name",
    "sigmoid(gamma=1)": "sigmoid has no option 'gamma'; it takes beta, label_smoothing",
    "ipo(policy=1)": "ipo has no option 'policy'; it takes beta, length_normalize",
    "sigmoid(beta=0.1, beta=0.2)": "gives an option twice; give it once",
    "sigmoid(**x)": r"write name\(option=value\)",
    "sigmoid.x(beta=1)": r"write name\(option=value\)",
    "sigmoid(beta=[1])": "is no value for an option; give a number or a word",
    "robust(label_smoothing=0.7)": "robust: label_smoothing 0.7 must be from 0 to below 0.5",
    "length_normalized": r"goes around an objective; write length_normalized\(sigmoid\)",
    "length_normalized()": r"goes around an objective; write length_normalized\(sigmoid\)",
    "length_normalized(hinge, 2)": "length_normalized takes none",
    "with_divergence(sigmoid)": "with_divergence takes kind, alpha",
    "with_divergence(sigmoid, kl)": "use one of reverse_kl",
    "sigmoid+kto": "all of pairs, all of labelled completions",
    "x" * 10_000: "no objective 'xxx",
    "(" * 5000 + "sigmoid" + ")" * 5000: "cannot be read",
    "with_weights(" * 3000 + "sigmoid" + ")" * 3000: "cannot be read|nested too deeply",
    "+".join(["sigmoid"] * 1250): "nested too deeply; write fewer terms",
    "-" * 10_000 + "1*sft": "cannot be read|nested too deeply",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:30].encode("unicode_escape").decode())
def test_bad_spelling_is_said_in_one_sentence_that_names_the_mend(text):
    with pytest.raises(ValueError, match=BAD[text]) as error:
        spelled(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


WEIGHTS = st.floats(-5, 5).map(lambda x: round(x, 6))
TERMS = st.lists(
    st.tuples(WEIGHTS, st.sampled_from(["sigmoid", "hinge", "ipo", "sft", "robust"])), min_size=1, max_size=5
)


@hypothesis.settings(max_examples=25, deadline=None, database=None)
@hypothesis.given(TERMS, st.booleans())
def test_any_sum_is_read_as_it_is_written(terms, turned):
    text = "+".join(f"{name}*{weight!r}" if turned else f"{weight!r}*{name}" for weight, name in terms)
    want = sum(weight * LOSSES[name](*BOTH) for weight, name in terms)
    np.testing.assert_allclose(spelled(text).objective(*BOTH), want, rtol=1e-5, atol=1e-4)


TOKENS = [*"()+*=,.:'-", "sigmoid", "sft", "kto", "with_weights", "beta", "0.2", "1e-1", "a.py:b", " ", "if", "lambda"]


@hypothesis.settings(max_examples=200, deadline=None, database=None)
@hypothesis.given(st.lists(st.sampled_from(TOKENS), max_size=8).map("".join))
def test_no_text_crashes(text):
    try:
        found = spelled(text)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert found.objective(*probe(found.objective)).shape == (3,)
