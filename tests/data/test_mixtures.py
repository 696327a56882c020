"""Mixtures: batches draw from sources by their weights; and no prompt is both trained on and held out."""

import json
from collections import Counter

import numpy as np
import pytest

from dpojax.cli import main
from dpojax.data import Batches, Encoder, load_examples
from dpojax.models import load_tokenizer
from tests.conftest import write_rows


def pairs(name: str, n: int) -> list[dict]:
    return [{"prompt": f"{name} {i}", "chosen": "yes", "rejected": "no"} for i in range(n)]


@pytest.mark.parametrize("weights", [(0.75, 0.25), (3, 1)])
def test_draws_have_the_share_of_their_source_and_pass_through_each_by_itself(tiny_dir, tmp_path, weights):
    files = [write_rows(tmp_path / f"{name}.jsonl", pairs(name, n)) for name, n in (("a", 8), ("b", 56))]
    examples, _ = load_examples(files, Encoder(load_tokenizer(tiny_dir)), weights=weights)
    batches = Batches(examples, 8, seed=3, epochs=2)
    drawn = [int(i) for b in range(len(batches)) for i in batches.indices[b]]
    assert len(drawn) == 2 * 64  # an epoch has as many draws as there are rows
    counts = Counter(drawn)
    small = [counts[i] for i in range(8)]
    assert sum(small) == 96 and set(small) == {12}  # three quarters, and each row as often as any other
    assert max(counts[i] for i in range(8, 64)) == 1  # 32 draws of 56 rows
    again = Batches(examples, 8, seed=3, epochs=2)
    assert all(np.array_equal(batches.indices[b], again.indices[b]) for b in range(len(batches)))


def test_a_run_on_a_mixture_holds_prompts_out(tiny_dir, tmp_path, capsys):
    rows = pairs("a", 30)
    files = [write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", rows[:20] + pairs("b", 30))]
    command = ["dpo", "--model", tiny_dir, "--data", f"{files[0]}=0.7", f"{files[1]}=0.3", "--eval-share", "0.3"]
    command += ["--output", str(tmp_path / "run"), "--batch-size", "8", "--steps", "3", "--warmup-steps", "0"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "80 rows: 80 kept" in said and "no prompt is among both" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3]


def test_the_same_prompts_are_held_out_whatever_else_a_row_has(tiny_dir):
    encoder = Encoder(load_tokenizer(tiny_dir))
    chat = [{"prompt": [{"role": "user", "content": f"{i}"}], "chosen": "yes", "rejected": "no"} for i in range(9)]
    first, _ = load_examples(chat, encoder)
    other, _ = load_examples([row | {"chosen": "perhaps"} for row in chat[::-1]], encoder, max_length=30)
    assert first.prompts.tolist() == other.prompts.tolist()[::-1] and len(set(first.prompts.tolist())) == 9
