"""The exact divergence of a policy from its reference, along completions that are given."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dpojax import processes
from dpojax.data import Batches, Example
from dpojax.evaluate.scoring import forward_over_mesh
from dpojax.logprobs import completion_stats
from dpojax.models import DecoderConfig, param_shardings, unembedding_of
from dpojax.packing import ApplyFn, PairBatch
from dpojax.progress import track
from dpojax.sharding import batch_sharding, batch_shards, held_sequences, put_batch
from dpojax.train.scoring import place_params
from dpojax.types import PyTree, ReferenceOutput


def exact_kl(
    config: DecoderConfig,
    policy: PyTree,
    ref: PyTree,
    examples: Sequence[Example],
    *,
    dtype: str = "float32",
    attention: str = "auto",
    batch_size: int = 8,
    chunk_tokens: int = 512,
    label: str = "KL from the reference",
) -> np.ndarray:
    r"""Sums over completions' tokens of the exact KL divergence of policy from reference, ``[n, N]``, nats.

    .. math:: \sum_t KL(\pi(\cdot | x, y_{<t}) \,\|\, \pi_\mathrm{ref}(\cdot | x, y_{<t}))

    On the policy's own samples, its mean is that of :func:`~dpojax.evaluate.samples.sampled_kl` with less variance: the
    expectation over each token is taken, not drawn. Divided by the completion's length, it is per token.

    Args:
      config: shape of both models.
      policy, ref: their parameters.
      examples: prompts with N completions each.
      dtype, attention: of the forward passes.
      batch_size: rows at least, over all devices.
      chunk_tokens: completion tokens whose logits exist at one time on a device.
      label: names the stage on the console.
    """
    apply_fn, mesh, batch_size = forward_over_mesh(config, dtype, attention, batch_size)
    R = batch_shards(mesh)
    batches = Batches(examples, batch_size, max_shapes=8, sequences=R, held=held_sequences(mesh, R))
    step = make_kl_step(apply_fn, mesh, config, chunk_tokens=chunk_tokens)
    policy, ref = place_params(policy, mesh, config), place_params(ref, mesh, config)
    out = np.zeros(batches.completions.shape, np.float32)
    for item in track(list(batches), label):
        got = processes.fetch(step(policy, ref, put_batch(item.batch, mesh)))
        there = item.index >= 0
        out[item.index[there]] = got[there]
    return out


def make_kl_step(
    apply_fn: ApplyFn, mesh: Mesh, config: DecoderConfig, *, chunk_tokens: int = 512
) -> Callable[[PyTree, PyTree, PairBatch], Float[Array, "B N"]]:
    """A jitted ``kl_step(policy, ref, batch) -> [B, N]``: what :func:`exact_kl` gives of a batch's completions."""
    by_batch, shardings = batch_sharding(mesh), param_shardings(mesh, config)

    def kls(policy: PyTree, ref: PyTree, batch: PairBatch) -> Float[Array, "B N"]:
        hidden = completion_stats(apply_fn, policy, batch, reads=frozenset({"hidden"}), mesh=mesh).hidden
        # The statistic is KL(reference || policy): here the two change places.
        theirs = ReferenceOutput(None, hidden, unembedding_of(config, policy))  # type: ignore[arg-type]  # no sums are read
        reads = frozenset({"kl"})
        kl = completion_stats(apply_fn, ref, batch, chunk_tokens=chunk_tokens, reads=reads, ref=theirs, mesh=mesh).kl
        assert kl is not None
        return kl

    return jax.jit(kls, in_shardings=(shardings, shardings, by_batch), out_shardings=by_batch)
