"""A GGUF file's metadata as the ``config.json`` that the model had: a row an architecture of llama.cpp.

What the file does not say is what llama.cpp takes it to be. Every key of the architecture is read, or refused by name.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dpojax.errors import UserError
from dpojax.models.families import family_of

if TYPE_CHECKING:
    from dpojax.models.gguf import GGUFFile

Raw = dict[str, Any]

IRRELEVANT = frozenset((
    "attention.value_length", "rope.scaling.finetuned", "rope.scaling.original_context_length", "vocab_size",
))  # fmt: skip
"""Keys of an architecture that change no logit, or that others say as well."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every published model of Llama 3's scaling has; GGUF holds the factors of frequencies that come of it."""
GEMMA_27B = {"gemma2": 46, "gemma3": 62}
"""How many layers Gemma's largest models have, whose scale of scores is another."""
PER_LAYER = ("attention.sliding_window_pattern",)
"""Lists that may differ from layer to layer."""


class Keys:
    """The keys of a file's architecture, which remembers those that were read."""

    def __init__(self, file: "GGUFFile"):
        self.file, self.used = file, set(IRRELEVANT)

    def get(self, name: str, default: Any = None) -> Any:
        """A value, None where there is none; a list of equal values, one for each layer, is that value."""
        self.used.add(name)
        value = self.file.get(f"{self.file.architecture}.{name}", default)
        if isinstance(value, list) and value and name not in PER_LAYER:
            if any(x != value[0] for x in value):
                self.refuse(name, value, "every layer must have the same")
            return value[0]
        return value

    def need(self, name: str) -> Any:
        """A value that there must be."""
        value = self.get(name)
        if value is None:
            key = f"{self.file.architecture}.{name}"
            raise UserError(f"{self.file.path}: no metadata {key}; convert the model again")
        return value

    def number(self, name: str, default: float | None = None) -> float | None:
        """A number as config.json had it before it was cut to float32."""
        value = self.get(name, default)
        return None if value is None else shortest(value)

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors

    def only(self, name: str, allowed: Any) -> None:
        """Refuse a value other than what the family's models have."""
        value = self.get(name, allowed)
        if value != allowed:
            self.refuse(name, value, f"its models have {allowed!r}")

    def refuse(self, name: str, value: Any, why: str) -> None:
        raise UserError(f"{self.file.path}: metadata {self.file.architecture}.{name} {value!r} is not supported; {why}")

    def check_all_read(self) -> None:
        """Refuse what is set and was not read."""
        start = f"{self.file.architecture}."
        names = [key.removeprefix(start) for key in self.file.keys if key.startswith(start)]
        left = [name for name in names if name not in self.used and self.file.get(start + name)]
        if left:
            named = ", ".join(f"{start}{name} {self.file.get(start + name)!r}" for name in sorted(left))
            raise UserError(f"{self.file.path}: nothing is known of the metadata {named}; use the model's safetensors")


def shortest(value: float | np.floating) -> float:
    """The decimal number of the fewest digits that has this value in float32."""
    return float(str(np.float32(value)))


# ---- what architectures share ---------------------------------------------------------------------------------------


def _sizes(keys: Keys) -> Raw:
    """Llama's fields of sizes."""
    heads, width = keys.need("attention.head_count"), keys.need("embedding_length")
    head_dim = keys.get("attention.key_length", width // heads)
    value_length = keys.file.get(f"{keys.file.architecture}.attention.value_length", head_dim)
    if value_length != head_dim:
        keys.refuse("attention.value_length", value_length, f"keys have {head_dim}, and values must have the same")
    keys.only("attention.causal", True)
    keys.only("pooling_type", 0)
    return {
        "hidden_size": width,
        "intermediate_size": keys.need("feed_forward_length"),
        "num_hidden_layers": keys.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.need("context_length"),
    }


def _rope(keys: Keys) -> Raw:
    """Rotary positions: their base and scaling."""
    rope: Raw = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 10_000.0)}
    factor = keys.number("rope.scaling.factor", keys.get("rope.scale_linear"))
    kind = keys.get("rope.scaling.type", "linear" if factor else "none")
    if kind == "none":
        return rope
    return {**rope, "rope_type": kind, "factor": factor}  # the family refuses types that it does not have


def _whole_heads(keys: Keys, raw: Raw) -> None:
    """Refuse rotary positions of a share of a head."""
    keys.only("rope.dimension_count", raw["head_dim"])


