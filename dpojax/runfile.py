"""Options from the ``run.json`` that a run left: they repeat it."""

import dataclasses
import json
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from dpojax.configs import TrainOptions
from dpojax.errors import UserError
from dpojax.options import flag
from dpojax.paths import exists, in_store, path_of, reaching

FORMAT = 3
"""Of run.json and checkpoints; runs of an earlier format are read, but not continued."""
BESIDE_OPTIONS = re.compile(r"run_format|command|sessions|today|(model|base|reference|data)_hash|hash of .*", re.DOTALL)
"""What ``run.json`` holds beside the options."""
FILES = ("model", "tokenizer", "ref_model", "adapter", "data", "eval_data")
"""Options that name files, whose content is compared by its hash."""

Options = TypeVar("Options", bound=TrainOptions)


def read_run(name: str) -> dict[str, Any]:
    """What a ``run.json``, or a file written like one, holds; ``name`` may be the run's directory.

    Raises:
      UserError: no such file, or it is no JSON object.
    """
    path = path_of(name)
    path = path / "run.json" if exists(path) and path.is_dir() else path
    try:
        with reaching(path):
            raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file; name the run.json of a run") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: not valid JSON ({error}); name the run.json of a run") from None
    if not isinstance(raw, dict):
        raise UserError(f"--config {path}: not a JSON object; name the run.json of a run")
    return raw


def options_of_file(kind: type[Options], name: str) -> Options:
    """The options of a run of this command, as its ``run.json`` has them.

    What the file does not give has its default, or is ``tyro.MISSING`` where there is none, as ``output`` of a run. A
    chat template's date is that of the run, so that the tokens are its own.

    Args:
      kind: the options' class.
      name: the ``run.json``, or the run's directory. A file by hand needs neither ``command`` nor ``run_format``.

    Raises:
      UserError: no such file, the run of another command or format, or a field that is no option or ill-typed.
    """
    raw, where = read_run(name), f"--config {name}"
    if (command := raw.get("command", kind.__name__)) != kind.__name__:
        mine, theirs = (str(one).removesuffix("Config").lower() for one in (kind.__name__, command))
        raise UserError(f"{where}: is a run of {theirs}, and this is {mine}; give the other command, or another file")
    if raw.get("run_format", FORMAT) != FORMAT:
        raise UserError(f"{where}: is of another version of dpojax, whose options had other names; give them as flags")
    if raw.get("chat_date") is None and "today" in raw:
        raw["chat_date"] = raw["today"]
    given = {field: value for field, value in raw.items() if not BESIDE_OPTIONS.fullmatch(field)}
    return options_of_fields(kind, given, where)


def options_of_fields(kind: type[Any], given: dict[str, Any], where: str) -> Any:
    """The options in the fields of a JSON object, whose groups have names with a dot; others are at their defaults.

    Args:
      kind: the options' class.
      given: by name. It is left empty.
      where: the file, as an error names it.

    Raises:
      UserError: a field is no option, or ill-typed.
    """
    options = _filled(kind, given, where)
    if given:
        unknown = ", ".join(map(repr, given))
        raise UserError(f"{where}: {unknown} is no option of this command; take it out of a copy of the file")
    return options


def _filled(kind: type[Any], given: dict[str, Any], where: str, prefix: str = "") -> Any:
    """The dataclass of what is given, which is taken out of ``given``; groups have names with a dot."""
    hints, values = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            values[field.name] = _filled(typing.cast(type, hint), given, where, name + ".")
        elif name in given:
            if not _fits(value := given.pop(name), hint):
                raise UserError(f"{where}: {name} is {json.dumps(value)}, and must be {_shown(hint)}; fix it in a copy")
            values[field.name] = tuple(value) if isinstance(value, list) else value
        elif field.default is dataclasses.MISSING:
            values[field.name] = tyro.MISSING
    return kind(**values)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a JSON file is of an option's type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is (type(None) if hint is None else hint)  # a bool is no int


def _shown(hint: Any) -> str:
    """An option's type in words.

    >>> _shown(int | None), _shown(tuple[str, ...]), _shown(Literal["auto", "xla"])
    ('a whole number or null', 'a list, each a text', '"auto" or "xla"')
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_shown, inner))
    if origin is Literal:
        return " or ".join(map(json.dumps, inner))
    if origin is tuple:
        return f"a list, each {_shown(inner[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(hint, "null")


def check_names(config: TrainOptions, name: str) -> None:
    """Refuse names that hold where the run was made, and not in this directory.

    Args:
      config: the options, those of the command line in place.
      name: ``--config``.

    Raises:
      UserError: naming the option, and the directory.
    """
    sessions = read_run(name).get("sessions") or [{}]
    made = sessions[0].get("directory")
    for option in FILES if made is not None else ():
        value = getattr(config, option, None)
        for one in value if isinstance(value, tuple) else (value,):
            file = re.sub(r"=[0-9.]+$", "", one or "")  # a weight of a mixture
            if file and not in_store(file) and not Path(file).expanduser().exists() and (Path(made) / file).exists():
                raise UserError(
                    f"{flag(option)} {one}: is not in this directory, but in {made}, where the run of --config {name} "
                    f"was started; start it there, or give {flag(option)}"
                )
