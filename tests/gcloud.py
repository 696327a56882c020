"""A stand-in for gcloud, as much of it as scripts/launch/tpu_pod.sh uses: two workers are two folders of this machine.

The folder that $CLOUD names holds all there is of it: `states` (what the pod is said to be, one look after another; no
file, no pod), `preempted` (whether its TPU was taken away), `workers/0` and `workers/1` (their homes), `calls`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

WORKERS = 2
CLOUD = Path(os.environ.get("CLOUD", "."))


def option(name: str, arguments: list[str]) -> str:
    return next(word.split("=", 1)[1] for word in arguments if word.startswith(f"--{name}="))


def home(worker: int) -> Path:
    return CLOUD / "workers" / str(worker)


def chosen(arguments: list[str]) -> range | list[int]:
    worker = option("worker", arguments)
    return range(WORKERS) if worker == "all" else [int(worker)]


def create() -> int:
    (CLOUD / "states").write_text("WAITING_FOR_RESOURCES\nACTIVE\n")
    for worker in range(WORKERS):
        home(worker).mkdir(parents=True)
    return 0


def describe(name: str) -> int:
    if not (CLOUD / "states").exists():
        print(f"ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: {name}", file=sys.stderr)
        return 1
    now, *later = (CLOUD / "states").read_text().split()
    if later:
        (CLOUD / "states").write_text("\n".join(later))
    print(now)
    return 0


def delete() -> int:
    (CLOUD / "states").unlink()
    (CLOUD / "preempted").unlink(missing_ok=True)
    shutil.rmtree(CLOUD / "workers")
    return 0


def ssh(arguments: list[str]) -> int:
    if "ACTIVE" not in (CLOUD / "states").read_text() or (CLOUD / "preempted").exists():
        return 255
    codes = []
    for worker in chosen(arguments):
        env = {**os.environ, "HOME": str(home(worker)), "WORKER": str(worker)}
        for _ in range(2 if "follow" in option("command", arguments) else 1):  # as after a lost connection
            ran = subprocess.run(["bash", "-c", option("command", arguments)], cwd=home(worker), env=env)
        codes.append(ran.returncode)
    return max(codes)


def scp(words: list[str], arguments: list[str]) -> int:
    *sources, target = words
    for worker in chosen(arguments):
        place = lambda name, worker=worker: home(worker) / name.split(":", 1)[1] if ":" in name else Path(name)  # noqa: E731
        for source in map(place, sources):
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, place(target) / source.name if place(target).is_dir() else place(target))
    return 0


def main() -> int:
    given = sys.argv[1:]
    with (CLOUD / "calls").open("a") as calls:
        calls.write(f"{given[3]}\n")
    arguments = given[4:]
    words = [word for word in arguments if not word.startswith("--")]
    if option("project", arguments) != "my-project":
        print("ERROR: PERMISSION_DENIED", file=sys.stderr)
        return 1
    match given[2:4]:
        case ["queued-resources", "create"]:
            return create()
        case ["queued-resources", "describe"]:
            return describe(words[0])
        case ["queued-resources", "delete"]:
            return delete()
        case ["tpu-vm", "describe"]:
            print("PREEMPTED" if (CLOUD / "preempted").exists() else "READY")
            return 0
        case ["tpu-vm", "ssh"]:
            return ssh(arguments)
        case ["tpu-vm", "scp"]:
            return scp(words, arguments)
    raise AssertionError(given)


if __name__ == "__main__":
    sys.exit(main())
