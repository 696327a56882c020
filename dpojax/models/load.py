"""A model by name: a Hugging Face directory, a hub id, or a GGUF file; or a new one."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dpojax.errors import UserError, first_line
from dpojax.models.config import DecoderConfig
from dpojax.models.dequantize import RawTensors
from dpojax.models.families import FAMILIES, Family, family_of
from dpojax.models.generation import eos_notes, model_eos_ids, read_generation_config, with_tokenizer_eos
from dpojax.models.gguf import GGUFFile, GGUFSource
from dpojax.models.gguf_tokenizer import gguf_tokenizer
from dpojax.models.params import init_params, param_shardings
from dpojax.models.peft import is_adapter
from dpojax.models.quantized import QuantizedSource, forms_of, quantization_of, without_quantization
from dpojax.models.safetensors import SHARD_BYTES, SafetensorsSource, read_json, save_directory
from dpojax.models.unread import check_dtypes, check_unread
from dpojax.models.weights import check_source, load_params, under_base
from dpojax.paths import AnyPath, exists, in_store, on_disk, path_of
from dpojax.progress import console
from dpojax.types import PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[float], None]
VOCABULARIES = ("tokenizer.json", "vocab.json", "tekken.json")  # and SentencePiece's .model, and lists in .txt
TOKENIZER_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "additional_chat_templates")
"""What is copied of a directory in an object store, where transformers reads none."""
FIRST_ROWS = 64  # of a tied unembedding, compared when files are opened; all are when they are loaded


@dataclasses.dataclass(frozen=True)
class Model:
    """A model: the decoder's choices, its parameters (float32 arrays), and the ``config.json`` and
    ``generation_config.json`` (empty: none) to export with."""

    config: DecoderConfig
    params: PyTree
    hf_config: dict[str, Any]
    generation_config: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def family(self) -> Family:
        return family_of(self.hf_config, "config.json")

    def eos_ids(self, tokenizer: "PreTrainedTokenizerBase | None" = None) -> tuple[int, ...]:
        """Every token that ends a completion: those of ``generation_config.json`` and ``config.json``, and the
        tokenizer's EOS if it is given.

        Raises:
          UserError: one of them is no token of the model.
        """
        own = model_eos_ids(self.hf_config, self.generation_config, self.config.vocab_size)
        return own if tokenizer is None else with_tokenizer_eos(own, tokenizer, self.config.vocab_size)


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model's files, opened: its choices, ``config.json`` and ``generation_config.json`` (empty: none); the
    parameters have not been read. ``notes`` are sentences on what is not used of them."""

    config: DecoderConfig
    hf_config: dict[str, Any]
    source: RawTensors
    generation_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def load(self, mesh: Mesh | None = None, progress: Progress = lambda share: None) -> Model:
        """The model with its parameters born on the mesh (:func:`~dpojax.models.weights.load_params`).

        Raises:
          UserError: a tensor does not fit the config, or a tied unembedding differs from the embedding.
        """
        family = family_of(self.hf_config, str(self.source.path))
        check_unread(self.source, family, self.config)
        for note in self.notes:
            console.print(note)
        params = load_params(self.source, family, self.config, mesh, progress)
        return Model(self.config, params, self.hf_config, self.generation_config)


def reward_config(config: DecoderConfig, hf_config: dict[str, Any]) -> tuple[DecoderConfig, dict[str, Any]]:
    """The choices and ``config.json`` of a model with a head that scores completions in place of its unembedding.

    It is exported as ``...ForSequenceClassification`` of one label.
    """
    if config.reward:
        return config, hf_config
    family = family_of(hf_config, "config.json")
    architecture = family.architecture + family.classifier
    raw = {**hf_config, "architectures": [architecture], "id2label": {"0": "reward"}}
    raw |= {"label2id": {"reward": 0}, "num_labels": 1}
    if raw.get("pad_token_id") is None:  # transformers finds a row's end by it
        eos = raw.get("eos_token_id")
        first = eos[0] if isinstance(eos, list) and eos else eos
        raw["pad_token_id"] = first if isinstance(first, int) and 0 <= first < config.vocab_size else None
    return dataclasses.replace(config, head="score"), raw


def as_reward_model(model: Model, mesh: Mesh | None = None) -> Model:
    """The model with a head that scores completions, which starts at zero, in place of its unembedding."""
    if model.config.reward:
        return model
    config, raw = reward_config(model.config, model.hf_config)
    params = {name: x for name, x in model.params.items() if name not in ("head", "head_bias")}
    score = jnp.zeros((1, config.width), jnp.float32)
    params["score"] = score if mesh is None else jax.device_put(score, param_shardings(mesh, config)["score"])
    return Model(config, params, raw)


def new_model(config: DecoderConfig, family: str = "llama", seed: int = 0, mesh: Mesh | None = None) -> Model:
    """A model with fresh random parameters, and the ``config.json`` that it is saved with.

    Args:
      config: the decoder's choices.
      family: ``model_type`` of the family that it is one of.
      seed: of the parameters.
      mesh: where they are born (default: whole, on JAX's first device).

    Raises:
      UserError: no such family, or it has no models of these choices.
    """
    if family not in FAMILIES:
        raise UserError(f"no family {family!r}; use one of {', '.join(sorted(FAMILIES))}")
    return Model(config, init_params(config, seed, mesh), FAMILIES[family].hf_config(config))


