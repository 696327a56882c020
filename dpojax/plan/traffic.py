"""Bytes that a compiled program reads from and writes to a device's memory, from the shapes of its instructions."""

from dpojax.plan.hlo import Array, Computation, Instruction, Module, Runs, executed

READS_A_PART = {"dynamic-slice", "slice", "gather"}
NO_TRAFFIC = {
    "copy-done",
    "async-done",
    "async-update",
    "all-gather-done",
    "all-reduce-done",
    "iota",
    "rng-bit-generator",
}
NO_TRAFFIC |= {"collective-permute-done", "send", "recv", "send-done", "recv-done", "infeed", "outfeed"}
COLLECTIVES = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}


def memory_bytes(module: Module, runs: Runs) -> float:
    """Bytes over the memory of one device in a run of the program: operands and results of every instruction.

    What lies in a core's own memory is not counted, nor what a fusion hands on: operands as they are, and buffers of
    a collective that goes on beside its products. Of an operand that a fusion only slices, as it slices one layer's
    weights of all, the slices are counted; of a result that it updates in place, the update.
    """
    return sum(times * instruction_bytes(module, where, i) for where, i, times in executed(module, runs))


def instruction_bytes(module: Module, computation: Computation, i: Instruction) -> float:
    """Bytes over the memory of one run of an instruction."""
    if i.op in NO_TRAFFIC:
        return 0.0
    operands = computation.operands(i)
    inner = module.inside(i)
    if inner is not None and i.op == "fusion":
        return _fusion_bytes(module, inner, i, operands)
    if i.op in READS_A_PART:
        return 2 * _stored(i)
    if i.op == "dynamic-update-slice":
        return 2 * _stored(operands[1]) if len(operands) > 1 else 0.0
    if i.op.endswith("-start"):  # its type repeats the operand
        arrays = i.arrays[:2]
        return sum(a.bytes for a in arrays if not a.on_core)
    return _stored(i) + sum(_stored(o) for o in operands)


def _stored(i: Instruction) -> float:
    return sum(a.bytes for a in i.arrays if not a.on_core)


def _fusion_bytes(module: Module, inner: Computation, i: Instruction, operands: list[Instruction]) -> float:
    total, updated = 0.0, _updates(inner)
    for number, operand in enumerate(operands):
        arrays = operand.arrays
        if not arrays or arrays[0].on_core:
            continue
        parameter = _parameter(inner, number)
        total += _stored(operand) if parameter is None else _read(module, inner, parameter)
    passed = _passed_on(inner)
    for result, array in enumerate(i.arrays):
        if not array.on_core and result not in passed:
            total += updated.get(result, array).bytes
    return total


def _parameter(inner: Computation, number: int) -> Instruction | None:
    """The parameter of this number."""
    parameters = (p for p in inner.instructions if p.op == "parameter")
    return next((p for p in parameters if int(p.rest.strip("()").split(")")[0]) == number), None)


def _read(module: Module, inner: Computation, parameter: Instruction) -> float:
    """Bytes of a fusion's operand that it reads."""
    whole = parameter.arrays[0].bytes if parameter.arrays else 0.0
    total = 0.0
    for reader in inner.users.get(parameter.name, ()):
        nested = module.inside(reader) if reader.op == "fusion" else None
        if reader.op in READS_A_PART and reader.operands[0] == parameter.name:
            total += sum(a.bytes for a in reader.arrays)
        elif reader.op == "dynamic-update-slice" and reader.operands[0] == parameter.name:
            total += 0.0  # the rest of it stays where it is
        elif reader.op in ("bitcast", "reshape"):
            total += _read(module, inner, reader)
        elif reader.op == "tuple" or reader.op in COLLECTIVES:
            total += 0.0  # handed on
        elif nested is not None:
            places = [k for k, name in enumerate(reader.operands) if name == parameter.name]
            inside = [p for p in (_parameter(nested, k) for k in places) if p is not None]
            total += sum(_read(module, nested, p) for p in inside) if inside else whole
        else:
            return whole
    return min(total, whole)


def _passed_on(inner: Computation) -> set[int]:
    """The results of a fusion that nothing is written of here, by number: operands as they are, and the buffers of a
    collective that goes on beside its products."""
    root = inner.root
    roots = inner.operands(root) if root.op == "tuple" else [root]
    return {number for number, result in enumerate(roots) if result.op == "parameter" or result.op in COLLECTIVES}


def _updates(inner: Computation) -> dict[int, Array]:
    """The results of a fusion that are updates in place, by number, and what is written of each."""
    root = inner.root
    roots = inner.operands(root) if root.op == "tuple" else [root]
    out = {}
    for number, result in enumerate(roots):
        while result.op in ("bitcast", "reshape") and inner.operands(result):
            result = inner.operands(result)[0]
        if result.op == "dynamic-update-slice" and len(inner.operands(result)) > 1:
            out[number] = inner.operands(result)[1].arrays[0]
    return out
