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

from dpojax import processes
from dpojax.cachedir import cache_dir, mention_earlier, write_arrays

VERSION = 3  # of the cache's directories; raise it, and with it the names below, when their layout changes
PREFIX, EARLIER = "logps3-", ("logps-*", "logps2-*")
SECONDS_BETWEEN_WRITES = 5.0


def directory_of(beside: str, model: Mapping[str, str | int], completions: int) -> Path | None:
    """Where the log-probabilities of a data file's rows are kept; None where nothing can be kept."""
    parent = cache_dir(beside)
    if parent is None:
        return None
    mention_earlier(parent, *EARLIER)
    key = json.dumps({"version": VERSION, "completions": completions, "model": dict(model)}, sort_keys=True)
    return parent / f"{PREFIX}{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}"


class LogpsCache:
    """Sums ``log pi(y|x)`` of rows, kept beside the data: ``.dpojax/logps3-<hash>/``.

    Every run adds files of its own there, each whole or absent, so that an interrupted computation goes on and two runs
    at a time do no harm; of a run's processes, the first reads and writes them.
    A row whose tokens, or whose model, have changed is another row.

    Args:
      beside: the data file; None for rows in memory, whose sums are then kept in memory alone.
      model: names the model, in fields: content, shape and compute dtype.
      completions: N, completions of a row.
    """

    def __init__(self, beside: str | None, model: Mapping[str, str | int], completions: int):
        kept = beside is not None and processes.first()
        self.directory = directory_of(str(beside), model, completions) if kept else None
        self.completions = completions
        self.keys, self.sums = self._rows([], [])
        self.fresh: list[tuple[np.ndarray, np.ndarray]] = []
        self.part = f"{os.getpid()}-{secrets.token_hex(4)}.npz"
        self.written = time.monotonic()
        parts = [self._read(path) for path in sorted(self.directory.glob("*.npz"))] if self.directory else []
        self._know([part for part in parts if part is not None])

    def _rows(self, keys: Sequence[np.ndarray], sums: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        empty = np.zeros((0, self.completions), np.float32)
        return np.concatenate([np.zeros(0, np.uint64), *keys]), np.concatenate([empty, *sums])

    def _read(self, path: Path) -> tuple[np.ndarray, np.ndarray] | None:
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(path) as stored:
            keys, sums = stored["keys"], stored["sums"]
            if keys.dtype == np.uint64 and sums.shape == (len(keys), self.completions):
                return keys, sums
        return None

    def _know(self, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Add rows to those that are known, which are kept in the order of their keys."""
        keys, sums = self._rows([self.keys, *[k for k, _ in parts]], [self.sums, *[s for _, s in parts]])
        self.keys, first = np.unique(keys, return_index=True)
        self.sums = sums[first]

    def get(self, keys: np.ndarray) -> np.ndarray:
        """``[n, N]`` sums, nats, of rows by their keys (:attr:`~dpojax.data.Examples.keys`); NaN for a row that has not
        been computed."""
        out = np.full((len(keys), self.completions), np.nan, np.float32)
        if len(self.keys):
            at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
            known = self.keys[at] == keys
            out[known] = self.sums[at[known]]
        return out

    def add(self, keys: np.ndarray, sums: np.ndarray) -> None:
        """Rows that have been computed; written now and then, and by :meth:`write`."""
        self.fresh.append((keys, sums))
        if time.monotonic() - self.written > SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Bring all that was added to disk; a disk that is full costs the cache, not the run."""
        if not self.fresh:
            return
        keys, sums = self._rows([k for k, _ in self.fresh], [s for _, s in self.fresh])
        self._know([(keys, sums)])
        if self.directory is not None:
            with contextlib.suppress(OSError):
                self.directory.mkdir(exist_ok=True)
            write_arrays(self.directory / self.part, keys=keys, sums=sums)
        self.written = time.monotonic()
