"""The launchers, as far as they can be tried without a cloud: what they print, and what they do to stand-ins."""

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro
import yaml

from dpojax import processes
from dpojax.cli import COMMANDS
from tests.several import FLAGS

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "scripts" / "launch"
SHELL = [LAUNCH / "tpu_pod.sh", LAUNCH / "tpu_worker.sh", LAUNCH / "slurm.sbatch"]
TASK = LAUNCH / "skypilot.yaml"


def call(*command: object, **env: str) -> subprocess.CompletedProcess:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, **env}, timeout=60)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def test_shellcheck(tmp_path):
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=places)
    assert shellcheck, "shellcheck is missing; install the test extra"
    task = yaml.safe_load(TASK.read_text())
    blocks = [executable(tmp_path / part, task[part]) for part in ("setup", "run")]
    checked = call(shellcheck, *SHELL, *blocks)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_help_and_strictness(script):
    helped = call("bash", script, "--help")
    assert helped.returncode == 0 and helped.stdout.startswith("usage: "), helped.stderr
    assert "\nset -euo pipefail\n" in script.read_text()


# ---- a TPU pod ------------------------------------------------------------------------------------------------

POD = ("bash", LAUNCH / "tpu_pod.sh", "--project", "my-project", "--zone=z", "--name", "n", "--type", "v5litepod-256")
FROM_GIT = ("--source", "git+https://example.org/dpojax.git@main")


def test_pod_dry_run():
    own = (*FROM_GIT, "--spot", "--create-flag=--service-account=a", "--collect", "here", "--extras", "hub")
    ran = call(*POD, *own, "--dry-run", "--", "dpo", "--loss", "sigmoid + 0.2*sft", "--output", "/mnt/run")
    where = "n --project=my-project --zone=z"
    ssh = f"gcloud compute tpus tpu-vm ssh {where} --worker"
    does = "--quiet '--command=bash dpojax-pod/tpu_worker.sh"
    commands = [line for line in ran.stdout.splitlines() if not line.startswith("#")]
    assert ran.returncode == 0, ran.stderr
    assert re.fullmatch(
        r"gcloud compute tpus tpu-vm scp \S+/tpu_worker.sh n:dpojax-pod/ --worker=all .*", commands.pop(4)
    )
    assert commands == [
        f"gcloud compute tpus queued-resources create {where} --node-id=n --accelerator-type=v5litepod-256 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot --service-account=a",
        f"gcloud compute tpus queued-resources describe {where} '--format=value(state.state)'",
        f"gcloud compute tpus tpu-vm describe {where} '--format=value(state)'",
        f"{ssh}=all --quiet '--command=mkdir -p dpojax-pod'",
        f"{ssh}=all {does} install git+https://example.org/dpojax.git@main hub'",
        rf"{ssh}=all {does} start dpo --loss sigmoid\ +\ 0.2\*sft --output /mnt/run'",
        f"{ssh}=0 {does} follow 1'",
        f"{ssh}=all {does} status'",
        "gcloud compute tpus tpu-vm scp n:/mnt/run here --recurse --worker=0 --project=my-project --zone=z --quiet",
        f"gcloud compute tpus queued-resources delete {where} --force --quiet",
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--spots"], "--spots: is no option"),
        (["--zone", ""], "--zone: is needed"),
        (["--type", "v9-1"], "--type v9-1: give its --runtime-version too"),
        (["--retries", "x"], "--retries x: must be a whole number"),
        ([], "--output runs/a: is on the pod, which is deleted at the end; give a URL (gs://), --collect or --keep"),
    ],
)
def test_pod_bad_input(given, said):
    ran = call(*POD, *given, "--dry-run", "--", "dpo", "--output", "runs/a")
    assert (ran.returncode, ran.stdout) == (2, "") and said in ran.stderr and len(ran.stderr.splitlines()) == 1


