"""Where a compiled step's time goes: the TPU compiler's own estimates, and stated models of what it estimates nothing.

The compiler writes into each fusion, copy and most elementwise instructions how many cycles it expects
(``estimated_cycles``). Kernels, gathers, scatters and collectives carry none. Here a kernel takes its FLOPs at half of
the peak, a gather its result twice, and a scatter operands and result, over 82 % of the memory's published bandwidth
(the share that the compiler's estimates of elementwise instructions come to), and collectives a ring model
(:mod:`dpojax.plan.collectives`). An asynchronous collective costs what the instructions of its computation, and of the
loops inside, do not hide.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from dpojax.plan.chips import Chip
from dpojax.plan.collectives import KINDS, Collective, Layout, collectives_of
from dpojax.plan.flops import Flops, Visits, flops_of, kernel_flops
from dpojax.plan.hlo import Instruction, Module, deep, executed, runs_of
from dpojax.plan.traffic import memory_bytes

KERNEL_SHARE = 0.5
"""Of the peak, at which kernels are taken to run."""
GATHER_SHARE = 0.82
"""Of the memory's bandwidth, at which gathers and scatters are taken to run."""
MOVES = {"copy", "transpose", "reshape", "bitcast", "parameter", "slice", "concatenate", "pad", "constant", "broadcast"}
MOVES |= {"dynamic-slice", "tuple", "get-tuple-element", "iota", "select", "compare", "convert", "copy-start"}
HIDDEN = {"copy-done", "slice-start", "slice-done", "async-start", "async-done", "async-update"}


@dataclasses.dataclass(frozen=True)
class Line:
    """Seconds of a step at one source line: the compiler's (``estimated``) or a model's."""

    source: str
    kind: str
    seconds: float
    estimated: bool


