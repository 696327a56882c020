"""A program from objects in hand: what it compiles, what it takes as inputs, and that it is what a run does."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dpojax.configs import DPOConfig, MeshConfig
from dpojax.data import Batches, Example
from dpojax.losses import LOSSES
from dpojax.sharding import batch_sharding, make_mesh, put_global
from dpojax.train import (
    cached_reference,
    evaluate,
    fit,
    initial_state,
    live_reference,
    lower_step,
    make_program,
    moving_reference,
    no_reference,
    task_of,
    with_hyper,
)
from dpojax.train.program import abstract_inputs, program_of


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    tokens = lambda low, high: rng.integers(0, 384, rng.integers(low, high)).astype(np.int32)  # noqa: E731
    examples = [Example(tokens(1, 9), (tokens(1, 7), tokens(1, 7))) for _ in range(16)]
    return Batches(examples, 8, max_shapes=1, sequences=8, seed=0, epochs=2)


@pytest.fixture(scope="module")
def host_params(params):
    return jax.tree.map(np.asarray, params)


def steps_of(program, params, batches, n=2, change=None):
    """Metrics of some steps, with ``change(step, state)`` before each, and the parameters after them."""
    state, reference, history = initial_state(program, params), live_reference(program, params), []
    for i, item in enumerate(list(batches)[:n]):
        state = state if change is None else change(i, state)
        batch = put_global(item.batch, batch_sharding(program.mesh))
        state, metrics = program.step(state, batch, reference.of(item))
        history.append({name: metric.mean for name, metric in metrics.items()})
    return history, jax.tree.map(np.asarray, state.params)


def test_beta_and_learning_rate_are_inputs(config, host_params, batches):
    """Two steps at other numbers compile once, and are those of two programs that were made for these numbers."""
    settings = [(0.1, 1e-3), (0.7, 1e-2)]
    program = make_program(config, LOSSES["sigmoid"])
    one = functools.partial(steps_of, params=host_params, batches=batches)
    got, _ = one(program, change=lambda i, s: with_hyper(s, beta=settings[i][0], learning_rate=settings[i][1]))
    assert program.step._cache_size() == 1
    assert [line["learning_rate"] for line in got] == pytest.approx([1e-3, 1e-2])
    made = make_program(config, LOSSES["sigmoid"], beta=0.7, learning_rate=1e-2)
    own, params = one(made)
    again, same = one(program, change=lambda i, s: with_hyper(s, beta=0.7, learning_rate=1e-2))
    assert own == again
    jax.tree.map(np.testing.assert_array_equal, params, same)
    bound, _ = one(make_program(config, functools.partial(LOSSES["sigmoid"], beta=0.7), learning_rate=1e-2))
    assert own[-1]["loss"] == pytest.approx(bound[-1]["loss"], rel=1e-5)


def test_runs_that_differ_in_beta_and_rate_share_their_program(config, batches):
    options = DPOConfig(model="", data=("x",), output="", batch_size=8)
    batch, mesh = batches.collate(np.arange(8)).batch, make_mesh(MeshConfig())

    def text(**changed):
        changed_options = dataclasses.replace(options, **changed)
        return lower_step(program_of(changed_options, task_of(changed_options), config, mesh, 10), batch).as_text()

    base = text()
    assert base == text(beta=0.5, learning_rate=3e-5) == text(beta=0.1)
    assert base != text(loss="ipo")


def test_fit_stops_where_it_is_told(config, host_params, batches):
    program = make_program(config, LOSSES["sigmoid"], learning_rate=1e-3)
    reference = cached_reference(program, host_params, batches)
    seen = []

    def on_step(step, state):
        seen.append(step)
        assert int(state.step) == step
        return step < 3

    state = fit(program, initial_state(program, host_params), batches, reference, on_step=on_step)
    assert seen == [1, 2, 3] and int(state.step) == 3
    with pytest.raises(ValueError, match="5 steps need as many batches, and there are 4; give Batches more epochs"):
        fit(program, state, batches, reference, steps=5)


@pytest.mark.parametrize("form", ["cached", "live", "moving"])
def test_training_lowers_the_loss(config, host_params, batches, form):
    program = make_program(config, LOSSES["sigmoid"], learning_rate=1e-3)
    makers = {
        "cached": lambda: cached_reference(program, host_params, batches),
        "live": lambda: live_reference(program, host_params),
        "moving": lambda: moving_reference(program, host_params, alpha=0.5, every=10),
    }
    reference = makers[form]()
    before = evaluate(program, initial_state(program, host_params).params, batches, reference)
    assert before["eval_loss"] == pytest.approx(np.log(2), rel=1e-6)
    state = fit(program, initial_state(program, host_params), batches, reference)
    after = evaluate(program, state.policy, batches, reference)
    assert after["eval_loss"] < 0.9 * before["eval_loss"]
    assert after["eval_rewards/accuracies"] > 0.9


def test_an_objective_of_ones_own_and_one_completion(config, host_params, batches):
    """SFT is an objective on rows of one completion; its loss is the mean over the completions' tokens."""
    alone = [Example(e.prompt, e.completions[:1]) for e in batches.examples]
    rows = Batches(alone, 16, max_shapes=1, sequences=8, seed=0)
    program = make_program(config, LOSSES["sft"])
    state = initial_state(program, host_params)
    figures = evaluate(program, state.policy, rows, no_reference())
    sums = cached_reference(program, host_params, rows).sums[:, 0]
    tokens = sum(len(e.completions[0]) for e in alone)
    assert figures == pytest.approx({"eval_loss": -sums.sum() / tokens, "eval_logps/chosen": sums.mean()}, rel=1e-6)

    def mine(policy, ref):
        return ref.chosen - policy.chosen

    program = make_program(config, mine, learning_rate=1e-4)
    state = initial_state(program, host_params)
    reference = cached_reference(program, host_params, batches)
    assert evaluate(program, state.policy, batches, reference)["eval_loss"] == pytest.approx(0, abs=1e-4)
    state = fit(program, state, batches, reference, steps=2)
    assert evaluate(program, state.policy, batches, reference)["eval_loss"] < 0


@pytest.mark.parametrize("loss", ["sigmoid", "tdpo2", "simpo"])
def test_abstract_inputs_are_the_steps_own(config, host_params, batches, loss):
    program, item = make_program(config, LOSSES[loss]), next(batches.iterator())
    reference = live_reference(program, host_params) if program.traits.reference else no_reference()
    real = initial_state(program, host_params), put_global(item.batch, batch_sharding(program.mesh)), reference.of(item)

    def same(x, s):
        return x.shape == s.shape and x.dtype == s.dtype and x.sharding.is_equivalent_to(s.sharding, x.ndim)

    assert all(jax.tree.leaves(jax.tree.map(same, real, abstract_inputs(program, item.batch))))