class Cloud:
    """A stand-in of gcloud, and of what is installed on workers: dpojax there is a script of the test's."""

    def __init__(self, root: Path, dpojax: str):
        self.root = root
        executable(root / "bin" / "gcloud", f'exec "{sys.executable}" -S "{ROOT}/tests/gcloud.py" "$@"')
        executable(
            root / "bin" / "python3",
            'echo "$*" >>"$CLOUD/python"\n'
            '[ "$2 $3" != "uv venv" ] || { mkdir -p venv/bin && cp "$CLOUD/dpojax" venv/bin/dpojax; }',
        )
        executable(
            root / "dpojax", f'echo "$WORKER: $*" >>"$CLOUD/starts"; n=$(grep -c "^$WORKER" "$CLOUD/starts")\n{dpojax}'
        )
        self.env = {"CLOUD": str(root), "PATH": f"{root}/bin{os.pathsep}{os.environ['PATH']}"}

    def command(self, *given: str) -> list[str]:
        pod = (*POD, "--poll", "0", *given, "--", "dpo", "--loss", "a b", "--output", "gs://b/run")
        return [str(word) for word in pod]

    def run(self, *given: str) -> subprocess.CompletedProcess:
        return call(*self.command(*given), **self.env)

    def calls(self, *which: str) -> list[str]:
        return [line for line in (self.root / "calls").read_text().split() if line in which]

    def starts(self) -> list[str]:
        return sorted((self.root / "starts").read_text().splitlines())


@pytest.mark.parametrize("taken", ['echo SUSPENDED >"$CLOUD/states"', 'touch "$CLOUD/preempted"'])
def test_a_run_goes_on_after_its_pod_was_taken_away(tmp_path, taken):
    cloud = Cloud(tmp_path, f'echo "  run $n of worker $WORKER"; [ "$n" = 2 ] || {{ {taken}; exit 130; }}')
    ran = cloud.run("--spot", "--retries", "0", "--setup", 'echo "mounted" >"$CLOUD/setup-$WORKER"')
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert cloud.calls("create", "delete") == ["create", "delete", "create", "delete"]
    assert cloud.starts() == [f"{i}: dpo --loss a b --output gs://b/run" for i in (0, 0, 1, 1)]
    said = ran.stdout.splitlines()
    assert said.count("  run 2 of worker 0") == 1 and "  run 2 of worker 1" not in said  # the first alone is followed
    assert said[-1] == "# done: gs://b/run"
    assert (tmp_path / "setup-0").exists() and (tmp_path / "setup-1").exists()
    installed = (tmp_path / "python").read_text().splitlines()
    assert "-m uv pip install --quiet --python venv/bin/python dpojax @ source jax[tpu]" not in installed
    assert sum("/dpojax-pod/source jax[tpu]" in line for line in installed) == 4


def test_bad_input_is_not_tried_again(tmp_path):
    cloud = Cloud(tmp_path, 'if [ $WORKER = 1 ]; then echo "dpojax: process 1: no such file"; exit 2; fi; exit 1')
    ran = cloud.run(*FROM_GIT)
    assert ran.returncode == 2
    assert len(cloud.starts()) == 2 and cloud.calls("create", "delete") == ["create", "delete"]
    assert re.search(r"^last line of .*: dpojax: process 1: no such file$", ran.stdout, re.MULTILINE)


def test_a_failing_run_is_given_up(tmp_path):
    cloud = Cloud(tmp_path, "echo worse; exit 1")
    ran = cloud.run(*FROM_GIT, "--retries", "1")
    assert ran.returncode == 1 and "--retries are used up" in ran.stdout
    assert len(cloud.starts()) == 4 and cloud.calls("create", "delete") == ["create", "delete"]
    assert sum("uv venv" in line for line in (tmp_path / "python").read_text().splitlines()) == 2  # once a worker


def test_results_of_the_pod_are_fetched(tmp_path):
    cloud = Cloud(tmp_path, 'mkdir -p ~/runs/a && echo "$WORKER" >~/runs/a/run.json')
    there = [*POD, "--poll=0", *FROM_GIT, "--collect", tmp_path / "here", "--", "dpo", "--output=runs/a"]
    ran = call(*there, **cloud.env)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "here" / "a" / "run.json").read_text() == "0\n" and cloud.calls("delete") == ["delete"]


def test_no_pod_is_asked_for_where_gcloud_refuses(tmp_path):
    cloud = Cloud(tmp_path, "")
    ran = cloud.run("--project", "another")
    assert ran.returncode == 1 and "PERMISSION_DENIED" in ran.stderr and cloud.calls("create") == []


