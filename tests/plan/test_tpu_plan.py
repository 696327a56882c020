"""Plans by a TPU's own compiler, of TPUs that are not here."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from dpojax import cli
from dpojax.configs import PlanConfig
from dpojax.plan.chips import TPUS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu (jax[tpu])"
)


def test_what_cannot_fit_is_not_compiled(capsys):
    status = cli.run(PlanConfig(model="llama3-8b", topology="v5e:2x2", dtype="bfloat16", optim="adamw"))
    out = capsys.readouterr().out
    assert status == 1 and "does not fit: it needs" in out and "nothing was compiled" in out


LIMITS = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from dpojax.plan.build import devices_of
from dpojax.plan.chips import topology_of

for name in sys.argv[1:]:
    one = Mesh(np.array(devices_of(topology_of(name))[:1]), ("x",))
    large = jax.ShapeDtypeStruct((2**37,), jnp.int8, sharding=NamedSharding(one, PartitionSpec()))
    try:
        jax.jit(lambda x: x[::-1]).lower(large).compile()
    except jax.errors.JaxRuntimeError as error:
        print(str(error).split("available HBM (")[1].split("G)")[0])
"""


def test_memory_of_chips_is_the_compilers_limit():
    names = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    command = [sys.executable, "-c", LIMITS, *(f"{chip}:{shape}" for chip, shape in names.items())]
    run = subprocess.run(
        command, env=env | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=300, check=True
    )
    assert [float(line) for line in run.stdout.split()] == [TPUS[chip].memory / 2**30 for chip in names]


TPU = {"model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
TPU |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 1024}


def test_a_plan_from_the_tpus_compiler(tmp_path):
    model, file = tmp_path / "config.json", tmp_path / "plan.json"
    model.write_text(json.dumps({**TPU, "rms_norm_eps": 1e-5}))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    flags = (
        "--topology v5e:2x2 --mesh.data 1 --mesh.fsdp 4 --dtype bfloat16 --max-length 1024 --remat block --batch-size 4"
    )
    command = [sys.executable, "-m", "dpojax", "plan", "--model", str(model), *flags.split(), "--json", str(file)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "the real step, compiled by libtpu" in run.stdout and "\nfits: " in run.stdout
    assert "Warning" not in run.stderr
    found = json.loads(file.read_text())
    (program,) = found["programs"]
    assert program["estimated"]["products"] > 0 and program["modelled"]["kernel"] > 0
    assert list(program["trips"].values()).count(2) >= 2  # the layers, forward and backward
    assert not program["unknown_loops"]
    # Each product three times, and again in the backward pass: of a layer all but the last, of the logits their chunks.
    weights, down = 2 * (256 * 128 * 8 + 3 * 256 * 512), 2 * 256 * 512
    assert program["flops"]["layers"] == 2 * 1536 * (4 * weights - down)
    assert program["flops"]["unembedding"] == 4 * 2 * 1024 * 256 * 512
    axes = {c["axes"] for c in program["collectives"]}
    assert axes == {"fsdp"}
    bounds = {bound: found["roofline"][bound] for bound in ("compute", "memory", "links")}
    assert found["seconds"] >= bounds["compute"]
    assert found["roofline"]["binds"] == max(bounds, key=bounds.__getitem__).replace("links", "interconnect")
    assert any("models/block.py" in line["source"] for line in program["lines"][:5])


def test_a_live_references_pass_is_compiled_too(tmp_path):
    model, file = tmp_path / "config.json", tmp_path / "plan.json"
    model.write_text(json.dumps({**TPU, "rms_norm_eps": 1e-5}))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    flags = "--topology v5e:2x2 --mesh.fsdp 4 --dtype bfloat16 --max-length 512 --batch-size 4 --reference live"
    command = [sys.executable, "-m", "dpojax", "plan", "--model", str(model), *flags.split(), "--json", str(file)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    step, reference = json.loads(file.read_text())["programs"]
    assert 0 < reference["estimated"]["products"] < step["estimated"]["products"]
