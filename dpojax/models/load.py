"""A model by name: a Hugging Face directory, a hub id, or a GGUF file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpojax.errors import UserError, first_line
from dpojax.models.config import DecoderConfig, config_from_hf
from dpojax.models.gguf import GGUFFile, gguf_tokenizer, load_gguf
from dpojax.models.safetensors import load_directory, read_json, tensor_files
from dpojax.types import PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as it lies on disk: shape, parameters (float32 NumPy arrays) and the ``config.json`` to export with."""

    config: DecoderConfig
    params: PyTree
    hf_config: dict[str, Any]


def as_reward_model(model: Model) -> Model:
    """The model with a head that scores completions, which starts at zero, in place of its unembedding.

    It is exported as ``LlamaForSequenceClassification`` of one label.
    """
    if model.config.reward:
        return model
    params = {name: x for name, x in model.params.items() if name != "head"}
    params["score"] = np.zeros((1, model.config.width), np.float32)
    raw = {**model.hf_config, "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"}}
    raw |= {"label2id": {"reward": 0}, "num_labels": 1}
    if raw.get("pad_token_id") is None:  # transformers finds a row's end by it
        raw["pad_token_id"] = raw.get("eos_token_id")
    return Model(dataclasses.replace(model.config, reward=True), params, raw)


def resolve(name: str) -> Path:
    """The local path of a model: itself, or a hub id's files, downloaded by huggingface_hub."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.count("/") != 1 or name.endswith(".gguf") or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such model; give a Hugging Face directory, a hub id (owner/name) or a .gguf file")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds; each means the same to the user
        raise UserError(f"{name}: no such directory, and the hub did not give it ({first_line(error)})") from None


def check_model(name: str) -> DecoderConfig:
    """The shape of a model, and that it has weights, before anything long is begun.

    Raises:
      UserError: no such model, an unsupported one, or none with weights.
    """
    path = resolve(name)
    if path.is_dir():
        config = config_from_hf(read_json(path / "config.json"), str(path / "config.json"))
        tensor_files(path)
        return config
    return config_from_hf(GGUFFile(path).hf_config(), str(path))


def load_model(name: str, progress: Callable[[float], None] = lambda share: None) -> Model:
    """Read a model's weights.

    Args:
      name: a Hugging Face directory, a hub id or a ``.gguf`` file.
      progress: called with the share that is read, from 0 to 1.

    Raises:
      UserError: no such model, no weights, or damaged ones.
    """
    path = resolve(name)
    if path.is_dir():
        config, params = load_directory(path, progress)
        return Model(config, params, read_json(path / "config.json"))
    file = GGUFFile(path)
    config, params = load_gguf(file, progress)
    return Model(config, params, file.hf_config())


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """A model's tokenizer, chat template included; a GGUF's is built from its metadata."""
    path = resolve(name)
    if path.is_file():
        return gguf_tokenizer(GGUFFile(path))
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises many kinds; each means the same to the user
        raise UserError(f"{name}: no usable tokenizer ({first_line(error)}); name one with --tokenizer") from None
