"""Tokenizers from a GGUF file's metadata: byte-level BPE, and SentencePiece's BPE. What is unknown is refused.

A GGUF file names the tokenizer's kind (``tokenizer.ggml.model``), its tokens and their types, merges or scores, and, by
a name, how text is split before the merges (``tokenizer.ggml.pre``). The rest is what such tokenizers have in common.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from dpojax.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from dpojax.models.gguf import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""llama.cpp's types of tokens; 5 is of ids that the tokenizer does not use."""

# How text is split, as the tokenizers' own files write it.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _cased(after_word: str, digits: str) -> str:
    before = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{before}{_UPPER}*{_LOWER}+{after_word}|{before}{_UPPER}+{_LOWER}*{after_word}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


@dataclasses.dataclass(frozen=True)
class Split:
    """How a byte-level tokenizer splits text before its merges.

    Attributes:
      patterns: each splits what the ones before it left; none: GPT-2's pattern alone.
      digits: every digit stands alone.
      nfc: text is composed first, by Unicode's form C.
      ignore_merges: a part that is a token is that token, whatever the merges say.
      bos: a text begins with BOS where the file does not say.
    """

    patterns: tuple[str, ...] = ()
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    bos: bool = False


SPLITS = {
    **dict.fromkeys(("gpt-2", "phi-2"), Split()),
    "olmo": Split(nfc=True),  # GPT-NeoX's and Pythia's too
    **dict.fromkeys(("smollm", "starcoder", "refact"), Split(digits=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), Split((_LLAMA3,), ignore_merges=True, bos=True)),
    **dict.fromkeys(("smaug-bpe", "dbrx"), Split((_LLAMA3,))),  # dbrx: OLMo 2's and Phi-4's
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), Split((_QWEN2,), nfc=True)),
    "tekken": Split((_cased("", r"\p{N}"),), ignore_merges=True, bos=True),
    "gpt-4o": Split((_cased(_CONTRACTIONS + "?", r"\p{N}{1,3}"),)),
    "deepseek-coder": Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"), digits=True),
}
"""``tokenizer.ggml.pre`` -> how text is split."""

UNSAID = {"gpt2": "gpt-2", "gptneox": "olmo", "qwen2": "qwen2"}
"""Architecture -> ``tokenizer.ggml.pre`` of files from before there was one; elsewhere it may have been any."""

GEMMA = ("gemma2", "gemma3")
"""Architectures whose merges are in the order of the tokens, whatever their scores."""

# Phi-3's tokenizer drops the blanks behind its special tokens, but for these; the file does not say it.
_PHI3_KEEPS_BLANKS = ("<unk>", "<s>", "<|endoftext|>")


_READ = frozenset((
    "model", "pre", "tokens", "token_type", "token_type_count", "scores", "merges", "add_bos_token", "add_eos_token",
    "add_space_prefix",
))  # fmt: skip


def gguf_tokenizer(file: "GGUFFile") -> "PreTrainedTokenizerFast":
    """The tokenizer that the metadata describes, chat templates included.

    Ids are those of the Hugging Face tokenizer that the file was made of, where the file tells all of it. Of
    SentencePiece's tokenizers it does not tell whether text behind a special token begins with a space as the whole
    text does: it does here, as in SentencePiece and llama.cpp.

    Args:
      file: the open file.

    Raises:
      UserError: a kind of tokenizer or a way to split text that is not known, or metadata that are missing.
    """
    from transformers import PreTrainedTokenizerFast

    _check_all_read(file)
    vocabulary = _vocabulary(file)
    build = {"gpt2": _byte_level, "llama": _sentencepiece}[vocabulary.kind]
    tokenizer, bos = build(file, vocabulary)
    tokenizer.add_special_tokens(vocabulary.added(CONTROL, UNKNOWN))
    tokenizer.add_tokens(vocabulary.added(USER_DEFINED))
    special = vocabulary.special(file)
    _add_ends(tokenizer, file, special, bos)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_chat_template(file),
        model_max_length=file.get(f"{file.architecture}.context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A file's tokens by id, their types, and the tokenizer's kind; ``strips``: special tokens that take the blanks
    behind them."""

    kind: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    strips: frozenset[str] = frozenset()

    def added(self, *types: int) -> list[Any]:
        """The tokens of these types, which are found in text before it is split."""
        from tokenizers import AddedToken

        return [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False, rstrip=token in self.strips)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in types
        ]

    def special(self, file: "GGUFFile") -> dict[str, str]:
        """BOS, EOS, unknown and padding token, as transformers names them."""
        unsaid = {"bos": 1, "eos": 2, "unknown": 0} if self.kind == "llama" else {}
        out = {}
        for role, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
            i = file.get(f"tokenizer.ggml.{role}_token_id")
            if i is None and unsaid.get(role, len(self.tokens)) < len(self.tokens):
                i = unsaid[role]
            if i is not None and not 0 <= i < len(self.tokens):
                raise UserError(
                    f"{file.path}: tokenizer.ggml.{role}_token_id {i} is none of its {len(self.tokens)} tokens; "
                    "convert the model again"
                )
            if i is not None:
                out[f"{name}_token"] = self.tokens[i]
        return out


def _check_all_read(file: "GGUFFile") -> None:
    """Refuse what would make other tokens and is not read (``remove_extra_whitespaces``, a table of characters)."""
    start = "tokenizer.ggml."
    names = [key.removeprefix(start) for key in file.keys if key.startswith(start)]
    left = [name for name in names if name not in _READ and not name.endswith(("_token_id", "_token_ids"))]
    left = [name for name in left if file.get(start + name)]
    if left:
        named = ", ".join(start + name for name in sorted(left))
        raise UserError(f"{file.path}: nothing is known of the metadata {named}; name a directory with --tokenizer")


def _vocabulary(file: "GGUFFile") -> Vocabulary:
    kind = file.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"{file.path}: tokenizer model {kind!r} is not built from GGUF; name a directory with --tokenizer"
        )
    tokens = file.get("tokenizer.ggml.tokens") or []
    types = file.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if not tokens or len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise UserError(
            f"{file.path}: tokenizer.ggml.tokens and token_type are missing, doubled or of two lengths; name a "
            "directory with --tokenizer"
        )
    strips: frozenset[str] = frozenset()
    if kind == "llama" and file.architecture == "phi3":
        added = {token for token, of in zip(tokens, types, strict=True) if of in (CONTROL, USER_DEFINED)}
        strips = frozenset(added - set(_PHI3_KEEPS_BLANKS))
    if kind == "llama" and file.architecture in GEMMA:  # runs of spaces, which its tokenizer makes by merges
        runs = {i for i, token in enumerate(tokens) if len(token) > 1 and not token.strip(" ")}
        tokens = ["▁" * len(token) if i in runs else token for i, token in enumerate(tokens)]
        types = [NORMAL if i in runs else of for i, of in enumerate(types)]
    return Vocabulary(kind, tuple(tokens), tuple(types), strips)


def _byte_level(file: "GGUFFile", vocabulary: Vocabulary) -> "tuple[Tokenizer, bool]":
    """Byte-level BPE (GPT-2's), and whether a text begins with BOS where the file does not say."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = file.get("tokenizer.ggml.pre", "default")
    split = SPLITS.get(UNSAID.get(file.architecture, name) if name == "default" else name)
    if split is None:
        raise UserError(
            f"{file.path}: tokenizer.ggml.pre {name!r} does not say how text is split, or in no way that is known; "
            "name a directory with --tokenizer"
        )
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(ids, _named_merges(file, ids), ignore_merges=split.ignore_merges))
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns]
    if split.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split.patterns))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.bos


