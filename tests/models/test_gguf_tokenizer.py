"""Tokenizers from GGUF: their ids are those of the tokenizer that the file was made of, on text of every kind."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpojax.errors import UserError
from dpojax.models import load_tokenizer
from dpojax.models.gguf_tokenizer import SPLITS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
CORPUS = (
    """The lazy dog doesn't jump; she'll say I'M DONE. 1234 and 56, 7890 of 12.5%.
    def f(x):\n        return x + 1\n\nnaïve café, Ünïcode, привет мир, привет, 你好世界 世界 ABCdef GhI  two   spaces
We'Ve  been there, THERE's more: http://a.b/c?d=e&f=g !!! ... --- \t\ttabs\r\nlines\n\n\n"""
    * 3
)
TEXTS = [
    "Hello world", " leading", "  two", "trailing  ", "", "\n", "\n\n\n", "a\n\nb\r\nc\t\td", "1234567 89 1 3.14",
    "don't I'LL we'Ve", "naïve e\u0301 A\u030a", "привет мир", "今日は世界 你好", "🚀😶\u200d🌫️", "\u00a0nbsp\u3000",
    "def f(x):\n    return x+1\n", "<s> </s> <unk> <0x0A>", "▁▁lower one eighth", "\x00\x7f\ufffd", "!!!???---",
    "क्षि देवनागरी", "ǅ ʰ ﬁ 𝔘𝔫", " " * 20 + "x", "ABCdef GHi Jk",
]  # fmt: skip
PARTS = ["the", "Hello", " ", "  ", "\n", "\t", "1", "23", "é", "世界", "ab", "aba", ".", "!", "'s", "'S", "(", "def"]
PARTS += ["▁", "🚀", "e\u0301", "\u00a0", "AB", "Ab", "http://"]


def texts(extra: tuple[str, ...] = ()) -> list[str]:
    """The texts above, and random ones that join words, blanks, digits and what else ``extra`` has."""
    rng = random.Random(0)
    return TEXTS + ["".join(rng.choices(PARTS + list(extra), k=rng.randint(1, 20))) for _ in range(300)]


def write(path: Path, tokens: list[str], types: list[int], *, arch: str = "llama", **more: Any) -> str:
    """A file with a tokenizer and no tensors; keys of ``more`` are tokenizer.ggml's."""
    writer = GGUFWriter(path, arch)
    writer.add_context_length(512)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in more.items():
        key = f"tokenizer.{name}" if name.startswith("chat_template") else f"tokenizer.ggml.{name}"
        kinds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        kinds.get(type(value), writer.add_array)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


# ---- byte-level BPE -------------------------------------------------------------------------------------------------

# The published tokenizer.json of one model a row: GPT-2, Pythia, SmolLM, Llama 3, OLMo 2, Qwen2, Mistral Nemo, Phi-4
# mini and DeepSeek Coder.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = CL100K.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")
ORIGINALS = {  # the patterns, whether each digit is split off behind them, whether text is composed, ignore_merges
    "gpt-2": ((GPT2,), False, False, False),
    "olmo": ((GPT2,), False, True, False),
    "smollm": ((r"\p{N}", GPT2), False, False, False),
    "llama-bpe": ((CL100K,), False, False, True),
    "dbrx": ((CL100K,), False, False, False),
    "qwen2": ((QWEN,), False, True, False),
    "tekken": ((TEKKEN,), False, False, True),
    "gpt-4o": ((O200K,), False, False, False),
    "deepseek-coder": (CODER, True, False, False),
}
SAME = {"phi-2": "gpt-2", "starcoder": "smollm", "refact": "smollm", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}
SAME |= {"smaug-bpe": "dbrx", "deepseek-r1-qwen": "qwen2"}
SPECIAL = {"<|endoftext|>": CONTROL, "<｜end▁of▁turn｜>": CONTROL, "    ": USER_DEFINED, "<think>": USER_DEFINED}


def byte_level(name: str) -> tuple[Tokenizer, dict[str, Any]]:
    """A trained tokenizer that splits text so, and what a file has of it."""
    patterns, digits, nfc, ignore_merges = ORIGINALS[SAME.get(name, name)]
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    steps += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    # Merges that cross words too, so that every split tells.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, max_token_length=6
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    ids = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokenizer.add_special_tokens([token for token, kind in SPECIAL.items() if kind == CONTROL])
    tokenizer.add_tokens([token for token, kind in SPECIAL.items() if kind == USER_DEFINED])
    file = {"tokens": [token for token, _ in ids] + sorted(SPECIAL, key=tokenizer.token_to_id)}
    file["types"] = [NORMAL] * len(ids) + [SPECIAL[token] for token in file["tokens"][len(ids) :]]
    return tokenizer, file | {"model": "gpt2", "merges": [" ".join(pair) for pair in merges], "add_bos_token": False}


def test_every_way_to_split_is_tried():
    assert set(ORIGINALS) | set(SAME) == set(SPLITS)


