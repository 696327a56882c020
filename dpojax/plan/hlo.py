"""A compiled program's text, as XLA prints it, to computations and instructions; how often each runs, and where from.

XLA prints no types of operands in scheduled modules, so they are looked up among the computation's instructions.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3": 1}

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\](?:\{{([^}}]*)\}})?")
PACKAGE = "dpojax/"
TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


@dataclasses.dataclass(frozen=True)
class Array:
    """The dtype and shape of one array, and whether it lies in a TPU core's own memory (VMEM, SMEM) instead of HBM."""

    dtype: str
    shape: tuple[int, ...]
    on_core: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        return self.size * BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: its name, its type's text, operation, operands' names, and the rest of the line."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    rest: str
    root: bool = False

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of its type, of a tuple each."""
        found = ARRAY.findall(self.type)
        return tuple(Array(d, tuple(map(int, s.split(","))) if s else (), "S(" in layout) for d, s, layout in found)

    def called(self, key: str) -> str | None:
        """The computation that an attribute names, as in ``calls=%fused``."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None

    def text(self, pattern: str) -> str | None:
        """The first group of a pattern in its attributes."""
        found = re.search(pattern, self.rest)
        return found[1] if found else None

    @property
    def op_name(self) -> str:
        """JAX's name of what it computes, as in ``jit(train_step)/.../dot_general``."""
        return self.text(r'op_name="([^"]*)"') or ""

    @property
    def target(self) -> str | None:
        """What a custom call calls."""
        return self.text(r'custom_call_target="([^"]+)"') if self.op == "custom-call" else None

    @property
    def cycles(self) -> int | None:
        """The TPU compiler's estimate; None where it makes none."""
        found = self.text(r'"estimated_cycles":"?(\d+)')
        return int(found) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @functools.cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """Which instructions read each."""
        out: dict[str, list[Instruction]] = {}
        for i in self.instructions:
            for name in dict.fromkeys(i.operands):
                out.setdefault(name, []).append(i)
        return {name: tuple(readers) for name, readers in out.items()}

    @property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.root), self.instructions[-1])

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that it reads."""
        return [self.by_name[name] for name in instruction.operands if name in self.by_name]


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program: its computations by name, the entry's name, and the tables of its source lines."""

    computations: Mapping[str, Computation]
    entry: str
    tables: Mapping[str, Mapping[int, str]]

    def inside(self, instruction: Instruction) -> Computation | None:
        """The computation that a fusion or a call runs as one."""
        name = instruction.called("calls") or instruction.called("to_apply")
        return self.computations.get(name) if name and instruction.op in ("fusion", "call", "async-start") else None

    def line(self, instruction: Instruction) -> str:
        """The innermost line of this package that an instruction comes from, or else the innermost of all; of what the
        compiler made by itself, its name without the number."""
        lines = self.source(instruction)
        own = next((line.removeprefix(PACKAGE) for line in lines if line.startswith(PACKAGE)), None)
        name = re.sub(r"[.\d]+$", "", instruction.name)
        return own or (lines or [f"no source line: {name}"])[0]

    def source(self, instruction: Instruction) -> list[str]:
        """Source lines of an instruction, the innermost first, as ``dpojax/models/block.py:78 project``."""
        frames: Mapping[int, str] = self.tables.get("StackFrames", {})
        out: list[str] = []
        at = int(instruction.text(r"\bstack_frame_id=(\d+)") or 0)
        while at in frames and len(out) < 64:
            place, parent = frames[at], re.search(r"parent_frame_id=(\d+)", frames[at])
            line = self._line(int(re.search(r"file_location_id=(\d+)", place)[1]))  # type: ignore[index]
            if line:
                out.append(line)
            at = int(parent[1]) - 1 if parent else 0  # counted from 1, and 1 is none
        return out

    def _line(self, location: int) -> str | None:
        found = re.search(
            r"file_name_id=(\d+) function_name_id=(\d+) line=(\d+)", self.tables["FileLocations"][location]
        )
        if found is None:
            return None
        path = self.tables["FileNames"][int(found[1])].strip('"')
        function = self.tables["FunctionNames"][int(found[2])].strip('"').replace(".<locals>", "")
        own = path.rpartition(f"/{PACKAGE}")
        file = PACKAGE + own[2] if own[1] else "/".join(path.split("/")[-2:])
        return f"{file}:{found[3]} {function}"


