"""Kept tokens: the same examples as without them, no tokenizer at work, and never those of something else."""

import dataclasses
import datetime
import errno
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from dpojax import cachedir
from dpojax.cachedir import cache_dir
from dpojax.data import (
    COMPLETIONS,
    Encoder,
    EncodingOptions,
    RowAnnotations,
    RowKind,
    cache,
    chat,
    load_examples,
    prepare,
    store,
)
from dpojax.errors import UserError
from dpojax.models import load_tokenizer
from tests.conftest import write_rows

GOOD = {"prompt": "the film", "chosen": " was lovely", "rejected": " was slow"}
FILES = ("facts.json", "flat.bin", "rows.bin")
CHAT = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Hello", "rejected": "Go away"}


def fast_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "the", "film", "was", "lovely", "slow", "Hi", "Hello", "Go", "away"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return tokenizer


@pytest.fixture(params=["slow", "fast"])
def make_encoder(request, tiny_dir):
    """Makes equal encoders: each call is like another run."""
    return lambda: Encoder(load_tokenizer(tiny_dir) if request.param == "slow" else fast_tokenizer())


@pytest.fixture
def encoder(tiny_dir):
    return Encoder(load_tokenizer(tiny_dir))


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "data" / "f.jsonl", GOOD, CHAT, GOOD | {"prompt": "the lovely film " * 10})


def write(path: Path, *rows) -> str:
    return write_rows(path, rows)


def kept_beside(file: str) -> list[Path]:
    return sorted(path for path in Path(file).parent.glob(".dpojax/*") if path.name != ".gitignore")


def forbid(encoder: Encoder, monkeypatch) -> Encoder:
    """The encoder, with a tokenizer that must not be used."""

    def used(*args, **kwargs):
        raise AssertionError("the tokenizer was used")

    monkeypatch.setattr(encoder, "render", used)
    monkeypatch.setattr(encoder, "tokenize", used)
    return encoder


def plain(loaded):
    """What was loaded, as values that can be compared, without where it came from."""
    examples, report = loaded
    assert all(part.dtype == np.int32 for e in examples for part in (e.prompt, *e.completions))
    tokens = [[e.prompt.tolist(), *(c.tolist() for c in e.completions)] for e in examples]
    return tokens, dataclasses.replace(report, cached=0)


def test_a_second_load_is_equal_and_needs_no_tokenizer(make_encoder, file, monkeypatch):
    first = load_examples([file], make_encoder(), max_length=20)
    reached = []
    encoder = forbid(make_encoder(), monkeypatch)
    second = load_examples([file], encoder, max_length=20, progress=reached.append)
    assert plain(first) == plain(second)
    assert (first[1].cached, second[1].cached) == (0, 3)
    assert second[1].sentence() == first[1].sentence() + " (tokens from the cache)"
    assert reached[-1] == 1.0
    assert [path.name[:8] for path in kept_beside(file)] == ["tokens4-"]


def test_another_length_reads_the_same_tokens(make_encoder, file, monkeypatch):
    load_examples([file], make_encoder(), max_length=8, skip_bad_rows=True)
    cached = load_examples([file], forbid(make_encoder(), monkeypatch), max_length=12)
    shutil.rmtree(kept_beside(file)[0])
    fresh = load_examples([file], make_encoder(), max_length=12)
    assert plain(cached) == plain(fresh) and cached[1].prompts_cut > 0


def test_the_shards_of_a_directory_are_kept_one_by_one(make_encoder, tmp_path, monkeypatch):
    shards = tmp_path / "shards"
    for name in ("a", "b"):
        write(shards / f"{name}.jsonl", GOOD | {"prompt": f"the film {name}"})
    first = load_examples([str(shards)], make_encoder())
    second = load_examples([str(shards)], forbid(make_encoder(), monkeypatch))
    assert plain(first) == plain(second) and second[1].cached == 2


def test_changed_data_is_tokenized_again(encoder, file):
    load_examples([file], encoder)
    write(Path(file), GOOD | {"chosen": " was lively"}, CHAT)
    examples, report = load_examples([file], encoder)
    assert report.cached == 0 and report.rows == 2
    assert encoder.tokenizer.decode(examples[0].completions[0][:-1]) == " was lively"


