"""Sessions of a run: with what code, on what devices and by which command it was started, and started again.

``run.json`` keeps them in a list of their own, which takes no part in whether a run may continue. A session has what
differs from the one before.
"""

import datetime
import functools
import importlib.metadata
import json
import operator
import os
import platform
import shlex
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import dpojax
from dpojax import processes
from dpojax.configs import TrainOptions
from dpojax.models.safetensors import read_json
from dpojax.paths import absolute, path_of, write_text
from dpojax.progress import console

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
"""Whose versions a session names, beside Python's and our own."""


def versions() -> dict[str, str]:
    """The versions of what computes."""
    found = {"dpojax": dpojax.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit_of(checkout: Path) -> str | None:
    """The commit of a checkout, with ``-dirty`` behind it where tracked files differ; None where there is none.

    An installed package lies in no checkout of its own, though a directory above it may be one.
    """
    if not (checkout / ".git").exists():
        return None
    describe = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def run_name(config: TrainOptions) -> str:
    """The run's name: ``--run-name``, else the last part of ``--output``."""
    return config.run_name or absolute(path_of(config.output)).name


def session_now(config: TrainOptions) -> dict[str, Any]:
    """What a session of this process is: when, where, by which command, with what code and on which devices.

    No option takes a secret, and of the environment nothing is kept.
    """
    commit = commit_of(Path(dpojax.__file__).resolve().parent.parent)
    return {
        "start": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "name": run_name(config),
        "command_line": shlex.join(sys.orig_argv),
        "directory": str(Path.cwd()),
        "commit": commit and commit.removesuffix("-dirty"),
        "dirty": bool(commit and commit.endswith("-dirty")),
        "versions": versions(),
        "platform": platform.platform(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": processes.count(),
    }


def session_of(own: Mapping[str, Any]) -> dict[str, Any]:
    """The last session of a ``run.json``, whole; empty of a run that kept none."""
    return functools.reduce(operator.or_, own.get("sessions", ()), {})


def begin_session(config: TrainOptions) -> dict[str, Any]:
    """What ``run.json`` holds once this session is in it; one line says what code is another than the last time's.

    The first process alone calls this, of a run whose directory is claimed.
    """
    path = path_of(config.output) / "run.json"
    own = read_json(path)
    last, now = session_of(own), session_now(config)
    if "wandb" in config.report_to:
        now["wandb"] = last.get("wandb") or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]
    if last and (changed := _changed(last, now)):
        console.print(f"{path.parent}: goes on with other code: {', '.join(changed)}")
    # A program that has died and comes again a hundred times leaves a hundred short lines.
    own["sessions"] = [*own.get("sessions", ()), {k: v for k, v in now.items() if last.get(k, ...) != v}]
    write_text(path, json.dumps(own, indent=2))
    return own


def _changed(last: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The commit and the versions that differ between two sessions, in words."""
    then, today = ({"commit": code_of(one), **one["versions"]} for one in (last, now))
    names = [name for name in {**then, **today} if then.get(name) != today.get(name)]
    return [f"{name} {today.get(name)} (before: {then.get(name)})" for name in names]


def code_of(session: Mapping[str, Any]) -> str | None:
    """The commit of a session in twelve letters, and whether files differed from it; None without a checkout."""
    commit = session.get("commit")
    return commit and commit[:12] + " with changes" * session["dirty"]
