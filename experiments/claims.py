"""Work shared out between processes, on one machine or many, by nothing but a directory that all of them see."""

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from dpojax.progress import console

BEAT = 10.0  # seconds between two signs of life
DEAD = 120.0  # seconds without one, after which work is taken over


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process may do the work of this name; the claim is given back at the end, or lapses if the process
    dies.

    The file ``path.claim`` is made by whoever comes first. Its time is its holder's sign of life.
    """
    claim = path.with_name(path.name + ".claim")
    claim.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        clear_dead(claim)
    try:
        with claim.open("x") as file:
            json.dump({"host": socket.gethostname(), "process": os.getpid()}, file)
    except FileExistsError:
        yield False
        return
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            with contextlib.suppress(FileNotFoundError):
                os.utime(claim)

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield True
    finally:
        ended.set()
        claim.unlink(missing_ok=True)


def clear_dead(claim: Path) -> None:
    """Take away the claim of a process that died, and nobody else's."""
    dead = lambda path: time.time() - path.stat().st_mtime > DEAD  # noqa: E731
    if not dead(claim):
        return
    # many may come at once, as a job array does, and the first may have its own claim here by now
    aside = claim.with_name(f"{claim.name}.{uuid.uuid4().hex}")
    claim.rename(aside)
    if dead(aside):
        aside.unlink()
    else:
        aside.rename(claim)


def made_once(directory: Path, build: Callable[[Path], None]) -> Path:
    """The directory, built by one of all processes while the others wait; it is complete or not there."""
    while not directory.exists():
        with claimed(directory) as mine:
            if mine and not directory.exists():
                partial = directory.with_name(directory.name + ".partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                build(partial)
                partial.replace(directory)
                return directory
        if not directory.exists():
            console.print(f"{directory}: another process makes it; waiting")
            time.sleep(BEAT / 5)
    return directory
