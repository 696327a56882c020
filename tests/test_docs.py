"""What the documentation shows runs, and what it lists is there."""

import doctest
import re
from pathlib import Path

import pytest

from dpojax.losses import LOSSES
from dpojax.progress import console
from tests.test_floors import FLOORS

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE_LINES = 30


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(console, "quiet", True)


def test_python_door(tmp_path, monkeypatch, quiet, capsys):
    monkeypatch.chdir(tmp_path)  # it saves a model
    failed, tried = doctest.testfile(str(ROOT / "docs" / "python.md"), module_relative=False)
    assert tried > EXAMPLE_LINES - 10 and not failed, capsys.readouterr().out
    assert (tmp_path / "tiny" / "config.json").exists()


def test_the_first_example_is_short():
    first = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert first and len(first[1].strip().splitlines()) <= EXAMPLE_LINES
