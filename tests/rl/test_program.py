"""The program and its loop: over a mesh, at other numbers, from where it stopped; rewards of all kinds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers

from dpojax.configs import MeshConfig
from dpojax.generate import Samples
from dpojax.models import init_params, make_apply
from dpojax.rl import PPO, fit_rl, initial_state, make_rl_program, model_reward, text_reward
from dpojax.rl.program import prompts_of, value_config
from dpojax.sharding import make_mesh, single_device_mesh
from dpojax.train import with_hyper
from tests.conftest import plain_input
from tests.rl.small import CONFIG, EOS, PARAMS, PROMPTS, C, reward

OPTIONS = {"max_new_tokens": C, "eos_ids": (EOS,), "num_samples": 3}


def host(tree):
    return jax.tree.map(np.asarray, tree)


def test_eight_devices_train_as_one():
    """Samples, their figures and two of PPO's updates: on a mesh of data 2 and fsdp 4, as on one device."""
    critic = {**PARAMS, "score": jnp.full((1, CONFIG.width), 0.1)}
    got = []
    for mesh in (single_device_mesh(), make_mesh(MeshConfig(data=2, fsdp=4))):
        program = make_rl_program(
            CONFIG, PPO(updates=2), **OPTIONS, mesh=mesh, learning_rate=0.05, optimizer=optax.sgd(1.0)
        )
        state = initial_state(program, host(PARAMS), value_params=host(critic))
        prompt, lengths = np.array([[1, 2], [0, 3]] * 4, np.int32), np.array([2, 1] * 4, np.int32)
        rollouts = program.rollout(state.policy, state.policy, prompt, lengths, reward, seed=3)
        state, metrics = program.update(state, rollouts)
        numbers = {name: metric.mean for name, metric in metrics.items()}
        got.append((host(rollouts), numbers, host(state.params), host(state.critic.params)))
    alone, there = got
    np.testing.assert_array_equal(alone[0].tokens, there[0].tokens)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)  # noqa: E731
    jax.tree.map(close, alone[0], there[0])
    assert alone[1] == pytest.approx(there[1], rel=1e-4, abs=1e-5)
    jax.tree.map(close, alone[2:], there[2:])
    moved = [float(np.abs(x["embed"] - PARAMS["embed"]).max()) for x in alone[2:]]
    assert min(moved) > 2e-3, moved


@pytest.fixture(scope="module")
def program():
    return make_rl_program(CONFIG, **OPTIONS, mesh=single_device_mesh(), learning_rate=1e-2)


def test_a_sweep_compiles_once_and_a_run_goes_on_where_it_stopped(program):
    def run(state, steps, on_step=None):
        given = {"steps": steps, "prompts_per_step": 4, "seed": 1, "on_step": on_step}
        return fit_rl(program, state, PROMPTS, PARAMS, reward, **given)

    start = lambda beta: with_hyper(initial_state(program, PARAMS), beta=beta)  # noqa: E731
    seen = []

    def on_step(step, state, metrics):
        seen.append({name: metric.mean for name, metric in metrics.items()})
        return step < 2

    stopped = run(start(0.1), 9, on_step)
    assert int(stopped.step) == len(seen) == 2
    assert seen[0]["kl"] == pytest.approx(0, abs=1e-5) != seen[1]["kl"]  # at first the policy is its reference
    assert seen[0]["learning_rate"] == pytest.approx(1e-2)
    whole, other = host(run(start(0.1), 4).params), host(run(start(5.0), 4).params)
    jax.tree.map(np.testing.assert_array_equal, host(run(stopped, 2).params), whole)
    assert np.abs(whole["embed"] - other["embed"]).max() > 1e-3
    assert program.update._cache_size() == 1


