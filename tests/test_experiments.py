"""Every experiment at its tiny preset, by its own command line, with fewer samples and steps."""

import importlib
import json
import math
from pathlib import Path

import pytest

from experiments.sweep import main

SWEEPS = {
    "frontier": ("dpo-beta1", "dpo-beta5", "true-beta1", "learned-beta1", "alpha0.5", "preferred"),
    "gradient_weight": (),
    "beta": ("beta0.5", "beta2-"),
    "families": ("DPO-", "hinge-"),
    "label_noise": ("DPO-noise0-", "DPO-noise0.2", "robust-noise0.2"),
    "length": ("DPO-beta0.3", "length-normalised"),
    "on_policy": ("beta1-",),
    "reference_choice": ("beta1-",),
    "shortfall": ("DPO-", "width", "rounds"),
    "likelihood": ("DPO-", "IPO-"),
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
