"""A plan as tables for a terminal, as plain lines for everything else, and as JSON. Every figure says where it is from:

- exact: by shapes and shardings;
- compiler: the TPU compiler's own, of the compiled program;
- counted: from the compiled program's text;
- model: of a stated model (``dpojax/plan/account.py``, ``dpojax/plan/collectives.py``);
- analysis: of no compiled program (``dpojax/plan/analysis.py``).
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dpojax.models.params import param_specs
from dpojax.plan.account import Account
from dpojax.plan.plan import Plan

COLUMNS = ("", "a device and step", "", "from")
EXACT = ("parameters", "optimizer", "gradients", "reference")


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure: what it is, its value in words, a share or another remark, and where it is from."""

    name: str
    value: str
    remark: str = ""
    origin: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """Some figures under a title."""

    title: str
    rows: tuple[Row, ...]


def gb(size: float) -> str:
    """Bytes in words.

    >>> gb(4.253e9), gb(2.5e6)
    ('4.25 GB', '2.50 MB')
    """
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 or size == 0 else f"{size / 1e6:.2f} MB"


def ms(seconds: float) -> str:
    """Seconds in words.

    >>> ms(0.6831), ms(12e-6), ms(3.2)
    ('683.1 ms', '12 us', '3,200.0 ms')
    """
    return f"{seconds * 1e3:,.1f} ms" if seconds >= 1e-3 or seconds == 0 else f"{seconds * 1e6:.0f} us"


def tflop(flops: float) -> str:
    """FLOPs in words."""
    return f"{flops / 1e12:,.2f} TFLOP" if flops >= 1e10 or flops == 0 else f"{flops / 1e9:,.2f} GFLOP"


def heading(plan: Plan) -> list[str]:
    """What is planned, in sentences."""
    built, work = plan.built, plan.built.work
    config, topology = built.config, built.topology
    total = sum(math.prod(spec.shape) for spec in param_specs(built.start.config.base).values())
    mesh = ", ".join(f"{axis} {n}" for axis, n in built.program.mesh.shape.items())
    reference = {"none": "no reference"}.get(built.task.reference.form, f"{built.task.reference.form} reference")
    remat, micro, objective = config.remat, config.gradient_accumulation_steps, getattr(config, "loss", "sft")
    pieces = f" in {micro} micro-batches" if micro > 1 else ""
    how = "an analysis, nothing was compiled" if plan.step is None else "the real step, compiled by libtpu"
    how = "the real step, which libtpu refuses to compile" if plan.refused else how
    rows = {1: "rows of one completion", 2: "pairs"}.get(work.each, f"rows of {work.each} completions")
    padding = f"{work.real_share:.1%} of {work.sequences} x {work.width:,} computed tokens are real"
    unit = "GPUs" if topology.chip.gpu else "chips"
    return [
        f"{config.model} ({total / 1e9:,.2f} billion parameters) on {topology.name} ({topology.chips} {unit}): {how}",
        f"mesh {mesh}; {work.rows} {rows} a step{pieces}, {work.source}; {padding}",
        f"{objective}, {reference}; {config.dtype}, {config.optim} ({config.optim_dtype} moments); remat {remat}",
    ]


def verdict(plan: Plan) -> str:
    """Whether it fits, in a sentence."""
    limit = gb(plan.limit)
    if plan.refused:
        return f"does not fit: the compiler says, {plan.refused}"
    if plan.fits:
        return f"fits: {gb(plan.need)} of {limit} a device, {gb(plan.limit - plan.need)} of headroom"
    return f"does not fit: it needs {gb(plan.need)} a device, which has {limit}"


def sections(plan: Plan, *, rows: int | None = None, top: int = 10) -> list[Section]:
    """All figures of a plan.

    Args:
      plan: what is known.
      rows: of the data set (default: none is known, and nothing is said of an epoch).
      top: source lines.
    """
    out = [memory_section(plan)]
    if plan.refused:
        return out
    out += [flops_section(plan), bytes_section(plan), bounds_section(plan)]
    if plan.step is not None:
        out += [time_section(plan), lines_section(plan, top)]
    return [*out, result_section(plan, rows)]


def memory_section(plan: Plan) -> Section:
    """Bytes a device."""
    guessed = plan.step is None or plan.refused is not None
    rest = "analysis" if guessed else "compiler"
    rows = [
        Row(name, gb(size), f"{size / plan.limit:.1%}", "exact" if name in EXACT else rest)
        for name, size in plan.memory.items()
        if size or name in EXACT
    ]
    total = Row("in all", gb(plan.need), f"{plan.need / plan.limit:.1%}", rest)
    limit = "published" if plan.built.topology.chip.gpu else "compiler's limit"
    return Section("Memory", (*rows, total, Row("a device has", gb(plan.limit), "", limit)))


