"""A ``config.json`` as it is read: every field is read, known to change nothing, or refused by its name and value."""

from collections.abc import Mapping
from typing import Any, NoReturn

from dpojax.errors import UserError
from dpojax.models.config import DecoderConfig, Rope

IRRELEVANT = frozenset((
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_flash_attn_2_enabled", "_name_or_path",
    "_num_labels", "adapters", "architectures", "attention_dropout", "attention_probs_dropout_prob",
    "attn_implementation", "attn_pdrop", "auto_map", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "cache_implementation", "chunk_size_feed_forward", "classifier_dropout", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping", "embd_pdrop",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob",
    "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "is_llama_config", "label2id",
    "length_penalty", "max_length", "min_length", "model_type", "name_or_path", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_router_logits", "output_scores", "pad_token_id", "predict_special_tokens", "prefix", "pretraining_tp",
    "problem_type", "remove_invalid_values", "repetition_penalty", "resid_pdrop", "return_dict",
    "return_dict_in_generate", "router_aux_loss_coef", "router_jitter_noise", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k",
    "top_p", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "typical_p",
    "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
))  # fmt: skip
"""Fields that change no logit: names of things, dropout, settings of sampling, and what is read apart from here."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""transformers' name -> :class:`~dpojax.models.config.Mlp`'s."""


def activation_name(act: str, tanh: str) -> str:
    """transformers' name of an activation of ours; ``tanh`` is the family's for GELU by tanh, which has several."""
    return tanh if act == "gelu_tanh" else act


class Fields:
    """The fields of a ``config.json``, which remembers those that were read.

    Args:
      raw: the parsed file.
      source: where it is from, for errors.
    """

    def __init__(self, raw: Mapping[str, Any], source: str):
        self.raw, self.source, self.used = raw, source, set(IRRELEVANT)

    def without(self, *names: str) -> "Fields":
        """The same fields but for these, which are read apart."""
        out = Fields({name: value for name, value in self.raw.items() if name not in names}, self.source)
        self.used.update(names)
        out.used = self.used
        return out

    def get(self, name: str, default: Any = None) -> Any:
        """A field's value as it is; the default where the file does not have it."""
        self.used.add(name)
        return self.raw.get(name, default)

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number; the default, if there is one, where it is missing or null."""
        value = self._number(name, default)
        if value != int(value):
            self.refuse(name, "use a whole number")
        return int(value)

    def number(self, name: str, default: int | float | None = None) -> float:
        """A number; the default, if there is one, where it is missing or null."""
        return float(self._number(name, default))

    def optional(self, name: str, default: int | float | None = None) -> float | None:
        """A number, or None where it is null; the default where it is missing."""
        value = self.get(name, default)
        return None if value is None else float(self._number(name, default))

    def window(self, default: int | None) -> int | None:
        """How many of the latest tokens a token sees in layers that have a window; None where it is null."""
        name = "sliding_window"
        if self.get(name, default) is None:
            return None
        value = self.integer(name, default)
        return value if value > 0 else self.refuse(name, "use a window of at least 1 token")

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false; the default where it is missing or null."""
        value = self.get(name)
        return default if value is None else bool(value)

    def _number(self, name: str, default: int | float | None) -> int | float:
        value = self.get(name)
        value = default if value is None else value
        if value is None:
            family = self.raw.get("model_type")
            raise UserError(f"{self.source}: no field {name!r}; a {family} config.json has it")
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(name, "use a number")
        return value

    def activation(self, name: str, default: str) -> Any:
        """The activation of the MLP, in our words."""
        value = self.get(name) or default
        if value not in ACTIVATIONS:
            self.refuse(name, f"use a model with {', '.join(sorted(ACTIVATIONS))}")
        return ACTIVATIONS[value]

    def attention_bias(self, default: bool = False) -> Any:
        """Which products of attention have a bias, by the field of this name: all of them, or none."""
        return "all" if self.flag("attention_bias", default) else "none"

    def head(self) -> Any:
        """What the model ends in, by its architecture: the vocabulary, or one score."""
        kinds = [name.rsplit("For", 1)[-1] for name in self.get("architectures") or () if "For" in name]
        if "SequenceClassification" not in kinds:
            others = [kind for kind in kinds if kind != "CausalLM"]
            if others:
                self.refuse("architectures", "use a ForCausalLM or a ForSequenceClassification")
            return "vocab"
        if self.raw.get("num_labels", len(self.raw.get("id2label") or "ab")) != 1:
            raise UserError(
                f"{self.source}: a classifier of several labels is no reward model; use one with num_labels 1"
            )
        return "score"

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """Refuse a field that is set, unless to one of these values."""
        value = self.get(name)
        if value not in (None, *allowed):
            self.refuse(name, why)

    def refuse(self, name: str, why: str) -> NoReturn:
        """Refuse a field's value.

        Raises:
          UserError: always.
        """
        raise UserError(f"{self.source}: {name} {self.raw.get(name)!r} is not supported; {why}")

    def check_all_read(self) -> None:
        """Refuse what is set and was not read.

        Raises:
          UserError: naming the field and its value.
        """
        off: tuple[Any, ...] = (None, False, [], {})
        left = sorted(name for name, value in self.raw.items() if name not in self.used and value not in off)
        if left:
            fields = ", ".join(f"{name} {self.raw[name]!r}" for name in left)
            raise UserError(
                f"{self.source}: nothing is known of {fields} in a {self.raw.get('model_type')} model; remove what "
                "changes nothing, or use a model of another family"
            )


def check_sizes(config: DecoderConfig, source: str) -> DecoderConfig:
    """The choices, after refusing sizes that make no model.

    Raises:
      UserError: a size is not above 0, or heads do not divide.
    """
    a = config.attention
    sizes = {
        "vocabulary": config.vocab_size, "width": config.width, "number of layers": config.layers,
        "number of heads": a.heads, "number of key-value heads": a.kv_heads, "head size": a.head_dim,
        "MLP width": config.mlp.width, "number of positions": config.max_positions,
    }  # fmt: skip
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{source}: a {name} of {size} makes no model; fix its config.json")
    if a.heads % a.kv_heads:
        raise UserError(f"{source}: {a.kv_heads} key-value heads do not divide {a.heads} heads; fix its config.json")
    # As in transformers, an odd share of a head is rounded up.
    if isinstance(config.positions, Rope) and int(a.head_dim * config.positions.share) == a.head_dim and a.head_dim % 2:
        raise UserError(f"{source}: a head of {a.head_dim} numbers has no pairs to turn; use one of an even size")
    return config
