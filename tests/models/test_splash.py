"""The Splash kernel against a plain softmax, its blocks counted, and compiled for TPUs that are not here."""

import importlib.util
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from dpojax.logprobs import completion_logps
from dpojax.models import make_apply, splash
from dpojax.models.attention import cudnn_attend, from_padded, shared_prompt_attention
from dpojax.models.splash import SharedPromptMask, block_of, splash_attention, splash_kernel
from tests.conftest import random_batch
from tests.models.families import FAMILIES as TINY
from tests.models.test_families import random_model, same_gradients

# B, P, C, N, H, K, h
SHAPES = [
    (2, 100, 70, 2, 4, 2, 16),
    (3, 128, 64, 2, 2, 2, 8),
    (2, 37, 61, 3, 2, 1, 64),
    (1, 5, 9, 1, 2, 2, 128),
]


def sees(P: int, C: int, N: int, window: int | None = None) -> np.ndarray:
    """The shared-prompt mask, token by token."""
    S = P + N * C
    completion = [-1] * P + [n for n in range(N) for _ in range(C)]
    place = [*range(P), *[P + i for _ in range(N) for i in range(C)]]
    near = lambda i, j: window is None or place[i] - place[j] < window  # noqa: E731
    return np.array([[j <= i and completion[j] in (-1, completion[i]) and near(i, j) for j in range(S)]
                     for i in range(S)])  # fmt: skip


