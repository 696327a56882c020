"""Training: what a run is, its program, and the loop.

With objects in hand: :func:`make_program`, :func:`initial_state`, a reference, :func:`fit` and :func:`evaluate`. With
options alone: :func:`train`.
"""

from dpojax.train.heldout import evaluate
from dpojax.train.loop import Result, Step, fit, run_steps, train
from dpojax.train.optimizer import make_optimizer, make_schedule
from dpojax.train.program import Program, initial_state, lower_step, make_program
from dpojax.train.reference import (
    Reference,
    cached_reference,
    live_reference,
    moving_reference,
    no_reference,
)
from dpojax.train.state import TrainState, with_hyper
from dpojax.train.task import Task, task_of

__all__ = [
    "Program",
    "Reference",
    "Result",
    "Step",
    "Task",
    "TrainState",
    "cached_reference",
    "evaluate",
    "fit",
    "initial_state",
    "live_reference",
    "lower_step",
    "make_optimizer",
    "make_program",
    "make_schedule",
    "moving_reference",
    "no_reference",
    "run_steps",
    "task_of",
    "train",
    "with_hyper",
]
