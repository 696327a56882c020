"""Prepared TFDS data sets -> rows, and rows -> a prepared TFDS data set; TensorFlow takes no part in it.

A column that TFDS's features cannot hold exactly (fields that some rows lack, mixed types, nested values, numbers that
float32 rounds) is stored as JSON text; the set's ``metadata.json`` names these columns.
"""

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpojax.data.opened import hash_of, identity_of
from dpojax.data.read import BadRow, Row, Source, read_rows, runs
from dpojax.data.sources import TFDS, options_of
from dpojax.errors import UserError, first_line

JSON_COLUMNS = "json_columns"
ROWS_AT_ONCE = 1024  # TFDS writes its metadata again after every call that adds rows
ABSENT = ""  # in a column of JSON text: the row does not have the field


@functools.lru_cache(maxsize=8)  # of the process, a worker's too
def _builder(directory: str) -> Any:
    import tensorflow_datasets

    return tensorflow_datasets.builder_from_directory(directory)


@functools.lru_cache(maxsize=8)
def _examples(directory: str, split: str) -> Any:
    return _builder(directory).as_data_source(split)


def _plain(feature: Any, value: Any) -> Any:
    """A decoded value in Python's own types: text for bytes, and a list of dicts for a dict of lists.

    Raises:
      ValueError: bytes that are no UTF-8.
    """
    from tensorflow_datasets import features

    if isinstance(feature, features.FeaturesDict):
        return {key: _plain(feature[key], part) for key, part in value.items()}
    if isinstance(feature, features.Sequence) and not isinstance(feature, features.Dataset):
        if isinstance(feature.feature, features.FeaturesDict):
            items = zip(*value.values(), strict=True)
            return [_plain(feature.feature, dict(zip(value, item, strict=True))) for item in items]
        return [_plain(feature.feature, item) for item in value]
    if isinstance(feature, features.Dataset):
        return [_plain(feature.feature, item) for item in value]
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return _text(value)


