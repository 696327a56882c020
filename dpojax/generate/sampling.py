"""Drawing one token from logits: what changes them, under transformers' names, and a draw that needs little noise."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class DrawOptions:
    """How a token is drawn from logits; the defaults draw from the model itself.

    Attributes:
      temperature: logits are divided by it; 0 takes the most probable token.
      top_k: how many of the most probable tokens are drawn from; 0 for all.
      top_p: probability mass of the nucleus that is drawn from; 1 for all of it.
      min_p: tokens below this share of the most probable one's probability are left out.
      repetition_penalty: above 1 makes tokens of the prompt and of the completion so far less probable; 1 is none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def penalized(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], repetition_penalty: float
) -> Float[Array, "B V"]:
    """The logits where those of tokens seen before are divided by the penalty if above 0, and multiplied if below.

    Source: Keskar et al. 2019, CTRL (arXiv 1909.05858), section 4.1, as transformers has it.
    """
    less = jnp.where(logits_BV < 0, logits_BV * repetition_penalty, logits_BV / repetition_penalty)
    return jnp.where(seen_BV, less, logits_BV)


def warped(logits_BV: Float[Array, "B V"], options: DrawOptions) -> Float[Array, "B V"]:
    """The logits that are drawn from: at the temperature, -inf for tokens outside of top-k, then nucleus, then min-p.

    Each cut sees what the one before has left, as in transformers. Ties with the last one inside are inside.
    Sources: Fan et al. 2018 (arXiv 1805.04833), top-k; Holtzman et al. 2019 (arXiv 1904.09751), the nucleus; Nguyen et
    al. 2024 (arXiv 2407.01082), min-p.
    """
    logits_BV = logits_BV / options.temperature
    if 0 < options.top_k < logits_BV.shape[-1]:
        smallest = jax.lax.top_k(logits_BV, options.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= smallest, logits_BV, -jnp.inf)
    if options.top_p < 1:
        ordered = jnp.sort(logits_BV, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        inside = jnp.cumsum(probs, axis=-1) - probs < options.top_p  # the token that crosses top_p is still inside
        smallest = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= smallest, logits_BV, -jnp.inf)
    if options.min_p > 0:
        probs = jax.nn.softmax(logits_BV, axis=-1)
        inside = probs >= options.min_p * jnp.max(probs, axis=-1, keepdims=True)
        logits_BV = jnp.where(inside, logits_BV, -jnp.inf)
    return logits_BV


def next_token(
    logits_BV: Float[Array, "B V"],
    key: PRNGKeyArray,
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
) -> Int[Array, " B"]:
    """A token of ``softmax(logits / temperature)``, cut to what :func:`warped` leaves.

    ``temperature = 0`` takes the most probable token.
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    return sample_token(warped(logits_BV, DrawOptions(temperature, top_k, top_p, min_p)), key)


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
