"""What XLA's compiler is told: options by the kind of chip, and barriers where they help."""

from collections.abc import Mapping
from typing import TypeVar

import jax
from jax.sharding import Mesh

T = TypeVar("T")

ASYNC_REDUCE = {
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_jf_crs_combiner_threshold_in_bytes": "1000000",
}
"""Reductions of gradients go on beside products; several that are combined into one could not."""
ASYNC_GATHER = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
}
"""Gathers of weights go on beside products; without the last of these a v5p fills zeros in and reduces them instead."""

OPTIONS: Mapping[str, Mapping[str, str]] = {
    "TPU v5 lite": ASYNC_REDUCE,
    "TPU v5": ASYNC_REDUCE | ASYNC_GATHER,
}
"""Options of XLA's compiler by ``device_kind``, each with what earned its place.

The figures are the compiler's own estimate of a train step and a ring model of what collectives cost that nothing hides
(libtpu 0.0.42; 8 billion parameters, 256 pairs of 2,048 tokens, bfloat16, AdamW).

- TPU v5 lite (v5e), fsdp 256: collectives of the layers that nothing hides fall from 178 to 80 ms, 30 ms of them by the
  combiner's threshold. The options for gathers change nothing.
- TPU v5 (v5p), fsdp 64: they fall from 164 to 9 ms, and the zeros that were filled in are gone.
"""


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """The options of the mesh's kind of chip, for ``jax.jit``; None where it has none, as CPUs and GPUs."""
    found = OPTIONS.get(mesh.devices.flat[0].device_kind)
    return dict(found) if found else None


def barrier(x: T) -> T:
    """The arrays, computed in full before anything that reads them; as they are on a TPU.

    XLA's CPU compiler would otherwise compute them inside of each reader, element by element. On a TPU that is faster,
    where all of a layer's are left out: 0.87 ms of a layer's 20.4, and 1.7 ms of the unembedding's 35.7 (compiler's
    estimate; 8 billion parameters, 2,048 tokens a chip of v5e). Without one of the MLP's two it is 0.74 ms slower.
    """
    return jax.lax.platform_dependent(x, tpu=lambda x: x, default=jax.lax.optimization_barrier)
