"""Rows: what is read, what is a pair, and what is said of what is not."""

import json

import pytest

from dpojax.data import (
    COMPLETIONS,
    LABELS,
    PAIRS,
    PROMPTS,
    BadRow,
    Dialogue,
    Row,
    RowAnnotations,
    RowKind,
    completion_of,
    kind_of,
    pair_of,
    read_rows,
)
from dpojax.data.read import rows_in_memory
from dpojax.data.rows import parse_row
from dpojax.errors import UserError

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
OTHER = {"role": "assistant", "content": "Go away"}
GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}


def row(**fields) -> Row:
    return Row("f.jsonl", 1, fields)


def used(fields: dict, kind: RowKind) -> tuple[Dialogue, RowAnnotations]:
    """A row as a run of this kind reads it."""
    ((dialogue, notes),) = parse_row(row(**fields), kind.form)
    return dialogue, notes.of_kind(kind)


MARGIN, WEIGHT, BOTH = (RowKind("pairs", m, w) for m, w in ((True, False), (False, True), (True, True)))


def test_text_pair():
    assert pair_of(row(**GOOD, other=3)) == Dialogue("a", ("b", "c"))


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
    assert pair_of(row(**fields)) == Dialogue([USER], ([BOT], [OTHER]))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, "no field 'rejected'"),
        ({"prompt": "a", "rejected": "b"}, "no field 'chosen'"),
        ({"chosen": "b", "rejected": "c"}, "no field 'prompt'"),
        (GOOD | {"rejected": "b"}, "chosen and rejected are equal"),
        (GOOD | {"chosen": 3}, "field 'chosen' is a number"),
        (GOOD | {"rejected": None}, "no field 'rejected'"),
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
    assert completion_of(row(prompt="a", completion="b")) == Dialogue("a", ("b",))
    assert completion_of(row(**GOOD)) == Dialogue("a", ("b",))
    assert completion_of(row(prompt="a", chosen="b")) == Dialogue("a", ("b",))
    assert completion_of(row(chosen=[USER, BOT], rejected=[USER, OTHER])) == Dialogue([USER], ([BOT],))
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
    assert [pair_of(r) for r in got] == [Dialogue([USER], ([BOT], [OTHER])), Dialogue([USER], ([OTHER], [BOT]))]


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
    assert pair_of(next(iter(read_rows([str(path)])))) == Dialogue("a", ("b", "c"))


RANKED = {"prompt": "a", "completions": ["x", "y", "z"], "scores": [1, 3.5, 1]}


def test_several_completions_come_best_first():
    dialogue, annotations = used(RANKED, PAIRS)
    assert dialogue == Dialogue("a", ("y", "x", "z"))
    assert annotations == RowAnnotations(ranks=(0, 1, 1), scores=(3.5, 1.0, 1.0))


def test_what_the_objective_asks_for_is_read():
    fields = {"prompt": "a", "chosen": "x", "rejected": "y", "score_chosen": 3, "score_rejected": 1, "weight": 2}
    assert used(fields, PAIRS)[1] == RowAnnotations()
    assert used(fields, BOTH)[1] == RowAnnotations(margin=2.0, weight=2.0)
    assert used(fields | {"margin": 0.5}, MARGIN)[1] == RowAnnotations(margin=0.5)
    assert used(RANKED | {"weight": 3}, BOTH)[1] == RowAnnotations((0, 1, 1), (3.5, 1.0, 1.0), weight=3.0)
    labelled = {"prompt": "a", "completion": "x", "label": False}
    assert used(labelled, LABELS) == (Dialogue("a", ("x",)), RowAnnotations(label=0.0))
    assert used({"prompt": "a", "completion": 3}, PROMPTS) == (Dialogue("a", ()), RowAnnotations())


def test_the_kind_is_what_the_objective_reads():
    from dpojax.losses import spelled, traits_of

    kinds = {
        name: kind_of(traits_of(spelled(name).objective))
        for name in ("sigmoid", "odpo", "with_weights(sigmoid)", "with_weights(odpo)", "kto", "reward_model")
    }
    assert list(kinds.values()) == [PAIRS, MARGIN, WEIGHT, BOTH, LABELS, PAIRS]
    with pytest.raises(ValueError, match="'completions' have no margin"):
        RowKind("completions", margin=True)


PAIR = {"prompt": "a", "chosen": "x", "rejected": "y"}


@pytest.mark.parametrize(
    ("kind", "fields", "why"),
    [
        (PAIRS, RANKED | {"scores": [1, 2]}, "lists of one length"),
        (PAIRS, RANKED | {"scores": [1, 1, 1]}, "all equal"),
        (PAIRS, RANKED | {"scores": [1, 2, "3"]}, "'scores' is string"),
        (PAIRS, RANKED | {"scores": [1, 2, float("nan")]}, "finite"),
        (PAIRS, RANKED | {"completions": ["x", "x", "y"]}, "completion 2 is there twice"),
        (PAIRS, RANKED | {"completions": ["x", "", "y"]}, "empty completion"),
        (PAIRS, RANKED | {"prompt": None}, "no field 'prompt'"),
        (MARGIN, PAIR, "no field 'margin'"),
        (MARGIN, PAIR | {"margin": "1"}, "'margin' is string"),
        (MARGIN, PAIR | {"margin": -1}, "exchange them"),
        (MARGIN, PAIR | {"score_chosen": 1, "score_rejected": 2}, "exchange them"),
        (WEIGHT, PAIR | {"weight": -1}, "at least 0"),
        (WEIGHT, PAIR | {"weight": True}, "'weight' is boolean"),
        (LABELS, {"prompt": "a"}, "no field 'completion'"),
        (LABELS, {"prompt": "a", "completion": "x"}, "'label' must be true"),
        (LABELS, {"prompt": "a", "completion": "x", "label": "good"}, "'label' must be true"),
        (LABELS, {"prompt": "a", "completion": "x", "label": [1]}, "'label' must be true"),
    ],
)
def test_rows_that_an_objective_cannot_use(kind, fields, why):
    with pytest.raises(ValueError, match=why):
        used(fields, kind)


