"""Rows and published records, whole and broken in ways that files are broken in, through the whole of the pipeline.

``python -m tests.data.fuzz --rows 10000`` does what the tests do with this many rows of every format.
"""

import argparse
import copy
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from dpojax.data import Encoder, EncodingOptions, RowKind, load_examples, parse_filter
from dpojax.data.formats import FORMATS
from dpojax.data.load import Report
from dpojax.errors import UserError
from tests.data import chats

PAGE = Path(__file__).resolve().parents[2] / "docs" / "formats.md"
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3, -3, 0.5, 10**400, -(10**4000), float("nan"), float("inf"), -0.0),
    *(
        "",
        " ",
        "\n",
        "x",
        "\ud800",
        "\u2028",
        "ünï\u202ecödé 🦜",
        "\x00",
        "A. x",
        "A. x\nB. y",
        "{",
        "[]",
        '"x"',
        "[" * 5000,
    ),
    *("\n\nHuman:", "\n\nAssistant:", "\n\nAssistant: \n\nHuman: ", "<extra_id_1>User\n", "tie", "x" * 100_000),
    *([], {}, [[]], [{}], [None], {"": None}, [[[[[[1]]]]]], ["x", "y"], [1, 2], [float("nan"), 1], b"bytes"),
    *({"role": "assistant"}, [{"role": "user", "content": "x"}], [{"role": "assistant", "content": None}]),
    *([{"from": "gpt", "value": "x"}], {"from": "nobody", "value": "x"}, {"from": "function_call", "value": "{}"}),
    *([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}], {"name": 3}),
    *("[" * 900 + "]" * 900, {1: 2, "x": None}, {"\ud800": "x" * 5000}),
]
"""Values to put where another was."""


