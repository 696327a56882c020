"""Every experiment at its tiny preset, by its own command line, with fewer samples and steps."""

import dataclasses
import importlib
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from dpojax.errors import UserError
from experiments.claims import claimed, made_once
from experiments.sweep import config_of, main

SWEEPS = {
    "frontier": ("dpo-beta1", "dpo-beta5", "true-beta1", "learned-beta1", "alpha0.5", "preferred"),
    "gradient_weight": (),
    "beta": ("beta0.5", "beta2-"),
    "families": ("DPO-beta1", "DPO-beta2"),
    "label_noise": ("DPO-noise0-", "DPO-noise0.2", "robust-noise0.2"),
    "length": ("length-normalised",),
    "on_policy": ("beta1-",),
    "reference_choice": ("beta1-",),
    "shortfall": ("DPO-", "width"),
    "likelihood": ("DPO-",),
    "reward_accuracy": ("pairs100", "pairs400"),
    "best_of_n": (),
}
"""Points that are trained, of many that differ in a number or a loss alone: compiling takes nearly all the time."""
SMALL = {
    "width": 16,
    "prompts": 8,
    "tune": 8,
    "held-out": 8,
    "samples": 8,
    "eval-samples": 1,
    "frontier-samples": 16,
    "side-by-side": 64,
    "sft-rows": 64,
    "sft-steps": 2,
    "batch-size": 8,
    "steps": 2,
    "sft-like-steps": 1,
    "rl-steps": 1,
    "ppo-steps": 1,
    "rl-samples": 2,
    "reward-steps": 1,
    "evaluations": 1,
}


def arguments(output: Path, world: Path, **more: object) -> list[str]:
    pairs = {**{f"setting.{name}": value for name, value in SMALL.items()}, **more}
    return ["--output", str(output), "--world", str(world), *(str(x) for k, v in pairs.items() for x in (f"--{k}", v))]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("world")


@pytest.mark.parametrize("name", SWEEPS)
def test_the_tiny_preset(name, world, tmp_path):
    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    own = world / "24" if name == "length" else world / "12"
    only = ["--only", *SWEEPS[name]] if SWEEPS[name] else []
    assert main(experiment, [*arguments(tmp_path, own), "--seeds", "0", *only]) == 0
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["experiment"] == name and results["preset"] == "tiny"
    points = [json.loads(path.read_text()) for path in (tmp_path / "points").glob("*.json")]
    assert {p["name"] for p in points} >= {f"{point}-seed0" for point in results.get("points", {})}
    for point in points:
        assert all(math.isfinite(x["mean"]) for at in point["curve"] for k, x in at.items() if k != "step")


