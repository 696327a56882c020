"""Several processes as one program: they start together, tell each other what only one knows, and stop together.

Every process runs the same command. Arrays over the mesh are global; what is here is for the host's side.
"""

import contextlib
import ctypes
import glob
import importlib.util
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from dpojax.errors import UserError, first_line
from dpojax.progress import console

HEARTBEAT_SECONDS = 30
"""A process that has not been heard of for so long is taken to be gone, and the others stop."""
LOST = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "coordination", "heartbeat", "Connection", "Socket closed")
"""What errors say that come of another process's end."""
LEFT = "dpojax/left"
"""Where, in the store of all processes, one that ends leaves its sentence."""
GONE = "another process has ended or cannot be reached, and its own output says why"
AGAIN = "the same command on all of them continues from the last checkpoint"


def launched() -> dict[str, Any] | None:
    """The arguments of ``jax.distributed.initialize`` by this process's environment; None where it is alone.

    ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` (or an indexed Kubernetes job's
    ``JOB_COMPLETION_INDEX``) say it by hand. Slurm, Open MPI, Kubernetes and TPU VMs are found by JAX itself.

    Raises:
      UserError: a variable is missing or no number.
    """
    env = os.environ
    by_slurm = "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", "1")) > 1
    by_mpi = int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    by_kubernetes = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    found = by_slurm or by_mpi or by_kubernetes
    if "JAX_COORDINATOR_ADDRESS" in env and ("JAX_NUM_PROCESSES" in env or not (by_slurm or by_mpi)):
        names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
        if "JAX_PROCESS_ID" not in env and "JOB_COMPLETION_INDEX" in env:
            names["process_id"] = "JOB_COMPLETION_INDEX"
        given = {argument: _number(name) for argument, name in names.items()}
        number, index = given["num_processes"], given["process_id"]
        if not 0 <= index < number:
            raise UserError(f"{names['process_id']} {index}: must be from 0 to {number - 1}, below JAX_NUM_PROCESSES")
        return {"coordinator_address": env["JAX_COORDINATOR_ADDRESS"], **given} if number > 1 else None
    return {} if found or on_tpu() else None


def _number(name: str) -> int:
    value = os.environ.get(name)
    if value is None or not value.isdecimal():
        how = "is no number" if value else "is not set"
        raise UserError(f"{name}: {how}; JAX_COORDINATOR_ADDRESS needs JAX_NUM_PROCESSES and JAX_PROCESS_ID beside it")
    return int(value)


def on_tpu() -> bool:
    """Whether this machine has TPUs that JAX would use."""
    import jax

    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")  # noqa: PTH207
    platforms = getattr(jax.config, "jax_platforms", None) or "tpu"
    return bool(chips) and "tpu" in platforms and importlib.util.find_spec("libtpu") is not None


def start() -> None:
    """Join the other processes, if there are any; all but the first are silent from here on.

    To be called before JAX is used. Nothing happens where the environment says that this process is alone
    (:func:`launched`), or the second time.

    Raises:
      UserError: the others are not found.
    """
    import jax

    arguments = None if jax.distributed.is_initialized() else launched()
    if arguments is None:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the coordination service's warnings about what we say
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        if not arguments and "should be defined" in str(error) and on_tpu():
            return  # TPUs of one machine
        raise UserError(
            f"{first_line(error)}; set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"
        ) from None
    except Exception as error:  # gRPC's
        where = arguments.get("coordinator_address", "the first process's address")
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS {where}: the processes did not all meet there ({first_line(error)}); start the "
            "same command on every one of them"
        ) from None
    console.quiet = not first()
    if count() > 1:
        _say_at_abort()


def one_alone(command: str) -> None:
    """Refuse a command that runs in one process where it is one of several.

    Raises:
      UserError: naming the command.
    """
    import jax

    if count() > 1 or not (jax.distributed.is_initialized() or on_tpu() or launched() is None):
        raise UserError(f"{command}: runs in one process, and this is one of several; start it once, by itself")


def count() -> int:
    """How many processes there are."""
    import jax

    return jax.process_count() if jax.distributed.is_initialized() else 1


def first() -> bool:
    """Whether this is the process that speaks, and writes what is not sharded."""
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0


def fetch(x: Any) -> np.ndarray:
    """The values of a global array, on every process; every process must ask for them."""
    if getattr(x, "is_fully_addressable", True) or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def exchange(data: bytes) -> list[bytes]:
    """What every process gave, in the order of the processes."""
    if count() == 1:
        return [data]
    from jax.experimental import multihost_utils

    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(data))))
    padded = np.zeros(max(1, int(lengths.max())), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    every = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:length].tobytes() for row, length in zip(every, lengths.tolist(), strict=True)]


