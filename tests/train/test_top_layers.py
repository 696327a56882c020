"""The top of a model on kept hidden states is the whole model, in figures, gradients, files and resumed runs."""

import dataclasses
import json
import re
import resource
import shutil
import signal

import jax
import numpy as np
import optax
import pytest

from dpojax.cli import main
from dpojax.configs import ComputeOptions, MeshConfig
from dpojax.data import Batches, Example
from dpojax.errors import UserError
from dpojax.losses import LOSSES
from dpojax.models import Model, init_params, load_model
from dpojax.sharding import make_mesh
from dpojax.train import initial_state, lower_step, make_program, run_steps
from dpojax.train.by_name import load_run
from dpojax.train.reference import CachedReference
from dpojax.train.top_layers import Trunk, cut, join, separate, stored
from tests.train.test_resume import curve, finish, options, start, wait_for_step

LAYERS = 3


@pytest.fixture(scope="module")
def model(config):
    """Three layers, and an unembedding of its own."""
    deep = dataclasses.replace(config, layers=LAYERS, tied=False)
    params = jax.tree.map(lambda x: x if (x == 1).all() else 10 * x, init_params(deep, seed=1))
    return Model(deep, jax.tree.map(np.asarray, params), {})


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    tokens = lambda low, high: rng.integers(0, 384, rng.integers(low, high)).astype(np.int32)  # noqa: E731
    return [Example(tokens(1, 9), (tokens(1, 7), tokens(1, 7))) for _ in range(21)]


def program_of(config, mesh, n=None, micro=1, chunk=32):
    """Plain SGD, whose updates are the gradients."""
    return make_program(
        *(config, LOSSES["sigmoid"]),
        mesh=mesh,
        learning_rate=1e-2,
        optimizer=optax.sgd(1.0),
        micro_batches=micro,
        compute=ComputeOptions(logprob_chunk_tokens=chunk),
        train_top_layers=n,
    )


def run(model, examples, directory, *, n=None, sizes=(8, 1, 1), micro=1):
    """An epoch; the reference is arbitrary."""
    mesh = make_mesh(MeshConfig(*sizes))
    sequences = sizes[0] * sizes[1] * micro
    batches = Batches(examples, 16, max_shapes=2, sequences=sequences, seed=0)
    program = program_of(model.config, mesh, n, micro)
    if n is not None:
        trunk, model = cut(model, n)
        batches = Trunk(trunk, mesh, ComputeOptions(), directory, micro).below(batches, "Frozen layers")
    reference = CachedReference(np.full((len(examples), 2), -30, np.float32), program.traits, mesh)
    state, history = initial_state(program, model.params), []
    for at in run_steps(program, state, batches.iterator(), reference, 0, len(batches)):
        history.append({name: metric.mean for name, metric in at.metrics.items()})
        state = at.state
    return jax.tree.map(np.asarray, state.params), history


def assert_close(got, want, start, rtol):
    """Updates agree, to a share of the largest in their array."""
    for a, b, c in zip(*map(jax.tree.leaves, (got, want, start)), strict=True):
        np.testing.assert_allclose(a - c, b - c, rtol=0, atol=rtol * float(np.abs(b - c).max()))


@pytest.mark.parametrize("n", [1, LAYERS])
def test_updates_are_the_whole_models(model, examples, tmp_path, n):
    """The first step's update of the trained part, against the gradient of the whole model's loss."""
    start = separate(model.params, n)[1]
    first = examples[:16]
    trained, history = run(model, first, tmp_path, n=n)
    whole, known = run(model, first, tmp_path)
    assert len(history) == 1
    for name in history[0].keys() - {"grad_norm"}:
        assert history[0][name] == pytest.approx(known[0][name], rel=1e-5), name
    assert 0 < history[0]["grad_norm"] < known[0]["grad_norm"]
    assert_close(trained, separate(whole, n)[1], start, rtol=2e-4)


