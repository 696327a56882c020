"""Tokens kept beside their data file, so that a later run need not read, render and tokenize it again.

All of a file's tokens and annotations are kept, whatever an objective reads of them: they are cut to a length, and its
bad rows are refused or left out, after they are read back.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpojax import processes
from dpojax.cachedir import cache_dir, mention_earlier
from dpojax.data.encode import Encoder
from dpojax.data.prepare import Reading, Rows, tokenize_source
from dpojax.data.read import IN_MEMORY, Source, rows_in_memory, runs
from dpojax.data.store import FileTokens, read_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 4  # of the cache's directories; raise it, and with it the names below, when their layout changes
PREFIX, EARLIER = "tokens4-", ("tokens-*.npz", "tokens3-*.npz")


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


def encoder_identity(encoder: Encoder) -> str | None:
    """A hash of everything but the data that shapes tokens, this package's own code included.

    Returns:
      The hash; None if the tokenizer cannot be written down, in which case no tokens of it are kept.
    """
    import tokenizers
    import transformers

    tokenizer, options = encoder.tokenizer, dataclasses.asdict(encoder.options)
    del options["chat_date"]  # the template's day
    try:
        return _hash(
            format=FORMAT,
            transformers=transformers.__version__,
            tokenizers=tokenizers.__version__,
            tokenizer=type(tokenizer).__qualname__,
            content=_tokenizer_content(tokenizer),
            chat_template=encoder.template.source,
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
            special_tokens=tokenizer.special_tokens_map,
            split_special_tokens=getattr(tokenizer, "split_special_tokens", False),
            date=str(encoder.template.today) if encoder.template.dated else None,
            options=options,
            # Whoever changes how rows are read or rendered must not meet what the old code made of them.
            code=[path.read_text() for path in sorted(Path(__file__).parent.rglob("*.py"))],
        )
    except Exception:  # a tokenizer may be anybody's code
        return None


def token_path(source: Source, reading: Reading, identity: str | None) -> Path | None:
    """Where a source's tokens are kept: the name is a hash of its content and of all else that shapes them.

    Args:
      source: where the rows are.
      reading: how records become rows.
      identity: the tokenizer's, from :func:`encoder_identity`.

    Returns:
      The path; None where nothing can be kept, or the source cannot be identified.
    """
    content = None if identity is None else source.identity()
    directory = None if content is None or source.beside is None else cache_dir(source.beside)
    if directory is None:
        return None
    mention_earlier(directory, *EARLIER)
    key = _hash(content=content, reading=reading.identity(), tokenizer=identity)
    return directory / f"{PREFIX}{key[:32]}"


@dataclasses.dataclass(frozen=True)
class SourceTokens:
    """A source, or rows in memory, in tokens.

    Attributes:
      name: of the source.
      tokens: of all its rows.
      cached: the tokens were there.
      beside: the file beside which caches are kept; None where they are kept nowhere.
    """

    name: str
    tokens: FileTokens
    cached: bool = False
    beside: str | None = None


def source_tokens(
    source: Source,
    reading: Reading,
    encoder: Encoder,
    identity: str | None,
    *,
    workers: int = 1,
    progress: Callable[[int], None] = lambda rows: None,
) -> SourceTokens:
    """A source's rows in tokens: from the cache, or made and then kept there.

    Args:
      source: where the rows are.
      reading: how records become rows.
      encoder: the tokenizer's.
      identity: the tokenizer's, from :func:`encoder_identity`.
      workers: processes that share the work.
      progress: called with the number of rows that have been done.

    Raises:
      UserError: the source cannot be read.
    """
    path = token_path(source, reading, identity)
    path = path if processes.all_of(path is not None) else None
    kept = read_whole(path, source.name) if path else None
    if processes.all_of(kept is not None):
        assert kept is not None
        return SourceTokens(source.name, kept, cached=True, beside=source.beside)
    still = lambda: path == token_path(source, reading, identity)  # noqa: E731
    tokens = tokenize_source(source, reading, encoder, path=path, still=still, workers=workers, progress=progress)
    return SourceTokens(source.name, tokens, beside=source.beside)


@dataclasses.dataclass(frozen=True)
class _InMemory:
    """Rows in memory as a source."""

    held: Sequence[Any]
    name: str = IN_MEMORY
    beside: str | None = None

    def identity(self) -> str | None:
        """None: nothing is kept of them."""
        return None

    def estimated_rows(self) -> int:
        """How many there are."""
        return len(self.held)

    def blocks(self, rows: int) -> Iterator[Rows]:
        """Runs of them."""
        return map(Rows, runs(rows_in_memory(self.held), rows))


def memory_tokens(rows: Sequence[Any], reading: Reading, encoder: Encoder) -> SourceTokens:
    """The rows of a list of dicts in tokens.

    Raises:
      UserError: the list is empty.
    """
    return SourceTokens(IN_MEMORY, tokenize_source(_InMemory(rows), reading, encoder))
