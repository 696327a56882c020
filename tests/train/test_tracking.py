"""Where a run's figures go, and what run.json says of the sessions that made them."""

import importlib.util
import itertools
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from dpojax.cli import main
from dpojax.train import loop, session
from dpojax.train.loop import run_steps
from dpojax.train.session import commit_of, session_of
from dpojax.train.writers import WandB, writers_of
from tests.conftest import on_devices

COMMIT = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    on_devices(monkeypatch, 1)


def dpo(tiny_dir, pairs_file, output, *flags, steps: int | None = None) -> int:
    """The status of a run of 4 steps; killed after some of them."""
    args = ["--model", tiny_dir, "--data", pairs_file, "--output", str(output), "--batch-size", "8", "--steps", "4"]
    with pytest.MonkeyPatch.context() as patch:
        if steps is not None:
            patch.setattr(loop, "run_steps", lambda *a: itertools.islice(run_steps(*a), steps))
        return main(["dpo", *args, "--warmup-steps", "0", "--learning-rate", "0.01", "--save-steps", "2", *flags])


def lines_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def own_of(run) -> dict:
    return json.loads((run / "run.json").read_text())


def records(path):
    """What W&B's file of an offline run holds: records in LevelDB's log format, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + length > len(data):
            return
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            record, whole = wandb_internal_pb2.Record.FromString(whole), b""
            yield record.WhichOneof("record_type"), record


def finished(path) -> list:
    """The records of a run that has ended; W&B's own process writes the last of them a little later."""
    deadline = time.monotonic() + 60
    while not (found := list(records(path))) or "exit" not in dict(found):
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


def lines_in(found) -> Iterator[dict]:
    """The figures of W&B's records, in the form of metrics.jsonl."""
    for kind, record in found:
        if kind == "history":
            named = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            yield {"step": record.history.step.num} | {k: v for k, v in named.items() if not k.startswith("_")}


