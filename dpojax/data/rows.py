"""A row's fields -> its dialogue (a prompt and completions) and its annotations.

Forms of rows (:class:`RowKind`), by their fields:

- ``pairs``: ``prompt``, ``chosen``, ``rejected``; or ``prompt``, ``completions``, ``scores``, two lists of one length,
  of which every two completions of different scores are a pair. An objective may ask pairs for a ``margin`` (or
  ``score_chosen`` and ``score_rejected``, whose difference it is) and for a ``weight``.
- ``completions``: ``prompt``, ``completion``; or a pair, whose chosen side it is.
- ``labels``: ``prompt``, ``completion``, ``label`` (true: desirable).
- ``prompts``: ``prompt``.
- ``candidates``: ``prompt``; and ``completion``, ``completions``, or a pair. All completions are wanted, to be scored,
  in their order, equal ones too.

A pair is also two labelled rows, and a list with scores is also the completion of the highest score. A text is plain
text or a list of chat messages (:mod:`dpojax.data.messages`). Completions that are whole conversations may leave the
prompt out: it is then the beginning that they share. A chat may have ``system``, a text that becomes its system message
and makes a chat of plain text; ``tools``; and ``chat_template_kwargs``. :func:`fields_read` names all fields of a form;
whoever reads rows says which others there are.

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
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from dpojax.data.dialogue import Dialogue, Form, Notes, RowAnnotations, Text, TokenIds
from dpojax.data.messages import Message, is_blank, messages_of, template_kwargs_of, tools_of, unicode_text
from dpojax.data.read import Row, name_of

PROMPT_AND_COMPLETION = "a row has prompt and completion, or is a pair"
LISTENERS = ("user", "system", "developer", "tool", "function", "ipython")
"""Roles whose messages are no completions."""


# --- one field


def _has(fields: dict[str, Any], name: str) -> bool:
    """Whether a row has a field; Parquet fills rows with nulls for the fields that they lack."""
    return fields.get(name) is not None or fields.get(f"{name}_ids") is not None


def _text(fields: dict[str, Any], name: str, needs: str) -> Text:
    """The field's token ids where it has them, or else its text or chat messages, checked."""
    if fields.get(f"{name}_ids") is not None:
        return _token_ids(fields[f"{name}_ids"], f"{name}_ids")
    if fields.get(name) is None:
        raise ValueError(f"no field {name!r}; {needs}")
    value = fields[name]
    if isinstance(value, str):
        return unicode_text(value, f"field {name!r}")
    if isinstance(value, dict) and "role" in value:
        value = [value]  # a single message
    if not isinstance(value, list):
        raise ValueError(f"field {name!r} is a {name_of(value)}; it must be text or a list of chat messages")
    return messages_of(value, name)


def _token_ids(value: Any, name: str) -> TokenIds:
    ids = value if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim) else ()
    if not len(ids) or any(isinstance(i, bool) or not isinstance(i, Integral) or not 0 <= int(i) < 2**31 for i in ids):
        raise ValueError(f"field {name!r} must be a list of at least one token id, each a whole number of at least 0")
    return tuple(map(int, ids))


def _is_empty(text: Text) -> bool:
    if isinstance(text, str):
        return not text.strip()
    return isinstance(text, list) and is_blank(text)


def _flag(value: Any, name: str) -> bool:
    if value is not None and not isinstance(value, bool | np.bool_):
        must = "true (the completion was cut before its end) or false"
        raise ValueError(f"field {name!r} is a {name_of(value)}; it must be {must}")
    return bool(value)


def _number(fields: dict[str, Any], name: str) -> float:
    value = fields.get(name)
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        shown = name_of(value) if not isinstance(value, float) else str(value)
        raise ValueError(f"field {name!r} is {shown}; it must be a finite number")
    return number


# --- dialogues


