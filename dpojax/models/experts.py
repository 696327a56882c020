"""A mixture of experts in place of a layer's MLP: exact routing, in which no token is dropped.

Every token goes to the k experts that its router finds most probable, however many others go there: tokens are sorted
by expert, and a ragged product multiplies each group with its expert's weights.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dpojax.models.block import ACTIVATIONS, Weights
from dpojax.models.config import DecoderConfig, Experts
from dpojax.sharding import RULES

NAMES = ("router", "experts_gate", "experts_up", "experts_down")
"""The tensors of a mixture (:func:`~dpojax.models.params.layer_specs`)."""
ROWS_OF_TILE = 512
"""Rows that the kernel multiplies at a time; it asks for whole tiles."""


@struct.dataclass
class Routing:
    """Where a layer's router sent its tokens, added up over the real ones among them: how many of their choices fell on
    each expert, the experts' probabilities, and how many tokens there were. Layers' may be stacked."""

    chosen: Float[Array, "*L E"]
    probs: Float[Array, "*L E"]
    tokens: Float[Array, "*L"]


def route(
    experts: Experts, router: Float[Array, "E D"], x: Float[Array, "n D"]
) -> tuple[Float[Array, "n k"], Int[Array, "n k"], Float[Array, "n E"]]:
    """Every token's weights and numbers of its experts, and the probabilities of all experts, float32.

    ``p = softmax(router x)``; the k largest are the weights, divided by their sum where the family renormalises them
    (Mixtral, arXiv 2401.04088).
    """
    logits = jnp.einsum("nd,ed->ne", x, router.astype(x.dtype), preferred_element_type=jnp.float32)
    probs = jax.nn.softmax(logits, axis=-1)
    weights, chosen = jax.lax.top_k(probs, experts.per_token)
    if experts.renormalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, chosen, probs


def ragged_product(
    x: Float[Array, "n a"], w: Float[Array, "E p q"], sizes: Int[Array, " E+1"], *, back: bool = False
) -> Float[Array, "n b"]:
    """Every group of rows times its own weight, and zeros for the last group, which has none.

    Args:
      x: rows, group after group.
      w: a weight a group, ``[E, a, b]``; with ``back`` it is ``[E, b, a]``.
      sizes: rows of each group, and of those behind all.
      back: whether the weights are turned round.
    """
    return jax.lax.ragged_dot(x, jnp.swapaxes(w, 1, 2) if back else w, sizes[:-1])


def tiles(m: int, k: int, n: int) -> tuple[int, int, int]:
    """The kernel's tile of a product ``[m, k] x [k, n]``."""
    return min(ROWS_OF_TILE, m), min(1024, k), min(1024, n)


def kernel_product(
    x: Float[Array, "n a"],
    w: Float[Array, "E p q"],
    sizes: Int[Array, " E+1"],
    *,
    back: bool = False,
    interpret: bool = False,
) -> Float[Array, "n b"]:
    """:func:`ragged_product` by JAX's Megablox kernel for TPUs (``jax.experimental.pallas.ops.tpu.megablox``).

    XLA's own makes the weights' gradients of products with every expert, masked: 24 times the work for 128 experts of
    which a token has 8, by its account of Qwen3-30B-A3B on v5p:4x4x4.
    """
    from jax.experimental.pallas.ops.tpu.megablox import gmm  # a TPU's compiler, which others need not load

    padding = -len(x) % ROWS_OF_TILE
    x, sizes = jnp.pad(x, [(0, padding), (0, 0)]), sizes.at[-1].add(padding)
    y = gmm(x, w, sizes, x.dtype, tiles, transpose_rhs=back, interpret=interpret)
    return y[: len(y) - padding]