def _like_llama(keys: Keys, **more: Any) -> Raw:
    raw = _sizes(keys)
    _whole_heads(keys, raw)
    return {
        **raw,
        "hidden_act": "silu",
        "rms_norm_eps": shortest(keys.need("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(keys),
        "tie_word_embeddings": _tied(keys),
        **more,
    }


def _tied(keys: Keys) -> bool:
    """Whether the embedding is the unembedding: there is no other, or, in early files, the same once more."""
    embed, output = (keys.file.tensors.get(name) for name in ("token_embd.weight", "output.weight"))
    if embed is None or output is None:
        return output is None
    same = embed.tensor_type == output.tensor_type and embed.data.shape == output.data.shape
    return same and all(np.array_equal(embed.data[part], output.data[part]) for part in (slice(64), slice(64, None)))


def _attention_bias(keys: Keys) -> bool:
    return keys.has("blk.0.attn_q.bias")


# ---- architectures --------------------------------------------------------------------------------------------------


def _llama(keys: Keys) -> Raw:
    """Llama, Mistral and Mixtral are all "llama"; the converter drops Mistral's window, and biases have no flag."""
    raw = _like_llama(keys)
    raw["rope_parameters"] = _llama3_rope(keys, raw)
    window = keys.get("attention.sliding_window")
    if keys.get("expert_count"):
        keys.only("expert_feed_forward_length", raw["intermediate_size"])
        experts = {"num_local_experts": keys.get("expert_count"), "num_experts_per_tok": keys.need("expert_used_count")}
        return {"model_type": "mixtral", **raw, **experts, "sliding_window": window or None}
    if window:
        return {"model_type": "mistral", **raw, "sliding_window": window}
    biases = {"attention_bias": _attention_bias(keys), "mlp_bias": keys.has("blk.0.ffn_up.bias")}
    return {"model_type": "llama", **raw, **biases}


def _llama3_rope(keys: Keys, raw: Raw) -> Raw:
    """Rotary positions, with Llama 3's scaling where the file has its factors.

    The factors are those of wavelengths: 1 of short ones, ``factor`` of long ones, and between them one over a share of
    each (the rule of Llama 3.1's own code).
    """
    rope = raw["rope_parameters"]
    stored = keys.file.read_whole("rope_freqs.weight")
    if stored is None or (stored == 1).all():
        return rope
    factor, length = shortest(stored.max()), LLAMA3["original_max_position_embeddings"]
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    head = raw["head_dim"]
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head, 2) / head)
    share = np.clip((length / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - share) / factor + share)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-5, atol=0):
        raise UserError(
            f"{keys.file.path}: rope_freqs.weight are no factors of Llama 3's scaling with an original length of "
            f"{length}; use the model's safetensors"
        )
    return {**rope, "rope_type": "llama3", "factor": factor, **LLAMA3}


def _qwen2(keys: Keys) -> Raw:
    return {"model_type": "qwen2", **_like_llama(keys)}


def _qwen3(keys: Keys) -> Raw:
    return {"model_type": "qwen3", **_like_llama(keys, attention_bias=_attention_bias(keys))}


def _qwen3moe(keys: Keys) -> Raw:
    """llama.cpp always divides the shares of the chosen experts by their sum."""
    raw = _like_llama(keys, attention_bias=_attention_bias(keys), norm_topk_prob=True)
    gates = keys.file.tensors.get("blk.0.ffn_gate_exps.weight")
    width = keys.get("expert_feed_forward_length", None if gates is None else int(gates.shape[1]))
    return {
        "model_type": "qwen3_moe",
        **raw,
        "num_experts": keys.need("expert_count"),
        "num_experts_per_tok": keys.need("expert_used_count"),
        "moe_intermediate_size": width,
    }


def _gemma(keys: Keys) -> Raw:
    """The scale of scores is not in the file: it is one over the root of a head's width, but in the largest model."""
    raw = _like_llama(keys, hidden_activation="gelu_pytorch_tanh", attention_bias=_attention_bias(keys))
    del raw["hidden_act"]
    largest = raw["num_hidden_layers"] == GEMMA_27B[keys.file.architecture]
    scalar = raw["hidden_size"] // raw["num_attention_heads"] if largest else raw["head_dim"]
    return {
        **raw,
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": keys.number("attn_logit_softcapping"),
        "final_logit_softcapping": keys.number("final_logit_softcapping"),
        "sliding_window": keys.get("attention.sliding_window") or None,
    }


def _layer_types(keys: Keys, layers: int, every: int) -> list[str]:
    """The kind of each layer: windows, but for the last of every few, or as the file says."""
    pattern = keys.get("attention.sliding_window_pattern", every)
    sliding = pattern if isinstance(pattern, list) else [not pattern or (i + 1) % pattern != 0 for i in range(layers)]
    return ["sliding_attention" if window else "full_attention" for window in sliding]


def _gemma2(keys: Keys) -> Raw:
    raw = _gemma(keys)
    raw["sliding_window"] = raw["sliding_window"] or 4096
    keys.only("rope.freq_base_swa", raw["rope_parameters"]["rope_theta"])
    return {"model_type": "gemma2", **raw, "layer_types": _layer_types(keys, raw["num_hidden_layers"], 2)}


