"""Hugging Face directories, in and out: config.json, safetensors in one file or by index."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from dpojax.errors import UserError
from dpojax.models.config import DecoderConfig
from dpojax.models.families import Family
from dpojax.models.families.base import with_earlier_rope
from dpojax.models.stored import FLOAT8, StoredTensors
from dpojax.models.weights import FileTensor, file_tensors
from dpojax.paths import AnyPath, in_store, make_directory, reaching, remove, write_text, written_on_disk
from dpojax.types import PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = "generation_config.json"
CARD, CARD_MARK = "README.md", "This card was written by dpojax"
TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*"),
    "additional_chat_templates",
)
"""Files of tokenizers, which those of another replace."""
SHARD_BYTES = 5_000_000_000  # export: split files above this; --max-shard-size has the same default
DTYPES = {
    "float32": ("F32", np.dtype(np.float32)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float16": ("F16", np.dtype(np.float16)),
}


def read_json(path: AnyPath) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: naming the file and how to fix it.
    """
    try:
        with reaching(path):
            value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a Hugging Face model directory, a .gguf file or a run") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); fetch or make it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; fetch or make it again")
    return value


def tensor_files(directory: AnyPath) -> dict[str, AnyPath] | list[AnyPath]:
    """Where a directory's tensors are: file by name, or the one file.

    Raises:
      UserError: it has no safetensors.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return {name: directory / file for name, file in read_json(index).get("weight_map", {}).items()}
    single = directory / "model.safetensors"
    if single.exists():
        return [single]
    raise UserError(f"{directory}: no model.safetensors or model.safetensors.index.json; export weights as safetensors")


def open_safetensors(path: AnyPath) -> Any:
    """A file's tensors, opened.

    Raises:
      UserError: there is no such file, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if in_store(path):
            return StoredTensors(path)
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though the index names it; fetch the model again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or damaged safetensors ({error}); fetch the model again") from None


class SafetensorsSource:
    """A directory's tensors, read slice by slice (:class:`~dpojax.models.weights.TensorSource`)."""

    names: dict[str, AnyPath]
    """The file that holds each tensor."""

    def __init__(self, directory: AnyPath):
        self.path = directory
        files = tensor_files(directory)
        if isinstance(files, list):
            handles = {files[0]: open_safetensors(files[0])}
            self.names = dict.fromkeys(handles[files[0]].keys(), files[0])
        else:
            handles = {path: open_safetensors(path) for path in sorted(set(files.values()))}
            self.names = {name: path for path, file in handles.items() for name in list(file.keys())} | files
        self.handles = handles
        self.headers: dict[AnyPath, tuple[int, dict[str, Any]]] = {}  # where the data begins, and the header

    def shape(self, name: str) -> tuple[int, ...] | None:
        if name not in self.names:
            return None
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The name that safetensors gives the tensor's dtype."""
        return self._slice(name).get_dtype()

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        dtype = FLOAT8.get(self.dtype(name))
        if dtype is None or in_store(self.path):
            return self._slice(name)[index]
        return self._mapped(name, dtype)[index]

    def _mapped(self, name: str, dtype: np.dtype) -> np.ndarray:
        """A tensor's bytes in its file, as an array of this dtype."""
        file = self.names[name]
        if file not in self.headers:
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                self.headers[file] = 8 + length, json.loads(opened.read(length))
        data, header = self.headers[file]
        shape = tuple(header[name]["shape"])
        octets = np.memmap(file, np.uint8, "r", data + header[name]["data_offsets"][0], math.prod(shape))
        return octets.view(dtype).reshape(shape)

    def _slice(self, name: str) -> Any:
        from safetensors import SafetensorError

        try:
            return self.handles[self.names[name]].get_slice(name)
        except SafetensorError as error:
            raise UserError(
                f"{self.names[name]}: tensor {name} cannot be read ({error}); fetch the model again"
            ) from None


