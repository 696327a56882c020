"""What a report is made of: runs and experiments, as their directories' own files have them.

A report is wanted most of a run that went wrong, so all but ``run.json`` is read leniently: what cannot be read is left
out, and a note says so.
"""

import base64
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from dpojax.configs import DPOConfig, SFTConfig
from dpojax.errors import UserError
from dpojax.paths import AnyPath, absolute, exists, path_of, reaching
from dpojax.runfile import FORMAT

PICTURES = {".png": "image/png", ".svg": "image/svg+xml"}
PICTURE_BYTES = 5_000_000
"""Of the largest picture that a page holds."""
RESULTS = ("results.json", "metrics.json")
"""What experiments write at their end; the first that there is."""
OPTIONS = {field.name for kind in (DPOConfig, SFTConfig) for field in dataclasses.fields(kind)}


@dataclasses.dataclass(frozen=True)
class Value:
    """A number, with its standard error where there is one."""

    mean: float
    error: float | None = None


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of a directory, as a data URI."""

    name: str
    place: str
    uri: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a policy said to a prompt before training and after."""

    prompt: str
    before: str
    after: str


@dataclasses.dataclass(frozen=True)
class Run:
    """The output directory of ``dpojax dpo`` or ``dpojax sft``.

    Attributes:
      options: of the command, by name; ``facts`` are what else ``run.json`` holds, those of groups by names with a dot.
      metrics: the lines of ``metrics.jsonl``, by step.
      results: the content of ``results.json``; None without one.
      notes: sentences on what is missing or damaged.
    """

    name: str
    place: str
    command: str
    options: dict[str, Any]
    facts: dict[str, Any]
    metrics: tuple[dict[str, float], ...]
    results: Any
    samples: tuple[Sample, ...]
    pictures: tuple[Picture, ...]
    notes: tuple[str, ...]

    def series(self, name: str) -> list[tuple[float, float]]:
        """The steps and values of a metric, where it is a number."""
        return [(line["step"], line[name]) for line in self.metrics if math.isfinite(line.get(name, math.nan))]


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of a sweep: a method with one config and seed, what was measured along its training, and texts, each a
    prompt and a completion."""

    name: str
    method: str
    config: dict[str, Any]
    facts: dict[str, Any]
    texts: tuple[tuple[str, str], ...]
    curve: tuple[dict[str, Value], ...]

    def series(self, name: str) -> list[tuple[float, Value]]:
        """The steps and values of a figure."""
        return [(line["step"].mean, line[name]) for line in self.curve if name in line]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A directory of an experiment: what was asked for (``config.json``), its points, its results, its pictures."""

    name: str
    place: str
    options: dict[str, Any]
    points: tuple[Point, ...]
    results: Any
    samples: tuple[Sample, ...]
    pictures: tuple[Picture, ...]
    notes: tuple[str, ...]


def read_all(names: Sequence[str]) -> tuple[list[Run], list[Experiment]]:
    """The runs and experiments of some directories; one that holds others stands for those, and its own pictures.

    Raises:
      UserError: a directory is none of them, or is named twice, or the ``run.json`` of a run is damaged.
    """
    runs: list[Run] = []
    experiments: list[Experiment] = []
    seen: set[str] = set()
    for name in names:
        for path in _meant(path_of(name)):
            if (place := str(absolute(path))) in seen:
                raise UserError(f"{path}: is named twice; leave one of them out")
            seen.add(place)
            if exists(path / "run.json"):
                runs.append(read_run(path))
            else:
                experiments.append(read_experiment(path))
    labels = _labels([*runs, *experiments])
    return (
        [dataclasses.replace(run, name=label) for run, label in zip(runs, labels, strict=False)],
        [dataclasses.replace(e, name=label) for e, label in zip(experiments, labels[len(runs) :], strict=True)],
    )


def title_of(names: Sequence[str]) -> str:
    """The title of a report of these directories: their own names."""
    own = [absolute(path_of(name)).name for name in names]
    return ", ".join(own[:3]) + (f" and {len(own) - 3} more" if len(own) > 3 else "")


def _meant(path: AnyPath) -> list[AnyPath]:
    """The directories of runs and experiments that a directory stands for."""
    if not exists(path):
        raise UserError(f"{path}: no such directory; name the --output of a run, or of an experiment")
    if not path.is_dir():
        raise UserError(f"{path}: is a file; name the directory that holds it")
    if exists(path / "run.json"):
        return [path]
    with reaching(path):
        held = sorted(p for p in path.iterdir() if p.is_dir())
        pictures = any(p.suffix in PICTURES for p in path.iterdir())
    if _is_experiment(path):
        return [path, *(p for p in held if exists(p / "run.json"))]
    inside = [p for p in held if exists(p / "run.json") or _is_experiment(p)]
    if not inside:
        raise UserError(
            f"{path}: is no run and no experiment, and holds none (no run.json, points/ or results.json); name the "
            "--output of a run, or of an experiment"
        )
    return [*inside, path] if pictures else inside


