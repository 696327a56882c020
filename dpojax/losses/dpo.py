"""The DPO loss and its siblings: classification losses on the difference of log-ratios."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.losses.traits import Beta, check_same_shape, traits
from dpojax.types import PairLogps


def log_ratios(policy: PairLogps, ref: PairLogps) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    r"""The log-ratios :math:`\log \pi(y|x) - \log \pi_\mathrm{ref}(y|x)` of the chosen and rejected completions.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), the terms of equation 7. Under another f-divergence
    (:func:`~dpojax.losses.with_divergence`) they are its scores.

    Args:
      policy: sums of log-probabilities under the policy, ``[B]`` a field, nats.
      ref: the same under the reference.

    Returns:
      ``(chosen, rejected)``, each ``[B]``, nats.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> [x.tolist() for x in log_ratios(p, r)]
    [[1.0], [-1.0]]
    """
    check_same_shape(policy.chosen, policy.rejected, ref.chosen, ref.rejected)
    return policy.divergence(policy.chosen - ref.chosen), policy.divergence(policy.rejected - ref.rejected)


def log_ratios_per_token(policy: PairLogps, ref: PairLogps) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """:func:`log_ratios`, each divided by its completion's length, ``[B]``, nats per token."""
    chosen, rejected = log_ratios(policy, ref)
    # A completion has at least one token, but a padding row has none.
    lengths = (jnp.maximum(n, 1).astype(chosen.dtype) for n in (policy.chosen_len, policy.rejected_len))
    return chosen / next(lengths), rejected / next(lengths)


def implicit_rewards(
    policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    r"""The reward that the policy implies, up to a function of the prompt that cancels within a pair.

    .. math:: \hat r(x, y) = \beta \log \frac{\pi(y|x)}{\pi_\mathrm{ref}(y|x)}

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 5 without its ``beta log Z(x)``.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats.
      beta: strength of the KL penalty, above 0.

    Returns:
      ``(chosen, rejected)``, each ``[B]``, in the reward's units.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> [x.tolist() for x in implicit_rewards(p, r, beta=0.5)]
    [[0.5], [-0.5]]
    """
    chosen, rejected = log_ratios(policy, ref)
    return beta * chosen, beta * rejected


@traits(divergence=True)
def sigmoid(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1, label_smoothing: float = 0.0) -> Float[Array, " B"]:
    r"""The DPO loss: negative log-likelihood of the preference under Bradley-Terry.

    .. math:: -(1 - \epsilon) \log \sigma(\beta h) - \epsilon \log \sigma(-\beta h), \qquad
              h = \log \frac{\pi(y_w|x)}{\pi_\mathrm{ref}(y_w|x)} - \log \frac{\pi(y_l|x)}{\pi_\mathrm{ref}(y_l|x)}

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7. With ``label_smoothing`` epsilon it is conservative
    DPO, which takes a label to be flipped with probability epsilon (Mitchell 2023, "A note on DPO with noisy
    preferences and relationship to IPO", equation 3).

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats.
      beta: strength of the KL penalty, above 0.
      label_smoothing: epsilon, in [0, 0.5).

    Returns:
      One loss a pair, ``[B]``; exactly ``log 2`` where policy and reference agree.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> print(f"{sigmoid(p, r, beta=0.5)[0]:.6f}")  # log(1 + exp(-1))
    0.313262
    """
    chosen, rejected = log_ratios(policy, ref)
    logits = beta * (chosen - rejected)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * jax.nn.log_sigmoid(-logits)


@traits(divergence=True)
def hinge(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1) -> Float[Array, " B"]:
    r"""Hinge loss on the log-ratio margin: it is 0 from a margin of ``1 / beta`` nats on.

    .. math:: \max(0,\; 1 - \beta h)

    with ``h`` as in :func:`sigmoid`. Source: Zhao et al. 2023, SLiC-HF (arXiv 2305.10425), equation 1, and Liu et
    al. 2024, RSO (arXiv 2309.06657), which normalises by the reference as here; ``1/beta`` is the margin delta.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats.
      beta: inverse of the margin, above 0.

    Returns:
      One loss a pair, ``[B]``; exactly 1 where policy and reference agree.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> hinge(p, r, beta=0.25).tolist()  # 1 - 0.25 * 2
    [0.5]
    """
    chosen, rejected = log_ratios(policy, ref)
    return jax.nn.relu(1.0 - beta * (chosen - rejected))


@traits(divergence=True, lengths=True)
def sigmoid_norm(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1) -> Float[Array, " B"]:
    r"""The DPO loss on log-ratios per token, so that a longer completion has no larger sum for its length alone.

    .. math:: -\log \sigma\left(\frac{\beta}{|y_w|} \log \frac{\pi(y_w|x)}{\pi_\mathrm{ref}(y_w|x)}
              - \frac{\beta}{|y_l|} \log \frac{\pi(y_l|x)}{\pi_\mathrm{ref}(y_l|x)}\right)

    Source: TRL 1.16's loss type of this name; Lambert et al. 2024, Tulu 3 (arXiv 2411.15124), section 5.1, equation 6
    ("length-normalized DPO").

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats; lengths in tokens.
      beta: strength of the KL penalty, above 0; as a margin counts per token, larger than in :func:`sigmoid`.

    Returns:
      One loss a pair, ``[B]``; exactly ``log 2`` where policy and reference agree.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> print(f"{sigmoid_norm(p, r, beta=2.0)[0]:.6f}")  # log(1 + exp(-1))
    0.313262
    """
    chosen, rejected = log_ratios_per_token(policy, ref)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected))


