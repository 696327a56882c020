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
    init: Literal["normal", "zeros", "ones", "uniform"] = "normal"
    bound: float = 0.0
    """Of uniform values, on both sides of zero."""
    dtype: Any = jnp.float32


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
    """Every tensor of a decoder, by path; those of its adapter, if it has one, behind the base's."""
    if config.lora is not None:
        return param_specs(config.base) | adapter_specs(config)
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
    return out if config.quantized == "none" else quantized_specs(config, out)


NF4_BLOCK = 64
"""Numbers that share a scale, along a weight's first axis."""


def quantized_specs(config: DecoderConfig, specs: Mapping[str, ParamSpec]) -> dict[str, ParamSpec]:
    """The table with the layers' weights in few bits, each with its scales as ``blocks/q_scale``."""
    out = dict(specs)
    for name in ADAPTABLE:
        if (path := f"blocks/{name}") not in specs:
            continue
        L, D, *rest = specs[path].shape
        layers, width, *axes = specs[path].axes
        if config.quantized == "nf4":
            scale = ParamSpec((L, D // math.gcd(D, NF4_BLOCK), *rest), (layers, width, *axes), "ones")
        elif name in BACK:
            scale = ParamSpec((L, D, *[1] * len(rest)), (layers, width, *[None] * len(rest)), "ones")
        else:
            scale = ParamSpec((L, 1, *rest), (layers, None, *axes), "ones")
        dtype = jnp.uint4 if config.quantized == "nf4" else jnp.int8
        out |= {path: dataclasses.replace(specs[path], dtype=dtype), f"{path}_scale": scale}
    return out


BACK = ("o", "down")
"""The weights back to the model's width, whose inputs are behind it."""
ADAPTABLE = ("q", "k", "v", "o", "gate", "up", "down")
"""The weights that can have an adapter."""


def adapter_specs(config: DecoderConfig) -> dict[str, ParamSpec]:
    """The tensors of a decoder's adapter, by path.

    A weight ``[D, *out]`` has the factors ``blocks/q_lora_a [D, r]`` and ``blocks/q_lora_b [r, *out]``; one back to the
    model's width, ``[D, *in]``, has ``[r, *in]`` and ``[D, r]``. The factor that is not zero starts uniform, within
    one over the root of its inputs, as in PEFT. A parameter that the adapter has whole is ``saved/head``.
    """
    if config.lora is None:
        return {}
    inner, base, out = layer_specs(config), param_specs(config.base), {}
    for low in config.lora.weights:
        (D, *rest), (width, *axes), r = inner[low.name].shape, inner[low.name].axes, low.rank
        narrow, wide = ((D, r), (width, None)), ((r, *rest), (None, *axes))
        a, b = (wide, narrow) if low.name in BACK else (narrow, wide)
        inputs = {"a": math.prod(rest) if low.name in BACK else D, "b": r}
        for factor, (shape, sharded) in (("a", a), ("b", b)):
            zero = factor == config.lora.zero
            fresh = ("zeros", 0.0) if zero else ("uniform", inputs[factor] ** -0.5)
            spec = ParamSpec((config.layers, *shape), ("layers", *sharded), *fresh)
            out[f"blocks/{low.name}_lora_{factor}"] = spec
    whole = param_specs(config.merged)
    for path in {**base, **whole}:
        if (name := path.removeprefix("blocks/")) in config.lora.saved:
            out[f"saved/{name}"] = whole[path]
    return out


def of_adapter(path: str) -> bool:
    """Whether a path is one of an adapter's."""
    return path.startswith("saved/") or path.endswith(("_lora_a", "_lora_b"))


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
    """Shapes, dtypes and, on a mesh, placement of every parameter; nothing is allocated."""
    shapes = map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), config)
    if mesh is None:
        return shapes
    placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(placed, shapes, param_shardings(mesh, config))


def init_params(config: DecoderConfig, seed: int, mesh: Mesh | None = None) -> PyTree:
    """Fresh parameters, float32: weights normal with standard deviation 0.02, norms 1, biases and scores 0.

    On a mesh they are made where they lie, and are the same on every mesh.
    """
    return init_specs(param_specs(config), seed, mesh)


def init_specs(specs: Mapping[str, ParamSpec], seed: int, mesh: Mesh | None = None) -> PyTree:
    """Fresh values of these tensors, float32, as :func:`init_params` makes a whole decoder's."""

    def make() -> PyTree:
        keys = jax.random.split(jax.random.key(seed), len(specs))
        fresh: dict[str, Callable[[Any, ParamSpec], Array]] = {
            "normal": lambda key, spec: SPREAD * jax.random.normal(key, spec.shape),
            "uniform": lambda key, spec: jax.random.uniform(key, spec.shape, minval=-spec.bound, maxval=spec.bound),
            "zeros": lambda key, spec: jnp.zeros(spec.shape),
            "ones": lambda key, spec: jnp.ones(spec.shape),
        }
        return nest({path: fresh[spec.init](key, spec) for key, (path, spec) in zip(keys, specs.items(), strict=True)})

    placed = None if mesh is None else {path: NamedSharding(mesh, RULES.spec(s.axes)) for path, s in specs.items()}
    return jax.jit(make, out_shardings=placed and nest(placed))()


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
