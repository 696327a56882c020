"""What a row is read as: its dialogue, its annotations, and the kinds of rows that runs read."""

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any, Literal

from dpojax.data.messages import Message

if TYPE_CHECKING:
    from dpojax.losses.traits import Traits

Form = Literal["pairs", "completions", "labels", "prompts", "candidates"]
TokenIds = tuple[int, ...]
Text = str | list[Message] | TokenIds  # plain text, chat messages, or token ids


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
CANDIDATES = RowKind("candidates")


def kind_of(traits: "Traits") -> RowKind:
    """The rows that an objective of these traits is trained on."""
    if traits.on == "labels":
        return LABELS
    return RowKind("pairs", margin="margin" in traits.reads, weight="weight" in traits.reads)


def fields_read(form: Form) -> frozenset[str]:
    """The fields that rows of a form may have; others have no meaning here."""
    chat = {"prompt", "prompt_ids", "system", "tools", "chat_template_kwargs"}
    pair = {f"{side}{end}" for side in ("chosen", "rejected") for end in ("", "_ids", "_truncated")}
    single = {"completion", "completion_ids", "truncated"}
    several = {"completions", "completions_ids", "scores", "truncated"}
    numbers = {"margin", "score_chosen", "score_rejected", "weight"}
    of_form = {
        "pairs": pair | several | numbers,
        "completions": single | pair | several,
        "labels": single | pair | {"label"},
        "prompts": set(),
        "candidates": pair | several,
    }
    return frozenset(chat | of_form[form])


def hash_of_text(text: Text) -> int:
    """A hash of a text, of chat messages or of token ids, as 64 bits: equal prompts have equal ones."""
    try:
        said = json.dumps(text, sort_keys=True, default=str).encode()
    except TypeError:  # names that are not all of one kind, which only rows in memory can have
        said = repr(text).encode(errors="backslashreplace")
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little")


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A prompt and its completions, the best first, all as text, or all as chat messages, or as token ids.

    ``truncated`` is true of each completion that was cut before its end; it is empty where none was.
    ``template_kwargs`` are the row's own arguments of the chat template, ``tools`` among them.
    """

    prompt: Text
    completions: tuple[Text, ...]
    truncated: tuple[bool, ...] = ()
    template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


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
