"""A step's bytes, operations and time by analysis alone: for GPUs, and to choose what is worth compiling for a TPU.

Nothing here is measured or compiled. What lies on a device between steps is exact; the rest are these counts, at the
published peaks:

- kept activations, of every token and layer: what ``--remat`` names (:data:`~dpojax.models.decoder.REMAT`), or about
  twice the outputs of products (none), and scores where attention is XLA's own;
- one layer's weights gathered and its gradients, its scores three times where they are whole, and one chunk of logits
  three times;
- products: the model's, those again whose results ``--remat`` does not keep, and the unembedding's again where its
  logits come in chunks;
- over the links: each layer's weights gathered over fsdp in the forward and in the backward pass and their gradients
  reduced, for every micro-batch; gradients reduced over data once; over tensor four reductions of the residual stream a
  layer, and two more where a layer is computed again. Collectives over tensor are waited for, the others go on beside
  the products.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp

from dpojax.models.config import DecoderConfig
from dpojax.models.params import param_specs
from dpojax.plan.build import Built, adapter_size, state_bytes
from dpojax.plan.collectives import Layout, seconds_of
from dpojax.plan.workload import ModelFlops, forward_flops, model_flops


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A step of one device by analysis.

    Attributes:
      memory: bytes by what they are for, those that lie there between steps among them.
      flops: of the step and of a live reference.
      recomputed: part of them that repeats the forward pass.
      memory_bytes: over the device's memory.
      links: seconds of collectives, by what they are for and between which mesh axes.
      waited: seconds of those that the products wait for.
    """

    memory: Mapping[str, float]
    flops: float
    recomputed: float
    memory_bytes: float
    links: Mapping[tuple[str, str], float]
    waited: float

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Of a step at these rates: products or memory, whichever takes longer, and the links that are not hidden."""
        busy = max(self.flops / flops, self.memory_bytes / bandwidth)
        beside = sum(self.links.values()) - self.waited
        return busy + self.waited + max(0.0, beside - busy)


def flops_of_model(built: Built) -> ModelFlops:
    """The model's FLOPs of a step of the whole batch."""
    options = {"adapter": adapter_size(built), "top_layers": built.config.train_top_layers, "live": built.live}
    return model_flops(built.start.config.merged, built.work, **options)  # type: ignore[arg-type]


def estimate(built: Built) -> Estimate:
    """A step by the analysis at the top of this file."""
    mesh, work, config = built.program.mesh, built.work, built.config
    shape = built.program.layout.config.merged
    micro, narrow = config.gradient_accumulation_steps, jnp.dtype(config.dtype).itemsize
    tensor = mesh.shape.get("tensor", 1)
    tokens, L = work.width, shape.layers  # of a device and a micro-batch
    passes = 3 if config.remat in ("block", "attention", "qkv") else 2  # in which layers' weights are read
    model = flops_of_model(built)
    layers, scores, head = forward_flops(built.start.config.merged, work)
    chunked = work.targets > config.logprob_chunk_tokens
    recomputed = computed_again(shape, config.remat, layers, scores) + (head if chunked else 0.0)
    layer = narrow * layer_parameters(shape) / tensor
    state = dict(state_bytes(built))
    logits = 4.0 * min(config.logprob_chunk_tokens, work.targets) * shape.vocab_size / tensor
    activations = tokens * L * kept(built, shape, narrow, tensor)
    work_of_layer = 2 * tokens * narrow * (4 * shape.width + inner(shape) / tensor)
    work_of_layer += 3 * tokens * score_bytes(built, shape, narrow, tensor)
    memory = {
        "parameters": state["parameters"],
        "optimizer": state["optimizer"],
        "gradients": state["gradients"],
        "reference": state["reference"],
        "activations": activations + work_of_layer,
        "gathered weights": 2 * layer,
        "logits": 3 * logits,
    }
    weights = L * layer + narrow * shape.vocab_size * shape.width / tensor
    moved = micro * passes * 2 * weights + 3 * (state["parameters"] + state["optimizer"]) + 2 * state["gradients"]
    moved += micro * passes * tokens * L * narrow * (8 * shape.width + 3 * inner(shape) / tensor)
    links = link_seconds(built, weights, tokens * shape.width * narrow, passes)
    waited = sum(seconds for (_, axis), seconds in links.items() if axis == "tensor")
    devices = mesh.size
    return Estimate(memory, (model.total + recomputed) / devices, recomputed / devices, moved, links, waited)


def layer_parameters(config: DecoderConfig) -> float:
    """Parameters of a layer, in the mean, as they are gathered."""
    sizes = (math.prod(s.shape) for path, s in param_specs(config).items() if path.startswith("blocks/"))
    return sum(sizes) / max(config.layers, 1)


