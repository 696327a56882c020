"""Tokens on disk: parts while they are made, then a directory of flat arrays that is mapped, not read."""

import dataclasses
import io
import json
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from dpojax.cachedir import write_arrays
from dpojax.data.read import BadRow
from dpojax.data.tokens import PER_ROW, Tokens, masks_of


@dataclasses.dataclass(frozen=True)
class FileTokens:
    """All rows of a file: those in tokens, and what is to be said of the others.

    Attributes:
      tokens: of the usable rows.
      bad: the others, in order, but for those that a filter left out.
      rows: how many the file has.
      filtered: of them, left out by a filter.
      unread: columns that nothing reads.
      format: the published format that its records have; None where they are rows of ours.
      spelled: special tokens that texts of rows spell.
      special: whether they are those tokens, not text.
      added_eos: whether chats were given an EOS that their template does not write.
    """

    tokens: Tokens
    bad: tuple[BadRow, ...] = ()
    rows: int = 0
    filtered: int = 0
    unread: tuple[str, ...] = ()
    format: str | None = None
    spelled: tuple[str, ...] = ()
    special: bool = False
    added_eos: bool = False

    def facts(self) -> dict[str, Any]:
        """All but the tokens, for JSON."""
        bad = [[b.number, b.why] for b in self.bad]
        of_tokens = {"reasons": self.tokens.reasons, "top": self.tokens.top}
        return {"bad": bad, **{name: getattr(self, name) for name in (*PLAIN, *LISTS)}, **of_tokens}


FLAT, MASKS, ROWS = "flat.bin", "masks.bin", "rows.bin"
"""Files of a directory of tokens, beside facts.json."""
PLAIN, LISTS = ("rows", "filtered", "format", "special", "added_eos"), ("unread", "spelled")
"""Fields of :class:`FileTokens`."""


def file_tokens(tokens: Tokens, facts: dict[str, Any], file: str) -> FileTokens:
    """The inverse of :meth:`FileTokens.facts`, for rows of a file of this name."""
    bad = tuple([BadRow(file, *row) for row in facts["bad"]])
    lists: dict[str, Any] = {name: tuple(facts[name]) for name in LISTS}
    return FileTokens(tokens, bad, **lists, **{n: facts[n] for n in PLAIN})


def joined_files(parts: Sequence[FileTokens], tokens: Tokens) -> FileTokens:
    """What is to be said of all parts of a file, with its tokens."""
    every = lambda name: tuple([x for part in parts for x in getattr(part, name)])  # noqa: E731
    once = lambda name: tuple(dict.fromkeys(every(name)))  # noqa: E731
    return FileTokens(
        tokens,
        every("bad"),
        sum(part.rows for part in parts),
        sum(part.filtered for part in parts),
        once("unread"),
        next((part.format for part in parts if part.format), None),
        tuple(sorted(once("spelled"))),
        any(part.special for part in parts),
        any(part.added_eos for part in parts),
    )


def without_tokens(part: FileTokens) -> FileTokens:
    """A part whose tokens lie on disk."""
    few = np.zeros(0, np.int32)
    masks = None if part.tokens.masks is None else few.astype(bool)
    return dataclasses.replace(part, tokens=dataclasses.replace(part.tokens, flat=few, masks=masks))


def part_arrays(part: FileTokens) -> dict[str, Any]:
    """A part of a file as named arrays, its facts as JSON among them."""
    arrays = {name: getattr(part.tokens, name) for name in [*PER_ROW, "flat"]}
    if part.tokens.masks is not None:
        arrays["masks"] = part.tokens.masks
    return {**arrays, "facts": json.dumps(part.facts())}


def packed(part: FileTokens) -> bytes:
    """A part of a file as bytes, from which :func:`part_of` makes it again."""
    out = io.BytesIO()
    np.savez(out, **part_arrays(part))
    return out.getvalue()


def part_of(stored: IO[bytes], file: str) -> FileTokens:
    """The part of a file that :func:`part_arrays` gave, from an ``.npz``.

    Raises:
      Exception: it is damaged; in as many ways as there are parsers on the way.
    """
    with np.load(stored, allow_pickle=False) as arrays:
        facts = json.loads(str(arrays["facts"]))
        fields = {name: arrays[name] for name in [*PER_ROW, "flat"]}
        masks = arrays.get("masks")
    tokens = Tokens(masks=masks, reasons=tuple(facts["reasons"]), top=facts["top"], **fields)
    return file_tokens(_sound(tokens), facts, file)


def write_part(path: Path, part: FileTokens) -> bool:
    """Keep a part of a file in one ``.npz``, whole or not at all; whether the disk took it."""
    return write_arrays(path, **part_arrays(part))


def read_part(path: Path, file: str) -> FileTokens | None:
    """What :func:`write_part` kept; None where there is nothing, or it is damaged."""
    try:
        with path.open("rb") as stored:
            return part_of(stored, file)
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
    masked = said.tokens.masks is not None
    try:
        aside.mkdir()
        with (aside / FLAT).open("wb") as flat, (aside / MASKS).open("wb") as masks:
            for part in parts:
                tokens = part if isinstance(part, Tokens) else part_tokens(part)
                flat.write(np.ascontiguousarray(tokens.flat, np.int32).data)
                masks.write(np.ascontiguousarray(masks_of(tokens), bool).data if masked else b"")
        layout = _write_rows(aside / ROWS, said.tokens)
        sums = {name: _checksum(_mapped(aside / name, np.uint8)) for name in (FLAT, MASKS, ROWS)}
        facts = json.dumps({**said.facts(), "masked": masked, "layout": layout, "sums": sums})
        (aside / "facts.json").write_text(f"{_checksum(facts.encode())}\n{facts}")
        try:
            aside.replace(directory)
        except OSError:
            if read_whole(directory, "") is None:  # what is there is damaged; else another process was as quick
                shutil.rmtree(directory)
                aside.replace(directory)
    except OSError:
        pass  # the disk does not take it
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return directory.is_dir()


def _write_rows(path: Path, tokens: Tokens) -> dict[str, Any]:
    """Write the arrays of rows into one file; the dtype, the shape and the place of each."""
    layout: dict[str, Any] = {}
    with path.open("wb") as file:
        for name in PER_ROW:
            array = np.ascontiguousarray(getattr(tokens, name))
            layout[name] = [array.dtype.str, array.shape, file.tell()]
            file.write(array.tobytes() + bytes(-array.nbytes % 8))
    return layout


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
    """What :func:`write_whole` kept, mapped into memory; None where there is nothing, or it is damaged."""
    try:
        total, _, written = (directory / "facts.json").read_text().partition("\n")
        facts = json.loads(written)
        sums = {name: _checksum(_mapped(directory / name, np.uint8)) for name in (FLAT, MASKS, ROWS)}
        if int(total) != _checksum(written.encode()) or facts["sums"] != sums:
            return None
        rows, fields = _mapped(directory / ROWS, np.uint8), {}
        for name in PER_ROW:
            dtype, shape, at = facts["layout"][name]
            size = math.prod(shape) * np.dtype(dtype).itemsize
            fields[name] = rows[at : at + size].view(dtype).reshape(shape)
        flat = _mapped(directory / FLAT, np.int32)
        masks = _mapped(directory / MASKS, bool) if facts["masked"] else None
        tokens = Tokens(flat, masks, reasons=tuple(facts["reasons"]), top=facts["top"], **fields)
        return file_tokens(_sound(tokens), facts, file)
    except Exception:  # damage shows in as many ways as there are parsers on the way
        return None


def _checksum(data: Any) -> int:
    return zlib.crc32(data)


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
