"""Where a run's policy begins: a model as it is, or a model and an adapter beside it, new or read from files."""

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from dpojax.configs import TrainOptions
from dpojax.errors import UserError
from dpojax.models import DecoderConfig, Lora, Model, fingerprint
from dpojax.models.families import family_of
from dpojax.models.fewbits import check_qwix, quantized
from dpojax.models.load import adapter_directory, resolve
from dpojax.models.lora import check_linear, new_lora, parameters, targeted, with_adapter, without_adapter
from dpojax.models.params import flatten, nest, of_adapter, param_shardings, partition
from dpojax.models.peft import AdapterFiles, load_adapter, lora_of, open_adapter
from dpojax.models.same import difference
from dpojax.options import flag
from dpojax.progress import console
from dpojax.train.by_name import PolicyFiles, merged_hf_config, open_policy, same_model

ONLY_NEW = ("lora_alpha", "lora_targets", "use_rslora", "lora_init")
"""Options of a new adapter; one that is read has its own."""


@dataclasses.dataclass(frozen=True)
class Start:
    """A run's policy before its first step; no tensor has been read.

    Attributes:
      files: the model, of an adapter the base.
      config: the policy's choices, its adapter among them.
      base: the name of the base, where there is an adapter.
      adapter: the files that the adapter is read from; None: there is none, or it is new.
    """

    files: PolicyFiles
    config: DecoderConfig
    base: str | None = None
    adapter: AdapterFiles | None = None

    @property
    def reference(self) -> DecoderConfig:
        """The choices of the policy as it is before training: without a new adapter, which changes nothing yet."""
        return self.config if self.adapter is not None else self.config.base

    @property
    def merged(self) -> PolicyFiles:
        """The files with the choices of the merged model, for whoever reads the run."""
        raw = merged_hf_config(self.files.hf_config, self.config)
        return dataclasses.replace(self.files, config=self.config.merged, hf_config=raw)

    def load(self, mesh: Mesh, seed: int) -> tuple[Model, str]:
        """The policy with its parameters born on the mesh, the base's and the adapter's beside them; and the content
        hash of the model, or the base, as its files have it."""
        model = self.files.load(mesh)
        content = fingerprint(model.params)
        if self.config.lora is None:
            return model, content
        params = quantized(self.config, model.params, mesh)
        if self.adapter is None:
            params = with_adapter(self.config, params, seed, mesh)
        else:
            family = family_of(self.files.hf_config, "config.json")
            params = nest({**flatten(params), **load_adapter(self.adapter, family, self.config, mesh)})
        return dataclasses.replace(model, config=self.config, params=params), content

    def reference_model(self, policy: Model, reference: DecoderConfig) -> Model:
        """The reference of these choices, of the policy's own arrays."""
        if reference == policy.config:
            return policy
        return dataclasses.replace(policy, config=reference, params=without_adapter(policy.params))

    def hashes(self, content: str, policy: Model, reference: Model | None) -> dict[str, str]:
        """Content hashes of the policy, of its reference, and, where there is an adapter, of the base.

        Args:
          content: of the model's or the base's files (:meth:`load`).
          policy: as it begins. A new adapter changes nothing yet, so its hash is the base's.
          reference: None where there is none.
        """
        kept = self.config.quantized
        base = content if kept == "none" else f"{content}-{kept}"
        read = None if self.adapter is None else fingerprint(partition(policy.params, of_adapter)[0])
        out = {"model_hash": base if read is None else f"{base}+{read}"}
        if policy.config.lora is not None:
            out["base_hash"] = content
        if reference is not None:
            own = flatten(reference.params)["final_norm"] is flatten(policy.params)["final_norm"]
            same = out["model_hash"] if reference.config == self.reference else base
            out["reference_hash"] = same if own else fingerprint(reference.params)
        return out


def open_start(config: TrainOptions, *, reward: bool) -> Start:
    """The policy that a command's options begin with.

    Args:
      config: the options.
      reward: a reward model is wanted.

    Raises:
      UserError: no such model or adapter, they do not fit together, or an option has no effect.
    """
    directory = config.adapter or adapter_directory(config.model)
    whole = config.lora_rank is not None or config.train_top_layers is not None or reward
    continues = directory is not None and not whole
    check_adapter_options(config, new=config.lora_rank is not None, read=continues)
    if continues:
        if getattr(config, "sync_ref_model", False):
            raise UserError(f"{directory}: is an adapter, and --sync-ref-model mixes whole models; leave it out")
        start = _from_adapter(config, str(directory))
    else:
        if config.adapter is not None:
            other = "--loss reward_model" if config.lora_rank is None else "--lora-rank"
            raise UserError(
                f"--adapter {config.adapter}: is trained as it is, and {other} trains another; give it as --model, "
                "which merges it first"
            )
        start = begun(config, open_policy(config.model, reward=reward), reward=reward)
    if start.config.lora is not None:
        trained, total = parameters(start.config)
        console.print(f"  the adapter has {trained:,} parameters, {trained / total:.2%} of {total:,}; they are trained")
    return start


