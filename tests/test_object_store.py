"""gs:// from end to end, over a stand-in for Google Cloud Storage: a run that is stopped, continued and exported."""

import importlib.util
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpojax.cli import main
from dpojax.errors import UserError
from dpojax.models import fingerprint, load_model, load_tokenizer
from dpojax.models.stored import StoredTensors
from dpojax.paths import path_of
from dpojax.train import loop, writers
from dpojax.train.by_name import load_policy, load_run
from dpojax.train.loop import run_steps
from tests.conftest import on_devices
from tests.gcs import NO_BUCKET, Store, store

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed")
STEPS = ("--batch-size", "8", "--max-shapes", "1", "--warmup-steps", "0", "--learning-rate", "0.01", "--steps", "4")


@pytest.fixture(scope="module", autouse=True)
def one_device() -> Iterator[None]:
    """Programs of eight take long to compile."""
    with pytest.MonkeyPatch.context() as patch:
        on_devices(patch, 1)
        yield


@pytest.fixture(scope="module")
def bucket() -> Iterator[Store]:
    with store() as server:
        yield server


def dpo(model, data, output, *flags) -> int:
    held_out = ("--eval-data", data, "--eval-steps", "2", "--save-steps", "2")
    return main(["dpo", "--model", str(model), "--data", data, "--output", str(output), *STEPS, *held_out, *flags])


