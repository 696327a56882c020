"""The Hub: which files of a repository are read, through `datasets` or without it, and what is said of the rest."""

import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpojax.data import hub
from dpojax.data.read import read_rows
from dpojax.data.sources import open_sources
from dpojax.errors import UserError


class RepositoryNotFoundError(Exception):
    pass


class RevisionNotFoundError(Exception):
    pass


class Repositories:
    """A Hub of directories: ROOT/owner/name/REVISION/files."""

    def __init__(self, root):
        self.root = root

    def _revision(self, repo, revision):
        if not (self.root / repo).is_dir():
            raise RepositoryNotFoundError("404 Client Error.\nRepository Not Found")
        path = self.root / repo / (revision or "main").replace("/", "_")
        if not path.is_dir():
            raise RevisionNotFoundError(revision)
        return path

    def list_repo_files(self, repo, *, revision, repo_type):
        path = self._revision(repo, revision)
        return [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]

    def hf_hub_download(self, repo, file, *, revision, repo_type):
        return str(self._revision(repo, revision) / file)


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """Writes the files of a revision of owner/name, each of one row {"a": its own path}."""
    find = hub.importlib.util.find_spec
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name))
    monkeypatch.setattr(hub, "client", lambda: Repositories(tmp_path))

    def write(*files, revision="main"):
        for file in files:
            path = tmp_path / "owner/name" / revision.replace("/", "_") / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".parquet":
                pq.write_table(pa.table({"a": [file]}), path)
            else:
                path.write_text(json.dumps({"a": file}) if "json" in path.suffix else f"a\n{file}\n")

    return write


@pytest.mark.parametrize(
    ("file", "config", "split"),
    [
        ("default/train/0000.parquet", "default", "train"),
        ("data/test-00000-of-00002.parquet", "default", "test"),
        ("data/train_prefs-00000-of-00001-0a1b.parquet", "default", "train_prefs"),
        ("main/val-00000-of-00001.parquet", "main", "validation"),
        ("helpful-base/train.jsonl.gz", "helpful-base", "train"),
        ("test/pairs.json", "default", "test"),
        ("pairs.csv", "default", "train"),
    ],
)
def test_a_path_says_config_and_split(file, config, split):
    assert hub.place_of(file) == (config, split)


def read(name: str) -> list[str]:
    return [row.fields["a"] for row in read_rows([name])]


def test_parquet_that_the_hub_made_is_read_first(repo):
    repo(
        "default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet", revision=hub.CONVERTED
    )
    repo("train.jsonl")
    repo("old.jsonl", revision="v1")
    assert read("hub:owner/name") == ["default/train/0000.parquet", "default/train/0001.parquet"]
    assert read("hub:owner/name,split=test") == ["default/test/0000.parquet"]
    assert read("hub:owner/name,revision=v1") == ["old.jsonl"]
    first = open_sources("hub:owner/name")[0]
    assert first.name == "hub:owner/name, default/train/0000.parquet"
    assert first.identity() and first.beside.endswith("dpojax/hub")


def test_a_set_without_it_gives_its_own_parquet_or_other_files(repo):
    repo("README.md", ".gitattributes", "train.jsonl", "validation.csv", "dataset_infos.json", ".x/train.jsonl")
    assert read("hub:owner/name") == ["train.jsonl"] and read("hub:owner/name,split=validation") == ["validation.csv"]
    repo("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/val-00000-of-00001.parquet")
    assert read("hub:owner/name") == [f"data/train-0000{i}-of-00002.parquet" for i in range(2)]


def test_what_is_not_there_is_one_sentence_with_what_is(repo, tmp_path):
    repo("one/train.jsonl", "two/train.jsonl", "two/test.jsonl")
    cases = {
        "hub:owner/name": "several configs, and none is named; give config= one of one, two",
        "hub:owner/name,config=three": "no config 'three'; give config= one of one, two",
        "hub:owner/name,config=two,split=dev": "no split 'dev'; give split= one of test, train",
        "hub:owner/name,revision=v2": "no such revision",
        "hub:owner/none": "no such set on the Hub",
    }
    for name, says in cases.items():
        with pytest.raises(UserError) as error:
            open_sources(name)
        assert str(error.value).startswith(f"{name}: ") and says in str(error.value)
        assert "\n" not in str(error.value)
    assert read("hub:owner/name,config=two,split=test") == ["two/test.jsonl"]


def test_a_part_of_a_split_is_not_taken_for_the_whole(repo):
    repo("default/partial-train/0000.parquet", revision=hub.CONVERTED)
    with pytest.raises(UserError, match="only a part of it"):
        open_sources("hub:owner/name")


def test_no_network_and_no_rows_are_one_sentence(repo, monkeypatch):
    repo("README.md", "model.bin")
    with pytest.raises(UserError, match="hub:owner/name: no file of rows in it"):
        open_sources("hub:owner/name")

    def nobody(*args, **options):
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(Repositories, "list_repo_files", nobody)
    with pytest.raises(UserError, match=r"the Hub does not answer \(ConnectionError: .*download the set and give"):
        open_sources("hub:owner/name")


def test_the_real_client_has_what_is_asked_of_it():
    import inspect

    for name in ("list_repo_files", "hf_hub_download"):
        assert {"revision", "repo_type"} <= set(inspect.signature(getattr(hub.client(), name)).parameters)


class Loaded:
    """What `datasets.load_dataset` returns, as much of it as is used."""

    _fingerprint = "f"

    def __init__(self, table):
        self.table = table

    def __len__(self):
        return self.table.num_rows

    def with_format(self, kind):
        assert kind == "arrow"
        return self

    def iter(self, batch_size):
        return (self.table.slice(i, batch_size) for i in range(0, len(self), batch_size))


def test_datasets_is_asked_where_it_is_installed(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        if args[0] == "owner/none":
            raise ValueError("Config name is missing.\nPlease pick one")
        return Loaded(pa.table({"a": ["x", "y", "z"] if args[0] == "owner/name" else []}))

    module = types.ModuleType("datasets")
    module.load_dataset, module.__spec__ = load_dataset, types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read("hub:owner/name,config=c,revision=r,split=test") == ["x", "y", "z"]
    assert asked == [(("owner/name", "c"), {"split": "test", "revision": "r"})]
    (source,) = open_sources("hub:owner/name,config=c")
    assert source.name == "hub:owner/name, c, train" and source.identity()
    assert [block.first for block in source.blocks(2)] == [1, 3]
    with pytest.raises(UserError, match=r"datasets cannot load it \(ValueError: Config name is missing"):
        open_sources("hub:owner/none")
    with pytest.raises(UserError, match="the set is empty"):
        read("hub:owner/empty")
