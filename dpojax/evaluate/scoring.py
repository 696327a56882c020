"""Log-probabilities, or rewards, of any examples under any parameters of one model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dpojax.configs import MeshConfig, PassOptions, ScoringOptions
from dpojax.data import PAIRS, Batches, Encoder, Example, lengths_only
from dpojax.data.batches import target_lengths
from dpojax.logprobs import completion_rewards, pair_up
from dpojax.models import DecoderConfig, abstract_params, check_divides, fingerprint
from dpojax.packing import ApplyFn, PairBatch
from dpojax.sharding import auto_mesh, batch_shards, held_sequences, make_mesh
from dpojax.startup import keep_memory
from dpojax.train.by_name import open_policy, tokenizer_for
from dpojax.train.inputs import check_fit, encoding_of, read_examples
from dpojax.train.logps_cache import LogpsCache
from dpojax.train.scoring import (
    LogpsStep,
    apply_on,
    collect_logps,
    jit_forward,
    make_logps_step,
    model_key,
    place_params,
)
from dpojax.types import CompletionStats, PyTree

Scorer = Callable[..., np.ndarray]


def scoring_mesh(config: DecoderConfig) -> Mesh:
    """All devices, each with a copy of the model; they share one where it takes over half of a device's memory."""
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_params(config)))
    return make_mesh(auto_mesh(MeshConfig(), jax.devices(), held, share=0.5))


def forward_over_mesh(config: DecoderConfig, dtype: str, attention: str, batch_size: int) -> tuple[ApplyFn, Mesh, int]:
    """The model over all devices, their mesh, and the smallest batch size from ``batch_size`` on that they divide."""
    devices = jax.device_count()
    batch_size = -(-batch_size // devices) * devices
    mesh = scoring_mesh(config)
    check_divides(mesh, config)
    return apply_on(config, mesh, PassOptions(dtype=dtype, attention=attention)), mesh, batch_size  # type: ignore[arg-type]


def make_scorer(
    config: DecoderConfig,
    *,
    dtype: str = "float32",
    attention: str = "auto",
    batch_size: int = 8,
    max_shapes: int = 8,
    chunk_tokens: int = 512,
) -> Scorer:
    """``score(params, examples, label, cache=None) -> [n, N]``: completions' summed log-probabilities, in order, nats.

    Batches hold like numbers of tokens, in at least ``batch_size`` rows and a multiple of the devices. ``label``
    names the stage on the console.
    """
    apply_fn, mesh, batch_size = forward_over_mesh(config, dtype, attention, batch_size)
    step = make_logps_step(apply_fn, mesh, config, chunk_tokens=chunk_tokens)
    return over_batches(step, config, mesh, batch_size, max_shapes)


def over_batches(step: LogpsStep, config: DecoderConfig, mesh: Mesh, batch_size: int, max_shapes: int) -> Scorer:
    """``score(params, examples, label, cache=None) -> [n, N]``: what a step gives of every completion, in order."""

    def score(params: PyTree, examples: Sequence[Example], label: str, cache: LogpsCache | None = None) -> np.ndarray:
        on_mesh = lambda: place_params(params, mesh, config)  # noqa: E731
        R = batch_shards(mesh)
        batches = Batches(examples, batch_size, max_shapes=max_shapes, sequences=R, held=held_sequences(mesh, R))
        return collect_logps(step, on_mesh, batches, mesh, label, cache=cache)

    return score


def make_rewarder(
    config: DecoderConfig,
    *,
    dtype: str = "float32",
    attention: str = "auto",
    batch_size: int = 8,
    max_shapes: int = 8,
) -> Scorer:
    """``reward(params, examples, label) -> [n, N]``: a reward model's scores of completions, in order.

    Arguments as of :func:`make_scorer`; the parameters have a head of one score (``config.reward``).
    """
    apply_fn, mesh, batch_size = forward_over_mesh(config, dtype, attention, batch_size)

    def rewards(params: PyTree, batch: PairBatch) -> Float[Array, "B N"]:
        return completion_rewards(apply_fn, params, batch)

    return over_batches(jit_forward(rewards, mesh, config), config, mesh, batch_size, max_shapes)


class FileScores:
    """A file's pairs in tokens, and a model's log-probabilities of them."""

    def __init__(self, config: ScoringOptions):
        tokenizer = tokenizer_for(config)
        self.config = config
        encoder = Encoder(tokenizer, encoding_of(config))
        self.examples, self.beside = read_examples(config.data, encoder, PAIRS, config)
        self.lengths = target_lengths(self.examples)

    def pairs(self, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """``[n, N]`` log-probabilities as those of pairs (chosen, rejected): ``[pairs, 2]``, their lengths, prompts."""
        both = pair_up(CompletionStats(sums), lengths_only(self.examples))  # type: ignore[arg-type]  # NumPy's
        there = np.asarray(both.chosen_len) > 0
        logps = np.stack([both.chosen, both.rejected], axis=1)[there]
        lengths = np.stack([both.chosen_len, both.rejected_len], axis=1)[there]
        each = len(there) // len(self.examples)
        return logps, lengths, np.repeat(self.examples.prompts, each)[there].tolist()

    def line(self, i: int, sums: np.ndarray) -> dict[str, Any]:
        """What `dpojax logps` writes of row i: of a pair, or of several completions, the best first."""
        n = int((self.examples.completion_len[i] > 0).sum())
        logps, lengths = sums[:n].tolist(), self.lengths[i, :n].tolist()
        if n > 2:
            return {"logps": logps, "len": lengths}
        names = ("chosen_logps", "rejected_logps", "chosen_len", "rejected_len")
        return dict(zip(names, (*logps, *lengths), strict=True))

    def of(self, name: str, adapter: str | None = None) -> np.ndarray:
        """``[n, N]`` log-probabilities of the completions under the model of this name, nats, with an adapter merged
        into it."""
        config, files = self.config, open_policy(name, adapter=adapter)
        check_fit(files.config, [self.examples], config.tokenizer or name)
        model = files.load(scoring_mesh(files.config))
        keep_memory()
        scorer = make_scorer(
            model.config,
            dtype=config.dtype,
            attention=config.attention,
            batch_size=config.batch_size,
            max_shapes=config.max_shapes,
            chunk_tokens=config.logprob_chunk_tokens,
        )
        key = model_key(model.config, fingerprint(model.params), config.dtype)
        cache = LogpsCache(self.beside, key, self.lengths.shape[1])
        return scorer(model.params, self.examples, f"Log-probabilities, {Path(name).name}", cache)
