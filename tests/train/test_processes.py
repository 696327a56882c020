"""Several processes train what one trains: the same curve, the same parameters, whatever the mesh."""

import json
import re
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dpojax.models import Model, init_params, load_tokenizer, save_model
from dpojax.models.params import flatten
from dpojax.train.by_name import load_run
from tests.conftest import HF_CONFIG, decoder_config, sentence, write_rows
from tests.several import finish, spawn

STEPS = 6
# Processes, devices of each, and the mesh of all of them.
PLACES = {
    "one device": (1, 1, {"data": 1}),
    "2 x 4": (2, 4, {"data": 2, "fsdp": 2, "tensor": 2}),
    "4 x 2": (4, 2, {"data": 1, "fsdp": 2, "tensor": 4}),  # tensor over processes: two hold the same rows
}
# What a run reads of its reference, and the rows that it reads.
RUNS = {
    "pairs": {},
    "live": {"reference": "live"},
    "adapter off": {"lora-rank": 4, "lora-init": "a-zero", "reference": "live"},
    "several": {},
    "labels": {"loss": "kto"},
}


def rows_of(kind: str, rng: np.random.Generator) -> list[dict]:
    said = lambda: " " + sentence(rng, 1, 5)  # noqa: E731
    if kind == "labels":
        return [{"prompt": sentence(rng, 1, 6), "completion": said(), "label": bool(i % 2)} for i in range(48)]
    if kind == "several":
        return [
            {"prompt": sentence(rng, 1, 6), "completions": [said(), said() + " a", said() + " b"], "scores": [3, 2, 1]}
            for _ in range(48)
        ]
    return [{"prompt": sentence(rng, 1, 6), "chosen": said() + " good", "rejected": said()} for _ in range(48)]


def as_flags(options: dict) -> list[str]:
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def curve(run: Path) -> list[dict]:
    rates = ("pairs_per_second", "tokens_per_second", "padding_share")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in rates} for line in lines]


def run_everywhere(root: Path, tiny_dir: str) -> None:
    """A run of every kind at every place, and what the processes said."""
    raw = HF_CONFIG | {"num_key_value_heads": 4}  # as many as the widest tensor axis
    shape = decoder_config(raw)
    drawn = init_params(shape, seed=0)
    save_model(Model(shape, jax.tree.map(lambda x: x if (x == 1).all() else 10 * x, drawn), raw), root / "model")
    load_tokenizer(tiny_dir).save_pretrained(root / "model")
    rng = np.random.default_rng(0)
    files = {kind: write_rows(root / f"{kind}.jsonl", rows_of(kind, rng)) for kind in ("pairs", "several", "labels")}
    for place, (number, devices, mesh) in PLACES.items():
        commands = []
        for name, flags in RUNS.items():
            file = files.get(name, files["pairs"])
            common = {"model": root / "model", "data": file, "batch-size": 8, "max-shapes": 1}
            run = {"eval-share": 0.2, "steps": STEPS, "warmup-steps": 2, "eval-steps": 3, "optim": "adamw"}
            run |= {"learning-rate": 1e-3, "output": root / place / name}
            mesh_flags = {f"mesh.{axis}": n for axis, n in mesh.items()}
            commands.append(["dpo", *as_flags(common | run | mesh_flags | flags)])
        commands += [
            ["logps", *as_flags(common | {"data": files["pairs"], "output": root / place / "logps.jsonl"})],
            ["eval", *as_flags({"model": root / place / "pairs", "data": files["pairs"]})],
        ]
        (root / place).mkdir()
        (root / place / "commands.json").write_text(json.dumps(commands))
        ended = finish(spawn(number, devices, ["-m", "tests.several", str(root / place / "commands.json")]))
        for i, (status, said) in enumerate(ended):
            (root / place / f"said-{i}").write_text(said)
            assert status == 0, said


def test_the_same_run_everywhere(tiny_dir, tmp_path):
    """One test, so that one of the suite's workers runs it all."""
    run_everywhere(tmp_path, tiny_dir)
    for place in PLACES:
        if place != "one device":
            check_figures(tmp_path, place)
            for name in RUNS:
                check_run(tmp_path, place, name)
        # The first process alone speaks.
        first, *others = [path.read_text() for path in sorted((tmp_path / place).glob("said-*"))]
        assert "Training" in first
        for text in others:
            assert not re.search("Tokenizing|Loading|Training|Evaluating|rows|loss", text)  # but Gloo's own lines


def check_run(tried: Path, place: str, name: str) -> None:
    """Its curve and its parameters are those of one device."""
    ours, alone = curve(tried / place / name), curve(tried / "one device" / name)
    assert [line["step"] for line in ours] == [line["step"] for line in alone]
    assert len({line["loss"] for line in ours if "loss" in line}) > 3  # it does learn
    for mine, theirs in zip(ours, alone, strict=True):
        assert mine.keys() == theirs.keys()
        for figure in [figure for figure in mine if figure.endswith("loss")]:
            assert mine[figure] == pytest.approx(theirs[figure], abs=1e-5), figure
    mine, theirs = (flatten(load_run(str(tried / p / name), "latest")[0].params) for p in (place, "one device"))
    for path, x in theirs.items():
        np.testing.assert_allclose(mine[path], x, atol=1e-5, err_msg=path)


