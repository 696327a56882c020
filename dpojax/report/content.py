"""What a report says of runs and experiments, the same in HTML and in Markdown."""

import dataclasses
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dpojax.configs import DPOConfig, SFTConfig
from dpojax.options import flag
from dpojax.report.blocks import Block, Code, Note, Report, Samples, Section, Table, Text
from dpojax.report.curves import curves_in, experiment_charts, run_charts
from dpojax.report.numbers import number, shown, with_error
from dpojax.report.read import Experiment, Run, Value
from dpojax.report.tables import tables_of

FIRST = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
"""Figures that tables begin with."""
SAMPLES = 12
"""Of each run, that are shown."""
TEXTS = 2
"""Of each point, that are shown."""
KEPT_APART = ("command_line", "commit", "dirty", "name")
"""What ``run.json`` holds that has a place of its own."""


def report_of(title: str, runs: Sequence[Run], experiments: Sequence[Experiment]) -> Report:
    """The report of some runs and experiments."""
    sections = [_runs(runs), _options(runs), _figures(runs), _charts(runs), _results(runs)]
    sections.append(Section("Samples before and after", _samples(runs)))
    named = len(experiments) > 1 or bool(runs)
    sections += [section for experiment in experiments for section in _experiment(experiment, named)]
    return Report(title, [section for section in sections if section.blocks])


