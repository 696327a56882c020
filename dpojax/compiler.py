"""The options that programs are compiled with, by the kind of chip."""

from collections.abc import Mapping

from jax.sharding import Mesh

ASYNC_REDUCE = {
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
}
"""Reductions of gradients go on beside the products of the backward pass."""
ASYNC_GATHER = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
}
"""Gathers of weights go on beside products."""

OPTIONS: Mapping[str, Mapping[str, str]] = {
    "TPU v5 lite": ASYNC_REDUCE,
    "TPU v5": ASYNC_REDUCE | ASYNC_GATHER,
}
"""Options of XLA's compiler by ``device_kind``, each with the figure that earned its place:

- TPU v5 lite (v5e)
- TPU v5 (v5p)
"""


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """The options of the mesh's kind of chip, for ``jax.jit``; None where it has none, as CPUs and GPUs."""
    found = OPTIONS.get(mesh.devices.flat[0].device_kind)
    return dict(found) if found else None
