"""Accelerators by name, with their published peaks, and topologies of them."""

import dataclasses
import math
import re

from dpojax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator as JAX sees it, a device.

    Sources: for TPUs, peaks are the Google Cloud documentation's (cloud.google.com/tpu/docs/v5e and the pages of the
    other versions), and a link's bandwidth is that of jax-ml.github.io/scaling-book (TPUs); for GPUs, NVIDIA's data
    sheets, dense bfloat16.

    Attributes:
      flops: peak of bfloat16 products, FLOP/s.
      memory: bytes that a program can use; for TPUs the limit that their compiler names.
      bandwidth: of the memory, B/s.
      link: of one link to a neighbour, one way, B/s; of a GPU, of all its links within the node.
      cycle_flops: FLOPs of a cycle at the peak, by which the compiler's cycles become seconds; 0 where none is known.
      dimensions: of the torus; 0 for GPUs.
      ring: length from which an axis of the torus closes to a ring; multiples of it do too.
      per_chip: devices of one chip that is rented.
      network: of a GPU to other nodes, one way, B/s.
      per_node: GPUs of a node.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    cycle_flops: int = 0
    dimensions: int = 0
    ring: int = 0
    per_chip: int = 1
    network: float = 0.0
    per_node: int = 0

    @property
    def clock(self) -> float:
        """Cycles a second: that at which products of the peak's rate take the peak's time."""
        return self.flops / self.cycle_flops

    @property
    def gpu(self) -> bool:
        return self.dimensions == 0


TPUS = {
    "v4": Chip(
        flops=137.5e12, memory=15.25 * GIB, bandwidth=0.6e12, link=4.5e10, cycle_flops=131_072,
        dimensions=3, ring=4, per_chip=2,
    ),
    "v5e": Chip(
        flops=197e12, memory=15.75 * GIB, bandwidth=0.819e12, link=4.5e10, cycle_flops=131_072, dimensions=2, ring=16
    ),
    "v5p": Chip(
        flops=459e12, memory=95.74 * GIB, bandwidth=2.765e12, link=9e10, cycle_flops=262_144, dimensions=3, ring=4
    ),
    "v6e": Chip(
        flops=918e12, memory=31.25 * GIB, bandwidth=1.638e12, link=9e10, cycle_flops=524_288, dimensions=2, ring=16
    ),
    "tpu7x": Chip(
        flops=1153.5e12, memory=94.75 * GIB, bandwidth=3.69e12, link=9e10, cycle_flops=524_288,
        dimensions=3, ring=4, per_chip=2,
    ),
}  # fmt: skip
"""A v4's and a TPU7x's chip are two devices, each with half of its figures; ``cycle_flops`` are their matrix units'."""

GPUS = {
    "a100": Chip(flops=312e12, memory=80e9, bandwidth=2.039e12, link=3e11, network=2.5e10, per_node=8),
    "h100": Chip(flops=989e12, memory=80e9, bandwidth=3.35e12, link=4.5e11, network=5e10, per_node=8),
    "h200": Chip(flops=989e12, memory=141e9, bandwidth=4.8e12, link=4.5e11, network=5e10, per_node=8),
    "b200": Chip(flops=2250e12, memory=180e9, bandwidth=8e12, link=9e11, network=5e10, per_node=8),
}

EXAMPLES = "v5e:16x16, v5p:4x4x4, v6e:8x8, v4:2x2x2, tpu7x:2x2x1 (TPUs), or h100:8x8 (GPUs, nodes x GPUs of a node)"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how they are connected, by name, as in ``v5e:16x16``.

    Attributes:
      name: what the user wrote.
      chip: one device.
      shape: chips along each axis of a TPU's torus; nodes, and GPUs of a node.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many are rented."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """How many JAX sees."""
        return self.chips * self.chip.per_chip

    def closes(self, axis: int) -> bool:
        """Whether an axis of the torus is a ring: links lead from its last chip to its first."""
        return self.shape[axis] >= self.chip.ring and self.shape[axis] % self.chip.ring == 0


def topology_of(name: str) -> Topology:
    """The topology of a name.

    >>> topology_of("v5p:4x4x4").devices, topology_of("tpu7x:2x2x1").devices, topology_of("h100:2x8").chip.gpu
    (64, 8, True)

    Raises:
      UserError: no such chip, or not a shape of it.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name.strip().lower())
    chips = TPUS | GPUS
    if match is None or match[1] not in chips:
        raise UserError(f"--topology {name}: is not known; use a chip and its shape, as in {EXAMPLES}")
    chip, shape = chips[match[1]], tuple(map(int, match[2].split("x")))
    axes = 2 if chip.gpu else chip.dimensions
    if len(shape) != axes or min(shape) < 1:
        what = "nodes x GPUs of a node" if chip.gpu else f"{axes} axes"
        raise UserError(f"--topology {name}: {match[1]} has a shape of {what}, as in {EXAMPLES}")
    return Topology(name, chip, shape)
