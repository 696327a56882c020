"""Objectives of single completions, each labelled desirable or undesirable: no pairs are needed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpojax.losses.compose import require
from dpojax.losses.traits import Beta, check_same_shape, traits
from dpojax.types import LabelledLogps


def _mean(x: Float[Array, " B"], real: Bool[Array, " B"]) -> Float[Array, ""]:
    """The mean over the rows of the data, without a gradient; 0 where there are none."""
    return jax.lax.stop_gradient(jnp.where(real, x, 0.0).sum() / jnp.maximum(real.sum(), 1).astype(x.dtype))


def _log_ratios(policy: LabelledLogps, ref: LabelledLogps) -> Float[Array, " B"]:
    check_same_shape(policy.logps, ref.logps)
    return jnp.where(policy.lengths > 0, policy.logps - ref.logps, 0.0)


def _towards_label(policy: LabelledLogps, x: Float[Array, " B"]) -> Float[Array, " B"]:
    """x of a desirable completion, -x of an undesirable one: the objectives raise it."""
    return jnp.where(policy.label > 0.5, x, -x)


def _weighted(
    name: str, policy: LabelledLogps, losses: Float[Array, " B"], desirable_weight: float, undesirable_weight: float
) -> Float[Array, " B"]:
    """The losses times their labels' weights; 0 in padding rows."""
    for option, value in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        if value < 0:
            raise ValueError(f"{name}: {option} {value} must be 0 or above")
    weighted = jnp.where(policy.label > 0.5, desirable_weight * losses, undesirable_weight * losses)
    return jnp.where(policy.lengths > 0, weighted, 0.0)


def labelled_rewards(policy: LabelledLogps, ref: LabelledLogps, *, beta: Beta = 0.1) -> Float[Array, " B"]:
    r"""The rewards that the policy implies for labelled completions; :func:`~dpojax.losses.implicit_rewards` of pairs.

    .. math:: r = \beta \log \frac{\pi(y|x)}{\pi_\mathrm{ref}(y|x)}

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 5 without its ``beta log Z(x)``.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats.
      beta: strength of the KL penalty, above 0.

    Returns:
      ``[B]``, in the reward's units; 0 in padding rows.

    >>> import jax.numpy as jnp
    >>> n, label = jnp.array([4, 4]), jnp.array([1.0, 0.0])
    >>> p = LabelledLogps(jnp.array([-10.0, -12.0]), n, label)
    >>> r = LabelledLogps(jnp.array([-11.0, -11.0]), n, label)
    >>> labelled_rewards(p, r, beta=0.5).tolist()
    [0.5, -0.5]
    """
    return beta * _log_ratios(policy, ref)


@traits("mismatched", on="labels", batch=True, lengths=True)
def kto(
    policy: LabelledLogps,
    ref: LabelledLogps,
    *,
    beta: Beta = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, " B"]:
    r"""Kahneman-Tversky optimization: prospect theory's value of a completion's gain or loss against a reference point.

    .. math:: \lambda_D\, (1 - \sigma(\beta (u - z))) \text{ if desirable}, \qquad
              \lambda_U\, (1 - \sigma(\beta (z - u))) \text{ if undesirable}, \qquad
              u = \log \frac{\pi(y|x)}{\pi_\mathrm{ref}(y|x)}, \quad
              z = \max\Big(0,\; \frac{1}{B} \sum_i \log \frac{\pi(y'_i|x_i)}{\pi_\mathrm{ref}(y'_i|x_i)}\Big)

    where y' is another prompt's completion; z estimates KL(policy || reference), and no gradient flows through it.
    Source: Ethayarajh et al. 2024, KTO (arXiv 2402.01306), section 4, and the authors' code (ContextualAI/HALOs), which
    takes rows with a log-ratio of exactly 0 out of z. The mean over the rows of the data is TRL 1.16's loss: the mean
    over both labels' losses together, whatever their numbers. TRL computes z over a micro-batch of all devices, here it
    is computed over the batch that the objective sees.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats, ``mismatched`` among them; the label is the
        policy's. A completion without tokens is left out of z.
      beta: strength of the KL penalty, above 0.
      desirable_weight, undesirable_weight: the lambdas, 0 or above; the paper wants their ratio to balance the labels'
        numbers.

    Returns:
      One loss a completion, ``[B]``, from 0 to its label's weight; half of that where policy and reference agree.

    Raises:
      ValueError: a weight below 0, or no mismatched completions.

    >>> import jax.numpy as jnp
    >>> n, label = jnp.array([4, 4]), jnp.array([1.0, 0.0])
    >>> p = LabelledLogps(jnp.array([-9.0, -10.0]), n, label, mismatched=jnp.array([-30.0, -28.0]))
    >>> r = LabelledLogps(jnp.array([-11.0, -10.0]), n, label, mismatched=jnp.array([-31.0, -29.0]))
    >>> [f"{x:.6f}" for x in kto(p, r, beta=1.0).tolist()]  # z = 1: sigmoid(-(2 - 1)) and sigmoid(-(1 - 0))
    ['0.268941', '0.268941']
    """
    other = require(policy.mismatched, "mismatched") - require(ref.mismatched, "mismatched")
    kl = jnp.maximum(_mean(other, policy.lengths > 0), 0.0)
    losses = jax.nn.sigmoid(-_towards_label(policy, beta * (_log_ratios(policy, ref) - kl[None])))
    return _weighted("kto", policy, losses, desirable_weight, undesirable_weight)


