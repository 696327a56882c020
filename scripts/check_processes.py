"""Stop a run of two processes in every way there is, and compare what it then continues to with a run never stopped.

    python scripts/check_processes.py sigterm --times 10     # SIGTERM to one of them, at random moments
    python scripts/check_processes.py kill                   # SIGKILL to each of them
    python scripts/check_processes.py network                # the network between them is cut (needs root, and ip)

Each way must end both processes within a minute, with a sentence; and the same command must then go on to the curve
and the parameters of the run that was never stopped. A tiny random model, on CPU devices.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from dpojax.local import environment, free_port

MINUTE = 60


def make_inputs(root: Path) -> None:
    """A tiny model, a byte tokenizer and some pairs."""
    from transformers import ByT5Tokenizer

    from dpojax import models

    shape = {"attention": models.Attention(heads=4, kv_heads=2, head_dim=8), "mlp": models.Mlp(width=64)}
    shape |= {"norm": models.Norm(eps=1e-5), "positions": models.Rope(theta=10_000.0), "max_positions": 512}
    config = models.DecoderConfig(vocab_size=384, width=32, layers=2, **shape)
    models.save_model(models.new_model(config), root / "model")
    ByT5Tokenizer().save_pretrained(root / "model")
    words = ["the", "slow", "film", "was", "a", "lovely", "story", "of", "friends", "going", "home"]
    draw = random.Random(0)
    text = lambda: " ".join(draw.choices(words, k=draw.randint(1, 6)))  # noqa: E731
    rows = [{"prompt": text(), "chosen": " " + text() + " good", "rejected": " " + text()} for _ in range(64)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(root: Path, run: Path, steps: int) -> list[str]:
    """The run, as one of its processes is given it."""
    flags = {"model": root / "model", "data": root / "pairs.jsonl", "output": run, "batch-size": 8, "steps": steps}
    flags |= {"max-shapes": 1, "learning-rate": 1e-3, "warmup-steps": 3, "save-steps": 50, "mesh.data": 4}
    return [sys.executable, "-m", "dpojax", "dpo", *[str(x) for name, v in flags.items() for x in (f"--{name}", v)]]


def start(root: Path, run: Path, steps: int, outputs: Sequence[Path]) -> list[subprocess.Popen]:
    """Both processes, on loopback."""
    port = free_port()
    return [
        subprocess.Popen(
            command(root, run, steps),
            env=environment(i, 2, port, 2, os.environ),
            stdout=outputs[i].open("a"),
            stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]


def steps_done(run: Path) -> int:
    """Lines of metrics so far."""
    with contextlib.suppress(FileNotFoundError):
        return len((run / "metrics.jsonl").read_text().splitlines())
    return 0


def wait_for(processes: Sequence[subprocess.Popen], seconds: float) -> list[int | None]:
    """Their exit statuses; None of one that has not ended, and is then killed."""
    deadline = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
    return codes


def run_whole(root: Path, run: Path, steps: int) -> None:
    """Run to the end.

    Raises:
      SystemExit: it fails.
    """
    outputs = [root / "whole-0", root / "whole-1"]
    codes = wait_for(start(root, run, steps, outputs), 900)
    if codes != [0, 0]:
        raise SystemExit(f"a run that nobody stopped ended with {codes}: {outputs[0].read_text()[-2000:]}")


def curve(run: Path) -> list[dict]:
    """The run's figures by step, without rates."""
    rates = ("pairs_per_second", "tokens_per_second")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in line.items() if name not in rates} for line in lines]


def same(a: Path, b: Path) -> bool:
    """Whether two runs have one curve, and one hash of their last parameters."""
    from dpojax.models import fingerprint
    from dpojax.train.by_name import load_run

    return curve(a) == curve(b) and len({fingerprint(load_run(str(x), "latest")[0].params) for x in (a, b)}) == 1


