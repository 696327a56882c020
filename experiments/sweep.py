"""A sweep: points that any number of processes, on any number of machines, train one by one into one directory.

    OUTPUT/config.json          what was asked for; `--config OUTPUT/config.json` asks for it again
    OUTPUT/points/NAME.json     a point: its config, its evaluations by step, some texts, seconds, versions
    OUTPUT/results.json         what the experiment makes of all points, beside its figures
    WORLD/                      what the points share (experiments/world.py)

The same command, given again or at the same time elsewhere, takes the points that are missing: as a Slurm array, or on
a slice of a pod for each. The directories must be shared, nothing else is.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from dpojax.errors import UserError
from dpojax.options import flag
from dpojax.runfile import options_of_fields
from experiments.claims import claimed
from experiments.common import AGAIN, fields_of_config, taken, write_json
from experiments.setting import PRESETS, Preset, Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What every sweep is asked for."""

    output: str
    """Directory of points, results and figures; the same command on it goes on."""
    world: str | None = None
    """Directory of what points share, the reference and its samples (default: world, in --output); sweeps of one
    setting can share it."""
    preset: Preset = "tiny"
    """Sizes: minutes on two CPU cores, hours on them with SmolLM2-135M, or the paper's for a pod."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A point is trained once for each: labels, order and samples are others."""
    processes: int = 1
    """Processes that train points side by side on this machine, each with its share of the cores."""
    only: tuple[str, ...] = ()
    """Train and show only points whose names contain one of these."""
    plan: str | None = None
    """Run nothing: compile DPO's step for accelerators that need not be here (v5e:2x4), as `dpojax plan` does."""
    setting: Setting = Setting()  # noqa: RUF009  # frozen
    """What points start from, and how much they compute; the preset's, but for what is given here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """What a sweep consists of, and what is made of it.

    Attributes:
      name: of the module, experiments.NAME.
      doc: the module's text, for --help.
      points: of the options, all seeds.
      show: ``(config, world, results, output) -> what results.json says``; it writes figures and tables beside that.
      changes: fields of a preset's setting that are others here.
      measure: ``(world) -> measure`` in place of :func:`~experiments.measure.make_measure`.
    """

    name: str
    doc: str
    points: Callable[[SweepConfig], list[Any]]
    show: Callable[[SweepConfig, Any, list[dict[str, Any]], Path], dict[str, Any]]
    changes: dict[Preset, dict[str, Any]] = dataclasses.field(default_factory=dict)
    measure: Callable[[Any], Callable] | None = None


def config_of(experiment: Experiment, args: Sequence[str] | None = None) -> SweepConfig:
    """The options of a command: a file's (--config), or a preset's, and those given beside it.

    Raises:
      UserError: the file is none of this experiment, or an option cannot be.
    """
    args = list(sys.argv[1:] if args is None else args)
    given = {name: taken(args, f"--{name}") for name in ("config", "preset")}
    if None not in given.values():
        raise UserError(f"--preset {given['preset']}: --config says it; leave one of them out")
    if given["config"] is not None:
        start = read_config(experiment, given["config"])
    else:
        start = preset_config(experiment, given["preset"] or "tiny")
    config = tyro.cli(
        SweepConfig,
        default=start,
        args=args,
        prog=f"python -m experiments.{experiment.name}",
        description=experiment.doc + AGAIN,
    )
    if config.processes < 1 or not config.seeds:
        name = "processes" if config.processes < 1 else "seeds"
        raise UserError(f"{flag(name)} {getattr(config, name)}: must be at least one")
    check_setting(config.setting)
    return config


def check_setting(setting: Setting) -> None:
    """Refuse sizes that cannot be.

    Raises:
      UserError: naming the option.
    """
    least = {"sft_steps": 0, "warmup_steps": 0, "group": 2, "rl_samples": 2}
    for name, value in dataclasses.asdict(setting).items():
        option = f"--setting.{name.replace('_', '-')} {value}"
        if isinstance(value, int) and value < least.get(name, 1):
            raise UserError(f"{option}: must be at least {least.get(name, 1)}")
        if isinstance(value, float) and value <= 0:
            raise UserError(f"{option}: must be above 0")
    if setting.samples % setting.group:
        raise UserError(f"--setting.samples {setting.samples}: must be a multiple of --setting.group {setting.group}")


def read_config(experiment: Experiment, path: str) -> SweepConfig:
    """The options in a config.json; what it does not give is the preset's.

    Raises:
      UserError: there is no such file, it is another experiment's, or a field is no option or ill-typed.
    """
    return of_plain(experiment, fields_of_config(experiment.name, path), f"--config {path}")


def preset_config(experiment: Experiment, preset: str, option: str = "--preset") -> SweepConfig:
    """The options of a preset, for an experiment.

    Raises:
      UserError: there is no such preset.
    """
    if preset not in PRESETS:
        raise UserError(f"{option} {preset}: must be one of {', '.join(PRESETS)}")
    setting = dataclasses.replace(PRESETS[preset], **experiment.changes.get(preset, {}))  # type: ignore[index, call-overload]
    return SweepConfig(output=f"runs/{experiment.name}", preset=preset, setting=setting)  # type: ignore[arg-type]


def plain(config: SweepConfig, experiment: Experiment) -> dict[str, Any]:
    """The options as config.json has them."""
    raw = json.loads(json.dumps(dataclasses.asdict(config)))
    return {"experiment": experiment.name, **raw, "mesh": raw["setting"].pop("mesh")}


def of_plain(experiment: Experiment, raw: dict[str, Any], where: str) -> SweepConfig:
    """The options that :func:`plain` gave, less the experiment's name.

    Raises:
      UserError: naming the file and the field.
    """
    start = plain(preset_config(experiment, raw.get("preset", "tiny"), f"{where}: preset"), experiment)
    del start["experiment"]
    given = {**start, **raw}
    for group, name in (("setting", "setting"), ("mesh", "setting.mesh")):
        fields = given.pop(group)
        if not isinstance(fields, dict):
            raise UserError(f"{where}: {group} is {json.dumps(fields)}, and must be an object; fix it in a copy")
        given |= {f"{name}.{field}": value for field, value in {**start[group], **fields}.items()}
    return options_of_fields(SweepConfig, given, where)


def claim_output(config: SweepConfig, experiment: Experiment) -> None:
    """Write config.json, or find that the directory is of the same sweep.

    Raises:
      UserError: it is of another.
    """
    file, mine = Path(config.output) / "config.json", plain(config, experiment)
    if file.exists():
        theirs = json.loads(file.read_text())
        ours = {**mine, **mine["setting"]}
        others = {**theirs, **theirs.get("setting", {})}
        loose = ("output", "world", "processes", "only", "seeds", "plan", "mesh", "setting")
        differing = sorted(k for k in ours.keys() | others.keys() if k not in loose and ours.get(k) != others.get(k))
        if differing:
            named = ", ".join(f"{k} ({others.get(k)!r} there, {ours.get(k)!r} here)" for k in differing)
            raise UserError(f"--output {config.output}: holds a sweep with another {named}; name another directory")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, mine)


def work(config: SweepConfig, experiment: Experiment, world: Any) -> None:
    """Train every point that nobody else has trained or is training."""
    from dpojax.progress import console
    from experiments.measure import make_measure

    points = asked_points(config, experiment)
    measures: dict[int | None, Callable] = {}
    for i, point in enumerate(points):
        file = Path(config.output) / "points" / f"{point.name}.json"
        if file.exists():
            continue
        with claimed(file) as mine:
            if not mine or file.exists():
                continue
            own = world.of_width(point.width)
            if point.width not in measures:
                measures[point.width] = (experiment.measure or make_measure)(own)
            record = trained(own, point, measures[point.width])
            write_json(file, record)
            last = record["curve"][-1]
            shown = ", ".join(f"{k} {x['mean']:.3f} ± {x['error']:.3f}" for k, x in list(last.items())[1:3])
            console.print(f"{i + 1}/{len(points)} {point.name}: {shown} ({record['seconds']:.0f} s)")


def trained(world: Any, point: Any, measure: Callable) -> dict[str, Any]:
    """A point's file, after training it."""
    from dpojax.train.session import commit_of, versions
    from experiments.points import train_point

    start = time.time()
    done = train_point(world, point, measure)
    return {
        "name": point.name,
        "method": point.method,
        "seed": point.seed,
        "config": dataclasses.asdict(point),
        "curve": done.curve,
        "texts": done.texts,
        "seconds": round(time.time() - start, 1),
        "versions": versions(),
        "commit": commit_of(Path(__file__).resolve().parent.parent),
    }


