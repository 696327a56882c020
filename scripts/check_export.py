#!/usr/bin/env python3
"""Greedy text of a model here, and of its export in MLX, token for token.

    pip install "mlx[cpu]" mlx-lm                      # for Linux; in an environment of its own, if you like
    python scripts/check_export.py --run runs/dpo      # exported to a temporary directory first, float32
    python scripts/check_export.py --model path/to/model --python path/to/environment/bin/python

MLX's mlx_lm reads the exported config, safetensors and tokenizer by its own code; transformers runs nothing but the
tokenizer there. Exit status 1 if a token differs.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_common import ROOT, can_import, run_child

sys.path.insert(0, str(ROOT))

HERE = Path(__file__).resolve()
PROMPTS = ("The capital of France is", "Once upon a time there was a", "def fibonacci(n):")


def child_mlx(spec: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens and text of every prompt by MLX."""
    from importlib.metadata import version

    import mlx.core as mx
    from mlx_lm import load, stream_generate

    model, tokenizer = load(spec["directory"])
    dtypes = {str(x.dtype) for _, x in _leaves(model.parameters())}
    completions = []
    for prompt in spec["prompts"]:
        ids = tokenizer.encode(prompt)  # type: ignore[attr-defined]
        tokens = [int(r.token) for r in stream_generate(model, tokenizer, ids, max_tokens=spec["tokens"])]
        completions.append({"prompt": ids, "tokens": tokens})
    named = {name: version(name) for name in ("mlx", "mlx-lm")}
    return {"completions": completions, "dtypes": sorted(dtypes), "device": str(mx.default_device()), "versions": named}


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    from mlx.utils import tree_flatten

    return tree_flatten(tree)


def exported(args: argparse.Namespace, directory: Path) -> None:
    """Write the model, or export the run, to a directory."""
    from dpojax.cli import main as dpojax
    from dpojax.models import load_model, load_tokenizer, save_model

    if args.run:
        if status := dpojax(["export", "--run", args.run, "--output", str(directory)]):
            raise SystemExit(status)
    else:
        save_model(load_model(args.model), directory, tokenizer=load_tokenizer(args.model))


def ours(args: argparse.Namespace) -> tuple[list[dict[str, Any]], Any]:
    """Greedy tokens of every prompt here, as ``dpojax sample --temperature 0`` draws them, and the tokenizer."""
    from dpojax.configs import SampleConfig
    from dpojax.data import Encoder
    from dpojax.generate import make_sampler, sample_all
    from dpojax.train.by_name import load_policy, load_policy_tokenizer
    from dpojax.train.inputs import encoding_of

    name = args.run or args.model
    tokenizer, model = load_policy_tokenizer(name), load_policy(name)
    encoder = Encoder(tokenizer, encoding_of(SampleConfig(model=name, prompt=PROMPTS)))
    prompts = [list(map(int, encoder.encode_prompt(text))) for text in args.prompts]
    eos = model.eos_ids(tokenizer)
    sampler = make_sampler(model.config, max_new_tokens=args.tokens, eos_ids=eos, temperature=0)
    drawn = sample_all(sampler, model.params, prompts, batch_size=len(prompts), seed=0).lists()
    return [{"prompt": p, "tokens": rows[0]} for p, rows in zip(prompts, drawn, strict=True)], tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="the --output directory of a run")
    parser.add_argument("--model", help="in place of a run, a model as for dpojax --model")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has mlx_lm")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--child", choices=("mlx",), help=argparse.SUPPRESS)
    parser.add_argument("--spec", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        Path(args.result).write_text(json.dumps(child_mlx(json.loads(Path(args.spec).read_text()))))
        return
    if (args.run is None) == (args.model is None):
        raise SystemExit("give --run or --model")
    if not can_import(args.python, "mlx_lm"):
        raise SystemExit(f'{args.python} has no mlx_lm; pip install "mlx[cpu]" mlx-lm, or name another by --python')
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        exported(args, directory / "model")
        spec = {"directory": str(directory / "model"), "prompts": args.prompts, "tokens": args.tokens}
        theirs = run_child(args.python, HERE, "mlx", spec, directory)
        mine, tokenizer = ours(args)
    equal = 0
    for prompt, a, b in zip(args.prompts, mine, theirs["completions"], strict=True):
        same = a == b
        equal += same
        at = next((i for i, pair in enumerate(zip(a["tokens"], b["tokens"], strict=False)) if pair[0] != pair[1]), None)
        which = f"{len(a['tokens'])} tokens, the same" if same else f"they differ, from token {at} on"
        print(f"{prompt!r}: {which}\n    {tokenizer.decode(a['tokens'])!r}")
        if not same:
            print(f"    MLX: {tokenizer.decode(b['tokens'])!r}")
    named = ", ".join(f"{name} {number}" for name, number in theirs["versions"].items())
    print(f"{equal} of {len(mine)} prompts agree; {named}, {theirs['device']}, {', '.join(theirs['dtypes'])}")
    raise SystemExit(equal < len(mine))


if __name__ == "__main__":
    main()
