"""Sampling from the decoder: one prefill of each prompt, then one token at a time against a KV cache.

The layers are those of training (:func:`~dpojax.models.block.block`); their weights have a layout for one token at a
time.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dpojax.generate.cache import attend_one, cache_of, put, seen, slots_of
from dpojax.generate.samples import Samples, stopped_length
from dpojax.generate.sampling import DrawOptions, next_token, penalized, token_logp
from dpojax.logprobs import logits_of
from dpojax.models.attention import attend, causal
from dpojax.models.block import Cache, Flat, Fused, Weights, fused_name
from dpojax.models.config import DecoderConfig, LayerKind
from dpojax.models.decoder import (
    embed,
    final_norm,
    rotary_mix,
    unembedding_of,
    unrolled_layers,
    weights_of_layer,
)
from dpojax.models.experts import NAMES as EXPERTS
from dpojax.models.params import param_shardings
from dpojax.sharding import batch_sharding, replicated
from dpojax.types import Head, PyTree

STOP_EVERY = 8  # tokens that are drawn between two looks at the text


Sampler = Callable[[PyTree, Int[Array, "B P"], Int[Array, " B"], PRNGKeyArray], Samples]
"""Parameters, prompts, their lengths, a key -> completions."""


class DecodeState(NamedTuple):
    """The tokens drawn so far, and the key for those to come; ``seen`` are those that a penalty is for."""

    n: Int[Array, ""]
    done: Bool[Array, " B"]
    lengths: Int[Array, " B"]
    tokens: Int[Array, "B C"]
    logps: Float[Array, "B C"]
    key: PRNGKeyArray
    seen: Bool[Array, "B V"] | None = None

    @classmethod
    def empty(cls, B: int, C: int, key: PRNGKeyArray, seen: Bool[Array, "B V"] | None = None) -> "DecodeState":
        tokens, logps = jnp.zeros((B, C), jnp.int32), jnp.zeros((B, C), jnp.float32)
        return cls(jnp.int32(0), jnp.zeros(B, bool), jnp.zeros(B, jnp.int32), tokens, logps, key, seen)

    def add(self, logits_BV: Float[Array, "B V"], eos_ids: tuple[int, ...], draw: DrawOptions) -> "DecodeState":
        """The state with a further token of every completion that has not ended."""
        key, now = jax.random.split(self.key)
        seen, from_these = self.seen, logits_BV
        if seen is not None:
            from_these = penalized(logits_BV, seen, draw.repetition_penalty)
        token = next_token(
            from_these, now, temperature=draw.temperature, top_p=draw.top_p, top_k=draw.top_k, min_p=draw.min_p
        )
        token = jnp.where(self.done, 0, token)
        logp = jnp.where(self.done, 0.0, token_logp(logits_BV, token))
        done = self.done | jnp.isin(token, jnp.array(eos_ids, jnp.int32))
        tokens, logps = self.tokens.at[:, self.n].set(token), self.logps.at[:, self.n].set(logp)
        if seen is not None:
            seen = seen.at[jnp.arange(len(token)), token].set(True)
        return DecodeState(self.n + 1, done, self.lengths + ~self.done, tokens, logps, key, seen)


class Layout(NamedTuple):
    """The weights as sampling reads them."""

    layers: list[Weights]
    head: Head


class Progress(NamedTuple):
    """How far a batch is: what was drawn, and the KV caches; the completions begin at column ``begin``, and a row's
    prompt at column ``starts``."""

    state: DecodeState
    caches: list[Cache]
    begin: Int[Array, ""]
    starts: Int[Array, " B"]


def decode_layout(config: DecoderConfig, params: PyTree, dtype: jnp.dtype) -> list[Weights]:
    """Every layer's weights for one token at a time, where reading weights is nearly all the work, in a compute dtype.

    Weights that are multiplied with the same input lie in one matrix, and the axis that a product sums over is the
    last: so XLA's CPU compiler reads them fastest. Those of experts stay as they are.
    """
    D, stacked = config.width, params["blocks"]
    inputs = [("q", "k", "v"), ("gate", "up") if config.mlp.gated else ("up",)]

    def of_layer(weights: Weights) -> Weights:
        out = {name: x.astype(dtype) for name, x in weights.items() if name in EXPERTS or x.ndim == 1}
        out |= {name: x for name, x in weights.items() if name.endswith("_norm")}  # an offset is added in float32
        for names in [names for names in inputs if names[0] in weights]:
            matrix = jnp.concatenate([weights[name].reshape(D, -1).T for name in names]).astype(dtype)
            biases = [weights[f"{name}_bias"].reshape(-1) for name in names if f"{name}_bias" in weights]
            bias = jnp.concatenate(biases).astype(dtype) if biases else None
            out[fused_name(names)] = Fused(matrix, bias, tuple(weights[name].shape[1:] for name in names))
        back = (name for name in ("o", "down") if name in weights)
        return out | {name: Flat(weights[name].reshape(D, -1).astype(dtype)) for name in back}

    return [of_layer(weights_of_layer(config, stacked, i)) for i in range(config.layers)]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The two programs of a sampler: ``begin`` computes prompts and draws their first tokens, ``go_on`` all others."""

    config: DecoderConfig
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    num_samples: int
    draw: DrawOptions
    dtype: jnp.dtype

    def begin(
        self, params: PyTree, prompt: Int[Array, "B P"], prompt_len: Int[Array, " B"], key: PRNGKeyArray
    ) -> tuple[Layout, Progress]:
        """The prompts computed once each, and the first token of every completion."""
        (B, P), n, config = prompt.shape, self.num_samples, self.config
        layers = decode_layout(config, params, self.dtype)
        layout = Layout(layers, jax.tree.map(lambda x: x.astype(self.dtype), unembedding_of(config, params)))
        h, caches = self._prefill(params, layers, prompt, prompt_len)
        seen = None
        if self.draw.repetition_penalty != 1:
            there = jnp.arange(P)[None, :] >= P - prompt_len[:, None]
            seen = jnp.zeros((B, config.vocab_size), bool).at[jnp.arange(B)[:, None], prompt].max(there)
        each = (h, caches, P - prompt_len, seen)
        h, caches, starts, seen = jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), each)
        state = self._add(layout, h, DecodeState.empty(B * n, self.max_new_tokens, key, seen))
        return layout, Progress(state, caches, jnp.int32(P), starts)

    def go_on(self, params: PyTree, layout: Layout, at: Progress, until: Int[Array, ""] | int) -> Progress:
        """Further tokens, until each completion has this many or has ended."""

        def unfinished(carry: tuple[DecodeState, list[Cache]]) -> Bool[Array, ""]:
            return (carry[0].n < until) & ~jnp.all(carry[0].done)

        def step(carry: tuple[DecodeState, list[Cache]]) -> tuple[DecodeState, list[Cache]]:
            state, caches = carry
            return self._step(params, layout, state, caches, at.begin, at.starts)

        state, caches = jax.lax.while_loop(unfinished, step, (at.state, at.caches))
        return at._replace(state=state, caches=caches)

    def samples(self, state: DecodeState) -> Samples:
        """What was drawn, by prompt."""
        drawn = (state.tokens, state.lengths, state.logps, state.done)
        return Samples(*(x.reshape(-1, self.num_samples, *x.shape[1:]) for x in drawn))

    def _add(self, layout: Layout, h_BTD: Float[Array, "B T D"], state: DecodeState) -> DecodeState:
        return state.add(logits_of(h_BTD[:, -1:], layout.head)[:, 0], self.eos_ids, self.draw)

    def _step(
        self, params: PyTree, layout: Layout, state: DecodeState, caches: list[Cache], begin: Array, starts: Array
    ) -> tuple[DecodeState, list[Cache]]:
        """The newest token computed, and a further one drawn."""
        config, column = self.config, begin + state.n - 1
        token = jax.lax.dynamic_slice_in_dim(state.tokens, state.n - 1, 1, axis=1)
        sees = {size: seen(size, column, starts) for size in {cache[1].shape[2] for cache in caches if cache}}

        def extend(kind: LayerKind, q: Array, k: Array, v: Array, cache: Cache) -> tuple[Array, Cache]:
            keys, values = put(cache, k, v, column)
            return attend_one(q, keys, values, sees[values.shape[2]], config.attention.softcap), (keys, values)

        position = column - starts[:, None]
        x = embed(config, params, token, position).astype(self.dtype)
        x, caches = unrolled_layers(config, layout.layers, x, rotary_mix(config, position, extend), caches)
        return self._add(layout, final_norm(config, params, x), state), caches

    def _prefill(
        self, params: PyTree, layers: Sequence[Weights], prompt: Int[Array, "B P"], prompt_len: Int[Array, " B"]
    ) -> tuple[Float[Array, "B P D"], list[Cache]]:
        """The prompts' hidden states, and their KV caches with room for the completions."""
        P, config = prompt.shape[1], self.config
        positions = jnp.arange(P)[None, :] - (P - prompt_len[:, None])

        def store(kind: LayerKind, q: Array, k: Array, v: Array, cache: Cache) -> tuple[Array, Cache]:
            mask = causal(P, kind.window) & (positions >= 0)[:, None, :]
            kept = cache_of(k, v, slots_of(kind, P + self.max_new_tokens))
            return attend(q, k, v, mask, config.attention.softcap), kept

        at = jnp.maximum(positions, 0)
        x = embed(config, params, prompt, at).astype(self.dtype)
        x, caches = unrolled_layers(config, layers, x, rotary_mix(config, at, store))
        return final_norm(config, params, x), caches


