"""The step: reference equality, micro-batches, devices, precision; one update against a hand-made one."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from dpojax.configs import DPOConfig, MeshConfig
from dpojax.logprobs import pair_up
from dpojax.losses import LOSSES, sft, traits_of, with_options
from dpojax.models import make_apply
from dpojax.packing import Annotations
from dpojax.sharding import batch_sharding, constrainer, make_mesh, put_global
from dpojax.train.objectives import empty_running, imitation_loss, preference_loss
from dpojax.train.optimizer import make_optimizer, make_schedule
from dpojax.train.reference import make_ref_step
from dpojax.train.step import abstract_state, initial_state, jit_train_step, make_train_step, state_shardings
from dpojax.types import CompletionStats
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
    objective = with_options(sft if loss == "imitation" else LOSSES[loss], beta=0.1)
    traits = traits_of(objective)
    if traits.on == "scores":
        config = dataclasses.replace(config, reward=True)
        params = {**params, "score": 0.1 * jnp.ones((1, config.width))}
    apply_fn = make_apply(config, constrain=constrainer(mesh))
    # An optimizer without a root or a quotient, which would blow rounding up where gradients are near 0.
    optimizer, schedule = optax.sgd(1e-2), optax.constant_schedule(1e-2)
    running = empty_running(objective)
    shardings = state_shardings(mesh, config, optimizer, running=running)
    host_params = jax.tree.map(np.asarray, params)
    on_mesh = put_global(batch, batch_sharding(mesh))
    ref = None
    if traits.reference:
        ref_step = make_ref_step(apply_fn, mesh, config, traits, chunk_tokens=32, micro_batches=micro)
        scaled = jax.tree.map(lambda x: x * np.float32(scale), host_params)
        ref = ref_step(put_global(scaled, shardings.params), on_mesh)
    loss_fn = preference_loss(apply_fn, objective, beta=0.1, chunk_tokens=32)
    if loss == "imitation":
        loss_fn = imitation_loss(apply_fn, chunk_tokens=32)
    step = jit_train_step(make_train_step(loss_fn, optimizer, schedule, micro), mesh, shardings)
    state = initial_state(host_params, optimizer, 0, shardings, running)
    history = []
    for _ in range(steps):
        state, metrics = step(state, on_mesh, ref)
        history.append({name: metric.mean for name, metric in metrics.items()})
    return state, history


def assert_same_run(a, b, rtol):
    for x, y in zip(a[1], b[1], strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_allclose(x[name], y[name], rtol=rtol, atol=rtol, err_msg=name)
    for x, y in zip(jax.tree.leaves(a[0].params), jax.tree.leaves(b[0].params), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=rtol, atol=rtol * float(np.abs(x).max()))


def test_policy_that_is_its_reference(config, params, batch):
    full = dataclasses.replace(batch, real=jnp.ones(16))
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
    mesh = make_mesh(MeshConfig(*sizes), config, 16 // micro)
    assert_same_run(
        run(config, params, batch, loss=loss), run(config, params, batch, loss=loss, mesh=mesh, micro=micro), rtol=1e-5
    )


def test_parameters_and_moments_are_split_over_the_mesh(config, params):
    mesh = make_mesh(MeshConfig(1, 4, 2), config, 8)
    optimizer = optax.rmsprop(1e-3)
    shardings = state_shardings(mesh, config, optimizer)
    state = initial_state(jax.tree.map(np.asarray, params), optimizer, 0, shardings)
    for tree in (state.params, state.opt_state[0].nu):
        gate = tree["blocks"]["gate"]
        assert gate.addressable_shards[0].data.size == gate.size // 8


def test_compiled_step_never_holds_all_logits(config):
    """Temporary memory of the whole step, forward and backward, at chunk sizes that differ by 64."""
    wide = dataclasses.replace(config, vocab_size=65536)
    mesh, optimizer = one_device(), optax.sgd(1e-2)
    batch = random_batch(np.random.default_rng(0), B=4, P=8, C=64)
    all_logits = batch.completions.size * wide.vocab_size * 4

    def temporary(chunk_tokens):
        objective = functools.partial(LOSSES["sigmoid"], beta=0.1)
        loss_fn = preference_loss(make_apply(wide), objective, beta=0.1, chunk_tokens=chunk_tokens)
        shardings = state_shardings(mesh, wide, optimizer)
        step = jit_train_step(make_train_step(loss_fn, optimizer, optax.constant_schedule(1e-2)), mesh, shardings)
        ref = pair_up(CompletionStats(jnp.zeros((4, 2))), batch)
        lowered = step.lower(abstract_state(wide, optimizer, shardings), batch, ref)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    small, whole = temporary(8), temporary(512)
    assert small < 0.4 * all_logits < all_logits < whole


def test_rows_that_only_fill_up_change_nothing(config, params, batch):
    cut = jax.tree.map(lambda x: x[:13], dataclasses.replace(batch, stream=None, scored=None))
    kept = dataclasses.replace(cut, real=jnp.ones(13))
    mesh = one_device()
    assert_same_run(run(config, params, batch, mesh=mesh), run(config, params, kept, mesh=mesh), rtol=1e-6)


def test_rmsprop_is_torchs():
    """Three steps by hand: v = 0.99 v + 0.01 g^2, x -= lr g / (sqrt(v) + 1e-8)."""
    config = DPOConfig(model="", data=(), output="", learning_rate=0.1, warmup_steps=0, max_grad_norm=1e9)
    optimizer = make_optimizer(config, make_schedule(config, 10))
    x, v = np.array([1.0, -2.0]), np.zeros(2)
    params = jnp.asarray(x, jnp.float32)
    state = optimizer.init(params)
    for g in (np.array([0.3, -4.0]), np.array([-0.1, 2.0]), np.array([0.0, 1.0])):
        v = 0.99 * v + 0.01 * g**2
        x = x - 0.1 * g / (np.sqrt(v) + 1e-8)
        updates, state = optimizer.update(jnp.asarray(g, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, x, rtol=1e-5)


def test_bfloat16_moments_follow_float32_ones():
    """Adam's second moment moves by a thousandth a step, a quarter of what bfloat16 resolves: unbiased all the same."""
    config = DPOConfig(model="", data=(), output="", optim="adamw", max_grad_norm=1e9)
    narrow, wide = (
        make_optimizer(dataclasses.replace(config, optim_dtype=d), lambda _: 1e-3) for d in ("bfloat16", "float32")
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
        config = DPOConfig(model="", data=(), output="", learning_rate=1.0, warmup_steps=4, lr_scheduler_type=kind)
        schedule = make_schedule(config, 12)
        return [float(schedule(i)) for i in range(13)]

    warmup = [0.2, 0.4, 0.6, 0.8]
    assert rates("constant_with_warmup") == pytest.approx([*warmup, *[1.0] * 9])
    assert rates("linear") == pytest.approx([*warmup, *(1 - i / 8 for i in range(9))])
    assert rates("cosine") == pytest.approx(
        [*warmup, *((1 + math.cos(math.pi * i / 8)) / 2 for i in range(9))], abs=1e-6
    )


def test_gradients_are_clipped_to_the_norm():
    config = DPOConfig(model="", data=(), output="", max_grad_norm=1.0, warmup_steps=0, learning_rate=1.0)
    clip = make_optimizer(config, make_schedule(config, 1))
    a, b = (clip.update(jnp.array([scale, scale]), clip.init(jnp.zeros(2)), jnp.zeros(2)) for scale in (10.0, 1000.0))
    np.testing.assert_allclose(a[1][1][0].nu, b[1][1][0].nu, rtol=1e-5)
