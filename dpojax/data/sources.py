"""Names of data -> sources of rows: files, globs, directories, sets of the Hugging Face Hub and of TFDS."""

import glob
import json
import math
from collections.abc import Sequence
from pathlib import Path

from dpojax.data.jsonfiles import JsonSource
from dpojax.data.opened import form_suffix, open_bytes, reading
from dpojax.data.read import Source
from dpojax.data.tables import ARROW, FEATHER, PARQUET, ArrowSource, CsvSource
from dpojax.errors import UserError

HUB, TFDS = "hub:", "tfds:"
OPTIONS = {HUB: ("config", "split", "revision"), TFDS: ("split", "data_dir")}
ARROW_SUFFIXES = (".parquet", ".pq", ".arrow", ".feather")
SUFFIXES = (".jsonl", ".ndjson", ".json", *ARROW_SUFFIXES, ".csv", ".tsv")
"""Of the files that are read in a directory, each also compressed; a file that is named may have any."""
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json")
"""Files of a directory that tell of its data."""


def file_source(path: Path, name: str, beside: str | None = "") -> Source:
    """The source of a file, by what it begins with and by its suffix.

    Args:
      path: of the file.
      name: as errors name it.
      beside: where caches are kept; beside the file unless given.
    """
    with reading(name), open_bytes(path, name) as file:
        begin = file.read(6)
    suffix = form_suffix(path)
    place = str(path) if beside == "" else beside
    if suffix in ARROW_SUFFIXES or begin == ARROW or begin[:4] in (PARQUET, FEATHER):
        return ArrowSource(name, path, place)
    if suffix in (".csv", ".tsv"):
        return CsvSource(name, path, place)
    return JsonSource(name, path, place)


def options_of(name: str, kind: str) -> tuple[str, dict[str, str]]:
    """The parts of a name of a set: ("owner/name", {"split": "test"}) of "hub:owner/name,split=test".

    Raises:
      UserError: an option is none of its kind, or stands there twice.
    """
    first, *rest = name.removeprefix(kind).split(",")
    options: dict[str, str] = {}
    for part in rest:
        key, equals, value = part.strip().partition("=")
        if not equals or not value or key not in OPTIONS[kind] or key in options:
            known = ", ".join(f"{key}=..." for key in OPTIONS[kind])
            raise UserError(f"{name}: '{part}' is not understood; the options are {known}, each once")
        options[key] = value
    if not first:
        raise UserError(f"{name}: which set? give its name after '{kind}'")
    return first, options


def open_sources(name: str) -> list[Source]:
    """The sources of a name, in order of their own names: a file's one, a directory's shards.

    Args:
      name: a file, a directory, a glob pattern, ``hub:owner/name`` or ``tfds:NAME``, the last two with options.

    Raises:
      UserError: there is nothing of this name, or it holds no file of rows.
    """
    if name.startswith(HUB):
        from dpojax.data.hub import hub_sources

        return hub_sources(name)
    if name.startswith(TFDS):
        from dpojax.data.tfds import tfds_sources

        return tfds_sources(name)
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return _directory(path, name)
        if path.is_file():
            return [file_source(path, name)]
        if glob.has_magic(name):
            found = map(Path, sorted(glob.glob(str(path), recursive=True)))  # noqa: PTH207 (Path.glob needs a root)
            files = [match for match in found if match.is_file() and not _is_about(match)]
            if not files:
                raise UserError(f"{name}: no file matches; give a pattern of JSONL, Parquet, Arrow or CSV files")
            return [file_source(match, str(match)) for match in files]
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    others = "JSON, Arrow or CSV, a directory, hub:owner/name, tfds:NAME"
    raise UserError(f"{name}: no such file; give a JSONL or Parquet file (or {others})")


def _is_about(path: Path) -> bool:
    return path.name in ABOUT or path.name.startswith(".") or path.name.upper().startswith(("README", "LICENSE"))


def _json_of(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON ({error}); save the data set again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; save the data set again")
    return value


def _directory(path: Path, name: str) -> list[Source]:
    """The sources of a directory: of `datasets.save_to_disk`, of TFDS, or of files of rows."""
    if (path / "state.json").is_file():
        return _saved(path, name)
    if (path / "dataset_dict.json").is_file():
        splits = _json_of(path / "dataset_dict.json").get("splits")
        splits = splits if isinstance(splits, list) else []
        if len(splits) == 1:
            return _directory(path / str(splits[0]), str(Path(name) / str(splits[0])))
        said = ", ".join(map(str, splits)) or "none"
        raise UserError(f"{name}: a data set of several splits ({said}); name one, as in {Path(name) / 'train'}")
    if (path / "dataset_info.json").is_file() and (path / "features.json").is_file():
        from dpojax.data.tfds import tfds_sources

        return tfds_sources(f"{TFDS}{name}")
    files = sorted(
        file
        for file in path.rglob("*")
        if form_suffix(file) in SUFFIXES
        and not _is_about(file)
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.is_file()
    )
    if not files:
        known = ", ".join(SUFFIXES)
        raise UserError(f"{name}: no file of rows in this directory; the suffixes that are read are {known}")
    return [file_source(file, str(Path(name) / file.relative_to(path))) for file in files]


def _saved(path: Path, name: str) -> list[Source]:
    state = _json_of(path / "state.json")
    entries = state.get("_data_files")
    try:
        files = [str(entry["filename"]) for entry in entries]  # type: ignore[attr-defined]
    except (TypeError, KeyError):
        files = []
    if not files or state.get("_indices_data_files"):
        raise UserError(f"{name}: state.json does not name its Arrow files; save the data set again (save_to_disk)")
    missing = [file for file in files if not (path / file).is_file()]
    if missing:
        raise UserError(f"{name}: {missing[0]} is missing, which state.json names; copy the whole directory")
    return [file_source(path / file, str(Path(name) / file)) for file in files]


def _weighted(name: str) -> tuple[str, str | None]:
    """A name, and the weight that it ends with, as text."""
    kind = next((kind for kind in OPTIONS if name.startswith(kind)), None)
    left, equals, right = name.rpartition("=")
    if not equals or (kind is None and Path(name).expanduser().exists()):
        return name, None
    if kind:
        # "hub:owner/name,revision=1" ends with an option, not with a weight.
        return (name, None) if left.rpartition(",")[2].strip() in OPTIONS[kind] and "," in left else (left, right)
    try:
        float(right)
    except ValueError:
        return (left, right) if Path(left).expanduser().exists() else (name, None)
    return left, right


def parse_mixture(names: Sequence[str]) -> list[tuple[str, float | None]]:
    """The names of sources, each with its weight: ("a.jsonl", 0.7) of "a.jsonl=0.7"; None where none is given.

    A file that exists under the whole name is that file.

    Raises:
      UserError: a weight is no finite number above 0, or only some have one.
    """
    mixture: list[tuple[str, float | None]] = []
    for whole in names:
        name, said = _weighted(whole)
        if said is None:
            mixture.append((name, None))
            continue
        try:
            weight = float(said)
        except ValueError:
            weight = math.nan
        if not name or not 0 < weight < math.inf:
            raise UserError(f"--data {whole}: the weight must be a finite number above 0, as in a.jsonl=0.7")
        mixture.append((name, weight))
    bare = [name for name, weight in mixture if weight is None]
    if bare and len(bare) < len(mixture):
        raise UserError(f"--data {bare[0]}: has no weight, and others have; give all a weight ({bare[0]}=1), or none")
    return mixture