def parse(text: str) -> Module:
    """The module of a compiled program's text (``compiled.as_text()``)."""
    computations: dict[str, Computation] = {}
    tables: dict[str, dict[int, str]] = {}
    entry, lines, table = "", list(_joined(text)), None
    name, current = "", []  # type: tuple[str, list[Instruction]]

    def close() -> None:
        if name:
            computations[name] = Computation(name, tuple(current))

    for line in lines:
        if line in TABLES:
            close()
            name, table = "", line
            tables[table] = {}
        elif table is not None and (row := re.match(r"(\d+) (.*)$", line)):
            tables[table][int(row[1])] = row[2]
        elif header := COMPUTATION.match(line):
            close()
            name, current, table = header[2], [], None
            entry = name if header[1] else entry
        elif name and (found := INSTRUCTION.match(line)):
            current.append(_instruction(found[2], found[3], root=bool(found[1])))
    close()
    return Module(computations, entry, tables)


def _joined(text: str) -> Iterator[str]:
    """Lines, an instruction's attributes of several lines as one."""
    held = ""
    for line in text.splitlines():
        if held and not (INSTRUCTION.match(line) or line.startswith(("%", "ENTRY")) or line.strip() in ("", "}")):
            held += " " + line.strip()
            continue
        if held:
            yield held
        held = line if INSTRUCTION.match(line) else ""
        if not held:
            yield line
    if held:
        yield held


