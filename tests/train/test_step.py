"""The step: reference equality, micro-batches, devices, precision; one update against a hand-made one."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from dpojax.configs import ComputeOptions, MeshConfig
from dpojax.losses import LOSSES, traits_of
from dpojax.models.params import flatten
from dpojax.packing import Annotations, packing_of
from dpojax.sharding import batch_sharding, make_mesh, put_global
from dpojax.train import initial_state, lower_step, make_optimizer, make_program, make_schedule
from dpojax.train.scoring import place_params
from tests.conftest import random_batch


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    batch = random_batch(rng, B=16, P=6, C=5, sequences=8)
    score = jnp.asarray(np.sort(rng.random((16, 2), np.float32), axis=1)[:, ::-1])
    label = jnp.asarray(rng.integers(0, 2, 16), jnp.float32)
    valid = batch.valid.at[-3:].set(0.0)  # as the last batch of a run may be
    return dataclasses.replace(batch, valid=valid, annotations=Annotations(score=score, label=label))


def one_device() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))


def run(config, params, batch, *, loss="sigmoid", mesh=None, micro=1, steps=3, scale=1.1):
    """A few steps; the reference is the starting policy, scaled so that its log-ratios are not zero."""
    mesh = mesh or one_device()
    objective = LOSSES["sft" if loss == "imitation" else loss]
    traits = traits_of(objective)
    if loss == "imitation":
        batch = chosen_alone(batch)
    if traits.on == "scores":
        config = dataclasses.replace(config, head="score")
        params = {**params, "score": 0.1 * jnp.ones((1, config.width))}
    # An optimizer without a root or a quotient, which would blow rounding up where gradients are near 0.
    program = make_program(
        *(config, objective),
        mesh=mesh,
        learning_rate=1e-2,
        optimizer=optax.sgd(1.0),
        micro_batches=micro,
        compute=ComputeOptions(logprob_chunk_tokens=32),
    )
    host_params = jax.tree.map(np.asarray, params)
    on_mesh, ref = put_global(batch, batch_sharding(mesh)), None
    if traits.reference:
        scaled = jax.tree.map(lambda x: x * np.float32(scale), host_params)
        ref = program.ref_step(place_params(scaled, mesh, config), on_mesh)
    state = initial_state(program, host_params)
    history = []
    for _ in range(steps):
        state, metrics = program.step(state, on_mesh, ref)
        history.append({name: metric.mean for name, metric in metrics.items()})
    return state, history


def chosen_alone(batch):
    """The batch's first completions, a row each, padded as they are."""
    cut = dataclasses.replace(batch, completions=batch.completions[:, :1], completion_len=batch.completion_len[:, :1])
    return dataclasses.replace(
        cut, annotations=Annotations(), packing=packing_of(dataclasses.replace(cut, packing=None))
    )


def assert_same_run(a, b, rtol):
    for x, y in zip(a[1], b[1], strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_allclose(x[name], y[name], rtol=rtol, atol=rtol, err_msg=name)
    for x, y in zip(jax.tree.leaves(a[0].params), jax.tree.leaves(b[0].params), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=rtol, atol=rtol * float(np.abs(x).max()))


def test_policy_that_is_its_reference(config, params, batch):
    full = dataclasses.replace(batch, valid=jnp.ones(16))
    _, history = run(config, params, full, scale=1.0, steps=1)
    assert history[0]["loss"] == float(jnp.float32(math.log(2)))
    assert history[0]["rewards/accuracies"] == 0.5
    assert history[0]["rewards/margins"] == 0.0


# One of each kind: sums, lengths, token sums with draws, distributions, squares, labels, scores of a head.
KINDS = ["sigmoid", "sft", "sampo", "tdpo2", "wpo", "apo_zero_unpaired", "reward_model"]


@pytest.mark.parametrize("loss", [*KINDS, "imitation"])
def test_micro_batches_are_one_batch(config, params, batch, loss):
    whole, parts = (run(config, params, batch, loss=loss, micro=micro) for micro in (1, 4))
    assert_same_run(whole, parts, rtol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "micro", "loss"),
    [
        *((sizes, 1, loss) for sizes in ((8, 1, 1), (1, 8, 1), (2, 2, 2)) for loss in ("sigmoid", "imitation")),
        *(((4, 1, 2), 2, loss) for loss in ("sigmoid", "imitation", "tdpo2", "reward_model")),
        *(((2, 2, 2), 1, loss) for loss in ("beta_dpo", "kto")),  # over all pairs of the batch
    ],
    ids=str,
)
def test_eight_devices_are_one(config, params, batch, sizes, micro, loss):
    mesh = make_mesh(MeshConfig(*sizes))
    assert_same_run(
        run(config, params, batch, loss=loss), run(config, params, batch, loss=loss, mesh=mesh, micro=micro), rtol=1e-5
    )


def test_parameters_and_moments_are_split_over_the_mesh(config, params):
    mesh = make_mesh(MeshConfig(1, 4, 2))
    program = make_program(config, LOSSES["sigmoid"], mesh=mesh, optimizer=optax.rmsprop(1e-3))
    state = initial_state(program, jax.tree.map(np.asarray, params))
    for tree in (state.params, state.opt_state[0].nu):
        gate = tree["blocks"]["gate"]
        assert gate.addressable_shards[0].data.size == gate.size // 8