@traits(divergence=True)
def robust(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1, label_smoothing: float = 0.1) -> Float[Array, " B"]:
    r"""The DPO loss corrected for flipped labels: its expectation over flips is the loss on clean labels.

    .. math:: \frac{-(1 - \epsilon) \log \sigma(\beta h) + \epsilon \log \sigma(-\beta h)}{1 - 2 \epsilon}

    with ``h`` as in :func:`sigmoid`. Source: Chowdhury et al. 2024, "Provably robust DPO" (arXiv 2403.00409),
    equation 12.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats.
      beta: strength of the KL penalty, above 0.
      label_smoothing: epsilon, the share of flipped labels, from 0 to below 0.5; 0 is :func:`sigmoid`.

    Returns:
      One loss a pair, ``[B]``; may be negative.

    Raises:
      ValueError: ``label_smoothing`` outside its range.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> print(f"{robust(p, r, beta=0.5, label_smoothing=0.25)[0]:.6f}")  # (0.75 * 0.313262 - 0.25 * 1.313262) / 0.5
    -0.186738
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"robust: label_smoothing {label_smoothing} must be from 0 to below 0.5")
    chosen, rejected = log_ratios(policy, ref)
    logits = beta * (chosen - rejected)
    clean = -(1 - label_smoothing) * jax.nn.log_sigmoid(logits)
    return (clean + label_smoothing * jax.nn.log_sigmoid(-logits)) / (1 - 2 * label_smoothing)


@traits()
def unweighted(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1) -> Float[Array, " B"]:
    r"""An ablation: the DPO gradient without its weight, which is the greater, the more wrongly the pair is ordered.

    .. math:: -\beta h, \qquad \nabla = -\beta\, (\nabla \log \pi(y_w|x) - \nabla \log \pi(y_l|x))

    with ``h`` as in :func:`sigmoid`. Source: Rafailov et al. 2023 (arXiv 2305.18290), section 4, "What does the DPO
    update do?", whose gradient has the weight :math:`\sigma(\hat r_l - \hat r_w)` before the bracket. Without it
    the margin grows without end, and the policy degenerates (the paper's appendix, table 3, shows it for unlikelihood).

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats.
      beta: scale of the gradient, above 0.

    Returns:
      One loss a pair, ``[B]``, without a lower bound; exactly 0 where policy and reference agree.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> unweighted(p, r, beta=0.5).tolist()  # -0.5 * 2
    [-1.0]
    """
    chosen, rejected = log_ratios(policy, ref)
    return -beta * (chosen - rejected)
