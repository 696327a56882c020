"""The tokens of rows as flat arrays: however many rows there are, no object a row."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpojax.data.dialogue import OPTIONAL, Notes, RowAnnotations
from dpojax.data.encode import TokenizedRow

NEVER = -1  # as a common beginning: there is nothing to compare


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Rows in tokens; n rows of at most N completions, L tokens in all.

    Attributes:
      flat: ``[L]``, prompt and completions of row after row.
      masks: ``[L]``, which tokens are trained on; None: all that are of completions.
      lengths: ``[n, 1 + N]``, of prompt and completions; 0 where a row has fewer completions than others.
      numbers: ``[n]``, of the rows in their file.
      keys: ``[n]``, a hash of each row's tokens and masks.
      prompts: ``[n]``, a hash of each row's prompt.
      common: ``[n]``, the longest beginning that two of a row's completions share; -1 where there is one alone.
      blank: ``[n]``, the most tokens that say nothing a completion begins with.
      ranks: ``[n, N]``, of completions, -1 where a row has none.
      scores: ``[n, N]``, of completions; like margin, weight and label, ``[n]``, NaN where a row has none.
      missing: ``[n, 2]``, why a row has no margin and no weight, as an index into ``reasons``, -1 where it has.
      reasons: sentences.
      top: the largest token id.
    """

    flat: np.ndarray
    masks: np.ndarray | None
    lengths: np.ndarray
    numbers: np.ndarray
    keys: np.ndarray
    prompts: np.ndarray
    common: np.ndarray
    blank: np.ndarray
    ranks: np.ndarray
    scores: np.ndarray
    margin: np.ndarray
    weight: np.ndarray
    label: np.ndarray
    missing: np.ndarray
    reasons: tuple[str, ...] = ()
    top: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> np.ndarray:
        """``[n]``, where each row begins in ``flat``."""
        totals = self.lengths.sum(axis=1, dtype=np.int64)
        return np.cumsum(totals) - totals


PER_ROW = [f.name for f in dataclasses.fields(Tokens) if f.name not in ("flat", "masks", "reasons", "top")]
FILL = {"lengths": 0, "ranks": -1, "scores": np.nan}
"""Of the columns that a row has not, in the fields that have several."""


def hashed(*arrays: np.ndarray) -> int:
    """A hash of arrays and of where each of them ends, as 64 bits."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(len(array).to_bytes(4, "little") + array.tobytes())
    return int.from_bytes(digest.digest(), "little")


def _common_beginning(completions: Sequence[np.ndarray]) -> int:
    """The longest beginning that two of them share."""
    longest = NEVER
    for i, a in enumerate(completions):
        for b in completions[:i]:
            n = min(len(a), len(b))
            differing = np.flatnonzero(a[:n] != b[:n])
            longest = max(longest, int(differing[0]) if len(differing) else n)
    return longest


def tokens_of(rows: Sequence[TokenizedRow]) -> Tokens:
    """Rows as flat arrays."""
    n, most = len(rows), max((len(row.parts) for row in rows), default=1)
    lengths = np.zeros((n, most), np.int32)
    ranks, scores = np.full((n, most - 1), -1, np.int32), np.full((n, most - 1), np.nan)
    missing, reasons = np.full((n, len(OPTIONAL)), -1, np.int32), dict[str, int]()
    single = {name: np.full(n, np.nan) for name in ("margin", "weight", "label")}
    masks: list[np.ndarray] | None = [] if any(row.masks for row in rows) else None
    for i, row in enumerate(rows):
        notes = row.notes.annotations
        lengths[i, : len(row.parts)] = [len(part) for part in row.parts]
        ranks[i, : len(notes.ranks)], scores[i, : len(notes.scores)] = notes.ranks, notes.scores
        for name, values in single.items():
            if (value := getattr(notes, name)) is not None:
                values[i] = value
        for k, name in enumerate(OPTIONAL):
            if name in row.notes.missing:
                missing[i, k] = reasons.setdefault(row.notes.missing[name], len(reasons))
        if masks is not None:
            masks += [np.zeros(len(row.parts[0]), bool)]
            masks += row.masks or [np.ones(len(part), bool) for part in row.parts[1:]]
    flat = np.concatenate([part for row in rows for part in row.parts] or [np.zeros(0, np.int32)])
    return Tokens(
        flat=flat,
        masks=None if masks is None else np.concatenate(masks),
        lengths=lengths,
        numbers=np.array([row.number for row in rows], np.int64),
        keys=np.array([hashed(*row.parts, *row.masks) for row in rows], np.uint64),
        prompts=np.array([row.prompt for row in rows], np.uint64),
        common=np.array([_common_beginning(row.parts[1:]) for row in rows], np.int32),
        blank=np.array([row.blank for row in rows], np.int32),
        ranks=ranks,
        scores=scores,
        missing=missing,
        reasons=tuple(reasons),
        top=int(flat.max(initial=0)),
        **single,
    )


def annotations_at(tokens: Tokens, i: int) -> Notes:
    """The notes of a row: its annotations, and why it lacks some."""
    n = int((tokens.lengths[i, 1:] > 0).sum())
    ranks, scores = tokens.ranks[i, :n], tokens.scores[i, :n]
    there: dict[str, Any] = {name: float(getattr(tokens, name)[i]) for name in ("margin", "weight", "label")}
    there = {name: x for name, x in there.items() if not np.isnan(x)}
    if n and ranks[0] >= 0:
        there |= {"ranks": tuple(ranks.tolist()), "scores": tuple(scores.tolist())}
    missing = {
        name: tokens.reasons[why] for name, why in zip(OPTIONAL, tokens.missing[i].tolist(), strict=True) if why >= 0
    }
    return Notes(RowAnnotations(**there), missing)


def widened(arrays: Sequence[np.ndarray], fill: float) -> list[np.ndarray]:
    """Arrays ``[n, W]`` filled up to the largest W."""
    width = max(array.shape[1] for array in arrays)
    return [np.pad(array, [(0, 0), (0, width - array.shape[1])], constant_values=fill) for array in arrays]


def _per_row(parts: Sequence[Tokens]) -> dict[str, Any]:
    """The rows' fields of all parts, and the sentences that they index."""
    fields: dict[str, Any] = {"top": max(part.top for part in parts)}
    for name in PER_ROW:
        arrays = [getattr(part, name) for part in parts]
        if name in FILL:
            arrays = widened(arrays, FILL[name])
        elif name == "missing":
            reasons = list(dict.fromkeys(why for part in parts for why in part.reasons))
            at = [np.array([reasons.index(why) for why in part.reasons] + [-1], np.int32) for part in parts]
            arrays = [index[x] for index, x in zip(at, arrays, strict=True)]
            fields["reasons"] = tuple(reasons)
        fields[name] = np.concatenate(arrays)
    return fields


def joined(parts: Sequence[Tokens]) -> Tokens:
    """Parts one after another, in memory."""
    if len(parts) == 1:
        return parts[0]
    masks = None
    if any(part.masks is not None for part in parts):
        masks = np.concatenate([masks_of(part) for part in parts])
    return Tokens(flat=np.concatenate([part.flat for part in parts]), masks=masks, **_per_row(parts))


def masks_of(part: Tokens) -> np.ndarray:
    """The masks of a part, also where all tokens of completions are trained on."""
    if part.masks is not None:
        return part.masks
    columns = np.arange(part.lengths.shape[1]) > 0
    return np.repeat(np.broadcast_to(columns, part.lengths.shape).reshape(-1), part.lengths.reshape(-1))
