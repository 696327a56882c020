"""Sets of the Hugging Face Hub -> sources: through `datasets` where it is installed, else from their files."""

import dataclasses
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dpojax.cachedir import user_cache
from dpojax.data.opened import form_suffix, hash_of
from dpojax.data.read import Source
from dpojax.data.sources import HUB, SUFFIXES, file_source, options_of
from dpojax.data.tables import ArrowBlock, arrow_blocks
from dpojax.errors import UserError, first_line

CONVERTED = "refs/convert/parquet"  # the Hub keeps a set's rows here as CONFIG/SPLIT/0000.parquet
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "dev": "validation"}
SPLITS |= {"validation": "validation", "valid": "validation", "val": "validation"}
NO_ROWS = ("config.json", "dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json", "metadata.json")


def client() -> Any:
    """What reaches the Hub: `list_repo_files` and `hf_hub_download`, as huggingface_hub has them."""
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # each of its attempts would be said twice
    return huggingface_hub


def _kinds(error: Exception) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _refusal(name: str, error: Exception) -> UserError:
    """What the Hub's answer means: no network, no such set, no permission."""
    reasons = {
        "GatedRepoError": "its owner must let you in; ask on its page, then run 'hf auth login'",
        "RepositoryNotFoundError": "no such set on the Hub, or not for you; check the name, or run 'hf auth login'",
        "RevisionNotFoundError": "no such revision; check revision=...",
        "HFValidationError": "not a name of a set on the Hub; give hub:owner/name",
        "OfflineModeIsEnabled": "the Hub is switched off (HF_HUB_OFFLINE); give the directory of a downloaded set",
    }
    why = next((reason for kind, reason in reasons.items() if kind in _kinds(error)), None)
    said = f"{type(error).__name__}: {first_line(error)}"
    unknown = f"the Hub does not answer ({said}); try again, or download the set and give its directory"
    return UserError(f"{name}: {why or unknown}")


def _asked(name: str, ask: Any, *args: Any, **options: Any) -> Any:
    try:
        return ask(*args, **options, repo_type="dataset")
    except Exception as error:  # of huggingface_hub, httpx, the system
        raise _refusal(name, error) from None


def place_of(file: str) -> tuple[str, str]:
    """The config and the split of a file of a repository, by its path."""
    path = PurePosixPath(file)
    directories = list(path.parent.parts)
    stem = path.name.split(".")[0]
    sharded = re.fullmatch(r"(.+?)-\d{5,}-of-\d{5,}(-[0-9a-f]+)?", stem)
    if re.fullmatch(r"\d+", stem) and directories:
        split = directories.pop()
    elif sharded:
        split = sharded[1]
    else:
        words = [SPLITS[word] for word in re.split(r"[^a-z]+", stem.lower()) if word in SPLITS]
        above = [i for i, part in enumerate(directories) if part.lower() in SPLITS]
        split = words[0] if words else SPLITS[directories.pop(above[-1]).lower()] if above else "train"
    config = "/".join(part for part in directories if part != "data")
    return config or "default", SPLITS.get(split, split)


def _chosen(name: str, options: dict[str, str], found: dict[tuple[str, str], list[str]]) -> list[str]:
    """The files of the config and split that are asked for."""
    configs = sorted({config for config, _ in found})
    config = options.get("config") or (configs[0] if len(configs) == 1 else "default")
    if config not in configs:
        why = f"no config '{config}'" if "config" in options else "several configs, and none is named"
        raise UserError(f"{name}: {why}; give config= one of {', '.join(configs)}")
    splits = sorted({split for other, split in found if other == config})
    split = options.get("split", "train")
    if f"partial-{split}" in splits:
        raise UserError(
            f"{name}: the Hub has only a part of it as Parquet; install the extra 'hub' (pip install datasets)"
        )
    if split not in splits:
        raise UserError(f"{name}: no split '{split}'; give split= one of {', '.join(splits)}")
    return sorted(found[config, split])