def make_sampler(
    config: DecoderConfig,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    num_samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    tokenizer: Any = None,
    dtype: str = "float32",
    mesh: Mesh | None = None,
) -> Sampler:
    """A jitted ``sample(params, prompt, prompt_len, key) -> Samples``.

    Args:
      config: the decoder's choices.
      max_new_tokens: C, tokens drawn at most.
      eos_ids: tokens that end a completion, a model's EOS or any others; the one drawn is its last token and counts.
      num_samples: n, completions of each prompt; the prompt is computed once.
      temperature, top_p, top_k, min_p, repetition_penalty: as of :class:`~dpojax.generate.sampling.DrawOptions`; they
        are applied in transformers' order: the penalty, temperature, top-k, top-p, min-p.
      stop: strings that end a completion, wherever they begin and end in its tokens, special tokens spelled. The token
        that completes one is the completion's last and counts; ``Samples.texts(tokenizer, stop)`` end before it.
      tokenizer: decodes completions, where there are such strings.
      dtype: compute dtype.
      mesh: devices that split the prompts, and on which the parameters lie (default: wherever the parameters are).

    The prompts are ``[B, P]``, padded on the left, their lengths in ``prompt_len``. With stop strings, texts are looked
    at every few tokens, and what was drawn beyond their ends is taken back.

    Raises:
      ValueError: a stop string is empty, or there is no tokenizer to find it with.
    """
    if stop and (tokenizer is None or not all(stop)):
        raise ValueError("stop strings must not be empty, and need tokenizer=, which decodes completions")
    draw = DrawOptions(temperature, top_k, top_p, min_p, repetition_penalty)
    decoding = Decoding(config, max_new_tokens, eos_ids, num_samples, draw, jnp.dtype(dtype))
    shardings: dict[str, Any] = {}
    if mesh is not None:
        by_batch = batch_sharding(mesh)
        shardings = {"in_shardings": (param_shardings(mesh, config), by_batch, by_batch, replicated(mesh))}
    if stop:
        return StoppingSampler(decoding, jax.jit(decoding.begin, **shardings), tokenizer, tuple(stop))

    def sample(params: PyTree, prompt: Int[Array, "B P"], prompt_len: Int[Array, " B"], key: PRNGKeyArray) -> Samples:
        layout, at = decoding.begin(params, prompt, prompt_len, key)
        return decoding.samples(decoding.go_on(params, layout, at, max_new_tokens).state)

    return jax.jit(sample, **shardings, out_shardings=None if mesh is None else by_batch)


