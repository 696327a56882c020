#!/usr/bin/env python3
"""Our plan's step time beside Tunix's, compiled ahead of time for the same chips and counted by the same account.

    python -m venv tunix && tunix/bin/pip install google-tunix==0.1.7 'jax[tpu]'
    python scripts/bench_plan.py --tunix-python tunix/bin/python --output bench_plan.json

Both are Llama 3 8B with bfloat16 products and AdamW, fsdp over all chips; ours keeps products (--remat mlp), Tunix
recomputes every layer, as its trainer does. It unrolls its layers, which compile for minutes each, so its step is
compiled with one and with two layers, and the difference is taken for each of the 32. Its own loss function, model and
update run, with a reference's log-probabilities given; its reference's forward pass, which it runs in every step, is
compiled too. It keeps parameters and moments in bfloat16, as its examples do; ours are float32. What its step waits for
and what it hides is judged as ours is.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = (
    "--model llama3-8b --dtype bfloat16 --optim adamw --remat mlp --mesh.data 1 --mesh.fsdp {chips} "
    "--topology {topology} --batch-size {pairs} --max-length {length} --prompt-length {prompt} "
    "--logprob-chunk-tokens {chunk}"
)
LAYERS = 32


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tunix-python", help="a Python that has google-tunix 0.1.7 and libtpu (default: ours alone)")
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--completion", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=2048, help="--logprob-chunk-tokens of ours")
    parser.add_argument("--options", default="", help="further options of dpojax plan, in one pair of quotes")
    parser.add_argument("--live", action="store_true", help="our reference runs in every step, as Tunix's does")
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--tunix-program", nargs=3, metavar=("WHAT", "LAYERS", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- in Tunix's Python ----------------------------------------------------------------------------------------------


def tunix_program(args: argparse.Namespace, what: str, layers: int, file: str) -> None:
    """Write the text of Tunix's compiled step, or of its reference's forward pass."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
    from tunix.models.llama3 import model as llama3
    from tunix.sft.dpo import dpo_trainer

    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    mesh = Mesh(np.array(devices).reshape(-1, 1), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    # Tunix leaves its constraints out where this process' first device is a CPU.
    llama3.shard = lambda x, spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))
    sizes = {"vocab_size": 128256, "embed_dim": 4096, "hidden_dim": 14336, "num_heads": 32, "head_dim": 128}
    remat = llama3.RematConfig["DECODER"]
    shape = llama3.ModelConfig(
        num_layers=layers, num_kv_heads=8, norm_eps=1e-5, rope_theta=500_000, remat_config=remat, **sizes
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: llama3.Llama3(shape, rngs=nnx.Rngs(0))))
    specs = jax.tree.leaves(nnx.get_partition_spec(state), is_leaf=lambda s: isinstance(s, PartitionSpec))
    leaves, structure = jax.tree.flatten(state)
    assert len(leaves) == len(specs)
    placed = [NamedSharding(mesh, s if isinstance(s, PartitionSpec) else PartitionSpec()) for s in specs]
    shardings = jax.tree.unflatten(structure, placed)
    abstract = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    narrow = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=s) for x, s in zip(leaves, placed, strict=True)]
    params = jax.tree.unflatten(structure, narrow)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)  # noqa: E731
    B, S, C = args.pairs, args.prompt + args.completion, args.completion
    example = dpo_trainer.TrainExample(
        input_ids=array(jnp.int32, 2 * B, S),
        positions=array(jnp.int32, 2 * B, S),
        attention_mask=array(jnp.bool_, 2 * B, S, S),
        ref_chosen_logps=array(jnp.float32, B),
        ref_rejected_logps=array(jnp.float32, B),
        completion_mask=array(jnp.int32, 2 * B, C),
        logits_to_keep=C,
    )
    if what == "reference":

        def forward(params: Any, e: Any) -> Any:
            fields = (e.input_ids, e.positions, e.attention_mask, e.logits_to_keep, e.completion_mask)
            return dpo_trainer.compute_logps(nnx.merge(graph, params), *fields)

        lowered = jax.jit(forward).lower(params, example)
    else:
        rule = optax.adamw(1e-6)
        moments = jax.eval_shape(rule.init, params)
        everywhere = NamedSharding(mesh, PartitionSpec())
        their = optax.tree.map_params(
            rule, lambda _, s: s, moments, shardings, transform_non_params=lambda _: everywhere
        )

        def step(params: Any, moments: Any, e: Any) -> Any:
            model = nnx.merge(graph, params)
            gradient = nnx.value_and_grad(dpo_trainer.dpo_loss_fn, argnums=0, has_aux=True)
            (loss, _), grads = gradient(model, e, algorithm="dpo", beta=0.1, label_smoothing=0.0)
            params = nnx.split(model)[1]
            grads = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(grads))
            updates, moments = rule.update(grads, moments, params)
            return optax.apply_updates(params, updates), moments, loss, optax.global_norm(grads)

        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(shardings, their, None, None))
        lowered = jitted.lower(params, jax.tree.map(abstract, moments, their), example)
    Path(file).write_text(lowered.compile().as_text())


