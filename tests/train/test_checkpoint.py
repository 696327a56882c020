"""Checkpoints: every file of one damaged in every way; another mesh; what is kept, and what is put aside."""

import dataclasses
import gc
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.cli import main
from dpojax.configs import MeshConfig
from dpojax.errors import UserError
from dpojax.losses import sigmoid
from dpojax.sharding import make_mesh
from dpojax.train import loop
from dpojax.train.by_name import load_run
from dpojax.train.checkpoint import Checkpoints, DamagedCheckpoint, content_of
from dpojax.train.loop import run_steps
from dpojax.train.program import initial_state, make_program
from dpojax.train.state import Hyper, TrainState
from tests.conftest import on_devices, write_rows
from tests.train.test_resume import curve, options

# Orbax's coroutines of a read that failed are collected with their errors.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
NUMBERS = Hyper(jnp.float32(0.1), jnp.float32(1))


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


def small_state(step: int, seed: int = 0) -> TrainState:
    params = {"embed": jax.random.normal(jax.random.key(seed), (32, 16)), "blocks": {"q": jnp.zeros(40)}}
    moments = {"mu": jax.tree.map(jnp.square, params), "count": jnp.int32(step)}
    return TrainState(jnp.int32(step), params, moments, jax.random.key(1), NUMBERS)


def layout_of(state: TrainState) -> TrainState:
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    return dataclasses.replace(like, rng=state.rng)


def arrays(state: TrainState) -> list[np.ndarray]:
    kept = (state.step, state.params, state.opt_state, jax.random.key_data(state.rng), state.running)
    return [np.asarray(x) for x in jax.tree.leaves(kept)]


