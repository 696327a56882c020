"""What is measured of a policy on fresh samples: reward, KL, length, entropy, repetition, with standard errors."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dpojax.evaluate import estimate, make_kl_step
from dpojax.logprobs import completion_logps
from experiments.world import World

Figures = dict[str, dict[str, float]]
"""By name, a mean with its standard error over prompts, and how many prompts."""
TEXTS = 4
"""Samples that are kept as text."""


def repeated(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Share of each completion's tokens that stand in it before, ``[X, S]``."""
    earlier = np.zeros(tokens.shape, bool)
    for t in range(1, tokens.shape[-1]):
        earlier[..., t] = (tokens[..., :t] == tokens[..., t : t + 1]).any(axis=-1)
    inside = np.arange(tokens.shape[-1]) < lengths[..., None]
    return (earlier & inside).sum(axis=-1) / np.maximum(lengths, 1)


class Measured(NamedTuple):
    """Figures of a policy's samples, and some of the samples as (prompt, completion)."""

    figures: Figures
    texts: list[tuple[str, str]]


def make_measure(world: World, kind: str = "held_out") -> Callable[[Any, int], Measured]:
    """``measure(params, seed)`` of fresh samples of a policy, for the prompts of a kind.

    The KL is the exact one of the next-token distributions, summed along the samples; ``log_ratio`` is the mean
    log-ratio of the same samples, another estimate of it with a larger error. ``entropy`` is that of a completion, in
    nats, ``repeated`` the share of tokens that stand in their completion before.
    """
    prompts, n = world.prompts(kind), world.setting.eval_samples
    reference, mesh = world.reference, world.mesh
    kl_step = make_kl_step(world.apply_fn, mesh, reference.config)
    logps_step = jax.jit(lambda params, batch: completion_logps(world.apply_fn, params, batch, mesh=mesh))
    rows = max(1, min(len(prompts), world.setting.side_by_side // n))

    def measure(params: Any, seed: int) -> Measured:
        drawn = world.draw(params, prompts, n, seed)
        kls, refs = [], []
        for start in range(0, len(prompts), rows):
            some = slice(start, start + rows)
            samples = drawn.samples._replace(tokens=drawn.samples.tokens[some], lengths=drawn.samples.lengths[some])
            batch = world.batch(prompts[some], samples, rows)
            real = len(prompts[some])
            kls.append(np.asarray(kl_step(params, reference.params, batch))[:real])
            refs.append(np.asarray(logps_step(reference.params, batch))[:real])
        logps, lengths = drawn.logps, np.asarray(drawn.samples.lengths)
        values = {
            "reward": drawn.rewards,
            "kl": np.concatenate(kls),
            "log_ratio": logps - np.concatenate(refs),
            "length": lengths,
            "entropy": -logps,
            "repeated": repeated(np.asarray(drawn.samples.tokens), lengths),
        }
        figures = {name: dataclasses.asdict(estimate(np.mean(x, axis=1))) for name, x in values.items()}
        shown = range(0, len(prompts), max(1, len(prompts) // TEXTS))[:TEXTS]
        texts = jax.tree.map(lambda x: x[list(shown), :1], drawn.samples).texts(world.tokenizer)
        return Measured(figures, [(getattr(world.texts, kind)[i], row[0]) for i, row in zip(shown, texts, strict=True)])

    return measure
