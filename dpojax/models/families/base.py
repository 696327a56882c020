"""What a row of families is made of: the forms of tensors, and reading and writing of rotary positions."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dpojax.errors import UserError
from dpojax.models.config import DecoderConfig, LayerKind, Rope, RopeScaling
from dpojax.models.families.fields import Fields, check_sizes


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a family's files keep one parameter of ours, and in which form; forms go both ways.

    Ours is ``[D, *out]``, with the model's width D first. Theirs has at most two axes: ``[D, out]``, or ``[out, D]``
    where ``outputs_first``; a bias or a norm is flat.

    Attributes:
      name: Hugging Face's; the first ``{}`` is the layer, the second the expert.
      gguf: GGUF's, without ``.weight`` or ``.bias``; ``{}`` is the layer.
      outputs_first: theirs has the outputs as its first axis (torch's Linear).
      after: parameters that precede this one along the output axis of the same tensor (fused projections).
      of_head: (i, n): this is the i-th of n parameters of which every head's part lies together in the same tensor.
      flat: theirs has one axis (biases of split heads).
      gguf_plus: GGUF's is this plus Hugging Face's (norms that are applied as ``1 + w``).
      gguf_pairs: GGUF interleaves the two halves of every head, as llama.cpp's rotary embedding of this family wants.
      gguf_transposed: GGUF has its two axes the other way round (Conv1D).
    """

    name: str
    gguf: str = ""
    outputs_first: bool = False
    after: tuple[str, ...] = ()
    of_head: tuple[int, int] | None = None
    flat: bool = False
    gguf_plus: float = 0.0
    gguf_pairs: bool = False
    gguf_transposed: bool = False

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this parameter's part of their tensor."""
        if self.flat or len(ours) == 1:
            return (math.prod(ours),)
        first, rest = ours[0], math.prod(ours[1:])
        return (rest, first) if self.outputs_first else (first, rest)

    def outputs(self, ours: tuple[int, ...]) -> int:
        """How much of their output axis a parameter of ours of this shape takes."""
        return math.prod(ours if self.flat or len(ours) == 1 else ours[1:])

    @property
    def share(self) -> int:
        """How many parameters lie between each other in a tensor, of which this is one."""
        return 1 if self.of_head is None else self.of_head[1]

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        """Our parameter in their form."""
        x = x.reshape(x.shape[0], -1) if x.ndim > 1 and not self.flat else x.reshape(-1)
        return x.T if self.outputs_first else x

    def to_ours(self, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Their tensor, or a slice of it (:meth:`index`), in our form and ``shape``."""
        x = x.T if self.outputs_first else x
        if self.of_head is not None:  # [..., heads, parts, h]
            i, n = self.of_head
            heads = x.reshape(*x.shape[:-1], shape[-2], n, shape[-1])
            x = heads[..., i, :]
        return x.reshape(shape)

    def index(self, ours: tuple[int, ...], index: tuple[slice, ...], start: int = 0) -> tuple[slice, ...]:
        """Their slices that hold a slice of our parameter.

        Args:
          ours: the shape of our parameter.
          index: the slice of it; only its first axis and the first of its output axes may be cut.
          start: where this parameter begins along their output axis.
        """
        ends = [part.indices(n)[:2] for part, n in zip(index, ours, strict=True)]
        head = 0 if self.flat or len(ours) == 1 else 1  # the first output axis
        inner = math.prod(ours[head + 1 :]) * self.share
        assert all(end == (0, n) for end, n in zip(ends[head + 1 :], ours[head + 1 :], strict=True)), (
            "an inner axis is cut"
        )
        outputs = slice(start + ends[head][0] * inner, start + ends[head][1] * inner)
        if head == 0:
            return (outputs,)
        return (outputs, slice(*ends[0])) if self.outputs_first else (slice(*ends[0]), outputs)


def join(tensors: Sequence[Tensor], parts: Sequence[np.ndarray], heads: int) -> np.ndarray:
    """Their tensor, from the parameters of ours that lie in it, in their order and in their form.

    Args:
      tensors: of these parameters.
      parts: the parameters (:meth:`Tensor.to_theirs`).
      heads: how many heads there are, where parts of heads lie together.
    """
    axis = output_axis(tensors[0], parts[0].shape)
    if tensors[0].of_head is None:
        return np.concatenate(parts, axis) if len(parts) > 1 else parts[0]
    shape = parts[0].shape
    split = [part.reshape(*shape[:axis], heads, -1, *shape[axis + 1 :]) for part in parts]
    return np.concatenate(split, axis + 1).reshape(*shape[:axis], -1, *shape[axis + 1 :])


def output_axis(tensor: Tensor, shape: tuple[int, ...]) -> int:
    """The axis of their tensor along which fused parameters lie."""
    return 0 if tensor.outputs_first or len(shape) == 1 else 1


def linear(name: str, gguf: str, **more: Any) -> Tensor:
    """A torch Linear from the model's width."""
    return Tensor(f"model.layers.{{}}.{name}.weight", f"blk.{{}}.{gguf}", outputs_first=True, **more)


def back(name: str, gguf: str, **more: Any) -> Tensor:
    """A torch Linear back to the model's width, or a norm."""
    return Tensor(f"model.layers.{{}}.{name}.weight", f"blk.{{}}.{gguf}", **more)


def bias(name: str, gguf: str, **more: Any) -> Tensor:
    """A torch Linear's bias."""
    return Tensor(f"model.layers.{{}}.{name}.bias", f"blk.{{}}.{gguf}", flat=True, **more)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models: how its ``config.json`` reads and is written, and its tensors by our paths.

    Attributes:
      model_type: transformers'.
      architecture: transformers' class, without what it ends in.
      choices: the decoder's choices, of fields.
      write: the fields, but for ``model_type`` and ``architectures``, of choices.
      tensors: by our path.
      causal: what the class that predicts tokens ends in.
      classifier: what the class of reward models ends in.
    """

    model_type: str
    architecture: str
    choices: Callable[[Fields], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    tensors: Mapping[str, Tensor]
    causal: str = "ForCausalLM"
    classifier: str = "ForSequenceClassification"

    def read(self, raw: Mapping[str, Any], source: str) -> DecoderConfig:
        """The choices of a ``config.json``.

        Args:
          raw: the parsed file.
          source: where it is from, for errors.

        Raises:
          UserError: a field is missing, not known, or has a value that is not supported.
        """
        fields = Fields(raw, source)
        config = check_sizes(self.choices(fields), source)
        fields.check_all_read()
        return config

    def hf_config(self, config: DecoderConfig) -> dict[str, Any]:
        """A ``config.json`` with these choices.

        Raises:
          UserError: the family has no models of these choices.
        """
        kind = self.classifier if config.reward else self.causal
        raw: dict[str, Any] = {"architectures": [self.architecture + kind], "model_type": self.model_type}
        # Left out, transformers would take the ids of its own default, which a small vocabulary does not have.
        raw |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        try:
            raw |= self.write(config) | ({"num_labels": 1} if config.reward else {})
            same = self.read(raw, self.model_type) == config
        except (AssertionError, UserError):
            same = False
        if not same:
            raise UserError(f"{self.model_type}: the family has no models of these choices; see its config reader")
        return raw


# ---- rotary positions -----------------------------------------------------------------------------------------------

ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("factor", "short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"),
}
"""What each type of rotary positions reads beside its base and its share of a head."""


def rope_fields(fields: Fields) -> dict[str, Any]:
    """``rope_parameters`` as transformers 5 writes them, or earlier versions' ``rope_scaling``, which goes before."""
    new = fields.get("rope_parameters") or {}
    return dict(fields.get("rope_scaling") or new)


def read_rope(
    fields: Fields, raw: Mapping[str, Any], *, theta: float, share: float | None = None, types: Sequence[str] = ()
) -> Rope:
    """Rotary positions.

    Args:
      fields: of the model, for errors.
      raw: ``rope_parameters`` of a kind of layers.
      theta: the base, where ``raw`` has none.
      share: of a head's width that turns, where ``raw`` has none (default: all, and a family that has no choice).
      types: those that this family has (default: default, linear and llama3).
    """
    types = types or ("default", "linear", "llama3")
    kind = raw.get("rope_type", raw.get("type")) or "default"
    if kind not in types:
        raise UserError(f"{fields.source}: rope type {kind!r} is not supported; use a model with {', '.join(types)}")
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor", *ROPE_FIELDS[kind]}
    # transformers leaves parameters of other types unread, and says so.
    others = set().union(*ROPE_FIELDS.values())
    for name, value in raw.items():
        if name not in known | others and value is not None:
            raise UserError(
                f"{fields.source}: nothing is known of {name} {value!r} in rotary positions of type {kind}; remove it"
            )
    given = raw.get("partial_rotary_factor") or share or 1.0
    if share is None and given != 1:
        raise UserError(f"{fields.source}: partial_rotary_factor {given!r} is not supported in this family; remove it")
    rope = Rope(theta=float(raw.get("rope_theta") or theta), share=float(given))
    return rope if kind == "default" else dataclasses.replace(rope, scaling=_scaling(fields, kind, raw))


def _scaling(fields: Fields, kind: Any, raw: Mapping[str, Any]) -> RopeScaling:
    def number(name: str, default: Any = None) -> int | float:
        value = raw.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{fields.source}: rotary positions of type {kind} have no {name}; add it")
        return value

    positions = fields.raw.get("max_position_embeddings")
    if kind == "linear":
        return RopeScaling(kind=kind, factor=float(number("factor")))
    original = fields.raw.get("original_max_position_embeddings") or positions
    original = int(number("original_max_position_embeddings", original))
    if kind == "llama3":
        return RopeScaling(
            kind=kind,
            factor=float(number("factor")),
            low_freq_factor=float(number("low_freq_factor")),
            high_freq_factor=float(number("high_freq_factor")),
            original_max_positions=original,
        )
    factor = number("factor", positions / original if positions else None)
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    factors = {name: raw.get(name) for name in ("short_factor", "long_factor")}
    for name, value in factors.items():
        if not isinstance(value, list) or not all(isinstance(x, int | float) for x in value):
            raise UserError(f"{fields.source}: {name} {value!r} is no list of numbers; fix it")
    return RopeScaling(
        kind=kind,
        factor=float(factor),
        short=tuple(map(float, factors["short_factor"] or ())),
        long=tuple(map(float, factors["long_factor"] or ())),
        attention_factor=float(number("attention_factor", grown)),
        original_max_positions=original,
    )


def write_rope(rope: Rope, *, partial: bool = False) -> dict[str, Any]:
    """``rope_parameters``, the inverse of :func:`read_rope`; ``partial`` where the family has a share of a head."""
    scaling = rope.scaling
    out: dict[str, Any] = {"rope_type": scaling.kind if scaling else "default", "rope_theta": rope.theta}
    if partial:
        out["partial_rotary_factor"] = rope.share
    if scaling is None:
        return out
    out["factor"] = scaling.factor
    if scaling.kind != "linear":
        out["original_max_position_embeddings"] = scaling.original_max_positions
    if scaling.kind == "llama3":
        out |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "longrope":
        out |= {"short_factor": list(scaling.short), "long_factor": list(scaling.long)}
        out["attention_factor"] = scaling.attention_factor
    return out


def with_earlier_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` whose rotary positions are also in the fields that transformers had before ``rope_parameters``.

    Other libraries read those alone, and without them take their own defaults. Where the two differ,
    ``rope_parameters`` are what was read. LongRoPE's factors are left as they are: the earlier form has no attention
    factor.
    """
    rope, out = raw.get("rope_parameters"), dict(raw)
    if not isinstance(rope, dict):
        return out
    local = rope.get(SLIDING)
    full = rope.get(FULL) or {} if local is not None or FULL in rope else rope
    theta, share = full.get("rope_theta"), full.get("partial_rotary_factor")
    neox = raw.get("model_type") == "gpt_neox"
    share = None if share == 1 and not neox else share  # what families without the field have
    names = ("rotary_emb_base", "rotary_pct") if neox else ("rope_theta", "partial_rotary_factor")
    fields = {**dict(zip(names, (theta, share), strict=True)), "rope_local_base_freq": (local or {}).get("rope_theta")}
    if full.get("rope_type") in ("linear", "llama3"):
        apart = ("rope_theta", "partial_rotary_factor")
        fields["rope_scaling"] = {name: value for name, value in full.items() if name not in apart}
    return out | {name: value for name, value in fields.items() if value is not None}


# ---- kinds of layers ------------------------------------------------------------------------------------------------

SLIDING, FULL = "sliding_attention", "full_attention"


def alternate(fields: Fields, types: Sequence[str], layers: int, kinds: Mapping[str, LayerKind]) -> dict[str, Any]:
    """The choices ``kinds`` and ``kind_of_layer``, from the type of each layer; kinds that no layer has are left out.

    Args:
      fields: of the model, for errors.
      types: of each layer, sliding_attention or full_attention.
      layers: how many there are.
      kinds: by type.
    """
    if len(types) != layers or set(types) - set(kinds):
        raise UserError(
            f"{fields.source}: layer_types must name full_attention or sliding_attention for every layer; fix it"
        )
    used = [name for name in (FULL, SLIDING) if name in types]
    distinct = list(dict.fromkeys(kinds[name] for name in used))
    if len(distinct) == 1:
        return {"kinds": tuple(distinct)}
    return {"kinds": tuple(distinct), "kind_of_layer": tuple(distinct.index(kinds[name]) for name in types)}


def types_of(config: DecoderConfig) -> list[str]:
    """The type of each layer, sliding_attention or full_attention."""
    return [FULL if config.kind(i).window is None else SLIDING for i in range(config.layers)]