def test_data_moved_with_its_cache_is_recognised_under_its_new_name(encoder, tmp_path, monkeypatch):
    bad = write(tmp_path / "a" / "f.jsonl", GOOD, {"prompt": "x"})
    load_examples([bad], encoder, skip_bad_rows=True)
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b" / "f.jsonl").rename(tmp_path / "b" / "g.jsonl")
    moved = str(tmp_path / "b" / "g.jsonl")
    _, report = load_examples([moved], forbid(encoder, monkeypatch), skip_bad_rows=True)
    assert report.dropped[0].file == moved


@pytest.mark.parametrize("change", ["template", "eos", "vocabulary", "version", "code", "class", "split"])
def test_a_changed_tokenizer_tokenizes_again(make_encoder, file, monkeypatch, change):
    load_examples([file], make_encoder())
    tokenizer = make_encoder().tokenizer
    if change == "template":
        tokenizer.chat_template = "new: " + tokenizer.chat_template
    elif change == "eos":
        tokenizer.eos_token = "<unk>"
    elif change == "vocabulary":
        tokenizer.add_tokens(["film"] if not tokenizer.is_fast else ["filmed"])
    elif change == "version":
        monkeypatch.setattr("transformers.__version__", "0")
    elif change == "code":
        monkeypatch.setattr(cache, "FORMAT", -1)
    elif change == "class":
        tokenizer.__class__ = type("Other", (type(tokenizer),), {})
    elif change == "split":
        tokenizer.split_special_tokens = True
    assert load_examples([file], Encoder(tokenizer))[1].cached == 0
    assert load_examples([file], Encoder(tokenizer))[1].cached == 3


def test_a_template_that_writes_the_date_does_so_every_day(encoder, file, monkeypatch):
    encoder.tokenizer.chat_template = "{{ strftime_now('%d') }}" + encoder.tokenizer.chat_template
    load_examples([file], encoder)
    assert load_examples([file], encoder)[1].cached == 3

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return datetime.date(2200, 1, 1)

    monkeypatch.setattr(chat.datetime, "date", Tomorrow)
    assert load_examples([file], Encoder(encoder.tokenizer))[1].cached == 0
    dated = Encoder(encoder.tokenizer, EncodingOptions(chat_date="2020-05-17"))
    assert load_examples([file], dated)[1].cached == 0
    examples, _ = load_examples([file], dated)
    assert encoder.tokenizer.decode(examples[1].prompt).startswith("17[user] Hi")


def test_kinds_are_kept_apart(encoder, file):
    pairs, _ = load_examples([file], encoder)
    singles, report = load_examples([file], encoder, kind=COMPLETIONS)
    assert report.cached == 0
    assert [len(examples[0].completions) for examples in (pairs, singles)] == [2, 1]
    assert plain(load_examples([file], encoder, kind=COMPLETIONS)) == plain((singles, report))


def test_a_sweep_over_objectives_tokenizes_once(encoder, tmp_path, monkeypatch):
    """Margins and weights are kept whether an objective reads them or not, and why a row has none."""
    rows = [
        GOOD | {"margin": 2, "weight": 3.5},
        GOOD | {"score_chosen": 1, "score_rejected": 0.1},
        {"prompt": "the", "completions": [" x", " y", " z"], "scores": [1, 3, 1], "weight": 1},
    ]
    file = write(tmp_path / "f.jsonl", *rows)
    kinds = [RowKind("pairs", margin, weight) for margin in (False, True) for weight in (False, True)]
    load_examples([file], encoder)
    fresh = [load_examples([write(tmp_path / f"{i}" / "f.jsonl", *rows)], encoder, kind=kind, skip_bad_rows=True)
             for i, kind in enumerate(kinds)]  # fmt: skip
    forbid(encoder, monkeypatch)
    for kind, (examples, report) in zip(kinds, fresh, strict=True):
        cached, cached_report = load_examples([file], encoder, kind=kind, skip_bad_rows=True)
        assert cached_report.cached == 3 and [e.annotations for e in cached] == [e.annotations for e in examples]
        assert plain((cached, dataclasses.replace(cached_report, dropped=[]))) == plain(
            (examples, dataclasses.replace(report, dropped=[]))
        )
        assert [(bad.number, bad.why) for bad in cached_report.dropped] == [
            (bad.number, bad.why) for bad in report.dropped
        ]
        assert len(cached) == 3 - kind.weight
    assert fresh[3][0][0].annotations == RowAnnotations(margin=2.0, weight=3.5)
    assert fresh[2][0][1].annotations == RowAnnotations(margin=0.9)
    with pytest.raises(UserError, match=r"f.jsonl, row 2: no field 'weight'; the objective asks for it; fix it"):
        load_examples([file], encoder, kind=kinds[1])


