"""Quantised checkpoints as tensors in full precision: which scheme ``config.json`` names, and a source that
dequantises slice by slice.

Whether a module is quantised is told by its own tensors: those that a checkpoint left alone come as they are.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dpojax.errors import UserError
from dpojax.models.dequantize import FLOAT8, Blocks, Form, Packed, Parts, RawTensors, Scaled
from dpojax.models.dequantize_bnb import FourBit, RowInt8
from dpojax.models.dequantize_gptq import Awq, Gptq

CONFIG_KEYS = ("quantization_config", "compression_config")
FULL_PRECISION = frozenset(("F64", "F32", "F16", "BF16"))
COMPRESSED = ("dense", "float-quantized", "int-quantized", "mixed-precision", "naive-quantized", "pack-quantized")
INSTEAD = "use the model in full precision"


class QuantizedSource:
    """A source's tensors (:class:`~dpojax.models.weights.TensorSource`), quantised weights as float32.

    Args:
      source: the files' tensors as they are stored.
      forms: in which a quantised weight may be kept.

    Raises:
      UserError: a part of a quantised weight is missing.
    """

    def __init__(self, source: RawTensors, forms: list[Form]):
        self.path, self.source = source.path, source
        self.weights: dict[str, tuple[Form, Parts]] = {}
        used: set[str] = set()
        for name in source.names:
            for form in forms:
                stem = name.removesuffix(f".{form.weight}")
                parts = Parts(source, stem)
                if stem != name and form.holds(parts):
                    self.weights[f"{stem}.weight"] = form, parts
                    used.update(map(parts.name, form.names(parts)))
                    break
        plain = [name for name in source.names if name not in used]
        self.names = dict.fromkeys([*plain, *self.weights])

    def shape(self, name: str) -> tuple[int, ...] | None:
        if name not in self.weights:
            return self.source.shape(name) if name in self.names else None
        form, parts = self.weights[name]
        return form.shape(parts)

    def dtype(self, name: str) -> str:
        return "F32" if name in self.weights else self.source.dtype(name)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        if name not in self.weights:
            return self.source.read(name, index)
        form, parts = self.weights[name]
        rows, cols = (slice(*part.indices(n)[:2]) for part, n in zip(index, form.shape(parts), strict=True))
        return np.ascontiguousarray(form.read(parts, rows, cols), np.float32)


def quantization_of(raw: Mapping[str, Any]) -> Any:
    """The quantisation that a ``config.json`` names; None where it names none."""
    return next((raw[key] for key in CONFIG_KEYS if raw.get(key)), None)


def without_quantization(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` of the same model in full precision."""
    return {key: value for key, value in raw.items() if key not in CONFIG_KEYS}


def forms_of(quantization: Any, source: str) -> list[Form]:
    """The forms in which a checkpoint of this quantisation may keep a weight; none where there is no quantisation.

    Args:
      quantization: from :func:`quantization_of`.
      source: where it is from, for errors.

    Raises:
      UserError: a scheme, or a choice of one, that is not read.
    """
    if quantization is None:
        return []
    if not isinstance(quantization, Mapping):
        raise UserError(f"{source}: quantization_config is not a JSON object; fetch the model again")
    method = quantization.get("quant_method")
    if method is None and (quantization.get("load_in_8bit") or quantization.get("load_in_4bit")):
        method = "bitsandbytes"  # as its first versions wrote it
    if method not in METHODS:
        raise UserError(
            f"{source}: quant_method {method!r} is not read; {INSTEAD}, or one of {', '.join(sorted(METHODS))}"
        )
    try:
        return METHODS[method](quantization, source)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"{source}: quantization_config of {method} has a value that is not understood ({error}); fix it"
        ) from None


def _check(quantization: Mapping[str, Any], source: str, **read: tuple[Any, ...]) -> None:
    """Refuse a field whose value is not among those that are read; an absent field is."""
    for name, values in read.items():
        value = quantization.get(name)
        value = value.lower() if isinstance(value, str) else value
        if value is not None and value not in values:
            raise UserError(
                f"{source}: {quantization.get('quant_method')} with {name} {value!r} is not read, but "
                f"{', '.join(map(repr, values))} is; {INSTEAD}"
            )


def _compressed_tensors(quantization: Mapping[str, Any], source: str) -> list[Form]:
    _check(quantization, source, format=COMPRESSED)
    sparsity = (quantization.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise UserError(f"{source}: compressed-tensors with sparsity format {sparsity!r} is not read; {INSTEAD}")
    if (quantization.get("transform_config") or {}).get("config_groups"):
        raise UserError(f"{source}: compressed-tensors with a transform_config is not read; {INSTEAD}")
    blocks, bits = [], []
    for group in (quantization.get("config_groups") or {}).values():
        _check({"quant_method": "compressed-tensors", **group}, source, format=COMPRESSED)
        weights = group.get("weights") or {}
        if weights.get("block_structure"):
            rows, columns = weights["block_structure"]
            blocks.append((int(rows), int(columns)))
        if weights.get("group_size"):
            blocks.append((1, int(weights["group_size"])))
        if weights.get("type", "int") == "int" and "num_bits" in weights:
            bits.append(int(weights["num_bits"]))
    packed = tuple(n for n in dict.fromkeys(bits or [4, 8]) if n in (2, 4, 8))
    return [Scaled("weight_scale", tuple(blocks), FLOAT8 | {"I8"}), Packed(packed, tuple(blocks))]


def _fp8(quantization: Mapping[str, Any], source: str) -> list[Form]:
    blocks: Blocks = ()
    if quantization.get("weight_block_size"):
        rows, columns = quantization["weight_block_size"]
        blocks = ((int(rows), int(columns)),)
    return [Scaled("weight_scale_inv", blocks, FLOAT8)]


def _fbgemm_fp8(quantization: Mapping[str, Any], source: str) -> list[Form]:
    return [Scaled("weight_scale", (), FLOAT8)]


def _bitsandbytes(quantization: Mapping[str, Any], source: str) -> list[Form]:
    return [RowInt8(), FourBit()]


def _gptq(quantization: Mapping[str, Any], source: str) -> list[Form]:
    formats = ("gptq", "gptq_v2")
    _check(quantization, source, bits=(2, 4, 8), checkpoint_format=formats, format=formats)
    _check(quantization, source, pack_dtype=("int32",), is_marlin_format=(False,), dynamic=({},))
    lacks = 0 if (quantization.get("checkpoint_format") or quantization.get("format")) == "gptq_v2" else 1
    ordered = bool(quantization.get("desc_act"))
    return [Gptq(int(quantization["bits"]), int(quantization.get("group_size", -1)), lacks, ordered)]


def _awq(quantization: Mapping[str, Any], source: str) -> list[Form]:
    _check(quantization, source, bits=(4,), w_bit=(4,), version=("gemm",), format=("gemm",))
    if quantization.get("backend") == "llm-awq":
        raise UserError(f"{source}: awq with backend 'llm-awq' is not read; {INSTEAD}")
    return [Awq(int(quantization.get("group_size", quantization.get("q_group_size", 128))))]


METHODS: dict[str, Callable[[Mapping[str, Any], str], list[Form]]] = {
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _fbgemm_fp8,
    "fp8": _fp8,
    "gptq": _gptq,
}
"""``quant_method`` -> its forms."""
