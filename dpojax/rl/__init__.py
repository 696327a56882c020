"""Policy gradients on groups of samples, the baselines of the DPO paper: RLOO and PPO with a KL-shaped reward.

:func:`make_rl_program`, :func:`initial_state` and :func:`fit_rl` are what their namesakes are in :mod:`dpojax.train`.
"""

from dpojax.rl.program import RLProgram, fit_rl, initial_state, make_rl_program
from dpojax.rl.rollout import Reward, Rollouts, make_rollout, model_reward, text_reward
from dpojax.rl.update import METHODS, PPO, RLOO, ActorCritic, Method

__all__ = [
    "METHODS",
    "PPO",
    "RLOO",
    "ActorCritic",
    "Method",
    "RLProgram",
    "Reward",
    "Rollouts",
    "fit_rl",
    "initial_state",
    "make_rl_program",
    "make_rollout",
    "model_reward",
    "text_reward",
]
