"""Both methods end in the known optimum, and estimates of KL are right, where all completions can be counted."""

import jax
import numpy as np
import optax
import pytest

from dpojax import theory
from dpojax.data import Example
from dpojax.evaluate import estimate, exact_kl, sampled_kl
from dpojax.generate import make_sampler, sample_all
from dpojax.models import init_params
from dpojax.rl import PPO, RLOO, fit_rl, initial_state, make_rl_program
from dpojax.sharding import single_device_mesh
from tests.conftest import on_devices
from tests.rl.small import COMPLETIONS, CONFIG, EOS, PARAMS, PROMPTS, REWARD, C, reward, table

BETA = 1.0


@pytest.mark.parametrize(("method", "steps", "rate"), [(RLOO(), 80, 1e-2), (PPO(), 50, 5e-3)], ids=["rloo", "ppo"])
def test_the_policy_becomes_the_optimum(method, steps, rate):
    schedule = optax.cosine_decay_schedule(1.0, steps * method.updates)
    program = make_rl_program(
        CONFIG,
        method,
        max_new_tokens=C,
        eos_ids=(EOS,),
        num_samples=8,
        mesh=single_device_mesh(),
        beta=BETA,
        learning_rate=rate,
        value_learning_rate=3 * rate,
        optimizer=optax.adam(schedule, b2=0.99),
        schedule=schedule,
    )
    optimum = theory.optimal_policy(REWARD, table(PARAMS), BETA)
    assert (theory.total_variation(table(PARAMS), optimum) > 0.2).all()
    state = initial_state(program, PARAMS)
    state = fit_rl(program, state, PROMPTS, PARAMS, reward, steps=steps, prompts_per_step=16)
    distance = theory.total_variation(table(state.policy), optimum)
    assert (distance < 0.02).all(), distance


def test_estimates_of_kl_are_within_their_errors(monkeypatch):
    """On 600 samples of each prompt; the exact KL of each token has less noise than the log-ratio of the drawn one."""
    on_devices(monkeypatch, 1)
    policy = jax.tree.map(lambda p, q: 0.7 * p + 2 * q, PARAMS, init_params(CONFIG, seed=1))
    ours, theirs = table(policy), table(PARAMS)
    want = float(theory.kl(ours, theirs).mean())
    sampler = make_sampler(CONFIG, max_new_tokens=C, eos_ids=(EOS,), num_samples=600)
    drawn = sample_all(sampler, policy, PROMPTS, batch_size=2, seed=0).lists()
    which = [(x, COMPLETIONS.index(tuple(row))) for x, rows in enumerate(drawn) for row in rows]
    by_ratio = sampled_kl(
        *(np.array([logps[at] for at in which]) for logps in jax.tree.map(np.asarray, (ours, theirs)))
    )
    as_ids = lambda row: np.array(row, np.int32)  # noqa: E731
    examples = [Example(as_ids(PROMPTS[x]), (as_ids(COMPLETIONS[y]),)) for x, y in which]
    by_token = estimate(exact_kl(CONFIG, policy, PARAMS, examples, batch_size=1200)[:, 0])
    for figure in (by_ratio, by_token):
        assert abs(figure.mean - want) < 2 * figure.error, (figure, want)
    assert want > 0.05 and by_token.error < by_ratio.error / 2, (by_token, by_ratio, want)