def plain(q, k, v, visible, softcap=None):
    """Softmax attention with the whole matrix in float32; no part of it is from dpojax or jax.nn."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (q, jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    weights = jax.nn.softmax(jnp.where(visible[:, None], logits, -1e30), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def problem(B, P, C, N, H, K, h, dtype=jnp.float32, window=None):
    """Inputs; prompt lengths from 1 to P; where tokens are real; who sees whom; a cotangent for what is real."""
    rng = np.random.default_rng(0)
    S = P + N * C
    q, k, v, ct = (jnp.asarray(rng.normal(size=(B, S, n, h)), dtype) for n in (H, K, K, H))
    prompt_len = np.linspace(P, 1, B).astype(np.int32)
    completion_len = rng.integers(1, C + 1, (B, N))
    real = np.zeros((B, S), bool)
    for b in range(B):
        real[b, P - prompt_len[b] : P] = True
        for n in range(N):
            real[b, P + n * C : P + n * C + completion_len[b, n]] = True
    visible = sees(P, C, N, window)[None] & (np.arange(S) >= P - prompt_len[:, None])[:, None]
    return (q, k, v), jnp.asarray(prompt_len), real, visible, jnp.where(real[:, :, None, None], ct, 0)


def compare(shape, mesh=None, dtype=jnp.float32, atol=2e-6, **form):
    """Values at real tokens and all gradients."""
    _, P, C, *_ = shape
    qkv, prompt_len, real, visible, ct = problem(*shape, dtype=dtype, window=form.get("window"))
    at_real = real[:, :, None, None]

    def vjp(attention, qkv, ct):
        out, back = jax.vjp(attention, *qkv)
        return out, back(ct.astype(out.dtype))

    form = {"prompt": P, "completion": C, **form}
    splashed = lambda *qkv: splash_attention(*qkv, prompt_len, mesh=mesh, interpret=True, **form)  # noqa: E731
    softmax = partial(plain, visible=visible, softcap=form.get("softcap"))
    kernel = jax.jit(partial(vjp, splashed))
    out, grads = kernel(qkv, ct)
    expected, expected_grads = jax.jit(partial(vjp, softmax))(qkv, ct)
    assert out.dtype == dtype and out.shape == qkv[0].shape
    np.testing.assert_allclose(np.where(at_real, out, 0), np.where(at_real, expected, 0), atol=atol, rtol=atol)
    for got, want in zip(grads, expected_grads, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=5 * atol, rtol=atol)
    assert all(jnp.isfinite(x).all() for x in (out, *grads))
    # Padding may hold any number, and a cotangent there must not turn into a NaN elsewhere.
    assert all(jnp.isfinite(x).all() for x in kernel(tuple(30 * x for x in qkv), jnp.ones_like(ct))[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_plain_softmax(shape, monkeypatch):
    """Blocks of 128, so that even short rows have empty, partial and full ones."""
    monkeypatch.setattr(splash, "MAX_BLOCK", 128)
    compare(shape)


def test_equals_a_plain_softmax_in_the_blocks_of_a_long_row():
    assert block_of(300 + 2 * 180) == 384
    compare((1, 300, 180, 2, 2, 1, 16))


@pytest.mark.parametrize(("window", "softcap"), [(1, None), (7, 1.5), (50, None), (130, 0.5), (1000, 2.0), (None, 1.0)])
def test_windows_and_caps_equal_a_plain_softmax(window, softcap, monkeypatch):
    """Windows that end in the completion, in the prompt, and before both."""
    monkeypatch.setattr(splash, "MAX_BLOCK", 128)
    compare((2, 100, 70, 2, 4, 2, 16), window=window, softcap=softcap)


@pytest.mark.parametrize("name", ["gemma2", "gpt2 scaled", "mistral window"])
def test_a_models_values_and_gradients_are_those_of_xlas_kernel(name):
    """Window, cap and scale of scores together, and scales of layers, over packed sequences."""
    model = random_model(TINY[name])
    batch = random_batch(np.random.default_rng(0), B=4, P=9, C=11, sequences=2)

    def interpreted(inputs, window, softcap):
        form = {"prompt": inputs.prompt, "completion": inputs.completion, "window": window, "softcap": softcap}
        return from_padded(partial(splash_attention, interpret=True, **form), inputs)

    def run(attention):
        apply_fn = make_apply(model.config, attention=attention)
        sums = lambda params: completion_logps(apply_fn, params, batch)  # noqa: E731
        return jax.jit(lambda params: (sums(params), jax.grad(lambda p: sums(p).sum())(params)))(model.params)

    (sums, gradients), (expected, expected_gradients) = run(interpreted), run(shared_prompt_attention)
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    same_gradients(gradients, expected_gradients)


@pytest.mark.parametrize(("head_dim", "softcap", "own"), [(64, None, True), (80, None, True), (128, None, True),
                         (128, 50.0, False), (256, None, False), (60, None, False)])  # fmt: skip
def test_cudnn_leaves_to_xla_what_it_has_no_kernel_for(head_dim, softcap, own, monkeypatch):
    asked = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *_, implementation, **__: asked.append(q) or q)
    q = jnp.ones((1, 4, 2, head_dim))
    assert cudnn_attend(q, q, q, jnp.ones((1, 4, 4), bool), softcap).shape == q.shape
    assert bool(asked) == own


def test_bfloat16(monkeypatch):
    monkeypatch.setattr(splash, "MAX_BLOCK", 128)
    compare((2, 60, 40, 2, 2, 1, 64), dtype=jnp.bfloat16, atol=1e-2)


@pytest.mark.parametrize("names", [("data", "fsdp", "tensor"), ("fsdp",)], ids=str)
def test_split_over_a_mesh(names):
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    shape = [sizes[name] for name in names]
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    compare((4, 60, 34, 2, 4, 2, 8), mesh=Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names)))


@pytest.mark.parametrize(("P", "C", "N"), [(5, 3, 2), (1, 1, 4), (7, 6, 1), (0, 4, 2)])
def test_mask(P, C, N):
    S = P + N * C
    for window in (1, 2, 4, 9):
        np.testing.assert_array_equal(SharedPromptMask(S, P, C, window)[:, :], sees(P, C, N, window))
    mask = SharedPromptMask(S, P, C)
    np.testing.assert_array_equal(mask[:, :], sees(P, C, N))
    np.testing.assert_array_equal(mask[2:4, 1:3], sees(P, C, N)[2:4, 1:3])
    padded = SharedPromptMask(S + 5, P, C)
    np.testing.assert_array_equal(padded[:S, :S], sees(P, C, N))
    assert padded[:, :].any(axis=1).all()
    assert not padded[:S, S:].any()


@pytest.mark.parametrize(
    ("length", "block"), [(1, 128), (128, 128), (129, 256), (512, 512), (513, 384), (1025, 384), (8192, 512)]
)
def test_block_sizes(length, block):
    assert block_of(length) == block


@pytest.mark.parametrize(("N", "active"), [(2, 36 + 2 * 42), (4, 36 + 4 * 42)])
def test_blocks_that_nobody_sees_are_skipped(N, active):
    """A prompt of 8 blocks, completions of 4: each completion meets the prompt (32) and its own triangle (10)."""
    S = 4096 + N * 2048
    kernel = splash_kernel(S, 4096, 2048, heads=4)
    blocks = S // 512
    for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info):
        assert int((info.block_mask > 0).sum()) == active
        assert active < 0.9 * blocks * (blocks + 1) / 2 < 0.5 * blocks**2
        # Of all the blocks cut by the mask only the triangle is stored: never the S x S array.
        assert info.partial_mask_blocks.shape == (1, 512, 512)


def test_blocks_skipped_where_lengths_are_odd():
    kernel = splash_kernel(3001 + 2 * 777, 3001, 777, heads=1)
    info = kernel.fwd_mask_info
    assert int((info.block_mask > 0).sum()) < 0.6 * 9**2
    assert info.partial_mask_blocks.shape[0] < 9


@pytest.mark.parametrize(
    ("shape", "prompt", "completion", "message"),
    [
        ((2, 10, 2, 2), 4, 4, "not a prompt of 4"),
        ((2, 10, 3, 2), 4, 3, "do not divide 3 query heads"),
        ((3, 10, 2, 2), 4, 3, "over a mesh of 2 x 2"),
        ((2, 10, 3, 3), 4, 3, "over a mesh of 2 x 2"),
    ],
)
def test_shapes_that_do_not_fit(shape, prompt, completion, message):
    B, S, H, K = shape
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    q, k = jnp.ones((B, S, H, 8)), jnp.ones((B, S, K, 8))
    lengths = jnp.ones(B, jnp.int32)
    with pytest.raises(ValueError, match=message):
        splash_attention(q, k, k, lengths, prompt=prompt, completion=completion, mesh=mesh, interpret=True)


CASES = [
    # topology; data, fsdp, tensor; B, P, C, H, K, h; window, cap
    ("v5e:2x2", (1, 1, 1), (2, 1000, 300, 8, 4, 128), None, None),
    ("v5e:2x2", (2, 1, 2), (4, 100, 60, 4, 2, 64), None, None),
    ("v5e:16x16", (4, 16, 4), (64, 1024, 512, 32, 8, 128), 4096, None),  # Mistral
    ("v5e:2x2", (1, 1, 1), (1, 1000, 300, 8, 4, 256), 512, 50.0),  # Gemma 2
    ("v5e:2x2", (1, 1, 1), (1, 100, 60, 4, 4, 80), None, None),  # Pythia 2.8B
    ("v5e:2x2", (1, 1, 1), (1, 100, 60, 3, 1, 12), 7, 5.0),
]
COMPILE = """
import re, sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from dpojax.models.splash import splash_attention

