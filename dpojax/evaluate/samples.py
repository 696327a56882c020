"""Figures of fresh samples: which policy wins, and how far it has moved from its reference."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from dpojax.evaluate.preferences import half_for_ties
from dpojax.evaluate.statistics import Estimate, estimate
from dpojax.generate import Samples

TextScorer = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""Prompts and completions, two lists of texts of one length -> a number for each."""


def text_scores(
    scorer: TextScorer, tokenizer: Any, prompts: Sequence[Sequence[int]], samples: Samples
) -> Float[np.ndarray, "B n"]:
    """What a scorer of texts gives every sample, ``[B, n]``; ``prompts`` are token ids of each."""
    texts = samples.texts(tokenizer)
    asked = tokenizer.batch_decode([list(prompt) for prompt in prompts], skip_special_tokens=True)
    each = [prompt for prompt, row in zip(asked, texts, strict=True) for _ in row]
    scores = np.asarray(scorer(each, [text for row in texts for text in row]), np.float32)
    return scores.reshape(len(texts), -1)


def win_rate(scores: Sequence[float], others: Sequence[float], groups: Sequence[object] | None = None) -> Estimate:
    """Share of rows in which ``scores`` is above ``others``; a tie counts half."""
    return estimate(half_for_ties(np.asarray(scores) - np.asarray(others)), groups)


def sampled_kl(policy: np.ndarray, ref: np.ndarray, groups: Sequence[object] | None = None) -> Estimate:
    r"""Estimate of :math:`KL(\pi \| \pi_\mathrm{ref}) = E_{y \sim \pi} \log \frac{\pi(y|x)}{\pi_\mathrm{ref}(y|x)}`.

    Unbiased where the completions are drawn from the policy at temperature 1 and cut at nothing but a fixed length;
    the KL is then that of the distributions over completions up to that length.

    Args:
      policy, ref: log-probabilities of the policy's own samples, ``[n]``, nats.
      groups: rows of one prompt count as one observation.

    Returns:
      Nats per completion.
    """
    return estimate(np.asarray(policy, np.float64) - np.asarray(ref, np.float64), groups)