def _instruction(name: str, text: str, *, root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    kind, tail = text[:end], text[end:].lstrip()
    opening = tail.find("(")
    op, closing = tail[:opening], _closing(tail, opening)
    operands = tuple(re.findall(r"%([\w.\-]+)", tail[opening:closing]))
    rest = tail[opening:] if op in ("constant", "parameter") else tail[closing + 1 :]
    return Instruction(name, kind, op, operands, rest, root)


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at ``start`` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return len(text)


# ---- how often ------------------------------------------------------------------------------------------------------


def trip_count(module: Module, within: Computation, loop: Instruction) -> int | None:
    """Passes of a while loop; None where they are not known.

    They are as XLA notes them, or, as a TPU's compiler does not, read from the loop: its condition compares a counter
    with a constant (``i < constant``), its body adds a constant to it, and before it the counter is a constant.
    ``lax.scan`` and ``lax.map`` make such loops, which count by one from zero; what the compiler makes of a product
    whose factor is gathered piece by piece may count by two.

    Args:
      module: the program.
      within: the computation that the loop is part of.
      loop: the ``while``.
    """
    noted = loop.text(r'known_trip_count"?:\{"?n"?:"?(\d+)')
    if noted:
        return int(noted)
    condition = module.computations.get(loop.called("condition") or "")
    found = None if condition is None else _limit(condition)
    if found is None:
        return None
    limit, counter = found
    body = module.computations.get(loop.called("body") or "")
    step = 1 if body is None or counter is None else _step(module, body, counter)
    start = 0 if counter is None else _start(within, loop, counter)
    return max(0, -(-(limit - start) // step))


def _limit(condition: Computation) -> tuple[int, int | None] | None:
    """What a condition compares a counter with, and the counter's place in the loop's tuple."""
    numbers = {i.name: int(n) for i in condition.instructions if (n := _constant(i)) is not None}
    for i in condition.instructions:
        compares = i.op == "compare" and "direction=LT" in i.rest
        if compares or i.op == "fusion":  # of a compare alone
            limits = [numbers[name] for name in i.operands if name in numbers]
            places = [o.text(r"index=(\d+)") for o in condition.operands(i) if o.op == "get-tuple-element"]
            if limits:
                return limits[0], int(places[0]) if places and places[0] else None
    return None


def _step(module: Module, body: Computation, counter: int) -> int:
    """What a pass adds to the counter; 1 where it is not a constant."""
    values = body.operands(body.root) if body.root.op == "tuple" else []
    at, where = (values[counter] if counter < len(values) else None), body
    while at is not None and at.op in ("copy", "fusion"):
        inner = module.inside(at)
        numbers = [n for o in where.operands(at) if (n := _constant(o)) is not None]
        if inner is not None:
            if inner.root.op == "add" and numbers:
                return numbers[0]
            at, where = inner.root, inner
        else:
            at = next(iter(where.operands(at)), None)
    if at is None or at.op != "add":
        return 1
    return next((n for o in where.operands(at) if (n := _constant(o)) is not None), 1)


def _start(within: Computation, loop: Instruction, counter: int) -> int:
    """The counter before the loop; 0 where it is not a constant."""
    before = next(iter(within.operands(loop)), None)
    values = within.operands(before) if before is not None and before.op == "tuple" else []
    at = values[counter] if counter < len(values) else None
    while at is not None and at.op == "copy":
        at = next(iter(within.operands(at)), None)
    return (_constant(at) if at is not None else None) or 0


def _constant(instruction: Instruction) -> int | None:
    found = re.match(r"\((\d+)\)", instruction.rest) if instruction.op == "constant" else None
    return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class Runs:
    """How often each computation that is not part of a fusion runs, which others it runs (``inner``: bodies of loops,
    branches, calls), and the trip counts of the loops by name; a loop whose count is not known counts once and is in
    ``unknown``."""

    times: Mapping[str, float]
    inner: Mapping[str, Sequence[str]]
    trips: Mapping[str, int]
    unknown: tuple[str, ...]


def runs_of(module: Module, shares: Sequence[float] = ()) -> Runs:
    """How often computations run.

    Args:
      module: the program.
      shares: of a conditional with as many branches, how often each is taken (default: all alike).
    """
    times: dict[str, float] = {}
    inner: dict[str, list[str]] = {}
    trips: dict[str, int] = {}
    unknown: list[str] = []

    def visit(name: str | None, n: float, outer: str = "") -> None:
        if name is None or name not in module.computations:
            return
        if outer and name not in inner.setdefault(outer, []):
            inner[outer].append(name)
        times[name] = times.get(name, 0.0) + n
        for i in module.computations[name].instructions:
            if i.op == "while":
                count = trip_count(module, module.computations[name], i)
                if count is None:
                    unknown.append(i.name)
                else:
                    trips[i.name] = count
                visit(i.called("body"), n * (1 if count is None else count), name)
            elif i.op == "conditional":
                branches = _branches(i)
                each = shares if len(shares) == len(branches) else [1 / len(branches)] * len(branches)
                for branch, share in zip(branches, each, strict=True):
                    visit(branch, n * share, name)
            elif i.op in ("call", "async-start"):
                visit(i.called("to_apply") or i.called("calls"), n, name)

    visit(module.entry, 1.0)
    return Runs(times, inner, trips, tuple(unknown))


def _branches(conditional: Instruction) -> list[str]:
    listed = conditional.text(r"branch_computations=\{([^}]*)\}")
    if listed is not None:
        return re.findall(r"%?([\w.\-]+)", listed)
    pair = (conditional.called("true_computation"), conditional.called("false_computation"))
    return [name for name in pair if name is not None]


def executed(module: Module, runs: Runs) -> Iterator[tuple[Computation, Instruction, float]]:
    """Every instruction that runs by itself, its computation, and how often; what only names or regroups values is
    left out."""
    for name, times in runs.times.items():
        computation = module.computations[name]
        for i in computation.instructions:
            if i.op not in FREE:
                yield computation, i, times


FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
FREE |= {"partition-id", "replica-id", "opt-barrier", "domain", "add-dependency"}
"""Operations that cost nothing by themselves."""


def deep(module: Module, computation: Computation) -> Iterator[tuple[Computation, Instruction]]:
    """Every instruction of a computation and of the fusions inside."""
    for i in computation.instructions:
        inner = module.inside(i)
        if inner is not None:
            yield from deep(module, inner)
        else:
            yield computation, i
