"""Tokens as text for a terminal: a piece a token, and what does not print is spelled out."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from dpojax.data.tokenize import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WIDTH = 100  # of a line of tokens, unless one token is longer
BOUNDARY = "│"
LEGEND = (
    f"{BOUNDARY} stands between tokens, «» around a special token; ⏎ is a line break, ‹U+200B› a character that does "
    "not print, ‹E6› a byte, ‹3:漢› a character of 3 tokens"
)
MOST_BYTES = 4  # of a character in UTF-8
FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A byte, as SentencePiece's tokenizers spell it."""


def _byte_letters() -> dict[str, int]:
    """The bytes by the letters with which byte-level tokenizers spell them: those that print stand for themselves, the
    others are counted from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    spelled = {chr(0x100 + i): byte for i, byte in enumerate(others)}
    # ByT5 spells every byte by the letter of its number.
    return {chr(byte): byte for byte in range(0x100)} | spelled


BYTES = _byte_letters()


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is shown between two boundaries: a token, or those that are one character together."""

    text: str
    special: bool = False


def visible(text: str) -> str:
    """The text on one line, without what a terminal would not show or would obey."""

    def shown(c: str) -> str:
        if c == "\n":
            return "⏎"
        if c.isprintable():
            return c
        code = ord(c)
        return f"‹{code - 0xDC00:02X}›" if 0xDC80 <= code <= 0xDCFF else f"‹U+{code:04X}›"  # of surrogateescape

    return "".join(map(shown, text))


class TokenTexts:
    """What tokens stand for in a text, each by itself."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self.special = {i: spelling for spelling, i in special_tokens(tokenizer).items()}
        self.said = functools.cache(self._said)

    def _said(self, token: int) -> bytes:
        """A token's bytes; its number where the tokenizer does not know it."""
        try:
            spelling = self.tokenizer.convert_ids_to_tokens(token)
            once, twice = (self._decoded([token] * n) for n in (1, 2))
        except Exception:  # anybody's code, and a number that is no token's
            spelling = None
        if not isinstance(spelling, str):
            return f"<token {token}>".encode()
        # Decoders take the space off a beginning; behind another token it is there.
        text = twice.removeprefix(once) if twice.startswith(once) else once
        if text and "\ufffd" not in text:
            return text.encode(errors="surrogatepass")
        if fallback := FALLBACK.fullmatch(spelling):
            return bytes.fromhex(fallback[1])
        known = all(letter in BYTES for letter in spelling)
        return bytes(BYTES[letter] for letter in spelling) if known else spelling.encode(errors="surrogatepass")

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """The tokens as pieces; those that are one character only together are one piece."""
        out, held = list[Piece](), list[bytes]()

        def flush() -> None:
            out.extend([Piece(visible(part.decode(errors="surrogateescape"))) for part in held])
            held.clear()

        for token in ids:
            if token in self.special:
                flush()
                out.append(Piece(f"«{visible(self.special[token])}»", special=True))
                continue
            held.append(self.said(token))
            try:
                text = visible(b"".join(held).decode())
            except UnicodeDecodeError as error:
                if error.reason != "unexpected end of data" or len(held) == MOST_BYTES:
                    flush()
                continue
            out.append(Piece(text if len(held) == 1 else f"‹{len(held)}:{text}›"))
            held.clear()
        flush()
        return out


def lines_of(pieces: Sequence[Piece | str], indent: int, style: str) -> Iterator[Text]:
    """The pieces with boundaries around them, on as many lines as they need; a text among them is a remark."""

    def begin() -> Text:
        return Text(" " * indent).append(BOUNDARY, "dim")

    line, fresh = begin(), True
    for piece in pieces:
        text = piece.text if isinstance(piece, Piece) else f" … {piece} … "
        if not fresh and line.cell_len + len(text) >= WIDTH:
            yield line
            line = begin()
        how = "yellow" if isinstance(piece, str) else "bold magenta" if piece.special else style
        line.append(text, how).append(BOUNDARY, "dim")
        fresh = False
        if text.endswith("⏎"):
            yield line
            line, fresh = begin(), True
    if not fresh:
        yield line