def inner(config: DecoderConfig) -> float:
    """Numbers of a token inside of a layer, that tensor parallelism splits."""
    a = config.attention
    mlp = config.experts.per_token * config.experts.width if config.experts else config.mlp.width
    return a.head_dim * (2 * a.heads + 2 * a.kv_heads) + mlp * (2 if config.mlp.gated else 1)


def kept(built: Built, config: DecoderConfig, narrow: int, tensor: int) -> float:
    """Bytes that the backward pass keeps of a token and a layer."""
    a, residual = config.attention, narrow * config.width / tensor  # split by length, where tensor splits a layer
    heads, kv = a.head_dim * a.heads, a.head_dim * a.kv_heads
    within = {
        "block": 0.0,
        "attention": heads,
        "qkv": 2 * heads + 2 * kv,
        "dots": inner(config) - heads + config.width,
        "mlp": inner(config) + config.width,
        "none": 2 * inner(config) + 6 * config.width,
    }[built.config.remat]
    scores = score_bytes(built, config, narrow, tensor) if built.config.remat == "none" else 0.0
    return residual + narrow * within / tensor + scores


def computed_again(config: DecoderConfig, remat: str, layers: float, scores: float) -> float:
    """FLOPs of what the backward pass computes again, of those of the layers' weights and of attention's scores."""
    a = config.attention
    projections = a.head_dim * (a.heads + 2 * a.kv_heads) / (inner(config) + config.width)
    return {
        "block": layers + scores,
        "attention": layers,
        "qkv": layers * (1 - projections),
        "dots": scores,
    }.get(remat, 0.0)


def score_bytes(built: Built, config: DecoderConfig, narrow: int, tensor: int) -> float:
    """Bytes of a token's scores in a layer, where attention is XLA's own; a kernel keeps none."""
    platform = built.program.mesh.devices.flat[0].platform
    whole = built.config.attention == "xla" or platform == "cpu" or (platform == "gpu" and narrow == 4)
    row = built.work.prompt + built.work.completion
    return 4.0 * config.attention.heads / tensor * row if whole else 0.0


def link_seconds(built: Built, weights: float, residual: float, passes: int) -> dict[tuple[str, str], float]:
    """Seconds of a step's collectives, by kind and mesh axis.

    Args:
      built: the run.
      weights: bytes of all layers' weights in the compute dtype, of one of the devices that split them by ``tensor``.
      residual: bytes of the residual stream of a micro-batch on a device.
      passes: in which weights are read.
    """
    layout, micro = built.layout, built.config.gradient_accumulation_steps
    sizes = dict(zip(layout.axes, layout.sizes, strict=True))
    L = built.program.layout.config.layers
    trained = built.program.layout.abstract().params
    share = 1.0 if built.start.config.lora is None and built.config.train_top_layers is None else 0.0
    out: dict[tuple[str, str], float] = {}
    if sizes.get("fsdp", 1) > 1:
        out["all-gather", "fsdp"] = 2 * micro * axis_seconds("all-gather", weights, "fsdp", layout, built)
        reduced = 2 * share * weights
        out["reduce-scatter", "fsdp"] = micro * axis_seconds("reduce-scatter", reduced, "fsdp", layout, built)
    if sizes.get("data", 1) > 1 and trained:
        out["all-reduce", "data"] = axis_seconds("all-reduce", state_bytes(built)["gradients"], "data", layout, built)
    if sizes.get("tensor", 1) > 1:
        each = axis_seconds("all-reduce", residual, "tensor", layout, built)
        out["all-reduce", "tensor"] = micro * L * (2 * passes) * each
    return out


def axis_seconds(kind: str, F: float, axis: str, layout: Layout, built: Built) -> float:
    """Seconds of a collective of F bytes between the devices along a mesh axis: by the model of rings on a TPU; on GPUs
    over the links of a node, or, where the axis leaves it, the node's network shared by its GPUs' parts."""
    at = layout.axes.index(axis)
    stride = math.prod(layout.sizes[at + 1 :])
    group = [k * stride for k in range(layout.sizes[at])]
    chip, n = built.topology.chip, len(group)
    if not chip.gpu:
        return seconds_of(kind, F, group, layout)
    inside = group[-1] < built.topology.shape[1]
    rate = chip.link if inside else chip.network * min(built.topology.shape[1], _beside(group, built))
    return F * (n - 1) / n / rate * (2 if kind == "all-reduce" else 1)


def _beside(group: list[int], built: Built) -> int:
    """Devices of a group within one node, whose network cards work together."""
    return sum(device < built.topology.shape[1] for device in group)