def check_figures(tried: Path, place: str) -> None:
    """Log-probabilities and held-out figures are of all rows."""
    ours, alone = ((tried / p / "logps.jsonl").read_text().splitlines() for p in (place, "one device"))
    assert len(ours) == len(alone) == 48
    for mine, theirs in zip(map(json.loads, ours), map(json.loads, alone), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    figures = [
        re.findall(r"^((?:logps|rewards)/\S+) +(\S+)", (tried / p / "said-0").read_text(), re.MULTILINE)
        for p in (place, "one device")
    ]
    assert len(figures[0]) > 3 and dict(figures[0]).keys() == dict(figures[1]).keys()
    for name, figure in figures[0]:
        assert float(figure) == pytest.approx(float(dict(figures[1])[name]), abs=2e-3), name


def options(tiny_dir: str, data: str, output: Path, **changed: object) -> list[str]:
    flags = {"model": tiny_dir, "data": data, "output": output, "batch-size": 8, "max-shapes": 1, "steps": 400}
    flags |= {"learning-rate": 1e-3, "warmup-steps": 3, "save-steps": 10, "mesh.data": 4} | changed
    return ["-m", "dpojax", "dpo", *as_flags(flags)]


def when_at(run: Path, step: int, processes: list) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        file = run / "metrics.jsonl"
        if (run / "checkpoints" / "10").exists() and len(file.read_text().splitlines()) > step:
            return
        time.sleep(0.01)
    raise AssertionError(finish(processes, 1))


def test_a_stopped_run_stops_as_a_whole_and_continues(tiny_dir, pairs_file, tmp_path):
    unbroken = tmp_path / "unbroken"
    for status, said in finish(spawn(2, 2, options(tiny_dir, pairs_file, unbroken, steps=60))):
        assert status == 0, said
    stop_and_continue(tiny_dir, pairs_file, tmp_path / "terminated", unbroken, signal.SIGTERM, which=1)
    stop_and_continue(tiny_dir, pairs_file, tmp_path / "killed", unbroken, signal.SIGKILL, which=0)


def stop_and_continue(tiny_dir, pairs_file, run: Path, unbroken: Path, number: signal.Signals, which: int) -> None:
    command = options(tiny_dir, pairs_file, run, steps=60)
    processes = spawn(2, 2, command)
    when_at(run, 15, processes)
    processes[which].send_signal(number)
    began = time.monotonic()
    ended = finish(processes, 60)
    assert time.monotonic() - began < 60
    if number == signal.SIGTERM:
        assert [status for status, _ in ended] == [130, 130], ended
        assert "asked to stop" in ended[0][1] and "the same command continues it" in ended[0][1]
    else:
        status, said = ended[1 - which]
        assert status == 1 and said.rstrip().splitlines()[-1].startswith(f"dpojax: process {1 - which} of 2: "), said
        assert "Traceback" not in said
    for status, said in finish(spawn(2, 2, command)):
        assert status == 0, said
    assert curve(run) == curve(unbroken)


def test_an_error_of_one_process_is_the_others_end(tiny_dir, pairs_file, tmp_path):
    good = options(tiny_dir, pairs_file, tmp_path / "run")
    bad = [x if x != pairs_file else str(tmp_path / "none.jsonl") for x in good]
    script = "import os, sys; from dpojax.cli import main; i = int(os.environ['JAX_PROCESS_ID']); "
    script += f"sys.exit(main(({good!r}, {bad!r})[i][2:]))"
    (first, said_first), (second, said_second) = finish(spawn(2, 2, ["-c", script]), 90)
    assert second == 2 and "process 1: " in said_second and "none.jsonl" in said_second
    assert first == 1 and "none.jsonl" in said_first.splitlines()[-1] and "Traceback" not in said_first


def test_an_error_of_all_is_said_once(tiny_dir, tmp_path):
    command = options(tiny_dir, str(tmp_path / "none.jsonl"), tmp_path / "run")
    (first, said_first), (second, said_second) = finish(spawn(2, 2, command), 90)
    assert (first, second) == (2, 2)
    assert said_first.count("none.jsonl") == 1 and "none.jsonl" not in said_second


def test_commands_of_one_process_refuse_several(tiny_dir, tmp_path):
    for command in (["sample", "--model", tiny_dir, "--prompt", "a"], ["export", "--run", "a", "--output", "b"]):
        (status, said), _ = finish(spawn(2, 1, ["-m", "dpojax", *command]), 90)
        assert status == 2 and f"{command[0]}: runs in one process" in said, said
