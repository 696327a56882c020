"""The table of parameters: shape, logical axes and initialiser of every tensor of a decoder, in one place.

Sharding, initialisation, loading, export, restoring and sampling map over it. A path is ``embed`` or ``blocks/q``; the
layers' tensors are stacked along a leading axis. Weights lie with the model's width first, the narrow axis: a product's
gradient then transposes the narrower of its two activations.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from dpojax.errors import UserError
from dpojax.models.config import DecoderConfig, Learned, Norm
from dpojax.sharding import RULES
from dpojax.types import PyTree

SPREAD = 0.02  # standard deviation of fresh weights


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One tensor: its shape, the logical axis of each dimension (:class:`~dpojax.sharding.Rules`), its fresh values."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "zeros", "ones"] = "normal"


def _norm(norm: Norm, name: str, width: int) -> dict[str, ParamSpec]:
    bias = {f"{name}_bias": ParamSpec((width,), ("norm",), "zeros")} if norm.bias else {}
    return {name: ParamSpec((width,), ("norm",), "zeros" if norm.offset else "ones")} | bias


def layer_specs(config: DecoderConfig) -> dict[str, ParamSpec]:
    """The tensors of one layer, by name. ``project`` finds the bias of ``q`` under ``q_bias``. Of a mixture of experts
    and an MLP a layer has one (:func:`layers_with`)."""
    D, F, a = config.width, config.mlp.width, config.attention
    out = {
        "q": ParamSpec((D, a.heads, a.head_dim), ("embed", "heads", "head_dim")),
        "k": ParamSpec((D, a.kv_heads, a.head_dim), ("embed", "kv_heads", "head_dim")),
        "v": ParamSpec((D, a.kv_heads, a.head_dim), ("embed", "kv_heads", "head_dim")),
        "o": ParamSpec((D, a.heads, a.head_dim), ("embed", "heads", "head_dim")),
    }
    if config.experts is not None:
        E, width = config.experts.number, config.experts.width
        out["router"] = ParamSpec((E, D), (None, "embed"))
        for name in ("experts_gate", "experts_up", "experts_down"):
            out[name] = ParamSpec((E, D, width), ("experts", "embed", None))
    if config.experts is None or config.dense_layers:
        names = ("gate", "up", "down") if config.mlp.gated else ("up", "down")
        out |= {name: ParamSpec((D, F), ("embed", "mlp")) for name in names}
    biased = {"none": (), "qkv": ("q", "k", "v"), "all": ("q", "k", "v", "o")}[a.bias]
    biased += tuple(name for name in ("gate", "up", "down") if config.mlp.bias and name in out)
    for name in biased:
        back = name in ("o", "down")  # to the model's width
        shape, axes = ((D,), ("norm",)) if back else (out[name].shape[1:], out[name].axes[1:])
        out[f"{name}_bias"] = ParamSpec(shape, axes, "zeros")
    if a.qk_norm is not None:
        for name in ("q", "k"):
            one = _norm(a.qk_norm, name, a.head_dim)[name]
            every = ParamSpec(out[name].shape[1:], out[name].axes[1:], one.init)
            out[f"{name}_norm"] = one if a.qk_norm_over == "head" else every
    for name in norms_of(config):
        out |= _norm(config.norm, name, D)
    return out


def layers_with(config: DecoderConfig, name: str) -> tuple[int, ...]:
    """The layers that have the tensor of this name, in whose order it is stacked."""
    every = range(config.layers)
    if name.startswith(("router", "experts_")):
        return tuple(i for i in every if i not in config.dense_layers)
    of_mlp = name.removesuffix("_bias") in ("gate", "up", "down")
    return config.dense_layers if of_mlp and config.experts is not None else tuple(every)


def norms_of(config: DecoderConfig) -> tuple[str, ...]:
    """The norms of a layer over the model's width, by its residual form."""
    before, after = ("attn_norm", "mlp_norm"), ("attn_post_norm", "mlp_post_norm")
    forms = {"pre": before, "parallel": before, "post": after, "pre_post": before + after}
    return (forms | {"parallel_shared": before[:1]})[config.residual]