def save_directory(
    params: PyTree,
    config: DecoderConfig,
    family: Family,
    hf_config: Mapping[str, Any],
    directory: AnyPath,
    *,
    generation_config: Mapping[str, Any] | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    card: str | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``config.json``, ``generation_config.json`` if there is one, and safetensors that transformers loads; the
    tokenizer and the model card too, where they are given.

    Tensors are fetched and written one at a time. All is written to a directory of its own and moved into place at the
    end, so that ``directory`` is never half there. What is written replaces files of its kind that are there.

    Raises:
      UserError: the directory cannot be written, the disk is full, or the dtype cannot hold a weight.
    """
    shards: list[list[FileTensor]] = [[]]
    size, itemsize = 0, DTYPES[dtype][1].itemsize
    for tensor in file_tensors(params, family, config):
        if size + tensor.size * itemsize > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size * itemsize
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = ["model.safetensors"] if len(shards) == 1 else files
    replaced = [*MODEL, *(TOKENIZER if tokenizer is not None else ())]
    if (directory / CARD).is_file() and CARD_MARK.encode() in (directory / CARD).read_bytes():
        replaced.append(CARD)  # it describes what is replaced
    with written_aside(directory, patterns=tuple(replaced)) as aside:
        for file, shard in zip(files, shards, strict=True):
            _write(aside / file, shard, dtype)
        if len(shards) > 1:
            weight_map = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
            total = sum(tensor.size * itemsize for shard in shards for tensor in shard)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_text(aside / "model.safetensors.index.json", json.dumps(index, indent=1))
        if generation_config:
            write_text(aside / GENERATION, json.dumps(dict(generation_config), indent=2))
        if tokenizer is not None:
            save_tokenizer(tokenizer, aside)
        if card is not None:
            write_text(aside / CARD, card)
        raw = with_earlier_rope({**hf_config, "dtype": dtype})
        raw.pop("torch_dtype", None)
        write_text(aside / "config.json", json.dumps(raw, indent=2))


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", directory: AnyPath) -> None:
    """Write a tokenizer's files, chat template included."""
    with written_on_disk(directory) as files:
        tokenizer.save_pretrained(files)


def _write(path: AnyPath, tensors: list[FileTensor], dtype: str) -> None:
    """Write one file in the safetensors format: the header's length, the header in JSON, then tensor after tensor.

    The safetensors library writes a file from all of its tensors at once; here there is never more than one.
    """
    name, np_dtype = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size * np_dtype.itemsize
        header[tensor.name] = {"dtype": name, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            x = _cast(tensor.name, np.asarray(tensor.fetch()), np_dtype)
            file.write(x.reshape(-1).view(np.uint8).data)


def _cast(name: str, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A tensor in another dtype.

    Raises:
      UserError: a finite value becomes infinite.
    """
    with np.errstate(over="ignore"):
        out = np.ascontiguousarray(x, dtype=dtype)
    beyond = np.isinf(out) & np.isfinite(x) if dtype.itemsize < x.dtype.itemsize else np.zeros(())
    if beyond.any():
        value, largest = x[beyond][0], float(ml_dtypes.finfo(dtype).max)
        raise UserError(
            f"--dtype {dtype.name}: tensor {name} holds {value:g}, and the largest number of {dtype.name} is "
            f"{largest:g}; use bfloat16 or float32"
        )
    return out


MODEL = ("model*.safetensors*", GENERATION)
"""Files of a model's directory that another model's replace, beside those of the same names."""


@contextlib.contextmanager
def written_aside(
    directory: AnyPath, *, patterns: tuple[str, ...] = MODEL, last: str = "config.json"
) -> Iterator[AnyPath]:
    """A new directory, whose files replace those of ``directory`` with these patterns once all are written; the file
    ``last`` goes first and comes last: where it is, all is.

    In an object store it is ``directory`` itself, where nothing is renamed: the old files go first, and the caller
    writes ``last`` last.
    """
    if in_store(directory):
        with reaching(directory, writes=True):
            _remove_files(directory, patterns, last)
            yield directory
        return
    aside = directory.with_name(directory.name + ".partial")
    try:
        remove(aside)
        aside.mkdir(parents=True)
        yield aside
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove(aside)
        if isinstance(error, OSError):
            said = f"{directory}: cannot be written ({error}); free some space or name another place"
            raise UserError(said) from None
        raise
    make_directory(directory)
    _remove_files(directory, patterns, last)
    for path in sorted(aside.iterdir(), key=lambda path: path.name == last):
        if path.is_dir():
            remove(directory / path.name)
        path.replace(directory / path.name)
    aside.rmdir()


def _remove_files(directory: AnyPath, patterns: tuple[str, ...], first: str) -> None:
    remove(directory / first)
    for old in [path for pattern in patterns for path in directory.glob(pattern)]:
        remove(old)