def _shared(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages two conversations begin with alike."""
    alike = [a == b for a, b in zip(chosen, rejected, strict=False)]
    return alike.index(False) if False in alike else len(alike)


def _conversations(prompt: Text | None, sides: list[list[Message]]) -> Dialogue:
    """Completions as chat messages: after a prompt given as messages, or after the beginning they share."""
    if isinstance(prompt, tuple):
        raise ValueError("prompt_ids are token ids and the completions are chats; give them as text or token ids")
    if isinstance(prompt, str) and all(side[0]["role"] not in LISTENERS for side in sides):
        prompt = [{"role": "user", "content": prompt}]
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
    for side in sides:
        if (role := side[0]["role"]) in LISTENERS:
            raise ValueError(f"a completion begins with a message of role {role!r}; it must begin with the assistant's")
    return Dialogue(prompt, tuple(sides))


def _with_system(dialogue: Dialogue, system: Any) -> Dialogue:
    """The dialogue, as a chat, after a system message."""
    if system is None or system == "":
        return dialogue
    if not isinstance(system, str):
        raise ValueError(f"field 'system' is a {name_of(system)}; it must be text")
    if isinstance(dialogue.prompt, tuple):
        raise ValueError("prompt_ids are used as they are; leave out the field 'system'")
    chat = as_chat(dialogue)
    assert isinstance(chat.prompt, list)
    message = {"role": "system", "content": unicode_text(system, "field 'system'")}
    if chat.prompt[0]["role"] != "system":
        return dataclasses.replace(chat, prompt=[message, *chat.prompt])
    if chat.prompt[0]["content"] != system:
        raise ValueError("field 'system' differs from the system message that the chat begins with; leave one out")
    return chat


def as_chat(dialogue: Dialogue) -> Dialogue:
    """A dialogue in plain text as a user's message and an assistant's replies; any other as it is."""
    if not isinstance(dialogue.prompt, str):
        return dialogue
    replies = tuple([_reply(side) for side in dialogue.completions])
    return dataclasses.replace(dialogue, prompt=[{"role": "user", "content": dialogue.prompt}], completions=replies)


def _reply(side: Text) -> Text:
    return [{"role": "assistant", "content": side}] if isinstance(side, str) else side


def _dialogue(
    fields: dict[str, Any],
    names: tuple[str, ...],
    sides: list[Text],
    needs: str,
    truncated: tuple[bool, ...],
    empty: bool = False,
) -> Dialogue:
    """The prompt and the completions (``sides``, of the fields of these names), all checked; they may be ``empty``."""
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
        dialogue = Dialogue(prompt, tuple(map(_reply, sides)))
    else:
        dialogue = Dialogue(prompt, tuple(sides))
    for name, side in zip(names, dialogue.completions, strict=True):
        if _is_empty(side) and not empty:
            say = "give it text, leave the row out, or give an empty reply that was sampled as token ids"
            raise ValueError(f"field {name!r} is an empty completion; {say}")
    return _with_template(dataclasses.replace(dialogue, truncated=truncated if any(truncated) else ()), fields)


def _with_template(dialogue: Dialogue, fields: dict[str, Any]) -> Dialogue:
    """The dialogue with the fields that shape its prompt: system, tools, arguments of the chat template."""
    dialogue = _with_system(dialogue, fields.get("system"))
    kwargs = template_kwargs_of(fields.get("chat_template_kwargs"))
    if (tools := tools_of(fields.get("tools"))) is not None:
        kwargs["tools"] = tools
    if kwargs and not isinstance(dialogue.prompt, list):
        raise ValueError(f"field {'tools' if tools else 'chat_template_kwargs'!r} is for chats, and the row is none")
    return dataclasses.replace(dialogue, template_kwargs=kwargs) if kwargs else dialogue


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
    return _dialogue(fields, names, sides, needs, cut)


def _single_of(fields: dict[str, Any], name: str, needs: str, empty: bool = False) -> Dialogue:
    flags = [_flag(fields.get(flag), flag) for flag in ("truncated", "chosen_truncated")]
    cut = flags[0] or (name == "chosen" and flags[1])
    return _dialogue(fields, (name,), [_text(fields, name, needs)], needs, (cut,), empty)


def completion_of(row: Row) -> Dialogue:
    """A row's prompt and its one completion: ``completion``, or a pair's ``chosen`` side.

    Raises:
      ValueError: the row has neither; the message says why.
    """
    if _is_ranked(row.fields):
        best = ranked_of(row)[0]
        return dataclasses.replace(best, completions=best.completions[:1], truncated=best.truncated[:1])
    if _has(row.fields, "completion") or not _has(row.fields, "chosen"):
        return _single_of(row.fields, "completion", PROMPT_AND_COMPLETION)
    if not _has(row.fields, "rejected"):
        return _single_of(row.fields, "chosen", PROMPT_AND_COMPLETION)
    return _side(pair_of(row), 0)  # whole conversations say by their two sides where the prompt ends


def _side(pair: Dialogue, i: int) -> Dialogue:
    cut = pair.truncated[i : i + 1]
    return dataclasses.replace(pair, completions=pair.completions[i : i + 1], truncated=cut if any(cut) else ())


def _is_ranked(fields: dict[str, Any]) -> bool:
    return _has(fields, "completions") and not _has(fields, "chosen") and not _has(fields, "completion")


def prompt_of(row: Row) -> Dialogue:
    """A row's prompt, without completions.

    Raises:
      ValueError: the row has none; the message says why.
    """
    return _with_template(Dialogue(_text(row.fields, "prompt", "a row has a prompt"), ()), row.fields)


def candidates_of(row: Row, *, empty: bool = False) -> Dialogue:
    """A row's prompt and all of its completions, in their order: ``completions``, ``completion``, or a pair's sides.

    Args:
      row: its fields.
      empty: let completions that say nothing be.

    Raises:
      ValueError: the row has none, or one that is not usable; the message says why.
    """
    fields, needs = row.fields, "a row has prompt and completion, completions, or chosen and rejected"
    if not _is_ranked(fields):
        if _has(fields, "completion") or not _has(fields, "chosen"):
            return _single_of(fields, "completion", needs, empty)
        if not _has(fields, "rejected"):
            return _single_of(fields, "chosen", needs, empty)
        pair = ("chosen", "rejected")
        cut = tuple([_flag(fields.get(f"{name}_truncated"), f"{name}_truncated") for name in pair])
        return _dialogue(fields, pair, [_text(fields, name, needs) for name in pair], needs, cut, empty)
    suffix = "_ids" if fields.get("completions_ids") is not None else ""
    completions = fields[f"completions{suffix}"]
    if not isinstance(completions, list) or not completions:
        raise ValueError(f"field 'completions{suffix}' must be a list of at least one completion")
    names = tuple([f"completions[{i}]" for i in range(1, len(completions) + 1)])
    named = {f"{name}{suffix}": completion for name, completion in zip(names, completions, strict=True)}
    sides = [_text(named, name, needs) for name in names]
    return _dialogue(fields, names, sides, needs, _truncated_of(fields, len(completions)), empty)


def with_scores(fields: dict[str, Any], scores: Sequence[float]) -> dict[str, Any]:
    """A row with the scores of its :func:`candidates_of`, under the names by which they are read: ``score``,
    ``scores``, or ``score_chosen`` and ``score_rejected``; any that it had are replaced."""
    if _is_ranked(fields):
        return {**fields, "scores": list(scores)}
    if _has(fields, "completion") or not _has(fields, "chosen"):
        return {**fields, "score": scores[0]}
    return {**fields, **dict(zip(("score_chosen", "score_rejected"), scores, strict=False))}


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
    needs = "a row has prompt, completions and scores"
    named = {f"{name}{suffix}": completions[i] for name, i in zip(names, order, strict=True)}
    sides = [_text(named, name, needs) for name in names]
    dialogue = _dialogue(fields, names, sides, needs, tuple([cut[i] for i in order]))
    ordered = tuple([numbers[i] for i in order])
    return dialogue, RowAnnotations(ranks=tuple([levels.index(score) for score in ordered]), scores=ordered)


# --- annotations


def _margin(fields: dict[str, Any]) -> float:
    """By how much chosen is better: the field margin, or the difference of the sides' scores."""
    if fields.get("margin") is not None:
        margin = _number(fields, "margin")
    elif fields.get("score_chosen") is not None and fields.get("score_rejected") is not None:
        margin = _number(fields, "score_chosen") - _number(fields, "score_rejected")
    else:
        raise ValueError("no field 'margin'; the objective asks for it, or for score_chosen and score_rejected")
    if margin < 0:
        raise ValueError(f"the margin is {margin:g}, so that rejected is better than chosen; exchange them")
    return margin


def _weight(fields: dict[str, Any]) -> float:
    if fields.get("weight") is None:
        raise ValueError("no field 'weight'; the objective asks for it")
    weight = _number(fields, "weight")
    if weight < 0:
        raise ValueError(f"field 'weight' is {weight:g}; it must be at least 0")
    return weight


def _preference_of(row: Row) -> tuple[Dialogue, Notes]:
    fields, missing = row.fields, {}
    if _is_ranked(fields):
        (dialogue, annotations), read = ranked_of(row), {"weight": _weight}
    else:
        dialogue, annotations, read = pair_of(row), RowAnnotations(), {"margin": _margin, "weight": _weight}
    for name, value_of in read.items():
        try:
            annotations = dataclasses.replace(annotations, **{name: value_of(fields)})  # type: ignore[arg-type]
        except ValueError as error:
            missing[name] = str(error)
    return dialogue, Notes(annotations, missing)


def _labelled_of(row: Row) -> list[tuple[Dialogue, Notes]]:
    """A completion with its label; of a pair, the chosen side as desirable and the rejected one as undesirable."""
    fields, needs = row.fields, "a row has prompt, completion and label"
    if not _has(fields, "completion") and _has(fields, "chosen") and _has(fields, "rejected"):
        pair = pair_of(row)
        return [(_side(pair, i), Notes(RowAnnotations(label=1.0 - i))) for i in (0, 1)]
    dialogue, label = _single_of(fields, "completion", needs), fields.get("label")
    if label not in (True, False):  # 1 and 0 too
        raise ValueError("field 'label' must be true (desirable) or false; " + needs)
    return [(dialogue, Notes(RowAnnotations(label=float(label))))]


def parse_row(row: Row, form: Form) -> list[tuple[Dialogue, Notes]]:
    """A row's dialogue and all of its annotations, whatever an objective asks for; a pair is two labelled dialogues.

    Raises:
      ValueError: the row is not usable; the message says why.
    """
    if form == "pairs":
        return [_preference_of(row)]
    if form == "labels":
        return _labelled_of(row)
    of_form = {"completions": completion_of, "candidates": candidates_of, "prompts": prompt_of}
    return [(of_form[form](row), Notes())]
