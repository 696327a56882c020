"""Manifests of JobSets: the fields that Kubernetes and JobSet know, and processes that find each other by them.

What is known here is the part of the definitions of jobset.x-k8s.io/v1alpha2, batch/v1 and core/v1 that we write.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpojax import processes

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "launch" / "gke_jobset.py"
TEXTS = {str: str}
TOLERATION = {"key": str, "operator": {"Exists", "Equal"}, "value": str, "effect": {"NoSchedule"}}
POD = {
    "restartPolicy!": {"Never"},  # what podFailurePolicy needs
    "hostNetwork": bool,
    "dnsPolicy": {"ClusterFirstWithHostNet"},
    "terminationGracePeriodSeconds": int,
    "nodeSelector": TEXTS,
    "tolerations": [TOLERATION],
    "serviceAccountName": str,
    "containers!": [
        {
            "name!": str,
            "image!": str,
            "command": [str],
            "env": [{"name!": str, "value!": str}],
            "securityContext": {"privileged": bool},
            "resources": {"limits": {str: int}},
        }
    ],
}
EXIT_CODES = {"containerName": str, "operator!": {"In", "NotIn"}, "values!": [int]}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": {"Indexed"},
    "backoffLimit": int,
    "podFailurePolicy": {"rules!": [{"action!": {"FailJob", "Ignore", "Count"}, "onExitCodes": EXIT_CODES}]},
    "template!": {"metadata": {"labels": TEXTS}, "spec": POD},
}
RULE = {"name!": str, "action!": {"FailJobSet", "RestartJobSet"}, "onJobFailureReasons": [str]}
JOBSET = {
    "apiVersion!": {"jobset.x-k8s.io/v1alpha2"},
    "kind!": {"JobSet"},
    "metadata!": {"name!": str, "labels": TEXTS, "annotations": TEXTS},
    "spec!": {
        "ttlSecondsAfterFinished": int,
        "failurePolicy": {"maxRestarts": int, "rules": [RULE]},
        "network": {"enableDNSHostnames": bool},
        "replicatedJobs!": [{"name!": str, "replicas": int, "template!": {"spec": JOB}}],
    },
}


def check(value: Any, known: Any, path: str = "") -> None:
    """Fail where a value is none of what is known there."""
    if isinstance(known, type):
        assert type(value) is known, f"{path}: {value!r}"
    elif isinstance(known, set):
        assert value in known, f"{path}: {value!r}"
    elif isinstance(known, list):
        for i, x in enumerate(value):
            check(x, known[0], f"{path}[{i}]")
    elif str in known:
        assert all(type(k) is str and type(x) is known[str] for k, x in value.items()), f"{path}: {value}"
    else:
        fields = {name.rstrip("!"): inner for name, inner in known.items()}
        assert value.keys() <= fields.keys(), f"{path}: {value.keys() - fields.keys()}"
        assert value.keys() >= {name[:-1] for name in known if name.endswith("!")}, path
        for name, x in value.items():
            check(x, fields[name], f"{path}.{name}")


def ask(*given: str) -> subprocess.CompletedProcess:
    words = [sys.executable, SCRIPT, "--name", "align", "--image", "image", *given, "--", "dpo", "--loss", "a b"]
    return subprocess.run(words, capture_output=True, text=True)


def made(*given: str) -> tuple[dict, dict, dict]:
    """The JobSet, its job, and the container of its pods."""
    asked = ask(*given)
    assert asked.returncode == 0, asked.stderr
    whole = yaml.safe_load(asked.stdout)
    check(whole, JOBSET)
    (replicated,) = whole["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["dpojax", "dpo", "--loss", "a b"]
    return whole, job, container


@pytest.mark.parametrize(
    ("name", "accelerator", "topology", "hosts", "chips"),
    [
        ("v5e:16x16", "tpu-v5-lite-podslice", "16x16", 64, 4),
        ("v5p:4x4x4", "tpu-v5p-slice", "4x4x4", 16, 4),
        ("v6e:1x1", "tpu-v6e-slice", "1x1", 1, 1),
    ],
)
def test_slices_of_tpus(name, accelerator, topology, hosts, chips):
    whole, job, container = made("--tpu", name, "--spot", "--queue", "multislice-queue", "--service-account", "account")
    pod = job["template"]["spec"]
    assert job["parallelism"] == job["completions"] == hosts and job["backoffLimit"] == 0
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    chosen = {"accelerator": accelerator, "topology": topology}
    assert {key: pod["nodeSelector"][f"cloud.google.com/gke-tpu-{key}"] for key in chosen} == chosen
    assert "env" not in container  # GKE's own
    labels, annotations = whole["metadata"]["labels"], whole["metadata"]["annotations"]
    assert labels == {"kueue.x-k8s.io/queue-name": "multislice-queue", "xpk.google.com/workload": "align"}
    assert annotations == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}


def test_bad_input_alone_ends_it():
    whole, job, container = made("--tpu", "v5e:2x2")
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    policy = whole["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 20 and policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_nodes_of_gpus_find_each_other(monkeypatch):
    whole, job, container = made("--gpu", "nvidia-h100-80gb", "--nodes", "4", "--env", "A=b=c")
    assert job["completions"] == 4 and container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    env = {item["name"]: item["value"] for item in container["env"]}
    assert env.pop("A") == "b=c" and env.pop("JAX_LOCAL_DEVICE_IDS") == "0,1,2,3,4,5,6,7"
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    # The first pod's name, by JobSet: jobset-replicated job-job's index-pod's index.subdomain
    first = f"align-{whole['spec']['replicatedJobs'][0]['name']}-0-0.align:6002"
    assert processes.launched() == {"coordinator_address": first, "num_processes": 4, "process_id": 3}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--tpu", "v5e:4x4x4"], "a topology of v5e has 2 numbers"),
        (["--tpu", "v7:2x2"], "the chip must be one of v4, v5e"),
        (["--tpu", "v5e:3x3"], "9 chips do not fill hosts of 4"),
        (["--tpu", "v5e:2x2", "--nodes", "2"], "a slice's topology says its hosts"),
        (["--tpu", "v5e:2x2", "--name", "Align"], "--name Align: must be small letters"),
        (["--gpu", "a", "--nodes", "0"], "--nodes 0: must be at least 1"),
        (["--gpu", "a", "--env", "A"], "--env A: must be NAME=VALUE"),
    ],
)
def test_bad_input(given, said):
    asked = ask(*given)
    assert (asked.returncode, asked.stdout) == (2, "") and said in asked.stderr.splitlines()[-1]


def test_the_check_can_fail():
    whole, job, _ = made("--tpu", "v5e:2x2")
    job["backofLimit"] = job.pop("backoffLimit")
    with pytest.raises(AssertionError, match="backofLimit"):
        check(whole, JOBSET)
