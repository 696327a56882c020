"""How a process finds that it is one of several."""

import pytest

from dpojax import processes
from dpojax.errors import UserError

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JOB_COMPLETION_INDEX", "SLURM_NTASKS")
NAMES += ("SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "KUBERNETES_SERVICE_HOST")
BY_HAND = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
ARGUMENTS = {"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 3}


def launched_in(monkeypatch, env: dict[str, str]) -> dict | None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return processes.launched()


@pytest.mark.parametrize(
    ("env", "arguments"),
    [
        ({}, None),
        (BY_HAND, ARGUMENTS),
        ({**BY_HAND, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        # an indexed job of Kubernetes that says the rest by hand
        (
            {
                "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
                "JAX_NUM_PROCESSES": "4",
                "JOB_COMPLETION_INDEX": "3",
                "KUBERNETES_SERVICE_HOST": "10.1.1.1",
            },
            ARGUMENTS,
        ),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "node[1-2]"}, {}),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "node[1-2]", "JAX_COORDINATOR_ADDRESS": "node1:1"}, {}),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, None),
        ({"SLURM_NTASKS": "2"}, None),  # a batch script, outside of srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        ({"KUBERNETES_SERVICE_HOST": "10.1.1.1"}, None),  # a pod by itself
        ({"KUBERNETES_SERVICE_HOST": "10.1.1.1", "JOB_COMPLETION_INDEX": "1"}, {}),
    ],
)
def test_by_the_environment(monkeypatch, env, arguments):
    assert launched_in(monkeypatch, env) == arguments


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, "JAX_NUM_PROCESSES: is not set"),
        ({**BY_HAND, "JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES: is no number"),
        ({**BY_HAND, "JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID 4: must be from 0 to 3"),
    ],
)
def test_what_is_wrong_there_is_named(monkeypatch, env, name):
    with pytest.raises(UserError, match=name):
        launched_in(monkeypatch, env)


def test_one_process_is_the_first_and_has_everything():
    assert processes.count() == 1 and processes.first() and processes.owns(3)
    assert processes.exchange(b"ab") == [b"ab"] and processes.from_first("ä") == "ä"
    assert processes.all_of(True) and not processes.all_of(False)
    assert not processes.asked_to_stop(1)
