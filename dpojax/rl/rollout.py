"""Rollouts: samples of the policy, on the mesh that trains it, with the reference's log-probabilities and rewards."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from dpojax import processes
from dpojax.compiler import compiler_options
from dpojax.configs import ComputeOptions, MeshConfig
from dpojax.evaluate.samples import TextScorer, text_scores
from dpojax.generate import Samples, make_sampler
from dpojax.logprobs import completion_rewards, completion_stats
from dpojax.models import DecoderConfig, param_shardings
from dpojax.packing import PairBatch
from dpojax.sharding import batch_sharding, make_mesh, put_global, replicated
from dpojax.train.scoring import apply_on, jit_forward, place_params
from dpojax.types import PyTree

Reward = Callable[[Array, Array, Samples], Any]
"""``reward(prompt [B, P], prompt_len [B], samples) -> [B, n]``, JAX's or NumPy's numbers, called outside of any jit:
array code that is jitted, a reward model (:func:`model_reward`), or a scorer of texts (:func:`text_reward`).

The arrays are global: of several processes each has its own devices' part of them, and ``processes.fetch`` gives the
whole. NumPy's numbers must be of all prompts and the same in every process."""


@struct.dataclass
class Rollouts:
    """Samples of a policy and all that an update needs of them; tokens and what is of tokens is 0 beyond their ends.

    ``prompt`` is padded on the left. ``lengths`` count a sample's tokens, an EOS that was drawn included. ``logps`` are
    the tokens' log-probabilities under the policy that drew them, ``ref_logps`` under the reference, nats. ``ended`` is
    false where a sample was cut at the limit of new tokens.
    """

    prompt: Int[Array, "B P"]
    prompt_len: Int[Array, " B"]
    tokens: Int[Array, "B n C"]
    lengths: Int[Array, "B n"]
    logps: Float[Array, "B n C"]
    ref_logps: Float[Array, "B n C"]
    rewards: Float[Array, "B n"]
    ended: Bool[Array, "B n"]

    @property
    def batch(self) -> PairBatch:
        """The samples as completions of their prompts, which the model reads once each."""
        return batch_of(self.prompt, self.prompt_len, self.tokens, self.lengths)


class RolloutFn(Protocol):
    """Samples of a policy, ``rollout(policy, ref_params, prompt, prompt_len, reward, seed=0, step=0)``.

    ``prompt [B, P]`` is padded on the left; NumPy's are whole and equal in every process. All but the reward is
    compiled. Every step of a seed draws anew.
    """

    def __call__(
        self,
        policy: PyTree,
        ref_params: PyTree,
        prompt: Any,
        prompt_len: Any,
        reward: Reward,
        *,
        seed: int = 0,
        step: int = 0,
    ) -> Rollouts: ...


def batch_of(prompt: Array, prompt_len: Array, tokens: Array, lengths: Array) -> PairBatch:
    """Samples as a batch of prompts with n completions each; all rows are real."""
    return PairBatch(prompt, prompt_len, tokens, lengths, valid=(prompt_len > 0).astype(np.float32))