def param_specs(config: DecoderConfig) -> dict[str, ParamSpec]:
    """Every tensor of a decoder, by path."""
    V, D = config.vocab_size, config.width
    out = {"embed": ParamSpec((V, D), ("vocab", "embed"))}
    if isinstance(config.positions, Learned):
        out["positions"] = ParamSpec((config.positions.size, D), (None, "embed"))
    for name, spec in layer_specs(config).items():
        stack = len(layers_with(config, name))
        out[f"blocks/{name}"] = ParamSpec((stack, *spec.shape), ("layers", *spec.axes), spec.init)
    out |= _norm(config.norm, "final_norm", D)
    if config.unembedding == "score":
        out["score"] = ParamSpec((1, D), (None, "embed"), "zeros")
    elif config.unembedding == "head":
        out["head"] = ParamSpec((V, D), ("vocab", "embed"))
    if config.head_bias and not config.reward:
        out["head_bias"] = ParamSpec((V,), ("vocab",), "zeros")
    return out


def flatten(params: PyTree) -> dict[str, Any]:
    """Parameters by path, ``blocks/q``, from a nested dict."""
    out: dict[str, Any] = {}
    for name, x in params.items():
        out |= {f"{name}/{inner}": y for inner, y in x.items()} if isinstance(x, Mapping) else {name: x}
    return out


def nest(flat: Mapping[str, Any]) -> PyTree:
    """The inverse of :func:`flatten`."""
    out: dict[str, Any] = {}
    for path, x in flat.items():
        *outer, name = path.split("/")
        (out.setdefault(outer[0], {}) if outer else out)[name] = x
    return out


def map_specs(function: Callable[[ParamSpec], Any], config: DecoderConfig) -> PyTree:
    """``function`` of every tensor's spec, in the parameters' structure."""
    return nest({path: function(spec) for path, spec in param_specs(config).items()})


def param_shardings(mesh: Mesh, config: DecoderConfig) -> PyTree:
    """A sharding for every parameter, in the parameters' structure."""
    return map_specs(lambda spec: NamedSharding(mesh, RULES.spec(spec.axes)), config)


def abstract_params(config: DecoderConfig, mesh: Mesh | None = None) -> PyTree:
    """Shapes, float32 and, on a mesh, placement of every parameter; nothing is allocated."""
    shapes = map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), config)
    if mesh is None:
        return shapes
    placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(placed, shapes, param_shardings(mesh, config))


def init_params(config: DecoderConfig, seed: int, mesh: Mesh | None = None) -> PyTree:
    """Fresh parameters, float32: weights normal with standard deviation 0.02, norms 1, biases and scores 0.

    On a mesh they are made where they lie, and are the same on every mesh.
    """
    specs = param_specs(config)

    def make() -> PyTree:
        keys = jax.random.split(jax.random.key(seed), len(specs))
        fresh: dict[str, Callable[[Any, tuple[int, ...]], Array]] = {
            "normal": lambda key, shape: SPREAD * jax.random.normal(key, shape),
            "zeros": lambda key, shape: jnp.zeros(shape),
            "ones": lambda key, shape: jnp.ones(shape),
        }
        values = {
            path: fresh[spec.init](key, spec.shape) for key, (path, spec) in zip(keys, specs.items(), strict=True)
        }
        return nest(values)

    return jax.jit(make, out_shardings=None if mesh is None else param_shardings(mesh, config))()


def partition(params: PyTree, trainable: Callable[[str], bool]) -> tuple[PyTree, PyTree]:
    """The parameters whose path is trainable, and the others, each in the parameters' structure."""
    flat = flatten(params)
    return tuple(nest({p: x for p, x in flat.items() if trainable(p) == wanted}) for wanted in (True, False))


def combine(trained: PyTree, frozen: PyTree) -> PyTree:
    """The inverse of :func:`partition`."""
    return nest({**flatten(frozen), **flatten(trained)})


NAMES = {
    "embed": "width",
    "vocab": "vocabulary",
    "mlp": "MLP width",
    "heads": "heads",
    "kv_heads": "kv_heads",
    "experts": "experts",
}


def check_divides(mesh: Mesh, config: DecoderConfig) -> None:
    """Refuse a mesh that does not divide the model's tensors evenly.

    Raises:
      UserError: naming the mesh axis, its size and the model's dimension.
    """
    for axis, size, dimension in _splits(mesh, config):
        if dimension % size:
            mesh_axis = RULES.mesh_axes(axis)[0]
            raise UserError(
                f"--mesh.{mesh_axis}: {size} does not divide the model's {NAMES.get(axis, axis)}, {dimension}; "
                "use a divisor"
            )


def _splits(mesh: Mesh, config: DecoderConfig) -> Iterator[tuple[str, int, int]]:
    for spec in param_specs(config).values():
        for axis, dimension in zip(spec.axes, spec.shape, strict=True):
            if axis is not None:
                yield axis, math.prod(mesh.shape[name] for name in RULES.mesh_axes(axis)), dimension
