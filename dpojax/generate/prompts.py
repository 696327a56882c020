"""Prompts of the command line, in tokens that a model has."""

from dpojax.configs import SampleConfig
from dpojax.data import Encoder
from dpojax.errors import UserError
from dpojax.models import DecoderConfig, Learned
from dpojax.progress import console


def encode_prompt(encoder: Encoder, text: str, chat: bool) -> list[int]:
    """A prompt in tokens, as a row of data would have it."""
    try:
        return encoder.encode_prompt([{"role": "user", "content": text}] if chat else text)
    except ValueError as error:
        raise UserError(f"--prompt {text!r}: {error}") from None


def check_prompts(config: SampleConfig, model: DecoderConfig, prompts: list[list[int]]) -> None:
    """Refuse tokens that the model has no embedding for, and completions beyond its last learned position; JAX would
    read its last one without an error.

    Raises:
      UserError: naming the flag and the model's number.
    """
    top, size = max(map(max, prompts)), model.vocab_size
    if top >= size:
        raise UserError(f"--prompt: the tokenizer gives id {top}, the model has {size} embeddings; see --tokenizer")
    if (last := max(config.stop_token_ids, default=0)) >= size:
        raise UserError(f"--stop-token-ids {last}: the model has {size} tokens, which count from 0; name one of them")
    longest = max(map(len, prompts)) + config.max_new_tokens
    if longest > model.max_positions and isinstance(model.positions, Learned):
        most = f"the model has {model.max_positions} positions for a prompt of {max(map(len, prompts))} tokens"
        raise UserError(f"--max-new-tokens {config.max_new_tokens}: {most} and its completion; give fewer")
    if longest > model.max_positions:
        console.print(f"texts of up to {longest} tokens exceed the {model.max_positions} that the model was made for")
