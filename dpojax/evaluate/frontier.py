"""How much reward can be had for how much KL: the optimum, and Best-of-N, from samples of the reference."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Tilted(NamedTuple):
    """The KL-constrained optimum, prompt by prompt: its expected reward, its KL from the reference in nats, and how
    many equally weighted samples stand behind both (the effective sample size)."""

    reward: Float[np.ndarray, " X"]
    kl: Float[np.ndarray, " X"]
    effective: Float[np.ndarray, " X"]


def tilted(rewards: Float[np.ndarray, "X M"], beta: float) -> Tilted:
    r"""Reward and KL of the optimum :math:`\pi_r \propto \pi_\mathrm{ref}\, e^{r / \beta}`, from M samples of the
    reference of each prompt.

    .. math:: w_m = \frac{e^{r_m / \beta}}{\sum_k e^{r_k / \beta}}, \qquad \mathbb{E}[r] \approx \sum_m w_m r_m, \qquad
              \mathrm{KL} \approx \sum_m w_m \log(M w_m), \qquad \mathrm{ESS} = \frac{1}{\sum_m w_m^2}

    Self-normalised importance sampling; the policy is equation 4 of Rafailov et al. 2023 (arXiv 2305.18290). Both are
    too low where the effective sample size is a few samples: the KL cannot be estimated above ``log M``.

    >>> at = tilted(np.array([[0.0, np.log(3.0)]]), beta=1.0)  # weights 1/4 and 3/4
    >>> [f"{x[0]:.4f}" for x in at]  # 3/4 log 3; 1/4 log 1/2 + 3/4 log 3/2; 1 / (1/16 + 9/16)
    ['0.8240', '0.1308', '1.6000']
    """
    logits = np.asarray(rewards, np.float64) / beta
    logits -= logits.max(axis=1, keepdims=True)
    weights = np.exp(logits)
    weights /= weights.sum(axis=1, keepdims=True)
    logs = np.log(np.maximum(weights, 1e-300) * weights.shape[1])
    reward, kl = (weights * rewards).sum(axis=1), (weights * logs).sum(axis=1)
    return Tilted(reward, kl, 1 / np.square(weights).sum(axis=1))


def best_of_n_kl(n: int) -> float:
    r"""An upper bound of the KL of Best-of-N from the reference, nats; it is reached as completions' probabilities, and
    ties of their rewards, vanish.

    .. math:: \mathrm{KL} \le \log N - \frac{N - 1}{N}

    Source: Stiennon et al. 2020 (arXiv 2009.01325), appendix G.3; that it is a bound is shown by Beirami et al. 2024
    (arXiv 2401.01879).

    >>> print(f"{best_of_n_kl(4):.4f}")
    0.6363
    """
    return float(np.log(n) - (n - 1) / n)


def best_of_n_reward(rewards: Float[np.ndarray, "X M"], n: int) -> Float[np.ndarray, " X"]:
    r"""Each prompt's expected greatest reward among n samples, from M samples: the mean over all subsets of n of them.

    .. math:: \sum_{k = n}^{M} \frac{\binom{k - 1}{n - 1}}{\binom{M}{n}}\, r_{(k)}, \qquad r_{(1)} \le \dots \le r_{(M)}

    Raises:
      ValueError: more than M samples are asked for.

    >>> best_of_n_reward(np.array([[3.0, 1.0, 2.0]]), 2).tolist()  # of (1,2), (1,3), (2,3): (2 + 3 + 3) / 3
    [2.6666666666666665]
    """
    M = rewards.shape[1]
    if not 1 <= n <= M:
        raise ValueError(f"best of {n}: there are {M} samples of a prompt")
    k = np.arange(1, M + 1)
    # By logarithms of ratios of successive weights: binomials of hundreds overflow.
    with np.errstate(divide="ignore"):
        steps = np.where(k > n, np.log(np.maximum(k - 1, 1)) - np.log(np.maximum(k - n, 1)), 0.0)
    logs = np.where(k >= n, np.cumsum(steps), -np.inf)
    weights = np.exp(logs - logs.max())
    return np.sort(rewards, axis=1) @ (weights / weights.sum())


def reward_at(kl: np.ndarray | float, kls: np.ndarray, rewards: np.ndarray, beyond: float = np.nan) -> np.ndarray:
    """Reward at a KL, by straight lines between the points of a curve.

    Args:
      kl: nats, where it is wanted.
      kls, rewards: the curve, ``[n]``, in any order.
      beyond: what is given right and left of the curve (default: NaN).
    """
    order = np.argsort(kls)
    return np.interp(kl, np.asarray(kls)[order], np.asarray(rewards)[order], left=beyond, right=beyond)
