"""Which mesh, rematerialisation and micro-batch: all that analysis says could fit are ranked, the best are compiled."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_type_hints

from dpojax.configs import ComputeOptions, MeshConfig, TrainOptions
from dpojax.errors import UserError
from dpojax.plan.analysis import estimate
from dpojax.plan.build import Built
from dpojax.plan.chips import Topology
from dpojax.plan.plan import Plan, make_plan
from dpojax.plan.report import ms

SLACK = 1.3
"""Analysis may be wrong by as much: what it takes for this many times too large is still tried, the last."""
LARGEST_TENSOR = 16
MICRO = (1, 2, 4, 8)

Build = Callable[[TrainOptions], Built]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run that could fit, and its step by analysis, seconds."""

    built: Built
    seconds: float
    fits: bool

    @property
    def words(self) -> str:
        """The options that say it."""
        config = self.built.config
        mesh = " ".join(f"--mesh.{axis} {n}" for axis, n in self.built.program.mesh.shape.items())
        return f"{mesh} --remat {config.remat} --gradient-accumulation-steps {config.gradient_accumulation_steps}"


@dataclasses.dataclass(frozen=True)
class Search:
    """What a search has found: how many ways there are, how many of them analysis rules out, and the plans of those
    that were compiled, in the order of the ranking."""

    tried: int
    ruled_out: int
    plans: tuple[tuple[Candidate, Plan], ...]

    @property
    def best(self) -> Plan:
        """The fastest that fits; where none does, the one that needs least."""
        fitting = [p for _, p in self.plans if p.fits]
        return (
            min(fitting, key=lambda p: p.seconds) if fitting else min((p for _, p in self.plans), key=lambda p: p.need)
        )


def meshes(topology: Topology, config: MeshConfig) -> Iterator[MeshConfig]:
    """Meshes of the topology's devices, whose other axes than data, fsdp and tensor are as the options have them."""
    names = ("data", "fsdp", "tensor")
    fixed = [n for name, n in dataclasses.asdict(config).items() if name not in names and isinstance(n, int) and n > 0]
    devices = topology.devices
    for n in fixed:
        devices //= n
    for tensor in _divisors(devices):
        if tensor > LARGEST_TENSOR:
            continue
        for data in _divisors(devices // tensor):
            yield dataclasses.replace(config, data=data, fsdp=devices // tensor // data, tensor=tensor)


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def remats() -> tuple[str, ...]:
    """The names that --remat takes."""
    return get_args(get_type_hints(ComputeOptions)["remat"])


def candidates(config: TrainOptions, topology: Topology, build: Build) -> tuple[list[Candidate], int]:
    """The ways to run that could fit, the fastest by analysis first, and how many there were before."""
    out, tried, chip = [], 0, topology.chip
    for mesh in meshes(topology, config.mesh):
        for micro in MICRO:
            if config.batch_size % micro:
                continue
            for remat in remats():
                options: dict[str, Any] = {"mesh": mesh, "remat": remat, "gradient_accumulation_steps": micro}
                tried += 1
                try:
                    built = build(dataclasses.replace(config, **options))
                except UserError:  # the mesh does not divide the model or the batch
                    continue
                guess = estimate(built)
                if guess.total_memory <= SLACK * chip.memory:
                    seconds = guess.seconds(chip.flops, chip.bandwidth)
                    out.append(Candidate(built, seconds, guess.total_memory <= chip.memory))
    return sorted(out, key=lambda c: (not c.fits, c.seconds)), tried


def search(
    config: TrainOptions,
    topology: Topology,
    build: Build,
    number: int,
    report: Callable[[str], None] = lambda line: None,
) -> Search:
    """The best of the ways to run.

    Args:
      config: the options; mesh, remat and micro-batches are chosen.
      topology: the devices.
      build: the program of options on these devices.
      number: how many are planned, and so compiled.
      report: called with a sentence on each.

    Raises:
      UserError: none could fit.
    """
    ranked, tried = candidates(config, topology, build)
    if not ranked:
        raise UserError(f"--search {number}: no mesh of {topology.name} fits this model and batch; use more chips")
    report(f"{tried} ways to run; {len(ranked)} could fit by analysis; compiling the best {min(number, len(ranked))}")
    plans = []
    for candidate in ranked[:number]:
        found = make_plan(candidate.built)
        plans.append((candidate, found))
        outcome = ms(found.seconds) if not found.refused else "too large"
        fits = "fits" if found.fits else "does not fit"
        report(f"  {candidate.words}: {outcome}, {fits} (by analysis {ms(candidate.seconds)})")
    return Search(tried, tried - len(ranked), tuple(plans))
