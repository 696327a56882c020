"""A language model as a judge: what it is asked about comparisons, what that costs, and what it has said."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence

from dpojax.data.dialogue import Text
from dpojax.evaluate.judges.endpoint import Answer, Endpoint, ask_all
from dpojax.evaluate.judges.files import Comparison
from dpojax.evaluate.judges.prompts import Side, filled, first_of, other, transcript, verdict_of_answer
from dpojax.evaluate.judges.verdicts import Judge, Verdict, joint

BYTES_PER_TOKEN = 4
"""Of English, about; the estimate of a cost is no better than this."""


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked about a comparison: the completion that is shown first, and the whole text."""

    comparison: Comparison
    first: Side
    text: str


def questions_about(
    comparisons: Sequence[Comparison], template: str, *, seed: int = 0, both_orders: bool = False
) -> list[Question]:
    """The questions about comparisons, of equal ones once; about two equal completions there is none.

    Args:
      comparisons: as text or chat messages.
      template: with the places {prompt}, {first} and {second}.
      seed: of the orders.
      both_orders: ask about each comparison in both orders.

    Raises:
      ValueError: a text is token ids.
    """
    found: dict[str, list[Question]] = {}
    for it in comparisons:
        if it.a == it.b or (key := it.key()) in found:
            continue
        prompt, a, b = transcript(it.prompt), transcript(it.a), transcript(it.b)
        first = first_of(it.prompt, it.a, it.b, seed)
        orders: tuple[Side, ...] = (first, other(first)) if both_orders else (first,)
        in_order = {"A": (a, b), "B": (b, a)}
        found[key] = [Question(it, side, filled(template, prompt, *in_order[side])) for side in orders]
    return [question for questions in found.values() for question in questions]


def asked(endpoint: Endpoint, question: Question) -> str:
    """A hash of a request, its model and options included, by which an answer is known again."""
    said = json.dumps(endpoint.body(question.text), sort_keys=True).encode()
    return hashlib.blake2b(said, digest_size=8).hexdigest()


def judgements(endpoint: Endpoint, questions: Sequence[Question]) -> Iterator[tuple[Question, Answer, Verdict]]:
    """The questions with their answers and verdicts, as they come.

    Raises:
      UserError: a request has failed; all answers that came have been given by then.
    """
    for i, answer in ask_all(endpoint, [question.text for question in questions]):
        yield questions[i], answer, verdict_of_answer(answer.text, questions[i].first)


def endpoint_judge(endpoint: Endpoint, template: str, *, seed: int = 0, both_orders: bool = False) -> Judge:
    """A judge that asks a language model; arguments as of :func:`questions_about`.

    Two equal completions are a tie, unasked. In both orders, different verdicts are a tie.
    """

    def judge(prompts: Sequence[Text], a: Sequence[Text], b: Sequence[Text], /) -> list[Verdict]:
        comparisons = [Comparison(*texts) for texts in zip(prompts, a, b, strict=True)]
        questions = questions_about(comparisons, template, seed=seed, both_orders=both_orders)
        found: dict[str, list[Verdict]] = {}
        for question, _, verdict in judgements(endpoint, questions):
            found.setdefault(question.comparison.key(), []).append(verdict)
        return [joint(found.get(it.key(), ["tie"])) for it in comparisons]

    return judge


@dataclasses.dataclass(frozen=True)
class Cost:
    """What requests take: tokens in, and of answers, at most or in fact; in money where prices are given."""

    requests: int
    tokens_in: int
    tokens_out: int
    price_in: float | None = None  # of a million tokens
    price_out: float | None = None

    @property
    def money(self) -> float | None:
        """In the currency of the prices; None where there is none."""
        if self.price_in is None and self.price_out is None:
            return None
        return ((self.price_in or 0) * self.tokens_in + (self.price_out or 0) * self.tokens_out) / 1e6

    def __str__(self) -> str:
        money = "" if self.money is None else f", {self.money:.4f} in the currency of the prices"
        return f"{self.tokens_in:,} tokens in, {self.tokens_out:,} out{money}"


def estimated_cost(
    endpoint: Endpoint, questions: Sequence[Question], price_in: float | None, price_out: float | None
) -> Cost:
    """What questions would cost: tokens in by the bytes of the texts, and answers of the greatest length."""
    tokens = sum(-(-len(question.text.encode(errors="replace")) // BYTES_PER_TOKEN) for question in questions)
    return Cost(len(questions), tokens, len(questions) * endpoint.max_answer_tokens, price_in, price_out)
