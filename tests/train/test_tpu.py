"""The real train step, compiled for TPUs that are not here."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu (jax[tpu])"
)
COMPILE = """
import json, sys
import jax, numpy as np, optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from dpojax.configs import ComputeOptions
from dpojax.losses import LOSSES
from dpojax.models.config import Attention, DecoderConfig, LayerKind, Mlp, Norm, Rope
from dpojax.packing import PairBatch, pack
from dpojax.train import lower_step, make_program

sizes = dict(vocab_size=32000, max_positions=4096, tied=True, norm=Norm(eps=1e-5), positions=Rope(theta=1e4))
# of 1.1 billion; and a small one with capped scores, and windows in every other layer
llama = DecoderConfig(
    width=2048, layers=16, mlp=Mlp(width=8192), attention=Attention(heads=16, kv_heads=8, head_dim=128), **sizes
)
gemma2 = DecoderConfig(
    width=1024, layers=2, mlp=Mlp(width=1024, act="gelu_tanh"), residual="pre_post", logits_softcap=30.0,
    attention=Attention(heads=8, kv_heads=4, head_dim=128, scale=256**-0.5, softcap=50.0), embed_scale=32.0,
    kinds=(LayerKind(), LayerKind(window=32)), kind_of_layer=(1, 0), **sizes
)
config, topology, shape = {"llama": (llama, "4x4", (2, 4, 2)), "gemma2": (gemma2, "2x2", (1, 2, 2))}[sys.argv[1]]
devices = topologies.get_topology_desc(platform="tpu", topology_name=f"v5e:{topology}").devices
mesh = Mesh(np.array(devices).reshape(shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
B, P, C, sequences = (32, 500, 250, 8) if sys.argv[1] == "llama" else (8, 60, 30, 4)
lengths = np.full((B,), P, np.int32), np.full((B, 2), C, np.int32)
packing = pack(*lengths, P, C, sequences, B // sequences * 1000, B // sequences * 500)
zeros = lambda *shape: np.zeros(shape, np.int32)
batch = PairBatch(zeros(B, P), lengths[0], zeros(B, 2, C), lengths[1], np.ones(B, np.float32), packing)
compute = ComputeOptions(dtype="bfloat16", remat="block", logprob_chunk_tokens=2048)
program = make_program(config, LOSSES["sigmoid"], mesh=mesh, optimizer=optax.adamw(1.0), compute=compute)
program = lower_step(program, batch).compile()
memory, text = program.memory_analysis(), program.as_text()
print(json.dumps({
    "kernels": text.count('custom_call_target="tpu_custom_call"'),
    "bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
    "scattered": text.count("AllReduceScatterFusion") + text.count(" reduce-scatter("),
    "stacked": sum(" all-gather" in line and "f32[16," in line for line in text.splitlines()),
}))
"""


SLICES = """
import json, math, re
import jax, numpy as np, optax
from jax.experimental import topologies
from dpojax.configs import ComputeOptions, MeshConfig
from dpojax.losses import LOSSES
from dpojax.models import abstract_params
from dpojax.models.config import Attention, DecoderConfig, Mlp, Norm, Rope
from dpojax.packing import PairBatch
from dpojax.sharding import make_mesh
from dpojax.train import lower_step, make_program

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
mesh = make_mesh(MeshConfig(fsdp=4), devices)
config = DecoderConfig(
    vocab_size=1024, width=512, layers=2, mlp=Mlp(width=1024), norm=Norm(eps=1e-5), positions=Rope(theta=1e4),
    attention=Attention(heads=4, kv_heads=4, head_dim=128), max_positions=2048, tied=False,
)
B, P, C = 8, 128, 64
zeros = lambda *shape: np.zeros(shape, np.int32)
batch = PairBatch(zeros(B, P), zeros(B) + P, zeros(B, 2, C), zeros(B, 2) + C, np.ones(B, np.float32))
compute = ComputeOptions(dtype="bfloat16")
program = make_program(config, LOSSES["sigmoid"], mesh=mesh, optimizer=optax.adamw(1.0), compute=compute)
text = lower_step(program, batch).compile().as_text()
sends = [line for line in text.splitlines() if " send(" in line]
sent = [re.search(r"= \\((bf16|f32)\\[([\\d,]+)\\]", line).groups() for line in sends]
groups = re.findall(r" (?:all-gather|reduce-scatter|all-to-all)(?:-start)?\\(.*replica_groups=(\\S+),", text)
print(json.dumps({
    "slices": [[device.slice_index for device in copy.flat] for copy in mesh.devices],
    "groups": sorted(set(groups)),
    "sent": sum({"bf16": 2, "f32": 4}[kind] * math.prod(map(int, n.split(","))) for kind, n in sent),
    "parameters": sum(x.size for x in jax.tree.leaves(abstract_params(config))),
}))
"""


def compiled(script: str, *arguments: str) -> dict:
    """What a script says that compiles for a TPU."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    env |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    env |= {"TPU_ACCELERATOR_TYPE": "v5litepod-16"}
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@NEEDS_LIBTPU
@pytest.mark.parametrize(("model", "kernels"), [("llama", 4), ("gemma2", 8)])
def test_train_step_compiles_for_a_pod(model, kernels):
    """In bfloat16 over data 2 x fsdp 4 x tensor 2, or fsdp 2 x tensor 2: Splash is chosen, and it fits into 16 GB."""
    found = compiled(COMPILE, model)
    # Of each kind of layers: forward, the same again in the backward pass, dq and dkv.
    assert found["kernels"] == kernels
    assert found["bytes"] < 16e9
    assert found["scattered"] > 0 or model != "llama"  # gradients, each to the devices that hold the parameter
    assert found["stacked"] == 0  # no parameter of all layers is gathered


@NEEDS_LIBTPU
def test_over_the_network_of_two_slices_go_gradients_alone():
    """Each slice holds a copy, gathers within itself, and sends its shares of the gradients."""
    found = compiled(SLICES)
    assert found["slices"] == [[0] * 4, [1] * 4]
    assert found["groups"] == ["{{0,1,2,3}}"]  # numbered within a slice
    share = found["parameters"] / 4
    assert 2 * share < found["sent"] < 2.3 * share  # bytes of bfloat16, but for the embedding's in float32