def _text(value: Any) -> Any:
    if isinstance(value, list):
        return [_text(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value


@dataclasses.dataclass(frozen=True)
class TfdsBlock:
    """Rows of a split by their place in it; they are read where they are parsed."""

    name: str
    first: int
    directory: str
    split: str
    start: int
    count: int

    def rows(self) -> list[Row | BadRow]:
        """A row an example."""
        indices = list(range(self.start, self.start + self.count))
        try:
            examples: Sequence[Any] = _examples(self.directory, self.split).__getitems__(indices)
        except Exception:  # one of them: they are asked for one by one
            examples = [None] * self.count
        return [
            self._row(self.first + i, index, example)
            for i, (index, example) in enumerate(zip(indices, examples, strict=True))
        ]

    def _row(self, number: int, index: int, example: Any) -> Row | BadRow:
        info = _builder(self.directory).info
        try:
            if example is None:
                example = _examples(self.directory, self.split)[index]
            fields = _plain(info.features, example)
            for column in (info.metadata or {}).get(JSON_COLUMNS, ()):
                said = fields.pop(column)
                if said != ABSENT:
                    fields[column] = json.loads(said)
        except Exception as error:  # features are anybody's code
            return BadRow(self.name, number, f"cannot be decoded ({first_line(error)}); prepare the data set again")
        return Row(self.name, number, fields)


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """What a split takes of one of its shards."""

    name: str
    directory: str
    split: str
    shard: Path
    skip: int
    start: int  # of its first row, in the split
    count: int

    @property
    def beside(self) -> str:
        """The shard."""
        return str(self.shard)

    def identity(self) -> str | None:
        """A hash of the shard, of what is taken of it, and of the features; None if it cannot be read."""
        about = [Path(self.directory) / name for name in ("features.json", "metadata.json")]
        hashes = [identity_of(path) for path in about if path.exists()] + [identity_of(self.shard)]
        return None if None in hashes else hash_of(tfds=hashes, skip=self.skip, count=self.count)

    def estimated_rows(self) -> int:
        """How many it has."""
        return max(1, self.count)

    def blocks(self, rows: int) -> Iterator[TfdsBlock]:
        """Places of rows."""
        for i in range(0, self.count, rows):
            count = min(rows, self.count - i)
            yield TfdsBlock(self.name, i + 1, self.directory, self.split, self.start + i, count)


def _directory(name: str, said: str, options: dict[str, str]) -> str:
    """Where the prepared set is: the path that was given, or where TFDS finds it."""
    import tensorflow_datasets as tfds

    path = Path(said).expanduser()
    if path.is_dir() and "data_dir" not in options:
        if (path / "features.json").is_file():
            return str(path)
        found = sorted(file.parent for file in path.glob("*/features.json"))
        if len(found) == 1:
            return str(found[0])
        several = ", ".join(str(version) for version in found)
        why = f"several versions ({several}); name one" if found else "no features.json; give a prepared data set"
        raise UserError(f"{name}: {why}")
    data_dir = options.get("data_dir")
    data_dir = str(Path(data_dir).expanduser()) if data_dir else None
    try:
        return str(tfds.core.read_only_builder.builder_from_files(said, data_dir=data_dir).data_path)
    except Exception as error:  # names that are none, directories that are none, broken files
        if not isinstance(error, tfds.core.DatasetNotFoundError):
            raise UserError(f"{name}: not a TFDS data set that can be read ({first_line(error)})") from None
    where = f"in {data_dir}" if data_dir else "where TFDS looks (give data_dir=DIR)"
    raise UserError(
        f"{name}: no such prepared data set {where}; prepare it with "
        f"'tfds build {said} --file_format=array_record', or make one with dpojax make-tfds"
    )


def tfds_sources(name: str) -> list[Source]:
    """The shards of a split of a prepared TFDS data set, in order.

    Args:
      name: ``tfds:NAME[/config][:version]`` or ``tfds:DIRECTORY``; ``,split=train[:10%]``, ``,data_dir=DIR``.

    Raises:
      UserError: the set is not there, is not in the format array_record, or has no such split.
    """
    said, options = options_of(name, TFDS)
    directory, split = _directory(name, said, options), options.get("split", "train")
    try:
        info = _builder(directory).info
        format_, names = info.file_format.value, list(info.splits)
    except Exception as error:
        raise UserError(f"{name}: not a TFDS data set that can be read ({first_line(error)})") from None
    if format_ != "array_record":
        raise UserError(f"{name}: its files are {format_}; prepare it with --file_format=array_record")
    try:
        instructions = info.splits[split].file_instructions
    except Exception:  # KeyError, ValueError, AssertionError
        known = ", ".join(names) or "none"
        raise UserError(f"{name}: no split '{split}'; the splits are {known}, as in split={names[0]}[:10%]") from None
    base = f"{TFDS}{said}, {split}"
    sources: list[Source] = []
    start = 0
    for i, part in enumerate(instructions, start=1):
        shard = Path(part.filename)
        if not shard.is_file():
            raise UserError(f"{name}: {shard} is missing; copy the whole directory, or prepare the data set again")
        called = base if len(instructions) == 1 else f"{base}, shard {i} of {len(instructions)}"
        sources.append(TfdsSource(called, directory, split, shard, part.skip, start, part.take))
        start += part.take
    if not start:
        raise UserError(f"{name}: the split '{split}' is empty; it needs at least one row")
    return sources


FLOAT32 = float(np.finfo(np.float32).max)
SCALARS = ("bool", "int", "float", "text")
CHATS = {("content", "role"): "chat of role and content", ("from", "value"): "chat of from and value"}
LISTS = (*(f"list of {kind}" for kind in SCALARS), *CHATS.values())


def _kinds(value: Any) -> set[str]:
    """The features that hold a value exactly."""
    if isinstance(value, bool):
        return {"bool"}
    if isinstance(value, int | float):
        whole = isinstance(value, int) and -(2**63) <= value < 2**63
        exact = -FLOAT32 <= value <= FLOAT32 and float(np.float32(value)) == value
        return {kind for kind, holds in (("int", whole), ("float", exact)) if holds}
    if isinstance(value, str):
        # NumPy takes zeros off the ends of text, and lone surrogates are no UTF-8.
        return {"text"} if "\0" not in value and _is_utf8(value) else set()
    if not isinstance(value, list):
        return set()
    kinds = set(LISTS)
    for item in value:
        if isinstance(item, dict):
            texts = all(_kinds(part) == {"text"} for part in item.values())
            kinds &= {CHATS.get(tuple(sorted(item)), "")} if texts else set()
        else:
            kinds &= {f"list of {kind}" for kind in _kinds(item)}
    return kinds


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeError:
        return False
    return True


def _column_kinds(names: Sequence[str]) -> dict[str, str | None]:
    """The columns of all rows, and the feature of each; None where JSON text must hold it.

    Raises:
      UserError: a row cannot be read, or a name of a field cannot be a column's.
    """
    kinds: dict[str, set[str]] = {}
    seen: dict[str, int] = {}
    total = 0
    for row in read_rows(names):
        if isinstance(row, BadRow):
            raise UserError(f"{row}; fix it")
        total += 1
        for column, value in row.fields.items():
            if not column or "/" in column or not _is_utf8(column):
                raise UserError(f"{row.file}, row {row.number}: TFDS has no columns named '{column}'; rename the field")
            kinds[column] = kinds.get(column, {*SCALARS, *LISTS}) & _kinds(value)
            seen[column] = seen.get(column, 0) + 1
    if not kinds:
        raise UserError(f"{', '.join(names)}: no row has a field; a TFDS data set needs one")
    first = {column: [kind for kind in (*SCALARS, *LISTS) if kind in found] for column, found in kinds.items()}
    return {column: found[0] if found and seen[column] == total else None for column, found in first.items()}


def _feature(kind: str | None) -> Any:
    from tensorflow_datasets import features

    if kind is None:
        return features.Text(doc="JSON")
    scalars = {"bool": np.bool_, "int": np.int64, "float": np.float32, "text": features.Text()}
    if kind in scalars:
        return scalars[kind]
    keys = next((keys for keys, chat in CHATS.items() if chat == kind), None)
    if keys:
        return features.Sequence({key: features.Text() for key in keys})
    return features.Sequence(scalars[kind.removeprefix("list of ")])


def _example(fields: Mapping[str, Any], kinds: Mapping[str, str | None]) -> dict[str, Any]:
    return {
        column: fields[column] if kind else json.dumps(fields[column]) if column in fields else ABSENT
        for column, kind in kinds.items()
    }


def _write(names: Sequence[str], path: Path, name: str, version: str, split: str, rows_per_shard: int) -> None:
    import tensorflow_datasets as tfds

    kinds = _column_kinds(names)
    json_columns = [column for column, kind in kinds.items() if kind is None]
    path.mkdir(parents=True)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(name, tfds.core.Version(version), data_dir=str(path), module_name="dpojax"),
        description="Rows of dpojax make-tfds.",
        features=tfds.features.FeaturesDict({column: _feature(kind) for column, kind in kinds.items()}),
        metadata=tfds.core.MetadataDict({JSON_COLUMNS: json_columns}),
        disable_shuffling=True,
    )
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=rows_per_shard, file_format="array_record")
    writer.initialize_splits([split])
    for run in runs(read_rows(names), ROWS_AT_ONCE):
        examples = []
        for row in run:
            if isinstance(row, BadRow):
                raise UserError(f"{row}; the file was written to while it was read")
            examples.append(_example(row.fields, kinds))
        writer.add_examples({split: examples})
    writer.close_all()


