"""A row's fields -> its dialogue (a prompt and completions) and its annotations.

Forms of rows (:class:`RowKind`), by their fields:

- ``pairs``: ``prompt``, ``chosen``, ``rejected``; or ``prompt``, ``completions``, ``scores``, two lists of one length,
  of which every two completions of different scores are a pair. An objective may ask pairs for a ``margin`` (or
  ``score_chosen`` and ``score_rejected``, whose difference it is) and for a ``weight``.
- ``completions``: ``prompt``, ``completion``; or a pair, whose chosen side it is.
- ``labels``: ``prompt``, ``completion``, ``label`` (true: desirable).
- ``prompts``: ``prompt``.

Other fields are ignored. A text is plain text or a list of chat messages with ``role`` and ``content``. Completions
that are whole conversations may leave the prompt out: it is then the beginning that they share.

Token ids may stand in the place of any text: ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, ``completion_ids``, each
a list of ints (in memory also a NumPy array), and ``completions_ids``, a list of such lists. They are used exactly as
they are, and the text of the same name is then not read: no chat template, no BOS and no EOS is added. So a completion
that a sampler cut at its token limit has no EOS, and an empty reply that was sampled is the EOS alone.

``truncated`` (true or false; a list of them for ``completions``; ``chosen_truncated`` and ``rejected_truncated`` of a
pair) is true of a completion, as text or chat, that was cut before its end: neither an EOS nor a chat template's end of
a message is added to it. A text that ends in EOS already stays as it is. It changes nothing in token ids.
"""

import dataclasses
import math
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np

from dpojax.data.read import Row, name_of
from dpojax.losses.traits import Traits

Form = Literal["pairs", "completions", "labels", "prompts"]
Message = dict[str, str]
TokenIds = tuple[int, ...]
Text = str | list[Message] | TokenIds  # plain text, chat messages, or token ids

PROMPT_AND_COMPLETION = "a row has prompt and completion, or is a pair"


@dataclasses.dataclass(frozen=True)
class RowKind:
    """What rows a run reads: their form, and the numbers that its objective asks of every pair.

    Raises:
      ValueError: a margin or a weight is asked of what are no pairs.
    """

    form: Form
    margin: bool = False
    weight: bool = False

    def __post_init__(self) -> None:
        if (self.margin or self.weight) and self.form != "pairs":
            raise ValueError(f"rows of form {self.form!r} have no margin and no weight; only pairs have")


PAIRS, COMPLETIONS = RowKind("pairs"), RowKind("completions")
LABELS, PROMPTS = RowKind("labels"), RowKind("prompts")


