"""Rows: what is read, what is a pair, and what is said of what is not."""

import json

import pytest

from dpojax.data import BadRow, Row, completion_of, pair_of, read_rows
from dpojax.errors import UserError

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
OTHER = {"role": "assistant", "content": "Go away"}
GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}


def row(**fields) -> Row:
    return Row("f.jsonl", 1, fields)


def test_text_pair():
    assert pair_of(row(**GOOD, other=3)) == ("a", ("b", "c"))


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [USER], "chosen": [BOT], "rejected": [OTHER]},
        {"prompt": [USER], "chosen": "Hello", "rejected": "Go away"},
        {"prompt": [USER], "chosen": [USER, BOT], "rejected": [USER, OTHER]},
        {"chosen": [USER, BOT], "rejected": [USER, OTHER]},
        {"prompt": None, "chosen": [USER, BOT], "rejected": [USER, OTHER]},
        {"prompt": "Hi", "chosen": [USER, BOT], "rejected": [USER, OTHER]},
    ],
)
def test_every_spelling_of_a_chat_is_the_same_pair(fields):
    assert pair_of(row(**fields)) == ([USER], ([BOT], [OTHER]))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, "no field 'rejected'"),
        ({"prompt": "a", "rejected": "b"}, "no field 'chosen'"),
        ({"chosen": "b", "rejected": "c"}, "no field 'prompt'"),
        (GOOD | {"rejected": "b"}, "chosen and rejected are equal"),
        (GOOD | {"chosen": 3}, "field 'chosen' is a number"),
        (GOOD | {"rejected": None}, "field 'rejected' is a null"),
        (GOOD | {"prompt": {"a": 1}}, "field 'prompt' is a object"),
        (GOOD | {"chosen": ""}, "field 'chosen' is an empty completion"),
        (GOOD | {"rejected": " \n"}, "field 'rejected' is an empty completion"),
        (GOOD | {"chosen": []}, "field 'chosen' is an empty list"),
        (GOOD | {"chosen": ["x"]}, "not a chat message"),
        (GOOD | {"chosen": [{"role": "user", "content": 1}]}, "content is not text"),
        (GOOD | {"chosen": [BOT]}, "must both be text or both be chat messages"),
        ({"chosen": [BOT], "rejected": [OTHER]}, "share no beginning"),
        ({"chosen": [USER], "rejected": [USER, BOT]}, "an empty completion"),
        ({"prompt": "Bye", "chosen": [USER, BOT], "rejected": [USER, OTHER]}, "do not begin with it"),
    ],
)
def test_bad_pairs(fields, says):
    with pytest.raises(ValueError, match=says):
        pair_of(row(**fields))


def test_completions_for_sft():
    assert completion_of(row(prompt="a", completion="b")) == ("a", ("b",))
    assert completion_of(row(**GOOD)) == ("a", ("b",))
    assert completion_of(row(prompt="a", chosen="b")) == ("a", ("b",))
    assert completion_of(row(chosen=[USER, BOT], rejected=[USER, OTHER])) == ([USER], ([BOT],))
    with pytest.raises(ValueError, match="no field 'completion'"):
        completion_of(row(prompt="a"))


def test_jsonl_places_and_blank_lines(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n[1]\n{"a": "\xff"}\n{"a": 2}')
    got = list(read_rows([str(path)]))
    assert [type(r) for r in got] == [Row, BadRow, BadRow, BadRow, Row]
    assert [r.number for r in got] == [1, 3, 4, 5, 6]
    assert "broken JSON" in str(got[1]) and f"{path}, row 3" in str(got[1])
    assert "a JSON list" in str(got[2])


def test_parquet_is_jsonl(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"chosen": [USER, BOT], "rejected": [USER, OTHER]},
        GOOD | {"chosen": [USER, OTHER], "rejected": [USER, BOT]},
    ]
    rows[1].pop("prompt")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet")
    got = list(read_rows([str(tmp_path / "f.parquet")]))
    assert [r.number for r in got] == [1, 2]
    assert [pair_of(r) for r in got] == [([USER], ([BOT], [OTHER])), ([USER], ([OTHER], [BOT]))]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.jsonl", None, "no such file"),
        ("empty.jsonl", "", "the file is empty"),
        ("blank.jsonl", "\n  \n", "the file is empty"),
        ("broken.parquet", "not parquet", "not a readable Parquet file"),
    ],
)
def test_unreadable_files(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says) as error:
        list(read_rows([str(tmp_path / name)]))
    assert name in str(error.value)


def test_json_numbers_beside_text_do_no_harm(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(GOOD | {"chosen_score": 0.5}) + "\n")
    assert pair_of(next(iter(read_rows([str(path)])))) == ("a", ("b", "c"))