def test_figures_are_those_of_the_samples(program):
    judged = []

    def noted(prompt, prompt_len, samples):
        judged.append(host(samples))
        return np.arange(prompt.shape[0] * 3.0).reshape(-1, 3)  # NumPy's, float64

    figures = {}
    note = lambda step, state, metrics: figures.update({k: m.mean for k, m in metrics.items()})  # noqa: E731
    fit_rl(program, initial_state(program, PARAMS), PROMPTS, PARAMS, noted, steps=1, prompts_per_step=4, on_step=note)
    (samples,) = judged
    assert samples.tokens.shape == (4, 3, C)
    assert figures["reward"] == pytest.approx(5.5)
    assert figures["completions/mean_length"] == pytest.approx(samples.lengths.mean())
    assert figures["completions/clipped_ratio"] == pytest.approx(1 - samples.ended.mean())
    wrong = lambda prompt, prompt_len, samples: np.zeros(len(prompt_len))  # noqa: E731
    with pytest.raises(ValueError, match=r"gives numbers \(4,\) for samples \(4, 3\); give one a sample"):
        fit_rl(program, initial_state(program, PARAMS), PROMPTS, PARAMS, wrong, steps=1, prompts_per_step=4)


def test_what_does_not_fit_is_refused(program):
    fit = lambda prompts, n=4: fit_rl(program, None, prompts, PARAMS, reward, steps=1, prompts_per_step=n)  # noqa: E731
    with pytest.raises(ValueError, match="one without tokens"):
        fit([[1], []])
    with pytest.raises(ValueError, match="7 tokens and 2 new ones exceed the model's 8 positions"):
        fit([[1] * 7])
    spread = dataclasses.replace(program, mesh=make_mesh(MeshConfig()))
    with pytest.raises(ValueError, match="prompts_per_step 4: 8 devices split them; use a multiple"):
        fit_rl(spread, None, PROMPTS, PARAMS, reward, steps=1, prompts_per_step=4)
    with pytest.raises(ValueError, match="RLOO compares a prompt's samples; draw 2 or more"):
        make_rl_program(CONFIG, **{**OPTIONS, "num_samples": 1})
    with pytest.raises(ValueError, match="predicts tokens"):
        model_reward(CONFIG, PARAMS)


def test_every_prompt_has_its_turn():
    drawn = np.concatenate([prompts_of(step, 6, 4, seed=0) for step in range(6)])
    assert all(sorted(drawn[i : i + 6]) == list(range(6)) for i in range(0, 24, 6))
    assert drawn[:6].tolist() != drawn[6:12].tolist()


SAMPLES = Samples(
    np.array([[[1, 2], [3, 0]], [[3, 3], [0, 0]]], np.int32),
    np.array([[2, 1], [2, 1]], np.int32),
    np.zeros((2, 2, 2), np.float32),
    np.array([[False, True], [False, True]]),
)


def test_a_reward_model_judges_the_last_token():
    shape = value_config(CONFIG)
    params = {**init_params(shape, seed=3), "score": jnp.linspace(-1, 1, CONFIG.width)[None]}
    judge = model_reward(shape, params, mesh=single_device_mesh())
    got = judge(np.array([[1, 2], [0, 3]], np.int32), np.array([2, 1], np.int32), SAMPLES)
    for (b, n), length in np.ndenumerate(SAMPLES.lengths):
        row = PROMPTS[b] + SAMPLES.tokens[b, n, :length].tolist()
        h, score = make_apply(shape)(params, plain_input(jnp.array([row])))
        assert got[b, n] == pytest.approx(float(score[0] @ h[0, -1]), abs=1e-5)


def test_a_scorer_of_texts_judges_every_sample():
    tokenizer, seen = transformers.ByT5Tokenizer(), []
    letters = lambda text: [ord(c) + 3 for c in text]  # noqa: E731
    tokens = np.array([[letters("good"), [*letters("no"), 1, 0]]], np.int32)
    samples = Samples(tokens, np.array([[4, 3]]), np.zeros((1, 2, 4)), np.array([[False, True]]))

    def scorer(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return [len(text) for text in completions]

    got = text_reward(scorer, tokenizer)(np.array([[0, 0, *letters("a film")]]), np.array([6]), samples)
    assert seen == [("a film", "good"), ("a film", "no")] and got.tolist() == [[4, 2]]
