"""Rewards: those of transformers for every family; rows with scores that can be trained on; scorers of one's own."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers

from dpojax.cli import main
from dpojax.data import PAIRS, Encoder, Example, Examples, RowKind, load_examples
from dpojax.evaluate.scoring import make_rewarder
from dpojax.models import Model, as_reward_model, load_model, load_tokenizer, save_model
from tests.conftest import write_rows
from tests.models.families import FAMILIES as TINY
from tests.models.test_families import random_model
from tests.test_bad_input import say

ROWS = [
    {"id": 7, "prompt": "the film", "completion": " was good"},
    {"prompt": "the film", "chosen": " was good", "rejected": " was slow"},
    {"prompt": "a story", "completions": [" of two", " friends", " of two"], "scores": [0, 0, 0]},
    {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "so", "rejected": "no"},
    {"prompt_ids": [5, 6, 7], "completions_ids": [[8, 9], [10]]},
]
SCORERS = """
import numpy as np
def length(prompts, completions):
    return np.array([len(c) + 100 * len(p) for p, c in zip(prompts, completions)])
def one(prompts, completions): return [1.0]
def nan(prompts, completions): return [float("nan")] * len(prompts)
def words(prompts, completions): return ["good"] * len(prompts)
def fails(prompts, completions): raise KeyError("x")
"""


def reward_model(raw: dict) -> Model:
    """A random model of this config with a random score."""
    model = as_reward_model(random_model(raw))
    score = jax.random.normal(jax.random.key(5), model.params["score"].shape)
    return Model(model.config, {**model.params, "score": score}, model.hf_config)


@pytest.fixture(scope="module")
def reward_dir(tiny_dir, tmp_path_factory) -> str:
    """A reward model with ByT5's tokenizer."""
    directory = tmp_path_factory.mktemp("reward") / "model"
    save_model(reward_model(TINY["llama"]), directory)
    load_tokenizer(tiny_dir).save_pretrained(directory)
    return str(directory)


def score(capsys, tmp_path, rows: list[dict], *flags: str) -> list[dict]:
    """The rows that the command writes."""
    data, output = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    assert main(["score", "--data", data, "--output", str(output), *flags]) == 0, capsys.readouterr().err
    return [json.loads(line) for line in output.read_text().splitlines()]


def theirs(directory, texts: list[list[int]]) -> list[float]:
    """transformers' scores of token ids, one text at a time."""
    torch = pytest.importorskip("torch", reason="live parity needs torch, which CI installs")
    from transformers import AutoModelForSequenceClassification

    # Of attention kernels, only the eager one caps scores.
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForSequenceClassification.from_pretrained(directory, **options).eval()
    with torch.no_grad():
        return [float(model(torch.tensor([ids])).logits[0, 0]) for ids in texts]


@pytest.mark.parametrize("name", TINY)
def test_rewards_are_those_of_transformers(name, tmp_path):
    model = reward_model(TINY[name])
    save_model(model, tmp_path)
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(2, 384, n).astype(np.int32)  # noqa: E731
    examples = [Example(draw(p), (draw(c), draw(3))) for p, c in ((4, 9), (1, 2), (15, 6))]
    got = make_rewarder(model.config)(model.params, Examples.of(examples), "Rewards")
    back = load_model(str(tmp_path))
    assert back.config == model.config
    jax.tree.map(np.testing.assert_array_equal, back.params, model.params)
    if not hasattr(transformers, model.hf_config["architectures"][0]):
        pytest.skip(f"transformers has no {model.hf_config['architectures'][0]}")
    texts = [[*e.prompt.tolist(), *side.tolist()] for e in examples for side in e.completions]
    np.testing.assert_allclose(got.ravel(), theirs(tmp_path, texts), rtol=1e-4, atol=1e-4)


