"""Sampling from the decoder: one prefill of each prompt, then one token at a time against a KV cache.

The layers are those of training (:func:`~dpojax.models.block.block`); their weights have a layout for one token at a
time.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dpojax.generate.sampling import next_token, token_logp
from dpojax.logprobs import logits_of
from dpojax.models.attention import attend, causal
from dpojax.models.block import Cache, Flat, Fused, Weights, fused_name
from dpojax.models.config import DecoderConfig, LayerKind
from dpojax.models.decoder import embed, final_norm, rotary_mix, unembedding_of, unrolled_layers
from dpojax.models.lora import check_merged
from dpojax.models.params import param_shardings
from dpojax.sharding import batch_sharding, replicated
from dpojax.types import PyTree


class Samples(NamedTuple):
    """Completions drawn from a model, n of each prompt; arrays may be NumPy's.

    ``tokens`` are 0 beyond a completion's end, ``lengths`` count them, an EOS that was drawn included. ``logps`` are
    log p(token | prefix) under the model itself (temperature 1, no nucleus), nats, 0 beyond the end. ``ended`` is true
    where an EOS was drawn, and false where the completion was cut at the limit of new tokens.
    """

    tokens: Int[Array, "B n C"]
    lengths: Int[Array, "B n"]
    logps: Float[Array, "B n C"]
    ended: Bool[Array, "B n"]

    def lists(self) -> list[list[list[int]]]:
        """The completions as lists of token ids, by prompt."""
        tokens, lengths = np.asarray(self.tokens).tolist(), np.asarray(self.lengths).tolist()
        return [
            [row[:n] for row, n in zip(rows, ends, strict=True)] for rows, ends in zip(tokens, lengths, strict=True)
        ]

    def texts(self, tokenizer: Any) -> list[list[str]]:
        """The completions as text, by prompt, without special tokens and without the EOS that ended them.

        Args:
          tokenizer: a transformers tokenizer, or what decodes as one does.
        """
        ended = np.asarray(self.ended).tolist()
        bare = [
            [row[:-1] if end else row for row, end in zip(rows, ends, strict=True)]
            for rows, ends in zip(self.lists(), ended, strict=True)
        ]
        return [[tokenizer.decode(row, skip_special_tokens=True) for row in rows] for rows in bare]


Sampler = Callable[[PyTree, Int[Array, "B P"], Int[Array, " B"], PRNGKeyArray], Samples]


class DecodeState(NamedTuple):
    """The tokens drawn so far, and the key for those to come."""

    n: Int[Array, ""]
    done: Bool[Array, " B"]
    lengths: Int[Array, " B"]
    tokens: Int[Array, "B C"]
    logps: Float[Array, "B C"]
    key: PRNGKeyArray

    @classmethod
    def empty(cls, B: int, C: int, key: PRNGKeyArray) -> "DecodeState":
        tokens, logps = jnp.zeros((B, C), jnp.int32), jnp.zeros((B, C), jnp.float32)
        return cls(jnp.int32(0), jnp.zeros(B, bool), jnp.zeros(B, jnp.int32), tokens, logps, key)

    def add(
        self, logits_BV: Float[Array, "B V"], eos_ids: tuple[int, ...], *, temperature: float, top_p: float
    ) -> "DecodeState":
        """The state with a further token of every completion that has not ended."""
        key, now = jax.random.split(self.key)
        token = jnp.where(self.done, 0, next_token(logits_BV, now, temperature=temperature, top_p=top_p))
        logp = jnp.where(self.done, 0.0, token_logp(logits_BV, token))
        done = self.done | jnp.isin(token, jnp.array(eos_ids, jnp.int32))
        tokens, logps = self.tokens.at[:, self.n].set(token), self.logps.at[:, self.n].set(logp)
        return DecodeState(self.n + 1, done, self.lengths + ~self.done, tokens, logps, key)


def attend_one(
    q: Float[Array, "B 1 H h"],
    keys: Float[Array, "B K h S"],
    values: Float[Array, "B K S h"],
    sees: Bool[Array, "B S"],
    softcap: float | None = None,
) -> Float[Array, "B 1 H h"]:
    """The newest token's attention to the KV cache, softmax in float32."""
    B, _, H, h = q.shape
    grouped = q.reshape(B, keys.shape[1], -1, h)
    scores = jnp.einsum("bkgh,bkhs->bkgs", grouped, keys, preferred_element_type=jnp.float32) * h**-0.5
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    p = jax.nn.softmax(jnp.where(sees[:, None, None, :], scores, -1e30), axis=-1).astype(values.dtype)
    return jnp.einsum("bkgs,bksh->bkgh", p, values).reshape(B, 1, H, h)


