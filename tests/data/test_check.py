"""check-data: what it says of every row."""

import json

import pytest

from dpojax.data import PAIRS, Encoder, RowKind
from dpojax.data.check import check_files
from dpojax.data.prepare import Reading
from dpojax.models import load_tokenizer
from tests.conftest import write_rows


@pytest.fixture
def file(tmp_path):
    rows = [
        json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}),
        "{broken",
        json.dumps({"prompt": "a" * 30, "chosen": "b" * 30, "rejected": "c"}),
        json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}),
        json.dumps({"prompt": "", "chosen": "b", "rejected": "c"}),
    ]
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(rows))
    return str(path)


def test_fields_alone(file):
    lines, wrong = check_files([file], None, PAIRS, 20, 64, Reading())
    assert wrong
    assert [line.split(": ")[1] for line in lines[:-1]] == [f"{file}, row 2", f"{file}, row 4"]
    assert lines[-1] == "5 rows: 3 kept, lengths not looked at (give --model), 2 dropped"


def test_with_a_tokenizer(file, tiny_dir):
    lines, wrong = check_files([file], Encoder(load_tokenizer(tiny_dir)), PAIRS, 20, 64, Reading())
    assert wrong
    assert [line.split(": ")[0] + line.split(", ")[1][:5] for line in lines[:-1]] == [
        *("droppedrow 2", "droppedrow 4", "droppedrow 5"),
        *("truncatedrow 3", "truncatedrow 3"),
    ]
    assert lines[-1] == "5 rows: 2 kept, 1 of them truncated to 20 tokens, 3 dropped"


def test_a_clean_file_is_clean(pairs_file, tiny_dir):
    lines, wrong = check_files([pairs_file], Encoder(load_tokenizer(tiny_dir)), PAIRS, 512, 64, Reading())
    assert not wrong
    assert lines == ["24 rows: 24 kept, 0 of them truncated to 512 tokens, 0 dropped"]


def test_exit_status(file, pairs_file, capsys):
    from dpojax.cli import main

    assert main(["check-data", pairs_file]) == 0
    assert main(["check-data", file]) == 1
    assert main(["check-data", pairs_file + "x"]) == 2


def test_rows_are_checked_as_the_run_will(tmp_path, capsys):
    from dpojax.cli import main

    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    file = write_rows(tmp_path / "f.jsonl", [row | {"margin": 1}, row | {"weight": 2, "margin": 0}])
    for loss, wrong in (("sigmoid", []), ("odpo", []), ("with_weights(odpo)", [1]), ("kto", [])):
        assert main(["check-data", file, "--loss", loss]) == bool(wrong)
        dropped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("dropped")]
        assert [line.split(":")[1].split("row ")[1] for line in dropped] == [str(number) for number in wrong]
    assert main(["check-data", file, "--loss", "odpo", "--kind", "pairs"]) == 0
    assert main(["check-data", file, "--loss", "kto", "--kind", "pairs"]) == 2
    assert "--kind pairs: --loss kto reads labels; leave one of them out" in capsys.readouterr().err
    assert main(["check-data", file, "--loss", "odbo"]) == 2
    assert "--loss odbo: " in capsys.readouterr().err


def test_rows_of_a_directory_are_told_apart_by_their_shard(tiny_dir, tmp_path):
    """Each shard counts from 1: what is wrong with the first row of one says nothing of another's."""
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    write_rows(tmp_path / "shards" / "a.jsonl", [pair])  # without the margin that is asked for
    write_rows(tmp_path / "shards" / "b.jsonl", [pair | {"prompt": "x" * 50, "margin": 1}])
    shards, kind = tmp_path / "shards", RowKind("pairs", margin=True)
    lines, wrong = check_files([str(shards)], Encoder(load_tokenizer(tiny_dir)), kind, 20, 64, Reading())
    assert wrong and lines[0].startswith(f"dropped: {shards}/a.jsonl, row 1: no field 'margin'")
    assert lines[1:] == [
        f"truncated: {shards}/b.jsonl, row 1: prompt cut at its start",
        "2 rows: 1 kept, 1 of them truncated to 20 tokens, 1 dropped",
    ]