IDS = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 1]}


def test_token_ids_stand_in_the_place_of_any_text():
    assert used(IDS, PAIRS)[0] == Dialogue((5, 6), ((7,), (8, 1)))
    assert used(IDS | GOOD, PAIRS)[0] == Dialogue((5, 6), ((7,), (8, 1)))
    assert used(GOOD | {"rejected_ids": [1]}, PAIRS)[0] == Dialogue("a", ("b", (1,)))
    assert used({"prompt": [USER], "completion_ids": [1]}, COMPLETIONS)[0] == Dialogue([USER], ((1,),))
    assert used(IDS, COMPLETIONS)[0] == Dialogue((5, 6), ((7,),))
    assert used({"prompt_ids": [5], "completion": "x", "label": 1}, LABELS)[0] == Dialogue((5,), ("x",))
    ranked = {"prompt": "a", "completions_ids": [[7], [8, 1]], "scores": [0, 1]}
    assert used(ranked, PAIRS) == (Dialogue("a", ((8, 1), (7,))), RowAnnotations((0, 1), (1.0, 0.0)))


def test_truncated_completions_are_marked():
    cut = GOOD | {"rejected_truncated": True, "chosen_truncated": None}
    assert used(cut, PAIRS)[0] == Dialogue("a", ("b", "c"), (False, True))
    assert used(cut, COMPLETIONS)[0] == Dialogue("a", ("b",))
    assert used(GOOD | {"chosen_truncated": True}, COMPLETIONS)[0] == Dialogue("a", ("b",), (True,))
    assert used(GOOD | {"rejected": "b", "chosen_truncated": True}, PAIRS)[0].truncated == (True, False)
    assert used({"prompt": "a", "completion": "b", "truncated": True}, COMPLETIONS)[0].truncated == (True,)
    assert used({"prompt": "a", "chosen": "b", "truncated": True}, COMPLETIONS)[0].truncated == (True,)
    assert used(RANKED | {"truncated": [True, False, False]}, PAIRS)[0].truncated == (False, True, False)


@pytest.mark.parametrize(
    ("kind", "fields", "why"),
    [
        *[
            (PAIRS, IDS | {"chosen_ids": x}, "'chosen_ids' must be a list of at least one token id")
            for x in ([], [-1], [1.0], [True], ["1"], [2**31], 3, "7")
        ],
        (PAIRS, IDS | {"prompt_ids": []}, "'prompt_ids' must be a list"),
        (PAIRS, IDS | {"prompt_ids": None}, "no field 'prompt'"),
        (PAIRS, IDS | {"rejected_ids": [7]}, "chosen and rejected are equal"),
        (PAIRS, IDS | {"rejected_ids": [7], "rejected_truncated": True}, "chosen and rejected are equal"),
        (PAIRS, {"prompt_ids": [5], "chosen": [BOT], "rejected": [OTHER]}, "prompt_ids are token ids"),
        (PAIRS, {"prompt": [USER], "chosen": [BOT], "rejected_ids": [1]}, "must both be text or both be chat"),
        (PAIRS, RANKED | {"completions_ids": [[1], [2]]}, "'completions_ids' and 'scores' must be lists of one length"),
        (PAIRS, RANKED | {"completions_ids": [[1], [2], []]}, r"'completions\[3\]_ids' must be a list of at least one"),
        (PAIRS, RANKED | {"completions_ids": [[1], [2], [1]]}, "completion 3 is there twice"),
        (PAIRS, GOOD | {"chosen_truncated": 1}, "'chosen_truncated' is a number; it must be true"),
        (PAIRS, GOOD | {"truncated": True}, "a pair has chosen_truncated, rejected_truncated"),
        (PAIRS, RANKED | {"truncated": True}, "'truncated' must be a list of 3 booleans"),
        (PAIRS, RANKED | {"truncated": [True, False]}, "'truncated' must be a list of 3 booleans"),
        (PAIRS, RANKED | {"truncated": [True, False, "no"]}, r"'truncated\[3\]' is a string"),
        (COMPLETIONS, {"prompt": "a", "completion": "b", "truncated": "yes"}, "'truncated' is a string"),
        (COMPLETIONS, {"prompt": "a", "completion": ""}, "an empty reply that was sampled as token ids"),
        (PROMPTS, {"completion": "a"}, "no field 'prompt'"),
    ],
)
def test_bad_token_ids_and_flags(kind, fields, why):
    with pytest.raises(ValueError, match=why):
        used(fields, kind)


def test_rows_in_memory_have_places():
    got = list(rows_in_memory([GOOD, [1], GOOD]))
    assert [type(r) for r in got] == [Row, BadRow, Row]
    assert str(got[1]) == "rows, row 2: a list, not a dict with named fields" and got[2].number == 3
    with pytest.raises(UserError, match="rows: the list is empty"):
        list(rows_in_memory([]))
