"""Chats -> text: the template applied to prompt and reply, where the prompt ends, and what of a reply is trained on."""

import datetime
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dpojax.data.dialogue import Dialogue, TokenIds
from dpojax.data.messages import FIELDS, Message, unicode_text
from dpojax.data.rows import LISTENERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = "\ue000"  # private use: stands at the end of a reply, or in its place, to find it in what a template makes of it
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Noncharacters of Unicode, which no text has use for: one stands inside a special token's spelling that is text."""

TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
"""A template's call for today's date, in a form that it writes out."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A text on its way to tokens.

    Attributes:
      text: what is tokenised. Of a chat's completion: all that the template writes behind the prompt.
      chat: whether a chat template wrote it.
      mark: a character that stands inside the spelling of special tokens that are text; empty where there are none.
      trained: the spans of characters that are trained on; empty: all.
      truncated: whether a completion was cut before its end.
    """

    text: str
    chat: bool = False
    mark: str = ""
    trained: tuple[Span, ...] = ()
    truncated: bool = False


@dataclass
class ChatTemplate:
    """A tokenizer's chat template.

    Attributes:
      tokenizer: whose it is.
      special: matches the special tokens' spelling.
      kwargs: arguments of the template, for every row.
      date: what the template takes for today, as in 2026-11-25 (None: today).
      unread: fields of rows and messages that the template does not read, gathered while it renders.
    """

    tokenizer: "PreTrainedTokenizerBase"
    special: re.Pattern[str] | None
    kwargs: dict[str, Any] = field(default_factory=dict)
    date: str | None = None
    unread: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.source = json.dumps(self.tokenizer.chat_template)  # some have several, by name
        self.today = datetime.datetime.fromisoformat(self.date or str(datetime.date.today()))

    @property
    def dated(self) -> bool:
        """Whether the template writes the date."""
        return "strftime_now" in self.source

    def render(self, messages: Sequence[Message], kwargs: dict[str, Any], generate: bool = False) -> str:
        """The messages as text, with the beginning of a reply if ``generate``.

        Raises:
          ValueError: there is no template, or it refuses the messages.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError("the row is a chat but the tokenizer has no chat template; give text, or set a template")
        try:
            if self.dated:
                kwargs = {**kwargs, "chat_template": self._with_date(kwargs)}
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generate, **kwargs
            )
        except Exception as error:  # whatever the template itself raises
            why = " ".join(str(error).split())
            raise ValueError(f"the chat template refuses the messages ({why})") from None
        return unicode_text(text, "the rendered chat")

    def _with_date(self, kwargs: dict[str, Any]) -> str:
        """The template that transformers would take, with the date in place of the calls that ask for today's."""
        template = self.tokenizer.get_chat_template(tools=kwargs.get("tools"))
        return TODAY.sub(lambda call: json.dumps(self.today.strftime(call[2])), template)

    def of(self, dialogue: Dialogue, allow_special: bool) -> list[Rendered | TokenIds]:
        """A chat's prompt and completions as text, or as the token ids that completions are.

        Raises:
          ValueError: the template refuses the messages, or does not write the reply behind its prompt.
        """
        prompt = dialogue.prompt
        assert isinstance(prompt, list)
        flags = dialogue.truncated or (False,) * len(dialogue.completions)
        chats = [(side, cut) for side, cut in zip(dialogue.completions, flags, strict=True) if isinstance(side, list)]
        replies, cuts = [side for side, _ in chats], [cut for _, cut in chats]
        kwargs = {**self.kwargs, **dialogue.template_kwargs}
        self._note_unread([prompt, *replies], dialogue.template_kwargs)
        mark = "" if allow_special or self.special is None else self._mark_for([prompt, *replies, kwargs])
        if mark:
            prompt, kwargs = self._marked(prompt, mark), self._marked(kwargs, mark)
            replies = [self._marked(reply, mark) for reply in replies]
        wholes = [self._whole(prompt, reply, kwargs, cut) for reply, cut in zip(replies, cuts, strict=True)]
        start = self._start(prompt, wholes, kwargs)
        if mark and any(f"\\u{ord(mark):04x}" in text for text in (start, *wholes)):
            raise ValueError("the chat template escapes what spells a special token; pass --allow-special-tokens")
        of_chat = iter(
            [
                Rendered(whole[len(start) :], True, mark, self._spans(prompt, reply, start, whole, kwargs), cut)
                for reply, whole, cut in zip(replies, wholes, cuts, strict=True)
            ]
        )
        parts = [next(of_chat) if isinstance(side, list) else side for side in dialogue.completions]
        return [Rendered(start, True, mark), *parts]  # type: ignore[list-item]

    def _whole(self, prompt: list[Message], reply: Any, kwargs: dict[str, Any], truncated: bool) -> str:
        """Prompt and reply; of a truncated reply, up to its text's end."""
        if not truncated:
            return self.render([*prompt, *reply], kwargs)
        if "tool_calls" in reply[-1]:
            raise ValueError("a truncated reply has tool calls, whose end cannot be told; give it as token ids")
        marked = [*reply[:-1], {**reply[-1], "content": reply[-1]["content"] + END}]
        whole = self.render([*prompt, *marked], kwargs)
        if END not in whole:
            raise ValueError("the chat template hides where the truncated reply ends; give it as token ids")
        return whole[: whole.rindex(END)]

    def _start(self, prompt: list[Message], wholes: Sequence[str], kwargs: dict[str, Any]) -> str:
        """What the template writes before a reply: the prompt with which a reply is asked for, where the replies go on
        from it, or else the beginning that it shares with the prompt of a reply that is there.

        The second is for templates that ask for a reply by more than they write before one, such as an opened
        ``<think>``.
        """
        start = self.render(prompt, kwargs, generate=True)
        if all(whole.startswith(start) for whole in wholes):
            return start
        there = self.render([*prompt, {"role": "assistant", "content": END}], kwargs)
        before = there[: there.rindex(END)] if END in there else ""
        shared = _common_beginning(start, before)
        if shared != before:  # never in the middle of a word
            ends = [match.end() for match in self.special.finditer(shared)] if self.special else []
            shared = shared[: ends[-1]] if ends else ""
        bare = self.render(prompt, kwargs).rstrip()
        if bare and shared.startswith(bare) and all(whole.startswith(shared) for whole in wholes):
            return shared
        theirs = next((whole for whole in wholes if not whole.startswith(start)), wholes[0])
        at = len(_common_beginning(start, theirs))
        raise ValueError(
            f"the chat template writes another prompt once a reply follows ({theirs[at : at + 20]!r} in place of "
            f"{start[at : at + 20]!r}); give the row as text or token ids"
        )

    def _spans(
        self, prompt: list[Message], reply: Any, start: str, whole: str, kwargs: dict[str, Any]
    ) -> tuple[Span, ...]:
        """The spans of a completion that the assistant says, where messages of others stand among them."""
        if not any(message["role"] in LISTENERS for message in reply):
            return ()
        spans = []
        for k, message in enumerate(reply):
            if message["role"] in LISTENERS:
                continue
            begin = start if k == 0 else self._start([*prompt, *reply[:k]], [whole], kwargs)
            end = whole if k == len(reply) - 1 else self.render([*prompt, *reply[: k + 1]], kwargs)
            stop = self._stop(whole, begin, end.rstrip())
            if stop is None:
                raise ValueError(
                    f"the chat template writes message {k + 1} of a reply otherwise once others follow, so that what "
                    "the assistant says cannot be told from what tools say; give the row as token ids"
                )
            spans.append((len(begin) - len(start), stop - len(start)))
        return tuple(spans)

    def _stop(self, whole: str, begin: str, end: str) -> int | None:
        """Where a message stops that goes on from ``begin``, when ``end`` is the chat up to it; None where that cannot
        be told.

        Some templates begin the last message of a chat by more than they write once others follow, such as an empty
        thought: of what ``end`` has behind ``begin``, the message is then as much of the rest as stands there.
        """
        if not whole.startswith(begin):
            return None
        if whole.startswith(end):
            return len(end)
        last = _last_special(self.special, end)
        if last is None or not end.startswith(begin):
            return None
        cuts = range(len(begin) + 1, last + 1)
        return next((len(begin) + len(end) - at for at in cuts if whole.startswith(end[at:], len(begin))), None)

    def _note_unread(self, chats: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.unread |= {f"{name} (the chat template does not read it)" for name in kwargs if name not in self.source}
        for messages in chats:
            for message in messages:
                extra = [name for name in message if name not in FIELDS and name not in self.source]
                self.unread |= {f"{name} of messages" for name in extra}

    def _mark_for(self, values: Any) -> str:
        """A character that does not occur in the values, if they spell special tokens; else nothing."""
        assert self.special is not None
        texts = list(texts_of(values))
        if not any(self.special.search(text) for text in texts):
            return ""
        free = [mark for mark in MARKS if not any(mark in text for text in texts)]
        if not free:
            raise ValueError("it spells special tokens and holds every noncharacter of Unicode; take one out")
        return free[0]

    def _marked(self, value: Any, mark: str) -> Any:
        """The value, with the mark inside every special token that its texts spell, so that the template writes text.

        An assistant's own thinking tags stay what they are: templates look for them.
        """

        def marked(value: Any, thinks: bool) -> Any:
            if isinstance(value, str):
                assert self.special is not None
                return self.special.sub(lambda match: _with_mark(match[0], mark, thinks), value)
            if isinstance(value, dict):
                thinks = value.get("role") == "assistant"
                return {marked(name, False): marked(x, thinks) for name, x in value.items()}
            return [marked(x, thinks) for x in value] if isinstance(value, list) else value

        return marked(value, False)


def _last_special(special: re.Pattern[str] | None, text: str) -> int | None:
    """Where the last special token of a text begins."""
    return max((match.start() for match in special.finditer(text)), default=None) if special else None


def _common_beginning(a: str, b: str) -> str:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]


def _with_mark(token: str, mark: str, thinks: bool) -> str:
    return token if thinks and is_thought(token) else token[0] + mark + token[1:]


def is_thought(token: str) -> bool:
    """Whether a special token is a tag of thoughts, which an assistant's message writes itself."""
    return "think" in token.lower()


def texts_of(value: Any) -> Iterator[str]:
    """All texts within a value, the names of its fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from texts_of(name)
            yield from texts_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_of(item)
