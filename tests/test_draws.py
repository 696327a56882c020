"""What changes logits before a draw: closed forms, and transformers' own processors where torch is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.generate import DrawOptions, make_sampler, next_token, penalized, sample_all, warped
from tests.test_generate import logits

PROBS = [0.5, 0.3, 0.15, 0.05]
LOGITS = np.random.default_rng(0).normal(scale=3, size=(5, 300)).astype(np.float32)
ALL = {"temperature": 0.7, "top_k": 90, "top_p": 0.9, "min_p": 0.02}


def left(probs: list[float], **options) -> list[float]:
    """The distribution that is drawn from, of one that is given."""
    return np.asarray(jax.nn.softmax(warped(jnp.log(jnp.array([probs])), DrawOptions(**options))))[0].tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBS),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 9}, PROBS),
        ({"top_p": 0.79}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.81}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"min_p": 0.25}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        # Of three tokens, the first two hold 0.842 of the mass; of all four, 0.8.
        ({"top_k": 3, "top_p": 0.82}, [0.625, 0.375, 0, 0]),
        # At temperature 1/2 the third token has 0.09 of the first one's probability.
        ({"temperature": 0.5, "min_p": 0.1}, [0.25 / 0.34, 0.09 / 0.34, 0, 0]),
    ],
)
def test_what_is_left_to_draw_from(options, expected):
    np.testing.assert_allclose(left(PROBS, **options), expected, atol=1e-6)


def test_ties_are_inside():
    np.testing.assert_allclose(left([0.4, 0.2, 0.2, 0.2], top_k=2), [0.4, 0.2, 0.2, 0.2], atol=1e-6)


def test_greedy_takes_the_most_probable_whatever_is_cut():
    options = {"temperature": 0.0, "top_k": 3, "top_p": 0.1, "min_p": 0.9}
    assert next_token(jnp.asarray(LOGITS), jax.random.key(0), **options).tolist() == LOGITS.argmax(axis=-1).tolist()


def test_a_penalty_divides_what_is_above_zero_and_multiplies_what_is_below():
    got = penalized(jnp.array([[2.0, -2.0, 2.0, -2.0]]), jnp.array([[True, True, False, False]]), 2.0)
    assert got.tolist() == [[1.0, -4.0, 2.0, -2.0]]


@pytest.mark.parametrize("options", [{name: value} for name, value in ALL.items()] + [ALL], ids=str)
def test_cuts_are_those_of_transformers(options):
    torch = pytest.importorskip("torch", reason="live parity needs torch, which CI installs")
    from transformers import GenerationConfig, GenerationMixin
    from transformers.generation.logits_process import LogitsProcessorList

    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(do_sample=True, num_beams=1, **(neutral | options))
    config._eos_token_tensor = None
    # The list that generate itself makes, in its order.
    warpers = GenerationMixin()._get_logits_processor(config, 0, None, None, LogitsProcessorList(), device="cpu")
    assert len(warpers) == len(options)
    expected = warpers(torch.zeros((5, 1), dtype=torch.long), torch.tensor(LOGITS)).numpy()
    got = np.asarray(warped(jnp.asarray(LOGITS), DrawOptions(**options)))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert "temperature" in options or np.isneginf(got).any()


def test_a_penalty_is_that_of_transformers():
    torch = pytest.importorskip("torch", reason="live parity needs torch, which CI installs")
    from transformers import RepetitionPenaltyLogitsProcessor

    ids = np.random.default_rng(1).integers(0, 300, (5, 40))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(ids), torch.tensor(LOGITS)).numpy()
    seen = jnp.zeros(LOGITS.shape, bool).at[jnp.arange(5)[:, None], ids].set(True)
    np.testing.assert_allclose(penalized(jnp.asarray(LOGITS), seen, 1.3), expected, rtol=1e-6)


def test_a_penalty_keeps_greedy_tokens_from_repeating(config, params):
    """At a penalty beyond measure, no token of prompt or completion comes again; padding is no token of a prompt."""
    prompts = [[5, 6, 7, 8, 9], [10]]
    options = {"max_new_tokens": 30, "eos_ids": (), "temperature": 0.0}
    drawn = sample_all(make_sampler(config, **options, repetition_penalty=1e9), params, prompts, batch_size=2)
    for prompt, (completion,) in zip(prompts, drawn.lists(), strict=True):
        assert len({*prompt, *completion}) == len(prompt) + len(completion)
    alone = sample_all(make_sampler(config, **options, repetition_penalty=1e9), params, prompts[1:], batch_size=1)
    assert alone.lists()[0] == drawn.lists()[1]


def test_log_probabilities_are_the_models_own(config, params):
    """Whatever tokens were drawn from, they are scored at temperature 1, without penalty or cut."""
    cuts = ALL | {"top_k": 3, "repetition_penalty": 1.2}
    drawn = sample_all(make_sampler(config, max_new_tokens=6, eos_ids=(), **cuts), params, [[5, 6, 7]], batch_size=1)
    (completion,) = drawn.lists()[0]
    logps = jax.nn.log_softmax(logits(config, params, [5, 6, 7, *completion]))
    expected = [float(logps[2 + i, token]) for i, token in enumerate(completion)]
    np.testing.assert_allclose(drawn.logps[0, 0], expected, atol=1e-4)
