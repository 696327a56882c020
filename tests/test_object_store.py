"""gs:// from end to end, over a stand-in for Google Cloud Storage: a run that is stopped, continued and exported."""

import importlib.util
import itertools
import json
from collections.abc import Iterator

import pytest

from dpojax.cli import main
from dpojax.models import fingerprint
from dpojax.train import loop
from dpojax.train.by_name import load_run
from dpojax.train.loop import run_steps
from tests.gcs import Store, store

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed")
STEPS = ("--batch-size", "8", "--max-shapes", "1", "--warmup-steps", "0", "--learning-rate", "0.01", "--steps", "4")


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
def runs(tiny_dir, pairs_file, bucket, tmp_path_factory) -> str:
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
