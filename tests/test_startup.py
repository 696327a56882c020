"""What commands set before they compute."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import jax, jax.numpy as jnp
from dpojax.startup import prepare
prepare()
x = jnp.ones((64, 64))
f = jax.jit(lambda x: sum(jnp.sin(x @ x + i) for i in range(120)).sum())
print(float(f(x)))
"""

TOUCH = """
import resource, sys, numpy as np
import jax
from dpojax.startup import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(1 << 24).sum()
before = faults()
for _ in range(8):
    np.ones(1 << 24).sum()
print(faults() - before)
"""


def run(script, *args, **env):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))} | env
    command = [sys.executable, "-c", script, *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    return float(done.stdout)


def test_compiled_programs_are_kept(tmp_path):
    first = run(SCRIPT, JAX_PLATFORMS="cpu", XDG_CACHE_HOME=str(tmp_path))
    kept = sorted((tmp_path / "dpojax" / "xla").rglob("*-cache"))
    assert kept
    assert run(SCRIPT, JAX_PLATFORMS="cpu", XDG_CACHE_HOME=str(tmp_path)) == first
    assert sorted((tmp_path / "dpojax" / "xla").rglob("*-cache")) == kept


def test_jaxs_own_option_has_the_say(tmp_path):
    own = tmp_path / "own"
    run(SCRIPT, JAX_PLATFORMS="cpu", XDG_CACHE_HOME=str(tmp_path / "x"), JAX_COMPILATION_CACHE_DIR=str(own))
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_used_again():
    """Arrays of 128 MB, made and dropped: the kernel is asked for their pages once, not each time."""
    kept, given_back = (run(TOUCH, how, JAX_PLATFORMS="cpu") for how in ("kept", "given back"))
    assert kept < given_back / 4
