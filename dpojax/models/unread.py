"""Tensors that a model's files have and nothing reads; they are refused unless they change nothing."""

import re

import numpy as np

from dpojax.errors import UserError
from dpojax.models.config import DecoderConfig
from dpojax.models.dequantize import RawTensors
from dpojax.models.families import Family
from dpojax.models.quantized import FULL_PRECISION
from dpojax.models.weights import places

BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention|self_attn)\.(bias|masked_bias)|position_ids)$")
"""What early versions of transformers saved and computed anew: rotary frequencies, causal masks, positions."""
ACTIVATIONS = re.compile(
    r"\.((input|activation|output|[qkv])_(scale|zero_point|global_scale|scale_ub)|[qkv]_proj\.output_scale)$"
)
"""What quantises activations or the KV cache, and no weight."""
ROWS = 1024  # of a matrix, compared at a time


def check_dtypes(source: RawTensors) -> None:
    """Refuse numbers that stand for others, by a scheme that nothing names.

    Raises:
      UserError: a tensor is of integers or of float8.
    """
    for name in sorted(source.names):
        known = is_buffer(source, name) or ACTIVATIONS.search(name)
        if not known and source.dtype(name) not in FULL_PRECISION:
            raise UserError(
                f"{source.path}: tensor {name} is of dtype {source.dtype(name)}, and its config.json has no "
                "quantization_config that explains it; fetch the model again, or use it in full precision"
            )


def check_unread(source: RawTensors, family: Family, config: DecoderConfig, *, rows: int | None = None) -> list[str]:
    """Notes of what is not read and changes nothing, after refusing what would change the model.

    Args:
      source: the files' tensors.
      family: names and forms of the tensors that are read.
      config: the decoder's choices.
      rows: how many rows of a tied unembedding to compare with the embedding (default: all).

    Raises:
      UserError: a tensor that nothing reads would make another model.
    """
    read = {name for place in places(family, config).values() for name in place.names()}
    left = sorted(name for name in source.names if name not in read and not is_buffer(source, name))
    # A family that is always tied has no unembedding of its own, but its files may hold the embedding twice.
    head = family.tensors["head"].name if "head" in family.tensors else "lm_head.weight"
    if head in left and config.unembedding == "embed":
        left.remove(head)
        check_tied(source, head, family.tensors["embed"].name, rows)
    scales = [name for name in left if ACTIVATIONS.search(name)]
    others = [name for name in left if not ACTIVATIONS.search(name) and not is_zero_bias(source, name)]
    if others:
        raise UserError(f"{source.path}: nothing reads {named(others)} of its weights, {advice(others)}")
    return [f"{source.path}: weights alone are quantised here; {named(scales)} not used"] if scales else []


def named(names: list[str]) -> str:
    """How many tensors, and which, at most three of them."""
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:3])}{more})"


def advice(names: list[str]) -> str:
    """What to do about tensors that nothing reads."""
    if any("lora_" in name for name in names):
        return "which are of an adapter; merge it into the model first"
    if all(name.endswith(".bias") for name in names):
        return "though they are not zero; set attention_bias or mlp_bias in its config.json, or remove them"
    return "which would make it another model; fix its config.json if it has them, or remove them"


def is_buffer(source: RawTensors, name: str) -> bool:
    """Whether a tensor is one that transformers computes anew."""
    shape = source.shape(name)
    mask = not name.endswith("n.bias") or shape is None or len(shape) == 4  # a bias of one axis is a parameter
    return mask and BUFFERS.search(name) is not None


def is_zero_bias(source: RawTensors, name: str) -> bool:
    """Whether a tensor is a bias of zeros, as GPTQ's tools write them for models that have none."""
    shape = source.shape(name)
    return name.endswith(".bias") and shape is not None and len(shape) == 1 and not source.read(name, _all(shape)).any()


def _all(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in shape)


def check_tied(source: RawTensors, head: str, embed: str, rows: int | None = None) -> None:
    """Refuse an unembedding that differs from the embedding, where config.json says that they are one.

    Args:
      source: the files' tensors.
      head: name of the unembedding.
      embed: name of the embedding.
      rows: how many to compare (default: all).

    Raises:
      UserError: they differ.
    """
    shape = source.shape(embed)
    same = shape is not None and source.shape(head) == shape
    stop = min(rows or shape[0], shape[0]) if same and shape is not None else 0
    for start in range(0, stop, ROWS):
        part = (slice(start, min(start + ROWS, stop)), slice(None))
        ours, theirs = (np.asarray(source.read(name, part), np.float32) for name in (embed, head))
        same = same and np.array_equal(ours, theirs)
    if not same:
        raise UserError(
            f"{source.path}: tensor {head} differs from {embed}, but its config.json says tie_word_embeddings; set "
            "that to false to use the tensor, or remove the tensor"
        )
