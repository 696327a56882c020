"""The functions that a run consists of, compiled for a mesh, from objects in hand."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dpojax.configs import ComputeOptions, MeshConfig, TrainOptions
from dpojax.logprobs import completion_stats
from dpojax.losses import Objective, Traits, traits_of
from dpojax.models import (
    DecoderConfig,
    Lora,
    abstract_params,
    check_divides,
    partition,
    unembedding_of,
)
from dpojax.models.experts import Routing, balance_loss
from dpojax.models.params import of_adapter
from dpojax.packing import ApplyFn, PairBatch
from dpojax.sharding import auto_mesh, batch_sharding, batch_shards, check_batch, make_mesh, replicated
from dpojax.train.objectives import (
    BatchContext,
    LossFn,
    Metrics,
    Running,
    empty_running,
    logps_of,
    make_loss,
    mean_chosen_len,
)
from dpojax.train.optimizer import make_optimizer, make_schedule
from dpojax.train.scoring import LogpsStep, apply_on, jit_forward, make_logps_step
from dpojax.train.state import StateLayout, TrainState, every, state_layout
from dpojax.train.step import StepFn, jit_train_step, make_train_step
from dpojax.train.task import Task
from dpojax.train.top_layers import of_top, top_config
from dpojax.types import CompletionStats, PyTree, ReferenceOutput

EvalStep = Callable[..., Metrics]


@dataclasses.dataclass(frozen=True)
class ReferenceStep:
    """A live reference's compiled forward pass, and what makes of its statistics what the objective reads."""

    forward: Any
    finish: Callable[[PyTree, PairBatch, CompletionStats], ReferenceOutput]

    def __call__(self, params: PyTree, batch: PairBatch) -> ReferenceOutput:
        return self.finish(params, batch, self.forward(params, batch))

    def lower(self, params: PyTree, batch: PairBatch) -> Any:
        """The forward pass lowered for inputs of these shapes."""
        return self.forward.lower(params, batch)


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of a run, and the mesh that they run on.

    Attributes:
      mesh: the devices.
      sequences: R, packed sequences of a global batch: the devices that split it, times the micro-batches.
      objective: ``(policy, ref) -> [B]`` losses.
      traits: what the objective reads.
      config: shape of the whole model, the reference's; the policy's is ``layout.config``, with its adapter.
      layout: how a train state looks and lies.
      step: ``(state, batch, ref) -> (state, metrics)``, jitted; the state is donated.
      eval_step: ``(params, batch, ref, i, running, beta) -> metrics`` of a held-out batch, undivided, jitted.
      logps_step: ``(params, batch) -> [B, N]`` sums of log-probabilities under a whole model, jitted.
      policy_logps: the same under the policy, whose batches carry hidden states where only top layers are trained.
      ref_step: ``(params, batch) -> ReferenceOutput``, what the objective reads of a live reference.
    """

    mesh: Mesh
    sequences: int
    objective: Objective
    traits: Traits
    config: DecoderConfig
    layout: StateLayout
    step: StepFn
    eval_step: EvalStep
    logps_step: LogpsStep
    policy_logps: LogpsStep
    ref_step: ReferenceStep


def make_program(
    config: DecoderConfig,
    objective: Objective,
    *,
    mesh: Mesh | None = None,
    beta: float | None = None,
    learning_rate: float | None = None,
    optimizer: optax.GradientTransformation | None = None,
    schedule: optax.Schedule | None = None,
    micro_batches: int = 1,
    compute: ComputeOptions | None = None,
    train_top_layers: int | None = None,
    lora: Lora | None = None,
    router_aux_loss_coef: float = 0.0,
) -> Program:
    """The program of a model and an objective.

    Args:
      config: the reference's shape: the model's, with the adapter if it is the reference's too.
      objective: ``(policy, ref) -> [B]`` losses.
      mesh: default: all devices, each with a copy of the model.
      beta: strength of the KL penalty, for the terms of the objective that bind none (default: the one in the
        objective's signature, else 0.1).
      learning_rate: the peak, by which the optimizer's updates are multiplied; default: 1e-6, or, with an optimizer
        of your own, 1.
      optimizer: default: RMSprop with gradients clipped to a norm of 10.
      schedule: learning rate by step, relative to the peak; what your own optimizer was built with, for the log.
      micro_batches: pieces that a batch is computed in, one after another.
      compute: dtype, attention kernel, chunks of logits, and what the backward pass recomputes.
      train_top_layers: N trains the top N layers and the final norm alone.
      router_aux_loss_coef: weight of a mixture's load-balancing loss (:func:`~dpojax.models.experts.balance_loss`).
      lora: the policy's adapter, which alone is trained (:func:`~dpojax.models.lora.with_adapter`).

    Raises:
      UserError: the mesh does not divide the model.
    """
    mesh, compute = mesh or make_mesh(MeshConfig()), compute or ComputeOptions()
    policy = config if lora is None else dataclasses.replace(config, lora=lora)
    for shape in {config, policy}:
        check_divides(mesh, shape)
    peak = learning_rate if learning_rate is not None else 1e-6 if optimizer is None else 1.0
    schedule = schedule or make_schedule()
    optimizer = optimizer or make_optimizer(schedule)
    trained = policy if train_top_layers is None else top_config(policy, train_top_layers)
    trainable = of_adapter if trained.lora else every if train_top_layers is None else of_top
    traits, chunk = traits_of(objective), compute.logprob_chunk_tokens

    def logps_of_model(shape: DecoderConfig) -> LogpsStep:
        return make_logps_step(
            apply_on(shape, mesh, compute), mesh, shape, chunk_tokens=chunk, micro_batches=micro_batches
        )

    dropout = trained.lora is not None and trained.lora.dropout > 0
    routings: list[Routing] = []
    loss_fn = make_loss(
        apply_on(trained, mesh, compute, remat=compute.remat, routings=routings),
        objective,
        chunk_tokens=chunk,
        mesh=mesh,
        dropout=dropout,
        balance=None if trained.experts is None else lambda: balance_loss(trained, routings.pop()),
        router_aux_loss_coef=router_aux_loss_coef,
    )
    layout = state_layout(
        mesh,
        trained,
        optimizer,
        beta=default_beta(objective) if beta is None else beta,
        learning_rate=peak,
        trainable=trainable,
        running=empty_running(objective),
    )
    step = make_train_step(loss_fn, optimizer, schedule, micro_batches)
    logps_step = logps_of_model(config)
    return Program(
        mesh=mesh,
        sequences=batch_shards(mesh) * micro_batches,
        objective=objective,
        traits=traits,
        config=config,
        layout=layout,
        step=jit_train_step(step, mesh, layout.shardings),
        eval_step=jax.jit(make_eval_step(loss_fn), out_shardings=replicated(mesh)),
        logps_step=logps_step,
        policy_logps=logps_step if trained == config else logps_of_model(trained),
        ref_step=make_ref_step(
            apply_on(config, mesh, compute), mesh, config, traits, chunk_tokens=chunk, micro_batches=micro_batches
        ),
    )


def bytes_per_copy(config: TrainOptions, task: Task, model: DecoderConfig, lora: Lora | None = None) -> int:
    """Bytes of all that a copy of a run's model holds between steps and in them: the parameters, the gradients and the
    optimizer's state of what is trained, and a live reference's parameters where the policy's are trained.

    Args:
      config, task: the command's.
      model: the reference's shape.
      lora: the policy's adapter.
    """
    policy = model if lora is None else dataclasses.replace(model, lora=lora)
    top = config.train_top_layers
    trained = policy if top is None else top_config(policy, top)
    trainable = of_adapter if trained.lora else every if top is None else of_top
    params, frozen = partition(abstract_params(trained), trainable)
    optimizer = make_optimizer(make_schedule(), optim=config.optim, optim_dtype=config.optim_dtype)
    held = [params, params, frozen, jax.eval_shape(optimizer.init, params)]
    if task.reference.form in ("live", "moving") and trained.lora is None:
        held.append(abstract_params(model))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))


def mesh_of(
    config: TrainOptions,
    task: Task,
    model: DecoderConfig,
    lora: Lora | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The mesh of a command's options; sizes that they leave open suit what the run holds on it.

    Args:
      config, task: the command's.
      model: the reference's shape.
      lora: the policy's adapter.
      devices: those to use (default: all of JAX's default kind).

    Raises:
      UserError: the sizes do not fit the devices, the model or the batch.
    """
    devices = list(jax.devices() if devices is None else devices)
    mesh = make_mesh(auto_mesh(config.mesh, devices, bytes_per_copy(config, task, model, lora)), devices)
    check_batch(mesh, config.batch_size // config.gradient_accumulation_steps)
    check_divides(mesh, model)
    return mesh


def default_beta(objective: Objective) -> float:
    """The beta in an objective's signature, bound or by default; 0.1 without a number there."""
    option = inspect.signature(objective).parameters.get("beta")
    return option.default if option is not None and isinstance(option.default, int | float) else 0.1


def program_of(
    config: TrainOptions,
    task: Task,
    model: DecoderConfig,
    mesh: Mesh,
    total_steps: int,
    lora: Lora | None = None,
) -> Program:
    """The program of a command's options; ``model`` is the reference's shape, ``lora`` the policy's adapter.

    Raises:
      UserError: the mesh does not divide the model.
    """
    micro = config.gradient_accumulation_steps
    schedule = make_schedule(
        lr_scheduler_type=config.lr_scheduler_type, warmup_steps=config.warmup_steps, total_steps=total_steps
    )
    optimizer = make_optimizer(
        schedule,
        optim=config.optim,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim_dtype=config.optim_dtype,
    )
    return make_program(
        model,
        task.objective,
        mesh=mesh,
        beta=task.beta,
        learning_rate=config.learning_rate,
        optimizer=optimizer,
        schedule=schedule,
        micro_batches=micro,
        compute=config,
        train_top_layers=config.train_top_layers,
        router_aux_loss_coef=config.router_aux_loss_coef,
        lora=lora,
    )


def make_eval_step(loss_fn: LossFn) -> EvalStep:
    """``eval_step(params, batch, ref, i, running, beta) -> metrics``; the i-th batch draws the same at every
    evaluation."""

    def eval_step(
        params: PyTree, batch: PairBatch, ref: ReferenceOutput | None, i: int, running: Running, beta: Any
    ) -> Metrics:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), i), len(batch.prompt_len))
        context = BatchContext(beta, mean_chosen_len(batch), jnp.int32(0), running, training=False)
        loss, metrics, _ = loss_fn(params, dataclasses.replace(batch, key=keys), ref, context)
        return {"loss": loss, **metrics}

    return eval_step