@pytest.mark.parametrize(("sizes", "micro"), [((8, 1, 1), 2), ((2, 2, 2), 1), ((4, 1, 2), 4)], ids=str)
def test_devices_and_micro_batches_agree(model, examples, tmp_path, sizes, micro):
    want = run(model, examples, tmp_path, n=2)
    got = run(model, examples, tmp_path, n=2, sizes=sizes, micro=micro)
    assert len(got[1]) == 2
    for a, b in zip(got[1], want[1], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert_close(got[0], want[0], separate(model.params, 2)[1], rtol=1e-3)


def test_cut_and_joined_is_the_model(model):
    for n in range(1, LAYERS + 1):
        again = join(*separate(model.params, n))
        jax.tree.map(np.testing.assert_array_equal, again, model.params)


@pytest.mark.parametrize("chunk", [32, 512])
def test_frozen_layers_and_unembedding_cost_nothing(config, chunk):
    """The compiled step has no product for the unembedding's gradient, and loops over the top layers alone.

    (XLA counts a loop's operations once, however often it runs: its figure tells of the unembedding alone.)
    """
    deep = dataclasses.replace(config, layers=8, vocab_size=4096)
    mesh = make_mesh(MeshConfig(8, 1, 1))
    rng = np.random.default_rng(0)
    tokens = lambda n: rng.integers(0, 384, n).astype(np.int32)  # noqa: E731
    examples = [Example(tokens(8), (tokens(8), tokens(8))) for _ in range(16)]
    batch = Batches(examples, 16, max_shapes=1, sequences=8).collate(np.arange(16)).batch
    whole = lower_step(program_of(deep, mesh, chunk=chunk), batch).compile()
    hidden = np.zeros((*batch.packing.padded_index.shape, deep.width), np.float32)
    top = program_of(deep, mesh, 2, chunk=chunk)
    frozen = lower_step(top, dataclasses.replace(batch, hidden=hidden)).compile()
    of_unembedding = lambda program: re.findall(r"= f32\[4096,32\]\S* dot\(", program.as_text())  # noqa: E731
    assert of_unembedding(whole) and not of_unembedding(frozen)
    for program, layers in ((whole, 8), (frozen, 2)):
        assert set(re.findall(r"f32\[(\d+),32,64\]", program.as_text())) == {"1", str(layers)}  # stacks, one cut out
    assert frozen.cost_analysis()["flops"] < 0.75 * whole.cost_analysis()["flops"]


def test_run_exports_and_samples(tiny_dir, pairs_file, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(options(tiny_dir, pairs_file, run, train_top_layers=1, steps=30, batch_size=16)) == 0
    zero, one, *rest = curve(run)
    assert (zero["eval_rewards/accuracies"], one["rewards/accuracies"]) == (0.5, 0.5)
    assert one["loss"] == pytest.approx(0.69314718, abs=1e-6)
    assert rest[-1]["eval_loss"] < 0.9 * zero["eval_loss"]

    capsys.readouterr()
    assert main(["export", "--run", str(run), "--output", str(tmp_path / "out")]) == 0
    assert main(["sample", "--model", str(run), "--prompt", "the film", "--max-new-tokens", "4"]) == 0
    assert main(["logps", "--model", str(run), "--data", pairs_file, "--output", str(tmp_path / "logps.jsonl")]) == 0
    assert main(["eval", "--model", str(run), "--data", pairs_file]) == 0

    before, after = (load_model(str(name)).params for name in (tiny_dir, tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, load_run(run)[0].params, after)
    before, after = separate(before, 1), separate(after, 1)
    jax.tree.map(np.testing.assert_array_equal, after[0], before[0])
    assert all((a != b).any() for a, b in zip(*(jax.tree.leaves(x[1]) for x in (after, before)), strict=True))
    # The whole model reads what the last evaluation, on hidden states, read.
    rows = [json.loads(line) for line in (tmp_path / "logps.jsonl").read_text().splitlines()]
    for side in ("chosen", "rejected"):
        mean = np.mean([row[f"{side}_logps"] for row in rows])
        assert rest[-1][f"eval_logps/{side}"] == pytest.approx(mean, rel=1e-5)


def test_frozen_part_that_is_damaged_is_written_again(tiny_dir, pairs_file, tmp_path, capsys):
    run = tmp_path / "run"
    args = options(tiny_dir, pairs_file, run, train_top_layers=1, steps=1)
    export = ["export", "--run", str(run), "--output", str(tmp_path / "out")]
    assert main(args) == 0
    for path in (run / "frozen").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    capsys.readouterr()
    for said in ("damaged checkpoint", "is missing"):
        assert main(export) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error and str(run / "frozen") in error
        shutil.rmtree(run / "frozen", ignore_errors=True)
    assert main(args) == main(export) == 0


def test_full_disk_is_said(tmp_path):
    rows = [(i, np.ones((8, 64), np.float32)) for i in range(9)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match=r"hidden states .* cannot be kept"):
            stored(tmp_path, np.full(9, 8), 64, np.dtype(np.float32), rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_killed_and_continued_is_never_killed(tiny_dir, pairs_file, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(options(tiny_dir, pairs_file, whole, train_top_layers=1)))
    process = start(options(tiny_dir, pairs_file, broken, train_top_layers=1))
    wait_for_step(process, broken, 10)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert load_run(broken)[1] >= 10
    assert "continuing from step" in finish(start(options(tiny_dir, pairs_file, broken, train_top_layers=1)))
    assert curve(broken) == curve(whole)
    jax.tree.map(np.testing.assert_array_equal, load_run(broken)[0].params, load_run(whole)[0].params)


@pytest.mark.parametrize("reference", ["cached", "live"])
def test_every_layer_and_bfloat16(tiny_dir, pairs_file, tmp_path, reference):
    """N = L leaves the embeddings alone; hidden states are kept in the compute dtype."""
    run = tmp_path / "run"
    args = options(tiny_dir, pairs_file, run, train_top_layers=2, steps=3, dtype="bfloat16", reference=reference)
    assert main(args) == 0
    assert curve(run)[1]["rewards/accuracies"] == 0.5
    assert load_run(run)[1] == 3


@pytest.mark.parametrize("n", [0, -1, 3])
def test_layers_that_are_not_there(tiny_dir, pairs_file, tmp_path, capsys, n):
    assert main(options(tiny_dir, pairs_file, tmp_path / "run", train_top_layers=n)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"--train-top-layers {n}: " in said and "number of layers, 2" in said
    assert not (tmp_path / "run").exists()


def test_sft(tiny_dir, pairs_file, tmp_path):
    run = tmp_path / "run"
    args = options(tiny_dir, pairs_file, run, train_top_layers=1, steps=20, gradient_accumulation_steps=1)
    assert main(["sft", *args[1:]]) == 0
    losses = [line["eval_loss"] for line in curve(run) if "eval_loss" in line]
    assert losses[-1] < losses[0]
