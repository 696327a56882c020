"""`--config run.json`: a run is repeated by the file that it left."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest

from dpojax.cli import main
from dpojax.configs import DPOConfig, MeshConfig, SFTConfig
from dpojax.errors import UserError
from dpojax.runfile import options_of_file
from dpojax.train.rundir import claim_directory, flat_options
from tests.conftest import on_devices

RATES = ("pairs_per_second", "tokens_per_second")


def curve(run) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in RATES} for line in lines]


def refused(capsys, *args) -> str:
    assert main([str(arg) for arg in args]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dpojax: ") and said.count("\n") == 1, said
    return said


@pytest.fixture(scope="module")
def first(tiny_dir, pairs_file, tmp_path_factory):
    """A run of files that are named relative to its working directory."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_dir, root / "tiny")
    shutil.copy(pairs_file, root / "pairs.jsonl")
    flags = ["--batch-size", "8", "--steps", "3", "--warmup-steps", "0", "--learning-rate", "0.01", "--seed", "3"]
    flags += ["--lora-rank", "2", "--lora-dropout", "0.2", "--filter", "prompt!=x", "--report-to", "none"]
    with pytest.MonkeyPatch.context() as patch:
        on_devices(patch, 1)
        patch.chdir(root)
        assert main(["dpo", "--model", "tiny", "--data", "pairs.jsonl", "--output", "first", *flags]) == 0
    return root / "first"


def test_a_run_repeated_has_the_same_numbers(first, monkeypatch, capsys):
    on_devices(monkeypatch, 1)
    monkeypatch.chdir(first.parent)
    assert main(["dpo", "--config", "first/run.json", "--output", "second"]) == 0
    assert curve(first.parent / "second") == curve(first) and len(curve(first)) == 3
    files = [json.loads((first.parent / name / "run.json").read_text()) for name in ("first", "second")]
    assert files[0].pop("sessions")[0]["name"] == "first" and files[1].pop("sessions")[0]["name"] == "second"
    assert files[0] == files[1]

    capsys.readouterr()
    assert main(["dpo", "--output=first", "--config=first"]) == 0
    assert "this run is complete" in capsys.readouterr().out
    assert main(["dpo", "--config", "first/run.json", "--output", "third", "--beta", "0.5", "--seed", "4"]) == 0
    third = json.loads((first.parent / "third" / "run.json").read_text())
    assert {name for name in files[1] if files[1][name] != third[name]} == {"beta", "seed"}
    assert curve(first.parent / "third") != curve(first)


def test_names_that_hold_elsewhere_are_refused(first, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, "dpo", "--config", first, "--output", "second")
    assert "--model tiny" in said and str(first.parent) in said and not (tmp_path / "second").exists()
    said = refused(capsys, "dpo", "--config", first, "--output", "second", "--model", first.parent / "tiny")
    assert "--data pairs.jsonl" in said


CHANGED = {
    "mesh": MeshConfig(data=2, fsdp=-1),
    "learning_rate": 1,
    "tokenizer": "t",
    "steps": 7,
    "use_rslora": True,
    "filter": ("a>1", "b==c"),
    "report_to": ("tensorboard", "wandb"),
    "run_name": "mine",
}


@pytest.mark.parametrize("kind", [DPOConfig, SFTConfig])
@pytest.mark.parametrize("changed", [{}, CHANGED])
def test_every_option_comes_back(kind, changed, tmp_path):
    config = kind(model="m", data=("a", "b=2"), output="o", **changed)
    (tmp_path / "run.json").write_text(json.dumps(flat_options(dataclasses.asdict(config))))
    read = options_of_file(kind, str(tmp_path))
    assert dataclasses.replace(read, output="o") == config


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"command": "SFTConfig"}, ["is a run of sft", "this is dpo"]),
        ({"bta": 0.3, "bt": 1}, ["'bta', 'bt'", "no option"]),
        ({"mesh": {"fsdp": 2}}, ["'mesh'", "no option"]),
        ({"beta": "0.3"}, ['beta is "0.3"', "a number or null"]),
        ({"batch_size": 8.5}, ["batch_size is 8.5", "a whole number"]),
        ({"steps": True}, ["steps is true", "a whole number or null"]),
        ({"skip_bad_rows": 1}, ["skip_bad_rows is 1", "true or false"]),
        ({"data": "a.jsonl"}, ['data is "a.jsonl"', "a list"]),
        ({"remat": "all"}, ['remat is "all"', '"none" or "mlp"']),
        ({"mesh.fsdp": None}, ["mesh.fsdp is null", "a whole number"]),
        ({"beta": -1}, ["--beta -1", "above 0"]),
        ({"run_format": 2, "format": 2}, ["another version"]),
        ("[1]", ["not a JSON object"]),
        ("{", ["not valid JSON"]),
        (None, ["no such file"]),
    ],
)
def test_files_that_are_refused(content, parts, tmp_path, capsys):
    if content is not None:
        (tmp_path / "a.json").write_text(content if isinstance(content, str) else json.dumps(content))
    given = ("--model", "m", "--data", "d", "--output", tmp_path / "out")
    said = refused(capsys, "dpo", "--config", tmp_path / "a.json", *given)
    assert all(part in said for part in parts), said


def test_what_neither_gives_is_asked_for(first, capsys):
    with pytest.raises(SystemExit):
        main(["dpo", "--config", str(first)])
    assert "--output" in capsys.readouterr().err


def test_the_date_is_repeated(tmp_path):
    """A date that the chat template wrote stays; given by hand or by the run, it is the same run."""
    config = DPOConfig(model="m", data=("d",), output=str(tmp_path / "run"))
    claim_directory(config, {"today": "2030-01-01"})
    again = options_of_file(DPOConfig, config.output)
    assert again.chat_date == "2030-01-01"
    again = dataclasses.replace(again, output=config.output)
    claim_directory(again, {"today": "2030-01-01"})
    with pytest.raises(UserError, match="today"):
        claim_directory(dataclasses.replace(again, chat_date="2030-01-02"), {"today": "2030-01-02"})


def test_who_reads_the_help_may_stop():
    """A pipe that closes is no error."""
    command = f"set -o pipefail; {sys.executable} -m dpojax dpo --help | head -1"
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ)
    assert process.stderr == "" and process.returncode == 0 and "usage: dpojax dpo" in process.stdout
