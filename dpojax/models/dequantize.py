"""Quantised weights, form by form: which tensors hold one, and how a slice of it becomes float32.

A weight is ``[out, in]``, as torch's Linear has it. Integers are packed into int32 words, the first in the lowest bits.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dpojax.errors import UserError

Blocks = tuple[tuple[int, int], ...]
FLOAT8 = frozenset(("F8_E4M3", "F8_E5M2"))


@runtime_checkable
class RawTensors(Protocol):
    """Tensors that can be listed, in the dtypes in which they are stored."""

    path: Any

    @property
    def names(self) -> Iterable[str]:
        """Every tensor's name: Hugging Face's, or the files' own where nothing reads it."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The tensor's shape; None where there is no such tensor."""

    def dtype(self, name: str) -> str:
        """The name that safetensors gives the tensor's dtype."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """The tensors of one module, by what follows ``stem`` in their names."""

    source: RawTensors
    stem: str

    def name(self, part: str) -> str:
        return f"{self.stem}.{part}"

    def has(self, part: str) -> bool:
        return self.source.shape(self.name(part)) is not None

    def shape(self, part: str) -> tuple[int, ...]:
        shape = self.source.shape(self.name(part))
        if shape is None:
            raise UserError(
                f"{self.source.path}: tensor {self.name(part)} is missing, without which the quantised weight of "
                f"{self.stem} cannot be read; fetch the model again"
            )
        return shape

    def dtype(self, part: str) -> str:
        return self.source.dtype(self.name(part))

    def read(self, part: str, *index: slice) -> np.ndarray:
        """A slice of a part; all of it where no index is given."""
        whole = tuple(slice(0, n) for n in self.shape(part))
        return np.asarray(self.source.read(self.name(part), index or whole))

    def wrong(self, why: str) -> UserError:
        return UserError(f"{self.source.path}: the quantised weight of {self.stem} {why}; fetch the model again")


@runtime_checkable
class Form(Protocol):
    """One way to keep a quantised weight."""

    @property
    def weight(self) -> str:
        """The part that holds the weight's numbers, as ``qweight``."""

    def holds(self, parts: Parts) -> bool:
        """Whether the module's weight is kept in this form."""

    def names(self, parts: Parts) -> list[str]:
        """The parts that make up the weight.

        Raises:
          UserError: one is missing.
        """

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """The shape of the weight."""

    def read(self, parts: Parts, rows: slice, cols: slice) -> np.ndarray:
        """A slice of the weight, float32."""