def _is_experiment(path: AnyPath) -> bool:
    return exists(path / "points") or any(exists(path / name) for name in RESULTS)


def _labels(sources: Sequence[Run | Experiment]) -> list[str]:
    """Names that differ: where two are the same, as much of the path as tells them apart."""
    names = [source.name for source in sources]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        tails = ["/".join(source.place.rstrip("/").split("/")[-depth:]) for source in sources]
        names = [tails[i] if names.count(name) > 1 else name for i, name in enumerate(names)]
    return names


def read_run(path: AnyPath) -> Run:
    """A run, as far as it has come.

    Raises:
      UserError: its ``run.json`` cannot be read.
    """
    own = _json(path / "run.json")
    if not isinstance(own, dict):
        raise UserError(f"{path / 'run.json'}: is damaged, no JSON object; leave the run out, or restore the file")
    notes: list[str] = []
    if own.get("run_format") != FORMAT:
        notes.append(f"run.json is of another version (format {own.get('run_format', 1)}); read as far as it is known.")
    options = {name: value for name, value in own.items() if name.split(".")[0] in OPTIONS}
    apart = (*options, "command", "sessions")
    facts = _flat({name: value for name, value in own.items() if name not in apart}) | _session(own, notes)
    metrics = _metrics(path, notes)
    _say_how_far(options, metrics, notes)
    results = _results(path, notes)
    return Run(
        name=str(facts.get("name") or absolute(path).name),
        place=str(path),
        command=str(own.get("command", "")).removesuffix("Config").lower() or "run",
        options=options,
        facts=facts,
        metrics=metrics,
        results=_without_texts(results),
        samples=_samples(path, results, notes),
        pictures=_pictures(path, notes),
        notes=tuple(notes),
    )


