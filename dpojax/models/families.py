"""The families of models, a row each: how their ``config.json`` reads, and where their files keep each parameter.

A new family is a row of :data:`FAMILIES`: a reader and a writer of its config, and a table from our parameters to the
names and forms of its tensors. What none has computed before is a choice in ``config.py`` and a line of ``block.py``.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dpojax.errors import UserError
from dpojax.models.config import Attention, DecoderConfig, LayerKind, Mlp, Norm, Rope, RopeScaling


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a family's files keep one parameter of ours, and in which form; forms go both ways.

    Ours is ``[D, *out]``, with the model's width D first. Theirs has at most two axes: ``[D, out]``, or ``[out, D]``
    where ``outputs_first``; a bias or a norm is flat.

    Attributes:
      name: Hugging Face's; ``{}`` is the layer.
      gguf: GGUF's, without ``.weight`` or ``.bias``; ``{}`` is the layer.
      outputs_first: theirs has the outputs as its first axis (torch's Linear).
      after: parameters that precede this one along the output axis of the same tensor (fused projections).
      plus: ours is theirs plus this (norms that are stored as ``w`` and applied as ``1 + w``).
      flat: theirs has one axis (biases of split heads).
      gguf_pairs: GGUF interleaves the two halves of every head, as llama.cpp's rotary embedding of this family wants.
    """

    name: str
    gguf: str = ""
    outputs_first: bool = False
    after: tuple[str, ...] = ()
    plus: float = 0.0
    flat: bool = False
    gguf_pairs: bool = False

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this parameter's part of their tensor."""
        if self.flat or len(ours) == 1:
            return (math.prod(ours),)
        first, rest = ours[0], math.prod(ours[1:])
        return (rest, first) if self.outputs_first else (first, rest)

    def outputs(self, ours: tuple[int, ...]) -> int:
        """How much of their output axis a parameter of ours of this shape takes."""
        return math.prod(ours if self.flat or len(ours) == 1 else ours[1:])

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        """Our parameter in their form."""
        x = x.reshape(x.shape[0], -1) if x.ndim > 1 and not self.flat else x.reshape(-1)
        x = x.T if self.outputs_first else x
        return x - x.dtype.type(self.plus) if self.plus else x

    def to_ours(self, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Their tensor, or a slice of it, in our form and ``shape``."""
        x = (x.T if self.outputs_first else x).reshape(shape)
        return x + x.dtype.type(self.plus) if self.plus else x

    def index(self, ours: tuple[int, ...], index: tuple[slice, ...], start: int = 0) -> tuple[slice, ...]:
        """Their slices that hold a slice of our parameter.

        Args:
          ours: the shape of our parameter.
          index: the slice of it; only its first axis and the first of its output axes may be cut.
          start: where this parameter begins along their output axis.
        """
        ends = [part.indices(n)[:2] for part, n in zip(index, ours, strict=True)]
        head = 0 if self.flat or len(ours) == 1 else 1  # the first output axis
        inner = math.prod(ours[head + 1 :])
        assert all(end == (0, n) for end, n in zip(ends[head + 1 :], ours[head + 1 :], strict=True)), (
            "an inner axis is cut"
        )
        outputs = slice(start + ends[head][0] * inner, start + ends[head][1] * inner)
        if head == 0:
            return (outputs,)
        return (outputs, slice(*ends[0])) if self.outputs_first else (slice(*ends[0]), outputs)


def _linear(name: str, gguf: str, **more: Any) -> Tensor:
    return Tensor(f"model.layers.{{}}.{name}.weight", f"blk.{{}}.{gguf}", outputs_first=True, **more)


def _back(name: str, gguf: str) -> Tensor:
    return Tensor(f"model.layers.{{}}.{name}.weight", f"blk.{{}}.{gguf}")


def _bias(name: str, gguf: str, **more: Any) -> Tensor:
    return Tensor(f"model.layers.{{}}.{name}.bias", f"blk.{{}}.{gguf}", flat=True, **more)


LLAMA = {
    "embed": Tensor("model.embed_tokens.weight", "token_embd"),
    "final_norm": Tensor("model.norm.weight", "output_norm"),
    "head": Tensor("lm_head.weight", "output"),
    "score": Tensor("score.weight"),
    "blocks/attn_norm": _back("input_layernorm", "attn_norm"),
    "blocks/q": _linear("self_attn.q_proj", "attn_q", gguf_pairs=True),
    "blocks/k": _linear("self_attn.k_proj", "attn_k", gguf_pairs=True),
    "blocks/v": _linear("self_attn.v_proj", "attn_v"),
    "blocks/o": _back("self_attn.o_proj", "attn_output"),
    "blocks/q_bias": _bias("self_attn.q_proj", "attn_q", gguf_pairs=True),
    "blocks/k_bias": _bias("self_attn.k_proj", "attn_k", gguf_pairs=True),
    "blocks/v_bias": _bias("self_attn.v_proj", "attn_v"),
    "blocks/o_bias": _bias("self_attn.o_proj", "attn_output"),
    "blocks/mlp_norm": _back("post_attention_layernorm", "ffn_norm"),
    "blocks/gate": _linear("mlp.gate_proj", "ffn_gate"),
    "blocks/up": _linear("mlp.up_proj", "ffn_up"),
    "blocks/down": _back("mlp.down_proj", "ffn_down"),
    "blocks/gate_bias": _bias("mlp.gate_proj", "ffn_gate"),
    "blocks/up_bias": _bias("mlp.up_proj", "ffn_up"),
    "blocks/down_bias": _bias("mlp.down_proj", "ffn_down"),
}


def _rope(raw: Mapping[str, Any], source: str) -> Rope:
    # transformers 5 writes `rope_parameters`; earlier versions `rope_theta` and `rope_scaling`.
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return Rope(theta=theta)
    if kind not in ("linear", "llama3"):
        raise UserError(f"{source}: rope type {kind!r} is not supported; use a model with default, linear or llama3")
    fields = {
        "low_freq_factor": rope.get("low_freq_factor"),
        "high_freq_factor": rope.get("high_freq_factor"),
        "original_max_positions": rope.get("original_max_position_embeddings"),
    }
    given = {k: v for k, v in fields.items() if v is not None}
    return Rope(theta=theta, scaling=RopeScaling(kind=kind, factor=float(rope["factor"]), **given))


def _rope_parameters(rope: Rope) -> dict[str, Any]:
    scaling = rope.scaling
    out: dict[str, Any] = {"rope_type": scaling.kind if scaling else "default", "rope_theta": rope.theta}
    if scaling is not None:
        out["factor"] = scaling.factor
        if scaling.kind == "llama3":
            out |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
            out["original_max_position_embeddings"] = scaling.original_max_positions
    return out


def llama_config(raw: Mapping[str, Any], source: str) -> DecoderConfig:
    """The choices of ``model_type: llama``.

    Args:
      raw: the parsed ``config.json``.
      source: where it is from, for errors.

    Raises:
      UserError: a field is missing, or has a value that is not supported.
    """
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(
            f"{source}: hidden_act {raw['hidden_act']!r} is not supported; {raw.get('model_type')} models use 'silu'"
        )
    reward = any(name.endswith("ForSequenceClassification") for name in raw.get("architectures") or ())
    if reward and raw.get("num_labels", len(raw.get("id2label", "ab"))) != 1:
        raise UserError(f"{source}: a classifier of several labels is no reward model; use one with num_labels 1")
    try:
        heads = int(raw["num_attention_heads"])
        return DecoderConfig(
            vocab_size=int(raw["vocab_size"]),
            width=int(raw["hidden_size"]),
            layers=int(raw["num_hidden_layers"]),
            attention=Attention(
                heads=heads,
                kv_heads=int(raw.get("num_key_value_heads") or heads),
                head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
                bias="all" if raw.get("attention_bias") else "none",
            ),
            mlp=Mlp(width=int(raw["intermediate_size"]), bias=bool(raw.get("mlp_bias", False))),
            norm=Norm(eps=float(raw.get("rms_norm_eps", 1e-6))),
            positions=_rope(raw, source),
            max_positions=int(raw.get("max_position_embeddings", 2048)),
            tied=bool(raw.get("tie_word_embeddings", False)),
            head="score" if reward else "vocab",
        )
    except KeyError as missing:
        family = raw.get("model_type", "llama")
        raise UserError(f"{source}: no field {missing}; a {family} config.json has it") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{source}: a field has a value that makes no model ({error}); fix it") from None


def llama_fields(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of :func:`llama_config`, but for ``model_type`` and ``architectures``."""
    assert isinstance(config.positions, Rope)
    return {
        "hidden_act": "silu",
        "hidden_size": config.width,
        "intermediate_size": config.mlp.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.attention.heads,
        "num_key_value_heads": config.attention.kv_heads,
        "head_dim": config.attention.head_dim,
        "rms_norm_eps": config.norm.eps,
        "rope_theta": config.positions.theta,
        "rope_parameters": _rope_parameters(config.positions),
        "max_position_embeddings": config.max_positions,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.attention.bias == "all",
        "mlp_bias": config.mlp.bias,
    }


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models: how its ``config.json`` reads and is written, and its tensors by our paths.

    ``fields`` are those that ``read`` understands and ``write`` may leave out.
    """

    model_type: str
    architecture: str  # without ForCausalLM or ForSequenceClassification
    read: Callable[[Mapping[str, Any], str], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    tensors: Mapping[str, Tensor]
    fields: frozenset[str] = frozenset()

    def hf_config(self, config: DecoderConfig) -> dict[str, Any]:
        """A ``config.json`` with these choices.

        Raises:
          UserError: the family has no models of these choices.
        """
        kind = "SequenceClassification" if config.reward else "CausalLM"
        raw = {"architectures": [f"{self.architecture}For{kind}"], "model_type": self.model_type}
        raw |= self.write(config) | ({"num_labels": 1} if config.reward else {})
        if self.read(raw, self.model_type) != config:
            raise UserError(f"{self.model_type}: the family has no models of these choices; see its config reader")
        return raw


LLAMA_FAMILY = Family("llama", "Llama", llama_config, llama_fields, LLAMA)


QWEN3 = {path: dataclasses.replace(tensor, gguf_pairs=False) for path, tensor in LLAMA.items()} | {
    "blocks/q_norm": _back("self_attn.q_norm", "attn_q_norm"),
    "blocks/k_norm": _back("self_attn.k_norm", "attn_k_norm"),
}


def qwen3_config(raw: Mapping[str, Any], source: str) -> DecoderConfig:
    """The choices of ``model_type: qwen3``: Llama's, norms of queries and keys, and windows from a layer on."""
    config = llama_config({"head_dim": 128, **raw, "mlp_bias": False}, source)
    attention = dataclasses.replace(config.attention, qk_norm=config.norm)
    kinds: dict[str, Any] = {}
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
    first = int(raw.get("max_window_layers", 28))
    types = raw.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(config.layers)
    ]
    if window is not None and "sliding_attention" in types:
        if len(types) != config.layers or set(types) - {"full_attention", "sliding_attention"}:
            raise UserError(
                f"{source}: layer_types must name full_attention or sliding_attention for every layer; fix it"
            )
        kinds = {"kinds": (LayerKind(), LayerKind(window=int(window)))}
        kinds["kind_of_layer"] = tuple(int(kind == "sliding_attention") for kind in types)
    return dataclasses.replace(config, attention=attention, **kinds)


