"""Where things that cost time to compute are kept between runs."""

import os
import tempfile
from pathlib import Path


def cache_dir(beside: str) -> Path | None:
    """A directory that can be written, for what was made from a file and can be made again.

    It is ``.dpojax`` next to the file, so that it moves and goes with it, and lies on a disk that holds such files;
    where that cannot be written (shared data, say) it is ``dpojax`` in the user's cache directory.

    Args:
      beside: the file; its directory must exist.

    Returns:
      The directory, made if need be; None where neither can be written.
    """
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    beside_it = Path(beside).expanduser().parent / ".dpojax"
    try:
        beside_it.mkdir(exist_ok=True)
        return _written(beside_it)
    except OSError:
        pass
    try:
        directory = user.expanduser() / "dpojax"
        directory.mkdir(parents=True, exist_ok=True)
        return _written(directory)
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
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
