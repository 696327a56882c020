"""Dialogues -> tokens: rendering, tokenization, BOS, EOS."""

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dpojax.data.chat import ChatTemplate, Rendered, is_thought, texts_of
from dpojax.data.dialogue import Dialogue, Notes, Text, TokenIds
from dpojax.data.rows import as_chat
from dpojax.data.tokenize import Ids, TextTokenizer
from dpojax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMPTY = "give it text, leave the row out, or give an empty reply that was sampled as token ids"


@dataclasses.dataclass(frozen=True)
class EncodingOptions:
    """How dialogues become tokens.

    Attributes:
      as_chat: plain text is a user's message and the assistant's reply.
      allow_special_tokens: what spells a special token in a row's text is that token.
      chat_special_tokens: BOS and EOS of chats: those that the chat template writes, as who serves the model with
        ``apply_chat_template`` sees them; or also those that the tokenizer puts around any text.
      chat_template_kwargs: arguments of the chat template, as JSON.
      chat_date: what a chat template takes for today, as in 2026-11-25 (None: today).
    """

    as_chat: bool = False
    allow_special_tokens: bool = False
    chat_special_tokens: Literal["template", "tokenizer"] = "template"
    chat_template_kwargs: str = "{}"
    chat_date: str | None = None


@dataclasses.dataclass(frozen=True)
class RenderedRow:
    """A row as text: its prompt and its completions, or their token ids; ``prompt`` is a hash of the prompt, and
    ``differ`` says that no two completions may be equal."""

    number: int
    parts: list[Any]  # Rendered or TokenIds
    prompt: int
    notes: Notes
    differ: bool = True


@dataclasses.dataclass(frozen=True)
class TokenizedRow:
    """A row in tokens, not cut to a length.

    Attributes:
      number: of the row.
      parts: the prompt's tokens, and those of every completion.
      masks: of every completion, which tokens are trained on; empty: all are.
      blank: how many tokens a completion has before the first that is trained on and says something, at most.
      prompt: a hash of the prompt.
      notes: the row's annotations.
    """

    number: int
    parts: tuple[np.ndarray, ...]
    masks: tuple[np.ndarray, ...]
    blank: int
    prompt: int
    notes: Notes


