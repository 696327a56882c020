#!/usr/bin/env python3
"""An adapter's training beside full fine-tuning, at SmolLM2-135M's shape: what is trained, memory, time of a step.

    python scripts/bench_lora.py --output bench_lora.json
    python scripts/bench_lora.py --ranks 8 64 --targets all-linear q_proj,v_proj --steps 8

Every row is a process of its own: the same batch, the live reference, AdamW, fresh weights of the model's shape. With
an adapter the reference reads the policy's frozen base; full fine-tuning holds a second copy.

  trained     parameters that a step changes
  state       bytes that a step changes: those, and the optimizer's moments; a checkpoint holds as much
  program     XLA's account of the step: arguments, new outputs and temporaries
  peak RSS    the most that the process has held, compilation included
  s a step    the median of the measured steps
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_common import ROOT, SMOLLM2, decoder_config, load_average, machine, median, peak_rss_gib, run_child, table
from bench_common import versions as package_versions

sys.path.insert(0, str(ROOT))

HERE = Path(__file__).resolve()


def child_row(spec: dict[str, Any]) -> dict[str, Any]:
    """One row of the table, measured."""
    import jax
    import numpy as np

    from dpojax.configs import DPOConfig, MeshConfig
    from dpojax.data import Batches, Example
    from dpojax.models import init_params, new_lora, with_adapter, without_adapter
    from dpojax.models.families import FAMILIES
    from dpojax.models.lora import parameters, targeted
    from dpojax.sharding import batch_sharding, make_mesh, put_global
    from dpojax.train import initial_state, live_reference, lower_step, task_of
    from dpojax.train.program import program_of

    config = decoder_config(SMOLLM2)
    rank, targets = spec["rank"], spec["targets"]
    family = FAMILIES["llama"]
    lora = new_lora(targeted(targets.split(","), family, config), rank, 2.0 * rank) if rank else None
    options = DPOConfig(
        model="none", data=("none",), output="none", batch_size=spec["pairs"], optim="adamw", dtype=spec["dtype"],
        warmup_steps=0, learning_rate=1e-6,
    )  # fmt: skip
    mesh = make_mesh(MeshConfig())
    program = program_of(options, task_of(options), config, mesh, 1000, lora)
    base = init_params(config, 0, mesh)
    params = base if lora is None else with_adapter(program.layout.config, base, 0, mesh)
    reference = live_reference(program, base if lora is None else without_adapter(params))
    state = initial_state(program, params, donate=True)
    del base, params
    side = np.zeros(spec["completion"], np.int32)
    examples = [Example(np.zeros(spec["prompt"], np.int32), (side, side))] * spec["pairs"]
    item = Batches(examples, spec["pairs"], max_shapes=1, seed=0).collate(np.arange(spec["pairs"]))
    batch = put_global(item.batch, batch_sharding(mesh))
    analysis = lower_step(program, item.batch).compile().memory_analysis()
    times = []
    for step in range(spec["warmup"] + spec["steps"]):
        begun = time.perf_counter()
        state, metrics = program.step(state, batch, reference.of(item))
        jax.block_until_ready((state, metrics))
        if step >= spec["warmup"]:
            times.append(time.perf_counter() - begun)
    trained, total = parameters(program.layout.config)
    changed = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
    used = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {
        "trained": trained,
        "parameters": total,
        "state_bytes": changed,
        "program_bytes": used + analysis.temp_size_in_bytes,
        "peak_gib": peak_rss_gib(),
        "step_s": median(times),
        "measured": times,
        "versions": package_versions(),
    }


def report(record: dict[str, Any]) -> str:
    """The record as markdown."""
    full = record["rows"][0]
    rows = []
    for row in record["rows"]:
        name = f"LoRA {row['rank']}, {row['targets']}" if row["rank"] else "full"
        share = f"{row['trained'] / full['trained']:.2%}"
        memory = f"{row['state_bytes'] / 2**20:,.0f}", f"{row['program_bytes'] / 2**30:.2f}", f"{row['peak_gib']:.2f}"
        ratio = f"{row['step_s'] / full['step_s']:.2f}"
        rows.append((name, f"{row['trained']:,}", share, *memory, f"{row['step_s']:.2f}", ratio))
    head = ("run", "trained", "of full", "state MiB", "program GiB", "peak RSS GiB", "s a step", "of full")
    here, setting = record["machine"], record["setting"]
    return "\n\n".join((
        table(head, rows),
        f"{setting['pairs']} pairs of {setting['prompt']} + 2 x {setting['completion']} tokens, {setting['dtype']}; "
        f"{here['cpu']}, {here['cores']} cores, load average before each row "
        f"{', '.join(str(row['load_average'][0]) for row in record['rows'])}; {setting['steps']} steps after "
        f"{setting['warmup']} of warm-up",
    ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--targets", nargs="+", default=["all-linear", "q_proj,v_proj"], help="modules, by commas")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=50, help="tokens")
    parser.add_argument("--completion", type=int, default=60, help="tokens, EOS included")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--output", default="bench_lora.json", help="JSON file")
    parser.add_argument("--child", choices=("row",), help=argparse.SUPPRESS)
    parser.add_argument("--spec", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        result = child_row(json.loads(Path(args.spec).read_text()))
        Path(args.result).write_text(json.dumps(result))
        return
    setting = {name: getattr(args, name) for name in ("pairs", "prompt", "completion", "dtype", "steps", "warmup")}
    kinds = [(0, "")] + [(rank, targets) for targets in args.targets for rank in args.ranks]
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for rank, targets in kinds:
            spec = {**setting, "rank": rank, "targets": targets}
            load = load_average()
            done = run_child(sys.executable, HERE, "row", spec, Path(directory))
            rows.append({"rank": rank, "targets": targets, "load_average": load, **done})
    record = {"machine": machine(), "setting": setting, "rows": rows}
    Path(args.output).write_text(json.dumps(record, indent=1) + "\n")
    print(report(record))


if __name__ == "__main__":
    main()