def until(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.02)


def test_a_run_is_left_followed_and_stopped(tmp_path):
    waits = 'trap "touch $CLOUD/end; echo saved; exit 130" TERM; touch "$CLOUD/up-$WORKER"; echo "step 1"\n'
    waits += 'until [ -f "$CLOUD/end" ]; do sleep 0.05; done; exit 130'
    cloud = Cloud(tmp_path, waits)
    env = {**os.environ, **cloud.env}
    # A shell's background job is started with SIGINT ignored, which bash then cannot trap.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    started = {"env": env, "stdout": subprocess.PIPE, "text": True, "start_new_session": True, "preexec_fn": heard}
    follower = subprocess.Popen(cloud.command(*FROM_GIT), **started)
    try:
        until(tmp_path / "up-1")
        os.killpg(follower.pid, signal.SIGINT)  # as a terminal does
        said, _ = follower.communicate(timeout=30)
        assert follower.returncode == 130 and "the pod goes on" in said
        other = call(*POD, "--poll=0", *FROM_GIT, "--", "sft", "--output=gs://b/c", **cloud.env)
        assert other.returncode == 2 and "another command runs here: dpojax dpo --loss a b" in other.stdout
        follower = subprocess.Popen(cloud.command(*FROM_GIT), **started)
        assert "step 1\n" in follower.stdout  # reads up to there
        stop = call(*POD, "--stop", **cloud.env)
        assert stop.returncode == 0, stop.stderr
        said, _ = follower.communicate(timeout=30)
    finally:
        (tmp_path / "end").touch()
        follower.kill()
    assert follower.returncode == 130 and "stopped; the same call continues the run" in said
    assert len(cloud.starts()) == 2 and cloud.calls("create", "delete") == ["create", "delete"]


# ---- Slurm ----------------------------------------------------------------------------------------------------


def slurm(tmp_path: Path, code: int, *given: str, **env: str) -> tuple[int, list[str], list[str]]:
    """The script's status, the words that srun was given, and the jobs put back into the queue."""
    executable(tmp_path / "bin" / "srun", f'printf "%s\\n" "$@" >"{tmp_path}/ran"; eval "$BEFORE"; exit {code}')
    executable(tmp_path / "bin" / "scontrol", f'echo "$*" >>"{tmp_path}/requeued"')
    path = f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}"
    env = {"PATH": path, "SLURM_JOB_ID": "7", "BEFORE": "", **env}
    ran = call("bash", LAUNCH / "slurm.sbatch", *given, "--", "dpo", "--loss", "a b", **env)
    read = lambda name: (tmp_path / name).read_text().splitlines() if (tmp_path / name).exists() else []  # noqa: E731
    return ran.returncode, read("ran"), read("requeued")


@pytest.mark.parametrize(
    ("code", "restarts", "before", "status", "again"),
    [
        (0, "0", "", 0, False),
        (2, "0", "", 2, False),
        (130, "9", "", 0, True),  # the time limit
        (130, "0", "kill -TERM $PPID", 130, False),  # cancelled, or preempted: Slurm does what there is to do
        (1, "2", "", 0, True),
        (1, "3", "", 1, False),
    ],
)
def test_slurm_puts_a_job_back(tmp_path, code, restarts, before, status, again):
    ended, ran, requeued = slurm(tmp_path, code, SLURM_RESTART_COUNT=restarts, BEFORE=before)
    assert (ended, requeued) == (status, ["requeue 7"] if again else [])
    assert ran == ["--kill-on-bad-exit=0", "dpojax", "dpo", "--loss", "a b"]


def test_slurm_sweeps(tmp_path):
    lines = tmp_path / "sweep.txt"
    lines.write_text("--beta 0.1\n--loss 'sigmoid + sft' --output \"$HOME/b\"\n")
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    ended, ran, requeued = slurm(tmp_path, 130, "--lines", str(lines), **array)
    assert (ended, requeued) == (0, ["requeue 5_2"])
    assert ran[-4:] == ["--loss", "sigmoid + sft", "--output", "$HOME/b"]
    assert slurm(tmp_path, 0, **array)[0] == 2  # the same run many times
    assert slurm(tmp_path, 0, "--lines", str(lines), **array | {"SLURM_ARRAY_TASK_ID": "3"})[0] == 2