def kind_of(traits: Traits) -> RowKind:
    """The rows that an objective of these traits is trained on."""
    if traits.on == "labels":
        return LABELS
    return RowKind("pairs", margin="margin" in traits.reads, weight="weight" in traits.reads)


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A prompt and its completions, the best first, all as text, or all as chat messages, or as token ids.

    ``truncated`` is true of each completion that was cut before its end; it is empty where none was.
    """

    prompt: Text
    completions: tuple[Text, ...]
    truncated: tuple[bool, ...] = ()


@dataclasses.dataclass(frozen=True)
class RowAnnotations:
    """The numbers of a row; None, or empty, where it has none.

    Attributes:
      ranks: of every completion, 0 the best; two of one rank are no pair. Empty: in the order of the completions.
      scores: of every completion.
      margin: by how much a pair's chosen side is better.
      weight: how much the row counts.
      label: 1 for a desirable completion, 0 for an undesirable one.
    """

    ranks: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    margin: float | None = None
    weight: float | None = None
    label: float | None = None

    def present(self) -> dict[str, Any]:
        """The fields that the row has, by name."""
        return {name: x for name, x in vars(self).items() if x not in (None, ())}


OPTIONAL = ("margin", "weight")
"""The annotations that rows must have only where an objective asks for them."""


@dataclasses.dataclass(frozen=True)
class Notes:
    """All annotations of a row, and why it lacks a margin or a weight, for runs that ask for one."""

    annotations: RowAnnotations = RowAnnotations()  # frozen
    missing: dict[str, str] = dataclasses.field(default_factory=dict)

    def of_kind(self, kind: RowKind) -> RowAnnotations:
        """The annotations that a run of this kind reads.

        Raises:
          ValueError: the run asks for one that is missing.
        """
        for name in OPTIONAL:
            if getattr(kind, name) and name in self.missing:
                raise ValueError(self.missing[name])
        unread = [name for name in OPTIONAL if not getattr(kind, name)]
        return dataclasses.replace(self.annotations, **dict.fromkeys(unread))  # type: ignore[arg-type]


# --- one field


def _has(fields: dict[str, Any], name: str) -> bool:
    return name in fields or fields.get(f"{name}_ids") is not None


def _text(fields: dict[str, Any], name: str, needs: str) -> Text:
    """The field's token ids where it has them, or else its text or chat messages, checked."""
    if fields.get(f"{name}_ids") is not None:
        return _token_ids(fields[f"{name}_ids"], f"{name}_ids")
    if name not in fields:
        raise ValueError(f"no field {name!r}; {needs}")
    value = fields[name]
    if isinstance(value, str):
        return _unicode(value, name)
    if not isinstance(value, list):
        raise ValueError(f"field {name!r} is a {name_of(value)}; it must be text or a list of chat messages")
    if not value:
        raise ValueError(f"field {name!r} is an empty list; give it at least one chat message")
    for message in value:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
            raise ValueError(f"field {name!r} has an item that is not a chat message with role and content")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"field {name!r} has a message whose content is not text")
        _unicode(message["content"], name)
    return value


def _token_ids(value: Any, name: str) -> TokenIds:
    ids = value if isinstance(value, list | tuple | np.ndarray) else ()
    if not len(ids) or any(isinstance(i, bool) or not isinstance(i, Integral) or not 0 <= int(i) < 2**31 for i in ids):
        raise ValueError(f"field {name!r} must be a list of at least one token id, each a whole number of at least 0")
    return tuple(map(int, ids))


def _unicode(text: str, name: str) -> str:
    # JSON can spell half of a surrogate pair, which no tokenizer takes.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"field {name!r} is not valid Unicode (a lone surrogate); fix its escapes") from None
    return text


def _is_empty(text: Text) -> bool:
    if isinstance(text, str):
        return not text.strip()
    return all(isinstance(message, dict) and not message["content"].strip() for message in text)


def _flag(value: Any, name: str) -> bool:
    if value is not None and not isinstance(value, bool | np.bool_):
        must = "true (the completion was cut before its end) or false"
        raise ValueError(f"field {name!r} is a {name_of(value)}; it must be {must}")
    return bool(value)


