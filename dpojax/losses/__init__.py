"""Objectives: pure functions of log-probabilities, ``objective(policy, ref, *, beta=..., ...) -> [B]``, unreduced."""

from dpojax.losses.catalogue import LOSSES, WRAPPERS
from dpojax.losses.compose import (
    DIVERGENCES,
    bound,
    composed,
    given,
    length_normalized,
    per_token,
    reference_free,
    weighted_sum,
    with_divergence,
    with_label_smoothing,
    with_margins,
    with_weights,
    without_reference,
)
from dpojax.losses.dpo import implicit_rewards, log_ratios, log_ratios_per_token
from dpojax.losses.spelling import Spelled, spelled
from dpojax.losses.traits import Objective, Traits, traits, traits_of

# Every objective is also importable by its name.
globals().update(LOSSES)
globals().update(WRAPPERS)
