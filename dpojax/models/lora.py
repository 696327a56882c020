"""An adapter beside a model's parameters: which weights it is beside, the model with it and without it, and merged.

With its adapter a model's parameters are the base's, the factors ``blocks/q_lora_a`` and ``blocks/q_lora_b``, and
under ``saved/`` what the adapter has whole (:func:`~dpojax.models.params.adapter_specs`). Off means that the decoder
reads the base's alone, the very arrays.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray

from dpojax.errors import UserError
from dpojax.models.block import Dropout
from dpojax.models.config import DecoderConfig, Lora, LowRank
from dpojax.models.families import Family
from dpojax.models.fewbits import restored
from dpojax.models.params import (
    ADAPTABLE,
    BACK,
    adapter_specs,
    flatten,
    init_specs,
    layer_specs,
    nest,
    of_adapter,
    param_specs,
    partition,
)
from dpojax.types import PyTree

DROPOUT_KEY = "dropout_key"
"""Where a train step puts its key among the parameters that the decoder reads."""
ALL_LINEAR = "all-linear"


def modules(family: Family, config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """Every linear module of a family's layers, as in ``self_attn.q_proj``, and the weights of ours that it holds."""
    names: dict[str, list[str]] = {}
    there = layer_specs(config)
    for name in ADAPTABLE:
        if name in there:
            names.setdefault(module_of(family, name), []).append(name)
    return {module: tuple(held) for module, held in names.items()}


def module_of(family: Family, name: str) -> str:
    """The module, within a layer, of a weight of ours."""
    whole = family.tensors[f"blocks/{name}"].name.removesuffix(".weight")
    return whole.split("{}.", 1)[-1]


def check_linear(config: DecoderConfig, source: str) -> None:
    """Refuse weights that are no plain matrices of a layer: an adapter of them would not be read.

    Raises:
      UserError: the layers have experts.
    """
    odd = [name for name, spec in layer_specs(config).items() if name in ADAPTABLE and len(spec.shape) > 3]
    odd += [name for name, spec in layer_specs(config).items() if name not in ADAPTABLE and len(spec.shape) > 2]
    if odd:
        raise UserError(f"{source}: an adapter beside the experts' weights is not supported; leave --lora-rank out")


def targeted(targets: Sequence[str], family: Family, config: DecoderConfig) -> tuple[str, ...]:
    """The weights of ours that these names mean.

    Args:
      targets: ``all-linear``; names of modules, as in ``q_proj`` or ``self_attn.q_proj``; or ours, as in ``q``. A
        module that holds several weights, as GPT-2's ``c_attn``, means all of them.
      family: names the modules.
      config: the decoder's choices.

    Raises:
      UserError: a name that no module of the family has.
    """
    known = modules(family, config)
    wanted: set[str] = set()
    for target in targets:
        means = lambda module, held: target in (ALL_LINEAR, module, *held) or module.endswith(f".{target}")  # noqa: B023, E731
        found = [name for module, held in known.items() if means(module, held) for name in held]
        if not found:
            last = dict.fromkeys(module.rsplit(".", 1)[-1] for module in known)
            raise UserError(
                f"--lora-targets {target}: no linear module of {family.model_type} layers; use {ALL_LINEAR}, or some "
                f"of {', '.join(last)}"
            )
        wanted.update(found)
    return tuple(name for name in ADAPTABLE if name in wanted)


def new_lora(names: Sequence[str], rank: int, alpha: float, **more: Any) -> Lora:
    """An adapter of one rank and alpha beside the weights of these names."""
    return Lora(weights=tuple(LowRank(name=name, rank=rank, alpha=alpha) for name in names), **more)


def lora_of_dict(raw: dict[str, Any]) -> Lora:
    """The inverse of ``dataclasses.asdict``, from JSON."""
    weights = tuple(LowRank(**low) for low in raw["weights"])
    return Lora(**{**raw, "weights": weights, "saved": tuple(raw["saved"])})


