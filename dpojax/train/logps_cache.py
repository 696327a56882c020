"""Log-probabilities that were computed before, by model and by row."""

import contextlib
import hashlib
import json
import os
import secrets
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dpojax.cachedir import cache_dir, mention_earlier, write_arrays
from dpojax.data import Example, fingerprint

VERSION = 2  # of the cache's directories; raise it, and with it the names below, when their layout changes
PREFIX, EARLIER = "logps2-", "logps-*"
SECONDS_BETWEEN_WRITES = 5.0


def row_key(example: Example) -> bytes:
    """What a row's log-probabilities depend on, the model apart: a hash of its tokens, which the tokenizer, the text
    and the truncation have made."""
    return fingerprint([example])


def directory_of(beside: str, model: Mapping[str, str | int], completions: int) -> Path | None:
    """Where the log-probabilities of a data file's rows are kept; None where nothing can be kept."""
    parent = cache_dir(beside)
    if parent is None:
        return None
    mention_earlier(parent, EARLIER)
    key = json.dumps({"version": VERSION, "completions": completions, "model": dict(model)}, sort_keys=True)
    return parent / f"{PREFIX}{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}"


class LogpsCache:
    """Sums ``log pi(y|x)`` of rows, kept beside the data: ``.dpojax/logps2-<hash>/``.

    Every process adds files of its own there, each whole or absent, so that an interrupted computation goes on and
    two runs at a time do no harm. A row whose tokens, or whose model, have changed is another row.

    Args:
      beside: the data file; None for rows in memory, whose sums are then kept in memory alone.
      model: names the model, in fields: content, shape and compute dtype.
      completions: N, completions of a row.
    """

    def __init__(self, beside: str | None, model: Mapping[str, str | int], completions: int):
        self.directory = None if beside is None else directory_of(beside, model, completions)
        self.completions = completions
        self.known: dict[bytes, np.ndarray] = {}
        self.fresh: dict[bytes, np.ndarray] = {}
        self.part = f"{os.getpid()}-{secrets.token_hex(4)}.npz"
        self.written = time.monotonic()
        for path in sorted(self.directory.glob("*.npz")) if self.directory else []:
            self._read(path)

    def _read(self, path: Path) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(path) as stored:
            keys, sums = stored["keys"], stored["sums"]
            if sums.shape == (len(keys), self.completions):
                self.known.update((key.tobytes(), row) for key, row in zip(keys, sums, strict=True))

    def get(self, examples: Sequence[Example]) -> np.ndarray:
        """``[n, N]`` sums, nats; NaN for a row that has not been computed."""
        missing = np.full(self.completions, np.nan, np.float32)
        rows = [self.known.get(row_key(example), missing) for example in examples]
        return np.array(rows, np.float32).reshape(len(examples), self.completions)

    def add(self, examples: Sequence[Example], sums: np.ndarray) -> None:
        """Rows that have been computed; written now and then, and by :meth:`write`."""
        for example, row in zip(examples, sums, strict=True):
            self.fresh[row_key(example)] = row
        if time.monotonic() - self.written > SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Bring all that was added to disk; a disk that is full costs the cache, not the run."""
        self.known.update(self.fresh)
        if self.directory is None or not self.fresh:
            return
        with contextlib.suppress(OSError):
            self.directory.mkdir(exist_ok=True)
        keys = np.frombuffer(b"".join(self.fresh), np.uint8).reshape(-1, 16)
        write_arrays(self.directory / self.part, keys=keys, sums=np.stack(list(self.fresh.values())))
        self.written = time.monotonic()
