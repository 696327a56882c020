"""The objectives of policy gradients: pure functions of arrays.

Arrays of samples are ``[B, n]``, B prompts by n samples of each; arrays of their tokens ``[B, n, C]``, 0 beyond a
sample's end. Log-probabilities and KL are in nats. Both methods ascend the objective of Rafailov et al. 2023 (arXiv
2305.18290), equation 3, ``J = E[r(x, y)] - beta KL(pi || pi_ref)``: RLOO takes a whole sample for one action, PPO each
of its tokens. Their optimum is :func:`dpojax.theory.optimal_policy`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Samplewise = Float[Array, "B n"]
Tokenwise = Float[Array, "B n C"]
Scalar = Float[Array, ""]


def token_mask(lengths: Int[Array, "B n"], tokens: int) -> Bool[Array, "B n C"]:
    """True where a sample, of at most this many tokens, has a token.

    >>> token_mask(jnp.array([[1, 3]]), 3).astype(int).tolist()
    [[[1, 0, 0], [1, 1, 1]]]
    """
    return jnp.arange(tokens)[None, None] < lengths[..., None]


def shaped_rewards(
    rewards: Samplewise, logps: Tokenwise, ref_logps: Tokenwise, beta: float | Scalar
) -> Float[Array, "B n"]:
    r"""Rewards of whole samples less the KL penalty, ``[B, n]``.

    .. math:: R(x, y) = r(x, y) - \beta \sum_t \log \frac{\pi(y_t | x, y_{<t})}{\pi_\mathrm{ref}(y_t | x, y_{<t})}

    Source: Ahmadian et al. 2024 (arXiv 2402.14740), where a whole completion is one action. It is constant
    over a prompt's completions where the policy is the optimum, and only there.

    Args:
      rewards: ``[B, n]``.
      logps, ref_logps: of the tokens, under the policy that drew them and under the reference, ``[B, n, C]``.
      beta: strength of the KL penalty, 0 or above.

    >>> logps, ref = jnp.array([[[-1.0, -2.0]]]), jnp.array([[[-1.5, -2.5]]])
    >>> shaped_rewards(jnp.array([[3.0]]), logps, ref, beta=0.5).tolist()  # 3 - 0.5 * (0.5 + 0.5)
    [[2.5]]
    """
    return rewards - beta * jnp.sum(logps - ref_logps, axis=-1)


def token_rewards(
    rewards: Samplewise, logps: Tokenwise, ref_logps: Tokenwise, lengths: Int[Array, "B n"], beta: float | Scalar
) -> Float[Array, "B n C"]:
    r"""Rewards of single tokens, ``[B, n, C]``: the KL penalty of each, and the sample's reward at its last.

    .. math:: r_t = r(x, y)\, [t = |y|] - \beta \log \frac{\pi(y_t | x, y_{<t})}{\pi_\mathrm{ref}(y_t | x, y_{<t})}

    Source: Ziegler et al. 2019 (arXiv 1909.08593), equation 2, and Ouyang et al. 2022 (arXiv 2203.02155), equation 2.
    They add up to :func:`shaped_rewards`. Arguments as there; ``lengths`` count a sample's tokens.

    >>> logps, ref = jnp.array([[[-1.0, -2.0, 0.0]]]), jnp.array([[[-1.5, -2.5, 0.0]]])
    >>> token_rewards(jnp.array([[3.0]]), logps, ref, jnp.array([[2]]), beta=0.5).tolist()
    [[[-0.25, 2.75, 0.0]]]
    """
    last = jnp.arange(logps.shape[-1])[None, None] == lengths[..., None] - 1
    return jnp.where(last, rewards[..., None], 0.0) - beta * (logps - ref_logps)


def leave_one_out(rewards: Samplewise) -> Float[Array, "B n"]:
    r"""Advantages of samples, ``[B, n]``: each one's reward less the mean of its prompt's other samples.

    .. math:: A_i = R_i - \frac{1}{n - 1} \sum_{j \ne i} R_j

    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!", as RLOO of Ahmadian et al. 2024
    (arXiv 2402.14740) has it. The baseline does not depend on the sample itself, so the gradient stays unbiased.

    Raises:
      ValueError: one sample of a prompt, which leaves no others.

    >>> leave_one_out(jnp.array([[1.0, 2.0, 6.0]])).tolist()  # 1 - 4, 2 - 3.5, 6 - 1.5
    [[-3.0, -1.5, 4.5]]
    """
    n = rewards.shape[1]
    if n < 2:
        raise ValueError(f"leave_one_out: {n} sample of a prompt leaves none to compare with; draw 2 or more")
    return (rewards - jnp.mean(rewards, axis=1, keepdims=True)) * (n / (n - 1))


def clipped_surrogate(log_ratio: Array, advantages: Array, eps: float) -> Array:
    r"""The pessimistic bound of an action's gain in advantage, of any shape.

    .. math:: \min(q A,\, \mathrm{clip}(q, 1 - \epsilon, 1 + \epsilon)\, A), \qquad q = \pi / \pi_\mathrm{old}

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7. Where the policy still is the one that drew, q is 1 and
    its gradient is ``A grad log pi``.

    >>> [f"{x:.4f}" for x in clipped_surrogate(jnp.log(jnp.array([1.5, 1.5, 0.9])), jnp.array([1.0, -1.0, 2.0]), 0.2)]
    ['1.2000', '-1.5000', '1.8000']
    """
    ratio = jnp.exp(log_ratio)
    return jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - eps, 1 + eps) * advantages)


def rloo_loss(
    token_logps: Tokenwise, old_logps: Tokenwise, advantages: Samplewise, eps: float = 0.2
) -> Float[Array, "B n"]:
    r"""REINFORCE's loss of every sample, ``[B, n]``, by the ratio of the policy to the one that drew it.

    .. math:: -\min(q A,\, \mathrm{clip}(q, 1 - \epsilon, 1 + \epsilon)\, A), \qquad
              q = \frac{\pi(y|x)}{\pi_\mathrm{old}(y|x)}

    At the first update after the samples were drawn q is 1 and the gradient is REINFORCE's, ``-A grad log pi(y|x)``.
    Source: Ahmadian et al. 2024 (arXiv 2402.14740); the ratio of whole samples, for further updates with the same
    samples, is that of TRL's RLOOTrainer.

    Args:
      token_logps, old_logps: of the tokens, under the policy and under the one that drew them, ``[B, n, C]``.
      advantages: of the samples (:func:`leave_one_out`), ``[B, n]``.
      eps: by how much the ratio may move before a sample counts no more.

    >>> logps, a = jnp.array([[[-1.0, -2.0], [-3.0, 0.0]]]), jnp.array([[1.0, -1.0]])
    >>> jax.grad(lambda x: rloo_loss(x, logps, a).sum())(logps).tolist()  # -A, of every token
    [[[-1.0, -1.0], [1.0, 1.0]]]
    """
    return -clipped_surrogate(jnp.sum(token_logps - old_logps, axis=-1), advantages, eps)


def gae(
    rewards: Tokenwise, values: Tokenwise, mask: Bool[Array, "B n C"], gamma: float = 1.0, lam: float = 0.95
) -> Float[Array, "B n C"]:
    r"""Generalised advantage estimates of every token, ``[B, n, C]``, 0 beyond a sample's end.

    .. math:: A_t = \delta_t + \gamma \lambda A_{t+1}, \qquad \delta_t = r_t + \gamma V_{t+1} - V_t

    Source: Schulman et al. 2016 (arXiv 1506.02438), equation 16. Beyond a sample's last token there is nothing to come,
    also where it was cut at the limit of new tokens: the sample up to there is what the reward is of.

    Args:
      rewards: of the tokens (:func:`token_rewards`).
      values: what the value model expects before each token of all that is to come.
      mask: true where a sample has a token (:func:`token_mask`).
      gamma: discount; 1 for the objective that the optimum is known of.
      lam: 1 takes the rewards that came, 0 the value of the next token.

    >>> r, v = jnp.array([[[0.0, 1.0, 0.0]]]), jnp.array([[[0.5, 0.25, 9.0]]])
    >>> gae(r, v, jnp.array([[[True, True, False]]]), lam=0.5).tolist()  # 0.75, and -0.25 + 0.5 * 0.75
    [[[0.125, 0.75, 0.0]]]
    """
    values = jnp.where(mask, values, 0.0)
    following = jnp.pad(values[..., 1:], ((0, 0), (0, 0), (0, 1)))
    deltas = jnp.where(mask, rewards + gamma * following - values, 0.0)

    def back(later: Samplewise, delta: Samplewise) -> tuple[Samplewise, Samplewise]:
        now = delta + gamma * lam * later
        return now, now

    _, advantages = jax.lax.scan(back, jnp.zeros_like(deltas[..., 0]), jnp.moveaxis(deltas, -1, 0), reverse=True)
    return jnp.moveaxis(advantages, 0, -1)


def ppo_loss(
    token_logps: Tokenwise, old_logps: Tokenwise, advantages: Tokenwise, eps: float = 0.2
) -> Float[Array, "B n"]:
    r"""PPO's clipped loss of every sample, ``[B, n]``: the sum over its tokens.

    .. math:: -\sum_t \min(q_t A_t,\, \mathrm{clip}(q_t, 1 - \epsilon, 1 + \epsilon)\, A_t), \qquad
              q_t = \frac{\pi(y_t | x, y_{<t})}{\pi_\mathrm{old}(y_t | x, y_{<t})}

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7. Implementations often take the mean over all tokens of
    a batch, a constant times this one's in every batch; the sum is the gradient of J whatever the lengths.

    Args:
      token_logps, old_logps: of the tokens, under the policy and under the one that drew them, ``[B, n, C]``.
      advantages: of the tokens (:func:`gae`), 0 beyond a sample's end.
      eps: by how much a token's ratio may move before it counts no more.

    >>> logps, a = jnp.zeros((1, 1, 2)), jnp.array([[[1.0, -1.0]]])
    >>> print(f"{ppo_loss(logps + jnp.log(1.5), logps, a)[0, 0]:.4f}")  # -(min(1.5, 1.2) - max(1.5, 1.2))
    0.3000
    """
    return -jnp.sum(clipped_surrogate(token_logps - old_logps, advantages, eps), axis=-1)


def value_loss(
    values: Tokenwise, old_values: Tokenwise, returns: Tokenwise, mask: Bool[Array, "B n C"], eps: float = 0.2
) -> Float[Array, "B n"]:
    r"""The value model's loss of every sample, ``[B, n]``: the sum over its tokens.

    .. math:: \frac{1}{2} \sum_t \max\left((V_t - G_t)^2,\,
              (\mathrm{clip}(V_t, V^\mathrm{old}_t - \epsilon, V^\mathrm{old}_t + \epsilon) - G_t)^2\right)

    Source: the value loss of OpenAI's baselines, which Ziegler et al. 2019 (arXiv 1909.08593) used; TRL's too.

    Args:
      values, old_values: of the tokens, now and when the samples were drawn, ``[B, n, C]``.
      returns: advantages plus old values.
      mask: true where a sample has a token.
      eps: by how much a value may move before its token counts no more; in the rewards' unit.

    >>> old, mask = jnp.zeros((1, 1, 2)), jnp.array([[[True, False]]])
    >>> print(f"{value_loss(old + 0.5, old, old + 1, mask)[0, 0]:.4f}")  # max(0.5^2, 0.8^2) / 2
    0.3200
    """
    clipped = jnp.clip(values, old_values - eps, old_values + eps)
    worse = jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))
    return jnp.sum(jnp.where(mask, worse, 0.0), axis=-1) / 2
