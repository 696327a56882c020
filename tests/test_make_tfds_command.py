"""make-tfds: the set that it writes is read back, and bad options are one sentence."""

import json
from pathlib import Path

import pytest

from dpojax.cli import main
from dpojax.data import read_rows
from tests.conftest import write_rows

ROWS = [{"prompt": "a" * n, "chosen": "b", "rejected": "c"} for n in range(5)]


@pytest.fixture
def file(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    return write_rows(tmp_path / "f.jsonl", ROWS)


def test_the_set_has_all_rows_in_their_order(file, capsys):
    options = ["--version", "1.2.0", "--split", "test", "--rows-per-shard", "2"]
    assert main(["make-tfds", file, file, "--output", "sets", "--name", "my_pairs", *options]) == 0
    assert (
        capsys.readouterr().out
        == "written to sets/my_pairs/1.2.0; --data tfds:sets/my_pairs/1.2.0,split=test reads it\n"
    )
    for name in ("tfds:sets/my_pairs/1.2.0,split=test", "tfds:my_pairs,data_dir=sets,split=test"):
        assert [row.fields for row in read_rows([name])] == ROWS * 2
    (split,) = json.loads(Path("sets/my_pairs/1.2.0/dataset_info.json").read_text())["splits"]
    assert split["shardLengths"] == ["2"] * 5


def test_what_is_wrong_is_one_sentence_that_names_the_flag(file, capsys):
    for name, flags, says in (
        ("My-Pairs", [], "--name My-Pairs: must be a lower-case name"),
        ("pairs", ["--version", "1"], "--version 1: must be three numbers"),
        ("pairs", ["--split", "a b"], "--split a b: must be a lower-case name"),
        ("pairs", ["--rows-per-shard", "0"], "--rows-per-shard 0: must be at least 1"),
    ):
        assert main(["make-tfds", file, "--output", "sets", "--name", name, *flags]) == 2
        assert capsys.readouterr().err.startswith(f"dpojax: {says}")
    assert main(["make-tfds", "--output", "sets", "--name", "pairs"]) == 2
    assert "at least one file" in capsys.readouterr().err
    assert main(["make-tfds", file, "--output", file, "--name", "pairs"]) == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err
