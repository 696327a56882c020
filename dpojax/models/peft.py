"""PEFT's adapter directories, in and out: ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT names a module of the family, and stores ``lora_A.weight [r, in]`` and ``lora_B.weight [out, r]``. A factor that
keeps the model's width is one of ours as it is; the other has the form of a weight whose width is r, and goes through
the family's table as such. Where a module holds several weights of ours (GPT-2's ``c_attn``), each has all of its A and
its own part of its B; when written, the As are stacked and the Bs are blocks, so the module's rank is their sum.
"""

import collections
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dpojax.errors import UserError
from dpojax.models.config import DecoderConfig, Lora, LowRank
from dpojax.models.families import Family
from dpojax.models.lora import check_linear, modules
from dpojax.models.params import BACK, adapter_specs, flatten, layer_specs
from dpojax.models.safetensors import open_safetensors, read_json, written_aside
from dpojax.models.stored import FLOAT8
from dpojax.models.weights import Placed, file_tensor, gathered, places, read_slice
from dpojax.paths import AnyPath, path_of, write_text, written_on_disk
from dpojax.sharding import RULES, put_global, single_device_mesh
from dpojax.types import PyTree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "biases of the adapter's own (lora_bias)",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "single trained tokens (trainable_token_indices)",
    "target_parameters": "adapters of parameters, as of experts (target_parameters)",
    "alora_invocation_tokens": "activated LoRA",
    "loftq_config": "LoftQ, which changes the base",
    "megatron_config": "Megatron's layers",
    "arrow_config": "Arrow routing",
    "velora_config": "VeLoRA",
}
"""Fields of ``adapter_config.json`` that, where set, make another computation than ours."""
KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base as it is."""


def is_adapter(path: AnyPath) -> bool:
    """Whether a directory holds an adapter and no whole model."""
    whole = ("model.safetensors", "model.safetensors.index.json")
    return (path / CONFIG).exists() and not any((path / name).exists() for name in whole)


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """A PEFT directory, opened: its config, and its tensors by their names without PEFT's prefix."""

    path: AnyPath
    raw: dict[str, Any]
    tensors: Mapping[str, Any]

    def base_name(self) -> str:
        """The base's name, as the adapter has it.

        Raises:
          UserError: it has none, or none that is there.
        """
        name = self.raw.get("base_model_name_or_path")
        beside = f"give the base as --model and the adapter as --adapter, or set it in {self.path / CONFIG}"
        if not name:
            raise UserError(f"{self.path}: no base_model_name_or_path says what it is an adapter of; {beside}")
        if not path_of(name).exists() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
            raise UserError(f"{self.path}: its base {name} is not there; {beside}")
        return name

    def read(self, name: str) -> np.ndarray:
        """A tensor, float32."""
        return np.asarray(self.tensors[name][...], np.float32)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].get_shape())


def open_adapter(path: AnyPath) -> AdapterFiles:
    """An adapter's files, its config checked; no tensor has been read.

    Raises:
      UserError: it is no LoRA, is one with a part that is not supported, or its files are damaged.
    """
    raw, where = read_json(path / CONFIG), path / CONFIG
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type {raw.get('peft_type')!r} is not supported; use LORA")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"{where}: task_type {raw['task_type']!r} is not supported; use CAUSAL_LM")
    for field, what in REFUSED.items():
        if raw.get(field):
            raise UserError(f"{where}: {what} is not supported; merge the adapter with peft and use the merged model")
    if raw.get("bias", "none") != "none":
        raise UserError(
            f"{where}: bias {raw['bias']!r} trains the base's biases, which is not supported; merge the adapter with "
            "peft and use the merged model"
        )
    if raw.get("init_lora_weights") not in KEEP_THE_BASE:
        raise UserError(
            f"{where}: init_lora_weights {raw['init_lora_weights']!r} may have changed the base; save the adapter with "
            "peft's path_initial_model_for_weight_conversion, which makes it a plain one"
        )
    if not (path / WEIGHTS).exists():
        pickled = " (adapter_model.bin is a pickle, which is not read)" if (path / "adapter_model.bin").exists() else ""
        raise UserError(f"{path}: no {WEIGHTS}{pickled}; save the adapter with safe_serialization=True")
    file = open_safetensors(path / WEIGHTS)
    tensors = {}
    for name in file.keys():  # noqa: SIM118  # it is no dict
        view = file.get_slice(name)
        if not name.startswith(PREFIX) or view.get_dtype() in FLOAT8 or view.get_dtype()[0] not in "FB":
            raise UserError(f"{path / WEIGHTS}: tensor {name} is none of a LoRA; save the adapter again with peft")
        tensors[name.removeprefix(PREFIX).replace(".modules_to_save.", ".")] = view
    return AdapterFiles(path, raw, tensors)


