"""Floating-point operations of a compiled program's products, loops counted as often as they run.

XLA's own ``cost_analysis`` counts a loop's body once. A multiply-add is two operations, as in published peaks.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import numpy as np

from dpojax.plan.hlo import Array, Computation, Instruction, Module, Runs, deep, executed

RECOMPUTED = "rematted_computation"
"""Part of JAX's names for what a backward pass computes again under ``jax.checkpoint``."""


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one device.

    Attributes:
      layers: of products of the layers.
      unembedding: of products with the vocabulary, by their source lines.
      kernels: of attention's kernels (:func:`kernel_flops`).
      recomputed: of all of these, what ``jax.checkpoint`` repeats.
    """

    layers: float
    unembedding: float
    kernels: float
    recomputed: float

    @property
    def total(self) -> float:
        return self.layers + self.unembedding + self.kernels


@dataclasses.dataclass(frozen=True)
class Visits:
    """What kernels work on. Attention's visit blocks of scores: of rows of a prompt and its completions, where a
    completion sees its prompt and itself. Without a prompt, all blocks of a kernel's grid count.

    Attributes:
      prompt, completion: padded tokens.
      windows: of the layers, each layer's own (None: a token sees all).
      experts: of a mixture, on all devices together; 0 without one.
    """

    prompt: int = 0
    completion: int = 0
    windows: tuple[int | None, ...] = (None,)
    experts: int = 0

    def blocks(self, length: int, block: int) -> float:
        """Blocks of a row of this many tokens in which some token sees some token, in the mean over the layers."""
        each = {w: _visited(length, block, self.prompt, self.completion, w) for w in set(self.windows)}
        return sum(each[w] for w in self.windows) / len(self.windows)


@functools.cache
def _visited(length: int, block: int, prompt: int, completion: int, window: int | None) -> int:
    starts = np.arange(0, length, block)
    first, last = starts, np.minimum(starts + block, length) - 1
    own = lambda q: np.where(q < prompt, 0, prompt + (q - prompt) // completion * completion)  # noqa: E731
    place = lambda q: np.where(q < prompt, q, prompt + (q - prompt) % completion)  # noqa: E731
    seen = 0
    for low, high in zip(first, last, strict=True):  # queries low .. high
        queries = np.arange(low, high + 1)
        for begin, end in zip(first, last, strict=True):
            keys = np.arange(begin, end + 1)
            sees = (keys[None] <= queries[:, None]) & ((keys[None] < prompt) | (keys[None] >= own(queries)[:, None]))
            if window is not None:
                sees &= place(queries)[:, None] - place(keys)[None] < window
            seen += bool(sees.any())
    return seen


def flops_of(module: Module, runs: Runs, visits: Visits | None = None) -> Flops:
    """FLOPs of a program, on one device."""
    layers = unembedding = kernels = recomputed = 0.0
    for computation, i, times in executed(module, runs):
        if i.target == "tpu_custom_call":
            flops = times * kernel_flops(i, visits)
            kernels += flops
            recomputed += flops if RECOMPUTED in i.op_name else 0.0
            continue
        inner = module.inside(i)
        for where, part in [(computation, i)] if inner is None else deep(module, inner):
            flops = times * product_flops(where, part)
            if not flops:
                continue
            lines = module.source(part)
            if lines and not any(line.startswith("dpojax/models/") for line in lines):
                unembedding += flops
            else:
                layers += flops
            recomputed += flops if RECOMPUTED in part.op_name else 0.0
    return Flops(layers, unembedding, kernels, recomputed)


def product_flops(computation: Computation, i: Instruction) -> float:
    """FLOPs of a ``dot`` or of a ``convolution``, as which a TPU's compiler has products; 0 for others."""
    if i.op not in ("dot", "convolution"):
        return 0.0
    operands = [o.arrays[0] for o in computation.operands(i) if o.arrays]
    if len(operands) < 2:
        return 0.0
    return _dot_flops(i, operands[0]) if i.op == "dot" else _convolution_flops(i, operands[0], operands[1])