def make_ref_step(
    apply_fn: ApplyFn,
    mesh: Mesh,
    config: DecoderConfig,
    traits: Traits,
    *,
    chunk_tokens: int,
    micro_batches: int = 1,
) -> ReferenceStep:
    """``ref_step(params, batch)``, compiled: what an objective of these traits reads of a live reference."""
    reads = traits.reference_statistics | ({"hidden"} if traits.compares_distributions else set())

    def stats(params: PyTree, batch: PairBatch) -> CompletionStats:
        read = frozenset(reads)
        return completion_stats(apply_fn, params, batch, chunk_tokens=chunk_tokens, reads=read, mesh=mesh)

    def output(stats: CompletionStats, batch: PairBatch) -> ReferenceOutput:
        return ReferenceOutput(logps_of(stats, batch, traits), stats.hidden)

    forward = jit_forward(stats, mesh, config, micro_batches)
    shape = jax.jit(output, out_shardings=batch_sharding(mesh))

    def finish(params: PyTree, batch: PairBatch, stats: CompletionStats) -> ReferenceOutput:
        ref = shape(stats, batch)
        return dataclasses.replace(ref, head=unembedding_of(config, params)) if traits.compares_distributions else ref

    return ReferenceStep(forward, finish)


def initial_state(program: Program, params: PyTree, seed: int = 0, *, donate: bool = False) -> TrainState:
    """The state before the first step, laid out over the program's mesh.

    Args:
      program: the run's functions.
      params: of the policy, as host arrays or on the devices.
      seed: of the random key for objectives that draw.
      donate: whether the state may take over the memory of what is trained of ``params``, which must not be used
        afterwards.
    """
    return program.layout.initial(params, seed, donate=donate)