def lora_of(files: AdapterFiles, family: Family, config: DecoderConfig) -> Lora:
    """The adapter of these files beside a base, every tensor of them accounted for.

    Args:
      files: the adapter.
      family: names the base's modules.
      config: the base's choices.

    Raises:
      UserError: a tensor does not fit the base, layers differ in rank or scale, or nothing reads a tensor.
    """
    check_linear(config, str(files.path))
    rslora, read, weights = bool(files.raw.get("use_rslora")), set(), []
    for module, held in modules(family, config).items():
        names = {i: _module_name(family, held[0], i) for i in range(config.layers)}
        there = {i: name for i, name in names.items() if f"{name}.lora_A.weight" in files.tensors}
        if not there:
            continue
        found = {(*_factors(files, name), _alpha(files, name)) for name in there.values()}
        if len(found) > 1:
            raise UserError(
                f"{files.path}: {module} has another rank or alpha in some layers than in others, which is not "
                "supported; merge the adapter with peft and use the merged model"
            )
        ((rank, inputs, outputs, alpha),) = found
        specs = [layer_specs(config)[name].shape for name in held]
        widths = config.width, sum(int(np.prod(shape[1:])) for shape in specs)
        wanted = widths[::-1] if held[0] in BACK else widths
        if (inputs, outputs) != wanted:
            raise UserError(
                f"{files.path}: {module} is of {inputs} inputs and {outputs} outputs, the base's of {wanted[0]} and "
                f"{wanted[1]}; name the adapter's own base"
            )
        weights += [LowRank(name=name, rank=rank, alpha=alpha) for name in held]
        read |= {f"{name}.lora_{factor}.weight" for name in there.values() for factor in "AB"}
    order = {name: i for i, name in enumerate(layer_specs(config))}
    lora = Lora(weights=tuple(sorted(weights, key=lambda low: order[low.name])), rslora=rslora)
    return _with_saved(files, family, config, lora, set(files.tensors) - read)


def _module_name(family: Family, name: str, layer: int) -> str:
    return family.tensors[f"blocks/{name}"].name.format(layer).removesuffix(".weight")


def _factors(files: AdapterFiles, module: str) -> tuple[int, int, int]:
    """The rank, the inputs and the outputs of a module's adapter."""
    if f"{module}.lora_B.weight" not in files.tensors:
        raise UserError(f"{files.path / WEIGHTS}: tensor {module}.lora_B.weight is missing; save the adapter again")
    (rank, inputs), (outputs, same) = (files.shape(f"{module}.lora_{factor}.weight") for factor in "AB")
    if rank != same:
        raise UserError(f"{files.path / WEIGHTS}: {module} has factors of rank {rank} and {same}; save it again")
    return rank, inputs, outputs


