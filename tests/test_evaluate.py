"""Estimates against closed forms."""

import jax
import numpy as np
import pytest

from dpojax.data import Example
from dpojax.evaluate import estimate, exact_kl, preference_estimates, sampled_kl, win_rate
from dpojax.evaluate.scoring import make_scorer
from dpojax.models import make_apply
from tests.conftest import plain_input


def test_error_over_groups():
    values = [1.0, 3.0, 5.0, 5.0]
    assert estimate(values).mean == 3.5
    assert estimate(values).error == pytest.approx(np.std(values, ddof=1) / 2)
    grouped = estimate(values, groups=["a", "a", "b", "b"])
    assert (grouped.mean, grouped.error, grouped.n) == (3.5, pytest.approx(np.std([2, 5], ddof=1) / 2**0.5), 2)
    assert np.isnan(estimate([1.0]).error)


def test_preference_figures_by_hand():
    policy = np.array([[-10.0, -12.0], [-5.0, -4.0], [-6.0, -6.0]])
    ref = np.array([[-11.0, -11.0], [-5.0, -5.0], [-6.0, -6.0]])
    lengths = np.array([[5, 6], [5, 2], [3, 2]])
    got = {k: v.mean for k, v in preference_estimates(policy, ref, lengths, beta=0.5).items()}
    assert got["rewards/accuracies"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert got["rewards/margins"] == pytest.approx((1.0 - 0.5 + 0) / 3)
    assert got["rewards/chosen"] == pytest.approx(0.5 / 3)
    assert got["logps/margins"] == pytest.approx((2 - 1 + 0) / 3)
    assert got["logps/accuracies"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert got["logps/accuracies/per_token"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert "rewards/margins" not in preference_estimates(policy, None, lengths, beta=0.5)


def test_win_rate_counts_ties_half():
    assert win_rate([1, 0, 2], [0, 0, 3]).mean == 0.5


def test_sampled_kl_of_two_gaussians_is_the_closed_form():
    x = np.random.default_rng(0).normal(1.0, 1.0, 20000)
    got = sampled_kl(-((x - 1) ** 2) / 2, -(x**2) / 2)
    assert abs(got.mean - 0.5) < 4 * got.error


def test_samples_are_scored_as_prompts_with_one_completion(config, params):
    """As they come from the sampler: without ranks, and of unequal lengths."""
    rng = np.random.default_rng(0)
    tokens = lambda n: rng.integers(2, 384, n).astype(np.int32)  # noqa: E731
    examples = [Example(tokens(n % 4 + 1), (tokens(n % 3 + 1),)) for n in range(9)]
    score = make_scorer(config, batch_size=8)
    got = score(params, examples, "Samples")
    assert got.shape == (9, 1)
    alone = score(params, [Example(e.prompt, (e.completions[0], e.completions[0])) for e in examples[:2]], "Twice")
    np.testing.assert_allclose(alone, np.repeat(got[:2], 2, axis=1), rtol=1e-5)


def test_exact_kl_is_that_of_whole_distributions(config, params):
    """Against log-softmaxes of all logits, row by row."""
    rng = np.random.default_rng(0)
    tokens = lambda n: rng.integers(2, 384, n).astype(np.int32)  # noqa: E731
    examples = [Example(tokens(n % 4 + 1), (tokens(n % 3 + 1), tokens(n % 2 + 1))) for n in range(9)]
    other = jax.tree.map(lambda x: 1.1 * x, params)
    got = exact_kl(config, params, other, examples, chunk_tokens=7)
    assert (exact_kl(config, params, params, examples) == 0).all()

    def log_softmax(weights, example, n):
        text = np.concatenate([example.prompt, example.completions[n]])[None]
        h, head = make_apply(config)(weights, plain_input(jax.numpy.asarray(text)))
        logits = np.asarray(h[0, len(example.prompt) - 1 : -1] @ head.T, np.float64)
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)

    for i, n in ((0, 0), (3, 1), (8, 0)):
        p, q = (log_softmax(weights, examples[i], n) for weights in (params, other))
        np.testing.assert_allclose(got[i, n], (np.exp(p) * (p - q)).sum(), rtol=1e-4, atol=1e-5)