# ---- in ours --------------------------------------------------------------------------------------------------------


def account(file: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a compiled program by our account."""
    sys.path.insert(0, str(ROOT))
    from dpojax.plan import account_of, parse, topology_of
    from dpojax.plan.build import devices_of
    from dpojax.plan.collectives import Layout

    topology = topology_of(args.topology)
    places = tuple(tuple(d.coords[: len(topology.shape)]) for d in devices_of(topology))
    layout = Layout(("fsdp", "tp"), (topology.devices, 1), topology, places)
    found = account_of(parse(Path(file).read_text()), topology.chip, layout)
    parts = {"compiler": sum(found.estimated.values()), "models": sum(found.modelled.values())}
    return parts | {"waited for": sum(found.exposed.values()), "all": found.seconds}


def tunix(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Tunix's step and reference at all layers: those of one and of two, extrapolated."""
    out = {}
    with tempfile.TemporaryDirectory() as directory:
        for what in ("step", "reference"):
            parts = []
            for layers in (1, 2):
                file = f"{directory}/{what}{layers}.hlo"
                command = [args.tunix_python, __file__, *sys.argv[1:], "--tunix-program", what, str(layers), file]
                start = time.monotonic()
                subprocess.run(command, check=True, env={**os.environ, **environment(), "WANDB_MODE": "disabled"})
                parts.append(account(file, args))
                print(f"Tunix, {what}, {layers} layers: {parts[-1]}, compiled in {time.monotonic() - start:.0f} s")
            one, two = parts
            out[what] = {name: one[name] + (LAYERS - 1) * (two[name] - one[name]) for name in one}
    return out


def environment() -> dict[str, str]:
    sys.path.insert(0, str(ROOT))
    from dpojax.plan.build import ENVIRONMENT

    return {**ENVIRONMENT, "JAX_PLATFORMS": "cpu"}


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """Our plan, as `dpojax plan --json` has it."""
    sys.path.insert(0, str(ROOT))
    from dpojax.plan import topology_of

    values = {"chips": topology_of(args.topology).devices, "length": args.prompt + args.completion, **vars(args)}
    options = [*shlex.split(OURS.format(**values)), "--reference", "live" if args.live else "cached"]
    with tempfile.TemporaryDirectory() as directory:
        file = f"{directory}/plan.json"
        command = [sys.executable, "-m", "dpojax", "plan", *options, *shlex.split(args.options), "--json", file]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=sys.stderr)
        return json.loads(Path(file).read_text())


def main() -> None:
    args = arguments()
    if args.tunix_program is not None:
        what, layers, file = args.tunix_program
        tunix_program(args, what, int(layers), file)
        return
    plan = ours(args)
    form = "live" if args.live else "cached"
    print(f"dpojax, {form} reference: {plan['seconds'] * 1e3:,.0f} ms a step, MFU {plan['mfu']:.1%}")
    out: dict[str, Any] = {"arguments": vars(args), "dpojax": plan}
    if args.tunix_python:
        theirs = tunix(args)
        total = theirs["step"]["all"] + theirs["reference"]["all"]
        parts = f"{theirs['step']['all'] * 1e3:,.0f} + {theirs['reference']['all'] * 1e3:,.0f} for its reference"
        print(f"Tunix: {total * 1e3:,.0f} ms a step ({parts}); ours is {plan['seconds'] / total:.2f} of it")
        out["tunix"] = theirs
    if args.output:
        Path(args.output).write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
