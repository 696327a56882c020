"""Drawing one token from logits: temperature, nucleus, and a draw that needs little noise."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def next_token(
    logits_BV: Float[Array, "B V"], key: PRNGKeyArray, *, temperature: float, top_p: float
) -> Int[Array, " B"]:
    """A token of ``softmax(logits / temperature)``, cut to the nucleus that holds ``top_p`` of the probability.

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
    return sample_token(logits_BV, key)


def sample_token(logits_BV: Float[Array, "B V"], key: PRNGKeyArray, group: int = 128) -> Int[Array, " B"]:
    """A token of ``softmax(logits)``: first a group of tokens by its probability, then a token of that group.

    Noise is made for the groups and for the tokens of one, not for the whole vocabulary, which on a CPU would take a
    quarter of the time that the model takes.
    """
    B, V = logits_BV.shape
    logits_BGg = jnp.pad(logits_BV, [(0, 0), (0, -V % group)], constant_values=-jnp.inf).reshape(B, -1, group)
    outer, inner = jax.random.split(key)
    chosen = jax.random.categorical(outer, jax.nn.logsumexp(logits_BGg, axis=-1), axis=-1)
    within = jnp.take_along_axis(logits_BGg, chosen[:, None, None], axis=1)[:, 0]
    return chosen * group + jax.random.categorical(inner, within, axis=-1)


def token_logp(logits_BV: Float[Array, "B V"], token: Int[Array, " B"]) -> Float[Array, " B"]:
    """``log softmax(logits)[token]``, float32, nats."""
    logits_BV = logits_BV.astype(jnp.float32)
    return jnp.take_along_axis(logits_BV, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits_BV, axis=-1)
