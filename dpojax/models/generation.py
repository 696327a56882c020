"""How a model's completions end: ``generation_config.json``, and every token that stops sampling."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dpojax.errors import UserError
from dpojax.models.safetensors import GENERATION, read_json
from dpojax.paths import AnyPath, path_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_generation_config(directory: AnyPath) -> dict[str, Any]:
    """The ``generation_config.json`` of a directory; empty where there is none.

    Raises:
      UserError: it is no JSON object.
    """
    path = directory / GENERATION
    return read_json(path) if path.exists() else {}


def eos_of(raw: Mapping[str, Any], vocab_size: int, source: str) -> tuple[int, ...]:
    """The ``eos_token_id`` of a ``config.json`` or a ``generation_config.json``: one id, a list, or none.

    Args:
      raw: the parsed file.
      vocab_size: ids are below it.
      source: where it is from, for errors.

    Raises:
      UserError: an id is no integer from 0 to ``vocab_size - 1``.
    """
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size:
            raise UserError(
                f"{source}: eos_token_id {i!r} is no token of the model, which has {vocab_size}; fix it, or set null"
            )
    return tuple(dict.fromkeys(ids))


def model_eos_ids(
    hf_config: Mapping[str, Any], generation_config: Mapping[str, Any], vocab_size: int, source: str | AnyPath = ""
) -> tuple[int, ...]:
    """The tokens that end a completion, by a model's two files.

    Raises:
      UserError: an id is no token of the model.
    """
    where = path_of(source)
    ids = eos_of(generation_config, vocab_size, str(where / GENERATION))
    return tuple(dict.fromkeys([*ids, *eos_of(hf_config, vocab_size, str(where / "config.json"))]))


def eos_notes(
    hf_config: Mapping[str, Any], generation_config: Mapping[str, Any], vocab_size: int, source: str | AnyPath
) -> list[str]:
    """A sentence, where :func:`model_eos_ids` would refuse: only sampling needs these tokens.

    Tiny models of transformers have the EOS of their class, which may be beyond their vocabulary.
    """
    try:
        model_eos_ids(hf_config, generation_config, vocab_size, source)
    except UserError as error:
        return [f"{error}, before texts are sampled"]
    return []


def with_tokenizer_eos(ids: tuple[int, ...], tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> tuple[int, ...]:
    """The ids, and the tokenizer's EOS if it has one.

    Raises:
      UserError: the model has no such token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        return ids
    if not 0 <= eos < vocab_size:
        raise UserError(
            f"{tokenizer.name_or_path}: its EOS has id {eos}, but the model has {vocab_size} embeddings; name the "
            "model's own tokenizer with --tokenizer"
        )
    return tuple(dict.fromkeys([*ids, eos]))
