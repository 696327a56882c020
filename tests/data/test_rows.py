"""Rows: what is read, what is a pair, and what is said of what is not."""

import json

import pytest

from dpojax.data import BadRow, Row, Values, completion_of, pair_of, read_rows
from dpojax.data.rows import usable_part
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


RANKED = {"prompt": "a", "completions": ["x", "y", "z"], "scores": [1, 3.5, 1]}


def test_several_completions_come_best_first():
    part, values = usable_part(Row("f", 1, RANKED), "pairs")
    assert part == ("a", ("y", "x", "z"))
    assert values == Values(ranks=(0, 1, 1), scores=(3.5, 1.0, 1.0))


def test_what_the_objective_asks_for_is_read():
    fields = {"prompt": "a", "chosen": "x", "rejected": "y", "score_chosen": 3, "score_rejected": 1, "weight": 2}
    assert usable_part(Row("f", 1, fields), "pairs")[1] == Values()
    assert usable_part(Row("f", 1, fields), "pairs margin weight")[1] == Values(scores=(2.0, 0.0), weight=2.0)
    assert usable_part(Row("f", 1, fields | {"margin": 0.5}), "pairs margin")[1].scores == (0.5, 0.0)
    labelled = {"prompt": "a", "completion": "x", "label": False}
    assert usable_part(Row("f", 1, labelled), "labels") == (("a", ("x",)), Values(label=0.0))


PAIR = {"prompt": "a", "chosen": "x", "rejected": "y"}


@pytest.mark.parametrize(
    ("kind", "fields", "why"),
    [
        ("pairs", RANKED | {"scores": [1, 2]}, "lists of one length"),
        ("pairs", RANKED | {"scores": [1, 1, 1]}, "all equal"),
        ("pairs", RANKED | {"scores": [1, 2, "3"]}, "'scores' is string"),
        ("pairs", RANKED | {"scores": [1, 2, float("nan")]}, "finite"),
        ("pairs", RANKED | {"completions": ["x", "x", "y"]}, "completion 2 is there twice"),
        ("pairs", RANKED | {"completions": ["x", "", "y"]}, "empty completion"),
        ("pairs", RANKED | {"prompt": None}, "no field 'prompt'"),
        ("pairs margin", PAIR, "no field 'margin'"),
        ("pairs margin", PAIR | {"margin": "1"}, "'margin' is string"),
        ("pairs margin", PAIR | {"margin": -1}, "exchange them"),
        ("pairs margin", PAIR | {"score_chosen": 1, "score_rejected": 2}, "exchange them"),
        ("pairs weight", PAIR | {"weight": -1}, "at least 0"),
        ("pairs weight", PAIR | {"weight": True}, "'weight' is boolean"),
        ("labels", PAIR, "no field 'completion'"),
        ("labels", {"prompt": "a", "completion": "x"}, "'label' must be true"),
        ("labels", {"prompt": "a", "completion": "x", "label": "good"}, "'label' must be true"),
        ("labels", {"prompt": "a", "completion": "x", "label": [1]}, "'label' must be true"),
    ],
)
def test_rows_that_an_objective_cannot_use(kind, fields, why):
    with pytest.raises(ValueError, match=why):
        usable_part(Row("f", 1, fields), kind)
