"""The train loop: :func:`fit` for objects in hand, :func:`train` for a run with a directory."""

import contextlib
import dataclasses
import json
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax

from dpojax import processes
from dpojax.configs import TrainOptions
from dpojax.data import Batches, IndexedBatch
from dpojax.errors import UserError
from dpojax.models import Model, partition
from dpojax.options import check_options
from dpojax.paths import path_of, scratch
from dpojax.progress import Stage, console
from dpojax.sharding import described, held_sequences, put_batch
from dpojax.startup import keep_memory
from dpojax.train.checkpoint import IN_FLIGHT, Checkpoints
from dpojax.train.heldout import evaluate
from dpojax.train.inputs import Data, check_fit, load_data
from dpojax.train.log import MetricsLog
from dpojax.train.logps_cache import LogpsCache
from dpojax.train.objectives import Metrics
from dpojax.train.program import Program, initial_state, mesh_of, program_of
from dpojax.train.reference import (
    CachedReference,
    MovingReference,
    Reference,
    cached_reference,
    live_reference,
    moving_reference,
    no_reference,
)
from dpojax.train.rundir import RunAdapter, claim_directory, file_hash, is_run, save_adapter_of_run, save_model_files
from dpojax.train.scoring import model_key
from dpojax.train.session import begin_session
from dpojax.train.start import Start, open_start, reference_of
from dpojax.train.state import TrainState, placed
from dpojax.train.task import Task, task_of
from dpojax.train.top_layers import Trunk, check_top_layers, cut, separate
from dpojax.train.writers import writers_of

STILL_STEPS = 20
"""After the warmup, steps by which a loss should have left ln 2."""

OnStep = Callable[[int, TrainState], Any]
"""``on_step(step, state)``, called after every step; returning False stops. The state's arrays live until the next
step: what is kept of them must be copied."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that has been dispatched: its number, and what it has led to."""

    step: int
    state: TrainState
    metrics: Metrics
    item: IndexedBatch
    reference: Reference


def run_steps(
    program: Program, state: TrainState, batches: Iterator[IndexedBatch], reference: Reference, first: int, last: int
) -> Iterator[Step]:
    """The steps after ``first`` up to ``last``, one after another; each takes over the memory of the state before."""
    for step in range(first + 1, last + 1):
        item = next(batches)
        state, metrics = program.step(state, put_batch(item.batch, program.mesh), reference.of(item))
        reference = reference.after(step, state.params)
        yield Step(step, state, metrics, item, reference)


def fit(
    program: Program,
    state: TrainState,
    batches: Batches,
    reference: Reference,
    *,
    steps: int | None = None,
    on_step: OnStep | None = None,
) -> TrainState:
    """The state after some more steps. Nothing is written or printed.

    Args:
      program: the run's functions (:func:`~dpojax.train.program.make_program`).
      state: donated to the first step.
      batches: a batch for every step, in their order.
      reference: of these batches.
      steps: how many (default: one for every batch).
      on_step: called after every step; returning False stops.

    Raises:
      ValueError: more steps than batches, batches of rows that this process's devices do not hold, or a row is longer
        than the model has positions.
    """
    steps = len(batches) if steps is None else steps
    if steps > len(batches):
        raise ValueError(f"{steps} steps need as many batches, and there are {len(batches)}; give Batches more epochs")
    held = held_sequences(program.mesh, batches.sequences)
    if batches.held != held:
        raise ValueError(f"of several processes, this one holds the packed sequences {held}; give Batches held={held}")
    longest, limit = int((batches.prompts + batches.completions.max(axis=1)).max()), program.config.longest
    if limit is not None and longest > limit:
        raise ValueError(f"a row has {longest} tokens, and the model has positions for {limit}; cut the rows")
    done = int(state.step)
    for at in run_steps(program, state, batches.iterator(), reference, done, done + steps):
        state = at.state
        if on_step is not None and on_step(at.step, state) is False:
            break
    return state


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    steps: int
    finished: bool  # False: stopped before its last step, to be continued