@pytest.mark.parametrize("name", [*ORIGINALS, *SAME])
def test_byte_level_ids_are_the_originals(name, tmp_path):
    original, file = byte_level(name)
    back = load_tokenizer(write(tmp_path / "m.gguf", pre=name, **file))
    for text in texts(tuple(SPECIAL)):
        ids = original.encode(text).ids
        assert back(text)["input_ids"] == ids, text
        assert back.decode(ids) == original.decode(ids, skip_special_tokens=False), text


def test_a_part_that_is_a_token_is_that_token_where_merges_are_ignored(tmp_path):
    """Llama 3 has tokens that its merges do not make."""
    _, file = byte_level("llama-bpe")
    file["tokens"][255], whole = "Ġzyx", " zyx"
    ignoring = load_tokenizer(write(tmp_path / "a.gguf", pre="llama-bpe", **file))
    assert ignoring(whole)["input_ids"] == [255]
    assert load_tokenizer(write(tmp_path / "b.gguf", pre="dbrx", **file))(whole)["input_ids"] != [255]


def test_files_from_before_the_split_was_named_have_their_architectures(tmp_path):
    original, file = byte_level("qwen2")
    for i, more in enumerate(({}, {"pre": "default"})):
        back = load_tokenizer(write(tmp_path / f"{i}.gguf", arch="qwen2", **file, **more))
        assert back("we'Ve 123  e\u0301")["input_ids"] == original.encode("we'Ve 123  e\u0301").ids
        with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre 'default' does not say how text is split"):
            load_tokenizer(write(tmp_path / f"{i}-llama.gguf", arch="llama", **file, **more))


# ---- SentencePiece --------------------------------------------------------------------------------------------------

ADDED = {"<|user|>": CONTROL, "<html>": USER_DEFINED, "[PAD1]": UNUSED}


def pieces() -> dict[str, Any]:
    """What a file has of a SentencePiece model: control tokens, bytes, and pieces that score as they were merged."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    tokenizer.train_from_iterator([CORPUS.replace("\n", " ").replace("\t", " ").replace(" ", "▁")], trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    learned = list(dict.fromkeys("".join(pair) for pair in merges))
    alphabet = [token for token in tokenizer.get_vocab() if len(token) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *learned, *sorted(alphabet), *ADDED]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(learned) + len(alphabet)), *ADDED.values()]
    scores = [0.0] * 259 + [-float(i) for i in range(len(learned) + len(alphabet))] + [-1000.0] * len(ADDED)
    return {"tokens": tokens, "types": types, "scores": scores, "model": "llama", "pre": "default"}


def encode(text: str, file: dict[str, Any], prefix: str = "▁") -> list[str]:
    """SentencePiece's BPE: of all neighbours whose join is a piece, the best are joined, the leftmost first; what is no
    piece in the end is bytes."""
    normal = [kind == NORMAL for kind in file["types"]]
    score = {t: s for t, s, of in zip(file["tokens"], file["scores"], normal, strict=True) if of}
    parts = list(prefix + text.replace(" ", "▁")) if text else []
    while True:
        found = [(score[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score]
        if not found:
            break
        i = -max(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    as_bytes = lambda part: [part] if part in score else [f"<0x{byte:02X}>" for byte in part.encode()]  # noqa: E731
    return [token for part in parts for token in as_bytes(part)]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_are_those_of_its_rule(prefix, tmp_path):
    file = pieces()
    back = load_tokenizer(write(tmp_path / "m.gguf", **file, add_space_prefix=prefix))
    for text in texts():
        if "<s>" not in text:
            assert back.tokenize(text) == encode(text, file, "▁" * prefix), text
            assert back.decode(back(text, add_special_tokens=False)["input_ids"]) == text.replace("▁", " ")


def test_sentencepiece_begins_with_bos_and_finds_special_tokens(tmp_path):
    file = pieces()
    back = load_tokenizer(write(tmp_path / "m.gguf", **file))
    assert back("ab")["input_ids"][0] == back.bos_token_id == 1
    # Behind a special token text begins with a space again, as in SentencePiece and llama.cpp.
    got = back.tokenize("x<|user|>x<html>  x</s>")
    assert got == [*encode("x", file), "<|user|>", *encode("x", file), "<html>", *encode("  x", file), "</s>"]
    assert [back.is_fast, back.unk_token, back.eos_token] == [True, "<unk>", "</s>"]


def test_phi_3_drops_the_blanks_behind_its_special_tokens(tmp_path):
    file = pieces()
    back = load_tokenizer(write(tmp_path / "m.gguf", arch="phi3", **file))
    got = back("<|user|>\n x<s> x", add_special_tokens=False)["input_ids"]
    assert back.convert_ids_to_tokens(got) == ["<|user|>", *encode("x", file), "<s>", *encode(" x", file)]


def test_gemmas_runs_of_spaces_are_merged_in_the_order_of_the_tokens(tmp_path):
    """The file has them as spaces of type 4, and with scores that are no ranks."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "  ", "   ", "\n\n", "▁", "a", "b", "\n", "▁a", "aa"]
    types = [CONTROL, CONTROL, CONTROL, UNKNOWN, *[USER_DEFINED] * 3, *[NORMAL] * 6]
    scores = [0.0] * 4 + [-1000.0] * 3 + [float(i) for i in range(6)]
    ids = {"bos_token_id": 2, "eos_token_id": 1, "unknown_token_id": 3, "padding_token_id": 0}
    more = {"model": "llama", "scores": scores, "add_space_prefix": False, "add_bos_token": True, **ids}
    back = load_tokenizer(write(tmp_path / "m.gguf", tokens, types, arch="gemma2", **more))
    assert back("a   b\n\n\naa a")["input_ids"] == [2, 8, 5, 9, 6, 10, 12, 11]
    assert back.decode([8, 5, 9]) == "a   b"