def _gemma3(keys: Keys) -> Raw:
    """A scaling is of the full layers alone; a file without a window has none."""
    raw = _gemma(keys)
    raw["rope_parameters"] = {
        "full_attention": raw["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10_000.0)},
    }
    types = _layer_types(keys, raw["num_hidden_layers"], 6)
    if raw["sliding_window"] is None:
        types = ["full_attention"] * raw["num_hidden_layers"]
    return {"model_type": "gemma3_text", **raw, "layer_types": types}


def _olmo2(keys: Keys) -> Raw:
    """OLMo 3 has the same architecture here, and windows; they are refused."""
    return {"model_type": "olmo2", **_like_llama(keys, attention_bias=_attention_bias(keys))}


def _phi3(keys: Keys) -> Raw:
    raw = _sizes(keys)
    rope = {**_rope(keys), "partial_rotary_factor": keys.get("rope.dimension_count", raw["head_dim"]) / raw["head_dim"]}
    rope = _longrope(keys, raw, rope)
    original = rope.get("original_max_position_embeddings")  # transformers reads it beside rope_parameters alone
    return {
        "model_type": "phi3",
        **raw,
        **({"original_max_position_embeddings": original} if original else {}),
        "hidden_act": "silu",
        "rms_norm_eps": shortest(keys.need("attention.layer_norm_rms_epsilon")),
        "rope_parameters": rope,
        "tie_word_embeddings": _tied(keys),
        "sliding_window": keys.get("attention.sliding_window") or None,
    }


def _longrope(keys: Keys, raw: Raw, rope: Raw) -> Raw:
    """Rotary positions, with LongRoPE's factors where the file has them."""
    short, long = (keys.file.read_whole(f"rope_factors_{name}.weight") for name in ("short", "long"))
    scale = keys.number("rope.scaling.attn_factor")
    if short is None or long is None:
        return rope
    length = keys.need("rope.scaling.original_context_length")
    factor = raw["max_position_embeddings"] / length
    by_rule = math.sqrt(1 + math.log(max(factor, 1)) / math.log(length))
    if scale is not None and not math.isclose(scale, by_rule, rel_tol=1e-6):
        rope["attention_factor"] = scale
    return {
        **rope,
        "rope_type": "longrope",
        "factor": factor,
        "original_max_position_embeddings": length,
        "short_factor": [shortest(x) for x in short],
        "long_factor": [shortest(x) for x in long],
    }


def _gpt2(keys: Keys) -> Raw:
    raw = _sizes(keys)
    return {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_embd": raw["hidden_size"],
        "n_inner": raw["intermediate_size"],
        "n_layer": raw["num_hidden_layers"],
        "n_head": raw["num_attention_heads"],
        "n_positions": raw["max_position_embeddings"],
        "layer_norm_epsilon": shortest(keys.need("attention.layer_norm_epsilon")),
        "tie_word_embeddings": _tied(keys),
    }


def _gptneox(keys: Keys) -> Raw:
    """The file does not say which GELU: it is the exact one, but in GPT-NeoX-20B."""
    raw = _sizes(keys)
    raw["rotary_pct"] = keys.get("rope.dimension_count", raw["head_dim"]) / raw["head_dim"]
    rope = {**_rope(keys), "partial_rotary_factor": raw["rotary_pct"]}
    for name in ("num_key_value_heads", "head_dim"):
        del raw[name]
    largest = raw["hidden_size"] == 6144 and raw["num_hidden_layers"] == 44
    return {
        "model_type": "gpt_neox",
        **raw,
        "hidden_act": "gelu_fast" if largest else "gelu",
        "layer_norm_eps": shortest(keys.need("attention.layer_norm_epsilon")),
        "use_parallel_residual": keys.get("use_parallel_residual", True),
        "rope_parameters": rope,
        "tie_word_embeddings": _tied(keys),
    }


ARCHITECTURES: dict[str, Callable[[Keys], Raw]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "gptneox": _gptneox,
}
"""``general.architecture`` -> the fields of its family's ``config.json``."""


def hf_config(file: "GGUFFile") -> Raw:
    """The metadata as a Hugging Face ``config.json`` would have them.

    Raises:
      UserError: an architecture that is not known, a key that is missing or not supported, or one that nothing reads.
    """
    read = ARCHITECTURES.get(file.architecture)
    if read is None:
        raise UserError(
            f"{file.path}: architecture {file.architecture!r} is not supported in GGUF; use a model of "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    kind = file.get("general.type", "model")
    if kind != "model":
        raise UserError(f"{file.path}: it is of type {kind!r} and no model; name the model's own file")
    if (file.get("split.count") or 1) > 1:
        raise UserError(f"{file.path}: it is one of several files of a model; join them by llama-gguf-split --merge")
    keys = Keys(file)
    raw = read(keys)
    keys.check_all_read()
    family = family_of(raw, str(file.path))
    return {
        "architectures": [family.architecture + family.causal],
        **raw,
        "vocab_size": _vocab_size(file),
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id"),
    }


def _vocab_size(file: "GGUFFile") -> int:
    embedding, tokens = file.tensors.get("token_embd.weight"), file.reader.get_field("tokenizer.ggml.tokens")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{file.path}: it has no tensor token_embd.weight, so it is no whole model; fetch it again")
    rows = int(embedding.shape[1])
    if tokens is not None and len(tokens.data) > rows:
        raise UserError(
            f"{file.path}: tokenizer.ggml.tokens are {len(tokens.data)}, but token_embd.weight has {rows} rows; "
            "convert the model again"
        )
    return rows
