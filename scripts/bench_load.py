#!/usr/bin/env python3
"""Host memory while a model of random weights is loaded, beside what the devices hold of it.

    python scripts/bench_load.py --output bench_load.json
    python scripts/bench_load.py --forms Q8_0 --devices 8 --layers 12

The model is made once, in --directory. Every load is a process of its own, under GNU time where it is installed. The
devices are the CPU's: they hold their parameters in the same memory, which is taken off.

  files     size of the model's files
  devices   bytes of the parameters on all devices, float32
  RSS       the most that the process has held, file pages that are mapped among it (GNU time, or getrusage)
  anon      the most that it has held without file pages, which the system takes back when it needs them
  above     anon, less what the process holds before it loads, less what the devices hold
  tensors   the same in units of the largest tensor of the files, in float32

The peak of anon is sampled every few milliseconds.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bench_common import ROOT, decoder_config, load_average, machine, peak_rss_gib, table

sys.path.insert(0, str(ROOT))

HERE = Path(__file__).resolve()
TIME = "/usr/bin/time"
SIZES = {
    "vocab_size": 32000,
    "width": 2048,
    "layers": 10,
    "heads": 16,
    "kv_heads": 4,
    "head_dim": 128,
    "mlp_width": 5632,
    "norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_positions": 2048,
    "tied": False,
}
"""Layers and vocabulary of TinyLlama-1.1B's size, fewer layers."""
GGUF = ("F16", "Q8_0")
MESHES = {1: (1, 1, 1), 8: (1, 4, 2)}


def make_safetensors(directory: Path, sizes: dict[str, Any], shard_bytes: int) -> None:
    """A model of random weights in bfloat16, in shards."""
    from dpojax.models import new_model, save_model

    save_model(new_model(decoder_config(sizes)), directory, dtype="bfloat16", shard_bytes=shard_bytes)


def make_gguf(path: Path, sizes: dict[str, Any], kind: str) -> None:
    """A model of random weights in one file."""
    import numpy as np
    from gguf import GGMLQuantizationType

    from dpojax.models import new_model
    from tests.models.gguf_files import as_type, gguf_tensors, write_gguf

    model = new_model(decoder_config(sizes))
    of = GGMLQuantizationType[kind]
    tensors = {name: as_type(x, of) if x.ndim > 1 else x.astype(np.float32) for name, x in gguf_tensors(model).items()}
    write_gguf(path, model, tensors)


def resident(name: str) -> int:
    """Bytes of this process's resident memory of a kind: RssAnon or RssFile."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}; Linux is needed")


def child_load(name: str, devices: int) -> dict[str, Any]:
    """Load a model and measure."""
    import jax

    from dpojax.configs import MeshConfig
    from dpojax.models import open_model
    from dpojax.models.weights import file_tensors
    from dpojax.sharding import make_mesh
    from dpojax.startup import keep_memory

    mesh = make_mesh(MeshConfig(*MESHES[devices]))
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.zeros(8)))  # the client is there
    files = open_model(name)
    peak, done, before = 0, threading.Event(), resident("RssAnon")

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident("RssAnon"))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    model = files.load(mesh)
    jax.block_until_ready(model.params)
    seconds = time.perf_counter() - begun
    done.set()
    watcher.join()
    keep_memory()
    held = sum(shard.data.nbytes for x in jax.tree.leaves(model.params) for shard in x.addressable_shards)
    largest = 4 * max(tensor.size for tensor in file_tensors(model.params, model.family, model.config))
    return {
        "devices_bytes": held,
        "largest_bytes": largest,
        "before_bytes": before,
        "peak_anon_bytes": peak,
        "file_bytes": resident("RssFile"),
        "peak_rss_bytes": int(peak_rss_gib() * 2**30),
        "seconds": seconds,
    }


def run_load(name: str, devices: int) -> dict[str, Any]:
    """Load in a process of its own, under GNU time where it is installed."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, str(HERE), "--child", name, "--devices", str(devices)]
    under_time = [TIME, "-v", *command] if Path(TIME).exists() else command
    done = subprocess.run(under_time, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(f"loading {name} failed:\n" + "\n".join((done.stdout + done.stderr).splitlines()[-25:]))
    out = json.loads(done.stdout.splitlines()[-1])
    for line in done.stderr.splitlines():
        if "Maximum resident set size (kbytes)" in line:
            out["peak_rss_bytes"] = int(line.rsplit(":", 1)[1]) * 1024
    return out


def size_of(path: Path) -> int:
    """Bytes of a file, or of a directory's."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def mib(size: int) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:,.0f}"


def report(record: dict[str, Any]) -> str:
    """The record as markdown."""
    rows = []
    for row in record["rows"]:
        above = row["peak_anon_bytes"] - row["before_bytes"] - row["devices_bytes"]
        figures = [row[name] for name in ("files_bytes", "devices_bytes", "peak_rss_bytes", "peak_anon_bytes")]
        tensors = f"{above / row['largest_bytes']:.1f}"
        rows.append(
            (row["form"], str(row["devices"]), *map(mib, figures), mib(above), tensors, f"{row['seconds']:.0f}")
        )
    head = ("form", "on", "files", "devices", "peak RSS", "peak anon", "above", "tensors", "s")
    here, first = record["machine"], record["rows"][0]
    return "\n\n".join((
        table(head, rows),
        f"MiB; the largest tensor has {mib(first['largest_bytes'])} in float32, and the process holds "
        f"{mib(first['before_bytes'])} before it loads; {here['cpu']}, {here['cores']} cores, load average "
        f"{load_average()[0]}",
    ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=("safetensors", *GGUF), default=["safetensors", *GGUF])
    parser.add_argument("--devices", type=int, nargs="+", choices=tuple(MESHES), default=list(MESHES))
    parser.add_argument("--layers", type=int, default=SIZES["layers"])
    parser.add_argument("--directory", help="where models are made and kept (default: a temporary one)")
    parser.add_argument("--output", default="bench_load.json", help="JSON file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make == "safetensors":
        make_safetensors(Path(args.child), {**SIZES, "layers": args.layers}, 500_000_000)
    elif args.make:
        make_gguf(Path(args.child), {**SIZES, "layers": args.layers}, args.make)
    if args.make:
        return
    if args.child:
        print(json.dumps(child_load(args.child, args.devices[0])))
        return
    root, sizes, rows = Path(args.directory or tempfile.mkdtemp()), {**SIZES, "layers": args.layers}, []
    try:
        for form in args.forms:
            path = root / (f"model-{args.layers}" if form == "safetensors" else f"model-{args.layers}.{form}.gguf")
            if not path.exists():
                root.mkdir(parents=True, exist_ok=True)
                make = [sys.executable, str(HERE), "--make", form, "--layers", str(args.layers), "--child", str(path)]
                subprocess.run(
                    make, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
                )  # apart, as it holds the model several times
            for devices in args.devices:
                row = {"form": form, "devices": devices, "files_bytes": size_of(path), **run_load(str(path), devices)}
                rows.append(row)
    finally:
        if args.directory is None:
            shutil.rmtree(root)
    record = {"machine": machine(), "sizes": sizes, "rows": rows}
    Path(args.output).write_text(json.dumps(record, indent=1) + "\n")
    print(report(record))


if __name__ == "__main__":
    main()
