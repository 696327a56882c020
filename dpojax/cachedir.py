"""Where things that cost time to compute are kept between runs, and how they are written."""

import contextlib
import functools
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from dpojax.paths import in_store
from dpojax.progress import console


def user_cache() -> Path:
    """``dpojax`` in the user's cache directory, which may not exist.

    Raises:
      RuntimeError: there is no home directory.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpojax"


def cache_dir(beside: str) -> Path | None:
    """A directory that can be written, for what was made from a file and can be made again.

    It is ``.dpojax`` next to the file, so that it moves and goes with it, and lies on a disk that holds such files;
    where that cannot be written (shared data, or an object store) it is ``dpojax`` in the user's cache directory.

    Args:
      beside: the file; its directory must exist.

    Returns:
      The directory, made if need be; None where neither can be written.
    """
    beside_it = Path(beside).expanduser().parent / ".dpojax"
    with contextlib.suppress(OSError):
        if not in_store(beside):
            beside_it.mkdir(exist_ok=True)
            return _written(beside_it)
    try:
        directory = user_cache()
        directory.mkdir(parents=True, exist_ok=True)
        return _written(directory)
    except (OSError, RuntimeError):
        return None


def _written(directory: Path) -> Path:
    """The directory, once a file could be made in it: permissions alone do not say (root, network disks).

    Raises:
      OSError: it cannot be written.
    """
    tempfile.TemporaryFile(dir=directory).close()
    ignore = directory / ".gitignore"  # nobody wants to commit a cache
    if not ignore.exists():
        ignore.write_text("*\n")
    return directory


@functools.cache  # once a process
def mention_earlier(directory: Path, *patterns: str) -> None:
    """Say on the console that caches of an earlier version lie in the directory, if there are any of these patterns."""
    if any(any(directory.glob(pattern)) for pattern in patterns):
        said = ", ".join(patterns)
        console.print(f"{directory}: caches of an earlier version ({said}) are not read and can be removed")


def write_arrays(path: Path, **arrays: Any) -> bool:
    """Write an ``.npz``, whole or not at all; whether the disk took it, which is no error as it can be made again."""
    # Each has a name of its own, so that two processes, threads or hosts at once do each other no harm.
    partial = path.with_name(f"{path.stem}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("xb") as file:
            np.savez(file, **arrays)
        partial.replace(path)
        return True
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
