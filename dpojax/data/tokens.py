"""The tokens of rows as flat arrays, in memory or mapped from files: however many rows there are, no object a row."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpojax.data.dialogue import OPTIONAL, Notes, RowAnnotations
from dpojax.data.encode import TokenizedRow
from dpojax.data.read import BadRow

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
        prompts=np.array([hashed(row.parts[0]) for row in rows], np.uint64),
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
        masks = np.concatenate([_masks(part) for part in parts])
    return Tokens(flat=np.concatenate([part.flat for part in parts]), masks=masks, **_per_row(parts))


def _masks(part: Tokens) -> np.ndarray:
    """The masks of a part, also where all tokens of completions are trained on."""
    if part.masks is not None:
        return part.masks
    columns = np.arange(part.lengths.shape[1]) > 0
    return np.repeat(np.broadcast_to(columns, part.lengths.shape).reshape(-1), part.lengths.reshape(-1))


# ---- on disk --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FileTokens:
    """All rows of a file: those in tokens, and what is to be said of the others.

    Attributes:
      tokens: of the usable rows.
      not_rendered: rows with unusable fields, or refused by the chat template.
      not_encoded: rows found unusable only as tokens.
      rows: how many the file has.
      filtered: of them, left out by a filter.
      unread: columns that nothing reads.
      format: the published format that its records have; None where they are rows of ours.
      spelled: special tokens that texts of rows spell.
      added_eos: whether chats were given an EOS that their template does not write.
    """

    tokens: Tokens
    not_rendered: tuple[BadRow, ...] = ()
    not_encoded: tuple[BadRow, ...] = ()
    rows: int = 0
    filtered: int = 0
    unread: tuple[str, ...] = ()
    format: str | None = None
    spelled: tuple[str, ...] = ()
    added_eos: bool = False

    def facts(self) -> dict[str, Any]:
        """All but the tokens, for JSON."""
        bad = {name: [[b.number, b.why] for b in getattr(self, name)] for name in ("not_rendered", "not_encoded")}
        plain = ("rows", "filtered", "unread", "format", "spelled", "added_eos")
        of_tokens = {"reasons": self.tokens.reasons, "top": self.tokens.top}
        return {**bad, **{name: getattr(self, name) for name in plain}, **of_tokens}


def file_tokens(tokens: Tokens, facts: dict[str, Any], file: str) -> FileTokens:
    """The inverse of :meth:`FileTokens.facts`, for rows of a file of this name."""
    bad = {name: tuple([BadRow(file, *row) for row in facts[name]]) for name in ("not_rendered", "not_encoded")}
    lists = {name: tuple(facts[name]) for name in ("unread", "spelled")}
    return FileTokens(tokens, **bad, **lists, **{n: facts[n] for n in ("rows", "filtered", "format", "added_eos")})


def joined_files(parts: Sequence[FileTokens], tokens: Tokens) -> FileTokens:
    """What is to be said of all parts of a file, with its tokens."""
    every = lambda name: tuple([x for part in parts for x in getattr(part, name)])  # noqa: E731
    once = lambda name: tuple(dict.fromkeys(every(name)))  # noqa: E731
    return FileTokens(
        tokens,
        every("not_rendered"),
        every("not_encoded"),
        sum(part.rows for part in parts),
        sum(part.filtered for part in parts),
        once("unread"),
        next((part.format for part in parts if part.format), None),
        tuple(sorted(once("spelled"))),
        any(part.added_eos for part in parts),
    )


def write_part(path: Path, part: FileTokens) -> bool:
    """Keep a part of a file in one ``.npz``, whole or not at all; whether the disk took it."""
    arrays = {name: getattr(part.tokens, name) for name in [*PER_ROW, "flat"]}
    if part.tokens.masks is not None:
        arrays["masks"] = part.tokens.masks
    partial = path.with_name(f"{path.stem}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("xb") as file:
            np.savez(file, **arrays, facts=json.dumps(part.facts()))
        partial.replace(path)
        return True
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def read_part(path: Path, file: str) -> FileTokens | None:
    """What :func:`write_part` kept; None where there is nothing, or it is damaged."""
    try:
        with path.open("rb") as stored, np.load(stored, allow_pickle=False) as arrays:
            facts = json.loads(str(arrays["facts"]))
            fields = {name: arrays[name] for name in [*PER_ROW, "flat"]}
            masks = arrays.get("masks")
        tokens = Tokens(masks=masks, reasons=tuple(facts["reasons"]), top=facts["top"], **fields)
        return file_tokens(_sound(tokens), facts, file)
    except Exception:  # damage shows in as many ways as there are parsers on the way
        return None


def write_whole(directory: Path, parts: Sequence[Tokens | Path], said: FileTokens) -> bool:
    """Keep a file's tokens in a directory of flat arrays, whole or not at all; whether it is there now.

    Args:
      directory: where.
      parts: the tokens in order, in memory or as parts on disk; of the latter, one is in memory at a time.
      said: all but ``flat`` and ``masks``.
    """
    aside = directory.with_name(f"{directory.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    try:
        aside.mkdir()
        with (aside / "flat.bin").open("wb") as flat, (aside / "masks.bin").open("wb") as masks:
            for part in parts:
                tokens = part if isinstance(part, Tokens) else part_tokens(part)
                flat.write(np.ascontiguousarray(tokens.flat, np.int32).data)
                masks.write(np.ascontiguousarray(_masks(tokens), bool).data if said.tokens.masks is not None else b"")
        for name in PER_ROW:
            np.save(aside / f"{name}.npy", getattr(said.tokens, name))
        facts = {**said.facts(), "masked": said.tokens.masks is not None}
        (aside / "facts.json").write_text(json.dumps(facts))
        aside.replace(directory)
    except OSError:
        pass  # the disk does not take it, or another process was as quick
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return directory.is_dir()


def part_tokens(path: Path) -> Tokens:
    """The tokens of a part on disk.

    Raises:
      OSError: it has gone.
    """
    part = read_part(path, "")
    if part is None:
        raise OSError(f"{path}: has gone")
    return part.tokens


def read_whole(directory: Path, file: str) -> FileTokens | None:
    """What :func:`write_whole` kept, mapped, not read; None where there is nothing, or it is damaged."""
    try:
        facts = json.loads((directory / "facts.json").read_text())
        fields = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in PER_ROW}
        flat = _mapped(directory / "flat.bin", np.int32)
        masks = _mapped(directory / "masks.bin", bool) if facts["masked"] else None
        tokens = Tokens(flat, masks, reasons=tuple(facts["reasons"]), top=facts["top"], **fields)
        return file_tokens(_sound(tokens), facts, file)
    except Exception:  # damage shows in as many ways as there are parsers on the way
        return None


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def _sound(tokens: Tokens) -> Tokens:
    """The tokens.

    Raises:
      ValueError: their arrays do not fit together.
    """
    n, L = len(tokens), int(tokens.lengths.sum(dtype=np.int64))
    masks = tokens.flat if tokens.masks is None else tokens.masks
    if len(tokens.flat) != L or len(masks) != L or any(len(getattr(tokens, name)) != n for name in PER_ROW):
        raise ValueError("damaged")
    return tokens
