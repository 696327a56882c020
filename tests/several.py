"""For tests of several processes: ``python -m tests.several FILE`` carries out the commands of a JSON file, one after
another; every process of a set does the same."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# A tiny program's time is its compiler's.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_collective_call_terminate_timeout_seconds=600"


def spawn(number: int, devices: int, command: Sequence[str]) -> list[subprocess.Popen]:
    """A Python command in several processes, each with fake devices of its own."""
    from dpojax.local import environment, free_port

    port = free_port()
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONDONTWRITEBYTECODE": "1"}  # XLA's warnings
    base = {**os.environ, "XLA_FLAGS": FLAGS, **quiet}
    envs = [environment(i, number, port, devices, base) for i in range(number)]
    return [
        subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
        )
        for env in envs
    ]


def finish(processes: Sequence[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str]]:
    """Exit statuses and outputs, once all have ended."""
    deadline = time.monotonic() + timeout
    out = []
    for process in processes:
        try:
            text, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            text = process.communicate()[0] + "\nTIMED OUT"
        out.append((process.returncode, text))
    return out


def main() -> int:
    from dpojax.cli import main as dpojax

    for args in json.loads(Path(sys.argv[1]).read_text()):
        status = dpojax(args)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
