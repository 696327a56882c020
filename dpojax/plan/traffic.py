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


def memory_bytes(module: Module, runs: Runs) -> float:
    """Bytes over the memory of one device in a run of the program: operands and results of every instruction.

    What lies in a core's own memory is not counted. Of an operand that a fusion only slices, as it slices one layer's
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
        return _fusion_bytes(inner, i, operands)
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


def _fusion_bytes(inner: Computation, i: Instruction, operands: list[Instruction]) -> float:
    parameters = [p for p in inner.instructions if p.op == "parameter"]
    by_number = {int(p.rest.strip("()").split(")")[0]): p for p in parameters}
    total = 0.0
    updated = _updates(inner)
    for number, operand in enumerate(operands):
        arrays = operand.arrays
        if not arrays or arrays[0].on_core:
            continue
        parameter = by_number.get(number)
        total += _stored(operand) if parameter is None else _read(inner, parameter, updated)
    results = i.arrays
    for result, array in enumerate(results):
        if not array.on_core:
            total += updated.get(result, array).bytes
    return total


def _read(inner: Computation, parameter: Instruction, updated: dict[int, Array]) -> float:
    """Bytes of a fusion's operand that it reads."""
    readers = inner.users.get(parameter.name, ())
    whole = parameter.arrays[0].bytes if parameter.arrays else 0.0
    if not readers:
        return 0.0
    total = 0.0
    for reader in readers:
        if reader.op in READS_A_PART and reader.operands[0] == parameter.name:
            total += sum(a.bytes for a in reader.arrays)
        elif reader.op == "dynamic-update-slice" and reader.operands[0] == parameter.name:
            total += 0.0  # the rest of it stays where it is
        elif reader.op in ("bitcast", "reshape"):
            total += _read(inner, reader, updated)
        else:
            return whole
    return min(total, whole)


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
