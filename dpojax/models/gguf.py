"""GGUF files: weights (dequantized by the `gguf` library), configuration and tokenizer from their metadata."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpojax.errors import UserError
from dpojax.models.config import DecoderConfig
from dpojax.models.families import FAMILIES, Family
from dpojax.models.weights import Placed, places

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast


@functools.lru_cache(maxsize=2)
def _reader(path: Path, modified: int, size: int) -> "GGUFReader":
    # Indexing a file takes seconds, and a command asks for its shape, its tokenizer and its weights in turn. The data
    # is mapped, not read; a file that has changed is another key.
    from gguf import GGUFReader

    return GGUFReader(path)


class GGUFFile:
    """An open GGUF file: metadata by key, tensors by GGUF's name."""

    def __init__(self, path: Path):
        self.path = path
        try:
            stat = path.stat()
            self.reader = _reader(path, stat.st_mtime_ns, stat.st_size)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; give a .gguf file or a Hugging Face model directory") from None
        except Exception as error:  # the reader lets NumPy's errors through
            raise UserError(f"{path}: truncated or damaged GGUF file ({error}); fetch it again") from None
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def get(self, key: str, default: Any = None) -> Any:
        field = self.reader.get_field(key)
        return default if field is None else field.contents()

    def hf_config(self) -> dict[str, Any]:
        """The metadata as a Hugging Face ``config.json`` would have it."""
        family = self.get("general.architecture")
        if family not in FAMILIES:
            known = " or ".join(sorted(FAMILIES))
            raise UserError(f"{self.path}: architecture {family!r} is not supported in GGUF; use a {known} model")

        def key(name: str, default: Any = None) -> Any:
            value = self.get(f"{family}.{name}", default)
            if value is None:
                raise UserError(f"{self.path}: no metadata {family}.{name}; convert the model again")
            return value

        if "rope_freqs.weight" in self.tensors:
            raise UserError(f"{self.path}: scaled rotary frequencies are not read from GGUF; use its safetensors")
        heads, width = key("attention.head_count"), key("embedding_length")
        return {
            "architectures": [f"{FAMILIES[family].architecture}ForCausalLM"],
            "model_type": family,
            "hidden_act": "silu",
            "hidden_size": width,
            "intermediate_size": key("feed_forward_length"),
            "num_hidden_layers": key("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": key("attention.head_count_kv", heads),
            "head_dim": key("attention.key_length", width // heads),
            "rms_norm_eps": float(np.float32(key("attention.layer_norm_rms_epsilon"))),
            "rope_theta": float(key("rope.freq_base", 10_000.0)),
            "rope_parameters": {"rope_type": "default", "rope_theta": float(key("rope.freq_base", 10_000.0))},
            "max_position_embeddings": key("context_length"),
            "vocab_size": len(self.get("tokenizer.ggml.tokens", [])) or key("vocab_size"),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "attention_bias": "blk.0.attn_q.bias" in self.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self.tensors,
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.get("tokenizer.ggml.padding_token_id"),
        }

    def generation_config(self) -> dict[str, Any]:
        """The metadata as a ``generation_config.json`` would have it: BOS, and what ends a text or a turn."""
        ends = [self.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        bos, ends = self.get("tokenizer.ggml.bos_token_id"), list(dict.fromkeys(i for i in ends if i is not None))
        raw = {"bos_token_id": bos, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
        return {name: value for name, value in raw.items() if value is not None}


class GGUFSource:
    """A GGUF file's tensors by Hugging Face's name, dequantized slice by slice
    (:class:`~dpojax.models.weights.TensorSource`)."""

    def __init__(self, file: GGUFFile, family: Family, config: DecoderConfig):
        self.path, self.tensors = file.path, file.tensors
        self.places: dict[str, tuple[str, Placed]] = {}
        for place in places(family, config).values():
            kind = ".bias" if place.tensor.name.endswith(".bias") else ".weight"
            for layer, name in enumerate(place.names()):
                self.places[name] = (place.tensor.gguf.format(layer) + kind, place)
        read = {gguf: name for name, (gguf, _) in self.places.items()}
        self.names = [read.get(gguf, gguf) for gguf in self.tensors]

    def shape(self, name: str) -> tuple[int, ...] | None:
        gguf, _ = self.places.get(name, ("", None))
        if gguf not in self.tensors:
            return None
        return tuple(int(n) for n in reversed(self.tensors[gguf].shape))

    def dtype(self, name: str) -> str:
        """What :meth:`read` returns, in safetensors' words."""
        return "F32"

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor as float32; whole rows are dequantized, those of the slice alone."""
        from gguf import dequantize

        gguf, place = self.places[name]
        tensor = self.tensors[gguf]
        if len(index) == 1:
            return dequantize(tensor.data, tensor.tensor_type)[index]
        x = dequantize(tensor.data[index[0]], tensor.tensor_type)
        if place.tensor.gguf_pairs:  # the two halves of every head are interleaved
            head_dim = place.shape[-1]
            x = x.reshape(-1, head_dim // 2, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
        return x[:, index[1]]


def _pre_tokenizer(kind: str, path: Path) -> Any:
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind == "smollm":  # every digit a token of its own
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if kind in ("gpt-2", "default"):
        return byte_level
    raise UserError(f"{path}: tokenizer kind {kind!r} is not built from GGUF; name a directory with --tokenizer")


def gguf_tokenizer(file: GGUFFile) -> "PreTrainedTokenizerFast":
    """The byte-level BPE tokenizer that the metadata describes, chat template included."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    kind = file.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UserError(
            f"{file.path}: tokenizer model {kind!r} is not built from GGUF; name a directory with --tokenizer"
        )
    tokens = file.get("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(file.get("tokenizer.ggml.pre", "default"), file.path)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = file.get("tokenizer.ggml.token_type") or [1] * len(tokens)  # llama.cpp's: 1 normal, 3 control
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])

    special = {}
    for role in ("bos", "eos", "unknown", "padding"):
        token = file.get(f"tokenizer.ggml.{role}_token_id")
        if token is not None:
            special[{"unknown": "unk_token", "padding": "pad_token"}.get(role, f"{role}_token")] = tokens[token]
    if file.get("tokenizer.ggml.add_bos_token", False):
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokens.index(bos))]
        )
    template = file.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        model_max_length=file.hf_config()["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        **special,
    )