def make_tfds(
    names: Sequence[str],
    output: str | Path,
    name: str,
    version: str = "1.0.0",
    *,
    split: str = "train",
    rows_per_shard: int = 100_000,
) -> Path:
    """The directory of a prepared TFDS data set with all rows of these sources, in order.

    ``tfds:NAME,data_dir=OUTPUT`` reads it back row for row, and ``tfds.builder_from_directory`` reads it anywhere.

    Args:
      names: of the sources, read twice.
      output: TFDS's data_dir; the set is in ``output/name/version``.
      name: of the set, in lower case.
      version: three numbers.
      split: that the rows are.
      rows_per_shard: of a file, at most.

    Raises:
      UserError: a row cannot be read; a name is none of TFDS's; the set is there already, or cannot be written.
    """
    for what, said, form, like in (
        ("--name", name, r"[a-z][a-z0-9_]*", "a lower-case name such as my_pairs"),
        ("--version", version, r"\d+\.\d+\.\d+", "three numbers such as 1.0.0"),
        ("--split", split, r"[a-z][a-z0-9_]*", "a lower-case name such as train"),
    ):
        if not re.fullmatch(form, said):
            raise UserError(f"{what} {said}: must be {like}")
    if rows_per_shard < 1:
        raise UserError(f"--rows-per-shard {rows_per_shard}: must be at least 1")
    path = Path(output).expanduser() / name / version
    if path.exists():
        raise UserError(f"{path}: exists already; remove it, or raise --version")
    partial = path.with_name(f"incomplete.{version}")  # whole or not at all
    try:
        shutil.rmtree(partial, ignore_errors=True)
        _write(names, partial, name, version, split, rows_per_shard)
        partial.rename(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or first_line(error)})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path