def _alpha(files: AdapterFiles, module: str) -> float:
    """A module's alpha; patterns match the end of its name, as in PEFT."""
    for pattern, alpha in (files.raw.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(alpha)
    return float(files.raw.get("lora_alpha", 8))


def _with_saved(files: AdapterFiles, family: Family, config: DecoderConfig, lora: Lora, left: set[str]) -> Lora:
    """The adapter with the parameters that it has whole: ``modules_to_save``, and resized embeddings."""
    saved, vocab = [], None
    untied = dataclasses.replace(config, tied=config.tied and "head" not in family.tensors)
    for path, place in places(family, untied).items():
        names = [place.name(i) for i in range(place.layers or 1)]
        if not left.intersection(names):
            continue
        if place.fused or not left.issuperset(names):
            raise UserError(f"{files.path}: {names[0]} is saved in part, which is not supported; merge the adapter")
        shape, wanted = files.shape(names[0]), place.tensor.shape(place.shape)
        if path in ("embed", "head") and shape[1:] == wanted[1:]:
            vocab = shape[0] if shape != wanted else vocab
        elif shape != wanted:
            raise UserError(f"{files.path}: tensor {names[0]} has shape {shape}, the base's has {wanted}")
        saved.append(path.removeprefix("blocks/"))
        left = left.difference(names)
    if left:
        raise UserError(
            f"{files.path}: nothing reads {len(left)} of its tensors ({', '.join(sorted(left)[:3])}); merge the "
            "adapter with peft and use the merged model"
        )
    embeddings = [name for name in ("embed", "head") if name in saved]
    if vocab is not None and (config.head_bias or (not config.tied and len(embeddings) < 2)):
        raise UserError(f"{files.path}: only one of embedding and unembedding is resized; save both in the adapter")
    tied = config.tied
    if config.tied and embeddings:
        embed, head = (family.tensors[name].name if name in family.tensors else "" for name in ("embed", "head"))
        same = len(embeddings) == 2 and np.array_equal(files.read(embed), files.read(head))
        tied = same or (embeddings == ["embed"] and (vocab is not None or bool(files.raw.get("ensure_weight_tying"))))
        saved = [name for name in saved if name != "head" or not tied]
    tied_now = None if tied == config.tied else tied
    return dataclasses.replace(lora, saved=tuple(saved), vocab_size=vocab, tied=tied_now)


@dataclasses.dataclass
class _Layers:
    """Factors as weights of a family's files (:class:`~dpojax.models.weights.TensorSource`); zeros where a layer has no
    adapter."""

    path: AnyPath
    factors: Mapping[str, np.ndarray]
    empty: np.ndarray

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.factors.get(name, self.empty).shape

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.factors.get(name, self.empty)[index]


def load_adapter(
    files: AdapterFiles, family: Family, config: DecoderConfig, mesh: Mesh | None = None
) -> dict[str, jax.Array]:
    """The adapter's parameters by path, float32, on the mesh.

    Args:
      files: the adapter.
      family: of the base.
      config: the base's choices with the adapter's (:func:`lora_of`) as ``config.lora``.
      mesh: where they lie (default: whole, on JAX's first device).
    """
    mesh, specs, where = mesh or single_device_mesh(), adapter_specs(config), places(family, config.merged)
    assert config.lora is not None
    out: dict[str, np.ndarray] = {}
    for low in config.lora.weights:
        place = places(family, config.base)[f"blocks/{low.name}"]
        factors = {f: _stacked(files, family, config, low.name, f) for f in "AB"}
        wide, narrow = ("A", "B") if low.name in BACK else ("B", "A")
        out[f"blocks/{low.name}_lora_{wide.lower()}"] = _wide(files.path, place, low, factors[wide], wide)
        plain = factors[narrow] if narrow == "B" else {i: x.T for i, x in factors[narrow].items()}
        zero = np.zeros(specs[f"blocks/{low.name}_lora_{narrow.lower()}"].shape[1:], np.float32)
        out[f"blocks/{low.name}_lora_{narrow.lower()}"] = np.stack([plain.get(i, zero) for i in range(config.layers)])
    for path in (path for path in specs if path.startswith("saved/")):
        name = path.removeprefix("saved/")
        place = where[name if name in where else f"blocks/{name}"]
        layers = [place.tensor.to_ours(files.read(place.name(i)), place.shape) for i in range(place.layers or 1)]
        out[path] = layers[0] if place.layers is None else np.stack(layers)
    return {path: put_global(x, NamedSharding(mesh, RULES.spec(specs[path].axes))) for path, x in out.items()}


def _stacked(
    files: AdapterFiles, family: Family, config: DecoderConfig, name: str, factor: str
) -> dict[int, np.ndarray]:
    """A weight's factor in every layer that has one."""
    at = {i: f"{_module_name(family, name, i)}.lora_{factor}.weight" for i in range(config.layers)}
    return {i: files.read(tensor) for i, tensor in at.items() if tensor in files.tensors}


def _as_weight(x: np.ndarray, place: Placed, factor: str) -> np.ndarray:
    """A factor ``[out, r]`` (B) or ``[r, in]`` (A), and its inverse, in the orientation of the family's weight, whose
    width is r: ``[r, out]``, or outputs first."""
    return x.T if (factor == "B") != place.tensor.outputs_first else x


def _wide(path: AnyPath, place: Placed, low: LowRank, layers: dict[int, np.ndarray], factor: str) -> np.ndarray:
    """A factor whose other side is not the model's width, ``[L, r, *out]``, of the parameter's part of its module."""
    weights = {place.name(i): _as_weight(x, place, factor) for i, x in layers.items()}
    shape = (low.rank, *place.shape[1:])
    virtual = dataclasses.replace(place, shape=shape)
    source = _Layers(path, weights, np.zeros_like(next(iter(weights.values()))))
    stacked = (place.layers or 1, *shape)
    return read_slice(source, virtual, stacked, tuple(slice(None) for _ in stacked))


def save_adapter(params: PyTree, config: DecoderConfig, family: Family, directory: AnyPath, *, base: str) -> None:
    """Write an adapter as a PEFT directory, float32.

    Args:
      params: the adapter's parameters; others are not written.
      config: the choices, ``config.lora`` among them.
      family: names the modules.
      directory: where; it is complete or not there.
      base: the base's name, for whoever reads it.

    Raises:
      UserError: the directory cannot be written, or the disk is full.
    """
    from safetensors.numpy import save_file

    lora = config.lora
    assert lora is not None
    specs = adapter_specs(config)
    flat = {path: np.asarray(gathered(x), np.float32) for path, x in flatten(params).items() if path in specs}
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, tuple[int, float]] = {}
    for module, held in _modules_of(lora, family, config).items():
        scale = lora.scale(held[0])
        if any(lora.scale(low) != scale for low in held):
            raise UserError(f"the adapter's parts of {module} differ in scale, which PEFT cannot say; export it merged")
        rank = sum(low.rank for low in held)
        ranks[module] = rank, scale * (rank**0.5 if lora.rslora else rank)
        for layer in range(config.layers):
            a, b = _module_factors(flat, held, family, config, layer)
            name = PREFIX + _module_name(family, held[0].name, layer)
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    saved = _saved_tensors(flat, family, config)
    tensors |= {PREFIX + name: x for name, x in saved.items()}
    raw = peft_config(lora, _short(ranks, modules(family, config)), base=base, conv1d=_is_conv1d(lora, family))
    raw["modules_to_save"] = sorted({name.removesuffix(".weight").rsplit(".", 1)[-1] for name in saved}) or None
    raw["task_type"] = "SEQ_CLS" if config.reward else "CAUSAL_LM"
    with written_aside(directory, patterns=("adapter_model*", CONFIG), last=CONFIG) as aside:
        with written_on_disk(aside) as files:
            tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
            save_file(tensors, files / WEIGHTS, metadata={"format": "pt"})
        write_text(aside / CONFIG, json.dumps(raw, indent=2))


