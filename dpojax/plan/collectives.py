"""The collectives of a compiled program: bytes, mesh axes, and seconds by a model of rings, as compilers estimate none.

The model (jax-ml.github.io/scaling-book, "Sharded matrices"): an all-gather or reduce-scatter of an array of F bytes
over n devices takes ``F (n - 1) / n`` over the bandwidth into a device, an all-reduce twice that. The bandwidth is a
link's times the links that the group uses: along each axis of the torus that it extends over, two where the axis is a
ring and the group has all of it, else one. An all-to-all is bound by the middle of the longest axis, of k chips:
``k F / 8`` over a link, ``k F / 4`` where it is no ring. A permute takes F over a link, as often as its longest hop.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from dpojax.plan.chips import Topology
from dpojax.plan.hlo import Instruction, Module, Runs, deep, executed

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "ragged-all-to-all", "all-to-all", "collective-permute")
Place = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the mesh's devices are, in the order of the mesh, by which programs number them.

    Attributes:
      axes: names of the mesh axes.
      sizes: devices along each.
      topology: what they are part of; None where there are no links to speak of.
      places: each device's coordinates on the torus.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    topology: Topology | None = None
    places: tuple[Place, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.sizes)

    def axes_of(self, group: Sequence[int]) -> str:
        """The mesh axes along which the devices of a group differ, as ``data+fsdp``."""
        at = np.stack(np.unravel_index(np.asarray(group), self.sizes), axis=1)
        return "+".join(name for name, column in zip(self.axes, at.T, strict=True) if len(set(column)) > 1) or "none"

    def spans(self, group: Sequence[int]) -> list[tuple[int, bool]]:
        """For each axis of the torus that a group extends over, its chips along it, and whether they are a ring."""
        if self.topology is None:
            return []
        columns = [sorted({self.places[d][axis] for d in group}) for axis in range(len(self.topology.shape))]
        whole = [self.topology.closes(a) and len(c) == self.topology.shape[a] for a, c in enumerate(columns)]
        return [(len(column), ring) for column, ring in zip(columns, whole, strict=True) if len(column) > 1]

    def hops(self, start: int, end: int) -> int:
        """Links between two devices, at least one."""
        if self.topology is None:
            return 1
        total = 0
        for axis, size in enumerate(self.topology.shape):
            apart = abs(self.places[start][axis] - self.places[end][axis])
            total += min(apart, size - apart) if self.topology.closes(axis) else apart
        return max(total, 1)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: what it does.
      bytes: F, of the whole array: a gather's result, a reduction's input; on one device.
      group: numbers of the devices that exchange it, of the first group.
      axes: the mesh axes between which it goes.
      times: how often it runs in a step.
      seconds: of one run, by the model.
      asynchronous: other instructions run meanwhile.
      computation: where it runs.
      op_name: JAX's name of what it is for.
      source: the innermost source line.
    """

    kind: str
    bytes: float
    group: tuple[int, ...]
    axes: str
    times: float
    seconds: float
    asynchronous: bool
    computation: str
    op_name: str = ""
    source: str = ""

    @property
    def total_bytes(self) -> float:
        """Bytes that a device receives in a step."""
        n = len(self.group)
        share = (n - 1) / n if self.kind != "collective-permute" else 1.0
        return self.times * self.bytes * share * (2 if self.kind == "all-reduce" else 1)

    @property
    def total_seconds(self) -> float:
        return self.times * self.seconds


def collectives_of(module: Module, runs: Runs, layout: Layout) -> list[Collective]:
    """Every collective that runs, those inside of fusions too.

    A TPU's compiler spreads one over several fusions: it is started in one, goes on beside the products of others, and
    is done in the last. It is counted where it is started. (Channels do not tell collectives apart: all of
    ``shard_map``'s have the same.)
    """
    out = []
    for computation, i, times in executed(module, runs):
        inner = module.inside(i)
        for where, part in [(computation, i)] if inner is None else deep(module, inner):
            if not part.op.startswith(KINDS) or part.op.endswith("-done"):
                continue
            marks = {user.target for user in where.users.get(part.name, ())}
            starts = part.op.endswith("-start") or START in marks
            if starts or not (DONE in marks or where.name.startswith(GOES_ON)):
                out.append(_collective(module, layout, i, part, times, computation.name, starts))
    return [c for c in out if len(c.group) > 1]


