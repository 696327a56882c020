"""GPT-2, GPT-NeoX (Pythia) and GPT-J: LayerNorm with biases, one activation without a gate."""

import dataclasses
import math
from typing import Any

from dpojax.models.config import Attention, DecoderConfig, LayerKind, Learned, Mlp, Norm, Rope
from dpojax.models.families.base import Family, Tensor, read_rope, rope_fields, write_rope
from dpojax.models.families.fields import Fields, activation_name

QKV = ("q", "k", "v")


def _norms(form: str, gguf: str, **names: tuple[str, str]) -> dict[str, Tensor]:
    """Weights and biases of a layer's LayerNorms: ours by theirs and GGUF's."""
    return {
        f"blocks/{ours}{ending}": Tensor(f"{form.format(theirs)}.{kind}", f"{gguf}.{short}")
        for ours, (theirs, short) in names.items()
        for ending, kind in (("", "weight"), ("_bias", "bias"))
    }


# ---- GPT-2 ----------------------------------------------------------------------------------------------------------


def _h(name: str, gguf: str, **form: Any) -> Tensor:
    return Tensor(f"transformer.h.{{}}.{name}", f"blk.{{}}.{gguf}", **form)


def _conv1d(name: str, gguf: str, **form: Any) -> Tensor:
    """A Conv1D of transformers, which keeps its inputs first."""
    return _h(name, gguf, gguf_transposed=True, **form)


GPT2_TENSORS = {
    "embed": Tensor("transformer.wte.weight", "token_embd"),
    "positions": Tensor("transformer.wpe.weight", "position_embd"),
    "final_norm": Tensor("transformer.ln_f.weight", "output_norm"),
    "final_norm_bias": Tensor("transformer.ln_f.bias", "output_norm"),
    "head": Tensor("lm_head.weight", "output"),
    "score": Tensor("score.weight"),
    **{f"blocks/{x}": _conv1d("attn.c_attn.weight", "attn_qkv", after=QKV[:i]) for i, x in enumerate(QKV)},
    **{
        f"blocks/{x}_bias": _h("attn.c_attn.bias", "attn_qkv", flat=True, after=tuple(f"{y}_bias" for y in QKV[:i]))
        for i, x in enumerate(QKV)
    },
    "blocks/o": _conv1d("attn.c_proj.weight", "attn_output", outputs_first=True),  # ours has the model's width first
    "blocks/o_bias": _h("attn.c_proj.bias", "attn_output"),
    "blocks/up": _conv1d("mlp.c_fc.weight", "ffn_up"),
    "blocks/up_bias": _h("mlp.c_fc.bias", "ffn_up"),
    "blocks/down": _conv1d("mlp.c_proj.weight", "ffn_down", outputs_first=True),
    "blocks/down_bias": _h("mlp.c_proj.bias", "ffn_down"),
    **_norms("transformer.h.{{}}.{}", "blk.{}", attn_norm=("ln_1", "attn_norm"), mlp_norm=("ln_2", "ffn_norm")),
}


def _read_gpt(fields: Fields, **choices: Any) -> DecoderConfig:
    """What GPT-2 and GPT-J have; ``choices`` are the decoder's others."""
    # transformers knows both names of a size.
    names = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
    width, heads, layers = (fields.integer(old, fields.raw.get(new)) for old, new in names.items())
    fields.used.update(names.values())
    positions = fields.integer("n_positions", fields.get("max_position_embeddings", 1024))
    fields.get("n_ctx")  # of early files; transformers reads n_positions
    for name in ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"):
        fields.get(name)  # of a head for multiple choice
    fields.get("summary_first_dropout")
    act = fields.activation("activation_function", "gelu_new")
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        width=width,
        layers=layers,
        attention=Attention(heads=heads, kv_heads=heads, head_dim=width // heads if heads > 0 else 0),
        mlp=Mlp(width=fields.integer("n_inner", 4 * width), act=act, gated=False, bias=True),
        norm=Norm(kind="layer", eps=fields.number("layer_norm_epsilon", 1e-5), bias=True),
        positions=Learned(size=positions),
        max_positions=positions,
        head=fields.head(),
        **choices,
    )


