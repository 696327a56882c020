"""Completions that were drawn, their texts, and where stop strings end them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Samples(NamedTuple):
    """Completions drawn from a model, n of each prompt; arrays may be NumPy's.

    ``tokens`` are 0 beyond a completion's end, ``lengths`` count them, an EOS that was drawn included. ``logps`` are
    log p(token | prefix) under the model itself (temperature 1, no penalty, nothing cut), nats, 0 beyond the end.
    ``ended`` is true where an EOS, a stop token or the last token of a stop string was drawn, and false where the
    completion was cut at the limit of new tokens.
    """

    tokens: Int[Array, "B n C"]
    lengths: Int[Array, "B n"]
    logps: Float[Array, "B n C"]
    ended: Bool[Array, "B n"]

    def lists(self) -> list[list[list[int]]]:
        """The completions as lists of token ids, by prompt."""
        tokens, lengths = np.asarray(self.tokens).tolist(), np.asarray(self.lengths).tolist()
        return [
            [row[:n] for row, n in zip(rows, ends, strict=True)] for rows, ends in zip(tokens, lengths, strict=True)
        ]

    def texts(self, tokenizer: Any, stop: Sequence[str] = ()) -> list[list[str]]:
        """The completions as text, by prompt, without special tokens and without what ended them.

        Args:
          tokenizer: a transformers tokenizer, or what decodes as one does.
          stop: the strings that the sampler stopped at; a text ends before the first of them.
        """
        ended = np.asarray(self.ended).tolist()
        return [
            [text_of(row, end, tokenizer, stop) for row, end in zip(rows, ends, strict=True)]
            for rows, ends in zip(self.lists(), ended, strict=True)
        ]


def text_of(tokens: list[int], ended: bool, tokenizer: Any, stop: Sequence[str] = ()) -> str:
    """A completion's text, without special tokens: up to its first stop string, or else without the token that ended
    it."""
    length = stopped_length(tokens, tokenizer, stop)
    if length is None:
        return tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
    text = tokenizer.decode(tokens[:length])
    text = text[: min(at for string in stop if (at := text.find(string)) >= 0)]
    # Special tokens are left out of the tokens before the stop string; the last of them may hold its beginning.
    for n in range(length, -1, -1):
        whole = tokenizer.decode(tokens[:n])
        if text.startswith(whole):
            return tokenizer.decode(tokens[:n], skip_special_tokens=True) + text[len(whole) :]
    return text


def stopped_length(tokens: list[int], tokenizer: Any, stop: Sequence[str], known: int = 0) -> int | None:
    """How many tokens of a completion it takes until their text, special tokens spelled, has a stop string; None where
    it has none.

    A stop string may begin and end inside of tokens.

    Args:
      tokens: the completion.
      tokenizer: that decodes it.
      stop: the strings.
      known: so many of its first tokens have none.
    """

    def stops(n: int) -> bool:
        text = tokenizer.decode(tokens[:n])
        return any(string in text for string in stop)

    if not stop or not stops(len(tokens)):
        return None
    return next(n for n in range(known + 1, len(tokens) + 1) if stops(n))
