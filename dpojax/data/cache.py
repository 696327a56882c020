"""Tokens kept beside their data file, so that a later run need not render and tokenize it again.

All of a file's tokens and annotations are kept, whatever an objective reads of them: they are cut to a length, and its
bad rows are refused or left out, after they are read back.
"""

import dataclasses
import datetime
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpojax.cachedir import cache_dir, mention_earlier, write_arrays
from dpojax.data.encode import Encoder, RenderedRow, TokenizedRow, render_rows, tokenize_rows
from dpojax.data.read import IN_MEMORY, BadRow, Source, rows_in_memory, rows_of
from dpojax.data.rows import OPTIONAL, Form, Notes, RowAnnotations, RowKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 3  # of the cache's files; raise it, and with it the names below, when their layout changes
PREFIX, EARLIER = "tokens3-", "tokens-*.npz"


@dataclasses.dataclass(frozen=True)
class FileTokens:
    """All rows of a data file, in tokens or with the reason why not."""

    usable: list[TokenizedRow]
    not_rendered: list[BadRow]  # unusable fields, or refused by the chat template
    not_encoded: list[BadRow]  # found unusable only as tokens


def _tokenizer_content(tokenizer: "PreTrainedTokenizerBase") -> str:
    """All that a tokenizer does, in letters: the fast ones' own account of it, or the files it would be saved as."""
    if getattr(tokenizer, "is_fast", False):
        return tokenizer.backend_tokenizer.to_str()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
        return " ".join(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files)


def _hash(**facts: Any) -> str:
    # A special token may be an AddedToken, whose str is its content.
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """A hash of everything but the data that shapes tokens, this package's own code included.

    Returns:
      The hash; None if the tokenizer cannot be written down, in which case no tokens of it are kept.
    """
    import tokenizers
    import transformers

    try:
        template = json.dumps(tokenizer.chat_template)  # some have several, by name
        return _hash(
            format=FORMAT,
            transformers=transformers.__version__,
            tokenizers=tokenizers.__version__,
            tokenizer=type(tokenizer).__qualname__,
            content=_tokenizer_content(tokenizer),
            chat_template=template,
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
            special_tokens=tokenizer.special_tokens_map,
            split_special_tokens=getattr(tokenizer, "split_special_tokens", False),
            # Some templates write the date.
            date=str(datetime.date.today()) if "strftime_now" in template else None,
            # Whoever changes how rows are read or rendered must not meet what the old code made of them.
            code=[path.read_text() for path in sorted(Path(__file__).parent.rglob("*.py"))],
        )
    except Exception:  # a tokenizer may be anybody's code
        return None


def token_path(source: Source, form: Form, identity: str | None) -> Path | None:
    """Where a source's tokens are kept: the name is a hash of its content and of all else that shapes them.

    Args:
      source: where the rows are.
      form: of the rows.
      identity: the tokenizer's, from :func:`tokenizer_identity`.

    Returns:
      The path; None where nothing can be kept, or the source cannot be identified.
    """
    content = None if identity is None else source.identity()
    directory = None if content is None or source.beside is None else cache_dir(source.beside)
    if directory is None:
        return None
    mention_earlier(directory, EARLIER)
    key = _hash(content=content, form=form, tokenizer=identity)
    return directory / f"{PREFIX}{key[:32]}.npz"


def write_tokens(path: Path, kept: FileTokens) -> None:
    """Keep a file's tokens; a disk that does not take them is no error, as they can be made again."""
    parts = [part for row in kept.usable for part in row.parts]
    most = max((len(row.parts) for row in kept.usable), default=0)
    lengths = [[len(part) for part in row.parts] + [0] * (most - len(row.parts)) for row in kept.usable]
    missing = [[row.notes.missing.get(name) for name in OPTIONAL] for row in kept.usable]
    reasons = list(dict.fromkeys(why for row in missing for why in row if why is not None))
    at = {None: -1} | {why: i for i, why in enumerate(reasons)}
    notes = {
        "annotations": [row.notes.annotations.present() for row in kept.usable],
        "reasons": reasons,
        "not_rendered": [[row.number, row.why] for row in kept.not_rendered],
        "not_encoded": [[row.number, row.why] for row in kept.not_encoded],
    }
    write_arrays(
        path,
        flat=np.concatenate(parts) if parts else np.zeros(0, np.int32),
        lengths=np.array(lengths, np.int32),  # a row of fewer completions than others has some of no length
        numbers=np.array([row.number for row in kept.usable], np.int64),
        missing=np.array([[at[why] for why in row] for row in missing], np.int32),
        notes=json.dumps(notes),
    )