def decode_layout(config: DecoderConfig, params: PyTree, dtype: jnp.dtype) -> list[Weights]:
    """Every layer's weights for one token at a time, where reading weights is nearly all the work, in a compute dtype.

    Weights that are multiplied with the same input lie in one matrix, and the axis that a product sums over is the
    last: so XLA's CPU compiler reads them fastest.
    """
    D = config.width
    inputs = [("q", "k", "v"), ("gate", "up") if config.mlp.gated else ("up",)]

    def of_layer(weights: Weights) -> Weights:
        out = {
            name: x.astype(dtype) for name, x in weights.items() if x.ndim == 1 or name.endswith("_norm")
        }  # norms and biases
        for names in inputs:
            matrix = jnp.concatenate([weights[name].reshape(D, -1).T for name in names]).astype(dtype)
            biases = [weights[f"{name}_bias"].reshape(-1) for name in names if f"{name}_bias" in weights]
            bias = jnp.concatenate(biases).astype(dtype) if biases else None
            out[fused_name(names)] = Fused(matrix, bias, tuple(weights[name].shape[1:] for name in names))
        return out | {name: Flat(weights[name].reshape(D, -1).astype(dtype)) for name in ("o", "down")}

    return [of_layer({name: x[i] for name, x in params["blocks"].items()}) for i in range(config.layers)]


def make_sampler(
    config: DecoderConfig,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    num_samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    dtype: str = "float32",
    mesh: Mesh | None = None,
) -> Sampler:
    """A jitted ``sample(params, prompt, prompt_len, key) -> Samples``.

    Args:
      config: the decoder's choices.
      max_new_tokens: C, tokens drawn at most.
      eos_ids: tokens that end a completion; the one drawn is its last token and counts.
      num_samples: n, completions of each prompt; the prompt is computed once.
      temperature: 0 for the most probable token each time.
      top_p: probability mass of the nucleus sampled from; 1 for all of it.
      dtype: compute dtype.
      mesh: devices that split the prompts, and on which the parameters lie (default: wherever the parameters are).

    The prompts are ``[B, P]``, padded on the left, their lengths in ``prompt_len``.
    """
    check_merged(config)
    C, n, compute = max_new_tokens, num_samples, jnp.dtype(dtype)

    def sample(params: PyTree, prompt: Int[Array, "B P"], prompt_len: Int[Array, " B"], key: PRNGKeyArray) -> Samples:
        B, P = prompt.shape
        layers = decode_layout(config, params, compute)
        head = jax.tree.map(lambda x: x.astype(compute), unembedding_of(config, params))
        h, caches = _prefill(config, params, layers, prompt, prompt_len, room=C, dtype=compute)
        h, caches, starts = jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), (h, caches, P - prompt_len))
        slots = jnp.arange(P + C)
        positions = slots[None, :] - starts[:, None]

        def add_token(h_BTD: Float[Array, "B T D"], state: DecodeState) -> DecodeState:
            logits = logits_of(h_BTD[:, -1:], head)[:, 0]
            return state.add(logits, eos_ids, temperature=temperature, top_p=top_p)

        def step(carry: tuple[DecodeState, Any]) -> tuple[DecodeState, Any]:
            state, caches = carry
            slot = P + state.n - 1  # of the newest token, which is yet to be computed
            token = jax.lax.dynamic_slice_in_dim(state.tokens, state.n - 1, 1, axis=1)
            at = jax.lax.dynamic_slice_in_dim(positions, slot, 1, axis=1)

            def extend(kind: LayerKind, q: Array, k: Array, v: Array, cache: Cache) -> tuple[Array, Cache]:
                assert cache is not None
                put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot)
                keys, values = put(cache[0], k.transpose(0, 2, 3, 1), axis=3), put(cache[1], v.swapaxes(1, 2), axis=2)
                sees = (positions >= 0) & (slots[None, :] <= slot)
                if kind.window is not None:
                    sees &= slots[None, :] > slot - kind.window
                return attend_one(q, keys, values, sees, config.attention.softcap), (keys, values)

            x = embed(config, params, token, at).astype(compute)
            x, caches = unrolled_layers(config, layers, x, rotary_mix(config, at, extend), caches)
            return add_token(final_norm(config, params, x), state), caches

        first = add_token(h, DecodeState.empty(B * n, C, key))
        unfinished = lambda carry: (carry[0].n < C) & ~jnp.all(carry[0].done)  # noqa: E731
        state, _ = jax.lax.while_loop(unfinished, step, (first, caches))
        drawn = (state.tokens, state.lengths, state.logps, state.done)
        return Samples(*(x.reshape(B, n, *x.shape[1:]) for x in drawn))

    if mesh is None:
        return jax.jit(sample)
    by_batch = batch_sharding(mesh)
    shardings = (param_shardings(mesh, config), by_batch, by_batch, replicated(mesh))
    return jax.jit(sample, in_shardings=shardings, out_shardings=by_batch)


