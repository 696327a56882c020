"""Quantised weights of GPTQ and AWQ: integers in words, scales and zero points of groups of inputs."""

import dataclasses

import numpy as np

from dpojax.models.dequantize import Parts, check_groups, present, unpacked, window

AWQ_COLUMNS = [0, 4, 1, 5, 2, 6, 3, 7]  # where an AWQ word keeps its eight columns: 0, 2, 4, 6, 1, 3, 5, 7 from below


@dataclasses.dataclass(frozen=True)
class Gptq:
    """Integers in int32 words along the input axis, with scales and zero points of groups of inputs.

    ``w[i, j] = s[g(j), i] * (q[j, i] - z[g(j), i])``, with g of ``g_idx``; GPTQ's first format stores ``z - 1``.
    Source: AutoGPTQ and GPTQModel (Frantar et al. 2022, arXiv 2210.17323).

    Attributes:
      bits: of a number, 2, 4 or 8.
      group_size: inputs of a group (-1: all), where there is no ``g_idx``.
      add: what the stored zero points lack, 1 or 0.
      ordered: the columns of a group lie apart (desc_act), so that ``g_idx`` must be there.
    """

    bits: int
    group_size: int
    add: int
    ordered: bool = False
    weight: str = "qweight"

    def holds(self, parts: Parts) -> bool:
        return parts.has(self.weight)

    def names(self, parts: Parts) -> list[str]:
        needed = (self.weight, "qzeros", "scales")
        return present(parts, (*needed, "g_idx")) if self.ordered else present(parts, needed, ("g_idx",))

    def shape(self, parts: Parts) -> tuple[int, ...]:
        words, outputs = parts.shape(self.weight)
        return outputs, words * 32 // self.bits

    def read(self, parts: Parts, rows: slice, cols: slice) -> np.ndarray:
        words, within = window(cols, 32 // self.bits)
        x = unpacked(parts.read(self.weight, words, rows).T, self.bits)[:, within].astype(np.float32)
        groups, inputs = parts.shape("scales")[0], self.shape(parts)[1]
        size = self.group_size if self.group_size > 0 else inputs
        g = parts.read("g_idx", cols).astype(int) if parts.has("g_idx") else np.arange(cols.start, cols.stop) // size
        check_groups(parts, g, groups)
        zero_words, zero_within = window(rows, 32 // self.bits)
        zeros = unpacked(parts.read("qzeros", slice(0, groups), zero_words), self.bits)[:, zero_within]
        x -= (zeros.astype(np.float32) + self.add)[g].T
        x *= parts.read("scales", slice(0, groups), rows).astype(np.float32)[g].T
        return x


@dataclasses.dataclass(frozen=True)
class Awq:
    """Integers of 4 bits in int32 words along the output axis, in AWQ's order, with scales and zero points of groups.

    ``w[i, j] = s[j // group, i] * (q[j, i] - z[j // group, i])``.
    Source: AutoAWQ, version gemm (Lin et al. 2023, arXiv 2306.00978).
    """

    group_size: int
    weight: str = "qweight"

    def holds(self, parts: Parts) -> bool:
        return parts.has(self.weight)

    def names(self, parts: Parts) -> list[str]:
        return present(parts, (self.weight, "qzeros", "scales"))

    def shape(self, parts: Parts) -> tuple[int, ...]:
        inputs, words = parts.shape(self.weight)
        return words * 8, inputs

    def read(self, parts: Parts, rows: slice, cols: slice) -> np.ndarray:
        words, within = window(rows, 8)

        def numbers(part: str, index: slice) -> np.ndarray:
            x = unpacked(parts.read(part, index, words), 4)
            x = x.reshape(len(x), -1, 8)[..., AWQ_COLUMNS].reshape(len(x), -1)
            return x[:, within].astype(np.float32)

        groups, inputs = parts.shape("scales")[0], parts.shape(self.weight)[0]
        g = np.arange(cols.start, cols.stop) // (self.group_size if self.group_size > 0 else inputs)
        check_groups(parts, g, groups)
        x = numbers(self.weight, cols) - numbers("qzeros", slice(0, groups))[g]
        x *= parts.read("scales", slice(0, groups), rows).astype(np.float32)[g]
        return x.T
