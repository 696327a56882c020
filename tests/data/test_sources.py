"""Sources: every form of file gives the same rows, and what cannot be read is one sentence."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from dpojax.data.read import BadRow, Row, read_rows
from dpojax.data.sources import open_sources, parse_mixture
from dpojax.errors import UserError

CHAT = [{"role": "user", "content": "Hi, é\n"}]
ROWS = [
    {"prompt": CHAT, "chosen": 'a "quoted", text\nof two lines', "rejected": "x", "score_chosen": 2.5, "label": True},
    {"prompt": [*CHAT, *CHAT], "chosen": "漢字", "rejected": "1", "score_chosen": -1.0, "label": False},
    {"prompt": CHAT, "chosen": "c", "rejected": "true", "score_chosen": 0.0, "label": True},
]


def arrow(kind: str) -> bytes:
    sink, table = pa.BufferOutputStream(), pa.Table.from_pylist(ROWS)
    with getattr(pa.ipc, f"new_{kind}")(sink, table.schema) as out:
        out.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def cells(delimiter: str) -> bytes:
    text = io.StringIO()
    out = csv.writer(text, delimiter=delimiter)
    out.writerow(ROWS[0])
    for row in ROWS:
        out.writerow(json.dumps(x) if isinstance(x, list | bool) else x for x in row.values())
    return text.getvalue().encode()


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
FILES = {
    "f.jsonl": LINES.encode(),
    "f.ndjson": LINES.encode().rstrip(),
    "no_suffix": LINES.encode(),
    "lines.json": LINES.encode(),
    "array.json": json.dumps(ROWS, indent=2).encode(),
    "array.jsonl": json.dumps(ROWS).encode(),
    "columns.json": json.dumps(COLUMNS).encode(),
    "columns_over_lines.json": json.dumps(COLUMNS, indent=1).encode(),
    "data.json": json.dumps({"data": ROWS}).encode(),
    "version.json": json.dumps({"version": "1", "rows": ROWS}, indent=1).encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16_big.jsonl": b"\xfe\xff" + LINES.encode("utf-16-be"),
    "utf16.json": json.dumps(ROWS).encode("utf-16"),
    "f.parquet": parquet(),
    "f.pq": parquet(),
    "parquet_in_all_but.jsonl": parquet(),
    "file.arrow": arrow("file"),
    "stream.arrow": arrow("stream"),
    "f.feather": arrow("file"),
    "f.csv": cells(","),
    "f.tsv": cells("\t"),
    "bom.csv": b"\xef\xbb\xbf" + cells(","),
    "utf16.csv": cells(",").decode().encode("utf-16"),
}
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def write(path: Path, data: bytes | str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def fields(*names: str) -> list[dict]:
    return [row.fields if isinstance(row, Row) else row.why for row in read_rows(names, rows=2)]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", FILES)
def test_every_form_compressed_or_not_gives_the_same_rows(tmp_path, name, compression):
    file = write(tmp_path / f"{name}{compression}", COMPRESS[compression](FILES[name]))
    assert fields(file) == ROWS
    assert fields(Path(file).rename(tmp_path / name).as_posix()) == ROWS, "the suffix need not say it"


@pytest.mark.parametrize("name", ["f.jsonl", "array.json", "f.parquet", "stream.arrow", "f.csv", "utf16.jsonl"])
def test_blocks_have_as_many_rows_as_asked_and_can_be_sent_to_another_process(tmp_path, name):
    (source,) = open_sources(write(tmp_path / name, FILES[name]))
    for size, firsts in ((1, [1, 2, 3]), (2, [1, 3]), (5, [1])):
        blocks = [pickle.loads(pickle.dumps(block)) for block in source.blocks(size)]
        assert [block.first for block in blocks] == firsts
        assert [row.number for block in blocks for row in block.rows()] == [1, 2, 3]
    assert source.name == str(tmp_path / name) == source.beside


def test_blank_lines_count_as_lines_and_not_as_rows(tmp_path):
    (source,) = open_sources(write(tmp_path / "f.jsonl", '\n{"a": 1}\n\n\n{"a": 2}\n \n{"a": 3}\n'))
    blocks = list(source.blocks(2))
    assert [block.first for block in blocks] == [2, 7]
    assert [row.number for block in blocks for row in block.rows()] == [2, 5, 7]


def test_the_identity_is_of_the_bytes_and_of_the_form(tmp_path):
    names = ("a.jsonl", "deep/b.jsonl", "c.json", "d.jsonl.gz")
    data = (FILES["f.jsonl"],) * 3 + (gzip.compress(FILES["f.jsonl"], mtime=0),)
    same, moved, document, zipped = (
        open_sources(write(tmp_path / name, x))[0].identity() for name, x in zip(names, data, strict=True)
    )
    assert same == moved and len({same, document, zipped}) == 3


@pytest.mark.parametrize(
    ("document", "rows"),
    [
        ({"prompt": "a", "chosen": "b"}, [{"prompt": "a", "chosen": "b"}]),
        ({"chosen": CHAT, "rejected": CHAT}, [{"chosen": CHAT, "rejected": CHAT}]),
        ({"messages": CHAT}, [{"messages": CHAT}]),
        ({"prompt": "a", "tools": [{"name": "f"}]}, [{"prompt": "a", "tools": [{"name": "f"}]}]),
        ({"chosen": [CHAT, CHAT]}, [{"chosen": CHAT}, {"chosen": CHAT}]),
        ({"train": [{"a": 1}]}, [{"a": 1}]),
        (
            [{"a": 1}, [2], "x"],
            [{"a": 1}, *(f"a JSON {x}, not an object with named fields" for x in ("list", "string"))],
        ),
    ],
)
def test_what_one_line_of_json_holds(tmp_path, document, rows):
    assert fields(write(tmp_path / "f.json", json.dumps(document))) == rows


def test_an_object_on_a_line_of_jsonl_is_a_row_whatever_it_holds(tmp_path):
    assert fields(write(tmp_path / "f.jsonl", '{"data": [{"a": 1}]}')) == [{"data": [{"a": 1}]}]


def test_cells_are_text_but_for_json_and_numbers(tmp_path):
    header = "prompt,chosen,scores,label,is_safe,note\n"
    text = '2,"[INST] x",[1],1,True,\n' + '"[""a""]",{,"[1, 0.5]",good,no,"{""a"": 1}"\n\n'
    assert fields(write(tmp_path / "f.csv", header + text)) == [
        {"prompt": "2", "chosen": "[INST] x", "scores": [1], "label": 1, "is_safe": True},
        {"prompt": ["a"], "chosen": "{", "scores": [1, 0.5], "label": "good", "is_safe": "no", "note": {"a": 1}},
    ]


def test_bad_rows_of_a_csv(tmp_path):
    text = "prompt,chosen\na,b,c\na\n\"[{'role': 'user'}]\",b\nc,d\n"
    got = list(read_rows([write(tmp_path / "f.csv", text)]))
    assert [type(row) for row in got] == [BadRow, BadRow, BadRow, Row]
    assert str(got[0]).startswith(f"{tmp_path / 'f.csv'}, row 1: 3 cells under a header of 2")
    assert "1 cells under a header of 2" in got[1].why and "write it as JSON" in got[2].why and got[3].number == 4


def test_text_in_parquet_that_is_no_utf8_is_a_bad_row(tmp_path):
    table = pa.table({"prompt": pa.array([b"a", b"\xff", b"c"])}).cast(pa.schema([("prompt", pa.binary())]))
    text = pa.Table.from_arrays([pa.Array.from_buffers(pa.string(), 3, table["prompt"].chunk(0).buffers())], ["prompt"])
    pq.write_table(text, tmp_path / "f.parquet")
    got = fields(str(tmp_path / "f.parquet"))
    assert got[0] == {"prompt": "a"} and "not UTF-8" in got[1] and got[2] == {"prompt": "c"}


def test_directories_and_globs_are_read_file_by_file_in_order(tmp_path):
    for i, name in enumerate(("b.jsonl", "a/z.json", "a/y.csv.gz", "c.parquet")):
        data = {".json": [{"a": str(i)}], ".jsonl": {"a": str(i)}}.get(Path(name).suffix)
        if data:
            write(tmp_path / name, json.dumps(data))
    write(tmp_path / "a/y.csv.gz", gzip.compress(b"a\n2\n"))
    pq.write_table(pa.table({"a": ["3"]}), tmp_path / "c.parquet")
    for name in ("README.md", ".hidden/x.jsonl", ".dpojax/x.jsonl", "notes.txt", "dataset_info.json"):
        write(tmp_path / name, "no rows")
    names = [source.name for source in open_sources(str(tmp_path))]
    assert names == [str(tmp_path / name) for name in ("a/y.csv.gz", "a/z.json", "b.jsonl", "c.parquet")]
    assert fields(str(tmp_path)) == [{"a": x} for x in "2103"]
    assert fields(str(tmp_path / "[bc].*")) == [{"a": x} for x in "03"]
    assert fields(str(tmp_path / "**" / "?.j*")) == [{"a": x} for x in "10"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    assert fields(write(tmp_path / "f[1].jsonl", '{"a": 1}')) == [{"a": 1}]


def test_what_save_to_disk_wrote_is_read_as_its_state_says(tmp_path):
    for split in ("train", "test"):
        for i in range(2):
            write(tmp_path / split / f"data-0000{i}-of-00002.arrow", arrow("stream"))
        files = [{"filename": f"data-0000{i}-of-00002.arrow"} for i in range(2)]
        write(tmp_path / split / "state.json", json.dumps({"_data_files": files, "_split": split}))
        write(tmp_path / split / "dataset_info.json", "{}")
        write(tmp_path / split / "cache-1.arrow", arrow("stream"))
    write(tmp_path / "dataset_dict.json", '{"splits": ["train", "test"]}')
    assert fields(str(tmp_path / "train")) == ROWS * 2
    with pytest.raises(UserError, match=r"several splits \(train, test\); name one"):
        open_sources(str(tmp_path))
    (tmp_path / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002.arrow is missing"):
        open_sources(str(tmp_path / "train"))


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("f.json", "", "the file is empty"),
        ("f.json", "[]", "the file is empty"),
        ("f.csv", "", "the file is empty"),
        ("f.csv", "a,b\n", "the file is empty"),
        ("f.arrow", "", "not a readable Arrow file"),
        ("f.arrow", "junk and more", "not a readable Arrow file"),
        ("f.parquet", FILES["f.parquet"][:-20], "not a readable Parquet file"),
        ("f.arrow", FILES["file.arrow"][:-20], "not a readable Arrow file"),
        ("f.arrow", FILES["stream.arrow"][:-400], "not a readable Arrow file"),
        ("f.json", "3", "a JSON number; give one object a line"),
        ("f.json", "[{", "broken JSON"),
        ("f.json", json.dumps({"a": "b"}, indent=1), "one JSON object over several lines (its fields: a); give one"),
        ("f.json", json.dumps({"a": [{}], "b": [{}]}, indent=1), "with 2 lists of objects (a, b)"),
        ("f.json", json.dumps({"a": ["x"], "b": []}), "columns of different lengths (a 1, b 0)"),
        ("f.csv", "a,a\n1,2\n", "the header ('a', 'a') must give every column a name"),
        ("f.csv", 'a,b\n1,2\n1,"2\n', "row 2: broken CSV"),
        ("f.csv", b"a,b\n1,\xff\n", "not in the encoding that it says"),
        ("f.jsonl", LINES.encode("utf-16") + b"\x00", "not in the encoding that it says"),
        ("f.jsonl.gz", LINES, "not a .gz file"),
        ("f.jsonl.gz", b"", "the file is empty"),
        ("f.jsonl", b"PK\x03\x04rest", "a zip archive"),
        *((f"f.jsonl{x}", COMPRESS[x](LINES.encode())[:-3], "cannot be decompressed") for x in COMPRESS if x),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, name, data, says):
    file = write(tmp_path / name, data)
    with pytest.raises(UserError) as error:
        fields(file)
    said = str(error.value)
    assert said.startswith(file) and says in said and "\n" not in said


def test_nothing_to_read_is_one_sentence(tmp_path):
    write(tmp_path / "d" / "notes.txt", "")
    for name, says in {"d": "no file of rows in this directory", "*.jsonl": "no file matches"}.items():
        with pytest.raises(UserError, match=says):
            open_sources(str(tmp_path / name))
    for name, says in {
        "hub:": "which set",
        "hub:a/b,spilt=train": "'spilt=train' is not understood; the options are config=",
        "tfds:a,split=": "'split=' is not understood",
    }.items():
        with pytest.raises(UserError, match=says):
            open_sources(name)


def test_mixtures(tmp_path):
    whole = write(tmp_path / "a=2", "")
    assert parse_mixture(["a.jsonl=0.7", "b/*.csv=3"]) == [("a.jsonl", 0.7), ("b/*.csv", 3.0)]
    assert parse_mixture(["a.jsonl", whole]) == [("a.jsonl", None), (whole, None)]
    assert parse_mixture([f"{whole}=1"]) == [(whole, 1.0)]
    for name in ("hub:o/n,revision=1", "tfds:n,split=train", "hub:o/n,config=2"):
        assert parse_mixture([name]) == [(name, None)]
        assert parse_mixture([f"{name}=0.5"]) == [(name, 0.5)]
    assert parse_mixture(["hub:o/n=2"]) == [("hub:o/n", 2.0)]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        *(([f"a.jsonl={x}"], "the weight must be a finite number above 0") for x in ("0", "-1", "nan", "inf")),
        (["a.jsonl=1", "b.jsonl"], "--data b.jsonl: has no weight, and others have"),
        (["hub:o/n=x"], "the weight must be"),
    ],
)
def test_bad_mixtures(names, says):
    with pytest.raises(UserError, match=says):
        parse_mixture(names)
