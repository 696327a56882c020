"""Objectives: pure functions of log-probabilities, ``objective(policy, ref, *, beta=..., ...) -> [B]``, unreduced."""

from dpojax.losses.anchored import apo_down, apo_zero, bco_pair
from dpojax.losses.aot import aot, aot_unpaired
from dpojax.losses.compose import (
    DIVERGENCES,
    bound,
    length_normalized,
    reference_free,
    weighted_sum,
    with_divergence,
    with_label_smoothing,
    with_margins,
    with_weights,
)
from dpojax.losses.contrastive import exo_pair, nca_pair
from dpojax.losses.discopop import discopop
from dpojax.losses.dpo import (
    hinge,
    implicit_rewards,
    log_ratios,
    log_ratios_per_token,
    robust,
    sigmoid,
    sigmoid_norm,
    unweighted,
)
from dpojax.losses.ipo import ipo, sppo_hard
from dpojax.losses.sft import preferred_ft, sft, unlikelihood
from dpojax.losses.traits import Objective, Traits, traits, traits_of

LOSSES: dict[str, Objective] = {
    objective.__name__: objective
    for objective in (
        *(sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired),
        *(apo_zero, apo_down, discopop, sft, sigmoid_norm),
        *(unlikelihood, preferred_ft, unweighted),
    )
}
"""Every objective by name; TRL's name where TRL has one."""
