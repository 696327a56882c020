"""Dialogues -> tokens: chat template, separate tokenization of prompt and completions, BOS, EOS, truncation."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dpojax.data.published import rows_of_records
from dpojax.data.read import BadRow, Row
from dpojax.data.rows import Dialogue, Form, Message, Notes, RowAnnotations, Text, TokenIds, parse_row
from dpojax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 1024  # a fast tokenizer spreads a list of texts over the cores
MARK = "\ue000"  # private use: stands at the end of a reply, to find it in what a chat template makes of it


@dataclasses.dataclass(frozen=True)
class Example:
    """A row in tokens: its prompt, its completions, the best first, and its annotations."""

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    annotations: RowAnnotations = RowAnnotations()  # noqa: RUF009  # frozen


def fingerprint(examples: Iterable[Example], *, annotations: bool = False) -> bytes:
    """A hash of every token, of where each prompt and completion ends and, if asked, of the annotations."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        if annotations and (present := example.annotations.present()):
            digest.update(json.dumps(present, sort_keys=True).encode())
        for tokens in (example.prompt, *example.completions):
            digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    return digest.digest()


class Encoder:
    """Text and chats to tokens, with one tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no EOS token; set eos_token in its config")
        self.eos: int = tokenizer.eos_token_id
        bare, full = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.bos: list[int] = bos if full[:1] == bos != bare[:1] else []

    def _chat(self, messages: list[Message], generate: bool) -> str:
        if self.tokenizer.chat_template is None:
            raise ValueError("the row is a chat but the tokenizer has no chat template; give text, or set a template")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # whatever the template itself raises
            raise ValueError(f"the chat template refuses the messages ({error})") from None

    def _reply(self, start: str, prompt: list[Message], reply: list[Message], truncated: bool) -> str:
        """What the chat template writes after the prompt's ``start``; of a truncated reply, up to its text's end."""
        if truncated:
            reply = [*reply[:-1], {**reply[-1], "content": reply[-1]["content"] + MARK}]
        whole = self._chat([*prompt, *reply], generate=False)
        if not whole.startswith(start):
            raise ValueError("the chat template does not render the reply as a continuation of the prompt")
        if truncated and MARK not in whole:
            raise ValueError("the chat template hides where the truncated reply ends; give it as token ids")
        return whole[len(start) : whole.rindex(MARK) if truncated else None]

    def render(self, dialogue: Dialogue) -> list[str | TokenIds]:
        """Prompt and completions as text, or as the token ids that they are already.

        A chat's template is applied once, to prompt and completion together.

        Raises:
          ValueError: the template does not render a completion as a continuation of its prompt.
        """
        prompt, completions = dialogue.prompt, dialogue.completions
        truncated = dialogue.truncated or (False,) * len(completions)
        start = self._chat(prompt, generate=True) if isinstance(prompt, list) else prompt

        def rendered(completion: Text, cut: bool) -> str | TokenIds:
            if not isinstance(completion, list):
                return completion
            assert isinstance(prompt, list) and isinstance(start, str)
            return self._reply(start, prompt, completion, cut)

        return [start, *map(rendered, completions, truncated)]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of every text, without BOS and EOS."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def finish_prompt(self, ids: list[int]) -> list[int]:
        """The prompt with one BOS where the tokenizer adds one; an empty prompt becomes the BOS alone.

        Raises:
          ValueError: the prompt is empty and there is no BOS to predict the first token from.
        """
        if self.bos and ids[:1] != self.bos:
            ids = self.bos + ids
        if not ids and self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id]
        if not ids:
            raise ValueError("the prompt is empty and the tokenizer has no BOS token; give the prompt some text")
        return ids

    def encode_prompt(self, prompt: Text) -> list[int]:
        """A prompt in tokens, as a row of data would have it.

        Raises:
          ValueError: it is empty, or the chat template refuses it.
        """
        (rendered,) = self.render(Dialogue(prompt, ()))
        return self.finish_prompt(self.tokenize([rendered])[0]) if isinstance(rendered, str) else list(rendered)

    def finish_completion(self, ids: list[int], truncated: bool = False) -> list[int]:
        """The completion with one EOS at its end: added where it is missing; a truncated one stays as it is.

        White space that a chat template puts behind the EOS is cut.

        Raises:
          ValueError: a truncated completion has no tokens.
        """
        if truncated:
            if not ids:
                raise ValueError("a truncated completion has no tokens; leave the row out")
            return ids
        if self.eos in ids:
            end = len(ids) - ids[::-1].index(self.eos)
            if not self.tokenizer.decode(ids[end:]).strip():
                return ids[:end]
        return [*ids, self.eos]


def truncate(
    prompt: Sequence[int] | np.ndarray, completions: Sequence[Sequence[int] | np.ndarray], max_length: int
) -> tuple[Example, bool, bool]:
    """Cut to ``max_length`` tokens: the prompt from its start, then the completions from their end, never to nothing.

    Returns:
      The example, whether its prompt was cut, and whether a completion was.
    """
    longest = max(map(len, completions), default=0)
    keep_prompt = min(len(prompt), max(1, max_length - longest))
    keep = max_length - keep_prompt
    example = Example(
        np.asarray(prompt[len(prompt) - keep_prompt :], np.int32),
        tuple([np.asarray(completion[:keep], np.int32) for completion in completions]),
    )
    return example, keep_prompt < len(prompt), longest > keep


@dataclasses.dataclass(frozen=True)
class RenderedRow:
    """A row as text: its prompt and its completions, or their token ids."""

    number: int
    parts: list[str | TokenIds]
    truncated: tuple[bool, ...]
    notes: Notes


@dataclasses.dataclass(frozen=True)
class TokenizedRow:
    """A row in tokens: its prompt and its completions, not cut to a length."""

    number: int
    parts: tuple[np.ndarray, ...]
    notes: Notes


def render_rows(
    rows: Iterable[Row | BadRow], form: Form, encoder: Encoder | None
) -> tuple[list[RenderedRow], list[BadRow]]:
    """The rows as text, and those that are unusable; without an encoder, only the fields are checked."""
    rendered, bad = [], []
    for row in rows_of_records(rows):
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            dialogue, notes = parse_row(row, form)
            parts = encoder.render(dialogue) if encoder else []
            rendered.append(RenderedRow(row.number, parts, dialogue.truncated, notes))
        except ValueError as error:
            bad.append(BadRow(row.file, row.number, str(error)))
    return rendered, bad


def tokenize_rows(
    rendered: Sequence[RenderedRow],
    encoder: Encoder,
    file: str,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[list[TokenizedRow], list[BadRow]]:
    """The rows in tokens, and those that turn out unusable only then; ``progress`` is called with the share done."""
    rows, bad = [], []
    for start in range(0, len(rendered), ROWS_AT_ONCE):
        group = rendered[start : start + ROWS_AT_ONCE]
        ids = iter(encoder.tokenize([part for row in group for part in row.parts if isinstance(part, str)]))
        for row in group:
            # All of a row's tokens are taken off the iterator before any is refused.
            tokens = [next(ids) if isinstance(part, str) else part for part in row.parts]
            try:
                rows.append(TokenizedRow(row.number, tuple(_finished(row, tokens, encoder)), row.notes))
            except ValueError as error:
                bad.append(BadRow(file, row.number, str(error)))
        progress((start + len(group)) / len(rendered))
    return rows, bad


def _finished(row: RenderedRow, tokens: Sequence[list[int] | TokenIds], encoder: Encoder) -> Iterator[np.ndarray]:
    """Tokens made from text with BOS and EOS, and given token ids as they are."""
    prompt, *completions = tokens
    yield np.array(encoder.finish_prompt(prompt) if isinstance(prompt, list) else prompt, np.int32)
    truncated = row.truncated or (False,) * len(completions)
    for completion, cut in zip(completions, truncated, strict=True):
        ids = encoder.finish_completion(completion, cut) if isinstance(completion, list) else completion
        yield np.array(ids, np.int32)
