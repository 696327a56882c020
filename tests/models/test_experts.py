"""Mixtures of experts: every token reaches its experts, on one device and on many; the load-balancing loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.configs import MeshConfig
from dpojax.errors import UserError
from dpojax.logprobs import completion_logps
from dpojax.losses import LOSSES
from dpojax.models import check_divides, make_apply, param_shardings
from dpojax.models.config import Experts
from dpojax.models.experts import (
    NAMES,
    Routing,
    balance_loss,
    kernel_product,
    mixture,
    mixture_over_mesh,
    ragged_product,
    route,
)
from dpojax.models.load import save_model
from dpojax.models.lora import check_linear
from dpojax.sharding import constrainer, make_mesh
from dpojax.train import initial_state, live_reference, make_program
from tests.conftest import plain_input, random_batch
from tests.models.families import FAMILIES as TINY
from tests.models.test_families import random_model

MIXED = "qwen3_moe dense between"


def layer_of(name: str):
    """A model's choices, the first layer's tensors of its mixture, and some tokens."""
    model = random_model(TINY[name])
    weights = {path: x[0] for path, x in model.params["blocks"].items()}
    x = np.random.default_rng(0).normal(size=(2, 17, model.config.width)).astype(np.float32)
    return model.config, weights, jnp.asarray(x)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe raw"])
def test_a_mixture_is_the_sum_over_each_tokens_experts(name):
    """Token by token and expert by expert, as the definition has it."""
    config, weights, x = layer_of(name)
    tokens = x.reshape(-1, config.width)
    share, chosen, probs = route(config.experts, weights["router"], tokens)
    assert jnp.allclose(share.sum(axis=-1), 1) == config.experts.renormalize
    expected = np.zeros(tokens.shape)
    for t, token in enumerate(np.asarray(tokens, np.float64)):
        assert sorted(chosen[t].tolist()) == sorted(np.argsort(probs[t])[-config.experts.per_token :].tolist())
        for w, e in zip(share[t].tolist(), chosen[t].tolist(), strict=True):
            gate, up, down = (np.asarray(weights[f"experts_{part}"][e], np.float64) for part in ("gate", "up", "down"))
            a = token @ gate
            expected[t] += w * (down @ (a / (1 + np.exp(-a)) * (token @ up)))
    np.testing.assert_allclose(mixture(config, weights, x).reshape(tokens.shape), expected, rtol=1e-4, atol=1e-4)


def test_no_token_is_dropped_where_all_want_one_expert():
    config, weights, x = layer_of("mixtral")
    one = dataclasses.replace(config.experts, per_token=1)
    favourite = jnp.zeros_like(weights["router"]).at[2].set(1)
    x = jnp.abs(x)
    out = mixture(dataclasses.replace(config, experts=one), weights | {"router": favourite}, x)
    gate, up, down = (weights[f"experts_{part}"][2] for part in ("gate", "up", "down"))
    np.testing.assert_allclose(out, (jax.nn.silu(x @ gate) * (x @ up)) @ down.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", MIXED])
def test_the_mesh_changes_neither_values_nor_gradients(name):
    model = random_model(TINY[name])
    batch = random_batch(np.random.default_rng(1), B=8, P=7, C=9, sequences=4)

    def loss(params, apply_fn):
        return completion_logps(apply_fn, params, batch).sum()

    alone = jax.value_and_grad(loss)(model.params, make_apply(model.config))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    split = make_apply(model.config, mesh=mesh, constrain=constrainer(mesh))
    params = jax.device_put(model.params, param_shardings(mesh, model.config))
    assert "tensor" in params["blocks"]["experts_up"].sharding.spec
    together = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, split)
    np.testing.assert_allclose(together[0], alone[0], rtol=1e-5)

    def same(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))

    jax.tree.map(same, together[1], alone[1])


def test_even_routing_has_a_balance_loss_of_k():
    config = random_model(TINY["mixtral"]).config
    tokens = jnp.full(2, 8.0)
    even = Routing(jnp.full((2, 4), 8.0 * 2 / 4), jnp.full((2, 4), 2.0), tokens)
    assert float(balance_loss(config, even)) == pytest.approx(2)
    one = Routing(jnp.array([[8.0, 8, 0, 0]] * 2), jnp.array([[8.0, 0, 0, 0]] * 2), tokens)
    assert float(balance_loss(config, one)) == pytest.approx(4)


@pytest.mark.parametrize("name", ["mixtral", MIXED])
def test_the_balance_loss_is_transformers(name, tmp_path):
    torch = pytest.importorskip("torch", reason="live parity needs torch, which CI installs")
    from transformers import AutoModelForCausalLM

    model = random_model(TINY[name])
    save_model(model, tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    tokens = np.random.default_rng(2).integers(0, 384, (3, 20))
    with torch.no_grad():
        out = theirs(torch.tensor(tokens), output_router_logits=True)
    routings = []
    make_apply(model.config, routings=routings)(model.params, plain_input(jnp.asarray(tokens)))
    assert float(balance_loss(model.config, routings.pop())) == pytest.approx(float(out.aux_loss), rel=1e-4)


def test_a_step_logs_the_balance_loss_and_its_weight_lowers_it():
    model = random_model(TINY["mixtral"])
    batch = random_batch(np.random.default_rng(3), B=8, P=7, C=9, sequences=8)

    def steps(coefficient: float) -> list[dict[str, float]]:
        program = make_program(model.config, LOSSES["sigmoid"], learning_rate=3e-4, router_aux_loss_coef=coefficient)
        state, history = initial_state(program, model.params), []
        reference = live_reference(program, model.params)
        for _ in range(4):
            ref = program.ref_step(reference.params, batch)
            state, metrics = program.step(state, batch, ref)
            history.append({name: x.mean for name, x in metrics.items()})
        return history

    without, with_it = steps(0.0), steps(10.0)
    assert without[0]["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert with_it[0]["loss"] == pytest.approx(np.log(2) + 10 * with_it[0]["aux_loss"], rel=1e-5)
    assert with_it[-1]["aux_loss"] < without[-1]["aux_loss"]


def test_an_adapter_beside_experts_is_refused():
    with pytest.raises(UserError, match="--model m: an adapter beside the experts' weights is not supported"):
        check_linear(random_model(TINY["mixtral"]).config, "--model m")


def test_experts_that_the_mesh_does_not_divide_are_refused():
    config = dataclasses.replace(random_model(TINY["mixtral"]).config, experts=Experts(number=3, per_token=1, width=8))
    with pytest.raises(UserError, match=r"--mesh.tensor: 2 does not divide the model's experts, 3; use a divisor"):
        check_divides(make_mesh(MeshConfig(data=4, tensor=2)), config)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=str)
def test_the_tpus_kernel_computes_the_same(sizes):
    """Values and gradients of one layer, the kernel interpreted."""
    config, weights, _ = layer_of("mixtral")
    weights = {name: weights[name] for name in NAMES}
    x = jax.random.normal(jax.random.key(1), (4, 6, config.width))
    mesh = None if sizes is None else make_mesh(MeshConfig(*sizes))

    def loss(weights, x, mesh, product):
        return jnp.sum(jnp.sin(mixture_over_mesh(config, weights, x, mesh, product)))

    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=(2, 3))
    expected = gradients(weights, x, None, ragged_product)
    got = gradients(weights, x, mesh, functools.partial(kernel_product, interpret=True))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)