def _found(files: Sequence[str], suffixes: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    places: dict[tuple[str, str], list[str]] = {}
    for file in files:
        hidden = any(part.startswith(".") for part in PurePosixPath(file).parts)
        if form_suffix(Path(file)) in suffixes and not hidden and PurePosixPath(file).name not in NO_ROWS:
            places.setdefault(place_of(file), []).append(file)
    return places


def _from_files(name: str, repo: str, options: dict[str, str]) -> list[Source]:
    """The files of a set: Parquet that the Hub made of it, else its own Parquet files, else those of other forms."""
    hub, revision = client(), options.get("revision")
    if revision is None:
        try:
            files = hub.list_repo_files(repo, revision=CONVERTED, repo_type="dataset")
            revision, found = CONVERTED, _found(files, (".parquet",))
        except Exception as error:
            # Private sets have no such revision. What else may be wrong is said of the next question.
            if not {"RevisionNotFoundError", "RepositoryNotFoundError"} & _kinds(error):
                raise _refusal(name, error) from None
            found = {}
    else:
        found = {}
    if not found:
        revision = options.get("revision")
        files = _asked(name, hub.list_repo_files, repo, revision=revision)
        found = _found(files, (".parquet", ".pq")) or _found(files, SUFFIXES)
    if not found:
        raise UserError(f"{name}: no file of rows in it; the suffixes that are read are {', '.join(SUFFIXES)}")
    sources = []
    for file in _chosen(name, options, found):
        local = _asked(name, hub.hf_hub_download, repo, file, revision=revision)
        # Not beside the file, whose directory is huggingface_hub's.
        sources.append(file_source(Path(local), f"{HUB}{repo}, {file}", _beside()))
    return sources


def _beside() -> str | None:
    try:
        return str(user_cache() / "hub")
    except RuntimeError:
        return None


@dataclasses.dataclass(frozen=True)
class TableSource:
    """A set as `datasets` has it: an Arrow table on the disk."""

    name: str
    dataset: Any
    beside: str | None

    def identity(self) -> str | None:
        """A hash of the fingerprint that `datasets` keeps of its data; None if it has none."""
        fingerprint = getattr(self.dataset, "_fingerprint", None)
        return hash_of(hub=self.name, fingerprint=fingerprint) if fingerprint else None

    def estimated_rows(self) -> int:
        """How many it has."""
        return max(1, len(self.dataset))

    def blocks(self, rows: int) -> Iterator[ArrowBlock]:
        """Its rows, a part of the table at a time.

        Raises:
          UserError: it has no rows.
        """
        if not len(self.dataset):
            raise UserError(f"{self.name}: the set is empty; it needs at least one row")
        tables = self.dataset.with_format("arrow").iter(batch_size=rows)
        batches = (batch for table in tables for batch in table.to_batches())
        yield from arrow_blocks(batches, self.name, rows)


def _through_datasets(name: str, repo: str, options: dict[str, str]) -> list[Source]:
    import datasets

    client()  # for its silence
    split = options.get("split", "train")
    try:
        dataset = datasets.load_dataset(repo, options.get("config"), split=split, revision=options.get("revision"))
    except Exception as error:  # of datasets, huggingface_hub, the network; the first line lists configs and splits
        said = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{name}: datasets cannot load it ({said}); check name, config= and split=") from None
    config = f", {options['config']}" if "config" in options else ""
    return [TableSource(f"{HUB}{repo}{config}, {split}", dataset, _beside())]


def hub_sources(name: str) -> list[Source]:
    """The sources of a set of the Hugging Face Hub, which is downloaded where it is not in the Hub's cache.

    Args:
      name: ``hub:owner/name``; ``,config=NAME``, ``,split=train``, ``,revision=REV``.

    Raises:
      UserError: the Hub does not answer; there is no such set, config or split; several configs and none is named.
    """
    repo, options = options_of(name, HUB)
    if importlib.util.find_spec("datasets"):
        return _through_datasets(name, repo, options)
    return _from_files(name, repo, options)
