#!/usr/bin/env python3
"""Peak memory of our compiled train step at SmolLM2-135M's shape, by option, as XLA's compiler states it.

    python scripts/bench_memory.py --output bench_memory.json         one option changed at a time
    python scripts/bench_memory.py --grid                             every combination

Nothing is executed and no weights are needed: the step is compiled for abstract arrays, on whatever backend JAX has.
Options: --remat, --logprob-chunk-tokens (`all`: one chunk), --dtype of the computation, dtype of the optimizer's state
(where TrainOptions has `optim_dtype`), and where the reference's log-probabilities come from.
The figures are of that backend: on CPU, bfloat16 computation came out above float32, so read it on an accelerator.

  arguments   the state (parameters, optimizer moments), the batch and the reference's log-probabilities
  outputs     the new state and the metrics; the state reuses the arguments' memory, which `new outputs` leaves out
  temporary   what the program needs beside them: activations, gradients, logits
  peak        arguments + new outputs + temporary; with a live reference its parameters as well, or, where that is
              more, what its own program holds beside the waiting state
"""

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bench_common import ROOT, SMOLLM2, decoder_config, machine, say, table, versions

sys.path.insert(0, str(ROOT))

from dpojax.configs import DPOConfig, MeshConfig
from dpojax.data import Batches, Example
from dpojax.models import abstract_params
from dpojax.packing import PairBatch
from dpojax.sharding import make_mesh
from dpojax.train import Program, lower_step, task_of
from dpojax.train.program import abstract_inputs, program_of

MODEL = decoder_config(SMOLLM2)
CHOICES = {
    "remat": ("none", "dots", "block"),
    "logprob_chunk_tokens": (512, 64, "all"),
    "dtype": ("float32", "bfloat16"),
    "optim_dtype": ("float32", "bfloat16"),
    "reference": ("cached", "live"),
}
"""Each option's values, the default first."""
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all rows of the table share; completions count their EOS."""

    pairs: int
    prompt: int
    completion: int
    optim: str


def combinations(grid: bool, choices: dict[str, tuple]) -> list[dict[str, Any]]:
    """Every combination, or the defaults and all that differs from them in one option."""
    if grid:
        return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    default = {name: values[0] for name, values in choices.items()}
    return [default, *({**default, name: value} for name, values in choices.items() for value in values[1:])]


def make_config(options: dict[str, Any], setting: Setting) -> DPOConfig:
    chunk = options["logprob_chunk_tokens"]
    chunk = 2 * setting.pairs * setting.completion if chunk == "all" else chunk
    fixed = {"model": "none", "data": ("none",), "output": "none", "batch_size": setting.pairs, "optim": setting.optim}
    return DPOConfig(**fixed, **{**options, "logprob_chunk_tokens": chunk})


def make_batch(setting: Setting) -> PairBatch:
    """A batch without padding."""
    side = np.zeros(setting.completion, np.int32)
    examples = [Example(np.zeros(setting.prompt, np.int32), (side, side))] * setting.pairs
    return Batches(examples, setting.pairs, max_shapes=1, seed=0).collate(np.arange(setting.pairs)).batch


def program_for(config: DPOConfig) -> Program:
    return program_of(config, task_of(config), MODEL, make_mesh(MeshConfig()), 1000)


def figures(compiled: Any) -> dict[str, int]:
    """Bytes of a compiled program."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise SystemExit(f"the backend {jax.default_backend()} states no memory of its programs")
    return {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "new_outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporary": analysis.temp_size_in_bytes,
    }


@functools.cache
def compiled_step(config: DPOConfig, setting: Setting) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the train step, and of the state that it takes."""
    program, batch = program_for(config), make_batch(setting)
    state, _, _ = abstract_inputs(program, batch)
    return figures(lower_step(program, batch).compile()), state_bytes(state)


@functools.cache
def compiled_reference(config: DPOConfig, setting: Setting) -> dict[str, int]:
    """Bytes of the live reference's own program, and of its parameters."""
    program = program_for(config)
    params, (_, batch, _) = abstract_params(program.config, program.mesh), abstract_inputs(program, make_batch(setting))
    return {**figures(program.logps_step.lower(params, batch).compile()), "parameters": tree_bytes(params)}


def tree_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def state_bytes(state: Any) -> dict[str, int]:
    return {"parameters": tree_bytes(state.params), "optimizer": tree_bytes(state.opt_state)}


def measure(options: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """All figures of one combination, bytes."""
    config, start = make_config(options, setting), time.perf_counter()
    step, state = compiled_step(dataclasses.replace(config, reference="cached"), setting)
    out = {"options": options, **step, "state": state}
    out["peak"] = step["arguments"] + step["new_outputs"] + step["temporary"]
    if config.reference == "live":
        # Neither depends on the backward pass or the optimizer.
        plain = {"remat": "none"} | ({"optim_dtype": "float32"} if "optim_dtype" in options else {})
        reference = compiled_reference(dataclasses.replace(config, **plain), setting)
        waiting = sum(state.values()) + reference["arguments"] + reference["new_outputs"] + reference["temporary"]
        out |= {"reference_program": reference, "peak": max(out["peak"] + reference["parameters"], waiting)}
    name = ", ".join(f"{k} {v}" for k, v in options.items())
    say(f"{name}: {out['peak'] / MIB:.0f} MiB ({time.perf_counter() - start:.0f} s)")
    return out


def report(record: dict[str, Any]) -> str:
    """The record as markdown, MiB."""
    names = list(record["rows"][0]["options"])
    columns = ("arguments", "new_outputs", "temporary", "peak")
    base = record["rows"][0]["peak"]
    rows = [
        [str(row["options"][name]) for name in names]
        + [f"{row[column] / MIB:.0f}" for column in columns]
        + [f"{row['peak'] / base:.2f}"]
        for row in record["rows"]
    ]
    head = [*names, *(column.replace("_", " ") for column in columns), "peak / first row's"]
    batch = record["batch"]
    return table(head, rows) + (
        f"\n\nMiB; {batch['pairs']} pairs of {batch['prompt']} + {batch['completion']} tokens, {batch['optim']}; "
        f"compiled for {record['device']}; jax {record['versions']['jax']}, dpojax {record['versions']['dpojax']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", action="store_true", help="every combination of the options")
    for name, values in CHOICES.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, nargs="+", choices=list(map(str, values)), help="values to compile, first as default")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--completion", type=int, default=128, help="tokens, EOS included")
    parser.add_argument("--optim", choices=("adamw", "rmsprop"), default="adamw")
    parser.add_argument("--output", default="bench_memory.json", help="JSON file")
    args = parser.parse_args()
    choices = {}
    for name, values in CHOICES.items():
        given = getattr(args, name) or values
        choices[name] = tuple(int(v) if str(v).isdigit() else v for v in given)
    if not hasattr(DPOConfig, "optim_dtype"):
        say("The optimizer state's dtype is left out: TrainOptions has no optim_dtype.")
        del choices["optim_dtype"]
    setting = Setting(args.pairs, args.prompt, args.completion, args.optim)
    rows = [measure(options, setting) for options in combinations(args.grid, choices)]
    record = {"machine": machine(), "device": jax.devices()[0].device_kind, "versions": versions()}
    record |= {"batch": dataclasses.asdict(setting), "rows": rows}
    Path(args.output).write_text(json.dumps(record, indent=1) + "\n")
    print(report(record))


if __name__ == "__main__":
    main()