def published() -> list[tuple[str, list[dict], dict]]:
    """Every block of docs/formats.md: the format, its records, and the row that they become."""
    blocks = re.findall(r"```json (\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = [(name, [json.loads(line) for line in text.splitlines()]) for name, text in blocks]
    return [(name, records, row) for name, (*records, row) in lines]


def as_one(name: str, records: list[dict]) -> dict:
    """What a format's function is given: a record, or a group of them."""
    group = FORMATS[name].group if name in FORMATS else None
    return {group: records[0][group], "records": records} if group else records[0]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def _broken(record: dict, rng: random.Random) -> dict:
    record = copy.deepcopy(record)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = _places(record)
        if not places:
            break
        container, key = rng.choice(places)
        what = rng.randrange(5)
        if what == 0:
            del container[key]
        elif what == 1 and isinstance(container[key], str):
            at = rng.randrange(len(container[key]) + 1)
            container[key] = container[key][:at] + str(rng.choice(VALUES[15:35])) + container[key][at:]
        elif what == 2 and isinstance(container[key], list):
            container[key] = container[key] * rng.choice((0, 2, 3))
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return record


def records(name: str, n: int, seed: int) -> list[dict]:
    """n records like a format's, each with something missing, misplaced or of another kind; the same for one seed."""
    rng = random.Random(f"{name} {seed}")
    whole = [as_one(name, given) for block, given, _ in published() if block == name]
    return [_broken(rng.choice(whole), rng) for _ in range(n)]


def raw_records(name: str, n: int, seed: int) -> list[dict]:
    """n records as a file has them, whole or broken; of a format that groups them, in small groups."""
    rng, group = random.Random(f"raw {name} {seed}"), FORMATS[name].group
    whole = [record for block, given, _ in published() if block == name for record in given]
    size = len(whole)
    records = [rng.choice(whole) for _ in range(n)]
    if group:
        records = [whole[i % size] | {group: f"x{i // size}"} for i in range(n)]
    return [_broken(record, rng) if rng.random() < (0.2 if group else 0.7) else record for record in records]


# --- rows of ours

WORDS = [
    *(
        "Hi",
        "rain",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "漢字",
        "🦜",
        "é",
        "\u2028",
        "\ufdd0",
        "\ue000",
        "\x00",
        "0",
        ".",
        "<",
        "|",
    ),
    *("<|im_end|>", "<|im_start|>", "</s>", "<s>", "[INST]", "<eos>", "<think>", "</think>", "<tool_call>", "{", '"'),
]


def text(rng: random.Random, most: int = 6) -> str:
    """A text, sometimes empty or blank, sometimes with what spells a special token."""
    said = "".join(rng.choice(WORDS) + rng.choice(("", " ")) for _ in range(rng.randrange(most)))
    return said + "\ud800" if rng.random() < 0.01 else said


def _said(rng: random.Random) -> Any:
    """The content of a message."""
    kind = rng.random()
    if kind < 0.1:
        return [{"type": "text", "text": text(rng)} for _ in range(rng.randrange(3))]
    return None if kind < 0.13 else text(rng)


def _answer(rng: random.Random) -> dict[str, Any]:
    message = {"role": "assistant", "content": _said(rng)}
    if rng.random() < 0.2:
        arguments: Any = {text(rng, 2): text(rng)}
        called = {"name": text(rng, 3), "arguments": rng.choice((arguments, json.dumps(arguments), "{", None))}
        message["tool_calls"] = [{"type": "function", "function": called}] * rng.choice((1, 1, 2, 0))
    if rng.random() < 0.2:
        message[rng.choice(("reasoning_content", "thinking", "reasoning"))] = text(rng)
    return message


def chat(rng: random.Random, end: bool) -> list[dict[str, Any]]:
    """Messages, with a reply at the end or without."""
    messages = [{"role": "system", "content": _said(rng)}] if rng.random() < 0.2 else []
    for _ in range(rng.choice((0, 0, 1, 2))):
        messages += [{"role": "user", "content": _said(rng)}, _answer(rng)]
        if rng.random() < 0.3:
            messages += [{"role": "tool", "content": _said(rng)}, _answer(rng)]
    messages.append({"role": "user", "content": _said(rng)})
    return [*messages, _answer(rng)] if end else messages


def _replies(rng: random.Random, n: int) -> tuple[Any, list[Any], str]:
    """A prompt, n completions, and the ending of their fields' names."""
    kind = rng.randrange(6)
    if kind == 0:
        ids = lambda: [rng.randrange(300) for _ in range(rng.randrange(1, 5))]  # noqa: E731
        return ids(), [ids() for _ in range(n)], "_ids"
    if kind < 3:
        return text(rng), [text(rng) for _ in range(n)], ""
    prompt = chat(rng, end=False)
    replies: list[Any] = [chat(rng, end=True)[-rng.choice((1, 1, 1, 3)) :] for _ in range(n)]
    if kind == 4:
        return prompt, [text(rng) for _ in range(n)], ""
    return (None if kind == 5 else prompt), [(prompt if kind == 5 else []) + reply for reply in replies], ""


def own_row(form: str, rng: random.Random) -> dict[str, Any]:
    """A row of ours of this form, not always a usable one."""
    row: dict[str, Any] = {}
    if form == "prompts":
        return {"prompt": rng.choice((text(rng), chat(rng, end=False)))}
    n = 2 if form == "pairs" else 1
    ranked = form == "pairs" and rng.random() < 0.2
    prompt, replies, ending = _replies(rng, rng.randrange(2, 5) if ranked else n)
    if ranked:
        row = {f"completions{ending}": replies, "scores": [rng.randrange(4) for _ in replies]}
        if rng.random() < 0.2:
            row["truncated"] = [rng.random() < 0.5 for _ in replies]
    else:
        names = ("chosen", "rejected") if form == "pairs" or (rng.random() < 0.2) else ("completion",)
        row = {f"{name}{ending}": rng.choice(replies) for name in names}
        if form == "pairs":
            row = dict(zip([f"{name}{ending}" for name in names], replies, strict=True))
        if rng.random() < 0.2:
            row["truncated" if names == ("completion",) else f"{names[-1]}_truncated"] = rng.random() < 0.8
    if prompt is not None:
        row[f"prompt{ending}"] = prompt
    return row | _annotations(form, rng)


def _annotations(form: str, rng: random.Random) -> dict[str, Any]:
    """Fields that a row may have besides."""
    fields: dict[str, Any] = {"label": rng.choice((True, False, 1, 0))} if form == "labels" else {}
    also = {
        "system": text(rng),
        "tools": rng.choice(([{"name": text(rng)}], [], "[]", json.dumps([{text(rng, 2): 1}]))),
        "chat_template_kwargs": rng.choice(({"enable_thinking": False}, "{}", {text(rng, 2): 1})),
        "margin": rng.choice((0, 1.5, 2, -1, None)),
        "weight": rng.choice((0, 2, 2.5, -1, None)),
        "source": "x",
    }
    often = {"margin": 0.7, "weight": 0.7} if form == "pairs" else {}
    return fields | {name: value for name, value in also.items() if rng.random() < often.get(name, 0.1)}


def own_rows(form: str, n: int, seed: int) -> list[dict]:
    """n rows of ours, every third of them broken further."""
    rng = random.Random(f"own {form} {seed}")
    rows = [own_row(form, rng) for _ in range(n)]
    return [_broken(row, rng) if i % 3 == 0 else row for i, row in enumerate(rows)]


# --- through the pipeline

KINDS = [
    *(RowKind("pairs"), RowKind("pairs", margin=True), RowKind("pairs", margin=True, weight=True)),
    *(RowKind("completions"), RowKind("labels"), RowKind("prompts")),
]
TOKENIZERS = [*chats.FAMILIES.values(), chats.r1]
ALWAYS = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8], "source": "y"}
"""A row that every kind of run can use, but for its label, margin and weight."""


