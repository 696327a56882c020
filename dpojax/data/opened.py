"""Files opened: what they are compressed with, how their text is encoded, a hash of their bytes."""

import bz2
import codecs
import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from dpojax.errors import UserError, first_line

COMPRESSIONS = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0", ".zst": b"\x28\xb5\x2f\xfd"}
"""Suffixes of compressed files, and the bytes that they begin with."""
ARCHIVES = {b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf": "a 7z archive"}
BOMS = {codecs.BOM_UTF8: "UTF-8", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
LOOK, PACKED = 2**20, 4  # bytes that are looked at, and how many a compressed one makes
FORMAT = 1  # of identities; raise it when the same bytes are read in another way


def form_suffix(path: Path) -> str:
    """The suffix that says what a file holds, in lower case: ".jsonl" of "Pairs.JSONL.gz"."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what the system says of a file that it cannot read, or cannot decompress, into one sentence.

    Raises:
      UserError: that sentence.
    """
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{name}: cannot be decompressed ({first_line(error)}); the file is damaged") from None
    except UnicodeError as error:
        raise UserError(f"{name}: not in the encoding that it says ({first_line(error)}); save it as UTF-8") from None
    except OSError as error:
        if error.strerror:
            raise UserError(f"{name}: cannot be read ({error.strerror})") from None
        raise UserError(f"{name}: cannot be decompressed ({first_line(error)}); the file is damaged") from None


def compression_of(path: Path) -> str | None:
    """The suffix of the compression that a file's first bytes show; None if they show none."""
    with path.open("rb") as file:
        begin = file.read(8)
    return next((suffix for suffix, magic in COMPRESSIONS.items() if begin.startswith(magic)), None)


def open_bytes(path: Path, name: str) -> IO[bytes]:
    """A file's bytes, decompressed as they are read.

    Raises:
      UserError: the suffix says that it is compressed, and it is not; or it is an archive of files.
      OSError: it cannot be read.
    """
    found = compression_of(path)
    if found is None and path.suffix.lower() in COMPRESSIONS and path.stat().st_size:
        raise UserError(f"{name}: not a {path.suffix.lower()} file; rename it, or compress it again")
    if found == ".zst":
        import pyarrow

        # Its files are io's in all but the type.
        return io.BufferedReader(cast(Any, pyarrow.input_stream(str(path), compression="zstd")))
    if found:
        openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        return cast(IO[bytes], openers[found](path, "rb"))
    file = path.open("rb")
    what = ARCHIVES.get(file.peek(4)[:4])
    if what:
        file.close()
        raise UserError(f"{name}: {what}, not a file of rows; unpack it")
    return file


def _encoding(begin: bytes) -> str:
    return next((encoding for bom, encoding in BOMS.items() if begin.startswith(bom)), "UTF-8")


def lines_of(path: Path, name: str) -> Iterator[bytes]:
    """A text file's lines, in UTF-8 without a byte order mark; bytes that are no UTF-8 stay as they are.

    Raises:
      UserError: it cannot be read, or is not the UTF-16 that its byte order mark says.
    """
    with reading(name), open_bytes(path, name) as stream:
        first = stream.readline()
        if _encoding(first) == "UTF-16":
            yield from _recoded(path, name)
            return
        yield first.removeprefix(codecs.BOM_UTF8)
        yield from stream


def _recoded(path: Path, name: str) -> Iterator[bytes]:
    with open_bytes(path, name) as stream, io.TextIOWrapper(stream, encoding="utf-16", newline="\n") as text:
        for line in text:
            yield line.encode()


@contextlib.contextmanager
def open_text(path: Path, name: str) -> Iterator[IO[str]]:
    """A text file as text, its line ends as they are.

    Raises:
      UserError: it cannot be read, or not in the encoding that its byte order mark says (UTF-8 where it has none).
    """
    with reading(name):
        with open_bytes(path, name) as stream:
            encoding = {"UTF-8": "utf-8-sig", "UTF-16": "utf-16"}[_encoding(stream.read(4))]
        with open_bytes(path, name) as stream, io.TextIOWrapper(stream, encoding=encoding, newline="") as text:
            yield text


def identity_of(path: Path) -> str | None:
    """A hash of a file's bytes and of the suffix that says how they are read; None if it cannot be read."""
    try:
        with path.open("rb") as data:
            content = hashlib.file_digest(data, "sha256").hexdigest()
    except OSError:
        return None
    return hash_of(content=content, suffix=form_suffix(path))


@dataclasses.dataclass(frozen=True)
class FileSource:
    """A file that is a source (:class:`~dpojax.data.read.Source`), but for its blocks.

    Attributes:
      name: as errors and reports name it.
      path: of the file.
      beside: where caches are kept; None where they are kept nowhere.
    """

    name: str
    path: Path
    beside: str | None

    def identity(self) -> str | None:
        """A hash of its bytes and suffix."""
        return identity_of(self.path)

    def estimated_rows(self) -> int:
        """Roughly how many lines it has, by its size and its first lines."""
        with contextlib.suppress(OSError, EOFError, UserError, zlib.error, lzma.LZMAError):
            with open_bytes(self.path, self.name) as file:
                begin = file.read(LOOK)
            unpacked = self.path.stat().st_size * (PACKED if compression_of(self.path) else 1)
            return max(1, round(begin.count(b"\n") / max(len(begin), 1) * unpacked))
        return 1


def hash_of(**facts: Any) -> str:
    """A hash of facts, and of the version in which rows are read."""
    return hashlib.sha256(json.dumps(facts | {"format": FORMAT}, sort_keys=True).encode()).hexdigest()