def with_adapter(config: DecoderConfig, params: PyTree, seed: int = 0, mesh: Mesh | None = None) -> PyTree:
    """A base's parameters, the arrays themselves, and a fresh adapter beside them.

    Args:
      config: the choices, ``config.lora`` among them.
      params: the base's parameters.
      seed: of the adapter's random factors.
      mesh: where the adapter lies.
    """
    flat = flatten(params)
    drawn = {path: spec for path, spec in adapter_specs(config).items() if not path.startswith("saved/")}
    saved = {f"saved/{name}": jnp.copy(flat[_path(name, flat)]) for name in (config.lora.saved if config.lora else ())}
    return nest({**flat, **flatten(init_specs(drawn, seed, mesh)), **saved})


def without_adapter(params: PyTree) -> PyTree:
    """The base's parameters, the arrays themselves."""
    return partition(params, of_adapter)[1]


def _path(name: str, flat: dict[str, Any]) -> str:
    return f"blocks/{name}" if f"blocks/{name}" in flat else name


def switched_on(config: DecoderConfig, params: PyTree) -> PyTree:
    """The parameters that the layers read: whole ones of the adapter in place of the base's, each scale in its A, and
    in training a key for every layer's dropout."""
    lora = config.lora
    if lora is None:
        return params
    params = dict(params)
    key = params.pop(DROPOUT_KEY, None)
    flat = _replaced(config, flatten(params))
    for low in lora.weights:
        path = f"blocks/{low.name}_lora_a"
        flat[path] = flat[path] * jnp.asarray(lora.scale(low), flat[path].dtype)
    if key is not None and lora.dropout:
        flat["blocks/dropout"] = Dropout(jax.random.split(key, config.layers), lora.dropout)
    return nest(flat)


def _replaced(config: DecoderConfig, flat: dict[str, Any]) -> dict[str, Any]:
    """Parameters by path, the adapter's whole ones in place of the base's."""
    own = {path.removeprefix("saved/"): x for path, x in flat.items() if path.startswith("saved/")}
    flat = {path: x for path, x in flat.items() if not path.startswith("saved/")}
    if config.tied and not config.merged.tied and "head" not in own:
        flat["head"] = flat["embed"]  # the adapted embedding alone is another
    return flat | {_path(name, flat): x for name, x in own.items()}


def with_dropout(params: PyTree, key: PRNGKeyArray) -> PyTree:
    """The parameters of a train step that draws what its adapters' inputs lose."""
    return {**params, DROPOUT_KEY: key}


def merge(config: DecoderConfig, params: PyTree) -> PyTree:
    """The parameters of the model that computes the same without an adapter (``config.merged``): ``W + scale A B``."""
    if config.lora is None:
        return restored(config, params)
    flat = _replaced(config, flatten(restored(config, params)))
    for low in config.lora.weights:
        a, b = (flat.pop(f"blocks/{low.name}_lora_{factor}") for factor in "ab")
        path = f"blocks/{low.name}"
        flat[path] = _merged(flat[path], a, b, config.lora.scale(low), back=low.name in BACK)
    return nest(flat)


@jax.jit(static_argnames="back")
def _merged(w: Array, a: Array, b: Array, scale: float | Array, *, back: bool) -> Array:
    forms = {3: "lkf,ldk->ldf", 4: "lknh,ldk->ldnh"} if back else {3: "ldk,lkf->ldf", 4: "ldk,lknh->ldnh"}
    product = jnp.einsum(forms[w.ndim], a, b, preferred_element_type=jnp.float32)
    return (w + scale * product).astype(w.dtype)


def check_merged(config: DecoderConfig) -> None:
    """Refuse an adapter where none is read, as in sampling.

    Raises:
      ValueError: it says how to merge.
    """
    if config != config.merged:
        raise ValueError(
            "the model has an adapter, or is quantised; merge it first: merge(config, params), and config.merged"
        )


def parameters(config: DecoderConfig) -> tuple[int, int]:
    """How many numbers a run of these choices trains, and how many the model has."""
    sizes = {path: math.prod(spec.shape) for path, spec in param_specs(config).items()}
    trained = sum(n for path, n in sizes.items() if of_adapter(path) or config.lora is None)
    return trained, sum(sizes.values())
