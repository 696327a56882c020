"""The table of parameters; parameters born on a mesh; their identity on every mesh; the mesh itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.configs import MeshConfig
from dpojax.errors import UserError
from dpojax.models import (
    Model,
    abstract_params,
    check_divides,
    combine,
    fingerprint,
    init_params,
    load_model,
    param_shardings,
    param_specs,
    partition,
    save_model,
    weights,
)
from dpojax.models.params import flatten
from dpojax.models.safetensors import SafetensorsSource
from dpojax.sharding import Rules, make_mesh, single_device_mesh
from tests.conftest import HF_CONFIG

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2)]


@pytest.fixture(scope="module")
def directory(config, params, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_model(Model(config, params, HF_CONFIG), directory / "m", shard_bytes=20_000)
    return str(directory / "m")


def test_the_table_is_the_parameters(config):
    specs, params = param_specs(config), flatten(init_params(config, seed=0))
    assert {path: spec.shape for path, spec in specs.items()} == {path: x.shape for path, x in params.items()}
    assert all(len(spec.shape) == len(spec.axes) for spec in specs.values())
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(config))
    assert flatten(shapes) == {path: (x.shape, x.dtype) for path, x in params.items()}


@pytest.mark.parametrize("sizes", MESHES)
def test_parameters_are_born_on_the_mesh_from_slices(config, params, directory, sizes, monkeypatch):
    mesh = make_mesh(MeshConfig(*sizes))
    read = []
    whole = SafetensorsSource.read

    def counted(self, name, index):
        x = whole(self, name, index)
        read.append((name, x.size, int(np.prod(self.shape(name)))))
        return x

    monkeypatch.setattr(SafetensorsSource, "read", counted)
    loaded = load_model(directory, mesh=mesh).params
    shardings = param_shardings(mesh, config)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), loaded, shardings))
    split = sizes[1] * sizes[2]
    assert all(size * split == full for name, size, full in read if "q_proj" in name)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
def test_large_parameters_are_stacked_on_the_devices(config, params, directory, sizes, monkeypatch):
    """Tensor by tensor: the host never holds more than one."""
    mesh, read = None if sizes is None else make_mesh(MeshConfig(*sizes)), []
    whole = weights.read_slice
    monkeypatch.setattr(weights, "AT_ONCE", 0)
    monkeypatch.setattr(weights, "read_slice", lambda *args: read.append(whole(*args).shape) or whole(*args))
    loaded = load_model(directory, mesh=mesh).params
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    shardings = param_shardings(mesh or single_device_mesh(), config)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), loaded, shardings))
    assert all(shape[0] == 1 for shape in read if len(shape) > 2)


def test_identity_is_the_same_on_every_mesh_and_tells_values_apart(config, params, directory):
    alone = fingerprint(params)
    assert all(
        fingerprint(load_model(directory, mesh=make_mesh(MeshConfig(*sizes))).params) == alone for sizes in MESHES
    )
    flat = flatten(params)
    swapped = (
        flat["blocks/q"]
        .at[0, 0, 0, 0]
        .set(flat["blocks/q"][1, 2, 0, 0])
        .at[1, 2, 0, 0]
        .set(flat["blocks/q"][0, 0, 0, 0])
    )
    others = [
        {**params, "embed": params["embed"].at[3, 4].add(1e-7)},
        {**params, "final_norm": params["final_norm"][::-1] * jnp.arange(1, 33)},
        {**params, "blocks": {**params["blocks"], "q": swapped}},
        {**params, "head": params["embed"]},
    ]
    assert len({alone, *map(fingerprint, others)}) == 5


def test_fresh_parameters_are_the_same_on_every_mesh(config):
    alone = init_params(config, seed=1)
    spread = init_params(config, seed=1, mesh=make_mesh(MeshConfig(2, 2, 2)))
    jax.tree.map(np.testing.assert_array_equal, alone, spread)
    assert spread["embed"].sharding.shard_shape(spread["embed"].shape) == (192, 16)


def test_partition_and_combine(params):
    trained, frozen = partition(params, lambda path: path.startswith("blocks/") and "norm" not in path)
    assert set(trained) == {"blocks"} and set(frozen["blocks"]) == {"attn_norm", "mlp_norm"}
    assert flatten(combine(trained, frozen)).keys() == flatten(params).keys()


def test_a_mesh_that_does_not_divide_the_model_is_refused(config):
    with pytest.raises(UserError, match=r"--mesh.tensor: 8 does not divide the model's heads, 4; use a divisor"):
        check_divides(make_mesh(MeshConfig(1, 1, 8)), config)
    with pytest.raises(UserError, match=r"--mesh.fsdp: 8 does not divide the model's width, 36; use a divisor"):
        check_divides(make_mesh(MeshConfig(1, 8, 1)), dataclasses.replace(config, width=36))


def test_one_mesh_axis_twice_in_a_partition_is_refused():
    with pytest.raises(ValueError, match="one of them twice"):
        Rules(embed="tensor").spec(("embed", "heads", "head_dim"))
