"""Tokens: templates applied once, one BOS, one EOS, a boundary that never moves, and truncation."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax.data import (
    COMPLETIONS,
    LABELS,
    PROMPTS,
    Encoder,
    RowKind,
    load_examples,
    truncate,
    with_mismatched,
)
from dpojax.errors import UserError
from dpojax.models import load_tokenizer
from tests.conftest import write_rows

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
OTHER = {"role": "assistant", "content": "Go away"}


@pytest.fixture(scope="module")
def encoder(tiny_dir):
    return Encoder(load_tokenizer(tiny_dir))


def write(tmp_path, *rows):
    return [write_rows(tmp_path / "f.jsonl", rows)]


def byte_ids(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def test_text_is_tokenized_in_two_parts_with_one_eos(encoder, tmp_path):
    files = write(tmp_path, {"prompt": "ab", "chosen": " c", "rejected": " d</s>"})
    (example,), report = load_examples(files, encoder)
    assert example.prompt.tolist() == byte_ids("ab")
    assert [c.tolist() for c in example.completions] == [[*byte_ids(" c"), 1], [*byte_ids(" d"), 1]]
    assert report.sentence() == "1 rows: 1 kept, 0 dropped, 0 prompts and 0 completions cut to fit"


def test_chat_template_is_applied_once_and_ends_in_one_eos(encoder, tmp_path):
    files = write(tmp_path, {"prompt": [USER], "chosen": [BOT], "rejected": [OTHER]})
    (example,), _ = load_examples(files, encoder)
    assert example.prompt.tolist() == byte_ids("[user] Hi\n[assistant] ")
    # The template ends a reply with </s> and a newline: the EOS is counted once, the newline behind it is not.
    assert example.completions[0].tolist() == [*byte_ids("Hello"), 1]


class Bos:
    """A tokenizer that puts BOS (257 + 3) before every text, as Llama's do."""

    def __init__(self, inner):
        self.inner, self.bos_token_id, self.eos_token_id = inner, 260, inner.eos_token_id
        self.chat_template = "{{ bos_token }}"
        self.name_or_path = "bos"

    def __call__(self, text, add_special_tokens=True):
        texts = [text] if isinstance(text, str) else text
        # "<B>" spells the BOS, as a chat template does
        ids = [[260, *byte_ids(t[3:])] if t.startswith("<B>") else byte_ids(t) for t in texts]
        ids = [[260, *row] if add_special_tokens else row for row in ids]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def decode(self, ids):
        return self.inner.decode(ids)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "<B>" + "".join(f"{m['role']}:{m['content']};" for m in messages) + "assistant:" * add_generation_prompt


def test_one_bos_whether_the_tokenizer_or_the_template_writes_it(encoder, tmp_path):
    bos = Encoder(Bos(encoder.tokenizer))
    files = write(
        tmp_path,
        {"prompt": "ab", "chosen": "c", "rejected": "d"},
        {"prompt": [USER], "chosen": [BOT], "rejected": [OTHER]},
    )
    examples, _ = load_examples(files, bos)
    assert examples[0].prompt.tolist() == [260, *byte_ids("ab")]
    assert examples[1].prompt.tolist() == [260, *byte_ids("user:Hi;assistant:")]
    for example in examples:
        for completion in example.completions:
            assert 260 not in completion and (completion == 1).sum() == 1


def test_empty_prompt_needs_a_bos(encoder, tmp_path):
    files = write(tmp_path, {"prompt": "", "chosen": "c", "rejected": "d"})
    (example,), _ = load_examples(files, Encoder(Bos(encoder.tokenizer)))
    assert example.prompt.tolist() == [260]
    with pytest.raises(UserError, match="row 1: the prompt is empty"):
        load_examples(files, encoder)


def test_template_that_rewrites_the_prompt_is_refused(encoder, tmp_path):
    class Rewrites(Bos):
        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return f"<B>{len(messages)}"

    files = write(tmp_path, {"prompt": [USER], "chosen": [BOT], "rejected": [OTHER]})
    with pytest.raises(UserError, match="writes another prompt once a reply follows"):
        load_examples(files, Encoder(Rewrites(encoder.tokenizer)))


