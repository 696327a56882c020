"""Bad input: one clear sentence that names the place and how to fix it, status 2, no traceback."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from dpojax.cli import main

GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}


def lines(*rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def say(capsys, *args) -> str:
    """The one sentence that a command which must fail with status 2 says."""
    assert main([str(arg) for arg in args]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dpojax: ") and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["no such file", "JSONL or Parquet"]),
        ("", ["the file is empty"]),
        (lines(GOOD, {"prompt": "a", "chosen": "b"}), ["row 2", "no field 'rejected'", "fix it"]),
        (lines(GOOD | {"rejected": "b"}), ["row 1", "chosen and rejected are equal"]),
        (lines(GOOD, GOOD | {"chosen": 7}), ["row 2", "field 'chosen' is a number"]),
        (lines(GOOD, GOOD, '{"prompt": '), ["row 3", "broken JSON"]),
        (lines(GOOD | {"chosen": ""}), ["row 1", "empty completion"]),
        (lines(GOOD | {"prompt": ""}), ["row 1", "the prompt is empty"]),
        (lines(GOOD | {"prompt": "\ud800"}), ["row 1", "not valid Unicode"]),
        (lines(GOOD, "[" * 100_000), ["row 2", "broken JSON"]),
    ],
)
@pytest.mark.parametrize("command", ["dpo", "logps", "eval"])
def test_data(capsys, tiny_dir, tmp_path, content, parts, command):
    data, output = tmp_path / "pairs.jsonl", tmp_path / "out"
    if content is not None:
        data.write_text(content)
    said = say(capsys, command, "--model", tiny_dir, "--data", data, "--output", output)
    assert all(part in said for part in [str(data), *parts]), said
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--loss", "sigmod"], ["--loss sigmod", "perhaps sigmoid"]),
        (["--beta", "-0.1"], ["--beta -0.1", "above 0"]),
        (["--beta", "0"], ["--beta 0", "above 0"]),
        (["--label-smoothing", "0.5"], ["--label-smoothing 0.5", "below 0.5"]),
        (["--loss", "ipo", "--label-smoothing", "0.1"], ["--label-smoothing 0.1", "with_label_smoothing(ipo, 0.1)"]),
        (
            ["--loss", "aot", "--batch-size", "16", "--gradient-accumulation-steps", "2"],
            ["accumulation-steps 2", "at 1"],
        ),
        (["--loss", "tdpo1", "--reference", "cached"], ["--reference cached", "live or auto"]),
        (["--loss", "simpo", "--ref-model", "x"], ["--ref-model x", "reads no reference"]),
        (["--loss", "simpo", "--reference", "live"], ["--reference live", "reads no reference"]),
        (["--loss", "odpo"], ["row 1", "no field 'margin'"]),
        (["--loss", "with_weights(sigmoid)"], ["row 1", "no field 'weight'"]),
        (["--filter", "chosen"], ["--filter 'chosen'", "column>=number"]),
        (["--filter", "stars>=1"], ["row 1", "no field 'stars'", "--filter"]),
        (["--format", "argila"], ["no format 'argila'", "ultrafeedback"]),
        (["--eval-share", "1"], ["--eval-share 1", "below 1"]),
        (["--eval-share", "0.0001"], ["--eval-share 0.0001", "no row is held out"]),
        (["--chat-date", "today"], ["--chat-date today", "2026-11-25"]),
        (["--chat-template-kwargs", "[1]"], ["--chat-template-kwargs [1]", "JSON object"]),
        (["--min-prompt-length", "0"], ["--min-prompt-length 0", "at least 1"]),
        (["--loss", "nowhere.py:f"], ["nowhere.py", "no such file"]),
        (["--loss", "reward_model", "--train-top-layers", "1"], ["--train-top-layers 1", "whole models"]),
        (["--ref-model-sync-steps", "5"], ["--ref-model-sync-steps 5", "add --sync-ref-model"]),
        (["--sync-ref-model", "--reference", "cached"], ["--reference cached", "live or auto"]),
        (["--sync-ref-model", "--train-top-layers", "1"], ["--train-top-layers 1", "leave one"]),
        (["--learning-rate", "nan"], ["--learning-rate nan", "above 0"]),
        (["--batch-size", "0"], ["--batch-size 0", "at least 1"]),
        (["--max-length", "1"], ["--max-length 1", "at least 2"]),
        (["--weight-decay", "0.1"], ["--weight-decay 0.1", "use --optim adamw"]),
        (["--batch-size", "8", "--gradient-accumulation-steps", "3"], ["must divide --batch-size 8"]),
        (["--mesh.fsdp", "3"], ["--mesh", "does not fit 8 devices"]),
        (["--mesh.tensor", "4"], ["--mesh.tensor", "kv_heads"]),
        (["--batch-size", "4"], ["--batch-size", "8 devices"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--beta", "inf"], ["--beta inf", "finite"]),
        (["--data"], ["--data", "at least one file"]),
    ],
)
def test_flags(capsys, tiny_dir, pairs_file, tmp_path, flags, parts):
    said = say(capsys, "dpo", "--model", tiny_dir, "--data", pairs_file, "--output", tmp_path / "out", *flags)
    assert all(part in said for part in parts), said
    assert not (tmp_path / "out").exists()


def broken_model(tiny_dir: str, tmp_path: Path, kind: str) -> Path:
    model = tmp_path / "model"
    if kind == "missing":
        return model
    shutil.copytree(tiny_dir, model)
    weights = model / "model.safetensors"
    if kind == "only a config":
        for path in model.iterdir():
            if path.name != "config.json":
                path.unlink()
    elif kind == "config is a list":
        (model / "config.json").write_text("[]")
    elif kind == "too many layers":
        raw = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 1}))
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no config":
        (model / "config.json").unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "cut in its header":
        weights.write_bytes(weights.read_bytes()[:50])
    elif kind == "shard missing":
        index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "broken gguf":
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGUF" + bytes(10))
        return path
    return model


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("missing", ["model", "no such model"]),
        ("no weights", ["no model.safetensors"]),
        ("only a config", ["no model.safetensors"]),
        ("config is a list", ["config.json", "not a JSON object"]),
        ("too many layers", ["has 1 layers, the weights have more"]),
        ("no config", ["config.json", "no such file"]),
        ("truncated", ["model.safetensors", "truncated or damaged"]),
        ("cut in its header", ["model.safetensors", "truncated or damaged"]),
        ("shard missing", ["model-00001-of-00002.safetensors", "the index names it"]),
        ("broken gguf", ["m.gguf", "truncated or damaged"]),
    ],
)
def test_models(capsys, tiny_dir, pairs_file, tmp_path, kind, parts):
    model = broken_model(tiny_dir, tmp_path, kind)
    said = say(
        *(capsys, "logps", "--model", model, "--tokenizer", tiny_dir, "--data", pairs_file),
        *("--output", tmp_path / "out.jsonl"),
    )
    assert all(part in said for part in parts), said


def test_tokenizers(capsys, tiny_dir, pairs_file, tmp_path):
    (tmp_path / "none").mkdir()
    common = ("logps", "--model", tiny_dir, "--data", pairs_file, "--output", tmp_path / "o", "--tokenizer")
    assert "no usable tokenizer" in say(capsys, *common, tmp_path / "none")


def test_a_tokenizer_too_large_for_the_model(capsys, tiny_dir, pairs_file, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.conftest import WORDS

    words = Tokenizer(models.WordLevel({w: 500 + i for i, w in enumerate(dict.fromkeys(["<u>", *WORDS]))}, "<u>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<u>", unk_token="<u>").save_pretrained(tmp_path / "t")
    common = ("logps", "--model", tiny_dir, "--data", pairs_file, "--output", tmp_path / "o")
    assert "the model has 384 embeddings" in say(capsys, *common, "--tokenizer", tmp_path / "t")


def test_commands_on_runs(capsys, tiny_dir, tmp_path):
    assert "no run.json" in say(capsys, "export", "--run", tiny_dir, "--output", tmp_path / "o")
    assert "--temperature -1" in say(capsys, "sample", "--model", tiny_dir, "--prompt", "a", "--temperature", "-1")
    assert "no such model" in say(capsys, "sample", "--model", tmp_path / "x.gguf", "--prompt", "a")
    assert "no such file" in say(capsys, "check-data", tmp_path / "x.jsonl")
    assert "at least one file" in say(capsys, "check-data")
    assert "at least one text" in say(capsys, "sample", "--model", tiny_dir, "--prompt")


def test_output_files_are_checked_first(capsys, tmp_path):
    nowhere = tmp_path / "no" / "out.jsonl"
    said = say(capsys, "logps", "--model", tmp_path / "none", "--data", tmp_path / "none", "--output", nowhere)
    assert str(nowhere) in said and "name a file" in said


def test_chat_without_a_template(capsys, tiny_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_dir, model)
    (model / "chat_template.jinja").unlink()
    data = tmp_path / "chat.jsonl"
    user = {"role": "user", "content": "Hi"}
    data.write_text(lines({"prompt": [user], "chosen": "b", "rejected": "c"}))
    said = say(capsys, "logps", "--model", model, "--data", data, "--output", tmp_path / "o")
    assert "row 1" in said and "no chat template" in said


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--top-k", "-1"], ["--top-k -1", "at least 0"]),
        (["--min-p", "1.5"], ["--min-p 1.5", "from 0 to 1"]),
        (["--repetition-penalty", "0"], ["--repetition-penalty 0.0", "above 0"]),
        (["--stop", "a", ""], ["--stop ('a', '')", "not empty"]),
        (["--stop-token-ids", "-2"], ["--stop-token-ids (-2,)", "count from 0"]),
        (["--stop-token-ids", "384"], ["--stop-token-ids 384", "the model has 384 tokens"]),
        (["--temperature", "0", "--top-k", "5"], ["--top-k 5", "--temperature 0 samples nothing"]),
    ],
)
def test_sampling(capsys, tiny_dir, flags, parts):
    said = say(capsys, "sample", "--model", tiny_dir, "--prompt", "a", *flags)
    assert all(part in said for part in parts), said


def test_sampling_beyond_learned_positions(tiny_dir):
    """A family of learned positions would read its last one again and again."""
    from dpojax.configs import SampleConfig
    from dpojax.errors import UserError
    from dpojax.generate.prompts import check_prompts
    from dpojax.models import Learned, open_model

    config = dataclasses.replace(open_model(tiny_dir).config, positions=Learned(size=16), max_positions=16)
    options = SampleConfig(model="", prompt=("a",), max_new_tokens=12)
    check_prompts(options, config, [[5, 6, 7, 8], [5]])
    with pytest.raises(UserError, match="--max-new-tokens 12: the model has 16 positions for a prompt of 5 tokens"):
        check_prompts(options, config, [[5, 6, 7, 8, 9]])
    with pytest.raises(UserError, match="the tokenizer gives id 384, the model has 384 embeddings"):
        check_prompts(options, config, [[384]])
