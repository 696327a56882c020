"""Quantised weights of bitsandbytes: LLM.int8, and the codes of 4 bits (nf4, fp4)."""

import dataclasses
import json
from typing import Any

import numpy as np

from dpojax.models.dequantize import Parts, present


@dataclasses.dataclass(frozen=True)
class RowInt8:
    """Int8 numbers with the largest absolute value of every row: ``w[i, j] = q[i, j] * SCB[i] / 127``.

    Source: bitsandbytes (LLM.int8, Dettmers et al. 2022, arXiv 2208.07339).
    """

    weight: str = "weight"

    def holds(self, parts: Parts) -> bool:
        return parts.has(self.weight) and parts.dtype(self.weight) == "I8"

    def names(self, parts: Parts) -> list[str]:
        names = present(parts, (self.weight, "SCB"), ("weight_format",))
        if parts.has("weight_format") and int(parts.read("weight_format")) != 0:
            raise parts.wrong("is laid out for one kind of GPU (weight_format is not 0), which is not read")
        return names

    def shape(self, parts: Parts) -> tuple[int, ...]:
        return parts.shape(self.weight)

    def read(self, parts: Parts, rows: slice, cols: slice) -> np.ndarray:
        scale = parts.read("SCB", rows).astype(np.float32)[:, None] / np.float32(127)
        return parts.read(self.weight, rows, cols).astype(np.float32) * scale


@dataclasses.dataclass(frozen=True)
class FourBit:
    """Codes of 4 bits into a table of 16 values, times the largest absolute value of a block of the flat weight.

    Two codes an octet, the first in the high bits. With double quantisation the blocks' values are codes themselves:
    ``absmax = nested_quant_map[code] * nested_absmax[block of blocks] + nested_offset``.
    Source: bitsandbytes (nf4 and fp4; QLoRA, Dettmers et al. 2023, arXiv 2305.14314).
    """

    weight: str = "weight"

    def holds(self, parts: Parts) -> bool:
        return parts.has("weight.absmax") or (parts.has(self.weight) and parts.dtype(self.weight) == "U8")

    def names(self, parts: Parts) -> list[str]:
        nested = ("weight.nested_absmax", "weight.nested_quant_map")
        return present(parts, (self.weight, "weight.absmax", "weight.quant_map", self._state_name(parts)), nested)

    @staticmethod
    def _state_name(parts: Parts) -> str:
        fp4 = "weight.quant_state.bitsandbytes__fp4"
        return fp4 if parts.has(fp4) else "weight.quant_state.bitsandbytes__nf4"

    def _state(self, parts: Parts) -> dict[str, Any]:
        try:
            state = json.loads(bytes(parts.read(self._state_name(parts)).astype(np.uint8)))
            return {**state, "blocksize": int(state["blocksize"]), "shape": tuple(int(n) for n in state["shape"])}
        except (ValueError, TypeError, KeyError):
            raise parts.wrong("has a quant_state that is not bitsandbytes' JSON") from None

    def shape(self, parts: Parts) -> tuple[int, ...]:
        return self._state(parts)["shape"]

    def read(self, parts: Parts, rows: slice, cols: slice) -> np.ndarray:
        state = self._state(parts)
        width = state["shape"][1]
        start, stop = rows.start * width, rows.stop * width
        size = 2 * self._itemsize(parts)  # codes an element of whatever dtype stores them
        first = start // size
        stored = parts.read(self.weight, slice(first, -(-stop // size)), slice(0, 1))
        octets = np.ascontiguousarray(stored).view(np.uint8).reshape(-1)
        codes = np.stack([octets >> 4, octets & 15], axis=-1).reshape(-1)[start - first * size : stop - first * size]
        blocks = np.arange(start, stop) // state["blocksize"]
        largest = self._largest(parts, state, slice(blocks[0], blocks[-1] + 1))[blocks - blocks[0]]
        values = parts.read("weight.quant_map").astype(np.float32)[codes] * largest
        return values.reshape(-1, width)[:, cols]

    def _itemsize(self, parts: Parts) -> int:
        sizes = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}
        return sizes[parts.dtype(self.weight)]

    @staticmethod
    def _largest(parts: Parts, state: dict[str, Any], blocks: slice) -> np.ndarray:
        largest = parts.read("weight.absmax", blocks)
        if not parts.has("weight.nested_absmax"):
            return largest.astype(np.float32)
        outer = np.arange(blocks.start, blocks.stop) // int(state["nested_blocksize"])
        table = parts.read("weight.nested_quant_map").astype(np.float32)
        scale = parts.read("weight.nested_absmax").astype(np.float32)[outer]
        return table[largest] * scale + np.float32(state["nested_offset"])
