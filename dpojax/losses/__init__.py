"""Objectives: pure functions of log-probabilities, ``objective(policy, ref, *, beta=..., ...) -> [B]``, unreduced.

This file is their list. An objective is added by its import, its family and its name in ``__all__``.
"""

from collections.abc import Callable

from dpojax.losses.adaptive import beta_dpo, dr_dpo
from dpojax.losses.anchored import apo_down, apo_zero, bco_pair
from dpojax.losses.aot import aot, aot_unpaired
from dpojax.losses.compose import (
    DIVERGENCES,
    at_beta,
    length_normalized,
    per_token,
    reference_free,
    require,
    takes_beta,
    weighted_sum,
    with_divergence,
    with_label_smoothing,
    with_margins,
    with_options,
    with_traits,
    with_weights,
    without_reference,
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
from dpojax.losses.mixed import mpo
from dpojax.losses.no_reference import alphapo, cpo, orpo, simpo
from dpojax.losses.offset import odpo
from dpojax.losses.regularized import cal_dpo, dpop, r_dpo, rpo
from dpojax.losses.reward import reward_model
from dpojax.losses.sft import preferred_ft, sft, unlikelihood
from dpojax.losses.tdpo import tdpo1, tdpo2
from dpojax.losses.tokenwise import down_sampled, ld_dpo, length_desensitized, sampo
from dpojax.losses.traits import Beta, Objective, Traits, check_same_shape, traits, traits_of
from dpojax.losses.unpaired import apo_zero_unpaired, bco, kto, labelled_rewards
from dpojax.losses.wpo import wpo, wpo_weighted

FAMILIES: dict[str, tuple[Objective, ...]] = {
    "DPO and its siblings, by TRL's names": (
        *(sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down),
        *(discopop, sft, sigmoid_norm),
    ),
    "Without a reference": (orpo, simpo, cpo, alphapo),
    "With a further term or an offset": (rpo, dpop, r_dpo, cal_dpo, odpo, mpo),
    "With weights from the batch": (beta_dpo, dr_dpo),
    "Token by token": (tdpo1, tdpo2, ld_dpo, wpo, sampo),
    "Baselines and ablations": (unlikelihood, preferred_ft, unweighted),
    "Of labelled completions instead of pairs": (kto, apo_zero_unpaired, bco),
    "For reward models": (reward_model,),
}
"""The objectives under headings."""

LOSSES: dict[str, Objective] = {objective.__name__: objective for family in FAMILIES.values() for objective in family}
"""Every objective by name; TRL's name where TRL has one."""

WRAPPERS: dict[str, Callable[..., Objective]] = {
    wrapper.__name__: wrapper
    for wrapper in (
        *(with_divergence, with_label_smoothing, length_normalized, reference_free, with_weights, with_margins),
        *(length_desensitized, down_sampled, wpo_weighted),
    )
}
"""What makes an objective of an objective, by name."""

from dpojax.losses.spelling import ObjectiveSpec, spelled  # noqa: E402  (it reads the tables above)

__all__ = [
    "DIVERGENCES",
    "FAMILIES",
    "LOSSES",
    "WRAPPERS",
    "Beta",
    "Objective",
    "ObjectiveSpec",
    "Traits",
    "alphapo",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "at_beta",
    "bco",
    "bco_pair",
    "beta_dpo",
    "cal_dpo",
    "check_same_shape",
    "cpo",
    "discopop",
    "down_sampled",
    "dpop",
    "dr_dpo",
    "exo_pair",
    "hinge",
    "implicit_rewards",
    "ipo",
    "kto",
    "labelled_rewards",
    "ld_dpo",
    "length_desensitized",
    "length_normalized",
    "log_ratios",
    "log_ratios_per_token",
    "mpo",
    "nca_pair",
    "odpo",
    "orpo",
    "per_token",
    "preferred_ft",
    "r_dpo",
    "reference_free",
    "require",
    "reward_model",
    "robust",
    "rpo",
    "sampo",
    "sft",
    "sigmoid",
    "sigmoid_norm",
    "simpo",
    "spelled",
    "sppo_hard",
    "takes_beta",
    "tdpo1",
    "tdpo2",
    "traits",
    "traits_of",
    "unlikelihood",
    "unweighted",
    "weighted_sum",
    "with_divergence",
    "with_label_smoothing",
    "with_margins",
    "with_options",
    "with_traits",
    "with_weights",
    "without_reference",
    "wpo",
    "wpo_weighted",
]
