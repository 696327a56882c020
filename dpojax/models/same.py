"""Whether two models compute the same, whatever their files look like."""

import dataclasses
import math
from typing import Any

from dpojax.models.config import DecoderConfig, LayerKind, Rope, RopeScaling

FIELDS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "attention.heads": "num_attention_heads",
    "attention.kv_heads": "num_key_value_heads",
    "attention.head_dim": "head_dim",
    "mlp.width": "intermediate_size",
    "positions.theta": "rope_theta",
    "positions.size": "max_position_embeddings",
    "experts.number": "num_experts",
    "experts.per_token": "num_experts_per_tok",
}
"""Choices that ``config.json`` has by another name, as most families spell it."""
SIZES = ("vocab_size", *FIELDS)
"""Choices that are compared first."""
ROUNDING = 1e-6
"""Share by which numbers of two files may differ that are one number, which GGUF stores in float32."""


def difference(config: DecoderConfig, other: DecoderConfig, longest: int | None = None) -> tuple[str, Any, Any] | None:
    """The first choice in which two decoders compute something else, by name, and its two values; None: there is none.

    What a choice is called, and what changes nothing, is no difference: rotary positions that are written otherwise, a
    window that is longer than any text, the longest text that the model was made for, and whether an unembedding that
    equals the embedding is stored apart from it (``tied``), which only the weights can tell.

    Args:
      config, other: without adapters.
      longest: tokens of the longest text that they will be given; None: any.

    >>> from dpojax.models import Attention, Mlp, Norm
    >>> small = DecoderConfig(
    ...     vocab_size=9, width=4, layers=2, attention=Attention(heads=2, kv_heads=1, head_dim=2), mlp=Mlp(width=8),
    ...     norm=Norm(eps=1e-5), positions=Rope(theta=1e4), max_positions=64,
    ... )
    >>> difference(small, dataclasses.replace(small, max_positions=32, tied=True))
    >>> difference(small, dataclasses.replace(small, width=6))
    ('hidden_size', 4, 6)
    """
    mine, theirs = _computed(config, longest), _computed(other, longest)
    for name in dict.fromkeys([*mine, *theirs]):
        one, two = mine.get(name), theirs.get(name)
        numbers = isinstance(one, float) and isinstance(two, float)
        if one != two and not (numbers and math.isclose(one, two, rel_tol=ROUNDING)):  # type: ignore[arg-type]
            return FIELDS.get(name, name), one, two
    return None


def _computed(config: DecoderConfig, longest: int | None) -> dict[str, Any]:
    """What a decoder computes, as flat choices: sizes first, and every layer by itself."""
    whole = dataclasses.replace(config, max_positions=0, tied=False, kinds=(), kind_of_layer=(), lora=None)
    if config.experts is not None and not config.dense_layers:  # no layer has the MLP, but its activation is theirs
        whole = dataclasses.replace(whole, mlp=dataclasses.replace(config.mlp, width=0))
    if isinstance(config.positions, Rope):
        whole = dataclasses.replace(whole, positions=_rope(config.positions))
    out, attention = _flat(dataclasses.asdict(whole)), config.attention
    for i in range(config.layers):
        kind = config.kind(i)
        window = None if longest is not None and kind.window is not None and kind.window >= longest else kind.window
        rope = kind.rope or (config.positions if isinstance(config.positions, Rope) else None)
        scale = kind.scale or attention.scale or attention.head_dim**-0.5
        layer = LayerKind(window=window, rope=None if rope is None else _rope(rope), scale=scale)
        out |= _flat(dataclasses.asdict(layer), f"layers.{i}.")
    out.pop("attention.scale", None)  # every layer has its own
    return {name: out[name] for name in sorted(out, key=lambda name: (name not in SIZES, name.count(".")))}


def _rope(rope: Rope) -> Rope:
    """Rotary positions without what their scaling does not read."""
    scaling = rope.scaling
    if scaling is None or (scaling.kind != "longrope" and scaling.factor == 1):
        return dataclasses.replace(rope, scaling=None)
    if scaling.kind == "linear":
        scaling = RopeScaling(kind="linear", factor=scaling.factor)
    elif scaling.kind == "longrope":  # longer texts are refused
        scaling = dataclasses.replace(scaling, factor=1.0, long=())
    return dataclasses.replace(rope, scaling=scaling)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, tuple):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}{key}.").items()}
    return {name.removesuffix("."): value}
