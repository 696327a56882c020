"""From a command's options to the program of a run on devices that need not be here; no data, no weights are read."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpojax.configs import DPOConfig, PlanConfig, TrainOptions
from dpojax.data import COMPLETIONS
from dpojax.errors import UserError, first_line
from dpojax.models import DecoderConfig, config_from_hf
from dpojax.models.load import reward_config
from dpojax.models.params import flatten
from dpojax.models.presets import PRESETS, preset
from dpojax.models.safetensors import read_json
from dpojax.packing import Annotations, Packing, PairBatch
from dpojax.plan.chips import EXAMPLES, Topology
from dpojax.plan.collectives import Layout
from dpojax.plan.workload import Workload, full_rows, rows_of_lengths
from dpojax.train.by_name import PolicyFiles
from dpojax.train.program import Program, mesh_of, program_of
from dpojax.train.start import Start, begun, check_adapter_options, open_start, reference_of
from dpojax.train.task import Task, task_of
from dpojax.train.top_layers import check_top_layers

STEPS = 1000  # of a schedule; it is a constant of the program
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-256"}
ENVIRONMENT |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
"""What libtpu reads, so that it asks no cloud which machine this is, and takes no lock of it."""


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU that is not here; as much of a JAX device as a mesh asks for."""

    id: int
    process_index: int
    device_kind: str
    memory: float
    platform: str = "gpu"
    slice_index: int = 0

    def memory_stats(self) -> dict[str, float]:
        """What a GPU says of its memory, bytes."""
        return {"bytes_limit": self.memory}


@dataclasses.dataclass(frozen=True)
class Built:
    """A run's program, and what it is for.

    Attributes:
      config: the options.
      topology: the devices.
      task: the run's rows, objective and reference.
      start: the policy before its first step.
      reference: the reference's choices.
      ref_copy: whether a reference of its own lies beside the policy; otherwise it reads the policy's frozen arrays.
      program: the run's functions.
      work: the batch.
    """

    config: TrainOptions
    topology: Topology
    task: Task
    start: Start
    reference: DecoderConfig
    ref_copy: bool
    program: Program
    work: Workload

    @property
    def live(self) -> bool:
        """Whether the reference runs in every step."""
        return self.task.reference.form in ("live", "moving")

    @property
    def layout(self) -> Layout:
        """Where the mesh's devices are."""
        mesh = self.program.mesh
        places = tuple(tuple(getattr(d, "coords", ())) for d in mesh.devices.flat)
        rank = len(self.topology.shape)
        at = tuple(place[:rank] for place in places)
        topology = self.topology if all(len(place) == rank for place in at) else None
        return Layout(tuple(mesh.axis_names), tuple(mesh.shape.values()), topology, at)


def run_options(config: PlanConfig) -> DPOConfig:
    """The options of the run that a plan is for."""
    names = {f.name for f in dataclasses.fields(DPOConfig)}
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in names}
    return DPOConfig(data=("planned",), output="planned", **shared)


