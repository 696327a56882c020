"""Log-probabilities kept across runs: reused under the same key, recomputed under another, continued when cut off."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dpojax import cli
from dpojax.train import reference, scoring
from dpojax.train.logps_cache import LogpsCache


@pytest.fixture
def data(pairs_file, tmp_path):
    """A copy of the pairs that has no cache beside it."""
    return shutil.copy(pairs_file, tmp_path / "pairs.jsonl")


@pytest.fixture
def computed(monkeypatch):
    """The number of rows that each call has to compute."""
    rows = []
    add = LogpsCache.add

    def counting(self, examples, sums):
        rows.extend(examples)
        add(self, examples, sums)

    monkeypatch.setattr(LogpsCache, "add", counting)
    return rows


def logps(model, data, tmp_path, *more):
    output = tmp_path / "logps.jsonl"
    assert cli.main(["logps", "--model", model, "--data", str(data), "--output", str(output), *more]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_same_key_is_reused_and_another_is_not(tiny_dir, data, tmp_path, computed, config, params):
    first = logps(tiny_dir, data, tmp_path)
    assert len(computed) == 24
    again = logps(tiny_dir, data, tmp_path, "--batch-size", "16")
    assert len(computed) == 24 and again == first

    longer = Path(data).read_text() + json.dumps({"prompt": "new", "chosen": " row", "rejected": " here"}) + "\n"
    Path(data).write_text(longer)
    assert logps(tiny_dir, data, tmp_path)[:24] == first
    assert len(computed) == 25  # the new row alone

    logps(tiny_dir, data, tmp_path, "--max-length", "12")
    assert len(computed) > 25  # rows that are cut are other rows
    before = len(computed)
    logps(tiny_dir, data, tmp_path, "--dtype", "bfloat16")
    assert len(computed) == before + 25


def test_another_models_numbers_are_never_reused(tiny_dir, data, tmp_path, computed):
    first = logps(tiny_dir, data, tmp_path)
    other = tmp_path / "other"
    shutil.copytree(tiny_dir, other)
    raw = json.loads((other / "config.json").read_text())
    raw["rms_norm_eps"] = 0.1  # the same weights in another shape of model
    (other / "config.json").write_text(json.dumps(raw))
    assert logps(str(other), data, tmp_path) != first and len(computed) == 48


def test_a_run_finds_what_logps_has_computed(tiny_dir, data, tmp_path, computed, monkeypatch, capsys):
    assert cli.main(["logps", "--model", tiny_dir, "--data", str(data)]) == 0
    assert len(computed) == 24
    # When all is there, the reference's parameters never reach a device.
    monkeypatch.setattr(reference, "place_params", lambda *_: pytest.fail("parameters were asked for"))
    flags = ["--batch-size", "8", "--warmup-steps", "0", "--output", str(tmp_path / "run")]
    assert cli.main(["dpo", "--model", tiny_dir, "--data", str(data), *flags]) == 0
    assert "24 of 24 rows from the cache" in capsys.readouterr().out
    assert len(computed) == 24
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["rewards/accuracies"] == 0.5 and first["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_interrupted_computation_continues(tiny_dir, data, tmp_path, computed, monkeypatch):
    real, calls = scoring.put_batch, []

    def broken(tree, mesh):
        calls.append(1)
        if len(calls) == 2:  # a batch, and then
            raise KeyboardInterrupt
        return real(tree, mesh)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "put_batch", broken)
        assert cli.main(["logps", "--model", tiny_dir, "--data", str(data)]) == 130
    done = len(computed)
    assert 0 < done < 24
    logps(tiny_dir, data, tmp_path)
    assert len(computed) == 24


def test_damaged_and_foreign_files_are_no_cache(tmp_path):
    keys = np.array([7], np.uint64)
    cache = LogpsCache(str(tmp_path / "x.jsonl"), {"content": "model"}, 2)
    cache.add(keys, np.array([[-1.0, -2.0]], np.float32))
    cache.write()
    (file,) = cache.directory.glob("*.npz")
    assert LogpsCache(str(tmp_path / "x.jsonl"), {"content": "model"}, 2).get(keys).tolist() == [[-1.0, -2.0]]
    assert np.isnan(LogpsCache(str(tmp_path / "x.jsonl"), {"content": "model 2"}, 2).get(keys)).all()
    file.write_bytes(file.read_bytes()[:40])
    assert np.isnan(LogpsCache(str(tmp_path / "x.jsonl"), {"content": "model"}, 2).get(keys)).all()


def test_rows_in_memory_are_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = np.array([7], np.uint64)
    cache = LogpsCache(None, {"content": "model"}, 2)
    cache.add(keys, np.array([[-1.0, -2.0]], np.float32))
    cache.write()
    assert cache.get(keys).tolist() == [[-1.0, -2.0]] and list(tmp_path.iterdir()) == []


def test_caches_of_an_earlier_version_are_mentioned_once_and_not_read(tmp_path, capsys):
    earlier = tmp_path / ".dpojax"
    (earlier / f"logps-{'0' * 32}").mkdir(parents=True)
    for _ in range(2):
        LogpsCache(str(tmp_path / "x.jsonl"), {"content": "model"}, 2)
    said = f"{earlier}: caches of an earlier version (logps-*, logps2-*) are not read and can be removed"
    assert capsys.readouterr().out.splitlines() == [said]