def _runs(runs: Sequence[Run]) -> Section:
    """What was run: where, how far, by which commit."""
    several = len(runs) > 1
    blocks: list[Block] = [Note(f"{run.name}: {note}" if several else note) for run in runs for note in run.notes]
    columns: dict[str, list[str]] = {
        "run": [run.name for run in runs],
        "command": [f"dpojax {run.command}" for run in runs],
        "objective": [shown(run.options.get("loss", "")) for run in runs],
        "model": [shown(run.options.get("model", "")) for run in runs],
        "last step": [str(int(run.metrics[-1]["step"])) if run.metrics else "0" for run in runs],
        "commit": [_commit(run.facts) for run in runs],
        "directory": [run.place for run in runs],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    if runs:
        blocks.append(Table("Runs", list(filled), list(zip(*filled.values(), strict=True))))
    for run in runs:
        if command := run.facts.get("command_line"):
            text = shlex.join(map(str, command)) if isinstance(command, list) else str(command)
            blocks.append(Code(f"The command of {run.name}", text))
    facts = list(dict.fromkeys(name for run in runs for name in run.facts if name not in KEPT_APART))
    if facts:
        rows = [[name, *(shown(run.facts.get(name, "")) for run in runs)] for name in facts]
        caption = "Recorded with each run: versions, content hashes"
        blocks.append(Table(caption, ["what", *(run.name for run in runs)], rows, folded=True))
    return Section("What was run", blocks)


def _commit(facts: Mapping[str, Any]) -> str:
    """The commit that a run's code was of, in twelve letters."""
    return str(facts.get("commit") or "")[:12] + " with changes" * bool(facts.get("dirty"))


def _options(runs: Sequence[Run]) -> Section:
    """Options that differ between the runs, or, of one run, from the defaults; then all others."""
    if not runs:
        return Section("Options", ())
    defaults = _defaults(runs[0])
    names = list(dict.fromkeys(name for run in runs for name in run.options))
    if len(runs) > 1:
        differ = [name for name in names if len({shown(run.options.get(name)) for run in runs}) > 1]
        caption = "Options that differ between the runs"
    else:
        differ = [name for name in names if runs[0].options[name] != defaults.get(name, ...)]
        caption = "Options that are not the defaults"
    rows = [[flag(name), *(shown(run.options.get(name, "")) for run in runs)] for name in differ]
    same = [[flag(name), shown(runs[0].options[name])] for name in names if name not in differ]
    blocks: list[Block] = [Table(caption, ["option", *(run.name for run in runs)], rows)] if rows else []
    if len(runs) > 1 and not rows:
        blocks.append(Note("All runs have the same options."))
    if same:
        what = "Options that all runs share" if len(runs) > 1 else "Options that are the defaults"
        blocks.append(Table(f"{what} ({len(same)})", ["option", "value"], same, folded=True))
    return Section("Options", blocks)


def _defaults(run: Run) -> dict[str, Any]:
    """The defaults of a run's command, as ``run.json`` spells them."""
    kind = SFTConfig if run.command == "sft" else DPOConfig
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(kind(model="", data=(), output="")).items():
        group = {f"{name}.{inner}": x for inner, x in value.items()} if isinstance(value, dict) else {name: value}
        flat |= {key: list(x) if isinstance(x, tuple) else x for key, x in group.items()}
    return flat


def _figures(runs: Sequence[Run]) -> Section:
    """The last value of each figure, held-out ones first."""
    measured = [run for run in runs if run.metrics]
    names = {name for run in measured for line in run.metrics for name in line if name not in ("step", "epoch")}
    blocks: list[Block] = []
    for caption, wanted in (
        ("Held-out data, at the last evaluation", sorted(n for n in names if n.startswith("eval_"))),
        ("Training, at the last step", sorted(n for n in names if not n.startswith("eval_"))),
    ):
        wanted.sort(key=lambda name: _rank(name.removeprefix("eval_")))
        last = {(run.name, name): _last(run, name) for run in measured for name in wanted}
        steps = [str(max((last[run.name, n][0] for n in wanted), default="")) for run in measured]
        rows = [["step", *steps], *([n, *(last[run.name, n][1] for run in measured)] for n in wanted)]
        if wanted:
            blocks.append(Table(caption, ["figure", *(run.name for run in measured)], rows))
    blocks += _over_seeds(measured, sorted(n for n in names if n.startswith("eval_")))
    return Section("Figures at the end", blocks)


def _last(run: Run, name: str) -> tuple[int, str]:
    line = next((line for line in reversed(run.metrics) if name in line), None)
    return (0, "") if line is None else (int(line["step"]), number(line[name]))


def _over_seeds(runs: Sequence[Run], names: Sequence[str]) -> list[Block]:
    """The mean over runs that differ by their seed alone, with its standard error."""
    options = [{k: v for k, v in run.options.items() if k not in ("seed", "output", "run_name")} for run in runs]
    if len(runs) < 2 or not names or any(own != options[0] for own in options):
        return []
    rows = []
    for name in sorted(names, key=lambda name: _rank(name.removeprefix("eval_"))):
        values = [run.series(name)[-1][1] for run in runs if run.series(name)]
        if len(values) == len(runs):
            error = statistics.stdev(values) / math.sqrt(len(values))
            rows.append([name, with_error(Value(statistics.fmean(values), error))])
    header = ["figure", f"mean ± standard error over {len(runs)} seeds"]
    return [Table("Held-out data, over the seeds", header, rows)] if rows else []


def _rank(name: str) -> tuple[int, str]:
    return (FIRST.index(name) if name in FIRST else len(FIRST), name)


def _charts(runs: Sequence[Run]) -> Section:
    """The curves, and how they are to be read."""
    charts = run_charts(runs)
    lines = {series.line for chart in charts for series in chart.series}
    says = "Thin: each step; thick: the running mean over a 25th of them. " if "faint" in lines else ""
    says += "Marks on a dotted line: held-out data." if "dotted" in lines else ""
    return Section("Curves", [*([Text(says.strip())] if says else []), *charts])


def _results(runs: Sequence[Run]) -> Section:
    """What was measured after training, and the pictures that lie in the directories."""
    found = [(run.name if len(runs) > 1 else "", run.results) for run in runs]
    return Section("Measured afterwards", [*tables_of(found), *(picture for run in runs for picture in run.pictures)])


def _samples(sources: Sequence[Run | Experiment]) -> list[Block]:
    return [
        Samples(f"Samples of {source.name}", source.samples[:SAMPLES], max(0, len(source.samples) - SAMPLES))
        for source in sources
        if source.samples
    ]


def _experiment(experiment: Experiment, named: bool) -> list[Section]:
    """What an experiment found, the way there, and its points."""
    charts = experiment_charts(experiment.points, curves_in(experiment.results))
    found: list[Block] = [*map(Note, experiment.notes), *charts[:1]]
    found += [*tables_of([("", experiment.results)]), *experiment.pictures, *_samples([experiment])]
    only_pictures = not experiment.points and experiment.results is None
    title = f"{'Pictures of' if only_pictures else 'Experiment'} {experiment.name}" if named else "What was found"
    of_it = f", {experiment.name}" if named else ""
    points = _points(experiment) if experiment.points else []
    return [Section(title, found), Section(f"Along training{of_it}", charts[1:]), Section(f"Points{of_it}", points)]


def _points(experiment: Experiment) -> list[Block]:
    """A row for every point: what its config has that others' have not, and its last figures."""
    points = experiment.points
    options = list(dict.fromkeys(name for point in points for name in point.config))
    differ = [name for name in options if len({shown(point.config.get(name)) for point in points}) > 1]
    facts = list(dict.fromkeys(name for point in points for name in point.facts))
    told = [name for name in facts if len({shown(point.facts.get(name)) for point in points}) > 1]
    told = sorted((name for name in told if name not in differ), key=lambda name: name != "seed")
    figures = list(dict.fromkeys(name for point in points for line in point.curve for name in line if name != "step"))
    figures.sort(key=lambda name: ("reward", "kl").index(name) if name in ("reward", "kl") else 2)
    columns = ["point", "method", *(["options"] if differ else []), *told, "step", *figures]
    rows = []
    for point in points:
        last = {name: point.series(name)[-1][1] for name in figures if point.series(name)}
        own = ", ".join(f"{name} {shown(point.config[name])}" for name in differ if name in point.config)
        facts_of = [shown(point.facts.get(name, "")) for name in told]
        step = number(point.curve[-1]["step"].mean) if point.curve else ""
        of_curve = [with_error(last[name]) if name in last else "" for name in figures]
        rows.append([point.name, point.method, *([own] if differ else []), *facts_of, step, *of_curve])
    blocks: list[Block] = [Table("Every point's last figures", columns, rows)]
    texts = [[point.name, *pair] for point in points for pair in point.texts[:TEXTS]]
    if texts:
        caption = f"What each point says: the first {TEXTS} of its texts"
        blocks.append(Table(caption, ["point", "prompt", "completion"], texts, folded=True))
    asked = [[name, shown(value)] for name, value in experiment.options.items()]
    if asked:
        blocks.append(Table("What was asked for", ["option", "value"], asked, folded=True))
    same = [[name, shown(points[0].config.get(name, ""))] for name in options if name not in differ]
    same += [[name, shown(points[0].facts.get(name, ""))] for name in facts if name not in told]
    if same:
        blocks.append(Table(f"What all points share ({len(same)})", ["what", "value"], same, folded=True))
    return blocks
