"""A decoder so small that all its completions can be counted: everything about it is exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.generate import pad_left
from dpojax.logprobs import completion_logps
from dpojax.models import Attention, DecoderConfig, Learned, Mlp, Norm, init_params, make_apply
from dpojax.packing import PairBatch

V, C, EOS = 4, 2, 0
PROMPTS = [[1, 2], [3]]
# Positions are learned: with rotary ones, one layer cannot tell the prompt [3] from [3, 3].
CONFIG = DecoderConfig(
    vocab_size=V,
    width=16,
    layers=1,
    attention=Attention(heads=2, kv_heads=2, head_dim=8),
    mlp=Mlp(width=32),
    norm=Norm(eps=1e-5),
    positions=Learned(size=8),
    max_positions=8,
)
PARAMS = jax.tree.map(lambda x: x if (x == 1).all() else 5 * x, init_params(CONFIG, seed=0))
# EOS at once; or another token, and any second one: then EOS ends it or the limit cuts it.
COMPLETIONS = [(EOS,), *((first, second) for first in range(1, V) for second in range(V))]
TOKENS = np.array([row + (0,) * (C - len(row)) for row in COMPLETIONS], np.int32)
LENGTHS = np.array([len(row) for row in COMPLETIONS], np.int32)
X, Y = len(PROMPTS), len(COMPLETIONS)

_by_tokens = jnp.asarray(np.random.default_rng(0).normal(size=(X, V, V)).astype(np.float32))
REWARD = _by_tokens[:, TOKENS[:, 0], TOKENS[:, 1]]


@jax.jit
def reward(prompt, prompt_len, samples):
    """The samples' entries of the table REWARD."""
    which = jnp.where(prompt_len == 1, 1, 0)
    return _by_tokens[which[:, None], samples.tokens[..., 0], samples.tokens[..., 1]]


def batch_of(completions: np.ndarray, lengths: np.ndarray, prompts: list[list[int]] = PROMPTS) -> PairBatch:
    """The prompts with completions [B, N, C] of these lengths [B, N]."""
    prompt, prompt_len = map(jnp.asarray, pad_left(prompts, 2))
    return PairBatch(prompt, prompt_len, jnp.asarray(completions), jnp.asarray(lengths), jnp.ones(len(prompts)))


EVERY = batch_of(np.broadcast_to(TOKENS, (X, Y, C)), np.broadcast_to(LENGTHS, (X, Y)))
table = jax.jit(functools.partial(completion_logps, make_apply(CONFIG), batch=EVERY))
"""Log-probabilities of all completions under parameters, ``[X, Y]``."""
