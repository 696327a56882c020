"""Safetensors in an object store, read by ranges of bytes, so that no host reads more than its devices hold."""

import dataclasses
import json
import math
from typing import Any

import ml_dtypes
import numpy as np

from dpojax.errors import UserError
from dpojax.paths import AnyPath, reaching

FLOAT8 = {  # NumPy has no such dtypes, and safetensors does not look for them in ml_dtypes
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
STORED = {
    **{f"{kind}{8 * size}": np.dtype(f"<{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    **FLOAT8,
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BOOL": np.dtype(np.bool_),
}
"""The dtypes that safetensors has, by its names."""


class StoredTensors:
    """A safetensors file's tensors, opened; of the methods of ``safetensors.safe_open``, those that we use.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it is damaged, or the store cannot be reached.
    """

    def __init__(self, path: AnyPath):
        from fsspec.core import url_to_fs

        self.path = path
        with reaching(path):
            self.files, self.name = url_to_fs(str(path))  # etils opens a file anew for a range, and reads ahead
            size = self.files.size(self.name)
            length = int.from_bytes(self._range(0, 8), "little")
        try:
            if not 2 <= length <= size - 8:
                raise ValueError("the header is longer than the file")
            self.header: dict[str, Any] = json.loads(self._range(8, 8 + length))
            self.header.pop("__metadata__", None)
            self.start, end = 8 + length, max((x["data_offsets"][1] for x in self.header.values()), default=0)
            if self.start + end != size:
                raise ValueError(f"{self.start + end:,} bytes expected, and {size:,} are there")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: truncated or damaged safetensors ({error}); copy the model again") from None

    def _range(self, start: int, end: int) -> bytes:
        with reaching(self.path):
            return self.files.cat_file(self.name, start, end) if end > start else b""

    def keys(self) -> list[str]:
        """The tensors' names."""
        return list(self.header)

    def get_slice(self, name: str) -> "StoredTensor":
        """A tensor, not read yet."""
        return StoredTensor(self, name)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file; indexing it reads it, or the rows of it that are asked for."""

    tensors: StoredTensors
    name: str

    def get_shape(self) -> list[int]:
        """Its shape."""
        return self.tensors.header[self.name]["shape"]

    def get_dtype(self) -> str:
        """The name that safetensors gives its dtype."""
        return self.tensors.header[self.name]["dtype"]

    def __getitem__(self, index: Any) -> np.ndarray:
        shape, dtype = self.get_shape(), STORED[self.get_dtype()]
        index = index if isinstance(index, tuple) else (index,)
        rows, rest = slice(None), index
        if shape and index and isinstance(index[0], slice):
            rows, rest = index[0], (slice(None), *index[1:])
        first, last, _ = rows.indices(shape[0]) if shape else (0, 1, 1)
        each = math.prod(shape[1:]) * dtype.itemsize
        begin = self.tensors.start + self.tensors.header[self.name]["data_offsets"][0]
        data = self.tensors._range(begin + first * each, begin + last * each)
        return np.frombuffer(data, dtype).reshape([last - first, *shape[1:]] if shape else [])[rest]
