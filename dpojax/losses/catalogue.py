"""What a reader wants to know of an objective: equation, paper, options and needs, from its docstring and traits."""

import dataclasses
import inspect
import re
from collections.abc import Callable

from dpojax.losses.traits import Objective, traits_of


@dataclasses.dataclass(frozen=True)
class Entry:
    """An objective or a wrapper by its docstring and its traits."""

    name: str
    summary: str
    equation: str  # LaTeX
    source: str
    options: str
    needs: tuple[str, ...]


def entry(function: Callable) -> Entry:
    """The entry of an objective or a wrapper, read from the parts that every docstring here has.

    >>> from dpojax.losses import LOSSES
    >>> entry(LOSSES["hinge"]).needs, entry(LOSSES["hinge"]).equation
    (('reference',), '\\\\max(0,\\\\; 1 - \\\\beta h)')
    """
    text = inspect.getdoc(function) or ""
    summary = _flat(text.split("\n\n")[0])
    math = re.search(r"\.\. math:: (.*?)\n\n(?! )", text, re.DOTALL)
    source = re.search(r"Source: (.*?)(?=\n\n|\Z)", text, re.DOTALL)
    options = [
        f"{p.name}={p.default}" for p in inspect.signature(function).parameters.values() if p.default is not p.empty
    ]
    return Entry(
        function.__name__,
        summary,
        _flat(math[1]) if math else "",
        _flat(source[1]) if source else "",
        ", ".join(options),
        needs(function) if hasattr(function, "traits") else (),  # a wrapper has none of its own
    )


def needs(objective: Objective) -> tuple[str, ...]:
    """What an objective needs in addition to the policy's sums of log-probabilities, in words."""
    traits = traits_of(objective)
    words = {
        "reference": traits.reference,
        "lengths": traits.lengths,
        "the whole batch": traits.batch,
        "token log-probabilities": "tokens" in traits.reads,
        "token distributions": bool(traits.statistics - {"tokens"}),
        "margins": "margin" in traits.reads,
        "random draws": "key" in traits.reads,
        "running means": bool(traits.running),
        "labels instead of pairs": traits.on == "labels",
        "a reward head": traits.on == "scores",
    }
    return tuple(word for word, there in words.items() if there)


def _flat(text: str) -> str:
    return " ".join(text.split())