def same(state: TrainState, other: TrainState) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(arrays(state), arrays(other), strict=True))


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[int(at * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def largest(directory: Path, pattern: str = "**/*") -> Path:
    return max((path for path in directory.glob(pattern) if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGE: dict[str, Callable[[Path], None]] = {"flip": flip, "cut": cut, "gone": Path.unlink}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(run)
    checkpoints.save(small_state(7), {"next_index": 7}, 0.5, moved={"embed": small_state(7, seed=2).params["embed"]})
    checkpoints.finish()
    return run


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_restored_is_what_was_saved_whatever_file_is_damaged(saved, tmp_path, damage):
    state, moved = small_state(7), {"embed": small_state(7, seed=2).params["embed"]}
    files = sorted(path.relative_to(saved) for path in saved.rglob("*") if path.is_file())
    assert any("manifest" in str(file) for file in files) and any("metrics" in str(file) for file in files)
    found = set()
    for i, file in enumerate(files):
        run = tmp_path / str(i)
        shutil.copytree(saved, run)
        DAMAGE[damage](run / file)
        try:
            restored = Checkpoints(run, read_only=True).restore(7, layout_of(state), moved)
        except DamagedCheckpoint as error:
            assert str(run / "checkpoints" / "7") in str(error) and "\n" not in str(error)
            found.add(file)
            continue
        assert same(restored.state, state) and restored.position == {"next_index": 7}, file
        assert bool((restored.moved["embed"] == moved["embed"]).all()), file
    for item in ("params", "train", "reference"):
        assert largest(saved / "checkpoints" / "7" / item, "ocdbt.process_0/d/*").relative_to(saved) in found
    assert found >= {Path("checkpoints", "7", item, "metadata") for item in ("position", "content")}


def test_bits_that_change_where_no_library_looks_are_found(saved, tmp_path):
    """TensorStore decompresses changed bits into other numbers without an error; the content hash finds them."""
    state, found = small_state(7), 0
    file = largest(saved / "checkpoints/7/params", "ocdbt.process_0/d/*").relative_to(saved)
    for i, at in enumerate(np.linspace(0.05, 0.95, 8)):
        run = tmp_path / str(i)
        shutil.copytree(saved, run)
        flip(run / file, float(at))
        try:
            assert same(Checkpoints(run, read_only=True).restore(7, layout_of(state)).state, state)
        except DamagedCheckpoint as error:
            found += "its params is not what was written" in str(error)
    assert found > 4


def test_the_last_that_is_not_damaged_is_used_and_the_others_are_put_aside(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path, keep_latest=3)
    for step in (1, 2, 3):
        checkpoints.save(small_state(step), {"next_index": step}, None)
    checkpoints.finish()
    for step in (2, 3):
        cut(next((tmp_path / "checkpoints" / str(step) / "train").glob("manifest*")))
    checkpoints = Checkpoints(tmp_path, keep_latest=1)
    restored = checkpoints.restore_latest(layout_of(small_state(0)))
    assert restored.step == 1 and same(restored.state, small_state(1)) and restored.position == {"next_index": 1}
    said = " ".join(capsys.readouterr().out.split())
    for step in (2, 3):
        assert f"{tmp_path / 'checkpoints' / str(step)}: damaged checkpoint" in said.replace("\n", "")
    # They count for none of those that are kept, and the steps can be saved again.
    checkpoints.save(small_state(2), {"next_index": 2}, None)
    checkpoints.finish()
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"2", "2.damaged", "3.damaged"}
    assert Checkpoints(tmp_path).latest == 2


def test_a_checkpoint_of_an_earlier_version_has_no_hashes(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "7" / "content")
    state = small_state(7)
    assert same(Checkpoints(tmp_path / "run", read_only=True).restore(7, layout_of(state)).state, state)


TWO = """
import os, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
run, port, number = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number))
from pathlib import Path
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from dpojax.train.checkpoint import Checkpoints
from dpojax.train.state import Hyper, TrainState

mesh = Mesh(np.array(jax.devices()), ("fsdp",))
def put(x, spec=PartitionSpec()):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])
def state(step):
    w = put(np.random.default_rng(step).normal(size=(64, 32)).astype(np.float32), PartitionSpec("fsdp"))
    key = jax.random.wrap_key_data(put(np.zeros(2, np.uint32)))
    return TrainState(put(np.int32(step)), {"w": w}, {"mu": w, "count": put(np.int32(step))}, key, Hyper(0, 0))

checkpoints = Checkpoints(Path(run), keep_latest=2)
for step in (1, 2):
    checkpoints.save(state(step), {"next_index": step}, None)
checkpoints.finish()
if number == "0":  # what the other process reads is cut
    file = max(Path(run).glob("checkpoints/2/params/ocdbt.process_1/d/*"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
sync_global_devices("damaged")
like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(1).params)
moments = {"mu": like["w"], "count": jax.ShapeDtypeStruct((), np.int32, sharding=state(1).step.sharding)}
layout = TrainState(moments["count"], like, moments, state(1).rng, Hyper(0, 0))
checkpoints = Checkpoints(Path(run), keep_latest=2)
found = checkpoints.restore_latest(layout)
ours, saved = (x.params["w"].addressable_data(0) for x in (found.state, state(1)))
assert found.step == 1 and (ours == saved).all()
checkpoints.save(state(2), {"next_index": 2}, None)
checkpoints.finish()
"""


def test_two_processes_agree_on_what_is_damaged(tmp_path):
    """Each writes its own shards; where one cannot read its part, both go back to the checkpoint before."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TWO, str(tmp_path), port]
    pipes = {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen([*command, number], **pipes) for number in "01"]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "another process cannot read it" in " ".join(said[0].split())
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "2", "2.damaged"}


def test_where_all_are_damaged_nothing_is_touched(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_latest=2)
    for step in (1, 2):
        checkpoints.save(small_state(step), {}, None)
    checkpoints.finish()
    for step in (1, 2):
        flip(tmp_path / "checkpoints" / str(step) / "position" / "metadata")
    with pytest.raises(UserError, match=r"checkpoints/2: damaged checkpoint.*as are all.*another --output"):
        Checkpoints(tmp_path).restore_latest(layout_of(small_state(0)))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}


MESHES = [(8, (1, 8, 1)), (4, (2, 1, 2)), (1, (1, 1, 1)), (8, (2, 2, 2))]


def test_a_state_moves_between_meshes(config, params, tmp_path):
    """Saved on 8 devices, restored on 4, on 1 and on 8 in another shape: the same numbers, laid out as asked for."""

    def program(devices: int, sizes: tuple[int, int, int]):
        return make_program(config, sigmoid, mesh=make_mesh(MeshConfig(*sizes), jax.devices()[:devices]))

    first = program(*MESHES[0])
    state = initial_state(first, params)
    noise = lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)  # noqa: E731
    state = dataclasses.replace(state, opt_state=jax.tree.map(noise, state.opt_state), step=state.step + 3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {"next_index": 3}, None)
    checkpoints.finish()
    for devices, sizes in MESHES:
        layout = program(devices, sizes).layout
        like = dataclasses.replace(layout.abstract(), hyper=layout.placed_hyper())
        there = Checkpoints(tmp_path, read_only=True).restore(3, like).state
        assert same(there, state) and content_of(there.params) == content_of(state.params)
        laid_out = jax.tree.map(lambda x, s: x.sharding == s, there.params, layout.shardings.params)
        assert all(jax.tree.leaves(laid_out))


def test_a_run_goes_on_with_other_devices(tiny_dir, pairs_file, tmp_path, monkeypatch, capsys):
    """Steps on 8 devices, on 4, on 1, with other micro-batches: the run of one device, to rounding."""
    flags = {"steps": 6, "save-steps": 2, "warmup-steps": 0, "loss": "orpo", "batch-size": 8, "learning-rate": 1e-3}

    def dpo(devices: int, name: str, *more: str, **changed: object) -> int:
        named = {**flags, "model": tiny_dir, "data": pairs_file, "output": tmp_path / name, **changed}
        with monkeypatch.context() as patch:
            on_devices(patch, devices)
            if name == "moved" and devices > 1:  # two steps, then it is stopped
                patch.setattr(loop, "run_steps", lambda *a: itertools.islice(run_steps(*a), 2))
            return main(["dpo", *(str(part) for k, v in named.items() for part in (f"--{k}", v)), *more])

    assert dpo(1, "whole") == 0
    assert dpo(8, "moved", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--remat", "block") == 130
    capsys.readouterr()
    assert dpo(4, "moved", "--mesh.fsdp", "4", "--max-shapes", "1") == 130
    said = " ".join(capsys.readouterr().out.split())
    assert "goes on with --max-shapes 1 (before: 8), --mesh.fsdp 4 (before: 2), --mesh.tensor 1 (before: 2)" in said
    assert "--remat none (before: block)" in said
    # And on another machine, whose files lie elsewhere.
    there = tmp_path / "there"
    shutil.copytree(tiny_dir, there / Path(tiny_dir).name)
    places = {"model": there / Path(tiny_dir).name, "data": shutil.copy(pairs_file, there)}
    assert dpo(1, "moved", "--gradient-accumulation-steps", "2", "--logprob-chunk-tokens", "64", **places) == 0
    assert json.loads((tmp_path / "moved" / "run.json").read_text())["model"] == str(places["model"])
    assert "continuing from step 4" in " ".join(capsys.readouterr().out.split())
    assert dpo(1, "moved", beta=0.3) == 2  # another run
    error = capsys.readouterr().err
    assert "beta (None there, 0.3 here)" in error and "mesh" not in error
    other = write_rows(there / "others.jsonl", [json.loads(line) for line in Path(pairs_file).read_text().splitlines()])
    assert dpo(1, "moved", data=other) == 2 and "data (" in capsys.readouterr().err  # the content alone says too little

    lines = [[{**line, "padding_share": 0} for line in curve(tmp_path / name)] for name in ("moved", "whole")]
    for moved, whole in zip(*lines, strict=True):
        assert moved == pytest.approx(whole, rel=1e-4, abs=1e-5)
    ends = [load_run(tmp_path / name)[0].params for name in ("moved", "whole")]
    for x, y in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


def test_a_damaged_checkpoint_costs_its_steps_alone(tiny_dir, pairs_file, tmp_path, monkeypatch, capsys):
    """Readers pass over it; the run goes on from the one before it, and ends as if nothing had happened."""
    flags = {"steps": 6, "save_steps": 2, "warmup_steps": 0, "eval_steps": 6, "save_total_limit": 2}
    on_devices(monkeypatch, 1)
    run, whole = tmp_path / "run", tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "run_steps", lambda *a: itertools.islice(run_steps(*a), 4))
        assert main(options(tiny_dir, pairs_file, run, **flags)) == 130
    shutil.copytree(run, whole)
    assert main(options(tiny_dir, pairs_file, whole, **flags)) == 0
    flip(largest(run / "checkpoints" / "4" / "params"))
    capsys.readouterr()
    export = ["export", "--run", str(run), "--output", str(tmp_path / "out")]
    assert main([*export, "--checkpoint", "4"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "damaged checkpoint" in error and str(run / "checkpoints" / "4") in error
    assert main(export) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the one of step 2 is used" in said and "policy of step 2" in said
    assert (run / "checkpoints" / "4").is_dir()  # a reader changes nothing

    assert main(options(tiny_dir, pairs_file, run, **flags)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "is put aside as .damaged" in said and "continuing from step 2" in said
    assert curve(run) == curve(whole)
    kept = {path.name for path in (whole / "checkpoints").iterdir()}
    assert {path.name for path in (run / "checkpoints").iterdir()} == kept | {"4.damaged"}

    flip(largest(run / "checkpoints" / "6" / "train"))  # a complete run is made complete again
    assert main(options(tiny_dir, pairs_file, run, **flags)) == 0
    assert "continuing from step 4" in " ".join(capsys.readouterr().out.split()) and curve(run) == curve(whole)
    for step in kept:
        flip(largest(run / "checkpoints" / step / "params"))
    assert main(export) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "as are all" in error
