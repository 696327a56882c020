"""``dpojax-local``: one command in several processes of this machine, as a pod would run it, on CPU devices."""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO

GRACE_SECONDS = 90
"""Processes whose others have ended are given so long to notice it, and to end by themselves."""


def environment(index: int, number: int, port: int, devices: int, base: Mapping[str, str]) -> dict[str, str]:
    """The environment of one process of several (:func:`~dpojax.processes.launched`), with CPU devices of its own."""
    flags = base.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    return {
        **base,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(number),
        "JAX_PROCESS_ID": str(index),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags.strip(),
        # XLA's CPU client has as many threads as cores or devices, and a collective blocks one for each device.
        "NPROC": base.get("NPROC", "32"),
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def run(command: Sequence[str], number: int, devices: int) -> int:
    """Run a command in several processes, their output behind their numbers; the first bad exit status, or 0."""
    port = free_port()
    children = [
        subprocess.Popen(
            command,
            env=environment(i, number, port, devices, os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a terminal's Ctrl-C goes through us, once
        )
        for i in range(number)
    ]
    threads = [threading.Thread(target=_copy, args=(i, child.stdout)) for i, child in enumerate(children)]
    for thread in threads:
        thread.start()

    def forward(signum: int, frame: FrameType | None) -> None:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, forward)
    try:
        return _wait(children)
    finally:
        for thread in threads:
            thread.join()


def _wait(children: Sequence["subprocess.Popen[str]"]) -> int:
    """The first exit status that is not 0; what has not ended long after it is ended by force."""
    bad: int | None = None
    since = time.monotonic()
    while any(child.poll() is None for child in children):
        codes = [child.returncode for child in children if child.returncode]
        if bad is None and codes:
            bad, since = codes[0], time.monotonic()
        if bad is not None and time.monotonic() - since > GRACE_SECONDS:
            for child in children:
                child.kill()
        time.sleep(0.1)
    return bad if bad is not None else next((child.returncode for child in children if child.returncode), 0)


def _copy(index: int, output: IO[str] | None) -> None:
    assert output is not None
    for line in output:
        if "peer ranks" not in line:  # what XLA's CPU collectives say of every connection
            sys.stdout.write(f"[{index}] {line}")
            sys.stdout.flush()


def main(args: Sequence[str] | None = None) -> int:
    """Parse the arguments, run the processes, return the exit status."""
    parser = argparse.ArgumentParser(
        prog="dpojax-local",
        description="Run a dpojax command in several processes of this machine, each with CPU devices of its own.",
        epilog="example: dpojax-local -n 2 --devices 4 dpo --model ... --data ... --output ...",
    )
    parser.add_argument("-n", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--devices", type=int, default=1, help="devices of each process (default: 1)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a command of dpojax and its options")
    options = parser.parse_args(args)
    if options.n < 1 or options.devices < 1 or not options.command:
        parser.error("give -n and --devices of at least 1, and a command")
    return run([sys.executable, "-m", "dpojax", *options.command], options.n, options.devices)


if __name__ == "__main__":
    sys.exit(main())
