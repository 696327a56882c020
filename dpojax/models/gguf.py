"""GGUF files: metadata, and weights in Hugging Face's form (dequantized by the `gguf` library, slice by slice)."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpojax.errors import UserError
from dpojax.models.config import DecoderConfig
from dpojax.models.families import Family
from dpojax.models.gguf_config import hf_config
from dpojax.models.weights import Placed, places

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

READ_WITH_METADATA = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors that say what config.json would."""
BUFFERS = ".attn_rot_embd.weight"
"""Rotary frequencies, which early files hold for every layer."""


@functools.lru_cache(maxsize=2)
def _reader(path: Path, modified: int, size: int) -> "GGUFReader":
    # Indexing a file takes seconds, and a command asks for its shape, its tokenizer and its weights in turn. The data
    # is mapped, not read; a file that has changed is another key.
    from gguf import GGUFReader

    return GGUFReader(path)


class GGUFFile:
    """An open GGUF file: metadata by key, tensors by GGUF's name.

    Args:
      path: the file.

    Raises:
      UserError: no such file, or none that can be read.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            stat = path.stat()
            self.reader = _reader(path, stat.st_mtime_ns, stat.st_size)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; give a .gguf file or a Hugging Face model directory") from None
        except Exception as error:  # the reader lets NumPy's errors through
            raise UserError(f"{path}: truncated or damaged GGUF file ({error}); fetch it again") from None
        if self.reader.byte_order != "I":
            raise UserError(f"{path}: its numbers are in another byte order; convert it by gguf_convert_endian.py")
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in self.reader.tensors}
        self.keys = tuple(self.reader.fields)
        self.architecture: str = self.get("general.architecture", "")

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata; the default where there is none."""
        field = self.reader.get_field(key)
        try:
            return default if field is None else field.contents()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: metadata {key} are no UTF-8 ({error}); fetch it again") from None

    def read_whole(self, name: str) -> np.ndarray | None:
        """A tensor, float32; None where there is none."""
        from gguf import dequantize

        tensor = self.tensors.get(name)
        return None if tensor is None else dequantize(tensor.data, tensor.tensor_type)

    def hf_config(self) -> dict[str, Any]:
        """The metadata as a Hugging Face ``config.json`` would have them (:mod:`~dpojax.models.gguf_config`)."""
        return hf_config(self)

    def generation_config(self) -> dict[str, Any]:
        """The metadata as a ``generation_config.json`` would have it: BOS, and what ends a text or a turn."""
        ends = [self.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        bos, ends = self.get("tokenizer.ggml.bos_token_id"), list(dict.fromkeys(i for i in ends if i is not None))
        raw = {"bos_token_id": bos, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
        return {name: value for name, value in raw.items() if value is not None}


class GGUFSource:
    """A GGUF file's tensors by Hugging Face's name and in Hugging Face's form, dequantized slice by slice
    (:class:`~dpojax.models.weights.TensorSource`).

    llama.cpp's forms differ by family, as its :class:`~dpojax.models.families.Tensor` says: interleaved halves of
    heads, norms with their 1 added, transposed matrices, q, k and v one behind the other, experts in one tensor.

    Raises:
      UserError: a tensor is of a type that the `gguf` library does not dequantize.
    """

    def __init__(self, file: GGUFFile, family: Family, config: DecoderConfig):
        self.path, self.tensors = file.path, file.tensors
        self.places: dict[str, tuple[str, Placed | None, int | None]] = {}
        if "head" in family.tensors:  # a tied model may hold it too
            self.places[family.tensors["head"].name] = (family.tensors["head"].gguf + ".weight", None, None)
        for place in places(family, config).values():
            kind = ".bias" if place.tensor.name.endswith(".bias") else ".weight"
            for numbers in itertools.product(*place.numbers):
                expert = numbers[1] if len(numbers) > 1 else None
                gguf = place.tensor.gguf.format(*numbers) + kind
                self.places[place.tensor.name.format(*numbers)] = (gguf, place, expert)
        read = {gguf for gguf, _, _ in self.places.values()} | set(READ_WITH_METADATA)
        read |= {_scale_of(gguf) for gguf in read}
        others = [name for name in self.tensors if name not in read and not name.endswith(BUFFERS)]
        self.names = [name for name, (gguf, _, _) in self.places.items() if gguf in self.tensors] + others
        _check_types(file)

    def shape(self, name: str) -> tuple[int, ...] | None:
        gguf, place, expert = self.places.get(name, (name, None, None))
        if gguf not in self.tensors:
            return None
        shape = tuple(int(n) for n in reversed(self.tensors[gguf].shape))
        shape = shape if expert is None else shape[1:]
        return shape[::-1] if place is not None and place.tensor.gguf_transposed else shape

    def dtype(self, name: str) -> str:
        """What :meth:`read` returns, in safetensors' words."""
        return "F32"

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor as float32; whole rows are dequantized, those of the slice alone."""
        gguf, place, expert = self.places.get(name, (name, None, None))
        rows = functools.partial(self._rows, gguf, expert)
        if place is None:
            return rows(index[0])[(slice(None), *index[1:])]
        form, width = place.tensor, place.shape[-1]
        if form.gguf_transposed:
            return rows(index[1])[:, index[0]].T
        x = rows(index[0]) if form.of_head is None else _by_heads(rows, place, index[0])
        if form.gguf_pairs:  # the two halves of every head are interleaved
            x = x.reshape(-1, width // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        x = x - np.float32(form.gguf_plus) if form.gguf_plus else x
        return x[(slice(None), *index[1:])]

    def _rows(self, gguf: str, expert: int | None, rows: slice) -> np.ndarray:
        """Rows of a matrix, or a part of a vector."""
        from gguf import dequantize

        data, kind = self.tensors[gguf].data, self.tensors[gguf].tensor_type
        data = data if expert is None else data[expert]
        x = dequantize(data, kind)[rows] if data.ndim == 1 else dequantize(data[rows], kind)  # a vector is one row
        scale = self.tensors.get(_scale_of(gguf))
        return x if scale is None else x * dequantize(scale.data, scale.tensor_type)[expert or 0]


def _scale_of(gguf: str) -> str:
    """The tensor of the scale that NVFP4 has beside those of its blocks: of the whole matrix, or of each expert."""
    return gguf.removesuffix(".weight") + ".scale"


def _by_heads(rows: Callable[[slice], np.ndarray], place: Placed, index: slice) -> np.ndarray:
    """Rows of a tensor in which the parts of every head lie together, where GGUF has all heads of one part, and then
    those of the next."""
    assert place.tensor.of_head is not None
    parts, width = place.tensor.of_head[1], place.shape[-1]
    first, last, _ = index.indices(place.whole[0])
    heads = slice(first // parts, last // parts)
    starts = [i * place.heads * width for i in range(parts)]
    found = [rows(slice(start + heads.start, start + heads.stop)) for start in starts]
    x = np.stack([part.reshape(-1, width, *part.shape[1:]) for part in found], axis=1)
    return x.reshape(-1, *x.shape[3:])


def _check_types(file: GGUFFile) -> None:
    from gguf import GGML_QUANT_SIZES, dequantize

    for tensor in {tensor.tensor_type: tensor for tensor in file.tensors.values()}.values():
        kind = tensor.tensor_type
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise UserError(
                f"{file.path}: tensor {tensor.name} is of type {kind.name}, which the gguf library does not "
                "dequantize; use another file of the model"
            ) from None
