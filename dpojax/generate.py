"""Sampling from the decoder: one prefill of the prompts, then one token at a time against a key/value cache."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dpojax.models.attention import attend
from dpojax.models.config import DecoderConfig
from dpojax.models.decoder import Blocks, Cache, split
from dpojax.types import PyTree

Sampler = Callable[
    [PyTree, Int[Array, "B P"], Int[Array, " B"], PRNGKeyArray], tuple[Int[Array, "B C"], Int[Array, " B"]]
]


def next_token(
    logits_BV: Float[Array, "B V"], key: PRNGKeyArray, *, temperature: float, top_p: float
) -> Int[Array, " B"]:
    """Draw a token from ``softmax(logits / temperature)``, cut to the nucleus that holds ``top_p`` of the probability.

    ``temperature = 0`` takes the most probable token. The nucleus is that of Holtzman et al. 2019 (arXiv 1904.09751).
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    logits_BV = logits_BV / temperature
    if top_p < 1:
        ordered = jnp.sort(logits_BV, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        inside = jnp.cumsum(probs, axis=-1) - probs < top_p  # the token that crosses top_p is still inside
        smallest = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= smallest, logits_BV, -jnp.inf)
    return draw(logits_BV, key)


def draw(logits_BV: Float[Array, "B V"], key: PRNGKeyArray, group: int = 128) -> Int[Array, " B"]:
    """Draw from ``softmax(logits)``: first a group of tokens by its probability, then a token of that group.

    Noise is made for the groups and for the tokens of one, not for the whole vocabulary, which on a CPU would take a
    quarter of the time that the model takes.
    """
    B, V = logits_BV.shape
    logits_BGg = jnp.pad(logits_BV, [(0, 0), (0, -V % group)], constant_values=-jnp.inf).reshape(B, -1, group)
    outer, inner = jax.random.split(key)
    chosen = jax.random.categorical(outer, jax.nn.logsumexp(logits_BGg, axis=-1), axis=-1)
    within = jnp.take_along_axis(logits_BGg, chosen[:, None, None], axis=1)[:, 0]
    return chosen * group + jax.random.categorical(inner, within, axis=-1)


class Drawn(NamedTuple):
    """What has been drawn so far, and the key for what will be."""

    n: Int[Array, ""]
    done: Bool[Array, " B"]
    lengths: Int[Array, " B"]
    tokens: Int[Array, "B C"]
    key: PRNGKeyArray

    @classmethod
    def none(cls, B: int, C: int, key: PRNGKeyArray) -> "Drawn":
        return cls(jnp.int32(0), jnp.zeros(B, bool), jnp.zeros(B, jnp.int32), jnp.zeros((B, C), jnp.int32), key)

    def add(
        self, logits_BV: Float[Array, "B V"], eos_ids: tuple[int, ...], *, temperature: float, top_p: float
    ) -> "Drawn":
        """A further token of every completion that has not ended."""
        key, now = jax.random.split(self.key)
        token = jnp.where(self.done, 0, next_token(logits_BV, now, temperature=temperature, top_p=top_p))
        done = self.done | jnp.isin(token, jnp.array(eos_ids, jnp.int32))
        tokens = self.tokens.at[:, self.n].set(token)
        return Drawn(self.n + 1, done, self.lengths + ~self.done, tokens, key)


def attend_one(
    q: Float[Array, "B 1 H h"],
    keys: Float[Array, "B K h S"],
    values: Float[Array, "B K S h"],
    sees: Bool[Array, "B S"],
) -> Float[Array, "B 1 H h"]:
    """The newest token's attention to what the cache holds, softmax in float32."""
    B, _, H, h = q.shape
    grouped = q.reshape(B, keys.shape[1], -1, h)
    scores = jnp.einsum("bkgh,bkhs->bkgs", grouped, keys, preferred_element_type=jnp.float32) * h**-0.5
    p = jax.nn.softmax(jnp.where(sees[:, None, None, :], scores, -1e30), axis=-1).astype(values.dtype)
    return jnp.einsum("bkgs,bksh->bkgh", p, values).reshape(B, 1, H, h)