def curve(text: str) -> list[dict]:
    rates = ("pairs_per_second", "tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in rates} for line in text.splitlines()]


def text(bucket: Store, name: str) -> str:
    return bucket.objects["bucket", name][0].decode()


@pytest.fixture(scope="module")
def runs(tiny_dir, pairs_file, bucket, tmp_path_factory) -> tuple[str, Path]:
    """A run in the bucket, stopped after its third step and continued; the same on the disk, in one go."""
    run, whole = "gs://bucket/runs/a", tmp_path_factory.mktemp("store") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run_steps", lambda *a: itertools.islice(run_steps(*a), 3))
        assert dpo(tiny_dir, pairs_file, run) == 130
    assert not [name for name in bucket.names() if name.endswith(".partial")]
    assert dpo(tiny_dir, pairs_file, run) == 0
    assert dpo(tiny_dir, pairs_file, whole) == 0
    return run, whole


def test_a_run_in_a_bucket_is_the_one_on_a_disk(runs, bucket):
    run, whole = runs
    assert curve(text(bucket, "runs/a/metrics.jsonl")) == curve((whole / "metrics.jsonl").read_text())
    assert fingerprint(load_run(run)[0].params) == fingerprint(load_run(whole)[0].params)
    top = {name.split("/")[3] for name in bucket.names("bucket/runs/a/")}
    assert top == {"run.json", "model", "metrics.jsonl", "tensorboard", "checkpoints"}
    assert top == {path.name for path in whole.iterdir()}


def test_metrics_are_put_there_now_and_then(runs, bucket):
    """Four steps and as many evaluations, in two commands: at each checkpoint, and at the end where there is more."""
    assert bucket.uploads["runs/a/metrics.jsonl"] <= 4
    assert all("/events.out.tfevents." in name for name in bucket.names("bucket/runs/a/tensorboard/"))


def test_metrics_wait_for_their_time(bucket, monkeypatch):
    lines = writers.JsonLines(path_of("gs://bucket/slow"))
    lines.write(1, {"loss": 0.5})
    lines.flush()
    assert "slow/metrics.jsonl" not in bucket.uploads
    lines.sync()
    assert text(bucket, "slow/metrics.jsonl") == '{"step": 1, "loss": 0.5}\n'
    monkeypatch.setattr(lines.growing, "due", 0)
    lines.write(2, {"loss": 0.4})
    lines.flush()
    lines.sync()  # nothing has come since
    lines.close()
    assert bucket.uploads["slow/metrics.jsonl"] == 2 and text(bucket, "slow/metrics.jsonl").count("\n") == 2


def test_a_bucket_is_read_as_a_disk_is(runs, bucket, pairs_file, capsys):
    figures: list[dict] = []
    for name in runs:
        assert main(["sample", "--model", str(name), "--prompt", "the film", "--max-new-tokens", "4"]) == 0
        flags = ("--data", pairs_file, "--output", "gs://bucket/figures.json")
        assert main(["eval", "--model", str(name), *flags]) == 0
        figures.append(json.loads(text(bucket, "figures.json")))
    assert figures[0] == figures[1]
    said = capsys.readouterr().out
    assert len({line for line in said.splitlines() if line.startswith("1. the film|")}) == 1


def test_an_export_in_a_bucket(runs, bucket, tmp_path):
    run, whole = runs
    assert main(["export", "--run", run, "--output", "gs://bucket/model", "--max-shard-size", "20KB"]) == 0
    assert main(["export", "--run", str(whole), "--output", str(tmp_path / "model"), "--max-shard-size", "20KB"]) == 0
    files = {name.removeprefix("bucket/model/") for name in bucket.names("bucket/model/")}
    assert files == {path.name for path in (tmp_path / "model").iterdir()}
    for name in files - {"README.md"}:
        assert bucket.objects["bucket", f"model/{name}"][0] == (tmp_path / "model" / name).read_bytes(), name
    there = load_model("gs://bucket/model")
    assert fingerprint(there.params) == fingerprint(load_run(run)[0].params)
    assert load_tokenizer("gs://bucket/model").chat_template == load_tokenizer(str(whole / "model")).chat_template
    # Another model in its place: what it does not replace is gone, and config.json came last.
    generation = bucket.generation
    assert main(["export", "--run", run, "--output", "gs://bucket/model"]) == 0
    assert {n for n in bucket.names("bucket/model/") if ".safetensors" in n} == {"bucket/model/model.safetensors"}
    written = {name: at for (_, name), (_, at) in bucket.objects.items() if at > generation}
    assert max(written, key=lambda name: written[name]) == "model/config.json"
    bucket.put("bucket", "model/model.safetensors", bucket.objects["bucket", "model/model.safetensors"][0][:-9])
    with pytest.raises(UserError, match=r"gs://bucket/model/model.safetensors: truncated or damaged"):
        load_model("gs://bucket/model")


def test_slices_are_read_and_no_more(runs, bucket, monkeypatch):
    """A range of rows costs the bytes of these rows."""
    assert main(["export", "--run", runs[0], "--output", "gs://bucket/sliced"]) == 0
    file = StoredTensors(path_of("gs://bucket/sliced/model.safetensors"))
    read = []
    monkeypatch.setattr(file, "_range", lambda start, end: read.append(end - start) or bytes(end - start))
    rows = file.get_slice("model.embed_tokens.weight")[4:10, 2:5]
    assert rows.shape == (6, 3) and read == [6 * 32 * 4]


def test_what_was_cut_short_is_no_checkpoint(runs, bucket):
    """A writer that was killed leaves objects without the one that says that all are there."""
    for name in [
        name for name in bucket.names("bucket/runs/a/checkpoints/4/") if not name.endswith("commit_success.txt")
    ]:
        new = name.removeprefix("bucket/").replace("/4/", "/9/")
        bucket.put("bucket", new, bucket.objects["bucket", name.removeprefix("bucket/")][0])
    assert load_run(runs[0])[1] == 4


def test_a_damaged_checkpoint_in_a_bucket_is_passed_over(runs, bucket, tiny_dir, pairs_file, tmp_path, capsys):
    """A run that was copied from a disk goes on in a bucket, from the checkpoint before the damaged one."""
    run, whole = runs
    for path in whole.rglob("*"):
        if path.is_file():
            bucket.put("bucket", f"runs/b/{path.relative_to(whole)}", path.read_bytes())
    names = [
        name.removeprefix("bucket/") for name in bucket.names("bucket/runs/b/checkpoints/4/params/ocdbt.process_0/d/")
    ]
    largest = max(names, key=lambda name: len(bucket.objects["bucket", name][0]))
    data = bytearray(bucket.objects["bucket", largest][0])
    data[len(data) // 2] ^= 4
    bucket.put("bucket", largest, bytes(data))
    assert load_run("gs://bucket/runs/b")[1] == 2
    capsys.readouterr()
    assert dpo(tiny_dir, pairs_file, "gs://bucket/runs/b") == 0
    assert "continuing from step 2" in " ".join(capsys.readouterr().out.split())
    steps = {name.split("/")[4] for name in bucket.names("bucket/runs/b/checkpoints/")}
    assert steps == {"2", "4", "4.damaged"}
    assert fingerprint(load_run("gs://bucket/runs/b")[0].params) == fingerprint(load_run(run)[0].params)
    assert curve(text(bucket, "runs/b/metrics.jsonl")) == curve((whole / "metrics.jsonl").read_text())
    for name in bucket.names("bucket/runs/b/"):  # and back
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bucket.objects["bucket", name.removeprefix("bucket/")][0])
    assert fingerprint(load_run(tmp_path / "bucket/runs/b")[0].params) == fingerprint(load_run(run)[0].params)


@pytest.mark.parametrize(
    ("flags", "beside"),
    [(("--lora-rank", "2", "--lora-init", "a-zero"), {"adapter.json"}), (("--train-top-layers", "1"), {"frozen"})],
)
def test_what_lies_beside_a_run_does_so_in_a_bucket(bucket, tiny_dir, pairs_file, tmp_path, flags, beside):
    """Adapters and frozen layers; an adapter is exported alone, and read again."""
    name = flags[0].strip("-")
    run, steps = f"gs://bucket/runs/{name}", ("--loss", "orpo", "--steps", "1", "--save-steps", "1")
    for output in (run, str(tmp_path / "run")):
        command = ["dpo", "--model", tiny_dir, "--data", pairs_file, "--output", output, *STEPS, *steps, *flags]
        assert main(command) == 0
    assert beside <= {path.split("/")[3] for path in bucket.names(f"bucket/runs/{name}/")}
    trained = fingerprint(load_run(run)[0].params)
    assert trained == fingerprint(load_run(tmp_path / "run")[0].params) != fingerprint(load_model(tiny_dir).params)
    if "adapter.json" in beside:
        assert main(["export", "--run", run, "--output", "gs://bucket/adapter", "--adapter"]) == 0
        assert fingerprint(load_policy("gs://bucket/adapter").params) == trained


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("memory://a/b", "no such object store; use gs://, s3://, az://, or a path on a disk"),
        ("gs://bucket/none", "nothing is there"),
        ("gs://bucket/model.gguf", "copy it to this machine"),
    ],
)
def test_a_model_that_is_not_there(bucket, name, said, capsys):
    assert main(["sample", "--model", name, "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and name in error


def test_a_bucket_that_is_not_there(runs, tiny_dir, pairs_file, capsys):
    place = f"gs://{NO_BUCKET}/place"
    for code in (main(["export", "--run", runs[0], "--output", place]), dpo(tiny_dir, pairs_file, place)):
        assert code == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(place in line and "check the bucket's name" in line for line in said)


def test_runs_lie_where_orbax_can_write(tiny_dir, pairs_file, capsys):
    assert dpo(tiny_dir, pairs_file, "s3://bucket/run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "checkpoints lie on disks and in gs:// alone" in error


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["sample", "--model", "gs://bucket/m", "--prompt", "x"]) == 2
    assert "gs:// needs gcsfs, which is not installed: pip install 'dpojax[gcs]'" in capsys.readouterr().err