@traits(on="labels", lengths=True)
def apo_zero_unpaired(
    policy: LabelledLogps,
    ref: LabelledLogps,
    *,
    beta: Beta = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, " B"]:
    r""":func:`~dpojax.losses.apo_zero` without pairs, which is :func:`kto` with the reference point at 0.

    .. math:: \lambda_D\, (1 - \sigma(r)) \text{ if desirable}, \qquad \lambda_U\, \sigma(r) \text{ if undesirable},
              \qquad r = \beta \log \frac{\pi(y|x)}{\pi_\mathrm{ref}(y|x)}

    Source: TRL 1.16's loss type of this name; the two terms are those of D'Oosterlinck et al. 2024, APO (arXiv
    2408.06266), equation 7. The mean over the rows of the data is TRL's loss, as in :func:`kto`.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats; the label is the policy's.
      beta: strength of the KL penalty, above 0.
      desirable_weight, undesirable_weight: the lambdas, 0 or above.

    Returns:
      One loss a completion, ``[B]``, from 0 to its label's weight; half of that where policy and reference agree.

    Raises:
      ValueError: a weight below 0.

    >>> import jax.numpy as jnp
    >>> n, label = jnp.array([4, 4]), jnp.array([1.0, 0.0])
    >>> p = LabelledLogps(jnp.array([-10.0, -10.0]), n, label)
    >>> r = LabelledLogps(jnp.array([-11.0, -10.0]), n, label)
    >>> [f"{x:.6f}" for x in apo_zero_unpaired(p, r, beta=1.0).tolist()]  # 1 - sigmoid(1) and sigmoid(0)
    ['0.268941', '0.500000']
    """
    losses = jax.nn.sigmoid(-_towards_label(policy, labelled_rewards(policy, ref, beta=beta)))
    return _weighted("apo_zero_unpaired", policy, losses, desirable_weight, undesirable_weight)


def reward_shift(policy: LabelledLogps, ref: LabelledLogps, old: dict[str, Array] | None) -> dict[str, Array]:
    """The mean of all log-ratios so far, this batch's included, of both labels together, for :func:`bco`.

    Args:
      policy, ref: the batch's sums of log-probabilities, ``[B]`` a field, nats.
      old: what the step before returned; None before the first.

    Returns:
      ``mean``, nats (no beta in it), and ``count``, the completions it is of; 0-d arrays without a gradient.

    >>> import jax.numpy as jnp
    >>> zero = LabelledLogps(jnp.zeros(2), jnp.array([4, 4]), jnp.array([1.0, 0.0]))
    >>> first = reward_shift(zero.replace(logps=jnp.array([3.0, 1.0])), zero, None)
    >>> {k: float(v) for k, v in reward_shift(zero.replace(logps=jnp.array([8.0, 4.0])), zero, first).items()}
    {'count': 4.0, 'mean': 4.0}
    """
    real = policy.lengths > 0
    mean = _mean(_log_ratios(policy, ref), real)
    count = real.sum().astype(mean.dtype)
    if old is None:
        return {"mean": mean, "count": count}
    total = old["count"] + count
    # A step towards the batch's mean, not a sum over everything, whose digits would run out.
    stepped = old["mean"] + (mean - old["mean"]) * count / jnp.maximum(total, 1.0)
    return jax.lax.stop_gradient({"mean": stepped, "count": total})


@traits(on="labels", batch=True, lengths=True, running={"bco": reward_shift})
def bco(policy: LabelledLogps, ref: LabelledLogps, *, beta: Beta = 0.1) -> Float[Array, " B"]:
    r"""Binary classifier optimization: is a completion a desirable one? The shifted reward is the classifier's logit.

    .. math:: -\log \sigma(r - \delta) \text{ if desirable}, \qquad -\log \sigma(-(r - \delta)) \text{ if undesirable},
              \qquad r = \beta \log \frac{\pi(y|x)}{\pi_\mathrm{ref}(y|x)}

    where the reward shift delta is the mean of all rewards of the run so far, this batch's included. Source: Jung et
    al. 2024, BCO (arXiv 2404.04656), and the first author's code for it in TRL (pull request 1599). As there, delta
    pools both labels (which is half the sum of their means where they are equally many), does not forget, and has no
    gradient. Unlike there and as in TRL since, every completion counts alike in it, not every batch. The importance
    weights by a classifier of prompts ("underlying distribution matching") are left out, and so are weights of the
    labels, which the authors do not have. Pairs without a shift: :func:`~dpojax.losses.bco_pair`.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats; the label is the policy's. The shift is read from
        ``policy.running["bco"]``, which :func:`reward_shift` has brought up to date with this batch, and is the
        batch's own where there is none. A completion without tokens is left out of it.
      beta: strength of the KL penalty, above 0.

    Returns:
      One loss a completion, ``[B]``; exactly ``log 2`` where its reward is the shift.

    >>> import jax.numpy as jnp
    >>> n, label = jnp.array([4, 4]), jnp.array([1.0, 0.0])
    >>> p = LabelledLogps(jnp.array([-8.0, -10.0]), n, label)
    >>> r = LabelledLogps(jnp.array([-11.0, -11.0]), n, label)
    >>> [f"{x:.6f}" for x in bco(p, r, beta=1.0).tolist()]  # rewards 3 and 1, delta 2: both log(1 + exp(-1))
    ['0.313262', '0.313262']
    """
    running = (policy.running or {}).get("bco")
    if running is None:
        running = reward_shift(policy, ref, None)
    delta = beta * jax.lax.stop_gradient(running["mean"])
    losses = -jax.nn.log_sigmoid(_towards_label(policy, labelled_rewards(policy, ref, beta=beta) - delta[None]))
    return jnp.where(policy.lengths > 0, losses, 0.0)