class Encoder:
    """Dialogues to tokens, with one tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", options: EncodingOptions = EncodingOptions()):
        self.tokenizer, self.options = tokenizer, options
        if tokenizer.eos_token_id is None:
            raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no EOS token; set eos_token in its config")
        self.eos: int = tokenizer.eos_token_id
        self.eos_text: str = tokenizer.decode([self.eos])
        bare, full = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.bos: list[int] = bos if full[:1] == bos != bare[:1] else []
        self.text = TextTokenizer(tokenizer, options.allow_special_tokens)
        kwargs = json.loads(options.chat_template_kwargs)
        self.template = ChatTemplate(tokenizer, self.text.pattern, kwargs, options.chat_date)
        self.forget_remarks()

    def forget_remarks(self) -> None:
        """Begin anew with what is gathered while rows are encoded."""
        self.template.unread = set()
        self.spelled: set[str] = set()
        """Special tokens that texts of rows spell."""
        self.added_eos = False
        """Whether chats were given an EOS that their template does not write."""

    # ---- dialogues to text ----------------------------------------------------------------------------------------

    def render(self, dialogue: Dialogue) -> list[Rendered | TokenIds]:
        """Prompt and completions as text, or as the token ids that they are already.

        A chat's template is applied once, to prompt and completion together.

        Raises:
          ValueError: the template does not render a completion as a continuation of its prompt.
        """
        dialogue = self._without_spelled_eos(dialogue)
        if self.options.as_chat:
            dialogue = as_chat(dialogue)
        self._note_spelled(dialogue)
        prompt, completions = dialogue.prompt, dialogue.completions
        if isinstance(prompt, list):
            return [*self.template.of(dialogue, self.options.allow_special_tokens)]
        flags = dialogue.truncated or (False,) * len(completions)
        parts = [prompt if isinstance(prompt, tuple) else Rendered(prompt)]
        for side, cut in zip(completions, flags, strict=True):
            parts.append(Rendered(side, truncated=cut) if isinstance(side, str) else side)  # type: ignore[arg-type]
        return parts

    def _without_spelled_eos(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue without the EOS that plain texts of completions end with: it is added as a token, also to a text
        that says that it was cut before its end."""
        flags = dialogue.truncated or (False,) * len(dialogue.completions)
        sides, cuts = [], []
        for side, cut in zip(dialogue.completions, flags, strict=True):
            bare = side.rstrip().removesuffix(self.eos_text) if isinstance(side, str) else side
            ended = isinstance(side, str) and bare != side.rstrip()
            sides.append(bare if ended else side)
            cuts.append(cut and not ended)
        return dataclasses.replace(dialogue, completions=tuple(sides), truncated=tuple(cuts))

    def _note_spelled(self, dialogue: Dialogue) -> None:
        if self.text.pattern is None:
            return
        for part in (dialogue.prompt, *dialogue.completions, dialogue.template_kwargs):
            for item in part if isinstance(part, list) else [part]:
                found = {token for text in texts_of(item) for token in self.text.pattern.findall(text)}
                says = isinstance(item, dict) and item.get("role") == "assistant"
                self.spelled |= {token for token in found if not (says and is_thought(token))}

    # ---- text to tokens -------------------------------------------------------------------------------------------

    def tokenize(self, rows: Sequence[RenderedRow]) -> list[TokenizedRow | str]:
        """The rows in tokens; of one that turns out unusable, the reason."""
        heads = self._heads([row.parts[0] for row in rows])
        text, chat = list[tuple[int, int]](), list[tuple[int, int]]()  # (row, completion)
        for i, row in enumerate(rows):
            for k, part in enumerate(row.parts[1:]):
                if isinstance(part, Rendered):
                    (chat if part.chat else text).append((i, k))
        found: dict[tuple[int, int], Ids] = {}
        said = [rows[i].parts[k + 1] for i, k in text]
        found |= zip(text, self.text.goes_on([part.text for part in said]), strict=True)
        prompts, replies = [rows[i].parts[0] for i, _ in chat], [rows[i].parts[k + 1] for i, k in chat]
        behind = self.text.behind(prompts, [heads[i] for i, _ in chat], replies)
        found |= zip(chat, behind, strict=True)
        out: list[TokenizedRow | str] = []
        for i, row in enumerate(rows):
            try:
                out.append(self._row(row, heads[i], [found.get((i, k)) for k in range(len(row.parts) - 1)]))
            except ValueError as error:
                out.append(str(error))
        return out

    def _heads(self, prompts: Sequence[Rendered | TokenIds]) -> list[Ids]:
        """The tokens of prompts, without BOS."""
        texts = [part for part in prompts if isinstance(part, Rendered) and not part.chat]
        chats = [part for part in prompts if isinstance(part, Rendered) and part.chat]
        of_text = iter(self.text.starts([part.text for part in texts]))
        of_chat = iter(self.text.chats([part.text for part in chats], [part.mark for part in chats]))
        taken = lambda part: next(of_chat if part.chat else of_text)  # noqa: E731
        return [taken(part) if isinstance(part, Rendered) else list(part) for part in prompts]

    def _row(self, row: RenderedRow, head: Ids, completions: Sequence[Ids | None]) -> TokenizedRow:
        """A row's tokens, with BOS and EOS."""
        first = row.parts[0]
        prompt = self.finish_prompt(head, chat=first.chat) if isinstance(first, Rendered) else head
        parts, blank = [np.array(prompt, np.int32)], 0
        masks: list[np.ndarray | None] = []
        for part, ids in zip(row.parts[1:], completions, strict=True):
            if ids is None:
                assert isinstance(part, tuple)
                parts.append(np.array(part, np.int32))
                masks.append(None)
                continue
            assert isinstance(part, Rendered)
            done, mask = self.finish_completion(ids, part.truncated, chat=part.chat), None
            if part.trained:
                assert isinstance(first, Rendered)
                mask = np.ones(len(done), bool)
                mask[: len(ids)] = self.text.loss_mask(first, head, part, ids)[: len(done)]
            begins = self.text.blank_beginning(done, mask)
            if begins == len(done):
                raise ValueError(f"an empty completion: the tokens that are trained on say nothing; {EMPTY}")
            parts.append(np.array(done, np.int32))
            masks.append(mask)
            blank = max(blank, begins)
        if row.differ and any(np.array_equal(a, b) for i, a in enumerate(parts[1:]) for b in parts[1:][:i]):
            raise ValueError("two completions are equal in tokens; a preference needs different ones")
        known = zip(parts[1:], masks, strict=True)
        filled = tuple([np.ones(len(ids), bool) if mask is None else mask for ids, mask in known])
        some = any(mask is not None for mask in masks)
        return TokenizedRow(row.number, tuple(parts), filled if some else (), blank, row.prompt, row.notes)

    def finish_prompt(self, ids: Ids, chat: bool = False) -> Ids:
        """The prompt with one BOS where the tokenizer adds one; an empty prompt becomes the BOS alone.

        A chat's is what its template writes, if so the options say.

        Raises:
          ValueError: the prompt is empty and there is no BOS to predict the first token from.
        """
        if self.bos and ids[:1] != self.bos and not (chat and self.options.chat_special_tokens == "template"):
            ids = self.bos + ids
        if not ids and self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id]
        if not ids:
            raise ValueError("the prompt is empty and the tokenizer has no BOS token; give the prompt some text")
        return ids

    def finish_completion(self, ids: Ids, truncated: bool = False, chat: bool = False) -> Ids:
        """The completion with one EOS at its end: added where it is missing; a truncated one stays as it is.

        A chat's ends in the special token with which its template ends a message, if so the options say, and where
        there is one. White space that stands behind the end is cut.

        Raises:
          ValueError: a truncated completion has no tokens.
        """
        if truncated:
            if not ids:
                raise ValueError("a truncated completion has no tokens; leave the row out")
            return ids
        end = self.text.is_end(ids)
        if end is not None and (ids[end - 1] == self.eos or (chat and self.options.chat_special_tokens == "template")):
            return ids[:end]
        self.added_eos |= chat and end is None
        return [*ids, self.eos]

    def encode_prompt(self, prompt: Text) -> Ids:
        """A prompt in tokens, as a row of data would have it.

        Raises:
          ValueError: it is empty, or the chat template refuses it.
        """
        (part,) = self.render(Dialogue(prompt, ()))
        (head,) = self._heads([part])
        return self.finish_prompt(head, chat=part.chat) if isinstance(part, Rendered) else head
