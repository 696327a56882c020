"""Log-probabilities of any examples under any parameters of one model."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from dpojax.configs import MeshConfig, ScoringOptions
from dpojax.data import Batches, Encoder, Example
from dpojax.models import DecoderConfig, make_apply
from dpojax.sharding import batch_shards, constrainer, make_mesh, param_shardings, put_global
from dpojax.train.checkpoint import load_policy, tokenizer_for
from dpojax.train.reference import collect_logps, completion_lengths, make_logps_step
from dpojax.train.setup import check_fit, read_examples
from dpojax.types import PyTree

Scorer = Callable[[PyTree, list[Example], str], np.ndarray]


def make_scorer(
    config: DecoderConfig, *, dtype: str = "float32", batch_size: int = 8, max_shapes: int = 8, chunk_tokens: int = 512
) -> Scorer:
    """``score(params, examples, label) -> [n, N]``: each completion's summed log-probability, in order, nats.

    Batches hold rows of similar length, at least ``batch_size`` of them and a multiple of the devices. ``label``
    names the stage on the console.
    """
    devices = jax.device_count()
    rows = -(-batch_size // devices) * devices
    mesh = make_mesh(MeshConfig(), config, rows)
    step = make_logps_step(
        make_apply(config, dtype=dtype, constrain=constrainer(mesh)), mesh, config, chunk_tokens=chunk_tokens
    )

    def score(params: PyTree, examples: list[Example], label: str) -> np.ndarray:
        on_mesh = put_global(params, param_shardings(mesh, config))
        batches = Batches(examples, rows, max_shapes=max_shapes, streams=batch_shards(mesh))
        return collect_logps(step, on_mesh, batches, mesh, label)

    return score


class FileScores:
    """A file's pairs in tokens, and a model's log-probabilities of them."""

    def __init__(self, config: ScoringOptions):
        tokenizer = tokenizer_for(config)
        self.config = config
        self.examples = read_examples(config.data, Encoder(tokenizer), "pairs", config)
        self.lengths = completion_lengths(self.examples)
        self.prompts = [example.prompt.tobytes() for example in self.examples]

    def of(self, name: str) -> np.ndarray:
        """``[n, 2]`` log-probabilities (chosen, rejected) under the model of this name, nats."""
        config, model = self.config, load_policy(name)
        check_fit(model, self.examples, config.tokenizer or name)
        scorer = make_scorer(
            model.config,
            dtype=config.dtype,
            batch_size=config.batch_size,
            max_shapes=config.max_shapes,
            chunk_tokens=config.logprob_chunk_tokens,
        )
        return scorer(model.params, self.examples, f"Log-probabilities, {Path(name).name}")