def test_every_row_comes_back_with_its_scores(capsys, tmp_path, reward_dir):
    out = score(capsys, tmp_path, ROWS, "--model", reward_dir)
    names = {"score", "scores", "score_chosen", "score_rejected"}
    strip = lambda row: {k: v for k, v in row.items() if k not in names}  # noqa: E731
    assert [strip(row) for row in out] == [strip(row) for row in ROWS]
    assert [sorted(names & row.keys()) for row in out] == [
        ["score"],
        ["score_chosen", "score_rejected"],
        ["scores"],
        ["score_chosen", "score_rejected"],
        ["scores"],
    ]
    assert out[2]["scores"][0] == out[2]["scores"][2] != out[2]["scores"][1]
    tokenizer = load_tokenizer(reward_dir)
    text = lambda *parts: tokenizer("".join(parts))["input_ids"]  # noqa: E731
    ends = [tokenizer(f"[user] Hi\n[assistant] {reply}")["input_ids"] for reply in ("so", "no")]
    expected = [
        *(text("the film", c) for c in (" was good", " was good", " was slow")),
        *(text("a story", c) for c in ROWS[2]["completions"]),
        *ends,
        [5, 6, 7, 8, 9],
        [5, 6, 7, 10],
    ]
    got = [x for row in out for k in sorted(names & row.keys()) for x in np.ravel(row[k])]
    np.testing.assert_allclose(got, theirs(reward_dir, expected), rtol=1e-4, atol=1e-4)


def test_what_is_written_can_be_trained_on(capsys, tmp_path, reward_dir):
    """Pairs have margins, and several completions are ranked."""
    rows = [{"prompt": "a", "completions": ["b", "cc", "ddd"]}, {"prompt": "a", "chosen": "ddd", "rejected": "b"}]
    (tmp_path / "scorers.py").write_text(SCORERS)
    out = score(capsys, tmp_path, rows, "--scorer", f"{tmp_path / 'scorers.py'}:length")
    assert out == [
        rows[0] | {"scores": [101, 102, 103]},
        rows[1] | {"score_chosen": 103.0, "score_rejected": 101.0},
    ]
    encoder = Encoder(load_tokenizer(reward_dir))
    (ranked,), _ = load_examples([write_rows(tmp_path / "ranked.jsonl", out[:1])], encoder, kind=PAIRS)
    assert ranked.annotations.scores == (103, 102, 101)
    (pair,), _ = load_examples([write_rows(tmp_path / "p.jsonl", out[1:])], encoder, kind=RowKind("pairs", margin=True))
    assert pair.annotations.margin == 2


def test_a_run_with_reward_model_scores(capsys, tmp_path, tiny_dir, pairs_file):
    run = tmp_path / "run"
    flags = ["--loss", "reward_model", "--steps", "2", "--learning-rate", "0.01", "--warmup-steps", "0"]
    assert main(["dpo", "--model", tiny_dir, "--data", pairs_file, "--output", str(run), *flags]) == 0
    of_run = score(capsys, tmp_path, ROWS[:2], "--model", str(run))
    assert main(["export", "--run", str(run), "--output", str(tmp_path / "exported")]) == 0
    exported = score(capsys, tmp_path, ROWS[:2], "--model", str(tmp_path / "exported"))
    assert of_run == exported and of_run[0]["score"] == pytest.approx(of_run[1]["score_chosen"], abs=1e-6)


def test_published_records_come_back_as_rows(capsys, tmp_path):
    (tmp_path / "scorers.py").write_text(SCORERS)
    record = {"goal": "c", "sol1": "a", "sol2": "bb", "label": 0}
    (row,) = score(capsys, tmp_path, [record], "--scorer", f"{tmp_path / 'scorers.py'}:length")
    assert row["score_chosen"] + 1 == row["score_rejected"] and {"prompt", "chosen", "rejected"} <= row.keys()


