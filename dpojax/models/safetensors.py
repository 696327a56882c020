"""Hugging Face directories, in and out: config.json, safetensors in one file or by index."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dpojax.errors import UserError
from dpojax.models.config import DecoderConfig, config_from_hf
from dpojax.types import PyTree

# Our name -> Hugging Face's, for the Llama layout; {} is the layer.
TOP_NAMES = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "score": "score.weight",  # a reward model's
}
BLOCK_NAMES = {
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
}
TURNED = ("q", "k", "v", "gate", "up")  # Hugging Face has these with their outputs first, we with their inputs
SHARD_BYTES = 4 << 30  # export: split files above this, as transformers does


def block_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each of a layer's parameters; Hugging Face folds (heads, head_dim) into one axis, we do not."""
    D, F, h, H, K = config.width, config.mlp_width, config.head_dim, config.heads, config.kv_heads
    norm: tuple[int, ...] = (D,)
    shapes = {"attn_norm": norm, "q": (D, H, h), "k": (D, K, h), "v": (D, K, h), "o": (D, H, h)}
    return shapes | {"mlp_norm": norm, "gate": (D, F), "up": (D, F), "down": (D, F)}


def assemble(
    config: DecoderConfig, read: Callable[[str], np.ndarray], source: str, progress: Callable[[float], None]
) -> PyTree:
    """The parameter tree, float32, from a function that reads one tensor by its Hugging Face name."""

    def fit(x: np.ndarray, name: str, shape: tuple[int, ...], turned: bool = False) -> np.ndarray:
        if x.size != int(np.prod(shape)):
            raise UserError(f"{source}: tensor {name} has shape {x.shape}, but its config.json asks for {shape}")
        if turned:
            x = x.reshape(-1, shape[0]).T
        return x.reshape(shape)

    params: dict[str, Any] = {
        "blocks": {key: np.empty((config.layers, *shape), np.float32) for key, shape in block_shapes(config).items()}
    }
    for layer in range(config.layers):
        for key, name in BLOCK_NAMES.items():
            target = params["blocks"][key][layer]
            target[...] = fit(read(name.format(layer)), name.format(layer), target.shape, key in TURNED)
        progress((layer + 1) / config.layers)
    tops = {"embed": (config.vocab_size, config.width), "final_norm": (config.width,)}
    if config.reward:
        tops["score"] = (1, config.width)
    elif not config.tied:
        tops["head"] = tops["embed"]
    for key, shape in tops.items():
        params[key] = np.ascontiguousarray(fit(read(TOP_NAMES[key]), TOP_NAMES[key], shape), np.float32)
    return params


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; errors name the file and the mend."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a Hugging Face model directory, a .gguf file or a run") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); fetch or make it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; fetch or make it again")
    return value


def tensor_files(directory: Path) -> dict[str, Path] | list[Path]:
    """Where a directory's tensors are: file by name, or the one file.

    Raises:
      UserError: it has no safetensors.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return {name: directory / file for name, file in read_json(index).get("weight_map", {}).items()}
    single = directory / "model.safetensors"
    if single.exists():
        return [single]
    raise UserError(f"{directory}: no model.safetensors or model.safetensors.index.json; export weights as safetensors")


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though the index names it; fetch the model again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or damaged safetensors ({error}); fetch the model again") from None


def load_directory(directory: Path, progress: Callable[[float], None]) -> tuple[DecoderConfig, PyTree]:
    """Read a Hugging Face directory; parameters are float32 NumPy arrays."""
    raw = read_json(directory / "config.json")
    config = config_from_hf(raw, str(directory / "config.json"))
    files = tensor_files(directory)
    if isinstance(files, list):
        handles = {files[0]: _open(files[0])}
        names = dict.fromkeys(handles[files[0]].keys(), files[0])
    else:
        handles = {path: _open(path) for path in sorted(set(files.values()))}
        names = files

    extra = BLOCK_NAMES["attn_norm"].format(config.layers)
    if extra in names:
        raise UserError(f"{directory}: config.json has {config.layers} layers, the weights have more; mend config.json")

    def read(name: str) -> np.ndarray:
        if name not in names:
            raise UserError(f"{directory}: tensor {name} is missing from its safetensors; fetch the model again")
        return handles[names[name]].get_tensor(name)

    return config, assemble(config, read, str(directory), progress)


def save_directory(
    params: PyTree,
    config: DecoderConfig,
    hf_config: Mapping[str, Any],
    directory: Path,
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``config.json`` and safetensors that transformers loads; the tokenizer is the caller's to save.

    Written beside ``directory`` and moved into place at the end, so that it is never half there.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    np_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    blocks = params["blocks"]
    top = {name: params[key] for key, name in TOP_NAMES.items() if key in params}
    names = [(name.format(layer), key, layer) for layer in range(config.layers) for key, name in BLOCK_NAMES.items()]

    def tensor(key: str, layer: int) -> np.ndarray:
        x = np.asarray(blocks[key][layer])
        if x.ndim > 1:
            x = x.reshape(x.shape[0], -1)
        return np.ascontiguousarray(x.T if key in TURNED else x, dtype=np_dtype)

    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, x in [(n, np.ascontiguousarray(np.asarray(x), dtype=np_dtype)) for n, x in top.items()] + [
        (n, tensor(key, layer)) for n, key, layer in names
    ]:
        if size + x.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = x
        size += x.nbytes

    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    try:
        for file, shard in zip(files, shards, strict=True):
            save_file(shard, partial / file, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{directory}: cannot be written ({error}); free some space or name another place") from None
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(x.nbytes for shard in shards for x in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    raw = {**hf_config, "dtype": dtype}
    raw.pop("torch_dtype", None)
    (partial / "config.json").write_text(json.dumps(raw, indent=2))
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("model*.safetensors*"):
        old.unlink()
    for path in sorted(partial.iterdir(), reverse=True):  # config.json last: where it is, all is
        path.replace(directory / path.name)
    partial.rmdir()
