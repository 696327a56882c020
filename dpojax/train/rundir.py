"""A run's directory: what it holds, and whose it is.

run.json          format, the command's options, content hashes of model, reference and data, and its sessions
model/            config.json, generation_config.json if there is one, and tokenizer, for export
adapter.json      with an adapter: what it is, and the name of its base, which is not copied
frozen/           with --train-top-layers: the parameters that no step changes; frozen.json has their hash
metrics.jsonl, and, by --report-to, tensorboard/, wandb/
checkpoints/N/    params (the trained ones: of an adapter, it alone) | train (step, optimizer state, random key) |
                  position (of the data) | content (hashes of the others), and, with --sync-ref-model, reference

It is on a disk or in an object store (gs://bucket/run).
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpojax.configs import TrainOptions
from dpojax.errors import UserError
from dpojax.models.config import Lora, Quantized
from dpojax.models.lora import lora_of_dict
from dpojax.models.safetensors import GENERATION, read_json, save_tokenizer
from dpojax.options import flag
from dpojax.paths import AnyPath, absolute, exists, in_store, make_directory, path_of, reaching, write_text
from dpojax.progress import console
from dpojax.runfile import FILES, FORMAT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_run(path: str | AnyPath) -> bool:
    """Whether a path is the ``--output`` directory of a run."""
    return exists(path_of(path) / "run.json")


def options_of_run(path: str | AnyPath) -> dict[str, Any]:
    """The options of a run, by name, as those of today; empty where ``path`` is no run."""
    if not is_run(path):
        return {}
    options = read_json(path_of(path) / "run.json")
    if "freeze" in options:  # format 1
        options["train_top_layers"] = options.pop("freeze")
    return options


@dataclasses.dataclass(frozen=True)
class RunAdapter:
    """What a run's ``adapter.json`` says: the base's name, what the adapter is, and what of the base's ``config.json``
    the merged model's does not have."""

    base: str
    lora: Lora
    vocab_size: int
    tied: bool
    quantized: Quantized = "none"


def adapter_of_run(path: str | AnyPath) -> RunAdapter | None:
    """The adapter that a run trains; None where it trains a model's own parameters."""
    file = path_of(path) / "adapter.json"
    if not exists(file):
        return None
    raw = read_json(file)
    return RunAdapter(**{**raw, "lora": lora_of_dict(raw["lora"])})


def save_adapter_of_run(path: AnyPath, adapter: RunAdapter) -> None:
    """Write ``adapter.json``, whole."""
    base = path_of(adapter.base)  # by a name that holds wherever the run is read from
    named = dataclasses.replace(adapter, base=str(absolute(base)) if base.exists() else adapter.base)
    write_text(path / "adapter.json", json.dumps(dataclasses.asdict(named), indent=2))


def file_hash(path: str) -> str:
    """A fingerprint of a file's bytes."""
    return hashlib.blake2b(Path(path).expanduser().read_bytes(), digest_size=16).hexdigest()


MAY_CHANGE = (
    *("attention", "logprob_chunk_tokens", "remat", "max_shapes", "gradient_accumulation_steps", "reference"),
    *("logging_steps", "eval_steps", "save_steps", "save_total_limit", "run_name", "report_to"),
)
"""Options, beside those of the mesh, that change how a run computes or what it tells, and its results by rounding
alone; a command that continues it may have others."""


def may_change(name: str) -> bool:
    """Whether an option may be another when a run continues: other devices compute the same, to rounding.

    A batch holds the same rows on every mesh and in any number of micro-batches, in another order, so the position of
    the data holds. What is drawn for a row, as in dropout, depends on its place in the batch.
    """
    return name in MAY_CHANGE or name.startswith("mesh.")


NOT_COMPARED = {"output", "sessions", "chat_date"}
"""What of ``run.json`` and the options says nothing of what a run is; a date that reaches the tokens is ``today``."""


def moved(name: str, before: Any, now: Any) -> bool:
    """Whether an option names the same files in another directory, as after a copy to another machine."""

    def last(value: Any) -> list[str]:
        return [str(x).rstrip("/").rpartition("/")[2] for x in (value if isinstance(value, list) else [value])]

    return name in FILES and None not in (before, now) and last(before) == last(now)


