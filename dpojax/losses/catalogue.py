"""Every objective by name, and what a reader wants to know of it: equation, paper, needs; from the docstrings."""

import dataclasses
import inspect
import re
from collections.abc import Callable

from dpojax.losses.adaptive import beta_dpo, dr_dpo
from dpojax.losses.anchored import apo_down, apo_zero, bco_pair
from dpojax.losses.aot import aot, aot_unpaired
from dpojax.losses.compose import (
    length_normalized,
    reference_free,
    with_divergence,
    with_label_smoothing,
    with_margins,
    with_weights,
)
from dpojax.losses.contrastive import exo_pair, nca_pair
from dpojax.losses.discopop import discopop
from dpojax.losses.dpo import hinge, robust, sigmoid, sigmoid_norm, unweighted
from dpojax.losses.ipo import ipo, sppo_hard
from dpojax.losses.mixed import mpo
from dpojax.losses.offset import odpo
from dpojax.losses.reference_free import alphapo, cpo, orpo, simpo
from dpojax.losses.regularized import cal_dpo, dpop, r_dpo, rpo
from dpojax.losses.reward import reward_model
from dpojax.losses.sft import preferred_ft, sft, unlikelihood
from dpojax.losses.tdpo import tdpo1, tdpo2
from dpojax.losses.tokenwise import down_sampled, ld_dpo, length_desensitized, sampo
from dpojax.losses.traits import Objective, traits_of
from dpojax.losses.unpaired import apo_zero_unpaired, bco, kto
from dpojax.losses.wpo import wpo, wpo_weighted

TRLS = (
    *(sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down),
    *(discopop, sft, sigmoid_norm),
)
REFERENCE_FREE = (orpo, simpo, cpo, alphapo)
REGULARIZED = (rpo, dpop, r_dpo, cal_dpo, odpo, mpo)
ADAPTIVE = (beta_dpo, dr_dpo)
TOKENWISE = (tdpo1, tdpo2, ld_dpo, wpo, sampo)
BASELINES = (unlikelihood, preferred_ft, unweighted)
UNPAIRED = (kto, apo_zero_unpaired, bco)
REWARDS = (reward_model,)

LOSSES: dict[str, Objective] = {
    objective.__name__: objective
    for family in (TRLS, REFERENCE_FREE, REGULARIZED, ADAPTIVE, TOKENWISE, BASELINES, UNPAIRED, REWARDS)
    for objective in family
}
"""Every objective by name; TRL's name where TRL has one."""

WRAPPERS: dict[str, Callable[..., Objective]] = {
    wrapper.__name__: wrapper
    for wrapper in (
        *(with_divergence, with_label_smoothing, length_normalized, reference_free, with_weights, with_margins),
        *(length_desensitized, down_sampled, wpo_weighted),
    )
}
"""What makes an objective of an objective, by name."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """An objective or a wrapper, as its docstring and its traits have it."""

    name: str
    summary: str
    equation: str  # LaTeX
    source: str
    options: str
    needs: tuple[str, ...]


def entry(function: Callable) -> Entry:
    """What the docstring of an objective or a wrapper says; its parts are where every docstring here has them.

    >>> entry(LOSSES["hinge"]).needs, entry(LOSSES["hinge"]).equation
    (('reference',), '\\\\max(0,\\\\; 1 - \\\\beta h)')
    """
    text = inspect.getdoc(function) or ""
    summary = _flat(text.split("\n\n")[0])
    math = re.search(r"\.\. math:: (.*?)\n\n(?! )", text, re.DOTALL)
    source = re.search(r"Source: (.*?)(?=\n\n|\Z)", text, re.DOTALL)
    options = [
        f"{p.name}={p.default}" for p in inspect.signature(function).parameters.values() if p.default is not p.empty
    ]
    return Entry(
        function.__name__,
        summary,
        _flat(math[1]) if math else "",
        _flat(source[1]) if source else "",
        ", ".join(options),
        needs(function) if function.__name__ in LOSSES else (),
    )


def needs(objective: Objective) -> tuple[str, ...]:
    """What an objective asks for beside the policy's sums of log-probabilities."""
    traits = traits_of(objective)
    words = {
        "reference": traits.reference,
        "lengths": traits.lengths,
        "the whole batch": traits.batch,
        "token log-probabilities": "tokens" in traits.reads,
        "token distributions": bool(traits.statistics - {"tokens"}),
        "margins": "margin" in traits.reads,
        "random draws": "key" in traits.reads,
        "running means": bool(traits.running),
        "labels instead of pairs": traits.on == "labels",
        "a reward head": traits.on == "scores",
    }
    return tuple(word for word, there in words.items() if there)


def _flat(text: str) -> str:
    return " ".join(text.split())