def flops_section(plan: Plan) -> Section:
    """The model's FLOPs against those of the programs."""
    model, origin = plan.model.total / plan.built.program.mesh.size, "counted" if plan.step else "analysis"
    share = lambda x: f"{x / model:.3f} of the model's"  # noqa: E731
    beyond = plan.flops / (model + plan.recomputed)
    waste = () if plan.step is None else (Row("waste", tflop(plan.waste), share(plan.waste), origin),)
    return Section(
        "Floating-point operations",
        (
            Row("the model's", tflop(model), "", "formula"),
            Row("computed again", tflop(plan.recomputed), share(plan.recomputed), origin),
            *waste,
            Row("in all", tflop(plan.flops), f"{beyond:.3f} of model + recomputed", origin),
        ),
    )


def bytes_section(plan: Plan) -> Section:
    """Bytes over memory and links."""
    if plan.step is None:
        e = plan.estimate
        links = [Row(f"{kind} over {axes}", ms(s), "", "analysis") for (kind, axes), s in e.links.items()]
        return Section("Bytes moved", (Row("memory", gb(e.memory_bytes), "", "analysis"), *links))
    moved = sum(a.memory_bytes for a in plan.accounts)
    rows = [Row("memory", gb(moved), "", "counted")]
    for (kind, axes, beside), (size, seconds) in link_bytes(plan).items():
        words = f"{kind} over {axes}{', asynchronous' if beside else ''}"
        rows.append(Row(words, gb(size), f"{ms(seconds)} by the ring model", "counted; time: model"))
    return Section("Bytes moved", tuple(rows))