def test_a_sweep_is_repeated_from_its_config(world, tmp_path):
    """The same numbers, from config.json and nothing else, in another directory with a world of its own."""
    experiment = importlib.import_module("experiments.gradient_weight").EXPERIMENT
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(experiment, [*arguments(first, tmp_path / "world"), "--seeds", "3", "--only", "sigmoid"]) == 0
    again = ["--config", str(first / "config.json"), "--output", str(second), "--world", str(tmp_path / "another")]
    assert main(experiment, again) == 0
    one, other = (json.loads((d / "points" / "sigmoid-seed3.json").read_text()) for d in (first, second))
    assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    config = json.loads((second / "config.json").read_text())
    assert config["seeds"] == [3] and config["setting"]["width"] == SMALL["width"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "huge"], "--preset huge: must be one of tiny, small, paper"),
        (["--processes", "0"], "--processes 0: must be at least one"),
        (["--only", "nothing"], "--only nothing: is in no point's name"),
        (["--config", "missing.json"], "--config missing.json: cannot be read"),
        (["--plan", "v5e:2x4"], "--plan: plans a model that has a name"),
        (["--setting.scorer", "missing.py:score"], "--setting.scorer missing.py: no such file"),
        (["--setting.scorer", "Vader"], "--setting.scorer Vader: is no path/to/file.py:name"),
        (["--setting.steps", "0"], "--setting.steps 0: must be at least 1"),
        (["--setting.scale", "-1"], "--setting.scale -1.0: must be above 0"),
        (["--setting.samples", "6"], "--setting.samples 6: must be a multiple of --setting.group 4"),
        (["--config", "a.json", "--preset", "tiny"], "--preset tiny: --config says it"),
        (["--setting.prompts", "9", "--setting.held-out", "9999"], "ask for fewer"),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(importlib.import_module("experiments.frontier").EXPERIMENT, arguments) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"setting": {"steps": "ten"}}, 'setting.steps is "ten", and must be a whole number'),
        ({"setting": {"stepz": 3}}, "'setting.stepz' is no option of this command"),
        ({"setting": 3}, "setting is 3, and must be an object"),
        ({"mesh": {"data": 2.5}}, "setting.mesh.data is 2.5, and must be"),
        ({"seeds": 0}, "seeds is 0, and must be a list, each a whole number"),
        ({"preset": "huge"}, "preset huge: must be one of tiny, small, paper"),
        ({"experiment": "beta"}, "is not of experiments.frontier"),
        ([], "is no experiment's config.json"),
    ],
)
def test_a_config_is_checked_by_field(fields, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.json").write_text(json.dumps({"experiment": "frontier", **fields} if fields else fields))
    assert main(importlib.import_module("experiments.frontier").EXPERIMENT, ["--config", "c.json"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--config c.json" in error and says in error


def test_what_a_config_does_not_give_is_the_preset_s(tmp_path):
    experiment, file = importlib.import_module("experiments.length").EXPERIMENT, tmp_path / "c.json"
    file.write_text(json.dumps({"experiment": "length", "preset": "small", "setting": {"steps": 7}}))
    asked = config_of(experiment, ["--preset", "small", "--setting.steps", "7"])
    assert config_of(experiment, ["--config", str(file)]) == asked


def test_another_sweep_in_the_directory_is_refused(world, tmp_path, capsys):
    experiment = importlib.import_module("experiments.best_of_n").EXPERIMENT
    assert main(experiment, arguments(tmp_path, world / "12")) == 0
    assert main(experiment, [*arguments(tmp_path, world / "12"), "--setting.steps", "7"]) == 2
    assert "holds a sweep with another steps (2 there, 7 here)" in capsys.readouterr().err
    assert main(experiment, [*arguments(tmp_path / "b", world / "12"), "--setting.held-out", "4"]) == 2
    assert "was made with another held_out (8 there, 4 here)" in capsys.readouterr().err


def test_work_is_claimed_once_and_taken_over(tmp_path, monkeypatch):
    with claimed(tmp_path / "a") as first, claimed(tmp_path / "a") as second:
        assert first and not second
    with claimed(tmp_path / "a") as again:
        assert again
    (tmp_path / "b.claim").touch()  # of a process that died
    with claimed(tmp_path / "b") as mine:
        assert not mine
    monkeypatch.setattr("experiments.claims.DEAD", -1)
    with claimed(tmp_path / "b") as mine:
        assert mine
    made = []
    for _ in range(2):
        made_once(tmp_path / "c", lambda path: made.append((path / "x").write_text("1")))
    assert len(made) == 1 and (tmp_path / "c" / "x").exists()


def test_a_dead_claim_is_taken_over_by_one_of_many(tmp_path, monkeypatch):
    """Of two that find it, the second finds the first one's claim in its place, and leaves that there."""
    claim = tmp_path / "a.claim"
    claim.write_text("the first one's")
    times = iter([time.time() + 1e6])  # that it was dead is what the second saw before
    monkeypatch.setattr("experiments.claims.time.time", lambda now=time.time: next(times, None) or now())
    with claimed(tmp_path / "a") as mine:
        assert not mine
    assert [file.name for file in tmp_path.iterdir()] == ["a.claim"] and claim.read_text() == "the first one's"


def test_piqas_questions_are_held_out_whole(tmp_path):
    from experiments.piqa import held_out_rows

    asked = ["a", "b", "a", "c", "d", "e", "a", "f", "f"]
    lines = [json.dumps({("goal" if n % 2 else "question"): q, "n": n}) + "\n" for n, q in enumerate(asked)]
    (tmp_path / "rows.jsonl").write_text("".join(lines) + "no row\n")
    train, held_out = (Path(f).read_text() for f in held_out_rows(str(tmp_path / "rows.jsonl"), tmp_path / "data"))
    assert held_out == "".join(lines[i] for i in (0, 2, 6, 7, 8))
    assert train == "".join(lines[i] for i in (1, 3, 4, 5)) + "no row\n"


def test_piqa(tmp_path):
    """Its figures, its options again from its config.json, and a report of it and its runs."""
    from dpojax.report.read import read_all
    from experiments.common import command_line
    from experiments.piqa import PiqaConfig
    from experiments.piqa import main as piqa

    words = {"goal": "how to do {}", "sol1": "like {}", "sol2": "never mind {}"}
    rows = [{k: v.format(n) for k, v in words.items()} | {"label": n % 2} for n in range(30)]
    data = tmp_path / "piqa.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PiqaConfig(preset="tiny", data=str(data), output=str(tmp_path / "out"), steps=2, losses=("sigmoid",))
    assert piqa(config) == 0
    figures = json.loads((tmp_path / "out" / "results.json").read_text())["figures"]
    assert (
        figures["before"]["rewards/accuracies"]["mean"] == 0.5
        and figures["before"]["rewards/accuracies"]["prompts"] == 6
    )
    assert figures["sigmoid-seed0"].keys() == figures["before"].keys()
    assert np.isfinite([x["mean"] for x in figures["sigmoid-seed0"].values()]).all()
    again = ["--config", str(tmp_path / "out" / "config.json"), "--seeds", "7"]
    assert command_line("piqa", PiqaConfig, "", again) == dataclasses.replace(config, seeds=(7,))
    runs, experiments = read_all([str(tmp_path / "out")])
    assert [run.name for run in runs] == ["sigmoid-seed0"] and [one.name for one in experiments] == ["out"]
    with pytest.raises(UserError, match=r"steps is \[\], and must be a whole number"):
        (tmp_path / "bad.json").write_text('{"experiment": "piqa", "steps": []}')
        command_line("piqa", PiqaConfig, "", ["--config", str(tmp_path / "bad.json")])


def test_the_paper_preset_on_stand_ins(tiny_dir, tmp_path, monkeypatch):
    """Beginnings of reviews, a model by name, the paper's classifier by torch, labels by the greater reward."""
    torch = pytest.importorskip("torch")
    from transformers import ByT5Tokenizer, RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    shape = {"vocab_size": 384, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"intermediate_size": 16, "max_position_embeddings": 514, "pad_token_id": 0}
    RobertaForSequenceClassification(RobertaConfig(**shape)).save_pretrained(tmp_path / "classifier")
    ByT5Tokenizer().save_pretrained(tmp_path / "classifier")
    monkeypatch.setenv("SENTIMENT_MODEL", str(tmp_path / "classifier"))
    rows = tmp_path / "reviews.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": f"{chr(97 + n)} film number {n}", "label": 0}) + "\n" for n in range(26))
    )
    experiment = importlib.import_module("experiments.frontier").EXPERIMENT
    own = {"setting.model": tiny_dir, "setting.reviews": rows, "setting.new-tokens": 4, "setting.dtype": "float32"}
    sizes = arguments(tmp_path / "out", tmp_path / "world", **own)
    assert main(experiment, ["--preset", "paper", *sizes, "--seeds", "0", "--only", "dpo-beta1-"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["preset"] == "paper" and set(results["points"]) == {"dpo-beta1"}
    assert 0 < results["reference reward"] < 1
