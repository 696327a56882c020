"""Log-probabilities of examples under fixed parameters: the forward pass alone."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dpojax import processes
from dpojax.compiler import compiler_options
from dpojax.configs import PassOptions
from dpojax.data import Batches
from dpojax.logprobs import completion_logps
from dpojax.models import DecoderConfig, make_apply, make_attention, param_shardings
from dpojax.packing import ApplyFn, PairBatch, packing_of
from dpojax.progress import console, track
from dpojax.sharding import batch_sharding, constrainer, put_batch
from dpojax.train.logps_cache import LogpsCache
from dpojax.train.state import placed
from dpojax.train.step import join_micro, split_micro
from dpojax.types import PyTree

LogpsStep = Callable[[PyTree, PairBatch], Float[Array, "B N"]]


def place_params(params: PyTree, mesh: Mesh, config: DecoderConfig) -> PyTree:
    """The parameters as arrays laid out over a mesh."""
    return placed(params, param_shardings(mesh, config))


def apply_on(config: DecoderConfig, mesh: Mesh, compute: PassOptions, **more: Any) -> ApplyFn:
    """The model over a mesh, computed as the options say; ``more`` is :func:`~dpojax.models.make_apply`'s."""
    attention = make_attention(compute.attention, mesh, compute.dtype)
    return make_apply(config, dtype=compute.dtype, constrain=constrainer(mesh), attention=attention, mesh=mesh, **more)


def model_key(config: DecoderConfig, content: str, dtype: str) -> dict[str, str | int]:
    """What computes log-probabilities, in named fields: a decoder's choices, its content hash, the compute dtype."""
    return {"config": json.dumps(dataclasses.asdict(config), sort_keys=True), "content": content, "dtype": dtype}


def jit_forward(
    forward: Callable[[PyTree, PairBatch], Any], mesh: Mesh, config: DecoderConfig, micro_batches: int = 1
) -> Callable[[PyTree, PairBatch], Any]:
    """``forward(params, batch)``, arrays ``[B, ...]`` or ``[R, ...]``, compiled for a mesh.

    It goes through a batch in the train step's micro-batches, so that both see the same shapes.
    """

    def whole(params: PyTree, batch: PairBatch) -> Any:
        if micro_batches == 1:
            return forward(params, batch)
        R = packing_of(batch).padded_index.shape[0]
        parts = jax.lax.map(lambda micro: forward(params, micro), split_micro(batch, micro_batches, R))
        return jax.tree.map(lambda x: join_micro(x, R), parts)

    by_batch = batch_sharding(mesh)
    shardings, options = (param_shardings(mesh, config), by_batch), compiler_options(mesh)
    return jax.jit(whole, in_shardings=shardings, out_shardings=by_batch, compiler_options=options)


def make_logps_step(
    apply_fn: ApplyFn, mesh: Mesh, config: DecoderConfig, *, chunk_tokens: int, micro_batches: int = 1
) -> LogpsStep:
    """A jitted ``logps_step(params, batch) -> [B, N]``: sums over each completion's tokens, nats."""

    def logps(params: PyTree, batch: PairBatch) -> Float[Array, "B N"]:
        return completion_logps(apply_fn, params, batch, chunk_tokens=chunk_tokens, mesh=mesh)

    return jit_forward(logps, mesh, config, micro_batches)


def collect_logps(
    step: LogpsStep,
    params: PyTree | Callable[[], PyTree],
    batches: Batches,
    mesh: Mesh,
    label: str,
    limit: int | None = None,
    cache: LogpsCache | None = None,
) -> np.ndarray:
    """Log-probabilities of every example in the first ``limit`` batches (default: all), ``[n, N]``; NaN elsewhere.

    Each example is computed once, however many epochs the batches run over, and not at all if the cache has it.

    Args:
      step: computes a batch's.
      params: on the devices; or a function that gives them, which is called if anything is to be computed.
      batches: what to go through.
      mesh: where.
      label: names the stage on the console.
      limit: of batches.
      cache: log-probabilities that are known; new ones are added.
    """
    n, N = batches.completions.shape
    keys = batches.examples.keys
    sums = np.full((n, N), np.nan, np.float32) if cache is None else processes.array_from_first(cache.get(keys))
    unknown = lambda i: bool(np.isnan(sums[batches.indices[i]]).any())  # noqa: E731
    todo = [i for i in range(batches.first_pass(limit)) if unknown(i)] if np.isnan(sums).any() else []
    if cache is not None and np.isfinite(sums).any():
        console.print(f"{label}: {np.isfinite(sums[:, 0]).sum()} of {n} rows from the cache")
    if not todo:
        return sums
    on_mesh = params() if callable(params) else params
    try:
        for i in track(todo, label):
            if not unknown(i):  # a mixture draws rows of a small part again and again
                continue
            item = batches.collate(batches.indices[i])
            got = processes.fetch(step(on_mesh, put_batch(item.batch, mesh)))
            # A batch may run over the epoch's end, or over rows of the cache.
            new = (item.index >= 0) & np.isnan(sums[item.index, 0])
            sums[item.index[new]] = got[new]
            if cache is not None:
                cache.add(keys[item.index[new]], got[new])
    finally:
        if cache is not None:
            cache.write()
    return sums
