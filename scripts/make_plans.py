#!/usr/bin/env python3
"""Make docs/plans.md: every plan by the command beside it, and what it prints.

    python scripts/make_plans.py                 all, one after another; needs libtpu, no accelerator (half an hour)
    python scripts/make_plans.py --only NAME     one (or several), the others as they stand in the file

A plan of 8 billion parameters takes two to three minutes on two quiet cores, most of it in the TPU's compiler.
"""

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "plans.md"

FULL = "--dtype bfloat16 --remat mlp --optim adamw"
# The original DPO repository's run on Anthropic's HH: 160,800 pairs, 64 a step, 512 tokens, RMSprop.
PAPER = "--model pythia-2.8b --topology v5e:4x4 --mesh.data 1 --mesh.fsdp 16 --batch-size 64 --max-length 512"
PAPER += " --optim rmsprop --remat block --rows 160800"
PLANS = {
    "Llama 3 8B on v5e:16x16": f"--model llama3-8b --topology v5e:16x16 --mesh.data 1 --mesh.fsdp 256 {FULL} "
    "--batch-size 256 --max-length 1280 --prompt-length 512 --logprob-chunk-tokens 2048 --rows 61135",
    "Llama 3 8B on v5p:4x4x4": f"--model llama3-8b --topology v5p:4x4x4 --mesh.data 1 --mesh.fsdp 64 {FULL} "
    "--batch-size 256 --max-length 1280 --prompt-length 512 --logprob-chunk-tokens 8192 --rows 61135",
    "Llama 3.1 70B on v5p:8x8x8": f"--model llama3.1-70b --topology v5p:8x8x8 --mesh.data 1 --mesh.fsdp 512 {FULL} "
    "--batch-size 512 --max-length 1024 --logprob-chunk-tokens 1024 --rows 61135",
    "Qwen3 30B-A3B on v5p:4x4x4": f"--model qwen3-30b-a3b --topology v5p:4x4x4 --mesh.data 1 --mesh.fsdp 16 "
    f"--mesh.tensor 4 {FULL} --batch-size 256 --max-length 1024 --logprob-chunk-tokens 2048 --rows 61135",
    "Pythia 2.8B on v5e:4x4, float32, cached reference": f"{PAPER} --reference cached --logprob-chunk-tokens 2048",
    "Pythia 2.8B on v5e:4x4, float32, live reference": f"{PAPER} --reference live --logprob-chunk-tokens 2048",
    "Pythia 2.8B on v5e:4x4, bfloat16, cached reference": f"{PAPER} --dtype bfloat16 --reference cached "
    "--logprob-chunk-tokens 2048",
    "Pythia 2.8B on v5e:4x4, bfloat16, live reference": f"{PAPER} --dtype bfloat16 --reference live "
    "--logprob-chunk-tokens 2048",
}

HEAD = """# Plans

Made by `python scripts/make_plans.py`, each by the command beside it: the real train step, compiled by the TPU's own
compiler (libtpu {libtpu}, JAX {jax}) on a machine without a TPU. Nothing here was run on one.

What `dpojax plan` prints says of each figure where it is from:

- **exact**: by shapes and shardings. **counted**: from the compiled program, loops as often as they run.
- **compiler's cycles**: the estimate that the compiler writes into most instructions, at the clock at which its matrix
  units give the published peak. It is an estimate of a compiler, not a measurement.
- **model**: of what the compiler estimates nothing. Attention's kernels: the blocks of scores that they visit, at half
  of the peak. Gathers and scatters: bytes at 82 % of the memory's bandwidth. Collectives: rings, over the links that a
  group of devices has; asynchronous ones cost what the other instructions of their loop do not hide.
- **analysis**: of no compiled program: GPUs, and what `--search` goes by before it compiles.

Peaks and links are published ones (`dpojax/plan/chips.py` cites them). FLOPs are two for a multiply-add; the model's
are three forward passes of the real tokens, no padding and nothing twice. MFU is the time of the model's FLOPs at the
peak over the step's. `dpojax dpo ... --plan v5e:16x16` plans any run before it is started; the exit status is 1
where it does not fit.

"""

COLUMNS = ("plan", "fits", "a device", "step", "MFU", "bound on MFU", "rows/s", "chip-hours an epoch")


def run(name: str, options: str) -> str:
    """The section of one plan."""
    command = [sys.executable, "-m", "dpojax", "plan", *shlex.split(options)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    start, usage = time.monotonic(), os.times()
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode not in (0, 1) or not done.stdout:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    spent, after = time.monotonic() - start, os.times()
    cpu = after.children_user + after.children_system - usage.children_user - usage.children_system
    note = f"Exit status {done.returncode}; {spent:.0f} s, {cpu:.0f} s of CPU time on {os.cpu_count()} cores."
    return f"## {name}\n\n```bash\ndpojax plan {options}\n```\n\n```\n{done.stdout.rstrip()}\n```\n\n{note}\n"


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else "-"


def summary(sections: dict[str, str]) -> str:
    """A line a plan, read from their sections."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, text in sections.items():
        anchor = re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-")
        cells = [
            f"[{name}](#{anchor})",
            "yes" if "\nfits: " in text else "no",
            found(r"\nin all\t([\d.,]+ [GM]B)", text),
            found(r"\na step\t([\d.,]+ \w+)", text),
            found(r"\na step\t.*MFU ([\d.]+%)", text),
            found(r"MFU at most ([\d.]+%)", text),
            found(r"\nrows a second\t([\d.,]+)", text),
            found(r"\nan epoch of .*\t([\d.,]+) chip-hours", text),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def standing() -> dict[str, str]:
    """The sections of the page as it is."""
    if not PAGE.exists():
        return {}
    parts = re.split(r"^(?=## )", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {part.split("\n", 1)[0].removeprefix("## "): part.rstrip() + "\n" for part in parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(PLANS), metavar="NAME", help="; ".join(PLANS))
    args = parser.parse_args()
    before = standing()
    for name, options in PLANS.items():
        if args.only is None or name in args.only:
            before[name] = run(name, options)
            print(f"{name}: {summary({name: before[name]}).splitlines()[-1]}", flush=True)
        sections = {name: before[name] for name in PLANS if name in before}
        head = HEAD.format(libtpu=version("libtpu"), jax=version("jax"))
        machine = f"On {platform.machine()}, {os.cpu_count()} cores.\n\n"
        PAGE.write_text(head + machine + summary(sections) + "\n" + "\n".join(sections.values()), encoding="utf-8")


if __name__ == "__main__":
    main()
