"""Tokenising in several processes: each makes its own blocks, and all have the tokens that one would have made."""

import json
import re
import shutil

import pytest

from dpojax.data import PAIRS, Encoder, load_examples
from dpojax.models import load_tokenizer
from tests.conftest import write_rows
from tests.several import finish, spawn

ROWS = 3500  # four blocks
SCRIPT = """
import json, os, sys
from dpojax import processes
from dpojax.data import prepare
i, (model, *files) = int(os.environ["JAX_PROCESS_ID"]), sys.argv[1:]
done, tokenize = [], prepare.tokenize_rows
prepare.tokenize_rows = lambda rows, *rest: done.append(len(rows)) or tokenize(rows, *rest)
processes.start()
from dpojax.data import PAIRS, Encoder, load_examples
from dpojax.models import load_tokenizer
for again in range(2):
    encoder = Encoder(load_tokenizer(model))
    examples, report = load_examples([files[i % len(files)]], encoder, kind=PAIRS, skip_bad_rows=True)
    kind = type(examples.sources[0].flat).__name__
    print("GOT", json.dumps([sum(done), examples.content_hash, len(report.dropped), report.cached, kind]), flush=True)
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    rows = [{"prompt": f"p{i}", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(ROWS)]
    rows[2000] = {"prompt": "p", "chosen": 3, "rejected": " no"}
    return write_rows(tmp_path_factory.mktemp("whole") / "pairs.jsonl", rows)


@pytest.mark.parametrize("shared", [True, False])
def test_every_process_makes_its_own_part(tiny_dir, pairs, tmp_path, shared):
    encoder = Encoder(load_tokenizer(tiny_dir))
    alone, report = load_examples([pairs], encoder, kind=PAIRS, skip_bad_rows=True)
    files = []
    for i in range(1 if shared else 2):  # a directory for all of them, or one for each
        (tmp_path / str(i)).mkdir()
        files.append(shutil.copy(pairs, tmp_path / str(i)))
    ended = finish(spawn(2, 1, ["-c", SCRIPT, tiny_dir, *files]))
    assert [status for status, _ in ended] == [0, 0], ended
    outputs = [[json.loads(line) for line in re.findall(r"GOT (\[.*?\])", said)] for _, said in ended]
    assert [first[0] for first, _ in outputs] == [2048, ROWS - 2048]  # blocks 0 and 2, blocks 1 and 3
    for first, again in outputs:
        assert first[1:3] == again[1:3] == [alone.content_hash, len(report.dropped)]
        assert again[0] == first[0] and again[3] == ROWS  # from the cache
        assert again[4] == "memmap"  # what is not asked for is in no process's memory
    kept = [directory for directory in tmp_path.glob("*/.dpojax/tokens*") if directory.is_dir()]
    assert len(kept) == len(files)


def test_other_data_in_one_process_is_refused(tiny_dir, pairs, tmp_path):
    other = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2000)
    script = "from dpojax.cli import reporting\ndef run():\n" + "".join(
        f"    {line}\n" for line in SCRIPT.strip().splitlines()
    )
    ended = finish(spawn(2, 1, ["-c", script + "    return 0\nreporting(run)", tiny_dir, pairs, other]))
    assert all(status == 2 for status, _ in ended), ended
    assert "more rows for one process than for another" in ended[0][1] and "Traceback" not in ended[0][1]
