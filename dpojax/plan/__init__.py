"""Plans: the real train step compiled for accelerators that are not here, and what its compiler says of it."""

from dpojax.plan.account import Account, account_of
from dpojax.plan.build import Built, build, devices_of
from dpojax.plan.chips import Chip, Topology, topology_of
from dpojax.plan.hlo import Module, parse
from dpojax.plan.plan import Plan, make_plan

__all__ = [
    "Account",
    "Built",
    "Chip",
    "Module",
    "Plan",
    "Topology",
    "account_of",
    "build",
    "devices_of",
    "make_plan",
    "parse",
    "topology_of",
]