def make_rollout(
    config: DecoderConfig,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    num_samples: int,
    mesh: Mesh,
    compute: ComputeOptions | None = None,
) -> RolloutFn:
    """The function that draws samples of a policy at temperature 1, and has them judged.

    Args:
      config: shape of policy and reference.
      max_new_tokens: C, tokens of a sample at most.
      eos_ids: tokens that end a sample.
      num_samples: n, samples of each prompt.
      mesh: its devices split the prompts.
      compute: dtype, attention kernel, chunks of logits.
    """
    compute = compute or ComputeOptions()
    apply_fn, chunk = apply_on(config, mesh, compute), compute.logprob_chunk_tokens
    sampler = make_sampler(
        config,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        num_samples=num_samples,
        dtype=compute.dtype,
        mesh=mesh,
    )

    def draw(
        policy: PyTree, ref_params: PyTree, prompt: Array, prompt_len: Array, seed: Array, step: Array
    ) -> tuple[Samples, Float[Array, "B n C"]]:
        drawn = sampler(policy, prompt, prompt_len, jax.random.fold_in(jax.random.key(seed), step))
        batch, reads = batch_of(prompt, prompt_len, drawn.tokens, drawn.lengths), frozenset({"tokens"})
        stats = completion_stats(apply_fn, ref_params, batch, chunk_tokens=chunk, reads=reads, mesh=mesh)
        assert stats.tokens is not None
        return drawn, stats.tokens

    params, by_batch, everywhere = param_shardings(mesh, config), batch_sharding(mesh), replicated(mesh)
    jitted = jax.jit(
        draw,
        in_shardings=(params, params, by_batch, by_batch, everywhere, everywhere),
        out_shardings=by_batch,
        compiler_options=compiler_options(mesh),
    )

    def rollout(
        policy: PyTree,
        ref_params: PyTree,
        prompt: Any,
        prompt_len: Any,
        reward: Reward,
        *,
        seed: int = 0,
        step: int = 0,
    ) -> Rollouts:
        prompt, prompt_len = (on_mesh(x, mesh) for x in (prompt, prompt_len))
        # NumPy's numbers may go to a mesh of several processes, a key of one process may not.
        drawn, ref_logps = jitted(policy, ref_params, prompt, prompt_len, np.uint32(seed), np.uint32(step))
        rewards = reward(prompt, prompt_len, drawn)
        if np.shape(rewards) != drawn.lengths.shape:
            shapes = f"gives numbers {np.shape(rewards)} for samples {drawn.lengths.shape}"
            raise ValueError(f"the reward {shapes}; give one a sample")
        rewards = rewards if isinstance(rewards, jax.Array) else on_mesh(np.asarray(rewards, np.float32), mesh)
        return Rollouts(prompt, prompt_len, drawn.tokens, drawn.lengths, drawn.logps, ref_logps, rewards, drawn.ended)

    return rollout


def on_mesh(x: Any, mesh: Mesh) -> Array:
    """An array split over the mesh by its first axis, from one that is whole and equal in every process."""
    return x if isinstance(x, jax.Array) else put_global(x, batch_sharding(mesh))


def model_reward(
    config: DecoderConfig, params: PyTree, *, mesh: Mesh | None = None, compute: ComputeOptions | None = None
) -> Reward:
    """The reward that a reward model gives: its score at a sample's last token, whether the sample ended or was cut.

    Args:
      config: the reward model's shape.
      params: its parameters; they are laid out over the mesh once, here.
      mesh: that of the rollouts (default: all devices, each with a copy of the model).
      compute: dtype and attention kernel.

    Raises:
      ValueError: it is no reward model.
    """
    if not config.reward:
        raise ValueError("model_reward: the model predicts tokens; train one with the objective reward_model")
    mesh = mesh or make_mesh(MeshConfig())
    apply_fn, placed = apply_on(config, mesh, compute or ComputeOptions()), place_params(params, mesh, config)
    score = jit_forward(functools.partial(completion_rewards, apply_fn), mesh, config)

    def reward(prompt: Array, prompt_len: Array, samples: Samples) -> Float[Array, "B n"]:
        return score(placed, batch_of(prompt, prompt_len, samples.tokens, samples.lengths))

    return reward


def text_reward(scorer: TextScorer, tokenizer: Any) -> Reward:
    """The reward that a scorer of texts gives: ``scorer(prompts, completions)`` takes two lists of one length and gives
    as many numbers, as those of ``dpojax score --scorer`` do."""

    def reward(prompt: Array, prompt_len: Array, samples: Samples) -> np.ndarray:
        prompts, lengths = (np.asarray(processes.fetch(x)) for x in (prompt, prompt_len))
        rows = [row[len(row) - n :].tolist() for row, n in zip(prompts, lengths, strict=True)]
        return text_scores(scorer, tokenizer, rows, jax.tree.map(processes.fetch, samples))

    return reward