def test_offline_runs_of_wandb_have_every_figure(tiny_dir, pairs_file, tmp_path, monkeypatch, capsys):
    """A run that was stopped and continued is one run there, of two files."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    flags = ("--report-to", "wandb", "--run-name", "a name")
    assert dpo(tiny_dir, pairs_file, run, *flags, steps=2) == 130
    assert dpo(tiny_dir, pairs_file, run, *flags) == 0
    assert "W&B" not in capsys.readouterr().out and not (run / "tensorboard").exists()

    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    found = list(map(finished, files))
    runs = [next(r.run for kind, r in one if kind == "run") for one in found]
    own = own_of(run)
    ident = session_of(own)["wandb"]
    assert [(r.run_id, r.display_name, r.project) for r in runs] == [(ident, "a name", "mine")] * 2
    config = {u.key: json.loads(u.value_json) for u in runs[1].config.update if not u.key.startswith("_")}
    assert config == own

    assert [line for one in found for line in lines_in(one)] == lines_of(run) and len(lines_of(run)) == 4

    # A step's figures and those of its evaluation.
    (tmp_path / "other").mkdir()
    writer = WandB(tmp_path / "other", own)
    for step, figures in ((1, {"loss": 0.5}), (2, {"loss": 0.25}), (2, {"eval_loss": 0.125})):
        writer.write(step, figures)
    writer.close()
    (file,) = (tmp_path / "other").glob("wandb/offline-run-*/*.wandb")
    together = {"step": 2, "loss": 0.25, "eval_loss": 0.125}
    assert list(lines_in(finished(file))) == [{"step": 1, "loss": 0.5}, together]


class Tracker:
    """In place of the package: fails where it is told to."""

    Settings = staticmethod(lambda **named: None)
    __spec__ = SimpleNamespace(origin="here")

    def __init__(self, fails: str, step: int = 0):
        self.fails, self.step, self.seen = fails, step, []

    def init(self, **named):
        return self._do("init") or self

    def log(self, figures, step):
        self._do("log" if step == 2 else "")
        self.seen.append(step)

    def finish(self):
        self._do("finish")

    def _do(self, what: str):
        if what == self.fails:
            raise RuntimeError(f"{what} failed\nand more")


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_an_error_of_wandb_ends_no_run(tiny_dir, pairs_file, tmp_path, monkeypatch, capsys, fails):
    monkeypatch.setitem(sys.modules, "wandb", Tracker(fails))
    assert dpo(tiny_dir, pairs_file, tmp_path / "run", "--report-to", "wandb") == 0
    assert capsys.readouterr().out.count(f"W&B: {fails} failed; the run goes on without it\n") == 1
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2, 3, 4]


def test_steps_that_wandb_has_are_not_given_again(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", tracker := Tracker("nothing", step=3))
    own = {"sessions": [{"name": "a", "wandb": "b"}]}
    writers = writers_of(tmp_path, ("wandb",), own, resume=1)
    for step, writer in itertools.product((2, 3, 4), writers):
        writer.write(step, {"loss": 0.5})
    for writer in writers:
        writer.close()
    assert tracker.seen == [3, 4] and [line["step"] for line in lines_of(tmp_path)] == [2, 3, 4]


def test_trackers_that_are_refused(tiny_dir, pairs_file, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    for flags, parts in {
        ("wandb",): ["--report-to wandb", "pip install 'dpojax[wandb]'"],
        ("none", "tensorboard"): ["--report-to none tensorboard", "leave it or them out"],
        (): ["--report-to", "at least one tracker"],
    }.items():
        assert dpo(tiny_dir, pairs_file, tmp_path / "run", "--report-to", *flags) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and all(part in said for part in parts), said
        assert not (tmp_path / "run").exists()


def test_sessions_say_what_ran(tiny_dir, pairs_file, tmp_path, monkeypatch, capsys):
    """Another commit or version is said in one line, and stops nothing; nor does a run.json that says nothing of it."""
    run = tmp_path / "run"
    monkeypatch.setattr(session, "commit_of", lambda path: "a" * 40)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "dpojax", "dpo", "--filter", "a b"])
    assert dpo(tiny_dir, pairs_file, run, steps=2) == 130
    (first,) = own_of(run)["sessions"]
    assert first["name"] == "run" and first["command_line"] == "python -m dpojax dpo --filter 'a b'"
    assert (first["commit"], first["dirty"]) == ("a" * 40, False) and first["devices"] == "1 x cpu"
    assert set(first["versions"]) == {"dpojax", "python", *session.PACKAGES}

    monkeypatch.setattr(session, "commit_of", lambda path: "b" * 40 + "-dirty")
    monkeypatch.setattr(session, "versions", lambda: first["versions"] | {"jax": "9.9"})
    capsys.readouterr()
    assert dpo(tiny_dir, pairs_file, run, "--report-to", "none", steps=1) == 130
    said = capsys.readouterr().out
    before = f"(before: {first['versions']['jax']})"
    assert f"goes on with other code: commit {'b' * 12} with changes (before: {'a' * 12}), jax 9.9 {before}\n" in said
    assert "goes on with --report-to none (before: tensorboard)" in said
    own = own_of(run)
    assert set(own["sessions"][1]) <= {"start", "commit", "dirty", "versions"} and len(own["sessions"]) == 2
    assert session_of(own)["name"] == "run" and session_of(own)["dirty"]

    for name in ("sessions", "run_name", "report_to"):  # a run of this format, from before they were
        del own[name]
    (run / "run.json").write_text(json.dumps(own))
    assert dpo(tiny_dir, pairs_file, run) == 0
    said = capsys.readouterr().out
    assert "goes on with" not in said and "continuing from step 2" in said and len(own_of(run)["sessions"]) == 1
    assert (run / "tensorboard").is_dir()


def test_the_commit_of_a_checkout(tmp_path):
    checkout = tmp_path / "checkout"
    git = ["git", "-C", str(checkout)]
    assert commit_of(tmp_path) is None
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    assert commit_of(checkout) is None  # there is none yet
    (checkout / "a").write_text("a")
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "a"], check=True, env={**os.environ, **COMMIT})
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (checkout / "output").write_text("files that git knows nothing of")
    assert commit_of(checkout) == head and len(head) == 40
    subprocess.run([*git, "tag", "v1"], check=True)
    (checkout / "a").write_text("b")
    assert commit_of(checkout) == head + "-dirty"
    (checkout / "installed").mkdir()
    assert commit_of(checkout / "installed") is None  # within a checkout of something else
