"""A source's rows -> tokens: block by block, over several processes, going on where an interrupted run stopped."""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from dpojax import processes
from dpojax.data.dialogue import Form, fields_read, hash_of_text
from dpojax.data.encode import Encoder, RenderedRow, TokenizedRow
from dpojax.data.filters import Filter
from dpojax.data.formats import Format, detect, format_named
from dpojax.data.opened import identity_of
from dpojax.data.read import BadRow, Block, Row, Source
from dpojax.data.rows import parse_row
from dpojax.data.spread import of_first, with_others
from dpojax.data.store import (
    FileTokens,
    joined_files,
    part_tokens,
    read_part,
    read_whole,
    without_tokens,
    write_part,
    write_whole,
)
from dpojax.data.tokens import Tokens, joined, tokens_of
from dpojax.errors import UserError

ROWS_OF_BLOCK = 1024
BLOCKS_ALONE = 8  # a source of no more is done in this process: others take seconds to start


@dataclasses.dataclass(frozen=True)
class Reading:
    """How records become rows.

    Attributes:
      form: of the rows.
      format: a published format, a user's own as ``path.py:name``, rows (of ours), or auto: found by the first record.
      filters: of the records.
    """

    form: Form = "pairs"
    format: str = "auto"
    filters: tuple[Filter, ...] = ()

    def format_of(self, fields: dict[str, Any]) -> Format | None:
        """The format of a source whose first record has these fields; None where its records are rows of ours."""
        if self.format == "rows":
            return None
        return detect(fields) if self.format == "auto" else format_named(self.format)

    def identity(self) -> dict[str, Any]:
        """All that it depends on, for JSON: a user's own file by its content."""
        path, colon, _ = self.format.rpartition(":")
        own = identity_of(Path(path)) if colon and path.endswith(".py") and Path(path).is_file() else ""
        return {**dataclasses.asdict(self), "file": own}


@dataclasses.dataclass
class ParsedRows:
    """A block's rows as text, and what is to be said of its records."""

    rendered: list[RenderedRow] = dataclasses.field(default_factory=list)
    bad: list[BadRow] = dataclasses.field(default_factory=list)
    rows: int = 0
    filtered: int = 0
    unread: dict[str, None] = dataclasses.field(default_factory=dict)


def parse_rows(
    rows: Sequence[Row | BadRow], reading: Reading, format: Format | None, encoder: Encoder | None
) -> ParsedRows:
    """The rows as text; without an encoder, their fields are checked alone, and the texts are empty."""
    out = ParsedRows()
    known = fields_read(reading.form) if format is None else frozenset(format.reads)
    for row in rows:
        try:
            if isinstance(row, BadRow):
                raise ValueError(row.why)
            if not kept(row, reading, format):
                out.filtered += 1
                out.rows += 1
                continue
            if known:  # a user's own format need not say what it reads
                records = row.fields["records"] if format and format.group else [row.fields]
                there = [name for record in records for name, x in record.items() if x is not None]
                out.unread |= dict.fromkeys([name for name in there if name not in known])
            fields = format.row(row.fields) if format else row.fields
            parsed = parse_row(Row(row.file, row.number, fields), reading.form)
            rendered = [
                RenderedRow(
                    row.number,
                    encoder.render(dialogue) if encoder else [],
                    hash_of_text(dialogue.prompt),
                    notes,
                    differ=reading.form != "candidates",
                )
                for dialogue, notes in parsed
            ]
            out.rows += len(rendered)
            out.rendered += rendered
        except (ValueError, RecursionError) as error:
            out.rows += 1
            deep = "its values are nested too deeply; leave the row out"
            out.bad.append(BadRow(row.file, row.number, deep if isinstance(error, RecursionError) else str(error)))
    return out


def kept(row: Row, reading: Reading, format: Format | None) -> bool:
    """Whether the filters leave a record; of a group, whose records they have seen already, whether any is left.

    Raises:
      ValueError: the record has not what a filter compares.
    """
    if format and format.group:
        return bool(row.fields["records"])
    return all(f.keeps(row.fields) for f in reading.filters)


