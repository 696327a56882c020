"""Stopping and continuing: SIGKILL, SIGTERM, another run's directory, a full disk."""

import datetime
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpojax.cli import main
from dpojax.models import load_tokenizer
from dpojax.train import inputs, loop
from dpojax.train.by_name import load_run
from dpojax.train.loop import run_steps
from tests.conftest import write_rows

RATES = ("pairs_per_second", "tokens_per_second")


def options(tiny_dir, pairs_file, output, **changed) -> list[str]:
    flags = {
        "model": tiny_dir,
        "data": pairs_file,
        "eval-data": pairs_file,
        "output": output,
        "batch-size": 8,
        "steps": 60,
        "learning-rate": 1e-3,
        "warmup-steps": 3,
        "save-steps": 10,
        "eval-steps": 40,
        "logging-steps": 1,
        "max-shapes": 2,
    } | {name.replace("_", "-"): value for name, value in changed.items()}
    return ["dpo", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]


def start(args: list[str], before: str = "") -> subprocess.Popen:
    """The command in a process of its own, on one device, behind other shell commands."""
    shell = ["bash", "-c", f'{before} exec "$@"', "bash", sys.executable, "-m", "dpojax", *args]
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finish(process: subprocess.Popen) -> str:
    """What a process that must succeed says."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "checkpoints" / str(step)).exists() and len((run / "metrics.jsonl").read_text().splitlines()) > step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError("the run never got there")


def curve(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in RATES} for line in lines]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_and_continued_is_never_stopped(tiny_dir, pairs_file, tmp_path, number):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(options(tiny_dir, pairs_file, whole)))

    process = start(options(tiny_dir, pairs_file, broken))
    wait_for_step(process, broken, 10)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130), errors
    if number == signal.SIGTERM:
        assert "the same command continues it" in output

    assert "continuing from step" in finish(start(options(tiny_dir, pairs_file, broken)))
    assert curve(broken) == curve(whole)
    assert (load_run(broken)[0].params["embed"] == load_run(whole)[0].params["embed"]).all()

    # And once more: a complete run is left as it is.
    before = (broken / "metrics.jsonl").read_text()
    finish(start(options(tiny_dir, pairs_file, broken)))
    assert (broken / "metrics.jsonl").read_text() == before


def test_another_runs_directory_is_refused(tiny_dir, pairs_file, tmp_path, capsys):
    assert main(options(tiny_dir, pairs_file, tmp_path / "run", steps=2)) == 0
    capsys.readouterr()
    assert main(options(tiny_dir, pairs_file, tmp_path / "run", steps=2, beta=0.5, seed=3)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "beta (None there, 0.5 here)" in said and "seed (0 there, 3 here)" in said and "steps" not in said

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    assert main(options(tiny_dir, pairs_file, tmp_path / "other")) == 2
    assert "is no run of dpojax" in capsys.readouterr().err


def test_a_run_of_an_earlier_format_is_read_but_not_continued(tiny_dir, pairs_file, tmp_path, capsys):
    run = tmp_path / "run"
    args = options(tiny_dir, pairs_file, run, steps=2, train_top_layers=1)
    assert main(args) == 0
    known = json.loads((run / "run.json").read_text())
    assert known.pop("run_format") == 3
    known["format"] = 2
    known["freeze"] = known.pop("train_top_layers")
    (run / "run.json").write_text(json.dumps(known))
    capsys.readouterr()
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be continued" in error and "another directory" in error
    assert all(command in error for command in ("eval", "sample", "export"))
    assert main(["export", "--run", str(run), "--output", str(tmp_path / "out")]) == 0
    assert main(["eval", "--model", str(run), "--data", pairs_file]) == 0


def test_changed_data_under_the_same_name_is_another_run(tiny_dir, pairs_file, tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    data.write_text(Path(pairs_file).read_text())
    assert main(options(tiny_dir, data, tmp_path / "run", steps=2)) == 0
    data.write_text("\n".join(Path(pairs_file).read_text().splitlines()[1:]))
    assert main(options(tiny_dir, data, tmp_path / "run", steps=2)) == 2
    assert "data_hash" in capsys.readouterr().err


def test_a_run_goes_on_with_the_date_that_it_began_with(tiny_dir, tmp_path, monkeypatch):
    """A chat template that writes the date does not make another run of it on the next day."""
    model = tmp_path / "model"
    shutil.copytree(tiny_dir, model)
    tokenizer = load_tokenizer(str(model))
    tokenizer.chat_template = "{{ strftime_now('%d %b') }} " + tokenizer.chat_template
    tokenizer.save_pretrained(model)
    chat = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Hello", "rejected": "Go away"}
    data = write_rows(tmp_path / "chats.jsonl", [chat] * 16)
    args = options(model, data, tmp_path / "run", steps=2, save_steps=1)
    days, prompts, load = [datetime.date(2030, 1, 1), datetime.date(2030, 1, 2)], [], inputs.load_examples

    class Today(datetime.date):
        @classmethod
        def today(cls):
            return days[0]

    def loading(*positional, **named):
        examples, report = load(*positional, **named)
        prompts.append(tokenizer.decode(examples[0].prompt))
        return examples, report

    monkeypatch.setattr(inputs.datetime, "date", Today)
    monkeypatch.setattr(inputs, "load_examples", loading)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "run_steps", lambda *a: itertools.islice(run_steps(*a), 1))
        assert main(args) == 130
    days.pop(0)
    assert main(args) == 0
    assert set(prompts) == {"01 Jan [user] Hi\n[assistant] "}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["today"] == "2030-01-01"


def test_full_disk_leaves_the_last_checkpoint(tiny_dir, pairs_file, tmp_path):
    run = tmp_path / "run"
    process = start(options(tiny_dir, pairs_file, run))
    wait_for_step(process, run, 10)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    good = load_run(run)[1]

    # No file may grow beyond 45 KiB: to the writer of a checkpoint, that is a disk without room.
    process = start(options(tiny_dir, pairs_file, run), before="ulimit -f 45;")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2, errors
    said = errors.strip().splitlines()[-1]
    assert "could not be written (the disk is full)" in said and f"continues from step {good}" in said
    assert "Traceback" not in errors
    assert load_run(run)[1] == good


def test_latest_and_best_are_kept_over_a_resume(tiny_dir, pairs_file, tmp_path):
    """With the labels of the held-out pairs turned round, the earliest checkpoint is the best."""
    turned = tmp_path / "turned.jsonl"
    rows = [json.loads(line) for line in Path(pairs_file).read_text().splitlines()]
    swapped = [{"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    write_rows(turned, swapped)
    run = tmp_path / "run"
    args = options(tiny_dir, pairs_file, run, eval_data=turned, eval_steps=10, save_total_limit=1)
    process = start(args)
    wait_for_step(process, run, 20)
    process.kill()
    process.communicate()
    assert main(args) == 0
    losses = {line["step"]: line["eval_loss"] for line in curve(run) if "eval_loss" in line and line["step"]}
    assert min(losses, key=lambda step: losses[step]) == 10
    assert {int(path.name) for path in (run / "checkpoints").iterdir()} == {10, 60}
    assert load_run(run, "best")[1] == load_run(run, "10")[1] == 10
    assert load_run(run)[1] == 60


def test_a_reader_does_not_disturb_the_run(tiny_dir, pairs_file, tmp_path):
    run = tmp_path / "run"
    process = start(options(tiny_dir, pairs_file, run, save_steps=5))
    wait_for_step(process, run, 5)
    while process.poll() is None:
        assert load_run(run)[1] >= 5
    output = process.communicate()
    assert process.returncode == 0, output


def test_a_damaged_checkpoint_is_named(tiny_dir, pairs_file, tmp_path, capsys):
    run = tmp_path / "run"
    args = options(tiny_dir, pairs_file, run, steps=4, save_steps=2)
    assert main(args) == 0
    shutil.rmtree(run / "checkpoints" / "4")
    largest = max((run / "checkpoints" / "2").rglob("*"), key=lambda path: path.stat().st_size)
    for path in (run / "checkpoints" / "2").rglob(f"{largest.parent.name}/*"):
        path.write_bytes(b"")
    capsys.readouterr()
    assert main(args) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "damaged checkpoint" in said and str(run / "checkpoints" / "2") in said


def test_divergence_is_said(tiny_dir, pairs_file, tmp_path, capsys):
    args = options(tiny_dir, pairs_file, tmp_path / "run", steps=9, learning_rate=1e30, warmup_steps=0)
    assert main(args) == 2
    assert "the loss is nan; try a lower --learning-rate" in capsys.readouterr().err


def test_step_zero_reads_a_tie(tiny_dir, pairs_file, tmp_path):
    run = tmp_path / "run"
    assert main(options(tiny_dir, pairs_file, run, steps=2)) == 0
    zero, one = curve(run)[:2]
    assert (zero["step"], zero["eval_rewards/accuracies"], zero["eval_rewards/margins"]) == (0, 0.5, 0.0)
    assert zero["eval_loss"] == pytest.approx(0.69314718, abs=1e-8)
    # The step's program is another than the reference's, so the margin may be rounding; the accuracy is a tie.
    assert (one["step"], one["rewards/accuracies"]) == (1, 0.5)
    assert (one["rewards/margins"], one["loss"]) == pytest.approx((0, 0.69314718), abs=1e-6)


def test_cached_reference_is_the_live_one(tiny_dir, pairs_file, tmp_path):
    for kind in ("cached", "live"):
        assert main(options(tiny_dir, pairs_file, tmp_path / kind, steps=9, reference=kind)) == 0
    for cached, live in zip(curve(tmp_path / "cached"), curve(tmp_path / "live"), strict=True):
        assert cached == pytest.approx(live, rel=1e-5, abs=1e-5)
