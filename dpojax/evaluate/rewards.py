"""Completions' rewards, by a reward model or by a function of the user's, and rows that carry them."""

import contextlib
import datetime
import decimal
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from dpojax.configs import ScoreConfig
from dpojax.data import CANDIDATES, Dialogue, Encoder, Row
from dpojax.data.prepare import Reading, format_and_blocks, kept
from dpojax.data.read import BadRow, Place
from dpojax.data.rows import as_chat, candidates_of, with_scores
from dpojax.data.sources import open_sources
from dpojax.errors import UserError, first_line
from dpojax.evaluate.scoring import make_rewarder, scoring_mesh
from dpojax.losses.spelling import from_file
from dpojax.models import config_from_hf, open_model
from dpojax.models.safetensors import read_json
from dpojax.paths import path_of
from dpojax.startup import keep_memory
from dpojax.train.by_name import open_policy, tokenizer_for
from dpojax.train.inputs import check_fit, encoding_of, read_examples
from dpojax.train.rundir import is_run

Rewards = Callable[[Sequence[tuple[Place, Dialogue]]], list[list[float]]]
"""Rows' dialogues, with their places -> of every row, its completions' rewards."""
ROWS_AT_ONCE = 1024


def is_reward_model(name: str) -> bool:
    """Whether a model by name, or a run's, scores completions.

    Raises:
      UserError: no such model.
    """
    if not is_run(name):
        return open_model(name).config.reward
    path = path_of(name) / "model" / "config.json"
    return config_from_hf(read_json(path), str(path)).reward


def model_rewards(config: ScoreConfig, name: str) -> Rewards:
    """Rewards of a reward model, of all rows that the options name; they are given out in the order of the rows.

    Raises:
      UserError: it is no reward model, or a row cannot be used.
    """
    if not is_reward_model(name):
        how = "train one by dpojax dpo --loss reward_model, or give --scorer path/to/file.py:name"
        raise UserError(f"--model {name}: predicts tokens and is no reward model (...ForSequenceClassification); {how}")
    encoder = Encoder(tokenizer_for(config), encoding_of(config))  # type: ignore[arg-type]  # a model is named
    examples, _ = read_examples(config.data, encoder, CANDIDATES, config)
    files = open_policy(name, reward=True)
    check_fit(files.config, [examples], config.tokenizer or name)
    model = files.load(scoring_mesh(files.config))
    keep_memory()
    rewarder = make_rewarder(
        model.config,
        dtype=config.dtype,
        attention=config.attention,
        batch_size=config.batch_size,
        max_shapes=config.max_shapes,
    )
    rest = iter(rewarder(model.params, examples, f"Rewards, {Path(name).name}").tolist())

    def rewards(rows: Sequence[tuple[Place, Dialogue]]) -> list[list[float]]:
        known = list(itertools.islice(rest, len(rows)))
        if len(known) < len(rows):
            raise UserError(f"{rows[0][0].file}: was changed while it was read; run the command again")
        return [row[: len(dialogue.completions)] for row, (_, dialogue) in zip(known, rows, strict=True)]

    return rewards


def scorer_rewards(spec: str) -> Rewards:
    """Rewards of a function of a Python file (:func:`scorer_of_file`).

    Raises:
      UserError: no such file or function; it fails, or gives something else.
    """
    scorer = scorer_of_file(spec)

    def rewards(rows: Sequence[tuple[Place, Dialogue]]) -> list[list[float]]:
        prompts = [dialogue.prompt for _, dialogue in rows for _ in dialogue.completions]
        numbers = iter(scorer(prompts, [side for _, dialogue in rows for side in dialogue.completions]))
        return [list(itertools.islice(numbers, len(dialogue.completions))) for _, dialogue in rows]

    return rewards


