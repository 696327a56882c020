"""A model or a tokenizer by name, where the name may also be the directory of a run."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jax.sharding import Mesh

from dpojax.configs import ModelOptions
from dpojax.errors import UserError
from dpojax.models import (
    DecoderConfig,
    Model,
    abstract_params,
    as_reward_model,
    config_from_hf,
    fingerprint,
    load_tokenizer,
    merge,
    open_model,
)
from dpojax.models.families import family_of
from dpojax.models.fewbits import quantized
from dpojax.models.generation import model_eos_ids, read_generation_config, with_tokenizer_eos
from dpojax.models.load import adapter_directory, resolve, reward_config
from dpojax.models.params import flatten, nest, of_adapter, partition
from dpojax.models.peft import CONFIG, load_adapter, lora_of, open_adapter
from dpojax.models.safetensors import read_json
from dpojax.paths import AnyPath, absolute, exists, path_of, same
from dpojax.progress import Stage, console
from dpojax.sharding import single_device_mesh
from dpojax.train.checkpoint import Checkpoints, DamagedCheckpoint, all_damaged, frozen_of, params_of
from dpojax.train.rundir import RunAdapter, adapter_of_run, is_run, options_of_run
from dpojax.train.top_layers import join, separate_shapes
from dpojax.types import PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class PolicyFiles:
    """A model or a run, opened: its choices; no tensor has been read."""

    name: str
    config: DecoderConfig
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]
    load: Callable[[Mesh | None], Model]
    """The model with its parameters born on a mesh (default: whole, on JAX's first device)."""

    def eos_ids(self, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
        """Every token that ends a completion (:meth:`~dpojax.models.Model.eos_ids`), before weights are read.

        Raises:
          UserError: one of them is no token of the model.
        """
        where = path_of(self.name) / "model" if is_run(self.name) else path_of(self.name)
        own = model_eos_ids(self.hf_config, self.generation_config, self.config.vocab_size, where)
        return with_tokenizer_eos(own, tokenizer, self.config.vocab_size)


def open_policy(name: str, *, reward: bool = False, adapter: str | None = None) -> PolicyFiles:
    """A model by name, where the name may also be a run's directory (its latest checkpoint) or an adapter's, which is
    merged into its base.

    Args:
      name: a Hugging Face directory, a hub id, a ``.gguf`` file, a run, or a PEFT adapter.
      reward: a reward model is wanted: others get a head that scores completions.
      adapter: a PEFT adapter to be merged into this model.

    Raises:
      UserError: no such model; or it is a reward model, which writes no text, and none is asked for.
    """
    if adapter is not None:
        return _open_adapted(adapter, name, reward=reward)
    if not is_run(name) and adapter_directory(name) is not None:
        return _open_adapted(name, None, reward=reward)
    if is_run(name):
        directory = path_of(name) / "model"
        hf_config = read_json(directory / "config.json")
        config = config_from_hf(hf_config, str(directory / "config.json"))
        generation = read_generation_config(directory)
        read = lambda mesh: load_run(name, mesh=mesh)[0]  # noqa: E731
    else:
        files = open_model(name)
        config, hf_config, generation = files.config, files.hf_config, files.generation_config

        def read(mesh: Mesh | None) -> Model:
            with Stage(f"Loading {Path(name).name}", 1.0) as stage:
                return files.load(mesh, stage.reach)

    if not reward:
        if config.reward:
            raise UserError(f"{name}: is a reward model, which has no vocabulary; use it with --loss reward_model")
        return PolicyFiles(name, config, hf_config, generation, read)
    config, hf_config = reward_config(config, hf_config)
    return PolicyFiles(name, config, hf_config, {}, lambda mesh: as_reward_model(read(mesh), mesh))


def _open_adapted(name: str, base: str | None, *, reward: bool = False) -> PolicyFiles:
    """An adapter merged into its base, or into another that is named instead."""
    adapter = open_adapter(resolve(name))
    below = open_policy(base or adapter.base_name())
    family = family_of(below.hf_config, below.name)
    config = dataclasses.replace(below.config, lora=lora_of(adapter, family, below.config))
    raw = merged_hf_config(below.hf_config, config)

    def read(mesh: Mesh | None) -> Model:
        model = below.load(mesh)
        params = nest({**flatten(model.params), **load_adapter(adapter, family, config, mesh)})
        return Model(config.merged, merge(config, params), raw, below.generation_config)

    if not reward:
        return PolicyFiles(name, config.merged, raw, below.generation_config, read)
    scoring, raw_scoring = reward_config(config.merged, raw)
    return PolicyFiles(name, scoring, raw_scoring, {}, lambda mesh: as_reward_model(read(mesh), mesh))


def merged_hf_config(hf_config: dict[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """The ``config.json`` of a base with an adapter merged into it.

    Raises:
      UserError: the family has no models of these choices.
    """
    merged, base = config.merged, config.base
    if merged == base:
        return hf_config
    raw = {**hf_config, "vocab_size": merged.vocab_size, "tie_word_embeddings": merged.tied}
    if config_from_hf(raw, "config.json") != merged:
        raise UserError(
            f"{hf_config.get('model_type')}: the family has no models with an unembedding apart from the embedding, "
            "which the adapter has"
        )
    return raw


def same_model(name: str, other: str) -> bool:
    """Whether two names are one model's."""
    return same(name, other)


def load_policy(name: str, *, reward: bool = False, mesh: Mesh | None = None) -> Model:
    """:func:`open_policy`, and its parameters on a mesh."""
    return open_policy(name, reward=reward).load(mesh)


def load_run(path: str | AnyPath, which: str = "latest", *, mesh: Mesh | None = None) -> tuple[Model, int]:
    """The policy of a run, its parameters born on a mesh, and its step.

    Args:
      path: the run's ``--output`` directory.
      which: "latest", "best" (by eval_loss) or a step.
      mesh: where the parameters lie (default: whole, on JAX's first device).

    Raises:
      UserError: no such run or checkpoint.
    """
    run = path_of(path)
    if not is_run(run):
        raise UserError(f"{run}: no run.json; give the --output directory of a dpo or sft run")
    over = mesh or single_device_mesh()
    for _ in range(5):
        # A run that is writing here may remove an older checkpoint while we look.
        with contextlib.suppress(FileNotFoundError):
            return _or_earlier(run, which, lambda checkpoint: _read_policy(run, checkpoint, over))
    raise UserError(f"{run}: its checkpoints change faster than they can be read; try again")


def load_adapter_of_run(path: str | AnyPath, which: str = "latest") -> tuple[Model, str, int]:
    """The adapter of a LoRA run, its base's name, and its step; the model's parameters are the adapter's alone.

    Raises:
      UserError: no such run or checkpoint, or the run has trained no adapter.
    """
    run = path_of(path)
    beside = adapter_of_run(run) if is_run(run) else None
    if beside is None:
        raise UserError(f"{run}: no run with an adapter; leave --adapter out, or give a run with --lora-rank")
    raw = read_json(run / "model" / "config.json")
    config, mesh = _base_of(beside, raw), single_device_mesh()
    params, step = _or_earlier(run, which, lambda checkpoint: _restore_adapter(checkpoint, config, mesh))
    return Model(config, nest(params), raw), beside.base, step


def _base_of(beside: RunAdapter, raw: dict[str, Any]) -> DecoderConfig:
    """The choices of a run's base and adapter, from the merged model's ``config.json``."""
    base = {**raw, "vocab_size": beside.vocab_size, "tie_word_embeddings": beside.tied}
    return dataclasses.replace(config_from_hf(base, "config.json"), lora=beside.lora, quantized=beside.quantized)


def _restore_adapted(run: AnyPath, checkpoint: AnyPath, beside: RunAdapter, mesh: Mesh) -> Model:
    """A LoRA run's policy, its base read by its name.

    Raises:
      UserError: the base is not there, or is another than the run began with.
    """
    raw = read_json(run / "model" / "config.json")
    config = _base_of(beside, raw)
    adapter = _restore_adapter(checkpoint, config, mesh)
    try:
        base = open_policy(beside.base, reward=config.reward).load(mesh)
    except UserError as error:
        raise UserError(f"{run}: the base of its adapter cannot be read: {error}") from None
    if base.config != config.base.merged or fingerprint(base.params) != options_of_run(run).get("base_hash"):
        raise UserError(f"{run}: {beside.base} is not the base that its adapter was trained on; put that back there")
    params = nest({**flatten(quantized(config, base.params, mesh)), **adapter})
    return Model(config, params, raw, read_generation_config(run / "model"))


def _restore_adapter(checkpoint: AnyPath, config: DecoderConfig, mesh: Mesh) -> dict[str, Any]:
    shapes, _ = partition(abstract_params(config, mesh), of_adapter)
    return flatten(params_of(checkpoint, shapes))


def _or_earlier(run: AnyPath, which: str, read: Callable[[AnyPath], T]) -> tuple[T, int]:
    """What is read of a checkpoint, and its step; where the latest is damaged, of the last that is not.

    Raises:
      UserError: there is no such checkpoint, or it is damaged, or all are.
    """
    checkpoints, damaged = Checkpoints(run, read_only=True), []
    for step in _steps_of(run, checkpoints, which):
        try:
            value = read(checkpoints.directory / str(step))
        except DamagedCheckpoint as error:
            damaged.append(error)
            continue
        for passed_over in damaged:
            console.print(f"{passed_over}; the one of step {step} is used")
        return value, step
    if which != "latest":
        raise UserError(f"{damaged[0]}; take another, or latest, which passes over it")
    raise all_damaged(damaged)


def _steps_of(run: AnyPath, checkpoints: Checkpoints, which: str) -> list[int]:
    """The steps of the checkpoint that is asked for; of the latest, those of the earlier ones after it."""
    steps = sorted(checkpoints.manager.all_steps(), reverse=True)
    if not steps:
        raise UserError(f"{run}: no checkpoint yet; let the run reach its first --save-steps")
    if which == "latest":
        return steps
    step = str(checkpoints.manager.best_step() if which == "best" else which)
    if step not in map(str, steps):
        raise UserError(f"{run}: no checkpoint {which!r}; it has latest, best with eval data, and {steps[::-1]}")
    return [int(step)]


def _read_policy(run: AnyPath, checkpoint: AnyPath, mesh: Mesh) -> Model:
    beside = adapter_of_run(run)
    if beside is not None:
        adapted = _restore_adapted(run, checkpoint, beside, mesh)
        params = merge(adapted.config, adapted.params)
        return dataclasses.replace(adapted, config=adapted.config.merged, params=params)
    hf_config = read_json(run / "model" / "config.json")
    config = config_from_hf(hf_config, str(run / "model" / "config.json"))
    trained, n = abstract_params(config, mesh), options_of_run(run).get("train_top_layers")
    if n is not None:
        frozen, trained = separate_shapes(trained, n)
    params = params_of(checkpoint, trained)
    if n is not None:
        params = join(_restore_frozen(absolute(run), frozen), params)
    return Model(config, params, hf_config, read_generation_config(run / "model"))


def _restore_frozen(run: AnyPath, shapes: PyTree) -> PyTree:
    directory, again = run / "frozen", "the run's own command writes it again"
    if not exists(directory):
        raise UserError(f"{directory}: is missing; {again}")
    try:
        return frozen_of(run, shapes)
    except DamagedCheckpoint as error:
        raise UserError(f"{error}; remove this directory, and {again}") from None


def tokenizer_for(options: ModelOptions) -> "PreTrainedTokenizerBase":
    """The tokenizer that the options name; that they name a model with weights is checked first, which is quick."""
    adapter = getattr(options, "adapter", None)
    if not is_run(options.model) and adapter_directory(options.model) is None:
        open_model(options.model)
    if options.tokenizer is None and adapter is not None and has_tokenizer(resolve(adapter)):
        return load_policy_tokenizer(adapter)
    return load_policy_tokenizer(options.tokenizer or options.model)


def has_tokenizer(directory: AnyPath) -> bool:
    """Whether an adapter's directory has a tokenizer of its own."""
    return (directory / "tokenizer_config.json").exists()


def load_policy_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model by name, or of a run; an adapter without one has its base's."""
    if is_run(name):
        return load_tokenizer(str(path_of(name) / "model"))
    path = path_of(name)
    directory = adapter_directory(name) if not path.exists() or (path / CONFIG).exists() else None
    if directory is not None and not has_tokenizer(directory):
        return load_policy_tokenizer(open_adapter(directory).base_name())
    return load_tokenizer(name)
