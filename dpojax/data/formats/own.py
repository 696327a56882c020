"""A format of the user's own: a function in a Python file."""

import functools
from pathlib import Path
from types import ModuleType
from typing import Any

from dpojax.data.formats.base import Format, a, never
from dpojax.errors import UserError, first_line

_MODULES: dict[Path, ModuleType] = {}
"""The files that ran already; none runs twice."""


def format_of_file(path: str, name: str) -> Format:
    """The format whose rows a function of a Python file makes, record -> row.

    The function may have the attributes ``reads`` and ``group`` of a :class:`Format`.

    Raises:
      UserError: no such file or function, or the file cannot be run.
    """
    from dpojax.losses.spelling import from_file  # with JAX

    try:
        function = from_file(path, name, _MODULES)
    except SystemExit:
        raise UserError(f"{path}: ends the program when it is run; leave that out") from None
    except ValueError as error:
        raise UserError(first_line(error)) from None
    spelled = f"{path}:{name}"

    @functools.wraps(function)
    def row(record: dict[str, Any]) -> dict[str, Any]:
        try:
            made = function(record)
        except ValueError as error:
            raise ValueError(first_line(error)) from None
        except Exception as error:  # it is anybody's code
            raise ValueError(f"{spelled} fails ({type(error).__name__}: {first_line(error)})") from None
        if not isinstance(made, dict):
            raise ValueError(f"{spelled} gives {a(made)}; it must give a row, a dict of our fields")
        return made

    reads, group = getattr(function, "reads", ()), getattr(function, "group", None)
    if not isinstance(reads, tuple | list) or not all(isinstance(column, str) for column in reads):
        raise UserError(f"{spelled}: its 'reads' must be a tuple of columns' names")
    if group is not None and not isinstance(group, str):
        raise UserError(f"{spelled}: its 'group' must be a column's name")
    return Format(spelled, spelled, tuple(reads), never, row, group)