def open_run(config: TrainOptions, task: Task) -> tuple[Data, Model, Model, Program, dict[str, str]]:
    """Data, policy, reference, program and identities of a run, whose output directory is claimed once all of them
    fit together."""
    start = open_start(config, reward=task.traits.on == "scores")
    check_top_layers(config.train_top_layers, start.config)
    if config.train_top_layers is not None and processes.count() > 1:
        raise UserError(f"--train-top-layers {config.train_top_layers}: runs in one process; leave it out")
    if config.router_aux_loss_coef and start.config.experts is None:
        coefficient = f"--router-aux-loss-coef {config.router_aux_loss_coef}"
        raise UserError(f"{coefficient}: the model has no mixture of experts; leave it out")
    ref_config, ref_files = reference_of(start, task.reference.model, config.max_length)
    mesh = mesh_of(config, task, ref_config, start.config.lora)
    if mesh.size > 1:
        console.print(f"  {mesh.size} devices: {described(mesh)}")
    data = load_data(config, task, mesh)
    for shape in {start.config.merged, ref_config.merged}:
        check_fit(shape, data.examples, config.tokenizer or config.model)
    program = program_of(config, task, ref_config, mesh, data.total_steps, start.config.lora)
    model, base_hash = start.load(mesh, config.seed)
    ref_model = ref_files.load(mesh) if ref_files is not None else start.reference_model(model, ref_config)
    identities = start.hashes(base_hash, model, None if task.reference.form == "none" else ref_model)
    identities["data_hash"] = data.content_hash
    identities |= {f"hash of {path}": file_hash(path) for path in task.files}
    if data.today is not None:
        identities["today"] = data.today
    check_same(identities)
    if processes.first():
        claim(config, identities, start, data)
    processes.barrier("the directory is claimed")
    if not is_run(config.output):
        seen = "is not seen by every process; name a directory that all of them share, or one of an object store"
        raise UserError(f"--output {config.output}: {seen}")
    return data, model, ref_model, program, identities


def claim(config: TrainOptions, identities: dict[str, str], start: Start, data: Data) -> None:
    """Take ``--output`` for this run, and write what others need to read the run.

    Raises:
      UserError: the directory is another run's.
    """
    claim_directory(config, identities)
    run = path_of(config.output)
    save_model_files(start.merged.hf_config, start.merged.generation_config, data.tokenizer, run / "model")
    if start.config.lora is not None and start.base is not None:
        base = start.config.base
        save_adapter_of_run(run, RunAdapter(start.base, start.config.lora, base.vocab_size, base.tied, base.quantized))


def check_same(identities: dict[str, str]) -> None:
    """Refuse a run of which processes have another model, other data or another objective.

    Raises:
      UserError: naming what differs.
    """
    first = json.loads(processes.from_first(json.dumps(identities)))
    differing = [name for name in identities.keys() | first.keys() if identities.get(name) != first.get(name)]
    if not processes.all_of(not differing):
        named = ", ".join(sorted(differing)) or "model or data"
        raise UserError(f"{named}: not the same for every process; give all of them the same files and options")


def references(
    config: TrainOptions, task: Task, program: Program, data: Data, model: Model, content: str
) -> tuple[Reference, Reference | None]:
    """The run's reference, and that of its held-out data where it is another: log-probabilities from the cache, also
    of a live reference, if sums are all that an evaluation reads."""
    choice, traits = task.reference, task.traits
    key = model_key(model.config, content, config.dtype)

    def cached(batches: Batches, file: str | None, label: str, limit: int | None = None) -> Reference:
        cache = LogpsCache(file, key, batches.completions.shape[1])
        return cached_reference(program, model.params, batches, label=label, limit=limit, cache=cache)

    if choice.form == "none":
        return no_reference(), None
    if choice.form == "moving":
        return moving_reference(program, model.params, alpha=choice.alpha, every=choice.every), None
    if choice.form == "live":
        if traits.needs_live_reference:
            console.print("  the objective reads single tokens of the reference, which runs in every step")
        reference: Reference = live_reference(program, model.params)
    else:
        # First, and so in the run's own batches, whose rounding is then the steps' own.
        reference = cached(data.batches, data.beside[0], "Reference log-probabilities", data.total_steps)
    if data.eval_batches is None or (choice.form == "live" and traits.needs_forward_pass):
        return reference, None
    return reference, cached(data.eval_batches, data.beside[1], "Reference log-probabilities, held-out")