def _modules_of(lora: Lora, family: Family, config: DecoderConfig) -> dict[str, list[LowRank]]:
    """The modules that have an adapter, and the weights of ours that each holds."""
    by_name = {low.name: low for low in lora.weights}
    every = modules(family, config).items()
    return {module: own for module, held in every if (own := [by_name[name] for name in held if name in by_name])}


def _module_factors(
    flat: Mapping[str, np.ndarray], held: list[LowRank], family: Family, config: DecoderConfig, layer: int
) -> tuple[np.ndarray, np.ndarray]:
    """A module's A and B in PEFT's form: of several weights, As one above the other, and Bs as blocks."""
    where, back = places(family, config.base), held[0].name in BACK
    narrow, wide, start = [], {}, 0
    rank = sum(low.rank for low in held)
    for low in held:
        a, b = (flat[f"blocks/{low.name}_lora_{factor}"][layer] for factor in "ab")
        narrow.append(b if back else a)
        block = np.zeros((rank, *where[f"blocks/{low.name}"].shape[1:]), np.float32)
        block[start : start + low.rank] = a if back else b
        wide[f"blocks/{low.name}"] = block
        start += low.rank
    parts = {path: dataclasses.replace(where[path], shape=x.shape) for path, x in wide.items()}
    paths = sorted(parts, key=lambda path: parts[path].order)
    first = parts[paths[0]]
    theirs = file_tensor(first.name(layer), [(path, ()) for path in paths], wide, parts).fetch()
    factor = _as_weight(theirs, first, "A" if back else "B")
    return (factor, np.concatenate(narrow, axis=1)) if back else (np.concatenate(narrow, axis=1).T, factor)


