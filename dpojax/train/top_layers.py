"""--train-top-layers: the layers below the top N, and the embeddings, are frozen, so each row goes through them once.

The trained part is a decoder of N layers that reads hidden states. It is tied: its one embedding matrix is the model's
unembedding, which is frozen too.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dpojax.configs import ForwardOptions
from dpojax.data import Batches
from dpojax.errors import UserError
from dpojax.models import DecoderConfig, Model
from dpojax.models.params import flatten, nest
from dpojax.packing import PairBatch, model_input
from dpojax.progress import track
from dpojax.sharding import put_batch
from dpojax.train.scoring import apply_on, jit_forward, place_params
from dpojax.types import PyTree

FROZEN_BESIDE = ("embed", "positions", "head_bias")
"""What the trained part reads of the frozen parameters, beside hidden states."""


def of_top(path: str) -> bool:
    """Whether a step changes this parameter of the trained part: its unembedding, and learned positions, are frozen."""
    return path not in FROZEN_BESIDE


def check_top_layers(n: int | None, config: DecoderConfig) -> None:
    """Refuse a number of layers that the model does not have, and layers that are not alike.

    Raises:
      UserError: naming the flag.
    """
    if n is not None and not 1 <= n <= config.layers:
        raise UserError(f"--train-top-layers {n}: must be from 1 to the model's number of layers, {config.layers}")
    if n is not None and config.dense_layers:
        raise UserError(f"--train-top-layers {n}: some of the model's layers have experts, others none; leave it out")


def top_config(config: DecoderConfig, n: int) -> DecoderConfig:
    """The shape of a model's top n layers."""
    return dataclasses.replace(config, layers=n, tied=True, kind_of_layer=config.kind_of_layer[-n:])


def trunk_config(config: DecoderConfig, n: int) -> DecoderConfig:
    """The shape of a model without its top n layers."""
    L = config.layers - n
    return dataclasses.replace(config, layers=L, tied=True, head_bias=False, kind_of_layer=config.kind_of_layer[:L])


def separate(params: PyTree, n: int) -> tuple[PyTree, PyTree]:
    """The frozen parameters of a model, and the trained ones: its top n layers and final norm."""
    flat = flatten(params)
    L = flat["blocks/q"].shape[0]
    trained = {path: x for path, x in flat.items() if path.startswith("final_norm")}
    frozen = {path: x for path, x in flat.items() if path not in trained and not path.startswith("blocks/")}
    for path, x in flat.items():
        if path.startswith("blocks/"):
            trained[path] = x[L - n :]
            if n < L:  # Orbax saves no array without elements
                frozen[path] = x[: L - n]
    return nest(frozen), nest(trained)


def separate_shapes(shapes: PyTree, n: int) -> tuple[PyTree, PyTree]:
    """:func:`separate` of abstract parameters, placement included: layers are split over no mesh axis."""
    placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s.sharding)  # noqa: E731
    parts = jax.eval_shape(lambda params: separate(params, n), shapes)
    flat = flatten(shapes)
    return tuple(nest({path: placed(x, flat[path]) for path, x in flatten(part).items()}) for part in parts)


def join(frozen: PyTree, trained: PyTree) -> PyTree:
    """The whole model's parameters: the inverse of :func:`separate`."""
    below, top = flatten(frozen), flatten(trained)
    both = {path: jnp.concatenate([below[path], x]) for path, x in top.items() if path in below}
    return nest({**below, **top, **both})


def cut(model: Model, n: int) -> tuple[Model, Model]:
    """A model as two: a trunk, and the top n layers, which go on from its hidden states."""
    config, flat = model.config, flatten(model.params)
    trained = flatten(separate(model.params, n)[1])
    below = {path: x[: config.layers - n] if path.startswith("blocks/") else x for path, x in flat.items()}
    trunk = {path: x for path, x in below.items() if path not in ("head", "head_bias")}
    beside = {path: flat[path] for path in FROZEN_BESIDE if path in flat}
    top = {**trained, **beside, "embed": flat[config.unembedding]}
    return (
        Model(trunk_config(config, n), nest(trunk), model.hf_config),
        Model(top_config(config, n), nest(top), model.hf_config),
    )


