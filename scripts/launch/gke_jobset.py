"""Print the manifest of a JobSet that runs a dpojax command on slices of TPUs, or nodes of GPUs, of a GKE cluster.

    python scripts/launch/gke_jobset.py --name align --image IMAGE --tpu v5e:16x16 -- dpo --model gs://... > align.yaml
    python scripts/launch/gke_jobset.py --name align --image IMAGE --gpu nvidia-h100-80gb --nodes 4 -- dpo ...
    kubectl apply -f align.yaml

Nothing is run or asked: what is printed is all there is. Labels, node selectors and the restart policy are XPK's
(github.com/AI-Hypercomputer/xpk), so that its clusters and commands take such a job for one of theirs. IMAGE is a
container image with dpojax and jax[tpu] or jax[cuda13] in it.
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml


class Chip(NamedTuple):
    """What GKE calls a kind of TPU, and how many numbers its topologies have."""

    accelerator: str
    axes: int


CHIPS = {
    "v4": Chip("tpu-v4-podslice", 3),
    "v5e": Chip("tpu-v5-lite-podslice", 2),
    "v5p": Chip("tpu-v5p-slice", 3),
    "v6e": Chip("tpu-v6e-slice", 2),
    "tpu7x": Chip("tpu7x", 3),
}
CHIPS_PER_HOST = 4  # of all machine types that slices of several hosts are made of
REPLICATED_JOB = "slice-job"
CONTAINER = "dpojax"
PORT = 6002
BAD_INPUT = 2
"""The exit status of dpojax that starting again does not mend."""


def slice_of(name: str) -> tuple[Chip, str, int]:
    """The chip, the topology as GKE writes it, and the number of chips of a slice named as for ``dpojax plan``.

    Raises:
      ValueError: it is none.
    """
    kind, _, topology = name.partition(":")
    if kind not in CHIPS:
        raise ValueError(f"--tpu {name}: the chip must be one of {', '.join(CHIPS)}, as in v5e:16x16")
    chip = CHIPS[kind]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)" + f"{{{chip.axes - 1}}}", topology):
        example = "x".join(["4"] * chip.axes)
        raise ValueError(f"--tpu {name}: a topology of {kind} has {chip.axes} numbers, as in {kind}:{example}")
    chips = math.prod(map(int, topology.split("x")))
    if chips > 1 and chips % CHIPS_PER_HOST:
        raise ValueError(f"--tpu {name}: {chips} chips do not fill hosts of {CHIPS_PER_HOST}; name a larger topology")
    return chip, topology, chips


def tpu_pod(name: str) -> tuple[int, dict[str, Any]]:
    """The hosts of a slice, and what its pods ask for. GKE itself tells them which worker they are."""
    chip, topology, chips = slice_of(name)
    per_host = min(chips, CHIPS_PER_HOST)
    return chips // per_host, {
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": chip.accelerator,
            "cloud.google.com/gke-tpu-topology": topology,
        },
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}],
        "container": {
            "securityContext": {"privileged": True},
            "resources": {"limits": {"google.com/tpu": per_host}},
        },
    }


def gpu_pod(name: str, jobset: str, nodes: int, gpus: int) -> dict[str, Any]:
    """What pods of GPUs ask for: one process a node, which the first one's address by the JobSet's own DNS brings
    together. The index of each is in JOB_COMPLETION_INDEX, which Kubernetes sets."""
    env = {
        "JAX_COORDINATOR_ADDRESS": f"{jobset}-{REPLICATED_JOB}-0-0.{jobset}:{PORT}",
        "JAX_NUM_PROCESSES": str(nodes),
        # Said by hand, so that JAX asks neither Kubernetes nor a node's other processes.
        "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(gpus))),
    }
    return {
        "nodeSelector": {"cloud.google.com/gke-accelerator": name},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "container": {
            "env": [{"name": key, "value": value} for key, value in env.items()],
            "resources": {"limits": {"nvidia.com/gpu": gpus}},
        },
    }


def pod_of(options: argparse.Namespace, kind: dict[str, Any]) -> dict[str, Any]:
    """A pod's specification."""
    if options.spot:
        kind["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
        kind["tolerations"].append({"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"})
    env = [{"name": name, "value": value} for name, _, value in (item.partition("=") for item in options.env)]
    container = {
        "name": CONTAINER,
        "image": options.image,
        # No shell: signals and exit statuses are dpojax' own.
        "command": ["dpojax", *options.command],
        **kind["container"],
    }
    if env or "env" in container:
        container["env"] = container.get("env", []) + env
    return {
        "restartPolicy": "Never",
        # The hosts' own network, as XPK has it.
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": options.grace,
        **({"serviceAccountName": options.service_account} if options.service_account else {}),
        "nodeSelector": kind["nodeSelector"],
        "tolerations": kind["tolerations"],
        "containers": [container],
    }


def job_of(options: argparse.Namespace, labels: dict[str, str]) -> dict[str, Any]:
    """The specification of the job that all processes are.

    Raises:
      ValueError: bad options.
    """
    if options.tpu:
        hosts, kind = tpu_pod(options.tpu)
    else:
        hosts, kind = options.nodes, gpu_pod(options.gpu, options.name, options.nodes, options.gpus_per_node)
    bad_input = {"containerName": CONTAINER, "operator": "In", "values": [BAD_INPUT]}
    return {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one process fewer, and all begin again
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": bad_input}]},
        "template": {"metadata": {"labels": labels}, "spec": pod_of(options, kind)},
    }


def manifest(options: argparse.Namespace) -> dict[str, Any]:
    """The JobSet.

    Raises:
      ValueError: bad options.
    """
    own = {"xpk.google.com/workload": options.name}
    queue = {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {}
    metadata: dict[str, Any] = {"name": options.name, "labels": queue | own}
    if options.tpu:  # a slice is a node pool
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    job = job_of(options, dict(own))
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "ttlSecondsAfterFinished": options.ttl,
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "rules": [{"name": "badInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "network": {"enableDNSHostnames": True},
            "replicatedJobs": [{"name": REPLICATED_JOB, "replicas": 1, "template": {"spec": job}}],
        },
    }


def parser() -> argparse.ArgumentParser:
    """The options."""
    parsed = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsed.add_argument("--name", required=True, help="the JobSet's name, small letters, digits and dashes")
    parsed.add_argument("--image", required=True, help="container image")
    where = parsed.add_mutually_exclusive_group(required=True)
    where.add_argument("--tpu", help="slice, as for dpojax plan: v5e:16x16, v5p:4x4x4")
    where.add_argument("--gpu", help="kind of GPU, as GKE names it: nvidia-h100-80gb")
    parsed.add_argument("--nodes", type=int, default=1, help="nodes of GPUs (default: 1)")
    parsed.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of each node (default: 8)")
    parsed.add_argument("--spot", action="store_true", help="run on nodes that may be taken away")
    parsed.add_argument("--queue", help="Kueue's local queue, as XPK's multislice-queue (default: none)")
    parsed.add_argument("--service-account", help="Kubernetes service account that may read and write the bucket")
    parsed.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    parsed.add_argument(
        "--max-restarts", type=int, default=20, help="times that all begin again; bad input never does (default: 20)"
    )
    parsed.add_argument("--grace", type=int, default=120, help="seconds for saving, after SIGTERM (default: 120)")
    parsed.add_argument("--ttl", type=int, default=43200, help="seconds until an ended JobSet goes (default: 12 hours)")
    parsed.add_argument("command", nargs="+", help="a command of dpojax and its options, behind --")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parser()
    options = parsed.parse_args(arguments)
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
        parsed.error(f"--name {options.name}: must be small letters, digits and dashes, at most 40")
    if options.tpu and (options.nodes, options.gpus_per_node) != (1, 8):
        parsed.error("--nodes and --gpus-per-node are for --gpu; a slice's topology says its hosts")
    for name, least in {"nodes": 1, "gpus_per_node": 1, "max_restarts": 0, "grace": 0, "ttl": 0}.items():
        if getattr(options, name) < least:
            parsed.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {least}")
    if bad := [item for item in options.env if not re.match(r"[A-Za-z_]\w*=", item)]:
        parsed.error(f"--env {bad[0]}: must be NAME=VALUE")
    try:
        yaml.safe_dump(manifest(options), sys.stdout, sort_keys=False, width=120)
    except ValueError as error:
        parsed.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
