"""A plan: whether a run fits, how long a step takes, and what bounds it; compiled for a TPU, analysed for a GPU."""

import dataclasses
import time
import warnings
from collections.abc import Mapping
from typing import Any

import jax

from dpojax.models import abstract_params
from dpojax.plan.account import Account, account_of
from dpojax.plan.analysis import Estimate, estimate, flops_of_model
from dpojax.plan.build import Built, abstract_batch, state_bytes
from dpojax.plan.flops import Visits
from dpojax.plan.hlo import parse
from dpojax.plan.workload import ModelFlops
from dpojax.train.program import abstract_inputs

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program as the compiler has it: its account, its memory by what the compiler calls it, and how long it took.

    ``refused`` is what the compiler said of a program that it found too large; then nothing else is known.
    """

    account: Account | None = None
    memory: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    refused: str | None = None


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least seconds of a step by each of three bounds, everything else hidden behind it."""

    compute: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.links)

    @property
    def binds(self) -> str:
        """Which of them is the highest."""
        named = {"compute": self.compute, "memory": self.memory, "interconnect": self.links}
        return max(named, key=lambda name: named[name])


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run before it runs. All figures are of one device and one step, unless they say otherwise.

    Attributes:
      built: the run.
      model: FLOPs that the model needs, of the whole batch.
      memory: bytes by what they are for.
      limit: bytes that a device has.
      step, reference: the compiled programs; None where the figures are an analysis.
      estimate: the analysis.
    """

    built: Built
    model: ModelFlops
    memory: Mapping[str, float]
    limit: float
    estimate: Estimate
    step: Compiled | None = None
    reference: Compiled | None = None

    @property
    def compiled(self) -> list[Compiled]:
        return [c for c in (self.step, self.reference) if c is not None]

    @property
    def accounts(self) -> list[Account]:
        return [c.account for c in self.compiled if c.account is not None]

    @property
    def refused(self) -> str | None:
        """What the compiler said where a program is too large for it."""
        return next((c.refused for c in self.compiled if c.refused), None)

    @property
    def need(self) -> float:
        """Bytes that the run takes."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.refused is None and self.need <= self.limit

    @property
    def flops(self) -> float:
        """Of the programs."""
        return sum(a.flops.total for a in self.accounts) if self.step else self.estimate.flops

    @property
    def recomputed(self) -> float:
        """FLOPs that repeat the forward pass: of layers, and of logits, which the backward pass projects again."""
        if not self.step:
            return self.estimate.recomputed
        account = self.accounts[0]
        again = account.flops.unembedding - self.model.unembedding / self.built.program.mesh.size
        return account.flops.recomputed + max(0.0, again)

    @property
    def waste(self) -> float:
        """FLOPs that are neither the model's nor recomputation: padding, blocks of scores that are mostly masked."""
        return self.flops - self.model.total / self.built.program.mesh.size - self.recomputed

    @property
    def roofline(self) -> Roofline:
        chip = self.built.topology.chip
        if not self.step:
            e = self.estimate
            return Roofline(e.flops / chip.flops, e.memory_bytes / chip.bandwidth, sum(e.links.values()))
        accounts = self.accounts
        moved, links = sum(a.memory_bytes for a in accounts), sum(a.link_seconds for a in accounts)
        return Roofline(self.flops / chip.flops, moved / chip.bandwidth, links)

    @property
    def seconds(self) -> float:
        """Of a step, a live reference's forward pass included."""
        chip = self.built.topology.chip
        if not self.step:
            return self.estimate.seconds(chip.flops, chip.bandwidth)
        return sum(a.seconds for a in self.accounts)

    def mfu(self, seconds: float) -> float:
        """Model-FLOPs utilisation of a step of these seconds: of the peak, the share that the model's FLOPs need."""
        return self.model.total / self.built.program.mesh.size / self.built.topology.chip.flops / seconds

    def epoch_hours(self, rows: int) -> float:
        """Chip-hours of a pass over a data set."""
        steps = -(-rows // self.built.work.rows)
        return steps * self.seconds * self.built.topology.chips / 3600

    def reference_hours(self, rows: int) -> float:
        """Chip-hours of a cached reference's pass before the first step: its FLOPs at the step's rate."""
        if self.built.task.reference.form != "cached":
            return 0.0
        return self.epoch_hours(rows) / 3


def visits_of(built: Built) -> Visits:
    """What the kernels of a run work on."""
    shape = built.start.config
    windows = tuple(shape.kind(i).window for i in range(shape.layers))
    experts = 0 if shape.experts is None else shape.experts.number
    return Visits(built.work.prompt, built.work.completion, windows, experts)


def shares_of(built: Built) -> list[float]:
    """How often each branch of a switch between kinds of layers is taken, in the order of the branches."""
    shape = built.program.layout.config
    kinds = [dataclasses.replace(shape.kind(i), scale=None) for i in range(shape.layers)]
    return [kinds.count(kind) / len(kinds) for kind in dict.fromkeys(kinds)]


def compile_program(built: Built, lowered: Any) -> Compiled:
    """A lowered program compiled for its devices, and its account."""
    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            # Where JAX keeps compiled programs, it finds that it cannot read one back without the devices.
            warnings.filterwarnings("ignore", message="Error reading persistent compilation cache entry")
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(seconds=time.monotonic() - start, refused=sentence_of(str(error)))
    spent = time.monotonic() - start
    analysis = compiled.memory_analysis()
    memory = {
        name: float(getattr(analysis, f"{name}_size_in_bytes", 0))
        for name in ("argument", "output", "alias", "temp", "generated_code")
    }
    memory["peak"] = float(getattr(analysis, "peak_memory_in_bytes", 0))
    chip = built.topology.chip
    account = account_of(
        parse(compiled.as_text()), chip, built.layout, shares=shares_of(built), visits=visits_of(built)
    )
    return Compiled(account, memory, spent)


def sentence_of(message: str) -> str:
    """What the compiler said of memory, without the list of its allocations."""
    line = message.split("RESOURCE_EXHAUSTED:", 1)[-1].strip().split("\n")[0]
    return line.strip()


def make_plan(built: Built) -> Plan:
    """The plan of a run.

    For a TPU its train step, and where the reference runs in every step the reference's, are compiled; not where what
    lies on a device between steps is too large already.
    """
    guess, model, chip = estimate(built), flops_of_model(built), built.topology.chip
    state = state_bytes(built)
    if chip.gpu or state["parameters"] + state["optimizer"] + state["reference"] > chip.memory:
        return Plan(built, model, dict(guess.memory), chip.memory, guess)
    batch, reference = abstract_batch(built), None
    inputs = abstract_inputs(built.program, batch)
    step = compile_program(built, built.program.step.lower(*inputs))  # type: ignore[attr-defined]
    if built.live and step.refused is None:
        params = abstract_params(built.reference, built.program.mesh)
        whole = dataclasses.replace(inputs[1], hidden=None)
        reference = compile_program(built, built.program.ref_step.lower(params, whole))
    return Plan(built, model, memory_of(built, step, reference, guess), chip.memory, guess, step, reference)


def memory_of(built: Built, step: Compiled, reference: Compiled | None, guess: Estimate) -> dict[str, float]:
    """Bytes of a device by what they are for, of compiled programs.

    What lies there between steps is exact by shapes and shardings, and the sum is the compiler's: arguments, what of
    the results does not take their place, temporaries and the program itself. Gradients, whose size is exact too, are
    of the temporaries; activations are what is left of them.
    """
    if step.refused is not None:
        return dict(guess.memory)
    state, m = state_bytes(built), step.memory
    other = m["argument"] - state["parameters"] - state["optimizer"]
    temporary = max(m["temp"], reference.memory["temp"] if reference is not None and reference.memory else 0.0)
    gradients = min(state["gradients"], temporary)
    programs = sum(c.memory.get("generated_code", 0.0) for c in (step, reference) if c is not None)
    return {
        "parameters": state["parameters"],
        "optimizer": state["optimizer"],
        "gradients": gradients,
        "reference": state["reference"],
        "activations and other temporaries": temporary - gradients,
        "batch, results, program": max(0.0, other) + m["output"] - m["alias"] + programs,
    }