def weights_first(w: Float[Array, "D F"], x: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
    """``x @ w.T`` with the weights as the first factor, which XLA's CPU compiler multiplies faster where F is long.

    The barrier keeps it from exchanging the factors.
    """
    return jax.lax.optimization_barrier(jnp.einsum("df,btf->dbt", w, x)).transpose(1, 2, 0)


class TokenBlock(Blocks):
    """A layer for one token at a time, where reading weights is nearly all the work.

    What is multiplied with the same input lies in one matrix, and the axis that its product sums over is the last: so
    XLA's CPU compiler reads weights fastest.
    """

    def __init__(self, config: DecoderConfig, weights: dict[str, Array], dtype: jnp.dtype):
        self.config = config
        joint = lambda *names: jnp.concatenate([weights[n].reshape(config.width, -1).T for n in names])  # noqa: E731
        param = lambda x: nnx.Param(x.astype(dtype))  # noqa: E731
        self.attn_norm, self.mlp_norm = param(weights["attn_norm"]), param(weights["mlp_norm"])
        self.joint_qkv, self.o = param(joint("q", "k", "v")), param(weights["o"].reshape(config.width, -1))
        self.gate_up, self.down = param(joint("gate", "up")), param(weights["down"])

    def qkv(self, y: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        H, K, h = self.config.heads, self.config.kv_heads, self.config.head_dim
        joint = jnp.einsum("btd,fd->btf", y, self.joint_qkv[...]).reshape(*y.shape[:2], H + 2 * K, h)
        return joint[:, :, :H], joint[:, :, H : H + K], joint[:, :, H + K :]

    def attn_out(self, out: Float[Array, "B T H h"]) -> Float[Array, "B T D"]:
        return weights_first(self.o[...], out.reshape(*out.shape[:2], -1))

    def mlp(self, y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up = jnp.split(jnp.einsum("btd,fd->btf", y, self.gate_up[...]), 2, axis=-1)
        return weights_first(self.down[...], jax.nn.silu(gate) * up)


def token_blocks(config: DecoderConfig, params: PyTree, dtype: jnp.dtype) -> list[TokenBlock]:
    """Every layer, cut out of the stack, in the compute dtype."""
    blocks = params["blocks"]
    return [TokenBlock(config, {name: x[i] for name, x in blocks.items()}, dtype) for i in range(config.layers)]


def make_sampler(
    config: DecoderConfig,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    temperature: float = 1.0,
    top_p: float = 1.0,
    dtype: str = "float32",
) -> Sampler:
    """A jitted ``sample(params, prompt, prompt_len, key) -> (tokens, lengths)``.

    Args:
      config: the decoder's shape.
      max_new_tokens: C, tokens drawn at most.
      eos_ids: tokens that end a completion; the one drawn is its last token and counts.
      temperature: 0 for the most probable token each time.
      top_p: probability mass of the nucleus sampled from; 1 for all of it.
      dtype: compute dtype.

    The prompts are ``[B, P]``, padded on the left, real lengths in ``prompt_len``. Tokens are ``[B, C]``, zero after
    a completion's end.
    """
    graph, _ = split(config)
    C, compute = max_new_tokens, jnp.dtype(dtype)

    def sample(
        params: PyTree, prompt: Int[Array, "B P"], prompt_len: Int[Array, " B"], key: PRNGKeyArray
    ) -> tuple[Int[Array, "B C"], Int[Array, " B"]]:
        B, P = prompt.shape
        model, layers = nnx.merge(graph, params), token_blocks(config, params, compute)
        slots = jnp.arange(P + C)
        positions = slots[None, :] - (P - prompt_len[:, None])
        real = positions >= 0

        def prefill(q: Array, k: Array, v: Array, cache: Cache) -> tuple[Array, Cache]:
            mask = jnp.tril(jnp.ones((1, P, P), bool)) & real[:, None, :P]
            none, room = (0, 0), (0, C)
            keys = jnp.pad(k.transpose(0, 2, 3, 1), [none, none, none, room])
            values = jnp.pad(v.swapaxes(1, 2), [none, none, room, none])
            return attend(q, k, v, mask), (keys, values)

        at = jnp.maximum(positions[:, :P], 0)
        h, head, caches = model(prompt, at, prefill, dtype=compute, layers=layers)
        head = head.astype(compute)

        def add_token(h_BTD: Float[Array, "B T D"], drawn: Drawn) -> Drawn:
            logits = jnp.einsum("bd,vd->bv", h_BTD[:, -1], head, preferred_element_type=jnp.float32)
            return drawn.add(logits, eos_ids, temperature=temperature, top_p=top_p)

        def step(state: tuple[Drawn, PyTree]) -> tuple[Drawn, PyTree]:
            drawn, caches = state
            slot = P + drawn.n - 1  # of the newest token, which is yet to be computed
            token = jax.lax.dynamic_slice_in_dim(drawn.tokens, drawn.n - 1, 1, axis=1)
            at = jax.lax.dynamic_slice_in_dim(positions, slot, 1, axis=1)
            sees = real & (slots[None, :] <= slot)

            def extend(q: Array, k: Array, v: Array, cache: Cache) -> tuple[Array, Cache]:
                assert cache is not None
                put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot)
                keys, values = put(cache[0], k.transpose(0, 2, 3, 1), axis=3), put(cache[1], v.swapaxes(1, 2), axis=2)
                return attend_one(q, keys, values, sees), (keys, values)

            h, _, caches = model(token, at, extend, dtype=compute, layers=layers, caches=caches)
            return add_token(h, drawn), caches

        first = add_token(h, Drawn.none(B, C, key))
        unfinished = lambda state: (state[0].n < C) & ~jnp.all(state[0].done)  # noqa: E731
        drawn, _ = jax.lax.while_loop(unfinished, step, (first, caches))
        return drawn.tokens, drawn.lengths

    return jax.jit(sample)


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
    batch_size: int,
    seed: int,
    track: Callable[[Sequence[int]], Iterable[int]] = lambda batches: batches,
) -> list[list[int]]:
    """One completion for every prompt, in order, as token lists (an EOS that was drawn included).

    Every batch has one shape, the longest prompt's, so there is one compilation. ``track`` may wrap the range over
    batches with a progress bar.
    """
    width = -(-max(len(prompt) for prompt in prompts) // 8) * 8
    completions: list[list[int]] = []
    keys = jax.random.split(jax.random.key(seed), -(-len(prompts) // batch_size))
    for i in track(range(len(keys))):
        rows = list(prompts[i * batch_size : (i + 1) * batch_size])
        padded = rows + [rows[-1]] * (batch_size - len(rows))
        prompt, prompt_len = pad_left(padded, width)
        tokens, lengths = sampler(params, jnp.asarray(prompt), jnp.asarray(prompt_len), keys[i])
        kept = zip(np.asarray(tokens).tolist(), np.asarray(lengths).tolist(), strict=True)
        completions += [row[:n] for row, n in list(kept)[: len(rows)]]
    return completions