def _named_merges(file: "GGUFFile", ids: dict[str, int]) -> list[tuple[str, str]]:
    """The merges that the file lists, each of two tokens to a third."""
    merges = file.get("tokenizer.ggml.merges")
    if merges is None:
        raise UserError(f"{file.path}: no metadata tokenizer.ggml.merges; name a directory with --tokenizer")
    out = []
    for merge in merges:
        left, found, right = merge.partition(" ")
        if not found or not {left, right, left + right} <= ids.keys():
            raise UserError(
                f"{file.path}: tokenizer.ggml.merges have {merge!r}, which makes no token of two; name a directory "
                "with --tokenizer"
            )
        out.append((left, right))
    return out


def _sentencepiece(file: "GGUFFile", vocabulary: Vocabulary) -> "tuple[Tokenizer, bool]":
    """BPE of characters with bytes for unknown ones (SentencePiece's), which begins with BOS where no file says."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids, unknown = {token: i for i, token in enumerate(vocabulary.tokens)}, vocabulary.special(file).get("unk_token")
    all_bytes = all(f"<0x{byte:02X}>" in ids for byte in range(256))
    model = models.BPE(ids, _merges(file, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=all_bytes)
    tokenizer = Tokenizer(model)
    prefix = file.get("tokenizer.ggml.add_space_prefix", True)
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return tokenizer, True


def _merges(file: "GGUFFile", vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merges that make every token of two others, the best token first."""
    scores = file.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(vocabulary.tokens):
        raise UserError(f"{file.path}: tokenizer.ggml.scores are missing or too few; name a directory with --tokenizer")
    ids = {t: i for i, (t, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)) if kind == NORMAL}
    if file.architecture in GEMMA:
        scores = [0.0] * len(scores)  # then the first token is the best
    ranked = []
    for token, i in ids.items():
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in ids and right in ids:
                ranked.append((-scores[i], i, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _add_ends(tokenizer: "Tokenizer", file: "GGUFFile", special: dict[str, str], bos: bool) -> None:
    """BOS before every text and EOS behind it, as far as the file says so."""
    from tokenizers import processors

    wanted = {"bos": file.get("tokenizer.ggml.add_bos_token", bos), "eos": file.get("tokenizer.ggml.add_eos_token")}
    for role in wanted:
        if wanted[role] and f"{role}_token" not in special:
            raise UserError(
                f"{file.path}: texts have {role.upper()}, but no tokenizer.ggml.{role}_token_id; use --tokenizer"
            )
    before, after = ([special[f"{role}_token"]] if wanted[role] else [] for role in ("bos", "eos"))
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in after)],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
        )


def _chat_template(file: "GGUFFile") -> str | dict[str, str] | None:
    """The chat template; templates by name, if there are several."""
    template = file.get("tokenizer.chat_template")
    names = file.get("tokenizer.chat_templates") or []
    named = {name: file.get(f"tokenizer.chat_template.{name}") for name in names}
    named = {name: text for name, text in named.items() if text is not None}
    return {**({} if template is None else {"default": template}), **named} if named else template