def test_sentencepiece_itself_has_the_same_ids(tmp_path):
    spm = pytest.importorskip("sentencepiece", reason="the original, where it is installed")
    (tmp_path / "corpus.txt").write_text(CORPUS)
    options = {"vocab_size": 420, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    options |= {"remove_extra_whitespaces": False, "minloglevel": 2, "allow_whitespace_only_pieces": True}
    spm.SentencePieceTrainer.train(input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "m"), **options)
    original = spm.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    ids = range(original.vocab_size())
    kinds = ((original.IsUnknown, UNKNOWN), (original.IsControl, CONTROL), (original.IsByte, BYTE))
    types = [next((kind for is_one, kind in kinds if is_one(i)), NORMAL) for i in ids]
    tokens, scores = [original.IdToPiece(i) for i in ids], [original.GetScore(i) for i in ids]
    back = load_tokenizer(write(tmp_path / "m.gguf", tokens, types, model="llama", scores=scores))
    for text in texts():
        if "<s>" not in text:
            assert back(text)["input_ids"] == [1, *original.encode(text)], text


# ---- both -----------------------------------------------------------------------------------------------------------


def test_bos_and_eos_are_added_as_the_file_says(tmp_path):
    _, file = byte_level("gpt-2")
    end = file["tokens"].index("<|endoftext|>")
    file |= {"bos_token_id": end, "eos_token_id": end, "pre": "gpt-2"}
    plain = load_tokenizer(write(tmp_path / "a.gguf", **file))("a b")["input_ids"]
    both = load_tokenizer(write(tmp_path / "b.gguf", **file | {"add_bos_token": True, "add_eos_token": True}))
    assert both("a b")["input_ids"] == [end, *plain, end]
    unsaid = {k: v for k, v in file.items() if k != "add_bos_token"} | {"pre": "llama-bpe"}
    assert load_tokenizer(write(tmp_path / "c.gguf", **unsaid))("a b")["input_ids"] == [end, *plain]


def test_a_saved_tokenizer_has_the_same_ids(tmp_path):
    for name, file in (("bpe", byte_level("qwen2")[1] | {"pre": "qwen2"}), ("spm", pieces())):
        made = load_tokenizer(write(tmp_path / f"{name}.gguf", **file))
        made.save_pretrained(tmp_path / name)
        back = AutoTokenizer.from_pretrained(tmp_path / name)
        assert [back(text)["input_ids"] for text in TEXTS] == [made(text)["input_ids"] for text in TEXTS]


def test_chat_templates_are_kept_by_name(tmp_path):
    file = pieces() | {"chat_template": "a", "chat_templates": ["tool_use"], "chat_template.tool_use": "b"}
    back = load_tokenizer(write(tmp_path / "m.gguf", **file))
    assert isinstance(back, PreTrainedTokenizerFast) and back.chat_template == {"default": "a", "tool_use": "b"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": "bert"}, "tokenizer model 'bert' is not built from GGUF; name a directory with --tokenizer"),
        ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre 'deepseek-llm' does not say how text is split, or in no way"),
        ({"merges": ["a q"]}, "tokenizer.ggml.merges have 'a q', which makes no token of two"),
        ({"merges": ["ab"]}, "tokenizer.ggml.merges have 'ab', which makes no token of two"),
        ({"merges": None}, "no metadata tokenizer.ggml.merges"),
        ({"eos_token_id": 9}, "tokenizer.ggml.eos_token_id 9 is none of its 3 tokens"),
        ({"add_bos_token": True}, "texts have BOS, but no tokenizer.ggml.bos_token_id"),
        ({"precompiled_charsmap": [1, 2]}, "nothing is known of the metadata tokenizer.ggml.precompiled_charsmap"),
        ({"model": "llama"}, "tokenizer.ggml.scores are missing or too few"),
        ({"tokens": ["a", "a"]}, "tokenizer.ggml.tokens and token_type are missing, doubled or of two lengths"),
    ],
)
def test_tokenizers_that_are_not_known_are_refused(more, message, tmp_path):
    file = {"tokens": ["a", "b", "ab"], "types": [1, 1, 1], "model": "gpt2", "pre": "gpt-2", "merges": ["a b"]} | more
    file = {name: value for name, value in file.items() if value is not None}
    with pytest.raises(UserError, match=message):
        load_tokenizer(write(tmp_path / "m.gguf", **file))