for topology, shape, (B, P, C, H, K, h), window, softcap in eval(sys.argv[1]):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    axes = ("data", "fsdp", "tensor")
    mesh = Mesh(np.array(devices[: np.prod(shape)]).reshape(shape), axes, axis_types=(AxisType.Auto,) * 3)
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    array = lambda n: jax.ShapeDtypeStruct(
        (B, P + 2 * C, n, h), jnp.bfloat16, sharding=place(("data", "fsdp"), None, "tensor", None)
    )
    lengths = jax.ShapeDtypeStruct((B,), jnp.int32, sharding=place(("data", "fsdp")))

    def step(q, k, v, n, ct):
        form = {"prompt": P, "completion": C, "window": window, "softcap": softcap}
        attend = lambda q, k, v: splash_attention(q, k, v, n, mesh=mesh, **form)
        out, back = jax.vjp(attend, q, k, v)
        return out, back(ct)

    start = time.time()
    text = jax.jit(step).lower(array(H), array(K), array(K), lengths, array(H)).compile().as_text()
    moves = len(re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute)(-start)?\\(", text))
    print(text.count('custom_call_target="tpu_custom_call"'), moves, f"{time.time() - start:.1f}")
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu (jax[tpu])")
def test_compiles_for_a_tpu():
    """Forward, dq and dkv are each one Mosaic kernel of any head size, and no device needs what another has.

    No TPU is here, only its compiler.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    # JAX's own backend stays the CPU; a topology is compiled for, not run on.
    env |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    env |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    command = [sys.executable, "-c", COMPILE, str(CASES)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    print(run.stdout)
    assert [line.split()[:2] for line in run.stdout.splitlines()] == [["3", "0"]] * len(CASES)
