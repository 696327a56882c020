"""Rewards of the paper's controlled sentiment: a classifier of reviews, by transformers and torch, on the host.

    python -m experiments.frontier --preset paper            (its --setting.scorer is experiments/scorers.py:siebert)

``SENTIMENT_MODEL`` names another classifier: a directory, or a name of the hub, whose label 1 is the positive one.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any

from dpojax.errors import UserError

MODEL = "siebert/sentiment-roberta-large-english"
"""The paper's ground-truth reward (DPO, arXiv 2305.18290, section 6 and appendix C.1)."""
TOGETHER = 256  # texts of a forward pass


@functools.cache
def classifier() -> tuple[Any, Any]:
    """The tokenizer and the classifier.

    Raises:
      UserError: torch is not installed, or there is no such model.
    """
    name = os.environ.get("SENTIMENT_MODEL") or MODEL
    try:
        import torch  # noqa: F401
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError:
        raise UserError("experiments/scorers.py: reads the classifier with torch; run pip install torch") from None
    try:
        return AutoTokenizer.from_pretrained(name), AutoModelForSequenceClassification.from_pretrained(name).eval()
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"SENTIMENT_MODEL {name}: cannot be read ({why}); name a classifier's directory") from None


def siebert(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The probability that each review, prompt and completion together, is positive."""
    import torch

    tokenizer, model = classifier()
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    out: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(texts), TOGETHER):
            inputs = tokenizer(texts[start : start + TOGETHER], padding=True, truncation=True, return_tensors="pt")
            out += model(**inputs).logits.softmax(dim=-1)[:, 1].tolist()
    return out