def from_first(text: str) -> str:
    """The first process's text."""
    return exchange(text.encode() if first() else b"")[0].decode()


def all_of(flag: bool) -> bool:
    """Whether it is so on every process."""
    return all(x == b"1" for x in exchange(b"1" if flag else b"0"))


def array_from_first(x: np.ndarray) -> np.ndarray:
    """The first process's array; every process gives one of this shape and dtype."""
    if count() == 1:
        return x
    return np.frombuffer(exchange(x.tobytes() if first() else b"")[0], x.dtype).reshape(x.shape).copy()


def owns(i: int) -> bool:
    """Whether the i-th piece of work, of many, is this process's."""
    if count() == 1:
        return True
    import jax

    return i % count() == jax.process_index()


def share(directory: Path) -> bool:
    """Whether all processes see the same directory, which exists for each of them."""
    mark = directory / from_first(f"seen-by-all-{uuid.uuid4().hex}")
    if first():
        with contextlib.suppress(OSError):
            mark.touch()
    barrier("a mark is made")
    shared = all_of(mark.exists())
    if first():
        mark.unlink(missing_ok=True)
    return shared


# ---- stopping -------------------------------------------------------------------------------------------------


def asked_to_stop(step: int) -> bool:
    """Whether all processes stop after this step, as one of them was sent SIGTERM; every process asks after every step.

    JAX's preemption service tells the others, and finds a step that none of them has passed.
    """
    if count() == 1:
        return False
    from jax.experimental import multihost_utils

    asked = bool(multihost_utils.reached_preemption_sync_point(step))
    if asked:
        console.print("a process was asked to stop; stopping after this step, to save")
    return asked


def leave(sentence: str, status: int) -> None:
    """End this process at once, after a sentence, where there are others: they would wait for it at JAX's own end.

    A sentence that the first process says too is said by it alone.
    """
    if count() == 1:
        return
    import jax

    mine, client, seconds = jax.process_index(), _client(), 3.0
    said_by_first = None
    with contextlib.suppress(Exception):  # the store is in the first process, which may be gone
        client.key_value_set(f"{LEFT}/{mine}", sentence or " ", allow_overwrite=True)
        if first():  # the store goes with this process, so the others come first
            until = time.monotonic() + seconds
            for i in range(1, count()):
                _heard(client, f"{LEFT}/read/{i}", until)
        else:
            said_by_first = _heard(client, f"{LEFT}/0", time.monotonic() + seconds)
            client.key_value_set(f"{LEFT}/read/{mine}", "yes", allow_overwrite=True)
    if sentence and said_by_first != sentence:
        print(f"dpojax: {sentence}" if first() else f"dpojax: process {mine}: {sentence}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if first():
        time.sleep(0.5)  # for those who have read, to end
    os._exit(status)


def _heard(client: Any, key: str, until: float) -> str | None:
    """What another process has left under a key; None if it leaves nothing in time."""
    while True:
        with contextlib.suppress(Exception):  # no such key yet, or the store has gone
            return str(client.key_value_try_get(key))
        if time.monotonic() >= until:
            return None
        time.sleep(0.1)


def _client() -> Any:
    from jax._src import distributed  # nothing public has the store

    return distributed.global_state.client


def is_loss(error: BaseException) -> bool:
    """Whether an error comes of another process's end."""
    return count() > 1 and any(word in str(error) for word in LOST)


def lost() -> str:
    """The sentence of a process whose others have gone; with the reason, if one of them has left it behind."""
    import jax

    mine, why = jax.process_index(), GONE
    for i in [i for i in range(count()) if i != mine]:
        if left := (_heard(_client(), f"{LEFT}/{i}", until=time.monotonic()) or "").strip():
            why = f"process {i} has ended ({left})"
    return f"process {mine} of {count()}: {why}; {AGAIN}"


def _say_at_abort() -> None:
    """Let JAX's client, which aborts this process when it loses the others, end with our sentence.

    It calls abort() in a thread of its own, which Python's signal handlers do not run in.
    """
    import jax

    who = f"process {jax.process_index()} of {count()}"
    sentence = f"dpojax: {who}: {GONE}; {AGAIN}\n".encode()

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handle(number: int) -> None:
        os.write(2, sentence)
        os._exit(1)

    _say_at_abort.handler = handle  # type: ignore[attr-defined]  # as long as the process lives
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handle)