def test_bad_rows_refuse_the_file_or_are_left_out_and_counted(encoder, tmp_path):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    files = write(tmp_path, good, {"prompt": "a"}, good, good | {"chosen": "c"})
    with pytest.raises(UserError, match=r"row 2: no field 'chosen'.*\(1 more bad row\); fix it"):
        load_examples(files, encoder)
    examples, report = load_examples(files, encoder, skip_bad_rows=True)
    assert len(examples) == 2
    assert [bad.number for bad in report.dropped] == [2, 4]
    assert "4 rows: 2 kept, 2 dropped" in report.sentence()
    with pytest.raises(UserError, match="no row is usable"):
        load_examples(write(tmp_path, {"prompt": "a"}), encoder, skip_bad_rows=True)


@pytest.mark.parametrize(
    ("prompt", "sides", "limit", "expected"),
    [
        ("abcd", ("xy", "z"), 6, ("abcd", ("xy", "z"))),
        ("abcd", ("xy", "z"), 5, ("bcd", ("xy", "z"))),
        ("abcd", ("xy", "z"), 3, ("d", ("xy", "z"))),
        ("abcd", ("xyz", "z"), 3, ("d", ("xy", "z"))),
        ("abcd", ("xyz", "pqr"), 2, ("d", ("x", "p"))),
    ],
)
def test_prompt_goes_first_from_its_start_then_completions_from_their_end(prompt, sides, limit, expected):
    example, prompt_cut, completion_cut = truncate(byte_ids(prompt), [byte_ids(s) for s in sides], limit)
    assert example.prompt.tolist() == byte_ids(expected[0])
    assert [c.tolist() for c in example.completions] == [byte_ids(s) for s in expected[1]]
    assert prompt_cut == (len(expected[0]) < len(prompt))
    assert completion_cut == (expected[1] != sides)


@given(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(2, 40))
def test_truncation_never_leaves_nothing_and_wastes_nothing(prompt, sides, limit):
    example, *_ = truncate(list(range(prompt)), [list(range(n)) for n in sides], limit)
    longest = max(map(len, example.completions))
    assert len(example.prompt) >= 1 and min(map(len, example.completions)) >= 1
    assert len(example.prompt) + longest == min(limit, prompt + max(sides))
    assert example.prompt[-1] == prompt - 1  # the end of the prompt stays
    assert all((c == np.arange(len(c))).all() for c in example.completions)


def test_truncated_rows_are_reported_with_their_numbers(encoder, tmp_path):
    files = write(
        tmp_path,
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a" * 50, "chosen": "b", "rejected": "c"},
        {"prompt": "a" * 50, "chosen": "b" * 50, "rejected": "c"},
    )
    _, report = load_examples(files, encoder, max_length=20)
    assert (report.prompts_cut, report.completions_cut) == (2, 1)


def fingerprint(examples) -> str:
    """The hash that earlier versions made of tokens."""
    digest = hashlib.blake2b(digest_size=16)
    for e in examples:
        for part in (e.prompt, *e.completions):
            digest.update(len(part).to_bytes(4, "little") + part.tobytes())
    return digest.hexdigest()


def test_tokens_are_those_of_earlier_versions(encoder, tmp_path):
    """The literals were computed before the cache's third format."""
    rows = [
        {"prompt": "ab", "chosen": " c", "rejected": " d</s>"},
        {"prompt": [USER], "chosen": [BOT], "rejected": [OTHER]},
        {"prompt": [USER], "chosen": "Hello", "rejected": "Go away"},
        {"prompt": "a" * 50, "chosen": "b" * 9, "rejected": "c"},
        {"prompt": "a", "completions": ["x", "y", "z"], "scores": [1, 3.5, 1]},
    ]
    examples, _ = load_examples(write(tmp_path, *rows), encoder, max_length=40)
    assert fingerprint(examples) == "ee089e6503d04f5e8565754b8d38afd3"
    assert fingerprint(examples[:4]) == "5c5920841987ae408155148f6a08e30f"
    labelled = [
        {"prompt": "a", "completion": "x", "label": True},
        {"prompt": "b", "completion": "yy", "label": False},
    ]
    examples, _ = load_examples(write(tmp_path, *labelled), encoder, kind=LABELS)
    assert fingerprint(examples) == "efff13bce9591e2916f7468833c9852d"
    assert fingerprint(with_mismatched(examples, 40)) == "00b913315533d901acb7ffe4bc58b820"


