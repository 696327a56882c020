"""Objectives on a part of the completions' tokens, so that longer completions do not count more."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpojax.losses.compose import at_beta, require, with_traits
from dpojax.losses.dpo import sigmoid
from dpojax.losses.traits import Beta, Objective, Traits, check_same_shape, traits, traits_of
from dpojax.types import PairLogps, Sides


def _of_tokens(name: str, objective: Objective, *reads: str) -> dict[str, object]:
    """The traits that differ for an objective whose sums are recomputed from tokens.

    Raises:
      ValueError: it reads sums that are there for whole completions only.
    """
    declared: Traits = traits_of(objective)
    if declared.on != "pairs" or declared.statistics - {"tokens"}:
        raise ValueError(f"{name}: the objective reads more than log-probabilities of a pair's tokens")
    return {"reads": declared.reads | {"tokens", *reads}, "lengths": True}


def _shared(pair: PairLogps) -> Int[Array, " B"]:
    """The length of the shorter completion of each pair."""
    return jnp.minimum(pair.chosen_len, pair.rejected_len)


def _reweighted(pair: PairLogps, chosen: Float[Array, "B C"], rejected: Float[Array, "B C"]) -> PairLogps:
    """The pairs with weighted log-probabilities of tokens, and their sums; lengths stay."""
    sides = require(pair.tokens, "tokens")
    check_same_shape(sides[0], chosen)
    check_same_shape(sides[1], rejected)
    won, lost = sides[0] * chosen, sides[1] * rejected
    return dataclasses.replace(pair, chosen=won.sum(-1), rejected=lost.sum(-1), tokens=Sides(won, lost))


def length_desensitized(objective: Objective, ld_alpha: float = 0.5) -> Objective:
    r"""The objective with less weight on the longer completion's tokens beyond the length of the shorter one.

    .. math:: \log \pi(y|x) \to \sum_{t \le n} \log \pi(y_t|x, y_{<t})
              + \alpha \sum_{t > n} \log \pi(y_t|x, y_{<t}), \qquad n = \min(|y_w|, |y_l|)

    for policy and reference. Source: Liu et al. 2024, LD-DPO (arXiv 2409.06411), there for the sigmoid, and TRL 1.16's
    ``ld_alpha``, which applies it to every loss type. Lengths stay those of the whole completions, as in TRL.

    Args:
      objective: of pairs, that reads their log-probabilities alone.
      ld_alpha: weight of a token beyond the shared length, from 0 to 1; 1 is the objective itself.

    Raises:
      ValueError: ``ld_alpha`` outside its range, or an objective that reads more.

    >>> import jax.numpy as jnp
    >>> from dpojax.losses import hinge
    >>> zero = PairLogps(*(jnp.zeros(1),) * 2, jnp.array([3]), jnp.array([1]), tokens=Sides(*(jnp.zeros((1, 3)),) * 2))
    >>> p = zero.replace(tokens=Sides(jnp.array([[-1.0, -2.0, -4.0]]), jnp.array([[-6.0, 0.0, 0.0]])))
    >>> print(f"{length_desensitized(hinge, 0.5)(p, zero)[0]:.4f}")  # 1 - 0.1 * (-1 - 0.5 * 6 + 6)
    0.8000
    """
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"length_desensitized: ld_alpha {ld_alpha} must be from 0 to 1")
    changed = _of_tokens("length_desensitized", objective)

    def weights(tokens: Float[Array, "B C"], shared: Int[Array, " B"]) -> Float[Array, "B C"]:
        within = jnp.arange(tokens.shape[1])[None, :] < shared[:, None]
        return jnp.where(within, jnp.ones_like(tokens), jnp.full_like(tokens, ld_alpha))

    def losses(policy: PairLogps, ref: PairLogps, beta: Beta | None) -> Float[Array, " B"]:
        shared = _shared(policy)
        chosen = weights(require(policy.tokens, "tokens").chosen, shared)
        rejected = weights(require(policy.tokens, "tokens").rejected, shared)
        return at_beta(objective, _reweighted(policy, chosen, rejected), _reweighted(ref, chosen, rejected), beta)

    return with_traits(losses, traits_of(objective), objective, **changed)


def _sampled(key: Array, C: int, length: Int[Array, ""], count: Int[Array, ""]) -> Bool[Array, " C"]:
    """A mask of ``count`` of the first ``length`` places, drawn uniformly without replacement."""
    places = jnp.arange(C)
    # Draws are below 1, so places beyond the completion rank last.
    order = jnp.argsort(jnp.where(places < length, jax.random.uniform(key, (C,), jnp.float32), 2.0))
    return jnp.zeros((C,), bool).at[order].set(places < count)


def down_sampled(objective: Objective) -> Objective:
    r"""The objective on as many tokens of the longer completion, drawn at random, as the shorter one has.

    .. math:: \log \pi(y|x) \to \sum_{t \in S} \log \pi(y_t|x, y_{<t}), \qquad
              S \subseteq \{1, \dots, |y|\}, \quad |S| = \min(|y_w|, |y_l|)

    with the same S for policy and reference, drawn without replacement anew for every pair and step. Source: Lu et al.
    2024, SamPO (arXiv 2406.10957), there for the sigmoid. The authors' code (LuJunru/SamPO) draws anew for the
    reference, so that its log-ratio compares different tokens; here they are the same. Lengths stay those of the whole
    completions, as there.

    Args:
      objective: of pairs, that reads their log-probabilities alone.

    Raises:
      ValueError: an objective that reads more.

    >>> import jax, jax.numpy as jnp
    >>> from dpojax.losses import hinge
    >>> zero = PairLogps(*(jnp.zeros(1),) * 2, jnp.array([3]), jnp.array([1]), tokens=Sides(*(jnp.zeros((1, 3)),) * 2),
    ...                  key=jax.random.split(jax.random.key(0), 1))
    >>> p = zero.replace(tokens=Sides(jnp.array([[-1.0, -1.0, -1.0]]), jnp.array([[-6.0, 0.0, 0.0]])))
    >>> print(f"{down_sampled(hinge)(p, zero)[0]:.4f}")  # 1 - 0.1 * (-1 + 6), whichever token it is
    0.5000
    """
    changed = _of_tokens("down_sampled", objective, "key")

    def losses(policy: PairLogps, ref: PairLogps, beta: Beta | None) -> Float[Array, " B"]:
        sides = jax.vmap(jax.random.split)(require(policy.key, "key"))
        shared = _shared(policy)

        def kept(side: int, tokens: Float[Array, "B C"], lengths: Int[Array, " B"]) -> Float[Array, "B C"]:
            draw = jax.vmap(functools.partial(_sampled, C=tokens.shape[1]))
            return draw(sides[:, side], length=lengths, count=shared).astype(tokens.dtype)

        chosen = kept(0, require(policy.tokens, "tokens").chosen, policy.chosen_len)
        rejected = kept(1, require(policy.tokens, "tokens").rejected, policy.rejected_len)
        return at_beta(objective, _reweighted(policy, chosen, rejected), _reweighted(ref, chosen, rejected), beta)

    return with_traits(losses, traits_of(objective), objective, **changed)


@traits("tokens", lengths=True, divergence=True)
def ld_dpo(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1, ld_alpha: float = 0.5) -> Float[Array, " B"]:
    r"""The DPO loss with less weight on the longer completion's tokens beyond the length of the shorter one.

    .. math:: -\log \sigma(\beta h_\alpha), \qquad
              h_\alpha = \sum_{t \le n} (u^w_t - u^l_t) + \alpha \sum_{t > n} (u^w_t - u^l_t), \qquad
              n = \min(|y_w|, |y_l|)

    with the log-ratios u of single tokens, 0 beyond a completion's end. Source: Liu et al. 2024, LD-DPO (arXiv
    2409.06411), and TRL 1.16's ``ld_alpha`` with the loss type ``sigmoid``; for any other objective there
    is :func:`~dpojax.losses.length_desensitized`.

    Args:
      policy, ref: log-probabilities of single tokens, ``[B, C]`` a side, nats; lengths in tokens.
      beta: strength of the KL penalty, above 0.
      ld_alpha: weight of a token beyond the shared length, from 0 to 1; 1 is :func:`~dpojax.losses.sigmoid`.

    Returns:
      One loss a pair, ``[B]``; exactly ``log 2`` where policy and reference agree.

    Raises:
      ValueError: ``ld_alpha`` outside its range.

    >>> import jax.numpy as jnp
    >>> zero = PairLogps(*(jnp.zeros(1),) * 2, jnp.array([2]), jnp.array([1]), tokens=Sides(*(jnp.zeros((1, 2)),) * 2))
    >>> p = zero.replace(tokens=Sides(jnp.array([[-1.0, -2.0]]), jnp.array([[-4.0, 0.0]])))
    >>> print(f"{ld_dpo(p, zero, beta=0.5)[0]:.6f}")  # h is -1 - 0.5 * 2 + 4 = 2: log(1 + exp(-1))
    0.313262
    """
    return length_desensitized(functools.partial(sigmoid, beta=beta), ld_alpha)(policy, ref)


@traits("tokens", "key", lengths=True, divergence=True)
def sampo(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1) -> Float[Array, " B"]:
    r"""The DPO loss on as many tokens of the longer completion, drawn at random, as the shorter one has.

    .. math:: -\log \sigma\Big(\beta \sum_{t \in S_w} u^w_t - \beta \sum_{t \in S_l} u^l_t\Big), \qquad
              |S_w| = |S_l| = \min(|y_w|, |y_l|)

    with the log-ratios u of single tokens. Source: Lu et al. 2024, SamPO (arXiv 2406.10957), and the authors' code
    (LuJunru/SamPO), with the difference that :func:`~dpojax.losses.down_sampled` names, which
    does the same around any other objective.

    Args:
      policy, ref: log-probabilities of single tokens, ``[B, C]`` a side, nats; lengths in tokens; a random key for
        every pair, the policy's.
      beta: strength of the KL penalty, above 0.

    Returns:
      One loss a pair, ``[B]``; exactly ``log 2`` where policy and reference agree.

    >>> import jax, jax.numpy as jnp
    >>> zero = PairLogps(*(jnp.zeros(1),) * 2, jnp.array([2]), jnp.array([1]), tokens=Sides(*(jnp.zeros((1, 2)),) * 2),
    ...                  key=jax.random.split(jax.random.key(0), 1))
    >>> p = zero.replace(tokens=Sides(jnp.array([[-1.0, -1.0]]), jnp.array([[-3.0, 0.0]])))
    >>> print(f"{sampo(p, zero, beta=0.5)[0]:.6f}")  # one token a side: 0.5 * (-1 + 3)
    0.313262
    """
    return down_sampled(functools.partial(sigmoid, beta=beta))(policy, ref)