def test_a_missing_margin_is_refused(encoder, file):
    with pytest.raises(UserError, match=r"row 1: no field 'margin'.*\(2 more bad rows\)"):
        load_examples([file], encoder, kind=RowKind("pairs", margin=True))


def test_caches_of_an_earlier_version_are_mentioned_once_and_not_read(encoder, file, capsys):
    earlier = Path(file).parent / ".dpojax"
    earlier.mkdir()
    (earlier / f"tokens-{'0' * 32}.npz").write_bytes(b"of an earlier version")
    for _ in range(2):
        load_examples([file], encoder)
    said = f"{earlier}: caches of an earlier version (tokens-*.npz, tokens3-*.npz) are not read and can be removed"
    assert capsys.readouterr().out.splitlines() == [said]


def test_the_suffixes_are_kept_apart(encoder, file):
    load_examples([file], encoder)
    renamed = Path(file).rename(Path(file).with_suffix(".parquet"))
    with pytest.raises(UserError, match="not a readable Parquet file"):
        load_examples([str(renamed)], encoder)


def test_bad_rows_are_kept_with_their_sentences(encoder, tmp_path, monkeypatch):
    # Row 3 is refused as tokens (no BOS), others as text.
    file = write(tmp_path / "f.jsonl", GOOD, {"prompt": "a"}, GOOD | {"prompt": ""}, "", "{broken", GOOD)
    first = load_examples([file], encoder, skip_bad_rows=True)
    with pytest.raises(UserError) as fresh:
        load_examples([write(tmp_path / "other" / "f.jsonl", *Path(file).read_text().split("\n"))], encoder)
    forbid(encoder, monkeypatch)
    second = load_examples([file], encoder, skip_bad_rows=True)
    assert plain(first) == plain(second)
    assert [bad.number for bad in second[1].dropped] == [2, 3, 5] and second[1].rows == 5
    with pytest.raises(UserError) as cached:
        load_examples([file], encoder)
    assert str(cached.value) == str(fresh.value).replace("other/", "")


def test_a_file_without_a_usable_row_says_so_again(encoder, tmp_path):
    file = write(tmp_path / "f.jsonl", GOOD | {"prompt": ""})
    said = []
    for _ in range(2):
        with pytest.raises(UserError, match="no row is usable") as error:
            load_examples([file], encoder, skip_bad_rows=True)
        said.append(str(error.value))
    assert said[0] == said[1] and len(kept_beside(file)) == 1


def test_files_are_kept_one_by_one(encoder, file, tmp_path):
    other = write(tmp_path / "data" / "g.jsonl", CHAT, CHAT | {"rejected": "No"})
    load_examples([file], encoder)
    reached = []
    both = load_examples([other, file], encoder, progress=reached.append)
    assert both[1].cached == 3 and both[1].sentence().endswith("(tokens of 3 rows from the cache)")
    alone = plain(load_examples([other], encoder))[0] + plain(load_examples([file], encoder))[0]
    assert plain(both)[0] == alone and len(alone) == 5
    assert reached == sorted(reached) and reached[-1] == 1.0


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "twice", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_cache_is_made_again(encoder, file, name, damage):
    first = plain(load_examples([file], encoder))
    (kept,) = kept_beside(file)
    content = (kept / name).read_bytes()
    for other in FILES:
        (kept / f"{other}.new").write_bytes((kept / other).read_bytes())
        (kept / f"{other}.new").replace(kept / other)  # the old one is mapped
    if damage == "gone":
        (kept / name).unlink()
    elif damage == "twice":
        (kept / name).write_bytes(content + content)
    elif damage == "flipped":
        (kept / name).write_bytes(content[:9] + bytes([content[9] ^ 255]) + content[10:])
    else:
        (kept / name).write_bytes({"cut": content[:-40], "empty": b"", "other": b"PK not a zip"}[damage])
    again = load_examples([file], encoder)
    assert plain(again) == first and again[1].cached == 0
    assert load_examples([file], encoder)[1].cached == 3