def scorer_of_file(spec: str, option: str = "--scorer") -> Callable[[Sequence[Any], Sequence[Any]], list[float]]:
    """A function of a Python file, ``path/to/file.py:name``, that scores completions.

    The function takes two lists of one length, prompts and completions, as the rows have them: texts, lists of chat
    messages, or tuples of token ids. It gives as many numbers.

    Raises:
      UserError: no such file or function, by the option's name; when it is called, that it fails, or gives something
        else.
    """
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise UserError(f"{option} {spec}: is no path/to/file.py:name; name a function of a Python file so")
    try:
        function: Any = from_file(path, name, {})
    except SystemExit:
        raise UserError(f"{path}: ends the program when it is run; leave that out") from None
    except ValueError as error:
        raise UserError(f"{option} {first_line(error)}") from None

    def scores(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        try:
            given = list(function(prompts, completions))
        except UserError:
            raise
        except Exception as error:  # it is anybody's code
            raise UserError(f"{option} {spec} fails ({type(error).__name__}: {first_line(error)}); fix it") from None
        if len(given) != len(completions):
            raise UserError(
                f"{option} {spec}: gives {len(given)} numbers for {len(completions)} completions; give one each"
            )
        return [number_of(x, f"{option} {spec}") for x in given]

    return scores


def number_of(value: Any, where: str) -> float:
    """A scorer's number, NumPy's or a framework's scalar too.

    Raises:
      UserError: it is none.
    """
    try:
        value = value.item() if hasattr(value, "item") else value
        number = float(value) if isinstance(value, Real) else None
    except (ValueError, RuntimeError, OverflowError):  # an array of several; an integer of hundreds of digits
        number = None
    if number is None:
        raise UserError(f"{where}: gives a {type(value).__name__} as a score; give numbers")
    return number


def dialogues(
    files: Sequence[str], reading: Reading, chat: bool, *, empty: bool = False
) -> Iterator[tuple[Row, Dialogue]]:
    """The rows that the filters leave, as rows of ours, and their dialogues, in order; completions may be ``empty``.

    Raises:
      UserError: a file cannot be read, or a row cannot be used.
    """
    for source in itertools.chain.from_iterable(map(open_sources, files)):
        format, blocks = format_and_blocks(source, reading)
        for row in itertools.chain.from_iterable(block.rows() for block in blocks):
            try:
                if isinstance(row, BadRow):
                    raise ValueError(row.why)
                if not kept(row, reading, format):
                    continue
                ours = Row(row.file, row.number, format.row(row.fields) if format else row.fields)
                dialogue = candidates_of(ours, empty=empty)
            except (ValueError, RecursionError) as error:
                deep = "its values are nested too deeply; leave the row out"
                why = deep if isinstance(error, RecursionError) else str(error)
                raise UserError(f"{BadRow(row.file, row.number, why)}; fix it") from None
            yield ours, as_chat(dialogue) if chat else dialogue


def plain(value: Any) -> Any:
    """A value of a table's column that JSON has no form of, in one that it has.

    Raises:
      ValueError: there is none.
    """
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise ValueError(f"a value of type {type(value).__name__}, which JSON has no form of; leave its column out")


def scored_lines(rows: Sequence[tuple[Row, Dialogue]], rewards: Rewards) -> Iterator[str]:
    """The rows with their completions' rewards, as lines of JSON.

    Raises:
      UserError: a reward is not finite, or a row holds what JSON cannot.
    """
    for (row, _), scores in zip(rows, rewards(rows), strict=True):
        if not all(map(math.isfinite, scores)):
            raise UserError(
                f"{Place(row.file, row.number)}: a score is {scores}, and must be finite; leave the row out"
            )
        try:
            yield json.dumps(with_scores(row.fields, scores), default=plain) + "\n"
        except ValueError as error:
            raise UserError(f"{Place(row.file, row.number)}: {error}") from None


def write_scored(config: ScoreConfig, reading: Reading, rewards: Rewards) -> int:
    """Write every row with its scores to ``--output``, which is complete or not there; returns how many.

    Raises:
      UserError: a row cannot be used or scored.
    """
    path, n = Path(config.output), 0
    partial = path.with_name(path.name + ".partial")
    every = dialogues(config.data, reading, config.as_chat)
    try:
        with partial.open("w", encoding="utf-8") as file:
            while rows := list(itertools.islice(every, ROWS_AT_ONCE)):
                file.writelines(scored_lines(rows, rewards))
                n += len(rows)
        if not n:
            raise UserError(f"{', '.join(config.data)}: no row is left by --filter; give another one")
        partial.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
    return n
