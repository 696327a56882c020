"""Files by name, on a disk or in an object store (``gs://bucket/name``), and how they are written whole.

An object store has no directories, no renaming and no appending. An object that is put there is whole or absent, so
what is written aside and renamed on a disk is written in its place there, and what tells readers that all is there
comes last.
"""

import contextlib
import fnmatch
import importlib.util
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dpojax.errors import UserError, first_line

if TYPE_CHECKING:
    from pathlib import Path as AnyPath
else:
    from pathlib import PurePath as AnyPath

    """:class:`pathlib.Path`, or etils' path, which has its methods."""

URL = re.compile(r"([a-z][a-z0-9+.-]*)://")
STORES = {"gs": ("gcsfs", "dpojax[gcs]"), "s3": ("s3fs", "s3fs"), "az": ("adlfs", "adlfs")}
"""The object stores that etils reads and writes; of each the module that it needs, and what installs that."""


def in_store(path: str | AnyPath) -> bool:
    """Whether a path is in an object store."""
    return URL.match(str(path)) is not None


def path_of(name: str | AnyPath) -> AnyPath:
    """The path of a name: of a URL etils' ``epath.Path``, which has the methods of :class:`pathlib.Path`.

    Raises:
      UserError: no such kind of store, or what reads it is not installed.
    """
    url = URL.match(str(name))
    if url is None:
        return Path(name).expanduser()
    if url[1] not in STORES:
        known = ", ".join(f"{kind}://" for kind in STORES)
        raise UserError(f"{name}: no such object store; use {known}, or a path on a disk")
    module, package = STORES[url[1]]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{name}: {url[1]}:// needs {module}, which is not installed: pip install '{package}'")
    from etils import epath

    return epath.Path(str(name))


def check_run(name: str | AnyPath) -> None:
    """Refuse a run where its checkpoints could not be.

    Raises:
      UserError: it is in an object store that Orbax does not know, or one that cannot be read here.
    """
    if in_store(name) and not str(name).startswith("gs://"):
        raise UserError(f"{name}: checkpoints lie on disks and in gs:// alone; name one of those")
    path_of(name)


def absolute(path: AnyPath) -> AnyPath:
    """The path from the root; etils would take a URL for a name in this directory."""
    return path if in_store(path) else path.absolute()


@contextlib.contextmanager
def reaching(path: AnyPath, *, writes: bool = False) -> Iterator[None]:
    """A context in which an object store's errors become one sentence; to a reader, what is not there is no error of
    the store's."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each store's client raises its own kinds
        if not in_store(path) or (isinstance(error, FileNotFoundError) and not writes):
            raise
        raise UserError(
            f"{path}: cannot be read or written there ({first_line(error)}); check the bucket's name, and that this "
            "machine may use it"
        ) from error


def exists(path: AnyPath) -> bool:
    """Whether there is such a file or directory; a store that does not answer is an error.

    Raises:
      UserError: the store cannot be reached.
    """
    if not in_store(path):
        return path.exists()
    with reaching(path), contextlib.suppress(FileNotFoundError):
        path.stat()  # fsspec's exists takes every error for a no
        return True
    return False


def make_directory(path: AnyPath) -> None:
    """Make a directory, where there are directories."""
    if not in_store(path):
        path.mkdir(parents=True, exist_ok=True)


def write_bytes(path: AnyPath, data: bytes) -> None:
    """Write a file that is either complete or not there, or still the old one."""
    if in_store(path):
        with reaching(path, writes=True):
            path.write_bytes(data)
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def write_text(path: AnyPath, text: str) -> None:
    """:func:`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def on_disk(directory: AnyPath, *patterns: str) -> Iterator[AnyPath]:
    """The directory, or, of one in an object store, a copy of its files of these patterns on a disk, for a while."""
    if not in_store(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="dpojax-") as copy:
        with reaching(directory):
            for path in directory.iterdir():
                if any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns):
                    _copy(path, Path(copy) / path.name)
        yield Path(copy)


def _copy(path: AnyPath, target: AnyPath) -> None:
    if not path.is_dir():
        target.write_bytes(path.read_bytes())
        return
    target.mkdir()
    for inner in path.iterdir():
        _copy(inner, target / inner.name)


@contextlib.contextmanager
def written_on_disk(directory: AnyPath) -> Iterator[AnyPath]:
    """The directory, or, of one in an object store, an empty one on a disk, whose files are put there at the end."""
    if not in_store(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="dpojax-") as copy:
        yield Path(copy)
        for path in sorted(Path(copy).rglob("*")):
            if path.is_file():
                write_bytes(directory.joinpath(*path.relative_to(copy).parts), path.read_bytes())


def scratch(directory: AnyPath) -> AnyPath:
    """A directory for files of this process alone: the given one, or the system's where that is in an object store."""
    return Path(tempfile.gettempdir()) if in_store(directory) else directory


def remove(path: AnyPath) -> None:
    """Remove a file, or a directory and all that is in it."""
    if not in_store(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    with reaching(path):
        path.rmtree(missing_ok=True) if path.is_dir() else path.unlink(missing_ok=True)  # type: ignore[attr-defined]


def same(name: str, other: str) -> bool:
    """Whether two names are one file's or directory's."""
    if name == other or in_store(name) or in_store(other):
        return name.rstrip("/") == other.rstrip("/")
    return Path(name).exists() and Path(other).exists() and Path(name).samefile(other)