def side_by_side(config: SweepConfig, experiment: Experiment) -> int:
    """The same command in several processes, each with its share of the cores; returns their exit status."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    running = []
    for i in range(config.processes):
        mine = cores[i :: config.processes] or cores
        env = {**os.environ, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
        if len(mine) == 1:  # XLA's threads would only wait for each other
            env["XLA_FLAGS"] += " --xla_cpu_multi_thread_eigen=false"
        pinned = f"os.sched_setaffinity(0, {set(mine)})" if mine else "pass"
        code = f"import os; {pinned}; import experiments.sweep as sweep; sweep.child()"
        asked = json.dumps(plain(dataclasses.replace(config, processes=1), experiment))
        running.append(subprocess.Popen([sys.executable, "-c", code, asked], env=env))
    try:
        return max(process.wait() for process in running)
    except KeyboardInterrupt:
        for process in running:
            process.wait()
        raise


def child() -> None:
    """A process of :func:`side_by_side`."""
    import importlib

    from dpojax.cli import reporting

    raw = json.loads(sys.argv[1])
    experiment = importlib.import_module(f"experiments.{raw.pop('experiment')}").EXPERIMENT
    sys.exit(reporting(lambda: train_all(of_plain(experiment, raw, "options"), experiment)))


def world_of(config: SweepConfig) -> Any:
    """What the sweep's points share."""
    from experiments.world import World

    return World(config.setting, Path(config.world or Path(config.output) / "world"))


