"""The step on meshes of eight devices: as on one, and with no more communication than it needs."""

import collections
import dataclasses
import re

import jax
import numpy as np
import optax
import pytest

from dpojax.configs import ComputeOptions, DPOConfig, MeshConfig
from dpojax.losses import LOSSES
from dpojax.models import abstract_params, init_params
from dpojax.models.config import Attention, Mlp
from dpojax.sharding import batch_sharding, make_mesh, put_global, single_device_mesh
from dpojax.train import initial_state, lower_step, make_program
from dpojax.train.program import bytes_per_copy
from dpojax.train.scoring import place_params
from dpojax.train.task import task_of
from tests.conftest import random_batch

STEPS = 4
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


@pytest.fixture(scope="module")
def wide(config):
    """Four heads of keys and values, so that four devices can split them."""
    return dataclasses.replace(config, attention=Attention(heads=4, kv_heads=4, head_dim=8), mlp=Mlp(width=64))


@pytest.fixture(scope="module")
def batch():
    return random_batch(np.random.default_rng(0), B=16, P=6, C=5, sequences=8)


def program_on(mesh, config, loss="sigmoid", **compute):
    options = ComputeOptions(**{"logprob_chunk_tokens": 7, **compute})
    return make_program(config, LOSSES[loss], mesh=mesh, learning_rate=0.5, optimizer=optax.sgd(1.0), compute=options)


def run(mesh, config, batch, *, live=False, **compute):
    """The losses of some steps and the parameters behind them; the reference is the policy at the beginning, halved."""
    program = program_on(mesh, config, **compute)
    params = jax.tree.map(np.asarray, init_params(config, 0))
    on_mesh = put_global(batch, batch_sharding(mesh))
    theirs = place_params(jax.tree.map(lambda x: 0.5 * x, params), mesh, config)
    cached = None if live else program.ref_step(theirs, on_mesh)
    state, losses = initial_state(program, params), []
    for _ in range(STEPS):
        state, metrics = program.step(state, on_mesh, program.ref_step(theirs, on_mesh) if live else cached)
        losses.append(metrics["loss"].mean)
    return np.array(losses), jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def alone(wide, batch):
    return run(single_device_mesh(), wide, batch)


@pytest.mark.parametrize(
    ("sizes", "form"),
    [*((sizes, {}) for sizes in MESHES), ((1, 8, 1), {"live": True}), ((2, 2, 2), {"live": True, "remat": "mlp"})],
    ids=str,
)
def test_eight_devices_train_as_one(wide, batch, alone, sizes, form):
    losses, params = run(make_mesh(MeshConfig(*sizes)), wide, batch, **form)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    assert abs(losses[0] - losses[-1]) > 1e-3  # it has moved
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(alone[1]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(np.abs(want).max()))


def test_padded_rows_are_not_moved_and_train_alike(wide, batch, alone):
    padded = dataclasses.replace(batch, packing=None)
    losses, params = run(make_mesh(MeshConfig(2, 2, 2)), wide, padded)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    np.testing.assert_allclose(params["embed"], alone[1]["embed"], atol=1e-5 * float(np.abs(params["embed"]).max()))
    program = program_on(single_device_mesh(), wide)
    gathers = [lower_step(program, rows).as_text().count("stablehlo.gather") for rows in (batch, padded)]
    assert gathers[1] < gathers[0]


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(text: str) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """The compiled program's collectives: of each computation, their kinds and the shapes that they make."""
    found, computation = collections.defaultdict(list), ""
    for line in text.splitlines():
        if line and not line.startswith((" ", "}")):
            computation = "ENTRY" if line.startswith("ENTRY") else line.split(" ")[0]
        for kind in COLLECTIVES:
            if f" {kind}(" in line or f" {kind}-start(" in line:
                made = line.split("=", 1)[1].split(f" {kind}")[0]
                shapes = re.findall(r"\[([\d,]*)\]", made)
                found[computation] += [(kind, tuple(map(int, filter(None, shape.split(","))))) for shape in shapes]
    return found


@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
def test_no_parameter_is_gathered_outside_of_its_layer(wide, batch, sizes):
    """Of the layers' stacked parameters none is ever whole, and the batch stays where it lies."""
    deep = dataclasses.replace(wide, layers=5)  # a number that nothing else has
    mesh = make_mesh(MeshConfig(*sizes))
    found = collectives(lower_step(program_on(mesh, deep), batch).compile().as_text())
    assert any(kind == "all-gather" for made in found.values() for kind, _ in made)
    outside = [shape for kind, shape in found["ENTRY"] if kind in ("all-gather", "all-to-all")]
    assert not [shape for shape in outside if shape[:1] == (5,)]
    # Neither prompts [16, 6] nor completions [16, 2, 5] are gathered from the devices that hold them.
    assert not {(16, 6), (16, 2, 5)} & set(outside)


def test_the_head_is_gathered_and_its_gradient_reduced_once_a_pass(wide, batch):
    """Though the chunks of logits are many: no collective of its size is in their loops."""
    odd = dataclasses.replace(wide, vocab_size=376, tied=False)  # a number that nothing else has
    mesh = make_mesh(MeshConfig(1, 8, 1))
    found = collectives(lower_step(program_on(mesh, odd, logprob_chunk_tokens=2), batch).compile().as_text())
    of_head = lambda shape: 376 in shape and 32 in shape  # noqa: E731
    whole = {name: [kind for kind, shape in made if of_head(shape)] for name, made in found.items()}
    assert all(not kinds for name, kinds in whole.items() if name != "ENTRY"), whole
    assert 1 <= whole["ENTRY"].count("all-gather") <= 2


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({}, 3),  # parameters, gradients, RMSprop's one moment
        ({"optim": "adamw"}, 4),
        ({"optim": "adamw", "optim_dtype": "bfloat16"}, 3),
        ({"reference": "live"}, 4),
    ],
    ids=str,
)
def test_bytes_of_a_copy(config, options, copies):
    asked = DPOConfig(model="m", data=("d",), output="o", **options)
    parameters = sum(4 * x.size for x in jax.tree.leaves(abstract_params(config)))
    assert bytes_per_copy(asked, task_of(asked), config) == pytest.approx(copies * parameters, rel=1e-3)