def begun(config: TrainOptions, files: PolicyFiles, *, reward: bool) -> Start:
    """The policy that begins as a model is, or with the new adapter beside it that the options ask for."""
    return Start(files, files.config) if config.lora_rank is None else _with_new(config, files, reward)


def _from_adapter(config: TrainOptions, directory: str) -> Start:
    adapter = open_adapter(resolve(directory))
    base = config.model if config.adapter is not None else adapter.base_name()
    files = open_policy(base)
    lora = lora_of(adapter, family_of(files.hf_config, base), files.config)
    lora = dataclasses.replace(lora, dropout=config.lora_dropout)
    return Start(files, _kept(config, files.config, lora), base, adapter)


def _kept(config: TrainOptions, base: DecoderConfig, lora: Lora) -> DecoderConfig:
    """The policy's choices: the base as the options keep it, and the adapter."""
    if config.quantize_base != "none":
        check_qwix()
    return dataclasses.replace(base, lora=lora, quantized=config.quantize_base)


def _with_new(config: TrainOptions, files: PolicyFiles, reward: bool) -> Start:
    assert config.lora_rank is not None
    check_linear(files.config, config.model)
    lora = new_lora(
        targeted(config.lora_targets, family_of(files.hf_config, config.model), files.config),
        config.lora_rank,
        2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        rslora=config.use_rslora,
        dropout=config.lora_dropout,
        zero="a" if config.lora_init == "a-zero" else "b",
        saved=("score",) if reward else (),  # a new head is zero, and trained whole
    )
    return Start(files, _kept(config, files.config, lora), config.model)


def check_adapter_options(config: TrainOptions, *, new: bool, read: bool) -> None:
    """Refuse options of an adapter that have no effect.

    Raises:
      UserError: naming the flag.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(TrainOptions)}
    unused: Sequence[str] = () if new else ONLY_NEW if read else (*ONLY_NEW, "lora_dropout", "quantize_base")
    for name in unused:
        if (value := getattr(config, name)) != defaults[name]:
            shown = " ".join(value) if isinstance(value, tuple) else value
            why = "the adapter that is read has its own" if read else "there is no adapter; add --lora-rank"
            raise UserError(f"{flag(name)} {shown}: {why}")


def reference_of(
    start: Start, name: str | None, longest: int | None = None
) -> tuple[DecoderConfig, PolicyFiles | None]:
    """The reference's choices, and its files; None where it reads arrays of the policy's.

    ``--ref-model`` may name the policy's own base, which is not read twice. It may be of another dtype and form of
    file, and its choices may be written otherwise, if they compute the same
    (:func:`~dpojax.models.same.difference`).

    Args:
      start: the policy.
      name: ``--ref-model``; None is the policy before training.
      longest: tokens of the longest text.

    Raises:
      UserError: it computes something else than the policy, by its shape or by another choice.
    """
    if name is None:
        return start.reference, None
    if start.base is not None and same_model(name, start.base):
        return start.config.base, None
    files, shape = open_policy(name), start.config.merged
    differs = difference(shape, files.config, longest)
    if differs is not None:
        field, ours, theirs = differs
        raise UserError(
            f"--ref-model {name}: its {field} is {theirs}, and that of --model is {ours}; use one of its kind"
        )
    return shape, dataclasses.replace(files, config=shape, load=lambda mesh: _in_form(files, shape, mesh))


def _in_form(files: PolicyFiles, shape: DecoderConfig, mesh: Mesh | None) -> Model:
    """A model that computes what these choices say, with parameters as they have them."""
    model = files.load(mesh)
    params = dict(model.params)
    if shape.tied and not model.config.tied:
        if not bool((params["embed"] == params.pop("head")).all()):
            raise UserError(
                f"--ref-model {files.name}: its unembedding differs from its embedding, and --model has one for both "
                "(tie_word_embeddings); use one of its kind"
            )
    elif model.config.tied and not shape.tied:
        head = params["embed"]
        params["head"] = head if mesh is None else jax.device_put(head, param_shardings(mesh, shape)["head"])
    return dataclasses.replace(model, config=shape, params=params)