def claim_directory(config: TrainOptions, identities: dict[str, str]) -> None:
    """Take ``--output`` for this run, or find that it holds the same run already.

    Args:
      config: every option; all but ``output`` must agree with those in the directory, or be of the machine's
        (:func:`may_change`), or name the same files elsewhere (:func:`moved`), which is then said. An option that
        the directory does not know of had its default.
      identities: content hashes (model, reference, data) that must agree too.

    Raises:
      UserError: the directory holds another run, a run of an earlier format, or files that are no run.
    """
    directory = path_of(config.output)
    mine = {
        "run_format": FORMAT,
        "command": type(config).__name__,
        **flat_options(dataclasses.asdict(config)),
        **identities,
    }
    del mine["output"]  # the directory itself, which may be moved
    if is_run(directory):
        written = read_json(directory / "run.json")
        if written.get("run_format") != FORMAT:
            raise UserError(
                f"--output {directory}: holds a run of another version of dpojax, which cannot be continued (eval, "
                "sample and export still read it); name another directory to start anew"
            )
        theirs = {**default_options(type(config)), **written}
        compared = (mine.keys() | theirs.keys()) - NOT_COMPARED
        differing = [name for name in sorted(compared) if mine.get(name) != theirs.get(name)]
        named = {n: f"{n} ({theirs.get(n)!r} there, {mine.get(n)!r} here)" for n in differing}
        elsewhere = [name for name in differing if moved(name, theirs.get(name), mine.get(name))]
        refused = [name for name in differing if not may_change(name) and name not in elsewhere]
        if refused:
            others = ", ".join(named[name] for name in refused)
            raise UserError(f"--output {directory}: holds a run with another {others}; name another directory")
        if differing:
            changed = ", ".join(f"{flag(n)} {shown(mine.get(n))} (before: {shown(theirs.get(n))})" for n in differing)
            console.print(f"{directory}: goes on with {changed}; results agree to rounding, random draws aside")
        if elsewhere:  # whoever reads the run looks for its model where it is now
            write_text(directory / "run.json", json.dumps({**written, **{n: mine[n] for n in elsewhere}}, indent=2))
        return
    if exists(directory) and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"--output {directory}: exists and is no run of dpojax; name a new or empty directory")
    try:
        make_directory(directory)
    except OSError as error:
        raise UserError(f"--output {directory}: cannot be made ({error.strerror}); name another directory") from None
    write_text(directory / "run.json", json.dumps(mine, indent=2))


def shown(value: Any) -> str:
    """An option's value, as the command line takes it."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def default_options(kind: type[TrainOptions]) -> dict[str, Any]:
    """The defaults of a command's options, as :func:`flat_options` gives them; those it must be given are empty."""
    return flat_options(dataclasses.asdict(kind(model="", data=(), output="")))


def flat_options(value: Any, name: str = "") -> dict[str, Any]:
    """Options as ``run.json`` has them: those of a group by names with a dot, tuples as lists."""
    if isinstance(value, dict):
        return {
            k: v for key, item in value.items() for k, v in flat_options(item, f"{name}.{key}" if name else key).items()
        }
    return {name: list(value) if isinstance(value, tuple) else value}


def save_model_files(
    hf_config: dict[str, Any],
    generation_config: dict[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    directory: AnyPath,
) -> None:
    """Write what export needs beside the weights, once, whole or not at all.

    In an object store, ``config.json`` comes last: where it is, all is.
    """
    if exists(directory / "config.json" if in_store(directory) else directory):
        return
    aside = directory if in_store(directory) else directory.with_name(directory.name + ".partial")
    make_directory(aside)
    with reaching(directory):
        if generation_config:
            write_text(aside / GENERATION, json.dumps(generation_config, indent=2))
        save_tokenizer(tokenizer, aside)
        write_text(aside / "config.json", json.dumps(hf_config, indent=2))
    if aside != directory:
        aside.replace(directory)