class StoppingSampler:
    """A sampler that stops at strings: a few tokens are drawn, then the completions are decoded and looked at."""

    def __init__(self, decoding: Decoding, begin: Any, tokenizer: Any, stop: tuple[str, ...]):
        self.decoding, self.begin, self.tokenizer, self.stop = decoding, begin, tokenizer, stop
        self.go_on = jax.jit(decoding.go_on, donate_argnums=2)
        self.lower = begin.lower

    def __call__(
        self, params: PyTree, prompt: Int[Array, "B P"], prompt_len: Int[Array, " B"], key: PRNGKeyArray, /
    ) -> Samples:
        C = self.decoding.max_new_tokens
        layout, at = self.begin(params, prompt, prompt_len, key)
        stopped = np.full(len(at.starts), C + 1)  # a completion's length, where a stop string ends it
        known = 0
        for until in (*range(STOP_EVERY, C, STOP_EVERY), C):
            at = self.go_on(params, layout, at, until)
            tokens, lengths, done = (np.asarray(x) for x in (at.state.tokens, at.state.lengths, at.state.done))
            for i in np.flatnonzero((stopped > C) & (lengths > known)).tolist():
                found = stopped_length(tokens[i, : lengths[i]].tolist(), self.tokenizer, self.stop, known)
                stopped[i] = C + 1 if found is None else found
            known, done = until, done | (stopped <= C)
            if done.all():
                break
            at = at._replace(state=at.state._replace(done=done))
        inside = np.arange(C)[None, :] < stopped[:, None]
        state = at.state._replace(
            tokens=np.where(inside, tokens, 0),
            logps=np.where(inside, np.asarray(at.state.logps), 0),
            lengths=np.minimum(lengths, stopped),
            done=np.asarray(at.state.done) | (stopped <= C),
        )
        return self.decoding.samples(state)


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
