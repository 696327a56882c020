"""The reference's log-probabilities: the forward pass alone, over all rows once or for one batch."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dpojax.configs import DPOConfig, TrainOptions
from dpojax.data import Batches, Example, IndexedBatch
from dpojax.logprobs import completion_logps, streams
from dpojax.models import DecoderConfig, Model
from dpojax.progress import track
from dpojax.sharding import batch_sharding, param_shardings, put_global
from dpojax.train.step import join_micro, split_micro
from dpojax.types import ApplyFn, PairBatch, PairLogps, PyTree

LogpsStep = Callable[[PyTree, PairBatch], Float[Array, "B N"]]


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
    """A jitted ``logps_step(params, batch) -> [B, N]``: sums over each completion's tokens, nats.

    It goes through a batch in the train step's micro-batches, so that both see the same shapes.
    """

    def logps(params: PyTree, batch: PairBatch) -> Float[Array, "B N"]:
        one = lambda micro: completion_logps(apply_fn, params, micro, chunk_tokens=chunk_tokens)  # noqa: E731
        if micro_batches == 1:
            return one(batch)
        R = streams(batch)[0].shape[0]
        return join_micro(jax.lax.map(one, split_micro(batch, micro_batches, R)), R)

    rows = batch_sharding(mesh)
    return jax.jit(logps, in_shardings=(param_shardings(mesh, config), rows), out_shardings=rows)


def pair_of_sums(sums: Float[Array | np.ndarray, "B 2"], lengths: Array | np.ndarray) -> PairLogps:
    """``[B, 2]`` sums and lengths as :class:`~dpojax.types.PairLogps`."""
    chosen, rejected = sums[:, 0], sums[:, 1]
    return PairLogps(chosen, rejected, lengths[:, 0], lengths[:, 1])  # type: ignore[arg-type]  # NumPy too


def completion_lengths(examples: Sequence[Example]) -> np.ndarray:
    """``[n, N]`` completion tokens."""
    return np.array([[len(completion) for completion in example.completions] for example in examples], np.int32)


def collect_logps(
    step: LogpsStep, params: PyTree, batches: Batches, mesh: Mesh, label: str, limit: int | None = None
) -> np.ndarray:
    """Log-probabilities of every example in the first ``limit`` batches (default: all), ``[n, N]``; NaN elsewhere.

    Each example is computed once, however many epochs the batches run over.
    """
    n, N = len(batches.examples), len(batches.examples[0].completions)
    sums = np.full((n, N), np.nan, np.float32)
    rows = batch_sharding(mesh)

    def unseen() -> Iterator[IndexedBatch]:
        for i in range(first_pass):
            index = batches.indices[i]
            if np.isnan(sums[index]).any():
                yield batches.collate(index)

    # An epoch visits every example, so later ones have nothing new.
    first_pass = min(limit or len(batches), len(batches), -(-n // batches.batch_size))
    for item in track(unseen(), label, total=first_pass):
        got = np.asarray(step(params, put_global(item.batch, rows)))
        new = (item.index >= 0) & np.isnan(sums[item.index, 0])  # a batch may run over the epoch's end and repeat some
        sums[item.index[new]] = got[new]
    return sums


class Reference:
    """The frozen reference as the train step meets it: log-probabilities of a batch, cached or live.

    Cached, every row's are computed once, before training, and written beside the run; the parameters are let go.
    Live, the parameters stay and every batch costs one more forward pass.
    """

    def __init__(self, config: TrainOptions, logps_step: LogpsStep, mesh: Mesh, model: Model, facts: dict[str, str]):
        self.needed = isinstance(config, DPOConfig)
        self.live = isinstance(config, DPOConfig) and config.reference == "live"
        self.logps_step, self.mesh = logps_step, mesh
        self.model: Model | None = model
        self.key = "/".join([*facts.values(), config.dtype])
        self.params: PyTree = None
        self.sums: np.ndarray | None = None
        self.eval_sums: np.ndarray | None = None

    def prepare(self, batches: Batches, eval_batches: Batches | None, total_steps: int, path: Path) -> None:
        """Compute, or read back from ``path``, what ``total_steps`` of training will ask for."""
        if not self.needed:
            return
        assert self.model is not None
        stored = dict(np.load(path)) if path.exists() else {}
        if not self.live and str(stored.get("key")) == self.key:
            self.sums = stored["train"]
            self.eval_sums = stored["eval"] if stored["eval"].size else None
        else:
            shardings = param_shardings(self.mesh, self.model.config)
            # A copy of its own: the policy's buffers, which may be the same host memory, are donated.
            self.params = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=shardings)(
                put_global(self.model.params, shardings)
            )
            if eval_batches is not None:
                label = "Reference log-probabilities, held-out"
                self.eval_sums = collect_logps(self.logps_step, self.params, eval_batches, self.mesh, label)
            if not self.live:
                label = "Reference log-probabilities"
                self.sums = collect_logps(self.logps_step, self.params, batches, self.mesh, label, total_steps)
                eval_sums = np.zeros((0, 2), np.float32) if self.eval_sums is None else self.eval_sums
                partial = path.with_suffix(".partial.npz")
                np.savez(partial, key=self.key, train=self.sums, eval=eval_sums)
                partial.replace(path)
                self.params = None
        self.model = None

    def of(self, item: IndexedBatch) -> PairLogps | None:
        """The reference's log-probabilities of a batch; None where no objective reads them (SFT)."""
        if not self.needed:
            return None
        rows = batch_sharding(self.mesh)
        if self.live:
            return ref_step(self.logps_step, self.params, put_global(item.batch, rows))
        assert self.sums is not None
        sums = np.where(item.index[:, None] >= 0, self.sums[item.index], 0.0)
        return put_global(pair_of_sums(sums, item.batch.completion_len), rows)


def ref_step(logps_step: LogpsStep, ref_params: PyTree, batch: PairBatch) -> PairLogps:
    """A live reference's log-probabilities of a batch that lies on the mesh."""
    return pair_of_sums(logps_step(ref_params, batch), batch.completion_len)
