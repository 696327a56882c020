"""A format of one's own: the page's example is read, and what is wrong with a file or its function is one sentence."""

import re
from pathlib import Path

import pytest

from dpojax.data.formats import FORMATS, format_named
from dpojax.errors import UserError
from tests.data.fuzz import PAGE, published


def own(tmp_path: Path, code: str) -> str:
    path = tmp_path / "mine.py"
    path.write_text(code)
    return str(path)


def test_the_pages_function_reads_its_record(tmp_path):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    format = format_named(own(tmp_path, code) + ":quizzes")
    [(given, row)] = [(given, row) for name, given, row in published() if name == "own"]
    assert format.row(given[0]) == row and format.reads == ("quiz", "a", "b", "right") and format.group is None
    with pytest.raises(ValueError, match=r"^column 'right' must be a or b$"):
        format.row(given[0] | {"right": "c"})


def test_a_file_runs_once(tmp_path):
    path = own(tmp_path, "import pathlib\nhere = pathlib.Path(__file__).with_suffix('.txt')\n"
        "here.write_text(here.read_text() + 'x' if here.exists() else 'x')\n"
        "def f(record):\n    return {}\ndef g(record):\n    return {}\n")  # fmt: skip
    assert format_named(f"{path}:f").row({}) == format_named(f"{path}:g").row({}) == {}
    assert (tmp_path / "mine.txt").read_text() == "x"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (None, "mine.py: no such file"),
        ("x = 1", "mine.py: defines no function f"),
        ("f = 3", "mine.py: defines no function f"),
        ("1 / 0", r"mine.py: cannot be run \(ZeroDivisionError"),
        ("def f(:", r"mine.py: cannot be run \(SyntaxError"),
        ("raise SystemExit(3)", "mine.py: ends the program"),
        ("raise ValueError('two\\nlines')", r"mine.py: cannot be run \(ValueError: two"),
        ("def f(r): return r\nf.reads = 'abc'", "its 'reads' must be a tuple"),
        ("def f(r): return r\nf.group = 3", "its 'group' must be a column's name"),
    ],
)
def test_a_bad_file_gets_a_sentence(tmp_path, code, says):
    path = str(tmp_path / "mine.py") if code is None else own(tmp_path, code)
    with pytest.raises(UserError, match=says) as error:
        format_named(f"{path}:f")
    assert "\n" not in str(error.value)


def test_a_function_that_fails_gets_a_sentence(tmp_path):
    code = "def f(record):\n    return record['x'] / 0\n\n\ndef g(record):\n    return [1]\n"
    path = own(tmp_path, code)
    with pytest.raises(ValueError, match=r"mine.py:f fails \(KeyError: 'x'\)"):
        format_named(f"{path}:f").row({})
    with pytest.raises(ValueError, match=r"mine.py:g gives a list; it must give a row"):
        format_named(f"{path}:g").row({})


@pytest.mark.parametrize("spec", ["hhh", "", "hh:", "hh.py", "a.txt:f"])
def test_an_unknown_name_lists_the_names(spec):
    with pytest.raises(UserError, match=r"no format .*; give path/to/file.py:function, or one of hh, hh_chat, shp"):
        format_named(spec)
    assert all(format_named(name) is FORMATS[name] for name in FORMATS)