def _prefill(
    config: DecoderConfig,
    params: PyTree,
    layers: Sequence[Weights],
    prompt: Int[Array, "B P"],
    prompt_len: Int[Array, " B"],
    *,
    room: int,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "B P D"], list[Cache]]:
    """The prompts' hidden states, and their KV caches with room for ``room`` more tokens."""
    P = prompt.shape[1]
    positions = jnp.arange(P)[None, :] - (P - prompt_len[:, None])

    def store(kind: LayerKind, q: Array, k: Array, v: Array, cache: Cache) -> tuple[Array, Cache]:
        none, more = (0, 0), (0, room)
        keys = jnp.pad(k.transpose(0, 2, 3, 1), [none, none, none, more])
        values = jnp.pad(v.swapaxes(1, 2), [none, none, more, none])
        mask = causal(P, kind.window) & (positions >= 0)[:, None, :]
        return attend(q, k, v, mask, config.attention.softcap), (keys, values)

    at = jnp.maximum(positions, 0)
    x = embed(config, params, prompt, at).astype(dtype)
    x, caches = unrolled_layers(config, layers, x, rotary_mix(config, at, store))
    return final_norm(config, params, x), caches


def pad_left(rows: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token lists as ``([B, width], lengths [B])``, padded on the left."""
    out = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        out[i, width - len(row) :] = row
    return out, np.array([len(row) for row in rows], np.int32)


def sample_all(
    sampler: Sampler,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    seed: int = 0,
    track: Callable[[Sequence[int]], Iterable[int]] = lambda batches: batches,
) -> Samples:
    """The completions of every prompt, in order, ``[prompts, n, C]`` NumPy arrays.

    Args:
      sampler: from :func:`make_sampler`.
      params: the model's parameters.
      prompts: token ids, any lengths above 0.
      batch_size: prompts computed side by side. All batches have one shape, so there is one compilation.
      seed: of the draws.
      track: may wrap the range over batches with a progress bar.
    """
    width = -(-max(len(prompt) for prompt in prompts) // 8) * 8
    parts = []
    keys = jax.random.split(jax.random.key(seed), -(-len(prompts) // batch_size))
    for i in track(range(len(keys))):
        rows = list(prompts[i * batch_size : (i + 1) * batch_size])
        padded = rows + [rows[-1]] * (batch_size - len(rows))
        prompt, prompt_len = pad_left(padded, width)
        drawn = sampler(params, jnp.asarray(prompt), jnp.asarray(prompt_len), keys[i])
        real = len(rows)
        parts.append(jax.tree.map(lambda x, real=real: np.asarray(x)[:real], drawn))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)