def test_what_was_tokenised_before_an_interruption_is_not_done_again(encoder, tmp_path, monkeypatch):
    """A block is kept as soon as it is done, and read back as it was."""
    monkeypatch.setattr(prepare, "ROWS_OF_BLOCK", 2)
    rows = [GOOD | {"prompt": f"film {i}"} for i in range(7)]
    file, whole = write(tmp_path / "a" / "f.jsonl", *rows), write(tmp_path / "b" / "f.jsonl", *rows)
    render, done = encoder.render, []

    def stopping(dialogue):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(dialogue.prompt)
        return render(dialogue)

    monkeypatch.setattr(encoder, "render", stopping)
    with pytest.raises(KeyboardInterrupt):
        load_examples([file], encoder)
    (aside,) = kept_beside(file)
    assert aside.name.endswith(".parts") and len(list(aside.iterdir())) == 2
    again = []
    monkeypatch.setattr(encoder, "render", lambda dialogue: again.append(dialogue.prompt) or render(dialogue))
    resumed = load_examples([file], encoder)
    assert again == ["film 4", "film 5", "film 6"] and len(kept_beside(file)) == 1
    assert plain(resumed) == plain(load_examples([whole], encoder))


def test_processes_share_the_work(encoder, tmp_path, monkeypatch):
    """Tokens, their order and what is said of rows are those of one process."""
    monkeypatch.setattr(prepare, "ROWS_OF_BLOCK", 8)
    rows = [GOOD | {"prompt": f"film {i}", "extra": 1} if i % 9 else {"prompt": i} for i in range(60)]
    file, other = write(tmp_path / "a" / "f.jsonl", *rows), write(tmp_path / "b" / "f.jsonl", *rows)
    alone, shared = (load_examples([f], encoder, skip_bad_rows=True, workers=n) for f, n in ((file, 1), (other, 2)))
    assert plain(alone)[0] == plain(shared)[0]
    said = [[(bad.number, bad.why) for bad in report.dropped] for _, report in (alone, shared)]
    assert said[0] == said[1] and len(said[0]) == 7
    assert shared[1].remarks == [f"{other}: not used: column extra"]


def test_without_a_place_beside_the_data_it_is_the_users(encoder, file, tmp_path, monkeypatch):
    (Path(file).parent / ".dpojax").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_examples([file], encoder)
    assert cache_dir(file) == tmp_path / "xdg" / "dpojax"
    assert load_examples([file], encoder)[1].cached == 3
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir(file) == tmp_path / ".cache" / "dpojax"


def test_without_any_place_it_does_without(encoder, file, tmp_path, monkeypatch):
    with_cache = load_examples([file], encoder)

    def refuse(directory):
        raise PermissionError(errno.EACCES, "read-only")

    monkeypatch.setattr(cachedir, "_written", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir(file) is None
    without = load_examples([file], encoder)
    assert without[1].cached == 0 and plain(without) == plain(with_cache)


def test_a_full_disk_leaves_nothing_and_fails_nothing(encoder, file, monkeypatch):
    def full(*args, **arrays):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.np, "savez", full)
    monkeypatch.setattr(store, "_write_rows", full)
    examples, _ = load_examples([file], encoder)
    assert len(examples) == 3 and kept_beside(file) == []


def test_a_file_that_is_written_to_while_it_is_read_is_not_kept(encoder, file, monkeypatch):
    render = encoder.render

    def writing(part):
        write(Path(file), GOOD)
        return render(part)

    monkeypatch.setattr(encoder, "render", writing)
    load_examples([file], encoder)
    assert kept_beside(file) == []


def test_loads_at_the_same_time(tiny_dir, file, monkeypatch):
    encoders = [Encoder(load_tokenizer(tiny_dir)) for _ in range(4)]
    meet, loaded, savez = threading.Barrier(len(encoders)), [], np.savez

    def all_at_once(out, **arrays):
        meet.wait(timeout=20)
        savez(out, **arrays)
        meet.wait(timeout=20)

    def load(encoder):
        loaded.append(load_examples([file], encoder))

    monkeypatch.setattr(store.np, "savez", all_at_once)

    threads = [threading.Thread(target=load, args=(encoder,)) for encoder in encoders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 4 and all(plain(one) == plain(loaded[0]) for one in loaded)
    assert len(kept_beside(file)) == 1
    assert load_examples([file], encoders[0])[1].cached == 3


def test_a_missing_directory_is_not_made(encoder, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_examples([str(tmp_path / "nowhere" / "f.jsonl")], encoder)
    assert not (tmp_path / "nowhere").exists()