def test_a_devices_bytes_fall_as_the_mesh_grows(config, params):
    """Parameters and moments of every device, for 1, 2, 4 and 8 of them along fsdp."""
    held = []
    for n in (1, 2, 4, 8):
        mesh = make_mesh(MeshConfig(1, n, 1), jax.devices()[:n])
        program = make_program(config, LOSSES["sigmoid"], mesh=mesh, optimizer=optax.adam(1e-3))
        state = initial_state(program, jax.tree.map(np.asarray, params))
        arrays = jax.tree.leaves((state.params, state.opt_state))
        each = [sum(x.addressable_shards[i].data.nbytes for x in arrays) for i in range(n)]
        assert max(each) == min(each)
        held.append(each[0])
    whole = [3 * x.nbytes for path, x in flatten(params).items() if path.endswith("norm")]  # norms are on every device
    assert [n * (x - sum(whole)) for n, x in zip((1, 2, 4, 8), held, strict=True)] == pytest.approx(
        [held[0] - sum(whole)] * 4, rel=1e-3
    )


def test_compiled_step_never_holds_all_logits(config):
    """Temporary memory of the whole step, forward and backward, at chunk sizes that differ by 64."""
    wide = dataclasses.replace(config, vocab_size=65536)
    batch = random_batch(np.random.default_rng(0), B=4, P=8, C=64)
    all_logits = batch.completions.size * wide.vocab_size * 4

    def temporary(chunk_tokens):
        compute = ComputeOptions(logprob_chunk_tokens=chunk_tokens)
        program = make_program(wide, LOSSES["sigmoid"], mesh=one_device(), optimizer=optax.sgd(1e-2), compute=compute)
        return lower_step(program, batch).compile().memory_analysis().temp_size_in_bytes

    small, whole = temporary(8), temporary(512)
    assert small < 0.4 * all_logits < all_logits < whole


def test_padding_rows_change_nothing(config, params, batch):
    cut = jax.tree.map(lambda x: x[:13], dataclasses.replace(batch, packing=None))
    kept = dataclasses.replace(cut, valid=jnp.ones(13))
    mesh = one_device()
    assert_same_run(run(config, params, batch, mesh=mesh), run(config, params, kept, mesh=mesh), rtol=1e-6)


def test_rmsprop_is_torchs():
    """Three steps by hand: v = 0.99 v + 0.01 g^2, x -= lr g / (sqrt(v) + 1e-8)."""
    optimizer = make_optimizer(make_schedule(total_steps=10), max_grad_norm=1e9)
    x, v = np.array([1.0, -2.0]), np.zeros(2)
    params = jnp.asarray(x, jnp.float32)
    state = optimizer.init(params)
    for g in (np.array([0.3, -4.0]), np.array([-0.1, 2.0]), np.array([0.0, 1.0])):
        v = 0.99 * v + 0.01 * g**2
        x = x - 0.1 * g / (np.sqrt(v) + 1e-8)
        updates, state = optimizer.update(jnp.asarray(g, jnp.float32), state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: 0.1 * u, updates))
    np.testing.assert_allclose(params, x, rtol=1e-5)


def test_bfloat16_moments_follow_float32_ones():
    """Adam's second moment moves by a thousandth a step, a quarter of what bfloat16 resolves: unbiased all the same."""
    narrow, wide = (
        make_optimizer(lambda _: 1e-3, optim="adamw", max_grad_norm=1e9, optim_dtype=dtype)
        for dtype in ("bfloat16", "float32")
    )
    params = jnp.zeros((4096,))

    def second_moments(optimizer):
        def step(state, key):
            grads = jax.random.normal(key, params.shape) * jnp.where(jnp.arange(4096) % 2 == 0, 1.0, 0.1)
            return optimizer.update(grads, state, params)[1], None

        keys = jax.random.split(jax.random.key(0), 1500)
        return jax.lax.scan(step, optimizer.init(params), keys)[0][1][0].nu

    rough, exact = second_moments(narrow), second_moments(wide)
    assert rough.dtype == jnp.bfloat16 and exact.dtype == jnp.float32
    for part in (slice(0, None, 2), slice(1, None, 2)):
        np.testing.assert_allclose(rough[part].astype(jnp.float32).mean(), exact[part].mean(), rtol=0.01)


def test_schedules():
    def rates(kind):
        schedule = make_schedule(lr_scheduler_type=kind, warmup_steps=4, total_steps=12)
        return [float(schedule(i)) for i in range(13)]

    warmup = [0.2, 0.4, 0.6, 0.8]
    assert rates("constant_with_warmup") == pytest.approx([*warmup, *[1.0] * 9])
    assert rates("linear") == pytest.approx([*warmup, *(1 - i / 8 for i in range(9))])
    assert rates("cosine") == pytest.approx(
        [*warmup, *((1 + math.cos(math.pi * i / 8)) / 2 for i in range(9))], abs=1e-6
    )


def test_gradients_are_clipped_to_the_norm():
    clip = make_optimizer(make_schedule(), max_grad_norm=1.0)
    a, b = (clip.update(jnp.array([scale, scale]), clip.init(jnp.zeros(2)), jnp.zeros(2)) for scale in (10.0, 1000.0))
    np.testing.assert_allclose(a[1][1][0].nu, b[1][1][0].nu, rtol=1e-5)
