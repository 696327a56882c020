"""TFDS: what is made of rows is read back row for row, by TFDS itself too, and without TensorFlow."""

import json
import subprocess
import sys

import pytest

from dpojax.data.read import Row, read_rows
from dpojax.data.sources import open_sources
from dpojax.data.tfds import make_tfds
from dpojax.errors import UserError

CHAT = [{"role": "user", "content": "Hi, é\0\n"}, {"role": "assistant", "content": "漢"}]
SHARE = [{"from": "human", "value": "Hi"}]
TOOLS = [{"name": "f", "parameters": {"x": [1, None, "b"]}}]
ROWS = [
    {"prompt": "a", "messages": CHAT[1:], "turns": SHARE, "scores": [3, 0.5], "n": 1, "x": 0.5, "label": True},
    {"prompt": "", "messages": [], "turns": [], "scores": [], "n": -(2**62), "x": 2, "label": False},
    {"prompt": "é\n", "messages": CHAT[1:] * 2, "turns": SHARE * 3, "scores": [1], "n": 0, "x": -1.5, "label": True},
]
AS_JSON = [
    {"mixed": "text", "chat": CHAT, "tools": TOOLS, "third": 0.1, "big": 2**70 + 1, "gone": None, "ids": [[1], []]},
    {"mixed": CHAT, "chat": [CHAT[1] | {"name": "b"}], "tools": [], "third": 1.0, "big": 1, "ids": [[2, 3]]},
    {"mixed": None, "chat": [], "tools": [{}], "third": 3, "big": 0, "gone": "\ud800 here", "ids": []},
]
ALL = [a | b for a, b in zip(ROWS, AS_JSON, strict=True)]


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_come_back_equal_shard_by_shard(tmp_path):
    file = jsonl(tmp_path / "f.jsonl", ALL * 2)
    path = make_tfds([file, file], tmp_path / "sets", "my_pairs", "2.0.1", rows_per_shard=5)
    assert path == tmp_path / "sets" / "my_pairs" / "2.0.1"
    names = (f"tfds:my_pairs,data_dir={tmp_path / 'sets'}", f"tfds:my_pairs:2.0.1,data_dir={tmp_path / 'sets'}")
    for name in (*names, f"tfds:{path}", f"tfds:{path.parent}", str(path), f"tfds:{path},split=train"):
        rows = list(read_rows([name], rows=2))
        assert [row.fields for row in rows if isinstance(row, Row)] == ALL * 4
    assert [source.name for source in open_sources(names[0])] == [
        f"tfds:my_pairs, train, shard {i} of 3" for i in (1, 2, 3)
    ]
    assert [row.number for row in rows] == [1, 2, 3, 4, 5] * 2 + [1, 2]
    assert str(rows[6]) == f"tfds:{path}, train, shard 2 of 3, row 2"


def test_tfds_reads_it_with_features_where_features_hold_the_rows(tmp_path):
    import tensorflow_datasets as tfds

    path = make_tfds([jsonl(tmp_path / "f.jsonl", ALL)], tmp_path, "pairs")
    source = tfds.builder_from_directory(str(path)).as_data_source("train")
    assert len(source) == 3
    assert source[0]["prompt"] == b"a" and source[1]["n"] == -(2**62) and list(source[0]["scores"]) == [3.0, 0.5]
    assert source[2]["messages"] == {"content": ["漢".encode()] * 2, "role": [b"assistant"] * 2}
    assert [json.loads(example["tools"]) for example in source] == [row["tools"] for row in AS_JSON]
    assert sorted(json.loads((path / "metadata.json").read_text())["json_columns"]) == sorted(AS_JSON[0])


def test_a_split_may_be_a_slice(tmp_path):
    path = make_tfds([jsonl(tmp_path / "f.jsonl", ROWS)], tmp_path, "pairs", rows_per_shard=2)
    part = f"tfds:{path},split=train[1:3]"
    assert [row.fields for row in read_rows([part])] == ROWS[1:]
    assert [source.name for source in open_sources(f"tfds:{path},split=train[:2]")] == [f"tfds:{path}, train[:2]"]
    whole, sliced = open_sources(f"tfds:{path}")[0].identity(), open_sources(part)[0].identity()
    assert whole and sliced and whole != sliced


def test_tensorflow_is_never_imported(tmp_path):
    file = jsonl(tmp_path / "f.jsonl", ALL)
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('TensorFlow was imported')")
    code = (
        f"from dpojax.data.tfds import make_tfds; from dpojax.data.read import read_rows; import sys\n"
        f"path = make_tfds([{file!r}], {str(tmp_path)!r}, 'pairs')\n"
        f"print(len(list(read_rows([str(path)]))), 'tensorflow' in sys.modules)"
    )
    code = f"import sys; sys.path.append({str(tmp_path)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "3 False\n", done.stderr


def test_what_is_no_data_set_is_one_sentence(tmp_path):
    path = make_tfds([jsonl(tmp_path / "f.jsonl", ROWS)], tmp_path, "pairs", rows_per_shard=2)
    cases = {
        f"tfds:{path},split=test": "no split 'test'; the splits are train",
        f"tfds:{path},split=train[": "no split",
        f"tfds:nothing,data_dir={tmp_path}": f"no such prepared data set in {tmp_path}; prepare it with",
        "tfds:nothing_of_this_name": "no such prepared data set where TFDS looks",
        f"tfds:{tmp_path}": "no features.json",
        "tfds:Not a name!": "not a TFDS data set",
    }
    for name, says in cases.items():
        with pytest.raises(UserError) as error:
            open_sources(name)
        assert says in str(error.value) and str(error.value).startswith(name) and "\n" not in str(error.value)
    sorted(path.glob("*array_record*"))[1].unlink()
    with pytest.raises(UserError, match="is missing; copy the whole directory"):
        open_sources(f"tfds:{path}")


def test_a_set_that_cannot_be_made_is_one_sentence_and_leaves_nothing(tmp_path):
    good = jsonl(tmp_path / "f.jsonl", ROWS)
    bad = jsonl(tmp_path / "bad.jsonl", [{"a/b": 1}])
    (tmp_path / "broken.jsonl").write_text('{"a": 1}\n{"a":\n')
    for args, says in (
        ([[good], "My-Pairs"], "--name My-Pairs: must be a lower-case name"),
        ([[good], "pairs", "1"], "--version 1: must be three numbers"),
        ([[bad], "pairs"], "bad.jsonl, row 1: TFDS has no columns named 'a/b'"),
        ([[str(tmp_path / "broken.jsonl")], "pairs"], "broken.jsonl, row 2: broken JSON"),
        ([[str(tmp_path / "none")], "pairs"], "no such file"),
    ):
        with pytest.raises(UserError, match=says):
            make_tfds(args[0], tmp_path / "sets", *args[1:])
    assert not list((tmp_path / "sets").rglob("*.json"))
    make_tfds([good], tmp_path / "sets", "pairs")
    with pytest.raises(UserError, match="exists already"):
        make_tfds([good], tmp_path / "sets", "pairs")