def tokenize_rows(
    rows: Sequence[Row | BadRow], reading: Reading, format: Format | None, encoder: Encoder
) -> FileTokens:
    """The rows in tokens, and what is to be said of the others."""
    encoder.forget_remarks()
    parsed = parse_rows(rows, reading, format, encoder)
    usable: list[TokenizedRow] = []
    bad: list[BadRow] = []
    for row, got in zip(parsed.rendered, encoder.tokenize(parsed.rendered), strict=True):
        if isinstance(got, str):
            bad.append(BadRow(rows[0].file, row.number, got))
        else:
            usable.append(got)
    return FileTokens(
        tokens_of(usable),
        tuple(sorted([*parsed.bad, *bad], key=lambda row: row.number)),
        parsed.rows,
        parsed.filtered,
        (*parsed.unread, *sorted(encoder.template.unread)),
        format.title if format else None,
        tuple(sorted(encoder.spelled)),
        encoder.options.allow_special_tokens,
        encoder.added_eos,
    )


def check_source(source: Source, reading: Reading) -> FileTokens:
    """What is to be said of a source's rows by their fields alone; those that are usable have no tokens.

    Raises:
      UserError: the source cannot be read.
    """
    format, blocks = format_and_blocks(source, reading)
    parts = []
    for block in blocks:
        parsed = parse_rows(block.rows(), reading, format, None)
        none = (np.zeros(0, np.int32),)
        rows = [TokenizedRow(row.number, none, (), 0, row.prompt, row.notes) for row in parsed.rendered]
        title = format.title if format else None
        said = (tuple(parsed.bad), parsed.rows, parsed.filtered, tuple(parsed.unread), title)
        parts.append(FileTokens(tokens_of(rows), *said))
    return joined_files(parts, joined([part.tokens for part in parts]))


# ---- blocks ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rows:
    """A block of rows that have been read already."""

    held: list[Row | BadRow]

    @property
    def first(self) -> int:
        return self.held[0].number

    def rows(self) -> list[Row | BadRow]:
        return self.held


def grouped(blocks: Iterable[Block], column: str, filters: Sequence[Filter]) -> Iterator[Block]:
    """Blocks in which consecutive records that agree in a column are one record, ``{column: ..., "records": [...]}``,
    with those that the filters leave."""
    held: list[Row] = []

    def group() -> Row | BadRow:
        first = held[0]
        try:
            records = [row.fields for row in held if all(f.keeps(row.fields) for f in filters)]
        except ValueError as error:
            return BadRow(first.file, first.number, str(error))
        return Row(first.file, first.number, {column: first.fields.get(column), "records": records})

    for block in blocks:
        out: list[Row | BadRow] = []
        for row in block.rows():
            if isinstance(row, BadRow):
                out.append(row)
                continue
            if held and held[0].fields.get(column) != row.fields.get(column):
                out.append(group())
                held = []
            held.append(row)
        if out:
            yield Rows(out)
    if held:
        yield Rows([group()])


def format_and_blocks(source: Source, reading: Reading) -> tuple[Format | None, Iterator[Block]]:
    """The format of a source's records, and all of its blocks."""
    blocks = source.blocks(ROWS_OF_BLOCK)
    first = next(blocks)
    fields = next((row.fields for row in first.rows() if isinstance(row, Row)), {})
    format = reading.format_of(fields)
    every = itertools.chain([first], blocks)
    return format, (grouped(every, format.group, reading.filters) if format and format.group else every)


# ---- processes ------------------------------------------------------------------------------------------------

_worker: dict[str, Any] = {}