def train(config: TrainOptions, on_step: OnStep | None = None) -> Result:
    """Run, or continue, what the options say; everything is written below ``config.output``.

    Longer than our other functions, so that a run reads from top to bottom in one place.

    Args:
      config: the options.
      on_step: called after every step; returning False stops the run, after a checkpoint.

    Raises:
      UserError: bad options, data, model or output directory, or a disk that is full.
    """
    check_options(config)
    task = task_of(config)
    data, model, ref_model, program, identities = open_run(config, task)
    keep_memory()
    run, total_steps = path_of(config.output), data.total_steps
    largest = max(x.nbytes for x in jax.tree.leaves(model.params))
    checkpoints = Checkpoints(run, config.save_total_limit, in_flight=max(IN_FLIGHT, largest + 1))
    if config.train_top_layers is not None:
        checkpoints.save_frozen(separate(model.params, config.train_top_layers)[0])
    done = checkpoints.latest
    if done >= total_steps and checkpoints.sound(done, program.layout.abstract()):
        console.print(f"{run}: this run is complete, at step {done}; nothing to do")
        return Result(done, finished=True)
    own = begin_session(config) if processes.first() else {}

    # ---- reference: log-probabilities, cached or live -------------------------------------------------------------
    ref_hash = identities.get("reference_hash", "")
    reference, eval_reference = references(config, task, program, data, ref_model, ref_hash)

    # ---- frozen layers: their hidden states, once for every row ---------------------------------------------------
    batches, eval_batches = data.batches, data.eval_batches
    if config.train_top_layers is not None:
        trunk_model, model = cut(model, config.train_top_layers)
        trunk = Trunk(trunk_model, program.mesh, config, scratch(run), config.gradient_accumulation_steps)
        batches = trunk.below(batches, "Frozen layers", total_steps)
        eval_batches = eval_batches and trunk.below(eval_batches, "Frozen layers, held-out")
        del trunk, trunk_model

    # ---- state ----------------------------------------------------------------------------------------------------
    layout, iterator = program.layout, batches.iterator()
    if done:
        frozen = placed(partition(model.params, layout.trainable)[1], layout.shardings.frozen)
        like = dataclasses.replace(layout.abstract(), hyper=layout.placed_hyper(), frozen=frozen)
        moving = reference if isinstance(reference, MovingReference) else None
        done, state, position, moved = checkpoints.restore_latest(like, moving and moving.params)
        iterator.set_state(position)
        if moving is not None:
            reference = dataclasses.replace(moving, params=moved)
        console.print(f"{run}: continuing from step {done}")
    else:
        state = initial_state(program, model.params, config.seed, donate=True)
    del model, ref_model

    # ---- steps ----------------------------------------------------------------------------------------------------
    writers = writers_of(run, config.report_to, own, done) if processes.first() else []
    log = MetricsLog(writers, total_steps, len(batches.examples), config.warmup_steps + STILL_STEPS)

    def figures_of(step: int, state: TrainState, reference: Reference) -> float | None:
        if eval_batches is None:
            return None
        used = eval_reference or reference
        # Before the first step the policy is its reference, unless that is another model.
        same = step == 0 and ref_hash == identities["model_hash"]
        sums = used.sums if same and isinstance(used, CachedReference) else None
        figures = evaluate(program, state.policy, eval_batches, used, running=state.running, sums=sums)
        log.write(step, figures)
        log.show(step, figures)
        return figures["eval_loss"]

    if done == 0:
        figures_of(0, state, reference)
    step = done
    with stop_signals() as stop, Stage("Training", total_steps, done) as stage:
        for at in run_steps(program, state, iterator, reference, done, total_steps):
            step = at.step
            log.add(step, at.item, at.metrics)
            if on_step is not None and on_step(step, at.state) is False:
                stop.set()
            last, stopping = step == total_steps, stop.is_set() or processes.asked_to_stop(step)
            shows = step % config.logging_steps == 0 or last or stopping
            evaluates = step % config.eval_steps == 0 or last
            saves = step % config.save_steps == 0 or last or stopping
            if shows or evaluates or saves:
                log.flush()
            if shows:
                log.show_steps(step)
            eval_loss = figures_of(step, at.state, at.reference) if evaluates else None
            if saves:
                moved = at.reference.params if isinstance(at.reference, MovingReference) else None
                log.sync()
                checkpoints.save(at.state, iterator.get_state(), eval_loss, moved)
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
    """Ctrl-C, and the SIGTERM by which a pod announces that it takes its machines back, ask to stop after the step.

    Of several processes one may be asked, and JAX's own handler of SIGTERM tells the others
    (:func:`~dpojax.processes.asked_to_stop`).
    """
    asked, interrupted = threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may handle signals
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt  # asked twice: at once, from the last checkpoint
        interrupted.set()
        console.print("stopping after this step, to save")
        if together:
            signal.raise_signal(signal.SIGTERM)
        else:
            asked.set()

    together = processes.count() > 1
    handled = (signal.SIGINT,) if together else (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, handle) for number in handled}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
