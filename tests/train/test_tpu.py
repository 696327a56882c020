"""The real train step, compiled for TPUs that are not here."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

COMPILE = """
import functools, json
import jax, jax.numpy as jnp, numpy as np, optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from dpojax.data.batches import pack
from dpojax.losses import sigmoid
from dpojax.models import DecoderConfig, make_apply, make_attention
from dpojax.sharding import batch_sharding, constrainer
from dpojax.train.objectives import preference_loss
from dpojax.train.step import abstract_state, jit_train_step, make_train_step, state_shardings
from dpojax.types import PairBatch, PairLogps

config = DecoderConfig(32000, 2048, 16, 16, 8, 128, 8192, 1e-5, 1e4, 4096, True)  # a Llama of 1.1 billion
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
mesh = Mesh(np.array(devices).reshape(2, 4, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
B, P, C, streams = 32, 500, 250, 8
lengths = np.full((B,), P, np.int32), np.full((B, 2), C, np.int32)
stream, scored = pack(*lengths, P, C, streams, B // streams * 1000, B // streams * 500)
zeros = lambda *shape: np.zeros(shape, np.int32)
batch = PairBatch(zeros(B, P), lengths[0], zeros(B, 2, C), lengths[1], np.ones(B, np.float32), stream, scored)
logps = PairLogps(*[np.zeros(B, np.float32)] * 2, *[zeros(B)] * 2)
rows = batch_sharding(mesh)
abstract = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), tree)

attention = make_attention("auto", mesh, "bfloat16")
apply_fn = make_apply(config, dtype="bfloat16", remat="block", constrain=constrainer(mesh), attention=attention)
loss_fn = preference_loss(apply_fn, functools.partial(sigmoid, beta=0.1), beta=0.1, chunk_tokens=2048)
optimizer = optax.adamw(1e-6)
shardings = state_shardings(mesh, config, optimizer)
step = jit_train_step(make_train_step(loss_fn, optimizer, lambda _: 1e-6), mesh, shardings)
program = step.lower(abstract_state(config, optimizer, shardings), abstract(batch), abstract(logps)).compile()
memory, text = program.memory_analysis(), program.as_text()
print(json.dumps({
    "kernels": text.count('custom_call_target="tpu_custom_call"'),
    "bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
}))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu (jax[tpu])")
def test_train_step_compiles_for_sixteen_chips():
    """A 1.1B model in bfloat16 over data 2 x fsdp 4 x tensor 2: Splash is chosen, and it fits into 16 GB a chip."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    env |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    env |= {"TPU_ACCELERATOR_TYPE": "v5litepod-16"}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["kernels"] == 4  # forward, the same again in the backward pass, dq and dkv
    assert found["bytes"] < 16e9