def _write_gpt(config: DecoderConfig) -> dict[str, Any]:
    return {
        "activation_function": activation_name(config.mlp.act, "gelu_new"),
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.attention.heads,
        "n_inner": config.mlp.width,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm.eps,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
    }


def gpt2_config(fields: Fields) -> DecoderConfig:
    """GPT-2: learned positions, biases everywhere, scores divided by the layer's number if the config says so."""
    config = _read_gpt(fields, tied=fields.flag("tie_word_embeddings", True))
    fields.only("add_cross_attention", False, why="use a model without an encoder")
    fields.get("reorder_and_upcast_attn")  # how half precision is computed
    by_width = fields.flag("scale_attn_weights", True)
    scale = config.attention.head_dim**-0.5 if by_width else 1.0
    attention = dataclasses.replace(config.attention, bias="all", scale=None if by_width else 1.0)
    config = dataclasses.replace(config, attention=attention)
    if not fields.flag("scale_attn_by_inverse_layer_idx"):
        return config
    kinds = tuple(LayerKind(scale=scale / (i + 1)) for i in range(config.layers))
    return dataclasses.replace(config, kinds=kinds, kind_of_layer=tuple(range(config.layers)))


def gpt2_fields(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of :func:`gpt2_config`."""
    by_layer = any(kind.scale is not None for kind in config.kinds)
    scaled = {"scale_attn_weights": config.attention.scale is None, "scale_attn_by_inverse_layer_idx": by_layer}
    return _write_gpt(config) | scaled


GPT2 = Family("gpt2", "GPT2", gpt2_config, gpt2_fields, GPT2_TENSORS, causal="LMHeadModel")

# ---- GPT-J ----------------------------------------------------------------------------------------------------------

GPTJ_TENSORS = {
    "embed": Tensor("transformer.wte.weight", "token_embd"),
    "final_norm": Tensor("transformer.ln_f.weight", "output_norm"),
    "final_norm_bias": Tensor("transformer.ln_f.bias", "output_norm"),
    "head": Tensor("lm_head.weight", "output"),
    "head_bias": Tensor("lm_head.bias", "output"),
    "score": Tensor("score.weight"),
    **{f"blocks/{x}": _h(f"attn.{x}_proj.weight", f"attn_{x}", outputs_first=True) for x in QKV},
    "blocks/o": _h("attn.out_proj.weight", "attn_output"),
    "blocks/up": _h("mlp.fc_in.weight", "ffn_up", outputs_first=True),
    "blocks/up_bias": _h("mlp.fc_in.bias", "ffn_up"),
    "blocks/down": _h("mlp.fc_out.weight", "ffn_down"),
    "blocks/down_bias": _h("mlp.fc_out.bias", "ffn_down"),
    **_norms("transformer.h.{{}}.{}", "blk.{}", attn_norm=("ln_1", "attn_norm")),
}


def gptj_config(fields: Fields) -> DecoderConfig:
    """GPT-J: interleaved rotary positions, attention and MLP in parallel behind one norm, a bias of the unembedding."""
    config = _read_gpt(
        fields, residual="parallel_shared", head_bias=True, tied=fields.flag("tie_word_embeddings", False)
    )
    fields.only("rotary", True, why="use a model with rotary positions")
    fields.only("scale_attn_weights", True, why="transformers always scales GPT-J's scores")
    width = config.attention.head_dim
    rotated = fields.integer("rotary_dim", 64) if fields.get("rotary_dim", 64) is not None else width
    if not 0 < rotated <= width or rotated % 2:
        fields.refuse("rotary_dim", f"use an even number up to the head size, {width}")
    positions = Rope(theta=10_000.0, share=_share(rotated, width), interleaved=True)
    return dataclasses.replace(config, positions=positions)


def _share(part: int, whole: int) -> float:
    """A share of which ``int(whole * share)`` is the part."""
    share = part / whole
    return share if int(whole * share) == part else math.nextafter(share, 2)


def gptj_fields(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of :func:`gptj_config`."""
    assert isinstance(config.positions, Rope)
    return _write_gpt(config) | {"rotary_dim": int(config.attention.head_dim * config.positions.share)}


GPTJ = Family("gptj", "GPTJ", gptj_config, gptj_fields, GPTJ_TENSORS)

# ---- GPT-NeoX -------------------------------------------------------------------------------------------------------


def _layer(name: str, gguf: str, **form: Any) -> Tensor:
    return Tensor(f"gpt_neox.layers.{{}}.{name}", f"blk.{{}}.{gguf}", **form)


NEOX_TENSORS = {
    "embed": Tensor("gpt_neox.embed_in.weight", "token_embd"),
    "final_norm": Tensor("gpt_neox.final_layer_norm.weight", "output_norm"),
    "final_norm_bias": Tensor("gpt_neox.final_layer_norm.bias", "output_norm"),
    "head": Tensor("embed_out.weight", "output"),
    "score": Tensor("score.weight"),
    **{
        f"blocks/{x}": _layer("attention.query_key_value.weight", "attn_qkv", outputs_first=True, of_head=(i, 3))
        for i, x in enumerate(QKV)
    },
    **{
        f"blocks/{x}_bias": _layer("attention.query_key_value.bias", "attn_qkv", flat=True, of_head=(i, 3))
        for i, x in enumerate(QKV)
    },
    "blocks/o": _layer("attention.dense.weight", "attn_output"),
    "blocks/o_bias": _layer("attention.dense.bias", "attn_output"),
    "blocks/up": _layer("mlp.dense_h_to_4h.weight", "ffn_up", outputs_first=True),
    "blocks/up_bias": _layer("mlp.dense_h_to_4h.bias", "ffn_up"),
    "blocks/down": _layer("mlp.dense_4h_to_h.weight", "ffn_down"),
    "blocks/down_bias": _layer("mlp.dense_4h_to_h.bias", "ffn_down"),
    **_norms(
        "gpt_neox.layers.{{}}.{}",
        "blk.{}",
        attn_norm=("input_layernorm", "attn_norm"),
        mlp_norm=("post_attention_layernorm", "ffn_norm"),
    ),
}


def neox_config(fields: Fields) -> DecoderConfig:
    """GPT-NeoX and Pythia: rotary positions on a quarter of a head, attention and MLP in parallel or one behind the
    other."""
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    positions = fields.integer("max_position_embeddings", 2048)
    theta, share = fields.number("rotary_emb_base", 10_000.0), fields.number("rotary_pct", 0.25)
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        width=width,
        layers=fields.integer("num_hidden_layers"),
        attention=Attention(
            heads=heads,
            kv_heads=heads,
            head_dim=width // heads if heads > 0 else 0,
            bias=fields.attention_bias(default=True),
        ),
        mlp=Mlp(
            width=fields.integer("intermediate_size"),
            act=fields.activation("hidden_act", "gelu"),
            gated=False,
            bias=True,
        ),
        norm=Norm(kind="layer", eps=fields.number("layer_norm_eps", 1e-5), bias=True),
        positions=read_rope(fields, rope_fields(fields), theta=theta, share=share),
        max_positions=positions,
        residual="parallel" if fields.flag("use_parallel_residual", True) else "pre",
        tied=fields.flag("tie_word_embeddings", False),
        head=fields.head(),
    )


def neox_fields(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of :func:`neox_config`."""
    assert isinstance(config.positions, Rope)
    return {
        "hidden_act": activation_name(config.mlp.act, "gelu_new"),
        "hidden_size": config.width,
        "intermediate_size": config.mlp.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.attention.heads,
        "layer_norm_eps": config.norm.eps,
        "rotary_pct": config.positions.share,
        "rotary_emb_base": config.positions.theta,
        "rope_parameters": write_rope(config.positions, partial=True),
        "max_position_embeddings": config.max_positions,
        "vocab_size": config.vocab_size,
        "use_parallel_residual": config.residual == "parallel",
        "attention_bias": config.attention.bias == "all",
        "tie_word_embeddings": config.tied,
    }


NEOX = Family("gpt_neox", "GPTNeoX", neox_config, neox_fields, NEOX_TENSORS)

FAMILIES = {family.model_type: family for family in (GPT2, NEOX, GPTJ)}
