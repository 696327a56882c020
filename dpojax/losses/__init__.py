"""Objectives: pure functions of log-probabilities, ``objective(policy, ref, *, beta=..., ...) -> [B]``, unreduced."""

from collections.abc import Callable

from dpojax.losses.compose import Objective, weighted_sum
from dpojax.losses.dpo import hinge, implicit_rewards, log_ratios, sigmoid
from dpojax.losses.ipo import ipo
from dpojax.losses.sft import sft

LOSSES: dict[str, Callable] = {"sigmoid": sigmoid, "hinge": hinge, "ipo": ipo, "sft": sft}
"""Every objective by name; TRL's name where TRL has one."""

__all__ = ["LOSSES", "Objective", "hinge", "implicit_rewards", "ipo", "log_ratios", "sft", "sigmoid", "weighted_sum"]
