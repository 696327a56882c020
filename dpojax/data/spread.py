"""A source's blocks in tokens, made by several processes: each makes its own, and they are brought together."""

import dataclasses
import io
from pathlib import Path
from typing import Any

from dpojax import processes
from dpojax.data.store import FileTokens, packed, part_of, part_tokens, read_whole, without_tokens, write_part
from dpojax.data.tokens import Tokens
from dpojax.errors import UserError


def with_others(
    file: str, parts: dict[int, FileTokens], where: dict[int, Any], total: int, aside: Path | None, *, leave: bool
) -> None:
    """Add the blocks that other processes have made, of ``total``; or leave them to the first one.

    Raises:
      UserError: the file is another one for some process.
    """
    if len(set(processes.exchange(str(total).encode()))) > 1:
        raise UserError(f"{file}: has more rows for one process than for another; give all of them the same files")
    for start in range(0, total, processes.count()):
        mine = next((i for i in range(start, start + processes.count()) if i in parts), None)
        part = None if mine is None else parts[mine]
        if part is not None and not isinstance(where[mine], Tokens):  # type: ignore[index]
            part = dataclasses.replace(part, tokens=part_tokens(where[mine]))  # type: ignore[index]
        for i, got in enumerate(processes.exchange(b"" if part is None else packed(part)), start):
            if got and i not in parts and not leave:
                theirs = part_of(io.BytesIO(got), file)
                path = aside and aside / f"{i:06d}.npz"
                on_disk = path is not None and write_part(path, theirs)
                parts[i], where[i] = (without_tokens(theirs), path) if on_disk else (theirs, theirs.tokens)


def of_first(file: str, path: Path | None) -> FileTokens:
    """A file's tokens, which the first process has brought together and kept.

    Raises:
      UserError: it could not keep them.
    """
    processes.barrier("tokens are kept")
    whole = None if path is None else read_whole(path, file)
    if whole is None:
        raise UserError(f"{path}: the tokens of {file} could not be kept there; free some space")
    return whole