def test_slurm_dry_run():
    ran = call("bash", LAUNCH / "slurm.sbatch", "--venv=/v", "--dry-run", "--", "dpo", "--loss", "a b")
    assert (ran.returncode, ran.stdout) == (0, "srun --kill-on-bad-exit=0 /v/bin/dpojax dpo --loss a\\ b \n")


# ---- SkyPilot -------------------------------------------------------------------------------------------------

RESOURCES = {"accelerators", "accelerator_args", "use_spot", "job_recovery"}


def test_skypilot_task():
    task = yaml.safe_load(TASK.read_text())
    assert set(task) == {"name", "resources", "num_nodes", "workdir", "envs", "setup", "run"}
    assert set(task["resources"]) == RESOURCES and task["resources"]["job_recovery"]["recover_on_exit_codes"] == [130]
    assert task["envs"] == {"ARGS": None, "JAX": "tpu"}  # null: SkyPilot asks for it


@pytest.mark.parametrize(("jax", "found"), [("cuda13", True), ("tpu", False)])
def test_skypilot_tells_processes_of_each_other(tmp_path, monkeypatch, jax, found):
    executable(tmp_path / "dpojax-venv" / "bin" / "dpojax", 'env; printf "word %s\\n" "$@"')
    env = {"HOME": str(tmp_path), "JAX": jax, "ARGS": "dpo --loss 'a b'", "SKYPILOT_NUM_NODES": "2"}
    env |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
    ran = call("bash", "-c", yaml.safe_load(TASK.read_text())["run"], **env)
    assert ran.stdout.splitlines()[-3:] == ["word dpo", "word --loss", "word a b"], ran.stderr
    for line in ran.stdout.splitlines():
        if line.startswith("JAX_") and not line.startswith("JAX_PLATFORMS"):
            monkeypatch.setenv(*line.split("=", 1))
    by_hand = {"coordinator_address": "10.0.0.1:6002", "num_processes": 2, "process_id": 1}
    assert processes.launched() == (by_hand if found else None)


# ---- several processes here -----------------------------------------------------------------------------------


def test_processes_of_this_machine(tiny_dir, pairs_file, tmp_path):
    run = tmp_path / "run"
    flags = ["--model", tiny_dir, "--data", pairs_file, "--output", run, "--steps", "2", "--max-shapes", "1"]
    local = [sys.executable, "-m", "dpojax.local", "-n", "2", "sft", *flags, "--mesh.fsdp", "2", "--mesh.data", "1"]
    ran = call(*local, XLA_FLAGS=FLAGS)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 2
    assert {line[:3] for line in ran.stdout.splitlines()} == {"[0]"}  # the first alone speaks


# ---- the page -------------------------------------------------------------------------------------------------


def commands_of_the_page() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "pods.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [list(itertools.takewhile(lambda word: word not in (">", "|"), line)) for line in words]


def test_the_pages_commands_are_understood():
    tried = set()
    commands = commands_of_the_page()
    for i, words in enumerate(commands):
        script = next((word for word in words if word.startswith("scripts/launch/")), "")
        if script.endswith("tpu_pod.sh") and "--" in words:
            end = words.index("--")
            ran = call(*words[:end], "--dry-run", *words[end:])
        elif script.endswith("gke_jobset.py"):
            ran = call(sys.executable, *words[1:])
        else:
            ran = None
        assert ran is None or ran.returncode == 0, ran.stderr
        named = next((k for k, word in enumerate(words) if word in COMMANDS), None)
        if named is not None:
            line = shlex.split(commands[i - 1][2]) if "--lines" in words else []  # of the file that is printed before
            tyro.cli(COMMANDS[words[named]][0], args=words[named + 1 :] + line)  # exits where it is not understood
            tried |= {script, words[named]}
    assert tried >= {"scripts/launch/tpu_pod.sh", "scripts/launch/gke_jobset.py", "dpo", "sft", "eval", "export"}
