"""GGUF files: weights (dequantized by the `gguf` library), configuration and tokenizer from their metadata."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpojax.errors import UserError
from dpojax.models.config import DecoderConfig, config_from_hf
from dpojax.models.safetensors import BLOCK_NAMES, TOP_NAMES, assemble
from dpojax.types import PyTree

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

GGUF_NAMES = {
    TOP_NAMES["embed"]: "token_embd.weight",
    TOP_NAMES["final_norm"]: "output_norm.weight",
    TOP_NAMES["head"]: "output.weight",
}
GGUF_BLOCK_NAMES = {
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


@functools.lru_cache(maxsize=2)
def _reader(path: Path, modified: int, size: int) -> "GGUFReader":
    # Indexing a file takes seconds, and a command asks for its shape, its tokenizer and its weights in turn. The data
    # is mapped, not read; a file that has changed is another key.
    from gguf import GGUFReader

    return GGUFReader(path)


class GGUFFile:
    """An open GGUF file: metadata by key, tensors by Hugging Face name."""

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
        """The metadata as Hugging Face's ``config.json`` would say it."""
        family = self.get("general.architecture")
        if family != "llama":
            raise UserError(f"{self.path}: architecture {family!r} is not supported in GGUF; use a llama model")

        def key(name: str, default: Any = None) -> Any:
            value = self.get(f"llama.{name}", default)
            if value is None:
                raise UserError(f"{self.path}: no metadata llama.{name}; convert the model again")
            return value

        if "rope_freqs.weight" in self.tensors:
            raise UserError(f"{self.path}: scaled rotary frequencies are not read from GGUF; use its safetensors")
        heads, width = key("attention.head_count"), key("embedding_length")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
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
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.get("tokenizer.ggml.padding_token_id"),
        }

    def tensor(self, name: str, heads: int = 0) -> np.ndarray:
        """A tensor as float32; ``heads`` > 0 undoes the interleaving of rotary pairs that GGUF has in q and k."""
        from gguf import dequantize

        if name not in self.tensors:
            raise UserError(f"{self.path}: tensor {name} is missing; fetch the file again")
        tensor = self.tensors[name]
        x = dequantize(tensor.data, tensor.tensor_type)
        if heads:
            x = x.reshape(heads, -1, 2, x.shape[-1]).swapaxes(1, 2)
        return x


def load_gguf(file: GGUFFile, progress: Callable[[float], None]) -> tuple[DecoderConfig, PyTree]:
    """Read a GGUF file; parameters are float32 NumPy arrays."""
    config = config_from_hf(file.hf_config(), str(file.path))
    names: dict[str, tuple[str, int]] = {hf: (name, 0) for hf, name in GGUF_NAMES.items()}
    interleaved = {"q": config.heads, "k": config.kv_heads}
    for layer in range(config.layers):
        for key, name in GGUF_BLOCK_NAMES.items():
            names[BLOCK_NAMES[key].format(layer)] = (f"blk.{layer}.{name}.weight", interleaved.get(key, 0))
    return config, assemble(config, lambda hf: file.tensor(*names[hf]), str(file.path), progress)


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