@dataclasses.dataclass(frozen=True)
class Account:
    """The time of one run of a program on one device.

    Attributes:
      estimated: seconds by the compiler's estimates, by kind of instruction.
      modelled: seconds of kernels, gathers and scatters by the models.
      collectives: every collective, by the ring model.
      exposed: seconds of collectives that nothing hides, by kind and mesh axes.
      hidden: seconds of asynchronous collectives behind other instructions.
      flops: of one device.
      memory_bytes: over the device's memory.
      lines: source lines by what they cost, the dearest first; collectives are not among them.
      trips: of the loops.
      unknown: loops whose passes are not known, and that are counted once.
      uncounted: instructions without an estimate or a model, by operation and how often they run.
    """

    estimated: Mapping[str, float]
    modelled: Mapping[str, float]
    collectives: Sequence[Collective]
    exposed: Mapping[tuple[str, str], float]
    hidden: float
    flops: Flops
    memory_bytes: float
    lines: Sequence[Line]
    trips: Mapping[str, int]
    unknown: tuple[str, ...]
    uncounted: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Of the whole program."""
        return sum(self.estimated.values()) + sum(self.modelled.values()) + sum(self.exposed.values())

    @property
    def link_seconds(self) -> float:
        """Of all collectives, one after another."""
        return sum(c.total_seconds for c in self.collectives)


def kind_of(module: Module, i: Instruction) -> str:
    """What an instruction mainly does."""
    if i.op == "custom-call":
        return "kernel" if i.target == "tpu_custom_call" else "other"
    if i.op.startswith(KINDS):
        return "collective"
    inner = module.inside(i)
    ops = Counter([i.op]) if inner is None else Counter(part.op for _, part in deep(module, inner))
    if ops["convolution"] or ops["dot"]:  # an asynchronous collective may go on inside
        return "products"
    if any(op.startswith(KINDS) for op in ops):
        return "collective"
    for op in ("gather", "scatter", "sort"):
        if ops[op]:
            return op
    if i.op in HIDDEN:
        return "copies beside others"
    if ops["dynamic-update-slice"]:
        return "updates in place"
    if ops["reduce"]:
        return "reductions"
    return "moves and fills" if set(ops) <= MOVES else "elementwise"


def modelled_seconds(kind: str, i: Instruction, operands: Sequence[Instruction], chip: Chip, visits: Visits) -> float:
    """Seconds of a kernel, a gather or a scatter by the models at the top of this file; 0 for other kinds."""
    if kind == "kernel":
        return kernel_flops(i, visits) / (KERNEL_SHARE * chip.flops)
    written = sum(a.bytes for a in i.arrays)
    read = sum(a.bytes for o in operands for a in o.arrays)
    size = {"gather": 2 * written, "scatter": written + read}.get(kind, 0.0)
    return size / (GATHER_SHARE * chip.bandwidth)


def account_of(
    module: Module, chip: Chip, layout: Layout, *, shares: Sequence[float] = (), visits: Visits | None = None
) -> Account:
    """The account of a program compiled for a TPU.

    Args:
      module: the program.
      chip: its device.
      layout: its devices.
      shares: how often each branch of a conditional is taken, where it has as many.
      visits: which blocks attention's kernels visit (default: all of their grids).
    """
    runs, visits = runs_of(module, shares), visits or Visits()
    estimated: dict[str, float] = defaultdict(float)
    modelled: dict[str, float] = defaultdict(float)
    lines: dict[tuple[str, str, bool], float] = defaultdict(float)
    busy: dict[str, float] = defaultdict(float)
    uncounted: dict[str, float] = defaultdict(float)
    for computation, i, times in executed(module, runs):
        kind = kind_of(module, i)
        known = i.cycles is not None
        if known:
            seconds = times * (i.cycles or 0) / chip.clock
        else:
            seconds = times * modelled_seconds(kind, i, computation.operands(i), chip, visits)
        if seconds:
            (estimated if known else modelled)[kind] += seconds
            lines[module.line(i), kind, known] += seconds
            busy[computation.name] += seconds
        elif not known and kind not in ("collective", "copies beside others"):
            uncounted[i.op] += times
    collectives = collectives_of(module, runs, layout)
    exposed, hidden = exposed_of(collectives, busy, module.entry, runs.inner)
    ordered = [Line(*key[:2], seconds, key[2]) for key, seconds in sorted(lines.items(), key=lambda kv: -kv[1])]
    return Account(
        estimated=dict(estimated),
        modelled=dict(modelled),
        collectives=collectives,
        exposed=exposed,
        hidden=hidden,
        flops=flops_of(module, runs, visits),
        memory_bytes=memory_bytes(module, runs),
        lines=ordered,
        trips=runs.trips,
        unknown=runs.unknown,
        uncounted=dict(uncounted),
    )


def exposed_of(
    collectives: Sequence[Collective], busy: Mapping[str, float], entry: str, inner: Mapping[str, Sequence[str]]
) -> tuple[dict[tuple[str, str], float], float]:
    """Seconds of collectives that nothing hides, by kind and mesh axes, and the seconds that are hidden.

    Args:
      collectives: of a program.
      busy: seconds of the other instructions of each computation, over all of its runs.
      entry: the outermost computation.
      inner: the computations that each runs, whose instructions hide its collectives too, where they hide none of
        their own.
    """
    exposed: dict[tuple[str, str], float] = defaultdict(float)
    behind: dict[str, float] = defaultdict(float)
    for c in collectives:
        if c.asynchronous:
            behind[c.computation] += c.total_seconds
        else:
            exposed[c.kind, c.axes] += c.total_seconds
    hidden = 0.0

    def free(computation: str) -> float:
        """Seconds of a computation that hide nothing yet."""
        nonlocal hidden
        seconds = busy.get(computation, 0.0) + sum(free(name) for name in inner.get(computation, ()))
        covered = min(behind[computation], seconds)
        hidden += covered
        if behind[computation] > covered:
            exposed["asynchronous, not hidden", "all"] += behind[computation] - covered
        return seconds - covered

    free(entry)
    return dict(exposed), hidden