def _start_worker(arguments: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    tokenizer, options, reading, name = pickle.loads(arguments.read_bytes())
    encoder = Encoder(tokenizer, options)
    _worker.update(encoder=encoder, reading=reading, format=format_named(name) if name else None)


@contextlib.contextmanager
def _pool(workers: int, *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """Processes that tokenise with one thread each."""
    context = multiprocessing.get_context("spawn")  # a fork would copy JAX's threads in the middle of what they do
    # A process is started once the one before has read what it is given, unless that is little: a tokenizer is not.
    with tempfile.TemporaryDirectory() as directory, _one_thread_each():
        file = Path(directory) / "arguments"
        file.write_bytes(pickle.dumps(arguments))
        pool = ProcessPoolExecutor(workers, context, _start_worker, (file,))
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _work(block: Block) -> FileTokens:
    return tokenize_rows(block.rows(), _worker["reading"], _worker["format"], _worker["encoder"])


def tokenized(
    blocks: Iterable[tuple[int, Block]], reading: Reading, format: Format | None, encoder: Encoder, workers: int
) -> Iterator[tuple[int, FileTokens]]:
    """Numbered blocks in tokens, in their order; over several processes where there are many."""
    blocks = iter(blocks)
    ahead = list(itertools.islice(blocks, BLOCKS_ALONE + 1 if workers > 1 else 0))
    every = itertools.chain(ahead, blocks)
    if len(ahead) <= BLOCKS_ALONE:
        for i, block in every:
            yield i, tokenize_rows(block.rows(), reading, format, encoder)
        return
    waiting: deque[tuple[int, Future[FileTokens]]] = deque()
    with _pool(workers, encoder.tokenizer, encoder.options, reading, format.name if format else "") as pool:
        try:
            for i, block in every:
                waiting.append((i, pool.submit(_work, block)))
                if len(waiting) > 2 * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise UserError(
                "a process that tokenises was ended, perhaps for want of memory; the same command goes on"
            ) from None


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started within tokenise with one thread each."""
    name = "RAYON_NUM_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# ---- a source -------------------------------------------------------------------------------------------------


def tokenize_source(
    source: Source,
    reading: Reading,
    encoder: Encoder,
    *,
    path: Path | None = None,
    still: Callable[[], bool] = lambda: True,
    workers: int = 1,
    progress: Callable[[int], None] = lambda rows: None,
) -> FileTokens:
    """A source's rows in tokens.

    Args:
      source: where they are.
      reading: how records become rows.
      encoder: the tokenizer's.
      path: the directory in which the tokens are kept. Until all are there, each block's lie in another beside it, so
        that a run that was stopped goes on. None: they are kept in memory.
      still: whether the source is still what it was; if it was written to while it was read, nothing is kept.
      workers: processes that share the work.
      progress: called with the number of rows that have been done.

    Raises:
      UserError: the source cannot be read.
    """
    format, blocks = format_and_blocks(source, reading)
    aside = None if path is None else path.with_name(path.name + ".parts")
    parts: dict[int, FileTokens] = {}
    where: dict[int, Any] = {}  # tokens, or the path of their part
    total = 0

    def todo() -> Iterator[tuple[int, Block]]:
        nonlocal total
        for i, block in enumerate(blocks):
            total = i + 1
            if not processes.owns(i):
                continue
            file = aside and aside / f"{i:06d}.npz"
            part = read_part(file, source.name) if file else None
            if part is None:
                yield i, block
            else:
                parts[i], where[i] = without_tokens(part), file

    if aside is not None:
        with contextlib.suppress(OSError):
            aside.mkdir(exist_ok=True)
    for i, part in tokenized(todo(), reading, format, encoder, workers):
        file = aside and aside / f"{i:06d}.npz"
        on_disk = file is not None and write_part(file, part)
        parts[i], where[i] = (without_tokens(part), file) if on_disk else (part, part.tokens)
        progress(sum(part.rows for part in parts.values()) * processes.count())
    shared = False
    if processes.count() > 1:
        shared = aside is not None and processes.share(aside)
        with_others(source.name, parts, where, total, aside, leave=shared and not processes.first())
        if shared and not processes.first():
            return of_first(source.name, path)
    order = sorted(parts)
    keep = path if still() else None
    whole = _whole(source, [parts[i] for i in order], [where[i] for i in order], keep, aside)
    if shared:
        processes.barrier("tokens are kept")
    return whole


def _whole(
    source: Source, parts: list[FileTokens], where: list[Any], path: Path | None, aside: Path | None
) -> FileTokens:
    said = joined_files(parts, joined([part.tokens for part in parts]))
    try:
        if path is not None and write_whole(path, where, said):
            whole = read_whole(path, source.name)
            if whole is not None:
                return whole
        tokens = [part if isinstance(part, Tokens) else part_tokens(part) for part in where]
        return dataclasses.replace(said, tokens=joined(tokens))
    except OSError:
        raise UserError(f"{aside}: was removed while {source.name} was tokenised; run the command again") from None
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
