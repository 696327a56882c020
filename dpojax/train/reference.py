"""The reference's log-probabilities: the forward pass alone, over all rows once or for one batch."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dpojax.configs import DPOConfig, TrainOptions
from dpojax.data import Batches, IndexedBatch
from dpojax.logprobs import completion_logps, completion_stats
from dpojax.losses import Traits
from dpojax.models import DecoderConfig, Model
from dpojax.models.decoder import unembedding
from dpojax.packing import PairBatch
from dpojax.progress import console, track
from dpojax.sharding import batch_sharding, param_shardings, put_global
from dpojax.train.logps_cache import LogpsCache
from dpojax.train.objectives import logps_of
from dpojax.train.step import jit_forward
from dpojax.types import ApplyFn, CompletionStats, PyTree, ReferenceOutput

LogpsStep = Callable[[PyTree, PairBatch], Float[Array, "B N"]]
RefStep = Callable[[PyTree, PairBatch], ReferenceOutput]


def content_hash(params: PyTree) -> str:
    """A fingerprint of a parameter tree: names, shapes and every byte; the reference's identity in checkpoints."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda item: str(item[0])):
        x = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype}".encode())
        digest.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def make_logps_step(
    apply_fn: ApplyFn, mesh: Mesh, config: DecoderConfig, *, chunk_tokens: int, micro_batches: int = 1
) -> LogpsStep:
    """A jitted ``logps_step(params, batch) -> [B, N]``: sums over each completion's tokens, nats."""

    def logps(params: PyTree, batch: PairBatch) -> Float[Array, "B N"]:
        return completion_logps(apply_fn, params, batch, chunk_tokens=chunk_tokens)

    return jit_forward(logps, mesh, config, micro_batches)


def make_ref_step(
    apply_fn: ApplyFn,
    mesh: Mesh,
    config: DecoderConfig,
    traits: Traits,
    *,
    chunk_tokens: int,
    micro_batches: int = 1,
) -> RefStep:
    """A jitted ``ref_step(params, batch)``: what an objective of these traits reads of a live reference."""
    reads = (traits.reads & {"tokens"}) | ({"hidden"} if "kl" in traits.reads else set())

    def stats(params: PyTree, batch: PairBatch) -> CompletionStats:
        return completion_stats(apply_fn, params, batch, chunk_tokens=chunk_tokens, reads=frozenset(reads))

    def output(stats: CompletionStats, batch: PairBatch) -> ReferenceOutput:
        return ReferenceOutput(logps_of(stats, batch, traits), stats.hidden)

    forward = jit_forward(stats, mesh, config, micro_batches)
    shape = jax.jit(output, out_shardings=batch_sharding(mesh))

    def ref_step(params: PyTree, batch: PairBatch) -> ReferenceOutput:
        ref = shape(forward(params, batch), batch)
        return dataclasses.replace(ref, head=params[unembedding(config)]) if "kl" in traits.reads else ref

    return ref_step


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
    ``params`` may be a function, which is called if anything is to be computed.
    """
    n, N = batches.completions.shape
    sums = np.full((n, N), np.nan, np.float32) if cache is None else cache.get(batches.examples)
    rows = batch_sharding(mesh)
    todo = [i for i in range(batches.first_pass(limit)) if np.isnan(sums[batches.indices[i]]).any()]
    if cache is not None and np.isfinite(sums).any():
        console.print(f"{label}: {np.isfinite(sums[:, 0]).sum()} of {n} rows from the cache")
    if not todo:
        return sums
    on_mesh = params() if callable(params) else params
    try:
        for i in track(todo, label):
            item = batches.collate(batches.indices[i])
            got = np.asarray(step(on_mesh, put_global(item.batch, rows)))
            # A batch may run over the epoch's end, or over rows of the cache.
            new = (item.index >= 0) & np.isnan(sums[item.index, 0])
            sums[item.index[new]] = got[new]
            if cache is not None:
                cache.add([batches.examples[i] for i in item.index[new]], got[new])
    finally:
        if cache is not None:
            cache.write()
    return sums


def model_key(config: DecoderConfig, content: str, dtype: str) -> dict[str, str | int]:
    """What computes log-probabilities, in named fields: a model's shape and content, and the compute dtype."""
    shape = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return {"config": shape, "content": content, "dtype": dtype}


def is_live(config: DPOConfig, traits: Traits) -> bool:
    """Whether the reference runs in every step: asked for, because it moves, or because the cache holds sums alone."""
    return config.reference == "live" or config.sync_ref_model or traits.needs_live_reference