def present(parts: Parts, needed: Sequence[str], optional: Sequence[str] = ()) -> list[str]:
    """The needed parts, each of which must be there, and the optional ones that are."""
    for part in needed:
        parts.shape(part)
    return [*needed, *(part for part in optional if parts.has(part))]


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned integers of 2, 4 or 8 bits along the last axis, uint8, from int32 words along it."""
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 8:
        return octets
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    numbers = (octets[..., None] >> shifts) & np.uint8(2**bits - 1)
    return numbers.reshape(*octets.shape[:-1], -1)


def window(part: slice, per_word: int) -> tuple[slice, slice]:
    """The words that hold a slice of packed numbers, and where it lies in them."""
    first = part.start // per_word
    return slice(first, -(-part.stop // per_word)), slice(part.start - first * per_word, part.stop - first * per_word)


def block_of(parts: Parts, scale: tuple[int, int], shape: tuple[int, int], blocks: Blocks) -> tuple[int, int]:
    """How many rows and columns of a weight share a scale.

    Args:
      parts: of the module, for the error.
      scale: the shape of the scales.
      shape: the shape of the weight.
      blocks: sizes that the config names; others follow from the shapes, where they divide.
    """
    sizes = []
    for axis, (n, total) in enumerate(zip(scale, shape, strict=True)):
        named = [block[axis] for block in blocks if block[axis] > 0 and -(-total // block[axis]) == n]
        if n == 1:
            sizes.append(total)
        elif named:
            sizes.append(named[0])
        elif n and total % n == 0:
            sizes.append(total // n)
        else:
            raise parts.wrong(f"has shape {shape}, its scales {scale}, which no block size of config.json explains")
    return sizes[0], sizes[1]


def grid_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of scales as a grid: one number, one of each row, or rows and columns."""
    padded = (*shape, 1, 1)
    return padded[0], padded[1]


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Float8 or int8 numbers times a scale: of the tensor, of every row, of groups of columns or of blocks.

    ``w[i, j] = (q[i, j] - z[i // a, g(j)]) * s[i // a, g(j)]``, with g(j) of ``weight_g_idx``, or ``j // b``.
    Source: compressed-tensors (float-quantized, int-quantized, naive-quantized); transformers (fp8, fbgemm_fp8).

    Attributes:
      scale: the part that holds the scales.
      blocks: sizes of blocks that the config names.
      dtypes: of the numbers.
    """

    scale: str
    blocks: Blocks
    dtypes: frozenset[str]
    weight: str = "weight"

    def holds(self, parts: Parts) -> bool:
        return parts.has(self.weight) and parts.dtype(self.weight) in self.dtypes

    def names(self, parts: Parts) -> list[str]:
        return present(parts, (self.weight, self.scale), ("weight_zero_point", "weight_g_idx"))

    def shape(self, parts: Parts) -> tuple[int, ...]:
        return parts.shape(self.weight)

    def read(self, parts: Parts, rows: slice, cols: slice) -> np.ndarray:
        x = parts.read(self.weight, rows, cols).astype(np.float32)
        shape = self.shape(parts)
        block = block_of(parts, grid_shape(parts.shape(self.scale)), (shape[0], shape[1]), self.blocks)
        if parts.has("weight_zero_point"):
            x -= spread(parts, "weight_zero_point", block, rows, cols)
        x *= spread(parts, self.scale, block, rows, cols)
        return x


def rows_of(scales: int, block: int, rows: slice) -> np.ndarray:
    """The row of scales of every row of a weight's slice; one alone where all share it."""
    return np.zeros(1, int) if scales == 1 else np.arange(rows.start, rows.stop) // block


def columns_of(parts: Parts, scales: int, block: int, cols: slice) -> np.ndarray:
    """The column of scales of every column of a weight's slice; one alone where all share it."""
    if scales == 1:
        return np.zeros(1, int)
    if not parts.has("weight_g_idx"):
        return np.arange(cols.start, cols.stop) // block
    groups = parts.read("weight_g_idx", cols).astype(int)
    check_groups(parts, groups, scales)
    return groups


def spread(parts: Parts, part: str, block: tuple[int, int], rows: slice, cols: slice) -> np.ndarray:
    """The scales, or the zero points, of a slice of a weight: one number an element, or that broadcasts to it."""
    n, m = grid_shape(parts.shape(part))
    values = parts.read(part).reshape(n, m).astype(np.float32)
    return values[rows_of(n, block[0], rows)][:, columns_of(parts, m, block[1], cols)]


def check_groups(parts: Parts, groups: np.ndarray, n: int) -> None:
    """Refuse columns of groups that are not there."""
    if groups.size and (groups.min() < 0 or groups.max() >= n):
        raise parts.wrong(f"has columns of group {int(groups.max())}, but there are {n} groups")


@dataclasses.dataclass(frozen=True)
class Packed:
    """Integers of 2, 4 or 8 bits in int32 words along the columns, offset to be unsigned, with scales of groups.

    As :class:`Scaled`, with ``q = word bits - 2^(bits - 1)``; zero points are packed along the rows.
    Source: compressed-tensors (pack-quantized).
    """

    bits: tuple[int, ...]
    blocks: Blocks
    weight: str = "weight_packed"

    def holds(self, parts: Parts) -> bool:
        return parts.has(self.weight)

    def names(self, parts: Parts) -> list[str]:
        needed = (self.weight, "weight_scale", "weight_shape")
        return present(parts, needed, ("weight_zero_point", "weight_g_idx"))

    def shape(self, parts: Parts) -> tuple[int, ...]:
        return tuple(int(n) for n in parts.read("weight_shape"))

    def width(self, parts: Parts) -> int:
        """The bits of one number, of those that the config names."""
        columns, words = self.shape(parts)[1], parts.shape(self.weight)[1]
        fitting = [bits for bits in self.bits if -(-columns * bits // 32) == words]
        if not fitting:
            raise parts.wrong(f"has {words} words for {columns} columns, which are not {self.bits} bits each")
        return fitting[0]

    def read(self, parts: Parts, rows: slice, cols: slice) -> np.ndarray:
        bits, shape = self.width(parts), self.shape(parts)
        words, within = window(cols, 32 // bits)
        x = unpacked(parts.read(self.weight, rows, words), bits)[:, within].astype(np.float32)
        n, m = grid_shape(parts.shape("weight_scale"))
        block = block_of(parts, (n, m), (shape[0], shape[1]), self.blocks)
        if not parts.has("weight_zero_point"):
            x -= 2 ** (bits - 1)
        elif parts.dtype("weight_zero_point") == "I32":  # both are offset
            zeros = unpacked(parts.read("weight_zero_point").T, bits).T[:n].astype(np.float32)
            x -= zeros[rows_of(n, block[0], rows)][:, columns_of(parts, m, block[1], cols)]
        else:
            x -= 2 ** (bits - 1) + spread(parts, "weight_zero_point", block, rows, cols)
        x *= spread(parts, "weight_scale", block, rows, cols)
        return x
