"""Numbers and values as a report writes them."""

import json
import math
import re
import unicodedata
from typing import Any

from dpojax.report.read import Value

FEW = 8
"""Items of a list of numbers that are all shown."""


def number(x: float) -> str:
    """A number in five significant digits, whole ones in full.

    >>> number(0.6931471824), number(100.0), number(1e-06), number(12345678.0)
    ('0.69315', '100', '1e-06', '12345678')
    """
    return str(int(x)) if math.isfinite(x) and x == int(x) and abs(x) < 1e15 else f"{x:.5g}"


def with_error(value: Value) -> str:
    """A value with its standard error, to the error's second digit.

    >>> with_error(Value(0.8360655, 0.0324780)), with_error(Value(2.5)), with_error(Value(0.5, 0.0))
    ('0.836 ± 0.032', '2.5', '0.5 ± 0')
    """
    if value.error is None:
        return number(value.mean)
    if not 0 < value.error < math.inf or not math.isfinite(value.mean):
        return f"{number(value.mean)} ± {number(value.error)}"
    digits = max(0, 1 - math.floor(math.log10(value.error)))
    if digits > 9:
        return f"{number(value.mean)} ± {value.error:.2g}"
    return f"{value.mean:.{digits}f} ± {value.error:.{digits}f}"


def shown(value: Any) -> str:
    """An option or fact as text: lists by their items, or by their number where those are many; nothing as a dash.

    >>> shown(["a.jsonl", "b.jsonl"]), shown([1.0] * 99), shown(None), shown(True), shown(1e-05), shown("")
    ('a.jsonl b.jsonl', '(99 values)', '–', 'true', '1e-05', '')
    """
    if value is None or value == []:
        return "–"
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"{value:.10g}" if isinstance(value, float) else str(value)
    if isinstance(value, list):
        if all(isinstance(x, str) for x in value) or (len(value) <= FEW and not any(map(_is_group, value))):
            return " ".join(map(shown, value))
        return f"({len(value)} values)"
    return str(value)


def _is_group(value: Any) -> bool:
    return isinstance(value, list | dict)


HIDDEN = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Characters that turn the direction of what follows them."""


def visible(text: str) -> str:
    r"""A text in which what cannot be seen, or not be stored, stands by its code; line breaks and tabs stay.

    >>> print(visible("a\x00b"), visible("\ud800"), visible("\u202eabc"))
    a\x00b \ud800 \u202eabc
    """
    return "".join(
        c.encode("unicode_escape").decode()
        if HIDDEN.match(c) or (c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cs", "Cn"))
        else c
        for c in text.replace("\r\n", "\n")
    )