@functools.partial(jax.jit, donate_argnums=0)
def mix(ref: PyTree, policy: PyTree, alpha: float) -> PyTree:
    """``alpha policy + (1 - alpha) ref``, exactly the policy at alpha 1."""
    return jax.tree.map(lambda r, p: jnp.where(alpha == 1, p, alpha * p + (1 - alpha) * r), ref, policy)


class Reference:
    """The frozen reference as the train step meets it: log-probabilities of a batch, cached or live.

    Cached, every row's are computed once for all runs, before training, and kept beside the data
    (:class:`~dpojax.train.logps_cache.LogpsCache`); the parameters are never on the devices, or let go. Live, they
    stay, and every batch costs one more forward pass. With ``sync_ref_model`` they move (Gorbatovski et al. 2024,
    TR-DPO, arXiv 2404.09656): ``ref <- alpha policy + (1 - alpha) ref`` every so many steps.
    """

    def __init__(
        self,
        config: TrainOptions,
        traits: Traits,
        logps_step: LogpsStep,
        ref_step: RefStep,
        mesh: Mesh,
        model: Model,
        model_hash: str,
    ):
        self.needed = isinstance(config, DPOConfig) and traits.reference
        self.live = isinstance(config, DPOConfig) and is_live(config, traits)
        self.traits, self.logps_step, self.ref_step, self.mesh, self.config = traits, logps_step, ref_step, mesh, config
        self.moves = isinstance(config, DPOConfig) and config.sync_ref_model
        self.model: Model | None = model
        self.key = model_key(model.config, model_hash, config.dtype)
        self.params: PyTree = None
        self.sums: np.ndarray | None = None
        self.eval_sums: np.ndarray | None = None

    def prepare(self, batches: Batches, eval_batches: Batches | None, total_steps: int) -> None:
        """Compute, or find in the cache, what ``total_steps`` of training will ask for."""
        if not self.needed:
            self.model = None
            return
        if self.live:
            if isinstance(self.config, DPOConfig) and self.config.reference == "auto" and not self.moves:
                console.print("  the objective reads single tokens of the reference, which runs in every step")
            self._on_devices()
        else:
            # First, and so in the run's own batches, whose rounding is then the steps' own.
            self.sums = self._collect(batches, self.config.data[0], "Reference log-probabilities", total_steps)
        if eval_batches is not None and not self.moves and not (self.live and self.traits.needs_forward_pass):
            label = "Reference log-probabilities, held-out"
            self.eval_sums = self._collect(eval_batches, self.config.eval_data[0], label)
        if not self.live:
            self.params = None
        self.model = None

    def follow(self, step: int, policy: PyTree) -> None:
        """After a step: move towards the policy, if it is time to."""
        if not self.moves:
            return
        assert isinstance(self.config, DPOConfig)
        if step % (self.config.ref_model_sync_steps or 512) == 0:
            alpha = self.config.ref_model_mixup_alpha or 0.6
            self.params = mix(self.params, policy, alpha)

    def _on_devices(self) -> PyTree:
        if self.params is None:
            assert self.model is not None
            shardings = param_shardings(self.mesh, self.model.config)
            # A copy of its own: the policy's buffers, which may be the same host memory, are donated.
            copy = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=shardings)
            self.params = copy(put_global(self.model.params, shardings))
        return self.params

    def _collect(self, batches: Batches, file: str, label: str, limit: int | None = None) -> np.ndarray:
        cache = LogpsCache(file, self.key, batches.completions.shape[1])
        return collect_logps(self.logps_step, self._on_devices, batches, self.mesh, label, limit, cache)

    def of(self, item: IndexedBatch, *, held_out: bool = False) -> ReferenceOutput | None:
        """The reference's log-probabilities of a batch; None where no objective reads them."""
        if not self.needed:
            return None
        rows = batch_sharding(self.mesh)
        if self.live:
            whole = dataclasses.replace(item.batch, hidden=None)  # the reference may have another trunk
            return self.ref_step(self.params, put_global(whole, rows))
        known = self.eval_sums if held_out else self.sums
        assert known is not None
        sums = np.where(item.index[:, None] >= 0, known[item.index], 0.0)
        return put_global(ReferenceOutput(logps_of(CompletionStats(sums), item.batch, self.traits)), rows)  # type: ignore[arg-type]
