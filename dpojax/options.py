"""Ranges of every command's options; a value outside is refused in one sentence before anything is read."""

import dataclasses
import datetime
import importlib.util
import json
import re
from math import inf
from typing import Any

from dpojax.errors import UserError
from dpojax.paths import check_run, path_of

UNITS = {"": 1} | {f"{k}B": 1000**i for i, k in enumerate(("", *"KMGT"))}
UNITS |= {f"{k}IB": 1024**i for i, k in enumerate("KMGT", 1)}
"""Units of sizes in bytes, in capitals."""


def bytes_of(size: str) -> int:
    """The bytes of a size; 0 where it is none.

    >>> bytes_of("5GB"), bytes_of("1.5 kib"), bytes_of("2000"), bytes_of("five")
    (5000000000, 1536, 2000, 0)
    """
    number, unit = re.match(r"([0-9.]*) *(.*)", size.strip().upper(), re.DOTALL).groups()  # type: ignore[union-attr]
    try:
        return int(float(number) * UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        return 0


# field -> (what it must be, whether a value is)
RANGES: dict[str, tuple[str, Any]] = {
    "beta": ("above 0 and finite", lambda v: 0 < v < inf),
    "label_smoothing": ("from 0 to below 0.5", lambda v: 0 <= v < 0.5),
    "ref_model_mixup_alpha": ("above 0 and at most 1", lambda v: 0 < v <= 1),
    "learning_rate": ("above 0 and finite", lambda v: 0 < v < inf),
    "max_grad_norm": ("above 0", lambda v: v > 0),
    "weight_decay": ("at least 0", lambda v: v >= 0),
    "warmup_steps": ("at least 0", lambda v: v >= 0),
    "eval_share": ("from 0 to below 1", lambda v: 0 <= v < 1),
    "lora_alpha": ("above 0 and finite", lambda v: 0 < v < inf),
    "router_aux_loss_coef": ("at least 0 and finite", lambda v: 0 <= v < inf),
    "lora_dropout": ("from 0 to below 1", lambda v: 0 <= v < 1),
    "lora_targets": ("at least one module, or all-linear", len),
    "max_length": ("at least 2, one token of prompt and one of completion", lambda v: v >= 2),
    "temperature": ("at least 0", lambda v: v >= 0),
    "top_p": ("above 0 and at most 1", lambda v: 0 < v <= 1),
    "top_k": ("at least 0, and 0 for all", lambda v: v >= 0),
    "min_p": ("from 0 to 1", lambda v: 0 <= v <= 1),
    "repetition_penalty": ("above 0 and finite, and 1 for none", lambda v: 0 < v < inf),
    "stop": ("texts that are not empty", all),
    "stop_token_ids": ("token ids, which count from 0", lambda v: min(v, default=0) >= 0),
    "max_shard_size": ("a size above 0, as in 5GB, 500MB or 2GiB", lambda v: bytes_of(v) > 0),
    "rows": ("at least 0", lambda v: v >= 0),
    "search": ("at least 0, and 0 for none", lambda v: v >= 0),
    "top": ("at least 0", lambda v: v >= 0),
    "retries": ("at least 0", lambda v: v >= 0),
    "timeout": ("above 0 and finite", lambda v: 0 < v < inf),
    "price_per_million_input": ("at least 0 and finite", lambda v: 0 <= v < inf),
    "price_per_million_output": ("at least 0 and finite", lambda v: 0 <= v < inf),
    "row": ("numbers of rows, which count from 1", lambda v: min(v, default=1) >= 1),
    "data": ("at least one file", len),
    "report_to": ("at least one tracker, or none", len),
    "prompt": ("at least one text", len),
    "seed": ("from 0 to 4294967295", lambda v: 0 <= v < 2**32),
} | {
    name: ("at least 1", lambda v: v >= 1)
    for name in (
        *("batch_size", "max_shapes", "logprob_chunk_tokens", "epochs", "steps", "gradient_accumulation_steps"),
        *("logging_steps", "eval_steps", "save_steps", "save_total_limit", "max_new_tokens", "num_samples"),
        *("limit", "max_answer_tokens", "concurrency"),
        *("min_prompt_length", "ref_model_sync_steps", "lora_rank", "prompt_length"),
    )
}


def flag(field: str) -> str:
    """The command line's spelling of a field."""
    return "--" + field.replace("_", "-")


def check_options(config: Any) -> None:
    """Refuse values outside their range, and options that have no effect together with another option.

    Raises:
      UserError: naming the flag, its value and what it must be.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in RANGES and value is not None:
            must, holds = RANGES[field.name]
            if not holds(value):
                shown = "" if value == () else f" {value}"
                raise UserError(f"{flag(field.name)}{shown}: must be {must}")
    check_places(config)
    check_trackers(config)
    check_reading(config)
    if hasattr(config, "endpoint"):
        check_judge(config)
    else:
        check_scorer(config)
    if hasattr(config, "lora_rank"):
        check_lora(config)
    if getattr(config, "weight_decay", 0) and config.optim != "adamw":
        raise UserError(f"--weight-decay {config.weight_decay}: {config.optim} has none; use --optim adamw")
    if getattr(config, "temperature", 1) == 0:
        for name in ("top_k", "top_p", "min_p"):
            if (value := getattr(config, name)) != getattr(type(config), name):
                raise UserError(f"{flag(name)} {value}: --temperature 0 samples nothing; leave one of them out")
    if getattr(config, "row", ()) and config.rows is not None:
        raise UserError(f"--rows {config.rows}: --row says which rows are shown; leave one of them out")
    if hasattr(config, "gradient_accumulation_steps") and config.batch_size % config.gradient_accumulation_steps:
        n = config.gradient_accumulation_steps
        raise UserError(f"--gradient-accumulation-steps {n}: must divide --batch-size {config.batch_size}")


def check_places(config: Any) -> None:
    """Refuse names in object stores that are none, or that nothing here can read.

    Raises:
      UserError: naming the place.
    """
    if hasattr(config, "save_steps"):
        check_run(config.output)
    for name in ("output", "run", "model", "tokenizer", "ref_model", "adapter"):
        if isinstance(value := getattr(config, name, None), str):
            path_of(value)


def check_trackers(config: Any) -> None:
    """Refuse trackers beside none of them, and one that is not installed.

    Raises:
      UserError: naming the flag.
    """
    report_to = getattr(config, "report_to", ())
    if "none" in report_to and set(report_to) != {"none"}:
        raise UserError(f"--report-to {' '.join(report_to)}: none switches the others off; leave it or them out")
    if "wandb" in report_to:
        spec = importlib.util.find_spec("wandb")
        if spec is None or spec.origin is None:  # W&B's own files, in a directory of its name, are no package
            raise UserError("--report-to wandb: needs wandb, which is not installed: pip install 'dpojax[wandb]'")


OF_TEXT = ("data", "format", "filter", "as_chat", "scorer", "output")
"""The options of `score` that a scorer has a use for."""


def check_scorer(config: Any) -> None:
    """Refuse `score` by nothing or by two things at once, and a model's options where there is none.

    Raises:
      UserError: naming the flag.
    """
    if not hasattr(config, "scorer"):
        return
    if config.scorer is None:
        if config.model is None:
            raise UserError("--model: name a reward model, or give --scorer path/to/file.py:name")
        return
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in OF_TEXT and value != field.default:
            raise UserError(f"{flag(field.name)} {value}: --scorer reads text and no tokens; leave one of them out")


OF_ANY_JUDGE = ("a", "b", "output", "json", "limit", "agreement", "format", "filter", "as_chat")
OF_ENDPOINT = (
    *("judge_model", "task", "template", "both_orders", "seed", "api_key_env", "request_options", "max_answer_tokens"),
    *("concurrency", "retries", "timeout", "price_per_million_input", "price_per_million_output", "dry_run"),
)
JUDGES = ("endpoint", "model", "scorer", "scored")
"""The options that name a judge; one of them is given."""


def check_judge(config: Any) -> None:
    """Refuse to judge by nothing or by two things at once, and options that are for another judge.

    Raises:
      UserError: naming the flag.
    """
    named = [name for name in JUDGES if getattr(config, name)]
    if not named:
        known = "--endpoint URL, --model REWARD_MODEL, --scorer path/to/file.py:name or --scored"
        raise UserError(f"--endpoint: no judge is named; give {known}")
    if len(named) > 1:
        raise UserError(f"{flag(named[1])}: {flag(named[0])} is a judge already; leave one of them out")
    for field in dataclasses.fields(config):
        if field.name in (*OF_ANY_JUDGE, *JUDGES):
            continue
        value, judge = getattr(config, field.name), "endpoint" if field.name in OF_ENDPOINT else "model"
        if judge != named[0] and value != field.default:
            raise UserError(f"{flag(field.name)} {value}: is for {flag(judge)}, not {flag(named[0])}; leave one out")
    if config.endpoint is not None:
        if config.judge_model is None:
            raise UserError("--judge-model: name the model that --endpoint shall ask")
        if config.template is not None and config.task != type(config).task:
            raise UserError(f"--task {config.task}: --template is asked in its place; leave one of them out")
        check_object("request_options", config.request_options, '{"max_completion_tokens": 2000}')


def check_lora(config: Any) -> None:
    """Refuse options that do not go together with an adapter.

    Raises:
      UserError: naming the flag.
    """
    named = {"lora_rank": config.lora_rank, "adapter": getattr(config, "adapter", None)}
    for name, value in named.items():
        if value is None:
            continue
        if config.train_top_layers is not None:
            raise UserError(f"{flag(name)} {value}: --train-top-layers trains layers themselves; leave one of them out")
        if getattr(config, "sync_ref_model", False):
            raise UserError(f"{flag(name)} {value}: --sync-ref-model mixes whole models; leave one of them out")


def check_reading(config: Any) -> None:
    """Refuse options of data that say nothing, or two things at once.

    Raises:
      UserError: naming the flag.
    """
    if getattr(config, "eval_share", 0) and config.eval_data:
        raise UserError(f"--eval-share {config.eval_share}: --eval-data is held out already; leave one of them out")
    if (kwargs := getattr(config, "chat_template_kwargs", None)) is not None:
        check_object("chat_template_kwargs", kwargs, '{"enable_thinking": false}')
    if (date := getattr(config, "chat_date", None)) is not None:
        try:
            datetime.date.fromisoformat(date)
        except ValueError:
            raise UserError(f"--chat-date {date}: must be a day, as in 2026-11-25") from None


def check_object(name: str, value: str, example: str) -> None:
    """Refuse an option that is no JSON object.

    Raises:
      UserError: naming the flag.
    """
    try:
        known = isinstance(json.loads(value), dict)
    except (ValueError, RecursionError):
        known = False
    if not known:
        raise UserError(f"{flag(name)} {value}: must be a JSON object, as in '{example}'")
