"""The mesh: sizes that fit, the one that suits a model, slices of TPUs, and the compiler's options by chip."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from dpojax.compiler import OPTIONS, compiler_options
from dpojax.configs import MeshConfig
from dpojax.errors import UserError
from dpojax.sharding import auto_mesh, make_mesh, memory_of, ordered, single_device_mesh

GB = 10**9


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is asked of a device that is not there."""

    id: int
    slice_index: int = 0
    bytes_limit: int | None = 16 * GB
    device_kind: str = "another"
    platform: str = "gpu"
    process_index: int = 0

    def memory_stats(self):
        return None if self.bytes_limit is None else {"bytes_limit": self.bytes_limit}


def chips(n: int, slices: int = 1, **form) -> list[Chip]:
    return [Chip(i, i // (n // slices), process_index=i // (n // slices), **form) for i in range(n)]


@pytest.mark.parametrize(
    ("asked", "size", "sizes"),
    [
        ({}, 3 * GB, (8, 1, 1)),  # a copy takes less than a quarter of 16 GB
        ({}, 5 * GB, (1, 8, 1)),
        ({"tensor": 4}, 12 * GB, (2, 1, 4)),  # a fourth of a copy a device
        ({"tensor": 4}, 30 * GB, (1, 2, 4)),
        ({"fsdp": 4}, 3 * GB, (2, 4, 1)),  # what is given stays
        ({"data": -1}, 500 * GB, (8, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 500 * GB, (2, 2, 2)),
        ({"fsdp": -1}, 3 * GB, (1, 8, 1)),
    ],
)
def test_the_mesh_of_a_model(asked, size, sizes):
    config = auto_mesh(MeshConfig(**asked), chips(8), size)
    assert tuple(make_mesh(config).shape.values()) == sizes


def test_copies_are_shared_out_within_a_slice():
    assert auto_mesh(MeshConfig(), chips(8, slices=2), 100 * GB) == MeshConfig(data=-1, fsdp=4)


def test_memory_is_asked_for_or_looked_up_or_unknown():
    assert memory_of(Chip(0)) == 16 * GB
    assert memory_of(Chip(0, bytes_limit=None, device_kind="TPU v5 lite")) == 16 * 2**30
    assert memory_of(jax.devices()[0]) == np.inf  # a CPU: the default mesh is one of copies
    assert auto_mesh(MeshConfig(), jax.devices(), 1e15) == MeshConfig(data=-1)


def test_slices_are_parts_of_the_axis_data():
    devices = chips(8, slices=2)
    grid = ordered((4, 2, 1), devices[::-1])
    # Both copies of a slice stand together, and each copy's shares are of one slice.
    assert [[{chip.slice_index for chip in copy.flat} for copy in half] for half in np.split(grid, 2)] in (
        [[{0}, {0}], [{1}, {1}]],
        [[{1}, {1}], [{0}, {0}]],
    )
    with pytest.raises(UserError, match=r"--mesh.data: 1 copies do not divide over 2 slices"):
        ordered((1, 8, 1), devices)


def test_a_mesh_that_is_none():
    with pytest.raises(UserError, match="does not fit 8 devices"):
        make_mesh(MeshConfig(fsdp=3))
    with pytest.raises(UserError, match="one axis may be -1"):
        make_mesh(MeshConfig(fsdp=-1, tensor=-1))


def test_compiler_options_are_of_a_kind_of_chip():
    assert compiler_options(single_device_mesh()) is None
    for kind, options in OPTIONS.items():
        mesh = types.SimpleNamespace(devices=np.array([Chip(0, device_kind=kind)]))
        assert compiler_options(mesh) == options  # type: ignore[arg-type]
