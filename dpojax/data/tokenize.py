"""Text -> token ids, as they stand in the middle of a text, and with special tokens as text where they are text."""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dpojax.data.chat import Rendered

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Ids = list[int]
AT_ONCE = 256  # texts: a fast tokenizer spreads them over the cores, and holds some hundred bytes for every token


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """The special tokens by their spelling."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {token.content: i for i, token in added.items() if token.special}
    named = zip(getattr(tokenizer, "all_special_tokens", ()), getattr(tokenizer, "all_special_ids", ()), strict=True)
    return {str(token): int(i) for token, i in {**found, **dict(named)}.items() if token}


def stripping(tokenizer: "PreTrainedTokenizerBase", side: Literal["lstrip", "rstrip"]) -> frozenset[str]:
    """The special tokens that take the white space on this side of them, so that it is no token."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return frozenset([token.content for token in added if getattr(token, side, False)])


def pattern_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Matches any of the tokens, the longest first; None where there are none."""
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def without_prefix(content: dict[str, Any]) -> dict[str, Any]:
    """A fast tokenizer's account of itself (``tokenizer.json``) that writes no space before a text.

    SentencePiece's tokenizers, and some byte-level ones, put a space before every text. It belongs to the beginning of
    a prompt; before a completion, it is a space that the data does not have.
    """

    def changed(step: Any) -> Any:
        if isinstance(step, list):
            return [changed(item) for item in step if not (isinstance(item, dict) and item.get("type") == "Prepend")]
        if not isinstance(step, dict):
            return step
        step = {name: changed(x) if name in ("normalizers", "pretokenizers") else x for name, x in step.items()}
        if step.get("type") == "Metaspace":
            step |= {"prepend_scheme": "never"} | ({"add_prefix_space": False} if "add_prefix_space" in step else {})
        if step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
            step["add_prefix_space"] = False
        return step

    normalizer = content.get("normalizer")
    if isinstance(normalizer, dict) and normalizer.get("type") == "Prepend":
        normalizer = None
    return {**content, "normalizer": changed(normalizer), "pre_tokenizer": changed(content.get("pre_tokenizer"))}


class TextTokenizer:
    """A tokenizer's tokens of texts, never with BOS or EOS.

    Args:
      tokenizer: transformers'.
      allow_special: what spells a special token in a row's text is that token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", allow_special: bool = False):
        self.tokenizer, self.allow_special = tokenizer, allow_special
        self.special = special_tokens(tokenizer)
        self.pattern = pattern_of(self.special)
        self.strips_left, self.strips_right = stripping(tokenizer, "lstrip"), stripping(tokenizer, "rstrip")
        self.is_fast = getattr(tokenizer, "backend_tokenizer", None) is not None

    @functools.cached_property
    def _fast(self) -> "tuple[Tokenizer, Tokenizer, bool]":
        """The fast tokenizer for whole texts and beginnings; for what stands in the middle; and whether they differ at
        the beginning of a text alone. Made when it is first asked for: each is tens of MB, in every process."""
        from tokenizers import Tokenizer

        backend = self.tokenizer.backend_tokenizer
        text = backend.to_str()
        # As JSON without the vocabulary, which as Python's objects is as large again.
        steps = {name: getattr(backend, name) for name in ("normalizer", "pre_tokenizer")}
        content = {name: step and json.loads(step.__getstate__()) for name, step in steps.items()}
        middle = without_prefix(content)
        whole = other = Tokenizer.from_str(text)
        if middle != content:
            other = Tokenizer.from_str(json.dumps(json.loads(text) | middle))
        for each in (whole, other):  # texts are never cut or padded here, whatever the file says
            each.no_truncation()
            each.no_padding()
        first_only = content["pre_tokenizer"] != middle["pre_tokenizer"] and '"first"' in json.dumps(content)
        return whole, other, first_only

    def starts(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of texts of rows: of prompts."""
        return self._ids(texts, "start")

    def goes_on(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of texts of rows that go on from another: of completions."""
        return self._ids(texts, "middle")

    def wholes(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of what a chat template wrote, special tokens included: as ``apply_chat_template`` has them."""
        return self._ids(texts, "whole")

    def _ids(self, texts: Sequence[str], kind: Literal["start", "middle", "whole"]) -> list[Ids]:
        if not texts:
            return []
        split = kind != "whole" and not self.allow_special
        if self.is_fast:
            fast = self._fast[1] if kind == "middle" else self._fast[0]
            fast.encode_special_tokens = split
            some = (list(texts[at : at + AT_ONCE]) for at in range(0, len(texts), AT_ONCE))
            encoded = itertools.chain.from_iterable(fast.encode_batch_fast(x, add_special_tokens=False) for x in some)
            return [encoding.ids for encoding in encoded]
        options = {"split_special_tokens": True} if split and self.pattern else {}
        return self.tokenizer(list(texts), add_special_tokens=False, **options)["input_ids"]

    def chats(self, texts: Sequence[str], marks: Sequence[str]) -> list[Ids]:
        """The tokens of what a chat template wrote, where a text's mark stands in special tokens that are text."""
        ids = iter(self.wholes([text for text, mark in zip(texts, marks, strict=True) if not mark]))
        return [self._marked(text, mark) if mark else next(ids) for text, mark in zip(texts, marks, strict=True)]

    def _marked(self, text: str, mark: str) -> Ids:
        assert self.pattern is not None
        ids: Ids = []
        at, before = 0, ""
        for match in [*self.pattern.finditer(text), None]:
            piece = text[at : match.start() if match else None]
            piece = piece.lstrip() if before in self.strips_right else piece
            piece = piece.rstrip() if match and match[0] in self.strips_left else piece
            if piece := piece.replace(mark, ""):
                # As the tokenizer itself, which takes a text apart at special tokens.
                split = self.goes_on if at and self.is_fast and self._fast[2] else self.starts
                ids += split([piece])[0]
            if match:
                ids.append(self.special[match[0]])
                at, before = match.end(), match[0]
        return ids

    def behind(self, prompts: Sequence[Rendered], heads: Sequence[Ids], replies: Sequence[Rendered]) -> list[Ids]:
        """The tokens of replies of chats, behind their prompts' tokens (``heads``).

        They are those of the whole text, of which what follows the prompt's last special token is tokenised again;
        where the reply would change the prompt's last tokens, the reply's text is tokenised by itself, so that the
        boundary never moves.
        """
        tails, texts = [], []
        for prompt, head, reply in zip(prompts, heads, replies, strict=True):
            text, ids = self._tail(prompt.text, head)
            tails.append(ids)
            texts.append(text + reply.text)
        marks = [reply.mark for reply in replies]
        wholes = self.chats(texts, marks)
        moved = [i for i, (tail, ids) in enumerate(zip(tails, wholes, strict=True)) if ids[: len(tail)] != tail]
        alone = iter(self._alone([replies[i] for i in moved]))
        out = [ids[len(tail) :] for tail, ids in zip(tails, wholes, strict=True)]
        for i in moved:
            out[i] = next(alone)
        return out

    def _tail(self, prompt: str, ids: Ids) -> tuple[str, Ids]:
        """The prompt from its last special token on, in text and in tokens."""
        last = None if self.pattern is None else _last(self.pattern, prompt)
        if last is None:
            return prompt, ids
        token = self.special[last[0]]
        if token not in ids:
            return prompt, ids
        return prompt[last.start() :], ids[len(ids) - 1 - ids[::-1].index(token) :]

    def _alone(self, replies: Sequence[Rendered]) -> list[Ids]:
        # Special tokens that the template writes are tokens, also behind text that begins in the middle.
        out = []
        for reply in replies:
            first = None if self.pattern is None else self.pattern.search(reply.text)
            at = len(reply.text) if first is None else first.start()
            (head,) = self.goes_on([reply.text[:at].replace(reply.mark, "") if reply.mark else reply.text[:at]])
            out.append(head + (self.chats([reply.text[at:]], [reply.mark])[0] if at < len(reply.text) else []))
        return out

    def is_end(self, ids: Ids) -> int | None:
        """Behind the last special token of a text, if nothing but white space follows it; else None."""
        known = self.special_ids
        for at in range(len(ids) - 1, -1, -1):
            if ids[at] in known:
                return at + 1
            if not self.is_blank(ids[at]):
                return None
        return None

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The special tokens' ids."""
        return frozenset(self.special.values())

    @functools.cached_property
    def is_blank(self) -> Callable[[int], bool]:
        """Whether a token says nothing: white space, or a special token."""
        decode = self.tokenizer.decode
        return functools.cache(lambda i: i in self.special_ids or not decode([i]).strip())

    def blank_beginning(self, ids: Sequence[int], mask: np.ndarray | None = None) -> int:
        """How many tokens the ids begin with that say nothing, or that the mask leaves out."""
        said = (n for n, i in enumerate(ids) if (mask is None or mask[n]) and not self.is_blank(i))
        return next(said, len(ids))

    def loss_mask(self, prompt: Rendered, head: Ids, reply: Rendered, ids: Ids) -> np.ndarray:
        """Which of a reply's tokens begin within its trained spans.

        Raises:
          ValueError: the tokens do not come apart at the spans.
        """
        mask = np.zeros(len(ids), bool)
        for span in reply.trained:
            # A span's tokens are found by the tokens of what stands before it.
            before = [self._upto(prompt, head, reply, at) for at in span]
            if any(ids[: len(part)] != part for part in before):
                raise ValueError("the reply's messages do not come apart in tokens; give the row as token ids")
            mask[len(before[0]) : len(before[1])] = True
        if not mask.any():
            raise ValueError("the reply has no tokens of the assistant's own; leave the row out")
        return mask

    def _upto(self, prompt: Rendered, head: Ids, reply: Rendered, at: int) -> Ids:
        return self.behind([prompt], [head], [Rendered(reply.text[:at], True, reply.mark)])[0]


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    last = None
    for last in pattern.finditer(text):  # noqa: B007  # the last one is what is wanted
        pass
    return last