def read_tokens(path: Path, file: str) -> FileTokens | None:
    """What :func:`write_tokens` kept of the data file; None where there is nothing, or it is damaged."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as stored, np.load(stored, allow_pickle=False) as arrays:
            flat, lengths, numbers = arrays["flat"], arrays["lengths"], arrays["numbers"].tolist()
            missing, notes = arrays["missing"].tolist(), json.loads(str(arrays["notes"]))
        if lengths.sum() != len(flat):
            return None
        ends = np.cumsum(lengths.reshape(-1)).tolist()
        parts = iter([flat[start:end] for start, end in zip([0, *ends], ends, strict=False)])
        padded = zip(*[parts] * lengths.shape[1], strict=True) if numbers else ()
        usable = []
        for number, row, present, gaps in zip(numbers, padded, notes["annotations"], missing, strict=True):
            tokens = tuple([part for i, part in enumerate(row) if i == 0 or len(part)])
            values: Any = {name: tuple(x) if isinstance(x, list) else x for name, x in present.items()}
            whys = {name: notes["reasons"][i] for name, i in zip(OPTIONAL, gaps, strict=True) if i >= 0}
            usable.append(TokenizedRow(number, tokens, Notes(RowAnnotations(**values), whys)))
        bad = {name: [BadRow(file, *place) for place in notes[name]] for name in ("not_rendered", "not_encoded")}
        return FileTokens(usable, **bad)
    except Exception:  # damage shows in as many ways as there are parsers on the way
        return None


def refused(rows: Iterable[RenderedRow | TokenizedRow], kind: RowKind, file: str) -> list[BadRow]:
    """The rows that lack an annotation which a run of this kind reads."""
    bad = []
    for row in rows:
        try:
            row.notes.of_kind(kind)
        except ValueError as error:
            bad.append(BadRow(file, row.number, str(error)))
    return bad


@dataclasses.dataclass
class SourceTokens:
    """A source, or rows in memory, on the way to tokens: cached, or rendered and then tokenized.

    Attributes:
      name: of the source.
      path: where its tokens are kept; None where they are not.
      cached: the tokens were there.
      rendered: the rows that wait to be tokenized.
      not_rendered: those that cannot be.
      tokens: all rows; None until they are tokenized.
    """

    name: str
    path: Path | None
    cached: bool
    rendered: list[RenderedRow]
    not_rendered: list[BadRow]
    tokens: FileTokens | None

    @classmethod
    def open(cls, source: Source, form: Form, encoder: Encoder, identity: str | None) -> "SourceTokens":
        """A source's rows, from the cache or rendered."""
        path = token_path(source, form, identity)
        tokens = read_tokens(path, source.name) if path else None
        if tokens:
            return cls(source.name, path, True, [], tokens.not_rendered, tokens)
        rendered, bad = render_rows(rows_of(source), form, encoder)
        if path != token_path(source, form, identity):
            path = None  # the file was written to while it was read
        return cls(source.name, path, False, rendered, bad, None)

    @classmethod
    def in_memory(cls, rows: Sequence[Any], form: Form, encoder: Encoder) -> "SourceTokens":
        """The rows of a list of dicts, rendered."""
        return cls(IN_MEMORY, None, False, *render_rows(rows_in_memory(rows), form, encoder), None)

    def __len__(self) -> int:
        """Rows, usable or not."""
        bad = len(self.not_rendered) + (len(self.tokens.not_encoded) if self.tokens else 0)
        return bad + len(self.tokens.usable if self.tokens else self.rendered)

    def bad_rows(self, kind: RowKind) -> list[BadRow]:
        """Rows whose fields are unusable for a run of this kind, in order."""
        lacking = refused(self.tokens.usable if self.tokens else self.rendered, kind, self.name)
        return sorted([*self.not_rendered, *lacking], key=lambda row: row.number)

    def tokenize(self, encoder: Encoder, progress: Callable[[float], None]) -> FileTokens:
        """All rows in tokens: from the cache, or made and then kept there."""
        if self.tokens is None:
            usable, not_encoded = tokenize_rows(self.rendered, encoder, self.name, progress)
            self.tokens = FileTokens(usable, self.not_rendered, not_encoded)
            self.rendered = []  # the texts are needed no more
            if self.path:
                write_tokens(self.path, self.tokens)
        return self.tokens