def mixture(
    config: DecoderConfig,
    weights: Weights,
    x: Float[Array, "R T D"],
    first: Any = 0,
    product: Callable[..., Array] = ragged_product,
) -> Float[Array, "R T D"]:
    """The mixture's output: of every token, ``sum_i w_i down_i(act(gate_i x) * up_i x)`` over its experts.

    Args:
      config: the decoder's choices.
      weights: the layer's; of the experts' tensors, those from ``first`` on, all or one device's.
      x: the residual stream, normalised.
      first: the number of the first expert of which there are weights. Others add nothing.
      product: of groups of rows, each with its expert's weight, as :func:`ragged_product`.
    """
    experts = config.experts
    assert experts is not None
    R, T, D = x.shape
    tokens = x.reshape(R * T, D)
    share, chosen, _ = route(experts, weights["router"], tokens)
    gate, up, down = (weights[name].astype(x.dtype) for name in NAMES[1:])
    own = chosen.reshape(-1) - first
    # Tokens of experts that are elsewhere are sorted behind all groups, where the product is zero.
    own = jnp.where((own >= 0) & (own < len(gate)), own, len(gate))
    order = jnp.argsort(own, stable=True)
    sizes = jnp.bincount(own, length=len(gate) + 1).astype(jnp.int32)
    grouped = tokens[order // experts.per_token]
    inputs = checkpoint_name((product(grouped, gate, sizes), product(grouped, up, sizes)), "mlp")
    h = ACTIVATIONS[config.mlp.act](inputs[0]) * inputs[1]
    y = product(h, down, sizes, back=True)[jnp.argsort(order)].reshape(R * T, experts.per_token, D)
    return jnp.einsum("nkd,nk->nd", y, share.astype(x.dtype)).reshape(R, T, D)


def mixture_over_mesh(
    config: DecoderConfig,
    weights: Weights,
    x: Float[Array, "R T D"],
    mesh: Mesh | None,
    product: Callable[..., Array] | None = None,
) -> Float[Array, "R T D"]:
    """:func:`mixture`, every device with its own rows and its own experts, whose outputs are added up; ``product`` is
    by default the one that suits the devices."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    product = product or (kernel_product if platform == "tpu" else ragged_product)
    if mesh is None or mesh.size == 1:
        return mixture(config, weights, x, product=product)
    by_batch = PartitionSpec(RULES.batch, None, None)
    (axis,) = RULES.mesh_axes("experts")
    by_expert = PartitionSpec(axis, None, None)
    held = {name: weights[name] for name in NAMES}
    specs = {name: PartitionSpec() if name == "router" else by_expert for name in NAMES}

    def local(weights: Weights, x: Array) -> Array:
        first = jax.lax.axis_index(axis) * len(weights["experts_gate"])
        return jax.lax.psum(mixture(config, weights, x[0], first, product), axis)

    # A copy of the rows for each device with experts: gradients by the copies are added up. Left to shard_map (jax
    # 0.10), the rows' gradient was that of one device's experts.
    copies = jnp.broadcast_to(x[None], (mesh.shape[axis], *x.shape))
    # Pallas does not say over which axes its outputs vary, so there is nothing for check_vma to check.
    checked = product is ragged_product
    by_copy = PartitionSpec(axis, *by_batch)
    split = jax.shard_map(local, mesh=mesh, in_specs=(specs, by_copy), out_specs=by_batch, check_vma=checked)
    return split(held, copies)


def routing(config: DecoderConfig, weights: Weights, x: Float[Array, "R T D"], real: Array) -> Routing:
    """What a layer's router does with the real tokens among these, ``real [R, T]``."""
    experts = config.experts
    assert experts is not None
    _, chosen, probs = route(experts, weights["router"], x.reshape(-1, x.shape[-1]))
    mask = real.reshape(-1).astype(jnp.float32)
    counts = jnp.sum(jax.nn.one_hot(chosen, experts.number), axis=1)
    return Routing(mask @ counts, mask @ probs, jnp.sum(mask))


def balance_loss(config: DecoderConfig, layers: Routing) -> Float[Array, ""]:
    """``E sum_e f_e P_e``: f the share of tokens that chose expert e, P its mean probability, over all layers' tokens.

    It is k where experts are chosen evenly. Source: Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6, with the
    layers taken together as transformers does.

    Args:
      config: the decoder's choices.
      layers: of every layer with a mixture, stacked.
    """
    assert config.experts is not None
    total = jax.tree.map(lambda x: jnp.sum(x, axis=0), layers)
    tokens = jnp.maximum(total.tokens, 1)
    return config.experts.number * jnp.sum(total.chosen / tokens * total.probs / tokens)