def _number(fields: dict[str, Any], name: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        shown = name_of(value) if not isinstance(value, float) else str(value)
        raise ValueError(f"field {name!r} is {shown}; it must be a finite number")
    return float(value)


# --- dialogues


def _shared(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages two conversations begin with alike."""
    alike = [a == b for a, b in zip(chosen, rejected, strict=False)]
    return alike.index(False) if False in alike else len(alike)


def _conversations(prompt: Text | None, sides: list[list[Message]]) -> Dialogue:
    """Completions as chat messages: after a prompt given as messages, or after the beginning they share."""
    if isinstance(prompt, tuple):
        raise ValueError("prompt_ids are token ids and the completions are chats; give them as text or token ids")
    if isinstance(prompt, list):
        if all(side[: len(prompt)] == prompt for side in sides):
            sides = [side[len(prompt) :] for side in sides]
    else:
        shared = min((_shared(sides[0], side) for side in sides[1:]), default=len(sides[0]) - 1)
        if shared == 0:
            raise ValueError("chosen and rejected share no beginning; give the prompt or begin both with it")
        if prompt is not None and all(message["content"] != prompt for message in sides[0][:shared]):
            raise ValueError("prompt is text but chosen and rejected are chats that do not begin with it")
        prompt, sides = sides[0][:shared], [side[shared:] for side in sides]
    if any(not side for side in sides):
        raise ValueError("an empty completion: one conversation ends where the other goes on; add the reply")
    return Dialogue(prompt, tuple(sides))


def _dialogue(fields: dict[str, Any], names: tuple[str, ...], needs: str, truncated: tuple[bool, ...]) -> Dialogue:
    """The prompt and the completions of these fields, all checked."""
    sides = [_text(fields, name, needs) for name in names]
    for name, side in zip(names, sides, strict=True):
        if _is_empty(side):
            say = "give it text, leave the row out, or give an empty reply that was sampled as token ids"
            raise ValueError(f"field {name!r} is an empty completion; {say}")
    known = fields.get("prompt") is not None or fields.get("prompt_ids") is not None
    prompt = _text(fields, "prompt", needs) if known else None
    chats = [side for side in sides if isinstance(side, list)]
    if chats and len(chats) < len(sides):
        raise ValueError(f"fields {' and '.join(names)} must both be text or both be chat messages")
    if chats:
        dialogue = _conversations(prompt, chats)
    elif prompt is None:
        raise ValueError(f"no field 'prompt'; {needs}")
    elif isinstance(prompt, list):
        reply = lambda side: [{"role": "assistant", "content": side}] if isinstance(side, str) else side  # noqa: E731
        dialogue = Dialogue(prompt, tuple(map(reply, sides)))
    else:
        dialogue = Dialogue(prompt, tuple(sides))
    return dataclasses.replace(dialogue, truncated=truncated) if any(truncated) else dialogue


def pair_of(row: Row) -> Dialogue:
    """A preference row's prompt and its (chosen, rejected).

    Raises:
      ValueError: the row is no usable pair; the message says why.
    """
    fields, needs = row.fields, "a pair has prompt, chosen and rejected"
    if fields.get("truncated") is not None:
        raise ValueError("field 'truncated' is of a single completion; a pair has chosen_truncated, rejected_truncated")
    names = ("chosen", "rejected")
    cut = tuple([_flag(fields.get(f"{name}_truncated"), f"{name}_truncated") for name in names])
    sides = [_text(fields, name, needs) for name in names]
    if sides[0] == sides[1] and (cut[0] == cut[1] or isinstance(sides[0], tuple)):
        raise ValueError("chosen and rejected are equal; a pair needs two different completions")
    return _dialogue(fields, names, needs, cut)


def _single_of(fields: dict[str, Any], name: str, needs: str) -> Dialogue:
    flags = [_flag(fields.get(flag), flag) for flag in ("truncated", "chosen_truncated")]
    return _dialogue(fields, (name,), needs, (flags[0] or (name == "chosen" and flags[1]),))


def completion_of(row: Row) -> Dialogue:
    """A row's prompt and its one completion: ``completion``, or a pair's ``chosen`` side.

    Raises:
      ValueError: the row has neither; the message says why.
    """
    if _has(row.fields, "completion") or not _has(row.fields, "chosen"):
        return _single_of(row.fields, "completion", PROMPT_AND_COMPLETION)
    if not _has(row.fields, "rejected"):
        return _single_of(row.fields, "chosen", PROMPT_AND_COMPLETION)
    pair = pair_of(row)  # whole conversations say by their two sides where the prompt ends
    cut = pair.truncated[:1]
    return Dialogue(pair.prompt, pair.completions[:1], cut if any(cut) else ())


def prompt_of(row: Row) -> Dialogue:
    """A row's prompt, without completions.

    Raises:
      ValueError: the row has none; the message says why.
    """
    return Dialogue(_text(row.fields, "prompt", "a row has a prompt"), ())


def _truncated_of(fields: dict[str, Any], n: int) -> tuple[bool, ...]:
    flags = fields.get("truncated")
    if flags is None:
        return (False,) * n
    if not isinstance(flags, list) or len(flags) != n:
        raise ValueError(f"field 'truncated' must be a list of {n} booleans, one a completion")
    return tuple([_flag(flag, f"truncated[{i}]") for i, flag in enumerate(flags, start=1)])


def ranked_of(row: Row) -> tuple[Dialogue, RowAnnotations]:
    """A prompt with several completions and their ranks and scores, the best first.

    Raises:
      ValueError: the row is not usable; the message says why.
    """
    fields, suffix = row.fields, "_ids" if row.fields.get("completions_ids") is not None else ""
    completions, scores = fields[f"completions{suffix}"], fields.get("scores")
    if not (isinstance(completions, list) and isinstance(scores, list) and len(completions) == len(scores)):
        raise ValueError(f"fields 'completions{suffix}' and 'scores' must be lists of one length")
    if suffix:
        completions = [_token_ids(ids, f"completions[{i}]_ids") for i, ids in enumerate(completions, start=1)]
    numbers = [_number({"scores": score}, "scores") for score in scores]
    cut = _truncated_of(fields, len(completions))
    order = sorted(range(len(numbers)), key=lambda i: -numbers[i])
    levels = sorted(set(numbers), reverse=True)
    if len(levels) < 2:
        raise ValueError("the scores are all equal, or one; a preference needs two completions of different scores")
    distinct = [(completion, flag and not suffix) for completion, flag in zip(completions, cut, strict=True)]
    for i, completion in enumerate(distinct):
        if completion in distinct[:i]:
            raise ValueError(f"completion {i + 1} is there twice; leave one out")
    names = tuple([f"completions[{i + 1}]" for i in order])
    sides = {f"{name}{suffix}": completions[i] for name, i in zip(names, order, strict=True)}
    prompt = {name: x for name, x in fields.items() if name in ("prompt", "prompt_ids")}
    needs = "a row has prompt, completions and scores"
    dialogue = _dialogue(prompt | sides, names, needs, tuple([cut[i] for i in order]))
    ordered = tuple([numbers[i] for i in order])
    return dialogue, RowAnnotations(ranks=tuple([levels.index(score) for score in ordered]), scores=ordered)


# --- annotations


def _margin(fields: dict[str, Any]) -> float:
    """By how much chosen is better: the field margin, or the difference of the sides' scores."""
    if "margin" in fields:
        margin = _number(fields, "margin")
    elif "score_chosen" in fields and "score_rejected" in fields:
        margin = _number(fields, "score_chosen") - _number(fields, "score_rejected")
    else:
        raise ValueError("no field 'margin'; the objective asks for it, or for score_chosen and score_rejected")
    if margin < 0:
        raise ValueError(f"the margin is {margin:g}, so that rejected is better than chosen; exchange them")
    return margin


def _weight(fields: dict[str, Any]) -> float:
    if "weight" not in fields:
        raise ValueError("no field 'weight'; the objective asks for it")
    weight = _number(fields, "weight")
    if weight < 0:
        raise ValueError(f"field 'weight' is {weight:g}; it must be at least 0")
    return weight


def _preference_of(row: Row) -> tuple[Dialogue, Notes]:
    fields, missing = row.fields, {}
    if _has(fields, "completions") and not _has(fields, "chosen"):
        (dialogue, annotations), read = ranked_of(row), {"weight": _weight}
    else:
        dialogue, annotations, read = pair_of(row), RowAnnotations(), {"margin": _margin, "weight": _weight}
    for name, value_of in read.items():
        try:
            annotations = dataclasses.replace(annotations, **{name: value_of(fields)})  # type: ignore[arg-type]
        except ValueError as error:
            missing[name] = str(error)
    return dialogue, Notes(annotations, missing)


def _labelled_of(row: Row) -> tuple[Dialogue, Notes]:
    needs = "a row has prompt, completion and label"
    dialogue, label = _single_of(row.fields, "completion", needs), row.fields.get("label")
    if label not in (True, False):  # 1 and 0 too
        raise ValueError("field 'label' must be true (desirable) or false; " + needs)
    return dialogue, Notes(RowAnnotations(label=float(label)))


def parse_row(row: Row, form: Form) -> tuple[Dialogue, Notes]:
    """A row's dialogue and all of its annotations, whatever an objective asks for.

    Raises:
      ValueError: the row is not usable; the message says why.
    """
    if form == "pairs":
        return _preference_of(row)
    if form == "labels":
        return _labelled_of(row)
    return (completion_of(row) if form == "completions" else prompt_of(row)), Notes()