START, DONE, GOES_ON = "AsyncCollectiveStart", "AsyncCollectiveDone", "async_collective_fusion"
"""Custom calls that start and end an asynchronous collective, and the fusions beside whose products it goes on."""


def _collective(
    module: Module,
    layout: Layout,
    outer: Instruction,
    part: Instruction,
    times: float,
    computation: str,
    starts: bool,
) -> Collective:
    kind = next(k for k in KINDS if part.op.startswith(k))
    inner = outer.called("calls") or ""
    scatters = kind == "all-reduce" and (inner.startswith("all-reduce-scatter") or "AllReduceScatter" in outer.rest)
    kind = "reduce-scatter" if scatters else kind
    sizes = [a.bytes for a in part.arrays if a.shape]
    if part.op.endswith("-start"):  # its type names operands, results and semaphores
        sizes = [max(sizes, default=0.0)]
    F, group = sum(sizes), group_of(part, layout.size)
    if part.op.startswith("reduce-scatter"):
        F *= len(group)
    op_name = part.op_name or outer.op_name
    source = module.line(part if part.text("stack_frame_id=(.)") else outer)
    seconds = seconds_of(kind, F, group, layout, pairs_of(part))
    axes = layout.axes_of(group)
    return Collective(kind, F, group, axes, times, seconds, starts, computation, op_name, source)


def seconds_of(
    kind: str, F: float, group: Sequence[int], layout: Layout, pairs: Sequence[tuple[int, int]] = ()
) -> float:
    """Seconds of one collective by the model at the top of this file; 0 where there is no topology."""
    if layout.topology is None or len(group) < 2:
        return 0.0
    link, n = layout.topology.chip.link, len(group)
    spans = layout.spans(group)
    if kind == "collective-permute":
        return F / link * max((layout.hops(a, b) for a, b in pairs), default=1)
    if kind.endswith("all-to-all"):
        return max((k * F / (8 if ring else 4) / link for k, ring in spans), default=F / link)
    lanes = sum(2 if ring else 1 for _, ring in spans) or 1
    return F * (n - 1) / n / (link * lanes) * (2 if kind == "all-reduce" else 1)


# ---- which devices --------------------------------------------------------------------------------------------------


def pairs_of(i: Instruction) -> list[tuple[int, int]]:
    """The (source, target) devices of a permute."""
    text = i.text(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}") or ""
    return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", text)]


def group_of(i: Instruction, devices: int) -> tuple[int, ...]:
    """The first of a collective's groups of devices, in any of the forms in which XLA prints them; all devices where it
    prints none."""
    if pairs := pairs_of(i):
        return _cycle(pairs)
    if (named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", i.rest)) is not None:
        return _of_mesh(named[1], named[2])
    if (iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.rest)) is not None:
        shape = tuple(map(int, iota[3].split(",")))
        ids = np.arange(math.prod(shape)).reshape(shape)
        ids = ids if iota[4] is None else ids.transpose(tuple(map(int, iota[4].split(","))))
        return tuple(ids.reshape(-1, int(iota[2]))[0].tolist())
    if (listed := i.text(r"replica_groups=\{\{([\d,]+)\}")) is not None:
        return tuple(map(int, listed.split(",")))
    return tuple(range(devices))


def _cycle(pairs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The devices that the first source's data reach."""
    following = dict(pairs)
    out = [pairs[0][0]]
    while (after := following.get(out[-1])) is not None and after not in out:
        out.append(after)
    return tuple(out)


def _of_mesh(sizes: str, axes: str) -> tuple[int, ...]:
    """The first group of ``mesh['a'=4,'b'=2] {'a'}``, where ``'a':(2)2`` is a part of an axis."""
    shape = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", sizes)}
    strides, stride = {}, math.prod(shape.values())
    for name, n in shape.items():
        stride //= n
        strides[name] = stride
    group = [0]
    for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes):
        count = int(part) if part else shape[name]
        step = strides[name] * (shape[name] // (int(before) * count) if part else 1)
        group = [at + k * step for at in group for k in range(count)]
    return tuple(group)
