"""Models in the form that llama.cpp's converter gives them, written by the `gguf` library under its own names."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize

from dpojax.models import Model
from dpojax.models.weights import file_tensors

Tensors = dict[str, np.ndarray]
ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}
ARCHITECTURES |= {"gpt_neox": "gptneox"}
"""``model_type`` -> ``general.architecture``, where it is another."""


def tensors_of(model: Model) -> Tensors:
    """The model's tensors by Hugging Face's name."""
    return {t.name: np.array(t.fetch()) for t in file_tensors(model.params, model.family, model.config)}


def write_gguf(path: Path, model: Model, tensors: Tensors | None = None, **more: Any) -> str:
    """Write a model; the path.

    Args:
      path: the file.
      model: what to write.
      tensors: in GGUF's form and by its names (default: :func:`gguf_tensors`); a pair has the bytes and their type.
      more: metadata, of the architecture unless they are of the file or the tokenizer; None takes one away.
    """
    arch = ARCHITECTURES.get(model.hf_config["model_type"], model.hf_config["model_type"])
    metadata = {f"{arch}.{name}": value for name, value in metadata_of(model).items()}
    others = ("general.", "split.", "tokenizer.", "somebody.")
    metadata |= {name if name.startswith(others) else f"{arch}.{name}": value for name, value in more.items()}
    writer = GGUFWriter(path, arch)
    for name, value in metadata.items():
        if value is not None:
            _add(writer, name, value)
    for name, x in (gguf_tensors(model) if tensors is None else tensors).items():
        data, kind = x if isinstance(x, tuple) else (np.ascontiguousarray(x), None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def _add(writer: GGUFWriter, name: str, value: Any) -> None:
    kinds: Mapping[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string
    }  # fmt: skip
    kinds.get(type(value), writer.add_array)(name, value)


def metadata_of(model: Model) -> dict[str, Any]:
    """The keys of the architecture, as the converter writes them, of the model's ``config.json``."""
    raw, c = model.hf_config, model.config
    out: dict[str, Any] = {
        "block_count": c.layers,
        "context_length": c.max_positions,
        "embedding_length": c.width,
        "feed_forward_length": c.mlp.width,
        "attention.head_count": c.attention.heads,
    }
    kind = "" if c.norm.kind == "layer" else "rms_"
    out[f"attention.layer_norm_{kind}epsilon"] = c.norm.eps
    if raw["model_type"] == "gpt2":
        return out
    if raw["model_type"] == "gpt_neox":
        share = raw["rope_parameters"]["partial_rotary_factor"]
        return out | {
            "rope.dimension_count": int(share * c.attention.head_dim),
            "use_parallel_residual": c.residual == "parallel",
        }
    out["attention.head_count_kv"] = c.attention.kv_heads
    out |= {"attention.key_length": c.attention.head_dim, "attention.value_length": c.attention.head_dim}
    rope = raw.get("rope_parameters", {})
    full = rope.get("full_attention", rope)
    out["rope.freq_base"] = float(full["rope_theta"])
    if full["rope_type"] == "linear":
        out |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(full["factor"])}
    if "sliding_attention" in rope:
        out["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
    if raw["model_type"] in ("llama", "mistral", "mixtral"):
        out |= {"vocab_size": c.vocab_size, "rope.dimension_count": c.attention.head_dim}
    if raw["model_type"].startswith("gemma"):
        out |= {"attention.sliding_window": raw["sliding_window"]}
        caps = {name: raw.get(name) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
        out |= {name: float(cap) for name, cap in caps.items() if cap is not None}
    if raw["model_type"] == "gemma3_text":
        out["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in raw["layer_types"]]
    if raw["model_type"] == "phi3":
        share = full.get("partial_rotary_factor", 1.0)
        out |= {
            "rope.dimension_count": int(share * c.attention.head_dim),
            "attention.sliding_window": raw.get("sliding_window") or 0,
        }
        out["rope.scaling.original_context_length"] = full.get("original_max_position_embeddings", c.max_positions)
    for ours, theirs in (("num_local_experts", "expert_count"), ("num_experts", "expert_count")):
        out |= {theirs: raw[ours], "expert_used_count": raw["num_experts_per_tok"]} if ours in raw else {}
    if "moe_intermediate_size" in raw:
        out["expert_feed_forward_length"] = raw["moe_intermediate_size"]
    return out


def gguf_tensors(model: Model) -> Tensors:
    """The model's tensors as the converter writes them, by GGUF's names."""
    kind, c = model.hf_config["model_type"], model.config
    arch = ARCHITECTURES.get(kind, kind)
    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == arch)
    names = get_tensor_name_map(MODEL_ARCH(number), c.layers)
    out: Tensors = {}
    for name, x in _with_stacked_experts(tensors_of(model)).items():
        if arch == "llama" and name.rsplit(".", 1)[0].endswith(("q_proj", "k_proj")):
            x = x.reshape(-1, 2, c.attention.head_dim // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            x = x + 1
        if arch == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            x = x.T
        if arch == "gptneox" and "query_key_value" in name:
            x = x.reshape(c.attention.heads, 3, c.attention.head_dim, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
        gguf = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf is not None, name
        out[gguf] = np.ascontiguousarray(x)
    for name in ("short", "long"):
        if factors := model.hf_config.get("rope_parameters", {}).get(f"{name}_factor"):
            out[f"rope_factors_{name}.weight"] = np.array(factors, np.float32)
    return out


def _with_stacked_experts(tensors: Tensors) -> Tensors:
    """The tensors, with the experts' of each layer in one."""
    out, experts = {}, {}
    for name, x in tensors.items():
        before, found, after = name.partition(".experts.")
        if found:
            number, after = after.split(".", 1)
            experts.setdefault(f"{before}.experts.{after}", {})[int(number)] = x
        else:
            out[name] = x
    return out | {name: np.stack([parts[i] for i in range(len(parts))]) for name, parts in experts.items()}


def as_type(x: np.ndarray, kind: GGMLQuantizationType) -> tuple[np.ndarray, GGMLQuantizationType]:
    """A tensor in a type that the library quantises to."""
    return quantize(x, kind), kind