def qwen3_fields(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of :func:`qwen3_config`, but for ``model_type`` and ``architectures``."""
    raw = llama_fields(config)
    del raw["mlp_bias"]
    if config.kind_of_layer:
        raw |= {"use_sliding_window": True, "sliding_window": config.kinds[1].window, "max_window_layers": 0}
        raw["layer_types"] = [("full_attention", "sliding_attention")[kind] for kind in config.kind_of_layer]
    return raw


QWEN3_FAMILY = Family(
    "qwen3",
    "Qwen3",
    qwen3_config,
    qwen3_fields,
    QWEN3,
    frozenset(("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")),
)

FAMILIES = {family.model_type: family for family in (LLAMA_FAMILY, QWEN3_FAMILY)}
"""``model_type`` -> family."""


def family_of(raw: Mapping[str, Any], source: str) -> Family:
    """The family of a Hugging Face ``config.json``.

    Args:
      raw: the parsed file.
      source: where it is from, for the error.

    Raises:
      UserError: no family of this ``model_type``.
    """
    name = raw.get("model_type")
    if name not in FAMILIES:
        raise UserError(f"{source}: model_type {name!r} is not supported; use one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def config_from_hf(raw: Mapping[str, Any], source: str) -> DecoderConfig:
    """The choices of a Hugging Face ``config.json``.

    Raises:
      UserError: an unsupported family, or a field that is missing or not supported.
    """
    return family_of(raw, source).read(raw, source)
