"""``dpojax plan``, and ``dpojax dpo ... --plan``."""

import json
from pathlib import Path

import jax
from rich.console import Console

from dpojax.configs import PlanConfig, TrainOptions
from dpojax.errors import UserError
from dpojax.options import check_options
from dpojax.plan.build import Built, build, completions_of, devices_of, run_options
from dpojax.plan.chips import topology_of
from dpojax.plan.plan import Plan, make_plan
from dpojax.plan.report import as_json, show
from dpojax.plan.search import search
from dpojax.plan.workload import read_lengths
from dpojax.progress import console
from dpojax.train.task import task_of


def plan_of(config: PlanConfig) -> tuple[Plan, int | None]:
    """The plan that a command asks for, and the rows of its data set.

    Raises:
      UserError: bad options, as the run itself would say, or no such topology.
    """
    options = run_options(config)
    check_options(options)
    topology = topology_of(config.topology)
    lengths = None
    if config.lengths is not None:
        if config.prompt_length is not None:
            raise UserError(
                f"--prompt-length {config.prompt_length}: --lengths says how long prompts are; leave it out"
            )
        lengths = read_lengths(config.lengths, completions_of(task_of(options)), config.max_length)
    rows = config.rows or (None if lengths is None else len(lengths))
    devices = devices_of(topology)
    source = "" if lengths is None else f"lengths of the {len(lengths)} rows of {config.lengths}, the largest batch"

    def built(options: TrainOptions) -> Built:
        return build(options, topology, devices, prompt_length=config.prompt_length, lengths=lengths, source=source)

    if config.search:
        return search(options, topology, built, config.search, console.print).best, rows
    return make_plan(built(options)), rows


def run_plan(config: PlanConfig) -> int:
    """``dpojax plan``: 0 if it fits, 1 if not."""
    without_accelerators()
    if config.json is not None and not Path(config.json).absolute().parent.is_dir():
        raise UserError(f"--json {config.json}: is in no directory that exists; name a file")
    found, rows = plan_of(config)
    show(found, Console(soft_wrap=True, highlight=False), rows=rows, top=config.top)
    if config.json is not None:
        Path(config.json).write_text(json.dumps(as_json(found, rows=rows), indent=1) + "\n", encoding="utf-8")
    return 0 if found.fits else 1


def plan_run(config: TrainOptions) -> int:
    """``dpojax dpo ... --plan`` and ``dpojax sft ... --plan``: the plan of this run; 0 if it fits, 1 if not."""
    without_accelerators()
    check_options(config)
    assert config.plan is not None
    topology = topology_of(config.plan)
    found = make_plan(build(config, topology, devices_of(topology)))
    show(found, Console(soft_wrap=True, highlight=False))
    return 0 if found.fits else 1


def without_accelerators() -> None:
    """A plan takes no accelerator of this machine, which another process may be using."""
    if getattr(jax.config, "jax_platforms", None) != "cpu":
        jax.config.update("jax_platforms", "cpu")