def _dot_flops(i: Instruction, left: Array) -> float:
    contracted = i.text(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    inner = math.prod(left.shape[int(axis)] for axis in contracted.split(",") if axis)
    return 2.0 * i.arrays[0].size * inner


def _convolution_flops(i: Instruction, left: Array, right: Array) -> float:
    """Products that meet padding or holes are not counted: heads come as a window over one position."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    assert labels is not None, i.name
    inputs, kernel, output = labels.groups()
    groups = int(i.text(r"batch_group_count=(\d+)") or 1)
    features = right.shape[kernel.index("i")]
    positions = 1.0
    window = _window(i)
    spatial = sorted(c for c in output if c.isdigit())
    for number, axis in enumerate(spatial):
        size = {name: value[number] for name, value in window.items()}
        positions *= _valid(left.shape[inputs.index(axis)], i.arrays[0].shape[output.index(axis)], **size)
    batch = i.arrays[0].shape[output.index("b")] * i.arrays[0].shape[output.index("f")]
    return 2.0 * batch * features * positions / groups


def _window(i: Instruction) -> dict[str, list]:
    """The window's fields by spatial axis; where one is not printed it is the usual value."""
    text = i.text(r"window=\{([^}]*)\}") or ""
    fields = dict(part.split("=", 1) for part in text.split() if "=" in part)
    sizes = [int(n) for n in fields["size"].split("x")] if "size" in fields else []
    n = len(sizes)
    numbers = lambda name, usual: [int(x) for x in fields[name].split("x")] if name in fields else [usual] * n  # noqa: E731
    pads = [tuple(map(int, p.split("_"))) for p in fields["pad"].split("x")] if "pad" in fields else [(0, 0)] * n
    dilations = {"holes": numbers("lhs_dilate", 1), "kernel_holes": numbers("rhs_dilate", 1)}
    return {"size": sizes, "stride": numbers("stride", 1), "pad": pads, **dilations}


def _valid(
    length: int, outputs: int, *, size: int, stride: int, pad: tuple[int, int], holes: int, kernel_holes: int
) -> int:
    """Pairs of an output position and a window position that meet an input, along one axis."""
    if size == length == outputs == 1:
        return 1
    count = 0
    for at in range(outputs):
        for k in range(size):
            place = at * stride + k * kernel_holes - pad[0]
            count += 0 <= place < (length - 1) * holes + 1 and place % holes == 0
    return count


PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
"""Products of a block of Splash's kernels: scores and values; in the backward pass scores again, their gradient, and
that of queries, or those of keys and of values."""


def kernel_flops(i: Instruction, visits: Visits | None = None) -> float:
    """FLOPs of a kernel that is known, by its operands' shapes: Splash attention's, and those of a mixture's ragged
    products, XLA's or Megablox'; 0 for others."""
    listed = i.text(r"operand_layout_constraints=\{(.*?)\}(?:, \w+=|$)")
    if listed is None:
        return 0.0
    arrays = [Array(d, tuple(map(int, s.split(",")))) for d, s in re.findall(r"\b(\w+)\[([\d,]+)\]", listed)]
    if i.name.startswith(("ragged-dot", "gmm", "tgmm")):
        return _ragged_flops(i, arrays, visits)
    products = next((n for kind, n in PRODUCTS.items() if re.search(rf"splash_m[hq]a_{kind}", i.name)), 0)
    return _splash_flops(i, arrays, products, visits) if products else 0.0


def _splash_flops(i: Instruction, arrays: Sequence[Array], products: int, visits: Visits | None) -> float:
    """Products of a block times the blocks that are visited: those of ``visits``, or else the whole grid.

    How many blocks there are is the second axis of the mask's tables ``[1, blocks, blocks visited]``: of queries, or in
    the kernel of their gradients of keys.
    """
    grid = next((a.shape for a in arrays if a.dtype in ("s8", "s32") and len(a.shape) == 3), None)
    rows = [a.shape for a in arrays if a.dtype in ("bf16", "f32") and len(a.shape) >= 3]
    if grid is None or len(rows) < 2:
        return 0.0
    *batch, length, width = rows[0]
    block = (rows[1][-2] if "dkv" in i.name else length) // grid[1]
    whole = visits is None or not visits.prompt or not 0 <= length - _row(visits, length) < block
    blocks = math.prod(grid[1:]) if visits is None or whole else visits.blocks(length, block)
    return 2.0 * products * blocks * block * block * width * math.prod(batch)


def _ragged_flops(i: Instruction, arrays: Sequence[Array], visits: Visits | None) -> float:
    """Every row by one of the weights ``[groups, a, b]``; where a device has some of the experts, as many rows as they
    are of all."""
    floats = [a for a in (*arrays, *i.arrays) if a.dtype in ("bf16", "f32")]
    weights = next((a.shape for a in floats if len(a.shape) == 3), None)
    rows = next((a for a in floats if len(a.shape) == 2), None)
    if weights is None or rows is None:
        return 0.0
    groups, a, b = weights
    share = 1.0 if visits is None or not visits.experts else min(1.0, groups / visits.experts)
    return 2.0 * share * rows.size * (b if a in rows.shape else a)


def _row(visits: Visits, length: int) -> int:
    """The longest row of a prompt and whole completions that fits."""
    return length - (length - visits.prompt) % visits.completion if visits.completion else visits.prompt