def abstract_inputs(program: Program, batch: PairBatch) -> tuple[TrainState, PairBatch, ReferenceOutput | None]:
    """Shapes, dtypes and shardings of the step's inputs for a batch of these shapes; nothing is allocated.

    The devices of the program's mesh need not be there.
    """
    by_batch, traits = batch_sharding(program.mesh), program.traits

    def placed(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_batch), tree)

    ref = None
    if traits.needs_live_reference:
        params = abstract_params(program.config, program.mesh)
        ref = jax.eval_shape(program.ref_step, params, placed(batch))
        # The unembedding lies as it does among the reference's parameters.
        own = [params[name] for name in (program.config.unembedding, "head_bias") if name in params]
        head = None if ref.head is None else jax.tree.unflatten(jax.tree.structure(ref.head), own)
        ref = dataclasses.replace(placed(dataclasses.replace(ref, head=None)), head=head)
    elif traits.reference:
        zeros = jax.ShapeDtypeStruct(batch.completion_len.shape, jnp.float32)
        output = lambda sums, batch: ReferenceOutput(logps_of(CompletionStats(sums), batch, traits))  # noqa: E731
        ref = placed(jax.eval_shape(output, zeros, batch))
    return program.layout.abstract(), placed(batch), ref


def lower_step(program: Program, batch: PairBatch) -> Any:
    """The train step lowered for a batch of these shapes, to compile for devices that need not be there."""
    return program.step.lower(*abstract_inputs(program, batch))  # type: ignore[attr-defined]