def devices_of(topology: Topology) -> list[Any]:
    """The devices of a topology, for a mesh: a TPU's from its compiler, a GPU's as stand-ins.

    Raises:
      UserError: libtpu is not installed, or does not know the shape.
    """
    if topology.chip.gpu:
        per_node, kind = topology.shape[1], topology.name.split(":")[0]
        return [Device(i, i // per_node, kind, topology.chip.memory) for i in range(topology.devices)]
    try:
        import libtpu  # noqa: F401
    except ImportError:
        needed = f"--topology {topology.name}: planning for a TPU needs its compiler, libtpu"
        raise UserError(f"{needed}; pip install 'dpojax[plan]'") from None
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except Exception as error:  # of several kinds; each means that libtpu has no such topology
        raise UserError(f"--topology {topology.name}: {first_line(error)}; use one as in {EXAMPLES}") from None
    return list(found.devices)


def build(
    config: TrainOptions,
    topology: Topology,
    devices: list[Any],
    *,
    prompt_length: int | None = None,
    lengths: np.ndarray | None = None,
    source: str = "",
) -> Built:
    """The program of a run's options on these devices.

    Args:
      config: the options.
      topology: of the devices.
      devices: of the mesh (:func:`devices_of`).
      prompt_length: tokens of prompts, where all rows are of full length (default: half of ``config.max_length``).
      lengths: ``[n, 1 + N]`` of a data set's rows (default: all are of full length).
      source: where the lengths are from.

    Raises:
      UserError: as the run itself would, of options, model and mesh.
    """
    task = task_of(config)
    start = open_shape(config, reward=task.traits.on == "scores")
    check_top_layers(config.train_top_layers, start.config)
    reference, files = reference_of(start, task.reference.model, config.max_length)
    mesh = mesh_of(config, task, reference, start.config.lora, devices)
    program = program_of(config, task, reference, mesh, STEPS, start.config.lora)
    each = completions_of(task)
    if lengths is not None:
        work = rows_of_lengths(lengths, config.batch_size, program.sequences, source, config.max_shapes)
    else:
        prompt = config.max_length // 2 if prompt_length is None else prompt_length
        if not 0 < prompt < config.max_length:
            raise UserError(f"--prompt-length {prompt}: must be above 0 and below --max-length {config.max_length}")
        work = full_rows(config.batch_size, each, prompt, config.max_length - prompt, program.sequences)
    whole = files is not None or task.reference.form == "moving" or config.train_top_layers is not None
    return Built(config, topology, task, start, reference, whole or start.config.lora is None, program, work)


def completions_of(task: Task) -> int:
    """N, completions of a row."""
    if task.kind.form == "labels":
        return 2 if "mismatched" in task.traits.reads else 1
    return 1 if task.kind == COMPLETIONS else 2


def open_shape(config: TrainOptions, *, reward: bool) -> Start:
    """The policy that a run's options begin with, of a preset, of a ``config.json``, or of a model with weights.

    Raises:
      UserError: no such model, or its options do not go together.
    """
    raw = raw_config(config.model)
    if raw is None or config.adapter is not None:
        return open_start(config, reward=reward)
    check_adapter_options(config, new=config.lora_rank is not None, read=False)
    shape, facts = config_from_hf(raw, config.model), dict(raw)
    if reward:
        shape, facts = reward_config(shape, facts)
    return begun(config, PolicyFiles(config.model, shape, facts, {}, _no_weights), reward=reward)


def _no_weights(mesh: Mesh | None) -> NoReturn:
    raise AssertionError("a plan reads no weights")


def raw_config(name: str) -> dict[str, Any] | None:
    """The ``config.json`` of a preset, of a file, of a directory or of a hub id; None where a model is of another kind,
    a run, an adapter or a ``.gguf`` file.

    Raises:
      UserError: no such model.
    """
    if name in PRESETS:
        return preset(name)[1]
    path = Path(name).expanduser()
    if path.is_file():
        return read_json(path) if path.suffix == ".json" else None
    if path.is_dir():
        file = path / "config.json"
        return read_json(file) if file.exists() and not (path / "adapter_config.json").exists() else None
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith((".gguf", ".json")):
        known = ", ".join(PRESETS)
        raise UserError(f"--model {name}: no such preset, file or directory; the presets are {known}")
    from huggingface_hub import hf_hub_download

    try:
        return read_json(Path(hf_hub_download(name, "config.json")))
    except UserError:
        raise
    except Exception as error:  # the hub client raises many kinds; each means the same to the user
        raise UserError(f"--model {name}: the hub did not give its config.json ({first_line(error)})") from None


def abstract_batch(built: Built) -> PairBatch:
    """Shapes and dtypes of a batch; nothing is allocated."""
    work, traits = built.work, built.task.traits
    B, N, P, C, R = work.rows, work.each, work.prompt, work.completion, work.sequences
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    fields: dict[str, Any] = {}
    if "margin" in traits.reads:
        fields["score"] = floats(B, N)
    if "weight" in traits.reads:
        fields["weight"] = floats(B)
    if built.task.kind.form == "labels":
        fields["label"] = floats(B)
    hidden = None
    if built.config.train_top_layers is not None:
        width = built.start.config.width
        hidden = jax.ShapeDtypeStruct((R, work.tokens, width), jnp.dtype(built.config.dtype))
    packing: Any = Packing(ints(R, work.tokens), ints(R, work.targets))  # type: ignore[arg-type]
    packing = None if work.padded and hidden is None else packing
    arrays: dict[str, Any] = {
        "prompt": ints(B, P),
        "prompt_len": ints(B),
        "completions": ints(B, N, C),
        "completion_len": ints(B, N),
        "valid": floats(B),
        "packing": packing,
        "annotations": Annotations(**fields),
        "hidden": hidden,
    }
    return PairBatch(**arrays)


# ---- what lies on a device ------------------------------------------------------------------------------------------


def bytes_of_shards(tree: Any) -> float:
    """Bytes of one device's part of arrays that have shardings."""
    total = 0.0
    for x in jax.tree.leaves(tree):
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            total += float(np.prod(x.sharding.shard_shape(x.shape))) * jnp.dtype(x.dtype).itemsize
    return total


def state_bytes(built: Built) -> Mapping[str, float]:
    """Bytes a device of what lies there between steps, and of the gradients, by their shapes and shardings."""
    from dpojax.models import abstract_params

    state = built.program.layout.abstract()
    out = {
        "parameters": bytes_of_shards(state.params) + bytes_of_shards(state.frozen),
        "optimizer": bytes_of_shards(state.opt_state),
        "gradients": bytes_of_shards(state.params),
        "reference": 0.0,
    }
    if built.live and built.ref_copy:
        out["reference"] = bytes_of_shards(abstract_params(built.reference, built.program.mesh))
    return out


def adapter_size(built: Built) -> float:
    """Parameters of the adapter that alone is trained; 0 without one."""
    if built.start.config.lora is None:
        return 0.0
    trained = flatten(built.program.layout.abstract().params)
    return float(sum(np.prod(x.shape) for path, x in trained.items() if path.startswith("blocks/")))