def asked_points(config: SweepConfig, experiment: Experiment) -> list[Any]:
    """The points that are trained and shown.

    Raises:
      UserError: there are none.
    """
    points = [p for p in experiment.points(config) if not config.only or any(part in p.name for part in config.only)]
    if not points and config.only:
        raise UserError(f"--only {' '.join(config.only)}: is in no point's name; see {config.output}/points")
    return points


def train_all(config: SweepConfig, experiment: Experiment) -> int:
    """Train what is missing, in this process.

    Raises:
      UserError: it is one of several that are one program; a point is trained by one, on all its devices.
    """
    from dpojax import processes
    from dpojax.startup import prepare

    prepare()
    processes.one_alone(f"experiments.{experiment.name}")
    work(config, experiment, world_of(config))
    return 0


def plan(setting: Setting, topology: str) -> int:
    """Plan DPO's step for a topology: 0 if it fits, 1 if not.

    Raises:
      UserError: the setting's model has no name.
    """
    from dpojax.configs import PlanConfig
    from dpojax.models.presets import PRESETS as SHAPES
    from dpojax.plan.command import run_plan
    from experiments.world import PROMPT_TOKENS

    if setting.model is None:
        raise UserError("--plan: plans a model that has a name; give --setting.model, or --preset paper")
    short = setting.model.rpartition("/")[2]
    options = PlanConfig(
        model=short if short in SHAPES else setting.model,
        topology=topology,
        batch_size=setting.batch_size,
        max_length=PROMPT_TOKENS[1] + setting.new_tokens,
        prompt_length=PROMPT_TOKENS[1],
        rows=setting.steps * setting.batch_size,
        optim=setting.optim,
        dtype=setting.dtype,
        mesh=setting.mesh,
    )
    return run_plan(options)


def run(experiment: Experiment, config: SweepConfig) -> int:
    """Train what is missing and show what there is; returns the exit status."""
    from dpojax.progress import console
    from dpojax.startup import prepare

    if config.plan is not None:
        return plan(config.setting, config.plan)
    claim_output(config, experiment)
    points, output = asked_points(config, experiment), Path(config.output)
    status = side_by_side(config, experiment) if config.processes > 1 else train_all(config, experiment)
    if status:
        return status
    files = [output / "points" / f"{point.name}.json" for point in points]
    missing = [file for file in files if not file.exists()]
    if missing:
        console.print(f"{len(files) - len(missing)} of {len(files)} points are there; other processes train the rest")
        return 0
    prepare()
    results = [json.loads(file.read_text()) for file in files]
    shown = experiment.show(config, world_of(config), results, output)
    write_json(output / "results.json", {"experiment": experiment.name, "preset": config.preset, **shown})
    console.print(f"{output / 'results.json'} and the figures beside it; `dpojax report {output}` makes a page of them")
    return 0


def main(experiment: Experiment, args: Sequence[str] | None = None) -> int:
    """The command line of an experiment."""
    from dpojax.cli import reporting

    return reporting(lambda: run(experiment, config_of(experiment, args)))