def test_a_scorer_is_given_chats_as_messages(capsys, tmp_path):
    source = "def turns(prompts, completions): return [len(p) + 10 * len(c) for p, c in zip(prompts, completions)]"
    (tmp_path / "s.py").write_text(source)
    flags = ("--scorer", f"{tmp_path / 's.py'}:turns")
    plain = {"prompt": "abc", "completion": "defgh"}
    assert [row.get("score", row.get("score_chosen")) for row in score(capsys, tmp_path, [plain, ROWS[3]], *flags)] == [
        53,
        11,
    ]
    assert score(capsys, tmp_path, [plain], *flags, "--as-chat")[0]["score"] == 11


@pytest.mark.parametrize(
    ("rows", "flags", "parts"),
    [
        (ROWS, [], ["--model", "name a reward model"]),
        (ROWS, ["--model", "TINY"], ["--model", "predicts tokens and is no reward model", "--scorer"]),
        (ROWS, ["--model", "REWARD", "--scorer", "FILE:length"], ["--model", "--scorer reads text"]),
        (ROWS, ["--scorer", "FILE:length", "--max-length", "9"], ["--max-length 9", "--scorer reads text"]),
        (ROWS, ["--scorer", "length"], ["--scorer length", "path/to/file.py:name"]),
        (ROWS, ["--scorer", "FILE:nobody"], ["defines no function nobody"]),
        (ROWS, ["--scorer", "FILE:one"], ["gives 1 numbers for 10 completions"]),
        (ROWS, ["--scorer", "FILE:nan"], ["row 1", "[nan]", "finite"]),
        (ROWS, ["--scorer", "FILE:words"], ["gives a str as a score"]),
        (ROWS, ["--scorer", "FILE:fails"], ["fails (KeyError: 'x')"]),
        ([*ROWS, {"prompt": "a"}], ["--scorer", "FILE:length"], ["row 6", "no field 'completion'", "fix it"]),
        ([*ROWS, {"prompt": "a"}], ["--model", "REWARD"], ["row 6", "no field 'completion'", "fix it"]),
        ([{"prompt": "a", "completions": []}], ["--model", "REWARD"], ["row 1", "at least one completion"]),
        ([{"prompt": "a", "completions": ["b", 7]}], ["--model", "REWARD"], ["row 1", "'completions[2]' is a number"]),
        (ROWS[:1], ["--scorer", "FILE:length", "--filter", "id>9"], ["no row is left by --filter"]),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_one_sentence(capsys, tmp_path, tiny_dir, reward_dir, rows, flags, parts):
    (tmp_path / "scorers.py").write_text(SCORERS)
    named = {"TINY": tiny_dir, "REWARD": reward_dir}
    flags = [named.get(flag, flag.replace("FILE", str(tmp_path / "scorers.py"))) for flag in flags]
    data, output = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    said = say(capsys, "score", "--data", data, "--output", output, *flags)
    assert all(part in said for part in parts), said
    assert list(tmp_path.glob("out*")) == []


def test_the_output_is_not_the_data(capsys, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert "is among --data" in say(capsys, "score", "--scorer", "s.py:f", "--data", data, "--output", data)
    assert len(Path(data).read_text().splitlines()) == len(ROWS)


def test_columns_that_json_has_no_form_of(capsys, tmp_path):
    """Dates and decimals of a table are written as JSON has them; bytes are refused."""
    import datetime
    import decimal

    import pyarrow
    import pyarrow.parquet

    (tmp_path / "scorers.py").write_text(SCORERS)
    row = {"prompt": "a", "completion": "b", "day": datetime.date(2026, 11, 25), "price": decimal.Decimal("1.50")}
    data, output, flags = (
        tmp_path / "t.parquet",
        tmp_path / "o.jsonl",
        ["--scorer", f"{tmp_path / 'scorers.py'}:length"],
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), data)
    assert main(["score", "--data", str(data), "--output", str(output), *flags]) == 0
    assert json.loads(output.read_text()) == row | {"day": "2026-11-25", "price": 1.5, "score": 101}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row | {"image": b"x"}]), data)
    said = say(capsys, "score", "--data", data, "--output", output, *flags)
    assert "row 1" in said and "type bytes" in said
