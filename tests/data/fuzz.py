"""Records of every published format, as docs/formats.md shows them, and broken in ways that files are broken in."""

import copy
import json
import random
import re
from pathlib import Path
from typing import Any

from dpojax.data.formats import FORMATS

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