def stored(
    directory: Path, tokens: np.ndarray, width: int, dtype: np.dtype, examples: Iterable[tuple[int, np.ndarray]]
) -> Callable[[int], np.ndarray]:
    """Examples' hidden states as a function of the example's index, from a file in this directory.

    The file has no name, so it goes when the process ends, in whatever way. The system keeps in memory what fits.

    Args:
      directory: where the file lies.
      tokens: of every example.
      width: D.
      dtype: of the hidden states.
      examples: index and hidden states ``[tokens, D]`` of the examples that will be asked for.

    Raises:
      UserError: the disk is full.
    """
    ends = np.concatenate([[0], np.cumsum(tokens)]).astype(int)
    size = int(ends[-1]) * width * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.truncate(size)  # examples that are not stored are holes
            # Not written through the map: on a full disk, that would kill the process.
            for i, states in examples:
                file.seek(int(ends[i]) * width * dtype.itemsize)
                file.write(np.ascontiguousarray(states, dtype).tobytes())
            file.flush()
            kept = np.memmap(file, dtype, mode="r", shape=(int(ends[-1]), width))
    except OSError as error:
        full = f"the frozen layers' hidden states ({size / 1e9:.2g} GB) cannot be kept ({error.strerror})"
        raise UserError(f"{directory}: {full}; free some space, or train without --train-top-layers") from None
    return lambda i: kept[ends[i] : ends[i + 1]]


class Trunk:
    """The frozen layers on the devices, which compute the hidden states that the trained layers read.

    Args:
      model: the trunk (:func:`cut`).
      mesh: where it runs.
      compute: how it computes.
      micro_batches: pieces that a batch is computed in.
      directory: where hidden states are stored.
    """

    def __init__(self, model: Model, mesh: Mesh, compute: ForwardOptions, directory: Path, micro_batches: int = 1):
        self.mesh, self.width = mesh, model.config.width
        self.directory, self.dtype = directory, jax.numpy.dtype(compute.dtype)
        self.params = place_params(model.params, mesh, model.config)
        self.step = make_trunk_step(model.config, mesh, compute, micro_batches)

    def below(self, batches: Batches, label: str, limit: int | None = None) -> Batches:
        """The batches with the hidden states of the examples in the first ``limit`` of them (default: all)."""
        examples = self._compute(batches, label, limit)
        return batches.with_hidden(stored(self.directory, batches.tokens, self.width, self.dtype, examples))

    def _compute(self, batches: Batches, label: str, limit: int | None) -> Iterator[tuple[int, np.ndarray]]:
        seen: set[int] = set()
        for index in track(range(batches.first_pass(limit)), label):
            item = batches.collate(batches.indices[index], always_packed=True)
            states = np.asarray(self.step(self.params, put_batch(item.batch, self.mesh)))
            for i, sequence, span in batches.packed_spans(item.index):
                if i not in seen:  # a batch may run over the epoch's end
                    seen.add(i)
                    yield i, states[sequence, span]


def make_trunk_step(
    shape: DecoderConfig, mesh: Mesh, compute: ForwardOptions, micro_batches: int = 1
) -> Callable[[PyTree, PairBatch], Array]:
    """A jitted ``trunk_step(params, batch) -> [R, T, D]``: the hidden states after the trunk's last layer."""
    apply_fn = apply_on(shape, mesh, compute, normed=False)

    def forward(params: PyTree, batch: PairBatch) -> Float[Array, "R T D"]:
        return apply_fn(params, model_input(batch))[0]

    return jit_forward(forward, mesh, shape, micro_batches)