def by_signal(root: Path, number: signal.Signals, times: int, steps: int, seed: int) -> None:
    """Send a signal to one of the processes at random moments of one run, each time continuing it."""
    draw, run = random.Random(seed), root / f"run-{number.name}"
    for i in range(times):
        outputs = [root / f"{number.name}-{i}-{k}" for k in range(2)]
        before, processes = steps_done(run), start(root, run, steps, outputs)
        last = int(steps * (i + 1) / (times + 1))
        while steps_done(run) <= max(before + 1, draw.randint(max(1, before), max(before + 1, last))):
            time.sleep(0.05)
            if any(process.poll() is not None for process in processes):
                raise SystemExit(f"ended too early: {outputs[0].read_text()[-2000:]}")
        time.sleep(draw.random())
        which, began = draw.randrange(2), time.monotonic()
        processes[which].send_signal(number)
        codes = wait_for(processes, MINUTE)
        said = outputs[0 if number == signal.SIGTERM else 1 - which].read_text().rstrip().splitlines()[-1]
        print(
            f"{number.name} to process {which}: {time.monotonic() - began:.1f} s, statuses {codes}; {said}", flush=True
        )
    report(root, run, steps)


def report(root: Path, run: Path, steps: int) -> None:
    """Continue the run to its end, and compare it.

    Raises:
      SystemExit: it is another run.
    """
    run_whole(root, run, steps)
    equal = same(run, root / "never-stopped")
    print(f"continued to step {steps}: {'equal to the run never stopped' if equal else 'ANOTHER RUN'}", flush=True)
    if not equal:
        raise SystemExit(1)


# ---- the network ----------------------------------------------------------------------------------------------


def ip(*words: str) -> None:
    """Run ``ip``."""
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def two_networks() -> Iterator[None]:
    """Two network namespaces, joined by a cable of which one end can be pulled."""
    for i in range(2):
        ip("netns", "add", f"dpojax{i}")
    try:
        ip("link", "add", "dpojax-a", "type", "veth", "peer", "name", "dpojax-b")
        for i, end in enumerate(("dpojax-a", "dpojax-b")):
            ip("link", "set", end, "netns", f"dpojax{i}")
            ip("-n", f"dpojax{i}", "addr", "add", f"10.77.0.{i + 1}/24", "dev", end)
            for link in (end, "lo"):
                ip("-n", f"dpojax{i}", "link", "set", link, "up")
        yield
    finally:
        for i in range(2):
            ip("netns", "delete", f"dpojax{i}")


def start_apart(root: Path, run: Path, steps: int, outputs: Sequence[Path]) -> list[subprocess.Popen]:
    """Both processes, each in a network, and with a host name, of its own."""
    hosts = root / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.77.0.1 first\n10.77.0.2 second\n")
    port, out = free_port(), []
    for i, name in enumerate(("first", "second")):
        env = {**environment(i, 2, port, 2, os.environ), "JAX_COORDINATOR_ADDRESS": f"10.77.0.1:{port}"}
        shell = f'hostname {name} && mount --bind "{hosts}" /etc/hosts && exec "$@"'
        apart = ["ip", "netns", "exec", f"dpojax{i}", "unshare", "--uts", "--mount", "bash", "-c", shell, "bash"]
        file = outputs[i].open("a")
        out.append(subprocess.Popen([*apart, *command(root, run, steps)], env=env, stdout=file, stderr=file))
    return out


def by_network(root: Path, steps: int) -> None:
    """Cut the network between the processes in the middle of the run."""
    run, outputs = root / "run-network", [root / f"network-{i}" for i in range(2)]
    with two_networks():
        processes = start_apart(root, run, steps, outputs)
        while steps_done(run) < steps // 2:
            time.sleep(0.1)
            if any(process.poll() is not None for process in processes):
                raise SystemExit(f"ended too early: {outputs[0].read_text()[-2000:]}")
        began = time.monotonic()
        ip("-n", "dpojax0", "link", "set", "dpojax-a", "down")
        codes = wait_for(processes, 2 * MINUTE)
    for i, output in enumerate(outputs):
        print(f"network cut: statuses {codes}, process {i}: {output.read_text().rstrip().splitlines()[-1]}")
    print(f"both had ended after {time.monotonic() - began:.0f} s", flush=True)
    report(root, run, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=["sigterm", "kill", "network"])
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_inputs(root)
        run_whole(root, root / "never-stopped", options.steps)
        if options.way == "network":
            by_network(root, options.steps)
        else:
            number = {"sigterm": signal.SIGTERM, "kill": signal.SIGKILL}[options.way]
            by_signal(root, number, options.times, options.steps, options.seed)


if __name__ == "__main__":
    main()