def _saved_tensors(flat: Mapping[str, np.ndarray], family: Family, config: DecoderConfig) -> dict[str, np.ndarray]:
    """The whole parameters of an adapter by the family's names; a tied unembedding a second time, as PEFT copies it."""
    out, where = {}, places(family, config.merged)
    for path, x in flat.items():
        if not path.startswith("saved/"):
            continue
        name = path.removeprefix("saved/")
        place = where[name if name in where else f"blocks/{name}"]
        for i in range(place.layers or 1):
            out[place.name(i)] = place.tensor.to_theirs(x if place.layers is None else x[i])
        if name == "embed" and config.merged.tied and "head" in family.tensors:
            out[family.tensors["head"].name] = out[place.name()].copy()
    return out


def _is_conv1d(lora: Lora, family: Family) -> bool:
    """Whether the family's modules store their weights with the inputs first, as GPT-2's do."""
    first = lora.weights[0].name if lora.weights else None
    return first is not None and family.tensors[f"blocks/{first}"].outputs_first == (first in BACK)


def _short(ranks: Mapping[str, tuple[int, float]], every: Iterable[str]) -> dict[str, tuple[int, float]]:
    """The same by the last part of each module's name, where that means no other module."""
    last = collections.Counter(module.rsplit(".", 1)[-1] for module in every)
    return {name if last[name := module.rsplit(".", 1)[-1]] == 1 else module: x for module, x in ranks.items()}


def peft_config(lora: Lora, ranks: Mapping[str, tuple[int, float]], *, base: str, conv1d: bool) -> dict[str, Any]:
    """An ``adapter_config.json``; ``ranks`` are rank and alpha by module."""
    rank, alpha = collections.Counter(ranks.values()).most_common(1)[0][0] if ranks else (8, 8.0)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": sorted(ranks),
        "rank_pattern": {m: r for m, (r, _) in ranks.items() if r != rank},
        "alpha_pattern": {m: a for m, (_, a) in ranks.items() if a != alpha},
        "use_rslora": lora.rslora,
        "fan_in_fan_out": conv1d,
        "init_lora_weights": True,
    }