def _session(own: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The last session of a run, of which each has what differs from the one before."""
    kept = own.get("sessions")
    sessions = [one for one in kept if isinstance(one, dict)] if isinstance(kept, list) else []
    if len(sessions) > 1:
        notes.append(f"Started {len(sessions)} times; commit, versions and devices are those of the last.")
    return {name: value for session in sessions for name, value in _flat(session).items()}


def _metrics(path: AnyPath, notes: list[str]) -> tuple[dict[str, float], ...]:
    """The lines of ``metrics.jsonl`` that are whole, by step."""
    file, lines, bad = path / "metrics.jsonl", [], []
    texts = _text(file).splitlines() if exists(file) else []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            step = int(line["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            bad.append(number)
            continue
        lines.append({name: float(x) for name, x in line.items() if _is_number(x)} | {"step": step})
    if bad == [len(texts)]:
        notes.append("The last line of metrics.jsonl is cut short, as by a process that was killed; it is left out.")
    elif bad:
        notes.append(f"metrics.jsonl has {len(bad)} lines that hold no step (the first is line {bad[0]}); left out.")
    if not lines:
        notes.append("No step is in metrics.jsonl yet." if exists(file) else "There is no metrics.jsonl yet.")
    return tuple(sorted(lines, key=lambda line: line["step"]))


def _say_how_far(options: Mapping[str, Any], metrics: Sequence[Mapping[str, float]], notes: list[str]) -> None:
    """Add a note where a run has not come to its end."""
    last = max((line["step"] for line in metrics), default=0)
    steps, epochs = options.get("steps"), options.get("epochs")
    epoch = max((line.get("epoch", 0.0) for line in metrics), default=0.0)
    if not metrics:
        return
    if _is_number(steps) and last < steps:
        notes.append(f"Stopped at step {last} of {steps}, or still running.")
    elif steps is None and _is_number(epochs) and epoch < epochs - 1e-9:
        notes.append(f"Stopped at step {last}, {epoch:.3g} of {epochs} epochs, or still running.")


def _samples(path: AnyPath, results: Any, notes: list[str]) -> tuple[Sample, ...]:
    """Prompts with what was said to them before and after: of ``samples.jsonl``, or of the results' ``texts``."""
    file = path / "samples.jsonl"
    rows: list[Any] = []
    if exists(file):
        for text in _text(file).splitlines():
            try:
                rows.append(json.loads(text))
            except ValueError:
                rows.append(None)
    elif isinstance(results, dict) and isinstance(results.get("texts"), list):
        rows = [
            dict(zip(("prompt", "before", "after"), row, strict=False)) if isinstance(row, list) else row
            for row in results["texts"]
        ]
    good = [row for row in rows if isinstance(row, dict) and {"prompt", "before", "after"} <= row.keys()]
    if len(good) < len(rows):
        notes.append(f"{len(rows) - len(good)} rows of samples have no prompt, before and after; left out.")
    return tuple(Sample(*(_as_text(row[name]) for name in ("prompt", "before", "after"))) for row in good)


def _as_text(value: Any) -> str:
    """A prompt or completion as text; a chat is its turns."""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return "\n".join(f"[{turn.get('role')}] {turn.get('content')}" for turn in value)
    return value if isinstance(value, str) else json.dumps(value)


def _without_texts(results: Any) -> Any:
    return {k: v for k, v in results.items() if k != "texts"} if isinstance(results, dict) else results


def read_experiment(path: AnyPath) -> Experiment:
    """An experiment, as far as it has come."""
    notes: list[str] = []
    points = tuple(_points(path, notes))
    results = _results(path, notes)
    samples, pictures = _samples(path, results, notes), _pictures(path, notes)
    if exists(path / "points") and not points:
        notes.append("No point is measured yet.")
    asked = _json(path / "config.json") if exists(path / "config.json") else None
    return Experiment(
        name=absolute(path).name,
        place=str(path),
        options=_flat(asked) if isinstance(asked, dict) else {},
        points=points,
        results=_without_texts(results),
        samples=samples,
        pictures=pictures,
        notes=tuple(notes),
    )


def _points(path: AnyPath, notes: list[str]) -> Iterator[Point]:
    with reaching(path):
        files = sorted((path / "points").glob("*.json")) if exists(path / "points") else []
    for file in files:
        raw = _json(file)
        if not isinstance(raw, dict) or not isinstance(raw.get("curve"), list):
            notes.append(f"points/{file.name} is damaged, or no point (it has no list named curve); left out.")
            continue
        curve: list[dict[str, Value]] = []
        for line in raw["curve"]:
            values = {name: value_of(x) for name, x in line.items()} if isinstance(line, dict) else {}
            curve.append({"step": Value(len(curve))} | {name: x for name, x in values.items() if x is not None})
        known = ("name", "method", "config", "curve", "texts")
        config = raw.get("config")
        own = config if isinstance(config, dict) else {}
        texts = [row for row in raw.get("texts") or () if isinstance(row, list) and len(row) == 2]
        yield Point(
            name=str(raw.get("name", file.stem)),
            method=str(raw.get("method", "")),
            config=_flat({name: value for name, value in own.items() if name not in ("name", "method", "seed")}),
            facts=_flat({name: value for name, value in raw.items() if name not in known}),
            texts=tuple((_as_text(prompt), _as_text(completion)) for prompt, completion in texts),
            curve=tuple(sorted(curve, key=lambda line: line["step"].mean)),
        )


def value_of(raw: Any) -> Value | None:
    """A number, or a mean with its error as experiments and ``dpojax eval`` write it; None of anything else."""
    if _is_number(raw):
        return Value(float(raw))
    if isinstance(raw, dict) and _is_number(raw.get("mean")):
        error = raw.get("error", raw.get("standard_error"))
        return Value(float(raw["mean"]), float(error) if _is_number(error) and math.isfinite(error) else None)
    return None


def _results(path: AnyPath, notes: list[str]) -> Any:
    file = next((path / name for name in RESULTS if exists(path / name)), None)
    if file is None:
        return None
    if (results := _json(file)) is None:
        notes.append(f"{file.name} is damaged; left out.")
    return results


def _pictures(path: AnyPath, notes: list[str]) -> tuple[Picture, ...]:
    with reaching(path):
        files = sorted(p for p in path.iterdir() if p.suffix in PICTURES)
    pictures = []
    for file in files:
        with reaching(file):
            data = file.read_bytes()
        if len(data) > PICTURE_BYTES:
            notes.append(f"{file.name} is {len(data) / 1e6:.0f} MB; left out.")
            continue
        uri = f"data:{PICTURES[file.suffix]};base64,{base64.b64encode(data).decode()}"
        pictures.append(Picture(file.name, str(file), uri))
    return tuple(pictures)


def _json(file: AnyPath) -> Any:
    """The content of a JSON file; None where it is damaged."""
    try:
        return json.loads(_text(file))
    except (ValueError, RecursionError):
        return None


def _text(file: AnyPath) -> str:
    with reaching(file):
        return file.read_bytes().decode(errors="replace")


def _flat(raw: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Values by name; those of a group by names with a dot."""
    flat: dict[str, Any] = {}
    for name, value in raw.items():
        flat |= _flat(value, f"{within}{name}.") if isinstance(value, dict) else {f"{within}{name}": value}
    return flat


def _is_number(x: Any) -> TypeGuard[int | float]:
    return (isinstance(x, float) or (isinstance(x, int) and abs(x) < 10**300)) and not isinstance(x, bool)