def encoder_of(i: int) -> Encoder:
    """One of some tokenizers and their options."""
    tokenizer = TOKENIZERS[i % len(TOKENIZERS)]()
    more = [{}, {"as_chat": True}, {"allow_special_tokens": True}, {"chat_special_tokens": "tokenizer"}]
    return Encoder(tokenizer, EncodingOptions(chat_date="2026-11-25", **more[i // len(TOKENIZERS) % len(more)]))  # type: ignore[arg-type]


def check(rows: Any, n: int, encoder: Encoder, kind: RowKind, *, grouped: bool = False, **options: Any) -> Report:
    """The report of n rows, after a look whether each was kept or is named, and what was kept can be trained on."""
    try:
        examples, report = load_examples(rows, encoder, kind=kind, skip_bad_rows=True, **options)
    except UserError as error:
        # The template may refuse the whole ones too.
        assert "no row is usable" in str(error) and str(error).isprintable() and len(str(error)) < 1000, error
        return Report()
    assert len(examples) == report.kept == report.rows - report.filtered - len(report.dropped)
    for said in [report.sentence(), *report.remarks, *map(str, report.dropped)]:
        assert said.isprintable() and len(said) < 1000, said[:2000]
    numbers = [*examples.gathered("numbers").tolist(), *[bad.number for bad in report.dropped]]
    assert report.rows == len(numbers) + report.filtered
    if not grouped and not report.filtered:
        assert sorted(set(numbers)) == list(range(1, n + 1))
    for example in examples:
        assert len(example.prompt) and example.prompt.min() >= 0
        sides = [tuple(side.tolist()) for side in example.completions]
        assert all(sides) and len(set(sides)) == len(sides) >= (kind.form == "pairs") + (kind.form != "prompts")
        assert all(mask.any() and len(mask) == len(side) for mask, side in zip(example.masks, sides, strict=False))
        assert max(len(example.prompt) + len(side) for side in (*sides, ())) <= options.get("max_length", 1024)
    assert np.isfinite(examples.prompt_len).all()
    return report


def _sources(given: list[dict], file: Path | None) -> Any:
    """The records themselves, or the name of a file of them."""
    if file is None:
        return given
    file.write_text("".join(json.dumps(record, default=str) + "\n" for record in given))
    return [str(file)]


def check_format(name: str, n: int, seed: int, file: Path | None = None) -> Report:
    """The report of n records of a published format, in memory or from a file."""
    given = raw_records(name, n, seed)
    good = [record for block, records_, _ in published() if block == name for record in records_]
    form = "completions" if "completion" in next(row for block, _, row in published() if block == name) else "pairs"
    group = FORMATS[name].group
    given += [record | ({group: f"{record[group]}, again"} if group else {}) for record in good]
    options: dict[str, Any] = {"format": name, "grouped": bool(group), "max_length": 64 if seed % 2 else 1024}
    return check(_sources(given, file), len(given), encoder_of(seed), RowKind(form), **options)  # type: ignore[arg-type]


def check_own(kind: RowKind, n: int, seed: int, file: Path | None = None) -> Report:
    """The report of n rows of ours, in memory or from a file."""
    rows = own_rows(kind.form, n, seed)
    always = [ALWAYS | {"margin": 1, "weight": 1}]
    if kind.form in ("completions", "labels"):
        always = [{"prompt": "a", "completion": "b", "label": True, "source": "y"}]
    if kind.form == "prompts":
        always = [{"prompt": "a", "source": "y"}]
    given = [*rows, *always]
    filters = [parse_filter("source!=x")] if seed % 5 == 4 else []
    options: dict[str, Any] = {"format": "rows", "max_length": 24 if seed % 2 else 1024, "filters": filters}
    return check(_sources(given, file), len(given), encoder_of(seed), kind, **options)


def main(rows: int, at_once: int = 250) -> None:
    """Print what became of this many rows of every format, and of every kind of our own."""
    for name in [*FORMATS, *KINDS]:
        start, kept, dropped, refused = time.monotonic(), 0, 0, 0
        for seed in range(-(-rows // at_once)):
            one = check_own(name, at_once, seed) if isinstance(name, RowKind) else check_format(name, at_once, seed)
            kept, dropped, refused = kept + one.kept, dropped + len(one.dropped), refused + (one.rows == 0)
        batches = f"{refused} batches of {at_once} without a usable row, " if refused else ""
        print(f"{name}: {kept} kept, {dropped} named, {batches}{time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000, help="of every format, and of every kind of our own")
    main(parser.parse_args().rows)