def test_the_content_hash_is_of_what_is_read(encoder):
    """Tokens, their order, where they are cut, and the annotations that the run reads; not where they came from."""
    rows = [{"prompt": p, "chosen": "b", "rejected": "c", "margin": 1.0} for p in ("x", "yyyyyyyy")]

    def of(*rows, **options):
        return load_examples(list(rows), encoder, **options)[0].content_hash

    same = of(*rows)
    assert of(*rows, max_length=10) == same == of(*[row | {"margin": 2.0} for row in rows])
    margin = RowKind("pairs", margin=True)
    others = [
        of(*rows[::-1]),
        of(*rows, max_length=9),
        of(*rows, kind=margin),
        of(rows[0], rows[1] | {"margin": 2.0}, kind=margin),
        of(rows[0], rows[1] | {"chosen": "d"}),
    ]
    assert len({same, *others}) == 6


def plain(loaded):
    return [[e.prompt.tolist(), *(c.tolist() for c in e.completions)] for e in loaded[0]], loaded[1]


def test_rows_in_memory_are_those_of_a_file(encoder, tmp_path):
    rows = [
        {"prompt": "ab", "chosen": " c", "rejected": " d"},
        {"prompt": [USER], "chosen": [BOT], "rejected": [OTHER]},
    ]
    assert plain(load_examples(rows, encoder)) == plain(load_examples(write(tmp_path, *rows), encoder))
    with pytest.raises(UserError, match=r"^rows, row 2: no field 'chosen'.*; fix it"):
        load_examples([rows[0], {"prompt": "a"}], encoder)
    with pytest.raises(UserError, match="rows: the list is empty"):
        load_examples([], encoder)
    (example,), _ = load_examples([{"prompt": [USER]}], encoder, kind=PROMPTS)
    assert example.prompt.tolist() == byte_ids("[user] Hi\n[assistant] ") and example.completions == ()


def test_token_ids_are_used_as_they_are(encoder, tmp_path):
    row = {"prompt_ids": [5], "chosen_ids": [1], "rejected_ids": [7, 1, 9], "chosen": "not read"}
    for e in (encoder, Encoder(Bos(encoder.tokenizer))):
        for sources in ([row], write(tmp_path, row), write(tmp_path, row)):
            assert plain(load_examples(sources, e))[0] == [[[5], [1], [7, 1, 9]]]
    arrays = {name: np.array(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    assert plain(load_examples([arrays], encoder))[0] == [[[5], [1], [7, 1, 9]]]
    mixed = {"prompt": [USER], "completion_ids": [7]}
    (example,), _ = load_examples([mixed], encoder, kind=COMPLETIONS)
    assert example.prompt.tolist() == byte_ids("[user] Hi\n[assistant] ") and example.completions[0].tolist() == [7]


def test_a_truncated_completion_gets_no_eos(encoder, tmp_path):
    """A text none of ours, a chat none of the template's, and not the template's end of a message."""
    rows = [
        {"prompt": "ab", "chosen": " c", "rejected": " d", "rejected_truncated": True},
        {"prompt": "ab", "chosen": " c", "rejected": " d</s>", "rejected_truncated": True},
        {"prompt": [USER], "chosen": "Hello ", "rejected": "s", "chosen_truncated": True},
        {"prompt": "a", "completions": ["x", "x", "y"], "scores": [0, 1, 2], "truncated": [True, False, True]},
    ]
    expected = [
        [byte_ids("ab"), [*byte_ids(" c"), 1], byte_ids(" d")],
        [byte_ids("ab"), [*byte_ids(" c"), 1], [*byte_ids(" d"), 1]],
        [byte_ids("[user] Hi\n[assistant] "), byte_ids("Hello "), [*byte_ids("s"), 1]],
        [byte_ids("a"), byte_ids("y"), [*byte_ids("x"), 1], byte_ids("x")],
    ]
    for sources in (rows, write(tmp_path, *rows)):
        assert plain(load_examples(sources, encoder))[0] == expected


def test_a_template_that_hides_the_end_of_a_truncated_reply_is_refused(encoder):
    class Lowers(Bos):
        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            text = super().apply_chat_template(messages, tokenize, add_generation_prompt)
            return text.replace("\ue000", "")

    with pytest.raises(UserError, match="hides where the truncated reply ends; give it as token ids"):
        row = {"prompt": [USER], "completion": "x", "truncated": True}
        load_examples([row], Encoder(Lowers(encoder.tokenizer)), kind=COMPLETIONS)
