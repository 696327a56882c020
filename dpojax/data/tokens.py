"""From rows to tokens: chat template, separate tokenization of prompt and completion, EOS, truncation, and a report."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpojax.data.cache import FileTokens, read_tokens, token_path, tokenizer_identity, write_tokens
from dpojax.data.rows import BadRow, Part, Row, Text, Values, read_rows, usable_part
from dpojax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZE_AT_ONCE = 1024  # rows; a fast tokenizer spreads a list of texts over the cores


@dataclasses.dataclass(frozen=True)
class Example:
    """A row in tokens: its prompt and its completions, EOS included, the best first."""

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    values: Values = Values()  # noqa: RUF009  # frozen


def fingerprint(examples: Iterable[Example], *, values: bool = False) -> bytes:
    """A hash of every token, of where each prompt and completion ends and, if asked, of the rows' values."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        if values and example.values != Values():
            digest.update(repr(example.values).encode())
        for tokens in (example.prompt, *example.completions):
            digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    return digest.digest()


@dataclasses.dataclass
class Report:
    """What became of the rows; of rows that were cut, `load_examples` gives the places without the fields."""

    rows: int = 0
    cached: int = 0  # rows whose tokens an earlier run had kept
    dropped: list[BadRow] = dataclasses.field(default_factory=list)
    prompts_cut: list[Row] = dataclasses.field(default_factory=list)
    completions_cut: list[Row] = dataclasses.field(default_factory=list)

    def sentence(self) -> str:
        kept = self.rows - len(self.dropped)
        cut = f"{len(self.prompts_cut)} prompts and {len(self.completions_cut)} completions cut to fit"
        cached = f" (tokens of {self.cached} rows from the cache)" if self.cached else ""
        if self.cached == self.rows > 0:
            cached = " (tokens from the cache)"
        return f"{self.rows} rows: {kept} kept, {len(self.dropped)} dropped, {cut}{cached}"


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

    def _chat(self, messages: Text, generate: bool) -> str:
        if self.tokenizer.chat_template is None:
            raise ValueError("the row is a chat but the tokenizer has no chat template; give text, or set a template")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # whatever the template itself raises
            raise ValueError(f"the chat template refuses the messages ({error})") from None

    def render(self, part: Part) -> list[str]:
        """Prompt and completions as text; a chat's template is applied once, to prompt and completion together.

        Raises:
          ValueError: the template does not render a completion as a continuation of its prompt.
        """
        prompt, completions = part
        if isinstance(prompt, str):
            return [prompt, *completions]  # type: ignore[list-item]
        start = self._chat(prompt, generate=True)
        texts = [start]
        for completion in completions:
            whole = self._chat([*prompt, *completion], generate=False)
            if not whole.startswith(start):
                raise ValueError("the chat template does not render the reply as a continuation of the prompt")
            texts.append(whole[len(start) :])
        return texts

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def finish_prompt(self, ids: list[int]) -> list[int]:
        """One BOS where the tokenizer adds one; an empty prompt becomes the BOS alone.

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

    def finish_completion(self, ids: list[int]) -> list[int]:
        """One EOS at the end: added where it is missing; white space that a chat template puts behind it is cut."""
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
    longest = max(map(len, completions))
    keep_prompt = min(len(prompt), max(1, max_length - longest))
    keep = max_length - keep_prompt
    example = Example(
        np.asarray(prompt[len(prompt) - keep_prompt :], np.int32),
        tuple([np.asarray(completion[:keep], np.int32) for completion in completions]),
    )
    return example, keep_prompt < len(prompt), longest > keep


def render_rows(
    rows: Iterable[Row | BadRow], kind: str, encoder: Encoder | None, report: Report
) -> list[tuple[Row, list[str]]]:
    """The usable rows with their prompt and completions as text; the others go into the report."""
    usable = []
    for row in rows:
        report.rows += 1
        if isinstance(row, BadRow):
            report.dropped.append(row)
            continue
        try:
            part, values = usable_part(row, kind)
            texts = encoder.render(part) if encoder else []
            usable.append((dataclasses.replace(row, values=values), texts))
        except ValueError as error:
            report.dropped.append(BadRow(row.file, row.number, str(error)))
    return usable


def tokenize_rows(
    usable: Sequence[tuple[Row, list[str]]],
    encoder: Encoder,
    report: Report,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[list[Row], list[tuple[np.ndarray, ...]]]:
    """Rendered rows in tokens, uncut; what cannot be used goes into the report.

    Returns:
      The rows that can be used, and the tokens of their prompts and completions.
    """
    rows, tokens = [], []
    for start in range(0, len(usable), TOKENIZE_AT_ONCE):
        group = usable[start : start + TOKENIZE_AT_ONCE]
        ids = iter(encoder.tokenize([text for _, texts in group for text in texts]))
        for row, texts in group:
            prompt, *completions = [next(ids) for _ in texts]
            try:
                prompt = encoder.finish_prompt(prompt)
            except ValueError as error:
                report.dropped.append(BadRow(row.file, row.number, str(error)))
                continue
            completions = [encoder.finish_completion(completion) for completion in completions]
            rows.append(row)
            tokens.append(tuple([np.array(part, np.int32) for part in (prompt, *completions)]))
        progress((start + len(group)) / len(usable))
    return rows, tokens


def truncate_rows(
    rows: Iterable[Row], tokens: Iterable[tuple[np.ndarray, ...]], max_length: int, report: Report
) -> list[Example]:
    """Rows in tokens, cut to ``max_length``; what is cut goes into the report."""
    examples = []
    for row, (prompt, *completions) in zip(rows, tokens, strict=True):
        example, prompt_cut, completion_cut = truncate(prompt, completions, max_length)
        examples.append(dataclasses.replace(example, values=row.values))
        if prompt_cut:
            report.prompts_cut.append(row)
        if completion_cut:
            report.completions_cut.append(row)
    return examples


def encode_rows(
    usable: Sequence[tuple[Row, list[str]]], encoder: Encoder, max_length: int, report: Report
) -> list[Example]:
    """Rendered rows in tokens, cut to ``max_length``; what is cut and what cannot be used go into the report."""
    return truncate_rows(*tokenize_rows(usable, encoder, report), max_length, report)


@dataclasses.dataclass
class _File:
    """A data file on its way to tokens: they were in the cache, or its rows are rendered and wait to be tokenized."""

    name: str
    kept_at: Path | None  # None: no cache
    kept: FileTokens | None
    usable: list[tuple[Row, list[str]]]
    report: Report

    @classmethod
    def open(cls, name: str, kind: str, encoder: Encoder, identity: str | None) -> "_File":
        kept_at = token_path(name, kind, identity)
        kept = read_tokens(kept_at, name) if kept_at else None
        if kept:
            report = Report(rows=kept.rows, cached=kept.rows, dropped=kept.not_rendered)
            return cls(name, kept_at, kept, [], report)
        report = Report()
        usable = render_rows(read_rows([name]), kind, encoder, report)
        if kept_at != token_path(name, kind, identity):
            kept_at = None  # the file was written to while it was read
        return cls(name, kept_at, None, usable, report)

    def tokens(self, encoder: Encoder, progress: Callable[[float], None]) -> FileTokens:
        """From the cache, or made, and then kept there."""
        if self.kept:
            return self.kept
        later = Report()
        rows, tokens = tokenize_rows(self.usable, encoder, later, progress)
        numbers, values = [row.number for row in rows], [row.values for row in rows]
        self.kept = FileTokens(self.report.rows, self.report.dropped, later.dropped, numbers, values, tokens)
        if self.kept_at:
            write_tokens(self.kept_at, self.kept)
        self.usable = []  # the texts are needed no more
        return self.kept


def load_examples(
    files: Sequence[str],
    encoder: Encoder,
    *,
    kind: str = "pairs",
    max_length: int = 1024,
    skip_bad_rows: bool | None = False,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[list[Example], Report]:
    """Read, check, render, tokenize and truncate all rows of all files, in order.

    Tokens are kept beside each file, and a later call with an equal file and tokenizer reads them back.

    Args:
      files: JSONL or Parquet files.
      encoder: the tokenizer's.
      kind: as for :func:`~dpojax.data.rows.usable_part`.
      max_length: tokens of prompt + completion.
      skip_bad_rows: leave out unusable rows, which the report lists; None where the command has no such option.
      progress: called with the share that is done, from 0 to 1.

    Raises:
      UserError: a file is missing or empty; a row is unusable and ``skip_bad_rows`` is off; no row is left.
    """
    report = Report()

    def refuse_bad_rows() -> None:
        if report.dropped and not skip_bad_rows:
            others = len(report.dropped) - 1
            more = f" ({others} more bad row{'s' * (others > 1)})" if others else ""
            choice = "" if skip_bad_rows is None else ", or pass --skip-bad-rows"
            raise UserError(f"{report.dropped[0]}{more}; mend it{choice}")

    def reach(i: int, share: float) -> None:
        progress((sum(waiting[:i]) + share * waiting[i]) / sum(waiting))

    identity = tokenizer_identity(encoder.tokenizer)
    opened = []
    for name in files:
        opened.append(_File.open(name, kind, encoder, identity))
        report.rows += opened[-1].report.rows
        report.cached += opened[-1].report.cached
        report.dropped += opened[-1].report.dropped
    refuse_bad_rows()
    waiting = [len(file.usable) for file in opened]
    in_tokens = []
    for i, file in enumerate(opened):
        in_tokens.append(file.tokens(encoder, partial(reach, i)))
        report.dropped += in_tokens[-1].not_encoded
    progress(1.0)
    refuse_bad_rows()
    examples = []
    for name, kept in zip(files, in_tokens, strict=True):
        places = (Row(name, number, {}, v) for number, v in zip(kept.numbers, kept.values, strict=True))
        examples += truncate_rows(places, kept.tokens, max_length, report)
    if not examples:
        raise UserError(f"{', '.join(files)}: no row is usable (the first: {report.dropped[0].why}); see check-data")
    return examples, report


def with_mismatched(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Labelled examples, each with the completion of another prompt behind its own.

    It is the completion of the last example before it, counted round the end, whose prompt is another, as in TRL; it
    is cut to ``max_length`` behind this example's prompt. KTO estimates its KL divergence from these.

    Raises:
      UserError: all prompts are equal.
    """
    prompts = [example.prompt.tobytes() for example in examples]
    if len(set(prompts)) == 1:
        raise UserError("the objective compares completions of different prompts, and the data has one; see --loss bco")
    out, other = [], next(i for i in range(len(examples) - 1, -1, -1) if prompts[i] != prompts[0])
    for i, example in enumerate(examples):
        if i and prompts[i - 1] != prompts[i]:
            other = i - 1
        room = max(1, max_length - len(example.prompt))
        mismatched = examples[other].completions[0][:room]
        out.append(dataclasses.replace(example, completions=(example.completions[0], mismatched)))
    return out
