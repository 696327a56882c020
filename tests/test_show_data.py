"""show-data: rows in tokens with their boundaries, and figures of all rows, legible without colour."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dpojax.cli import main
from dpojax.data import PAIRS, Encoder
from dpojax.data.load import read_tokens
from dpojax.data.prepare import Reading
from dpojax.models import load_tokenizer
from dpojax.show.data import histogram, look, spread
from dpojax.show.tokens import TokenTexts, lines_of, visible
from experiments.common import smollm2_path
from tests.conftest import write_rows

PAIR = {"prompt": "ab", "chosen": "c d", "rejected": "c"}
CHAT = {
    "prompt": [{"role": "user", "content": "Hi"}],
    "chosen": [
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": "b"},
    ],
    "rejected": [{"role": "assistant", "content": "Go</s>"}],
}


@pytest.fixture
def said(tiny_dir):
    """The lines that are shown of rows in memory."""
    tokenizer = load_tokenizer(tiny_dir)

    def said(rows: list, max_length: int = 512, floor: int = 64, **options) -> list[str]:
        read, _ = read_tokens(rows, Encoder(tokenizer), Reading())
        return [line.plain for line in look(read, tokenizer, PAIRS, max_length, floor, **options)]

    return said


def test_a_pair_is_shown_with_its_boundaries_and_its_end(said):
    assert said([PAIR | {"prompt": "Stop the exp", "chosen": "ort", "rejected": "ress\n1"}])[2:10] == [
        "rows, row 1",
        "  prompt: 12 tokens, not trained on",
        "    │S│t│o│p│ │t│h│e│ │e│x│p│",
        "  chosen: 4 tokens, trained on, ends in </s> (EOS)",
        "    │o│r│t│«</s>»│",
        "  rejected: 7 tokens, trained on, ends in </s> (EOS)",
        "    │r│e│s│s│⏎│",
        "    │1│«</s>»│",
    ]


def test_what_a_tool_says_is_not_trained_on_and_spelled_special_tokens_are_text(said):
    lines = said([CHAT])
    at = lines.index("  chosen: 25 tokens, 4 of them trained on, ends in </s> (EOS)")
    assert lines[at + 1 : at + 10] == [
        "    trained on",
        "      │a│«</s>»│",
        "    not trained on",  # ByT5 drops the line end behind </s>
        "      │[│t│o│o│l│]│ │t│⏎│",
        "      │[│a│s│s│i│s│t│a│n│t│]│ │",
        "    trained on",
        "      │b│«</s>»│",
        "  rejected: 7 tokens, trained on, ends in </s> (EOS)",
        "    │G│o│<│/│s│>│«</s>»│",
    ]
    assert "a pass computes over 54 tokens: 22 of prompts, 32 of completions, 11 of them trained on" in lines
    assert lines[-1] == "rows: special tokens spelled in rows (</s>) are text, not those tokens"


def test_what_is_cut_is_counted_where_it_was_cut(said):
    lines = said([PAIR | {"prompt": "abcdef", "chosen": "ghijkl"}], 8, 2)
    assert lines[3:9] == [
        "  prompt: 2 tokens, not trained on, 4 more cut off its start",
        "    │e│f│",
        "  chosen: 6 tokens, trained on, no EOS at its end, 1 more cut off its end",
        "    │g│h│i│j│k│l│",
        "  rejected: 2 tokens, trained on, ends in </s> (EOS)",
        "    │c│«</s>»│",
    ]
    cut = "--max-length 8 cuts the start off the prompt of 1 row (100.0 %), the end off completions of 1 row (100.0 %)"
    assert cut in lines


def test_equal_rows_and_shared_beginnings_are_counted(said):
    other = {"prompt": "x", "chosen": "y", "rejected": "z"}
    lines = said([PAIR, other, PAIR, PAIR | {"rejected": "c!"}])
    assert "  both begin with the same token; one is the beginning of the other" in lines
    assert lines[-5:] == [
        "a pass computes over 30 tokens: 7 of prompts, 23 of completions",
        "equal in tokens to an earlier row: 1 row (25.0 %); the first: rows, row 3, to rows, row 1",
        "2 different prompts, 1 of them in several rows, the commonest in 3",
        "completions begin with the same tokens: 3 rows (75.0 %)",
        "one completion is the beginning of the other: 2 rows (50.0 %)",
    ]


def test_annotations_and_scores_name_what_they_are_of(said):
    lines = said([{"prompt": "a", "completions": ["b", "c"], "scores": [1, 2.5]}])
    assert [line.split(":")[0] for line in lines[5:8:2]] == ["  completion of score 2.5", "  completion of score 1"]


def test_a_long_part_is_shown_whole_only_where_its_row_is_named(said):
    row = PAIR | {"prompt": "x" * 200}
    assert any("│ … 40 tokens, which --row shows … │x│" in line for line in said([row]))
    assert sum(line.count("x│") for line in said([row], numbers=[1])) == 200


def test_rows_are_spread_and_the_first_and_the_last_are_among_them():
    assert [spread(10, 3), spread(2, None), spread(9, 1), spread(9, 0), spread(0, 3)] == [
        [0, 4, 9],
        [0, 1],
        [0],
        [],
        [],
    ]


def test_bad_rows_stop_nothing_and_five_of_them_are_named(tiny_dir, tmp_path, capsys):
    file = write_rows(tmp_path / "f.jsonl", [PAIR, *["{"] * 7])
    assert main(["show-data", file, "--model", tiny_dir, "--row", "1", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (named,) = (line for line in lines if "row 8" in line)
    assert named.startswith(f"dropped: {file}, row 8: broken JSON")
    dropped = [line.split(":")[1] for line in lines[-6:-1]]
    assert dropped == [f" {file}, row {n}" for n in (2, 3, 4, 5, 6)]
    assert lines[-1] == "and 2 more, which check-data names"
    assert main(["show-data", write_rows(tmp_path / "g.jsonl", ["{"]), "--model", tiny_dir]) == 0
    assert "1 rows: 0 kept, 1 dropped" in capsys.readouterr().out


def test_rows_that_are_not_there_are_one_sentence(tiny_dir, tmp_path, capsys):
    file = write_rows(tmp_path / "f.jsonl", [PAIR])
    for flags, says in (
        (["--row", "2"], f"--row 2: {file}: no row of this number, or --filter leaves it out"),
        (["--row", "0"], "--row (0,): must be numbers of rows, which count from 1"),
        (["--rows", "-1"], "--rows -1: must be at least 0"),
        (["--rows", "2", "--row", "1"], "--rows 2: --row says which rows are shown; leave one of them out"),
        (["--loss", "kto", "--kind", "pairs"], "--kind pairs: --loss kto reads labels; leave one of them out"),
    ):
        assert main(["show-data", file, "--model", tiny_dir, *flags]) == 2
        assert capsys.readouterr().err == f"dpojax: {says}\n"


def test_the_tokens_are_kept_for_the_run(tiny_dir, tmp_path, capsys):
    file = write_rows(tmp_path / "f.jsonl", [PAIR])
    for _ in range(2):
        assert main(["show-data", file, "--model", tiny_dir]) == 0
    assert "(tokens from the cache)" in capsys.readouterr().out


def test_a_histogram_counts_every_row_and_its_last_bin_has_the_few_longer_ones():
    assert histogram(np.array([1, 2, 12, 12])) == [
        "tokens of prompt and longest completion, before they are cut:",
        "    0-1 ████████████████████ 1 row (25.0 %)",
        "    2-3 ████████████████████ 1 row (25.0 %)",
        "    4-5 0 rows (0.0 %)",
        "    6-7 0 rows (0.0 %)",
        "    8-9 0 rows (0.0 %)",
        "  10-11 0 rows (0.0 %)",
        "  12-13 ████████████████████████████████████████ 2 rows (50.0 %)",
        "  half of the rows have at most 12, nine of ten at most 12, the longest has 12",
    ]
    assert histogram(np.array([7] * 999 + [5000]))[1:2] == ["  7-5,000 " + "█" * 40 + " 1,000 rows (100.0 %)"]


def byte_level():
    """A tokenizer of bytes as GPT-2 spells them, and one of SentencePiece's kind, with bytes for what it lacks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    gpt = Tokenizer(models.BPE(letters | {"Ġa": 256}, [("Ġ", "a")]))
    gpt.pre_tokenizer, gpt.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    pieces = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256, "a": 257, "▁": 258, "<unk>": 259}
    sp = Tokenizer(models.BPE(pieces, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    sp.pre_tokenizer = pre_tokenizers.Metaspace()
    sp.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return [PreTrainedTokenizerFast(tokenizer_object=t, eos_token="</s>") for t in (gpt, sp)]


def test_characters_of_several_tokens_are_one_piece_and_spaces_are_kept():
    gpt, sp = byte_level()
    for tokenizer, first in ((gpt, "a"), (sp, " a")):
        texts = TokenTexts(tokenizer)
        ids = tokenizer("a a漢", add_special_tokens=False)["input_ids"]
        assert [piece.text for piece in texts.pieces(ids)] == [first, " a", "‹3:漢›"]
        assert [piece.text for piece in texts.pieces(ids[:-1])] == [first, " a", "‹E6›", "‹BC›"]
        assert [piece.text for piece in texts.pieces([ids[-1], ids[0]])] == ["‹A2›", first]
        assert [piece.text for piece in texts.pieces([tokenizer.eos_token_id, 10**6])] == ["«</s>»", "<token 1000000>"]


def test_what_a_terminal_would_obey_or_not_show_is_spelled_out():
    assert visible("a\x1b[2J\t\u202e\u00a0\ud800\n") == "a‹U+001B›[2J‹U+0009›‹U+202E›‹U+00A0›‹U+D800›⏎"


def test_colour_says_nothing_that_is_not_said_without_it(said, tiny_dir):
    texts = TokenTexts(load_tokenizer(tiny_dir))
    (line,) = lines_of(texts.pieces([100, 1]), 2, "green")
    plain, coloured = (Console(force_terminal=flag, color_system="standard" if flag else None) for flag in (0, 1))
    with plain.capture() as bare, coloured.capture() as drawn:
        plain.print(line)
        coloured.print(line)
    assert bare.get() == "  │a│«</s>»│\n"
    assert "\x1b[32ma" in drawn.get() and "\x1b[1;35m«</s>»" in drawn.get()


def test_the_example_of_the_data_page_is_what_the_command_prints(tmp_path, monkeypatch, capsys):
    root, file = Path(__file__).resolve().parent.parent, "experiments/data/sentiment_train.jsonl"
    example = re.search(r"```text show-data\n(.*?)```", (root / "docs" / "data.md").read_text(), re.DOTALL)
    (tmp_path / file).parent.mkdir(parents=True)
    shutil.copy(root / file, tmp_path / file)
    monkeypatch.chdir(tmp_path)
    assert main(["show-data", file, "--model", smollm2_path(), "--row", "3"]) == 0
    said = capsys.readouterr().out
    assert example and said.split("\n", 1)[1] == example[1]  # but for how long the tokens took
