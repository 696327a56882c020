"""What the documentation shows runs, and what it lists is there."""

import doctest
import json
import re
from pathlib import Path

import pytest

from dpojax.data import Encoder, RowKind, load_examples
from dpojax.losses import LOSSES
from dpojax.models import load_tokenizer
from dpojax.progress import console
from tests.conftest import write_rows
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
    assert (tmp_path / "runs" / "tiny" / "config.json").exists()


def test_the_first_example_is_short():
    first = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert first and len(first[1].strip().splitlines()) <= EXAMPLE_LINES


def json_examples() -> list[tuple[RowKind, list[dict]]]:
    """Every block of rows in docs/data.md: the kind that it names, and its lines."""
    blocks = re.findall(r"```json ([\w ]+)\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    named = [(kind.split(), [json.loads(line) for line in lines.splitlines()]) for kind, lines in blocks]
    return [(RowKind(form, **dict.fromkeys(asked, True)), rows) for (form, *asked), rows in named]


def test_every_row_of_the_data_page_is_read(tiny_dir, tmp_path):
    encoder = Encoder(load_tokenizer(tiny_dir))
    examples = json_examples()
    assert {kind.form for kind, _ in examples} == {"pairs", "completions", "labels", "prompts", "candidates"}
    for kind, rows in examples:
        for row in rows:
            from_file, _ = load_examples([write_rows(tmp_path / "rows.jsonl", [row])], encoder, kind=kind)
            in_memory, report = load_examples([row], encoder, kind=kind)
            assert from_file.content_hash == in_memory.content_hash
            assert report.rows == len(in_memory) == 1 + (kind.form == "labels" and "rejected" in row)
            cut = "truncated" in str(row) or "_ids" in str(row)
            assert cut or all(c[-1] == encoder.eos for c in in_memory[0].completions), row


def test_every_json_block_names_its_kind():
    assert "```json\n" not in (ROOT / "docs" / "data.md").read_text()


def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_the_readmes_floors_are_the_tests():
    table = re.search(r"\| floor \| what it holds \|\n\|---\|---\|\n((?:\|.*\n)+)", readme())
    assert table
    floors = [name for row in table[1].splitlines() for name in re.findall(r"`(\w+)(?:\.py|/)?`", row.split("|")[1])]
    assert floors == FLOORS


TENS = {"Thirty": 30, "Forty": 40, "Fifty": 50}
ONES = dict(zip(["", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"], range(10), strict=True))


def test_the_readme_counts_the_objectives():
    ten, one = re.search(r"(Thirty|Forty|Fifty)-?([a-z]*) objectives", readme()).groups()
    assert TENS[ten] + ONES[one] == len(LOSSES)


def test_every_link_between_documents_leads_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_named_files_are_there():
    """A page names no file of the repository that has moved."""
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*.md")]:
        if page.name == "CHANGELOG.md":
            continue
        for name in re.findall(r"`((?:dpojax|tests|scripts|experiments|docs)/[\w/.]+?)(?::\w+)?`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_named_tests_are_there():
    named = re.findall(r"`(tests/[\w/.]+)::(\w+)`", (ROOT / "docs" / "design.md").read_text())
    assert named
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