def link_bytes(plan: Plan) -> dict[tuple[str, str, bool], tuple[float, float]]:
    """Bytes that a device receives, and seconds, by kind of collective, mesh axes, and whether it is asynchronous; the
    slowest first."""
    sums: dict[tuple[str, str, bool], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for account in plan.accounts:
        for c in account.collectives:
            entry = sums[c.kind, c.axes, c.asynchronous]
            entry[0] += c.total_bytes
            entry[1] += c.total_seconds
    ordered = sorted(sums.items(), key=lambda kv: -kv[1][1])
    return {key: (size, seconds) for key, (size, seconds) in ordered if seconds > 1e-4 * plan.seconds}


def bounds_section(plan: Plan) -> Section:
    """The roofline."""
    chip, roof = plan.built.topology.chip, plan.roofline
    origin = "published peaks"
    links = f"{chip.link / 1e9:,.0f} GB/s a link" if not chip.gpu else "links and network"
    return Section(
        "Least time of a step, by each bound",
        (
            Row("compute", ms(roof.compute), f"{chip.flops / 1e12:,.0f} TFLOP/s", origin),
            Row("memory", ms(roof.memory), f"{chip.bandwidth / 1e9:,.0f} GB/s", origin),
            Row("interconnect", ms(roof.links), links, origin),
            Row("binds", roof.binds, f"MFU at most {plan.mfu(roof.seconds):.1%}", ""),
        ),
    )


def time_section(plan: Plan) -> Section:
    """Where a step's time goes."""
    rows = list(_times("step", plan.accounts[0], plan.seconds))
    if len(plan.accounts) > 1:
        rows += _times("reference", plan.accounts[1], plan.seconds)
    return Section("Where the time goes", tuple(rows))


def _times(of: str, account: Account, total: float) -> Iterator[Row]:
    def row(name: str, seconds: float, origin: str) -> Row:
        return Row(f"{of}: {name}", ms(seconds), f"{seconds / total:.1%}", origin)

    ordered = lambda times: sorted(times.items(), key=lambda kv: -kv[1])  # noqa: E731
    for kind, seconds in ordered(account.estimated):
        yield row(kind, seconds, "compiler's cycles")
    for kind, seconds in ordered(account.modelled):
        if seconds > 1e-4 * total:
            yield row(kind, seconds, "model: half of peak" if kind == "kernel" else "model: bytes")
    for (kind, axes), seconds in ordered(account.exposed):
        if seconds > 1e-4 * total:
            yield row(f"{kind} over {axes}", seconds, "model: rings")
    yield Row(f"{of}: collectives beside others", ms(account.hidden), "hidden", "model: rings")
    if account.unknown:
        yield Row(f"{of}: loops of unknown length", f"{len(account.unknown)}", "counted once", "")


def lines_section(plan: Plan, top: int) -> Section:
    """The dearest source lines of the step."""
    lines = plan.accounts[0].lines[:top]
    rows = [
        Row(line.source, ms(line.seconds), line.kind, "compiler's cycles" if line.estimated else "model")
        for line in lines
    ]
    return Section("The step's dearest source lines", tuple(rows))


def result_section(plan: Plan, rows: int | None) -> Section:
    """What it comes to."""
    seconds, work = plan.seconds, plan.built.work
    origin = "analysis: at the peaks" if plan.step is None else "compiler + models"
    out = [
        Row("a step", ms(seconds), f"MFU {plan.mfu(seconds):.1%}", origin),
        Row("rows a second", f"{work.rows / seconds:,.1f}", "all devices together", origin),
    ]
    if rows:
        unit = "GPU-hours" if plan.built.topology.chip.gpu else "chip-hours"
        out.append(Row(f"an epoch of {rows:,} rows", f"{plan.epoch_hours(rows):,.2f} {unit}", "", origin))
        if before := plan.reference_hours(rows):
            once = "once, at the step's rate"
            out.append(Row("cached reference before it", f"{before:,.2f} {unit}", once, "analysis"))
    return Section("Result", tuple(out))


# ---- on paper -------------------------------------------------------------------------------------------------------


def show(plan: Plan, console: Console, *, rows: int | None = None, top: int = 10) -> None:
    """Print a plan: on a terminal as tables, else a line a figure, with tabs."""
    found = sections(plan, rows=rows, top=top)
    if not console.is_terminal:
        print("\n".join(plain(plan, found)), file=console.file)
        return
    for line in [*heading(plan), verdict(plan)]:
        console.print(line)
    for section in found:
        table = Table(title=section.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for name, justify in zip(COLUMNS, ("left", "right", "left", "left"), strict=True):
            table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for row in section.rows:
            table.add_row(row.name, row.value, row.remark, row.origin)
        console.print(table, soft_wrap=False)


def plain(plan: Plan, found: list[Section]) -> list[str]:
    """The plan as lines."""
    out = [*heading(plan), verdict(plan)]
    for section in found:
        out += ["", f"# {section.title}"]
        out += ["\t".join((row.name, row.value, row.remark, row.origin)).rstrip("\t") for row in section.rows]
    return out


def as_json(plan: Plan, *, rows: int | None = None) -> dict[str, Any]:
    """All figures of a plan as plain numbers: bytes, seconds, FLOPs; of one device and one step."""
    built, work = plan.built, plan.built.work
    out: dict[str, Any] = {
        "model": built.config.model,
        "topology": built.topology.name,
        "chips": built.topology.chips,
        "mesh": dict(built.program.mesh.shape),
        "compiled": plan.step is not None and not plan.refused,
        "fits": plan.fits,
        "refused": plan.refused,
        "options": {
            name: getattr(built.config, name)
            for name in ("dtype", "remat", "optim", "optim_dtype", "gradient_accumulation_steps", "batch_size")
        },
        "reference": built.task.reference.form,
        "rows": {"each": work.each, "source": work.source, "real_share": work.real_share},
        "memory": {**plan.memory, "need": plan.need, "limit": plan.limit},
        "estimate": dataclasses.asdict(plan.estimate) | {"links": _named(plan.estimate.links)},
    }
    if plan.refused:
        return out
    roof = plan.roofline
    out |= {
        "flops": {
            "model": plan.model.total / built.program.mesh.size,
            "recomputed": plan.recomputed,
            "waste": plan.waste,
            "all": plan.flops,
        },
        "roofline": {**dataclasses.asdict(roof), "binds": roof.binds, "mfu": plan.mfu(roof.seconds)},
        "programs": [_account(c.account, c.memory, c.seconds) for c in plan.compiled if c.account is not None],
        "seconds": plan.seconds,
        "mfu": plan.mfu(plan.seconds),
        "rows_per_second": work.rows / plan.seconds,
    }
    if rows:
        out["epoch"] = {"rows": rows, "chip_hours": plan.epoch_hours(rows), "reference": plan.reference_hours(rows)}
    return out


def _named(pairs: Mapping[tuple[str, str], float]) -> dict[str, float]:
    return {f"{kind} over {axes}": value for (kind, axes), value in pairs.items()}


def _account(account: Account, memory: Mapping[str, float], compile_seconds: float) -> dict[str, Any]:
    return {
        "seconds": account.seconds,
        "estimated": dict(account.estimated),
        "modelled": dict(account.modelled),
        "exposed": _named(account.exposed),
        "hidden": account.hidden,
        "flops": dataclasses.asdict(account.flops),
        "memory_bytes": account.memory_bytes,
        "memory": dict(memory),
        "trips": dict(account.trips),
        "unknown_loops": list(account.unknown),
        "uncounted": dict(account.uncounted),
        "collectives": [
            {k: v for k, v in dataclasses.asdict(c).items() if k not in ("group", "op_name")} | {"n": len(c.group)}
            for c in account.collectives
        ],
        "lines": [dataclasses.asdict(line) for line in account.lines],
        "compile_seconds": compile_seconds,
    }