def save_model(
    model: Model,
    directory: str | AnyPath,
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    card: str | None = None,
) -> None:
    """Write a model as a Hugging Face directory, its configs and safetensors, tensor by tensor.

    Args:
      model: what to write.
      directory: where; it is complete or not there.
      dtype: of the written weights, float32, bfloat16 or float16.
      shard_bytes: files are split above this size; a larger tensor has a file of its own.
      tokenizer: written too, its chat template included (default: none).
      card: text of the model card, ``README.md`` (default: none; :func:`~dpojax.train.card.model_card` is a run's).

    Raises:
      UserError: the directory cannot be written, the disk is full, or the dtype cannot hold a weight.
    """
    save_directory(
        model.params,
        model.config,
        model.family,
        model.hf_config,
        path_of(directory),
        generation_config=model.generation_config,
        tokenizer=tokenizer,
        card=card,
        dtype=dtype,
        shard_bytes=shard_bytes,
    )


def resolve(name: str) -> AnyPath:
    """The path of a model: itself, or a hub id's files, downloaded by huggingface_hub."""
    path = path_of(name)
    if in_store(path) and name.endswith(".gguf"):
        raise UserError(f"{name}: a GGUF file is read from a disk; copy it to this machine")
    if exists(path):
        return path
    if in_store(path):
        raise UserError(f"{name}: nothing is there; give a Hugging Face directory, or the --output of a run")
    if name.count("/") != 1 or name.endswith(".gguf") or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such model; give a Hugging Face directory, a hub id (owner/name) or a .gguf file")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds; each means the same to the user
        raise UserError(f"{name}: no such directory, and the hub did not give it ({first_line(error)})") from None


def adapter_directory(name: str) -> AnyPath | None:
    """The directory of a model's name where that is an adapter's; None where it is a whole model."""
    path = resolve(name)
    return path if path.is_dir() and is_adapter(path) else None


def open_model(name: str) -> ModelFiles:
    """A model's files, opened: its choices, and where its tensors are.

    Args:
      name: a Hugging Face directory, a hub id or a ``.gguf`` file.

    Raises:
      UserError: no such model, an unsupported or damaged one, or none with weights.
    """
    path = resolve(name)
    return _open_directory(path) if path.is_dir() else _open_gguf(path)


def _open_directory(path: AnyPath) -> ModelFiles:
    where = str(path / "config.json")
    raw = read_json(path / "config.json")
    family = family_of(raw, where)
    config = family.read(without_quantization(raw), where)
    source: RawTensors = SafetensorsSource(path)
    adapter = path / "adapter_config.json"
    if adapter.exists():
        raise UserError(
            f"{adapter}: an adapter beside a whole model, and only one can be meant; remove the files of the other"
        )
    quantization = quantization_of(raw)
    beside = path / "quantize_config.json"
    if quantization is None and beside.exists():
        quantization = {"quant_method": "gptq", **read_json(beside)}  # as AutoGPTQ writes it
    if quantization is not None:
        source = QuantizedSource(source, forms_of(quantization, where))
        raw = without_quantization(raw)
    source = under_base(source, family)
    return _checked(raw, family, config, source, read_generation_config(path))


def _open_gguf(path: AnyPath) -> ModelFiles:
    file = GGUFFile(path)
    raw = file.hf_config()
    family = family_of(raw, str(path))
    config = family.read(raw, str(path))
    return _checked(raw, family, config, GGUFSource(file, family, config), file.generation_config())


def _checked(
    raw: dict[str, Any], family: Family, config: DecoderConfig, source: RawTensors, generation: dict[str, Any]
) -> ModelFiles:
    """Files of which all is read, or known to change nothing; notes name what is not understood."""
    check_dtypes(source)
    check_source(source, family, config)
    notes = check_unread(source, family, config, rows=FIRST_ROWS)
    notes += eos_notes(raw, generation, config.vocab_size, source.path)
    return ModelFiles(config, raw, source, generation, tuple(notes))


def load_model(name: str, progress: Progress = lambda share: None, *, mesh: Mesh | None = None) -> Model:
    """A model with its weights.

    Args:
      name: a Hugging Face directory, a hub id or a ``.gguf`` file.
      progress: called with the share that is read, from 0 to 1.
      mesh: where the parameters are born (default: whole, on JAX's first device).

    Raises:
      UserError: no such model, no weights, or damaged ones.
    """
    return open_model(name).load(mesh, progress)


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """A model's tokenizer, chat template included; a GGUF's is built from its metadata."""
    path = resolve(name)
    if path.is_file():
        return gguf_tokenizer(GGUFFile(path))
    try:
        with on_disk(path, *TOKENIZER_FILES) as files:
            tokenizer = _tokenizer_class(files).from_pretrained(files)
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds; each means the same to the user
        raise UserError(f"{name}: no usable tokenizer ({first_line(error)}); name one with --tokenizer") from None
    tokenizer.name_or_path = str(path)
    if not tokenizer.encode("a", add_special_tokens=False):
        raise UserError(f"{name}: its tokenizer has no tokens, as where files are missing; name one with --tokenizer")
    return tokenizer


def _tokenizer_class(path: AnyPath) -> Any:
    """What reads a directory's tokenizer: the class that it names, where no file holds a vocabulary (ByT5's bytes).

    Of some families transformers' AutoTokenizer takes another class there, which then has no vocabulary.
    """
    import transformers

    config = path / "tokenizer_config.json"
    named = read_json(config).get("tokenizer_class") if config.exists() else None
    files = path.iterdir() if path.is_dir() else ()
    alone = not any(file.suffix in (".model", ".txt") or file.name in VOCABULARIES for file in files)
    return (alone and getattr(transformers, str(named), None)) or transformers.AutoTokenizer
