"""Tokens kept beside their data file, so that a later run need not render and tokenize it again.

What is kept is whole: it is cut to a length, and its bad rows refused or left out, after it is read back.
"""

import dataclasses
import datetime
import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpojax.cachedir import cache_dir, write_arrays
from dpojax.data.rows import BadRow, Values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2  # of the cache's files; raise it when their layout changes


@dataclasses.dataclass(frozen=True)
class FileTokens:
    """All rows of a data file, in tokens or with the reason why not."""

    rows: int
    not_rendered: list[BadRow]  # unusable fields, or refused by the chat template
    not_encoded: list[BadRow]  # found unusable only as tokens
    numbers: list[int]  # of the usable rows, from 1
    values: list[Values]  # of the usable rows
    tokens: list[tuple[np.ndarray, ...]]  # of the usable rows: prompt and completions, uncut


def _tokenizer_content(tokenizer: "PreTrainedTokenizerBase") -> str:
    """All that a tokenizer does, in letters: the fast ones' own account of it, or the files it would be saved as."""
    if getattr(tokenizer, "is_fast", False):
        return tokenizer.backend_tokenizer.to_str()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
        return " ".join(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files)


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """A hash of everything but the data that shapes tokens, this package's own code included.

    Returns:
      The hash; None if the tokenizer cannot be written down, in which case nothing of its is to be kept.
    """
    import tokenizers
    import transformers

    try:
        template = tokenizer.chat_template
        facts = [
            *(FORMAT, transformers.__version__, tokenizers.__version__, type(tokenizer).__qualname__),
            *(template, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.special_tokens_map),
            getattr(tokenizer, "split_special_tokens", False),
            _tokenizer_content(tokenizer),
            # Some templates write the date.
            str(datetime.date.today()) if "strftime_now" in str(template) else "",
            # Whoever changes how rows are read or rendered must not meet what the old code made of them.
            *(Path(__file__).with_name(name).read_text() for name in ("rows.py", "tokens.py")),
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    except Exception:  # a tokenizer may be anybody's code
        return None


def token_path(file: str, kind: str, identity: str | None) -> Path | None:
    """Where a data file's tokens are kept: the name is a hash of its bytes and of all else that shapes them.

    Args:
      file: the JSONL or Parquet file.
      kind: as for :func:`~dpojax.data.rows.usable_part`.
      identity: the tokenizer's, from :func:`tokenizer_identity`.

    Returns:
      The path; None where nothing can be kept, or the file cannot be read.
    """
    path = Path(file).expanduser()
    if identity is None or not path.is_file():
        return None
    try:
        with path.open("rb") as data:
            content = hashlib.file_digest(data, "sha256").hexdigest()
    except OSError:
        return None
    directory = cache_dir(file)
    # The suffix says how the bytes are read.
    key = hashlib.sha256(f"{content} {path.suffix} {kind} {identity}".encode()).hexdigest()[:32]
    return directory / f"tokens-{key}.npz" if directory else None


def write_tokens(path: Path, kept: FileTokens) -> None:
    """Keep a file's tokens; a disk that does not take them is no error, as they can be made again."""
    parts = [part for row in kept.tokens for part in row]
    most = max((len(row) for row in kept.tokens), default=0)
    arrays = {
        "flat": np.concatenate(parts) if parts else np.zeros(0, np.int32),
        # A row of fewer completions than others has some of no length.
        "lengths": np.array([[len(part) for part in row] + [0] * (most - len(row)) for row in kept.tokens], np.int32),
        "numbers": np.array(kept.numbers, np.int64),
        "values": json.dumps([dataclasses.astuple(values) for values in kept.values]),
        "rows": np.int64(kept.rows),
    }
    bad = [[[row.number, row.why] for row in rows] for rows in (kept.not_rendered, kept.not_encoded)]
    write_arrays(path, bad=json.dumps(bad), **arrays)


def read_tokens(path: Path, file: str) -> FileTokens | None:
    """What :func:`write_tokens` kept of the data file; None where there is nothing, or it is damaged."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as stored, np.load(stored, allow_pickle=False) as arrays:
            flat, lengths, numbers = arrays["flat"], arrays["lengths"], arrays["numbers"].tolist()
            rows, bad = int(arrays["rows"]), json.loads(str(arrays["bad"]))
            values = [Values(tuple(r), tuple(s), *v) for r, s, *v in json.loads(str(arrays["values"]))]
        if lengths.sum() != len(flat) or not len(lengths) == len(numbers) == len(values):
            return None
        not_rendered, not_encoded = ([BadRow(file, number, why) for number, why in half] for half in bad)
        ends = np.cumsum(lengths.reshape(-1)).tolist()
        parts = iter([flat[start:end] for start, end in zip([0, *ends], ends, strict=False)])
        padded = zip(*[parts] * lengths.shape[1], strict=True) if numbers else ()
        tokens = [tuple([part for i, part in enumerate(row) if i == 0 or len(part)]) for row in padded]
        return FileTokens(rows, not_rendered, not_encoded, numbers, values, tokens)
    except Exception:  # damage shows in as many ways as there are parsers on the way
        return None
