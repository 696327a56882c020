"""The train loop: one function, top to bottom, for DPO and for SFT."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from dpojax.configs import DPOConfig, TrainOptions
from dpojax.errors import UserError
from dpojax.models import Model
from dpojax.progress import Stage, console
from dpojax.sharding import batch_sharding, put_global
from dpojax.startup import keep_memory
from dpojax.train.checkpoint import Checkpoints, claim_directory, file_hash, load_policy, save_model_files
from dpojax.train.freeze import UNTRAINED, Trunk, check_freeze, cut, separate
from dpojax.train.heldout import HeldOut
from dpojax.train.metrics import MetricsLog
from dpojax.train.objectives import empty_running
from dpojax.train.optimizer import make_optimizer, make_schedule
from dpojax.train.options import check_options, make_objective
from dpojax.train.reference import Reference, content_hash
from dpojax.train.setup import Data, Program, check_fit, data_kind, load_data, make_program
from dpojax.train.step import abstract_state, initial_state, jit_train_step, make_train_step, part, state_shardings


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    steps: int
    finished: bool  # False: stopped by a signal, to be continued


def open_run(config: TrainOptions) -> tuple[Data, Model, Model, Program, dict[str, str]]:
    """Read data, policy and reference, check that all fits together, and only then claim the output directory."""
    check_options(config)
    data = load_data(config)
    model = load_policy(config.model, reward=data_kind(config)[1].on == "scores")
    check_fit(model, data.examples, config.tokenizer or config.model)
    check_freeze(config.freeze, model.config)
    program = make_program(config, model)
    facts = {"model_hash": content_hash(model.params), "data_hash": data.content_hash}
    ref_model = model
    if isinstance(config, DPOConfig):
        if config.ref_model is not None:
            ref_model = load_policy(config.ref_model)
            if ref_model.config != model.config:
                raise UserError(f"--ref-model {config.ref_model}: differs from --model in shape; use one of its kind")
        facts |= {f"hash of {path}": file_hash(path) for path in make_objective(config).files}
        facts["reference_hash"] = facts["model_hash"] if ref_model is model else content_hash(ref_model.params)
    claim_directory(config, facts)
    save_model_files(model, data.tokenizer, Path(config.output) / "model")
    return data, model, ref_model, program, facts


def train(config: TrainOptions) -> Result:
    """Run, or continue, what the options say; everything is written below ``config.output``.

    Longer than our other functions, so that a run reads from top to bottom in one place.

    Raises:
      UserError: bad options, data, model or output directory, or a disk that is full.
    """
    data, model, ref_model, program, facts = open_run(config)
    keep_memory()
    run, total_steps = Path(config.output), data.total_steps
    checkpoints = Checkpoints(run, config.save_total_limit)
    if config.freeze is not None:
        checkpoints.save_frozen(separate(model.params, config.freeze)[0])
    done = checkpoints.latest
    if done >= total_steps:
        console.print(f"{run}: this run is complete, at step {done}; nothing to do")
        return Result(done, finished=True)

    # ---- reference: log-probabilities, cached or live -------------------------------------------------------------
    ref_hash = facts.get("reference_hash", facts["model_hash"])
    steps = (program.logps_step, program.ref_step)
    reference = Reference(config, program.traits, *steps, program.mesh, ref_model, ref_hash)
    reference.prepare(data.batches, data.eval_batches, total_steps)

    # ---- frozen layers: what leaves them, once for every row ------------------------------------------------------
    batches, eval_batches = data.batches, data.eval_batches
    frozen: tuple[str, ...] = ()
    if config.freeze is not None:
        below, model = cut(model, config.freeze)
        trunk, frozen = Trunk(config, program.mesh, below), UNTRAINED
        batches = trunk.under(batches, "Frozen layers", total_steps)
        eval_batches = eval_batches and trunk.under(eval_batches, "Frozen layers, held-out")
        del trunk, below

    # ---- state and step -------------------------------------------------------------------------------------------
    schedule = make_schedule(config, total_steps)
    optimizer = make_optimizer(config, schedule)
    running = empty_running(program.objective) if program.objective else {}
    shardings = state_shardings(program.mesh, model.config, optimizer, frozen, running)
    step_fn = make_train_step(program.loss_fn, optimizer, schedule, config.gradient_accumulation_steps)
    step_fn = jit_train_step(step_fn, program.mesh, shardings)
    iterator = batches.iterator()
    if done:
        state, position = checkpoints.restore(done, abstract_state(model.config, optimizer, shardings, running))
        kept = part(model.params, frozen)[1]
        state = dataclasses.replace(state, frozen=put_global(kept, shardings.frozen))
        iterator.set_state(position)
        if reference.moves:
            reference.params = checkpoints.restore_moved(done, reference.params)
        console.print(f"{run}: continuing from step {done}")
    else:
        state = initial_state(model.params, optimizer, config.seed, shardings, running)
    del model, ref_model

    # ---- steps ----------------------------------------------------------------------------------------------------
    log = MetricsLog(run, done, total_steps, len(batches.examples))
    rows = batch_sharding(program.mesh)
    held_out = None if eval_batches is None else HeldOut(program, eval_batches, reference)

    def evaluate(step: int) -> float | None:
        if held_out is None:
            return None
        unchanged = step == 0 and ref_hash == facts["model_hash"]  # the policy is its reference
        figures = held_out.figures(state, reference.eval_sums if unchanged else None)
        log.write(step, figures)
        log.show(step, figures)
        return figures["eval_loss"]

    if done == 0:
        evaluate(0)
    step = done
    with stop_signals() as stop, Stage("Training", total_steps, done) as stage:
        while step < total_steps:
            item = next(iterator)
            state, metrics = step_fn(state, put_global(item.batch, rows), reference.of(item))
            step += 1
            reference.follow(step, state.params)
            log.add(step, item, metrics)
            last, stopping = step == total_steps, stop.is_set()
            shows = step % config.logging_steps == 0 or last or stopping
            evaluates = step % config.eval_steps == 0 or last
            saves = step % config.save_steps == 0 or last or stopping
            if shows or evaluates or saves:
                log.flush()
            if shows:
                log.show_steps(step)
            eval_loss = evaluate(step) if evaluates else None
            if saves:
                moved = reference.params if reference.moves else None
                checkpoints.save(state, iterator.get_state(), eval_loss, moved)
            if evaluates or saves:
                log.restart_clock()
            stage.advance()
            if stopping:
                break
    checkpoints.finish()
    log.close()
    if step < total_steps:
        console.print(f"{run}: stopped at step {step}; the same command continues it")
    return Result(step, finished=step == total_steps)


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Ctrl-C, and the SIGTERM by which a pod announces that it takes its machines back, ask to stop after the step."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may handle signals
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt  # asked twice: at once, from the last checkpoint
        console.print("stopping after this step, to save")
        asked.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
