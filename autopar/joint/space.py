"""The points of the joint search: how many stages on which mesh, how many microbatches, in which order; and what no plan of a point can beat."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from autopar.core.cluster import Cluster
from autopar.core.graph import DTYPE_BYTES, OpGraph
from autopar.core.mesh import Mesh, MeshAxis
from autopar.core.rule import OpRule
from autopar.core.unroll import Run
from autopar.cost_models.kernels import Work, measured_seconds
from autopar.joint.bounds import Parts
from autopar.joint.fold import places, sides
from autopar.planner.blocks import Order
from autopar.planner.pins import Pins

SCHEDULES = ("1f1b", "interleaved")

VIRTUAL = (1, 2, 4, 8)
"""Stages of a rank: one under 1F1B, several under the interleaved schedule."""

MAX_AXIS_SAMPLES = 16
"""Samples of a microbatch for each rank of the outer axis: more than so many on one rank are two microbatches."""


@dataclass(frozen=True, slots=True)
class Point:
    """`num_ranks` in a pipeline, each a mesh of `outer` x `inner` devices; `num_microbatches` of `samples` each. `names`: of the mesh's axes."""

    num_ranks: int
    outer: int
    inner: int
    num_microbatches: int
    samples: int
    names: tuple[str, str] = ("a", "b")

    @property
    def mesh(self) -> Mesh:
        axes = tuple(MeshAxis(name, size) for name, size in zip(self.names, (self.outer, self.inner)) if size > 1)
        return Mesh(axes or (MeshAxis(self.names[0], 1),))

    @property
    def num_devices(self) -> int:
        return self.num_ranks * self.outer * self.inner

    def __str__(self) -> str:
        return f"pp{self.num_ranks} x {self.outer} x {self.inner}, {self.num_microbatches} microbatches of {self.samples}"


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def points(cluster: Cluster, batch: int, depth: int, pins: Pins, num_microbatches: int | None = None) -> Iterator[Point]:
    """All lengths of pipelines, meshes whose inner axis stays inside a node, and sizes of microbatches. Pinned degrees name the axes: dp, then tp."""
    degrees = dict(pins.mesh_axes)
    names = ("dp", "tp") if degrees else ("a", "b")
    for ranks in divisors(cluster.num_devices):
        if ranks > depth or ranks != (pins.pp or ranks):
            continue
        of_stage = cluster.num_devices // ranks
        for inner in divisors(of_stage):
            outer = of_stage // inner
            if inner > cluster.devices_per_node or inner != degrees.get("tp", inner) or outer != degrees.get("dp", outer):
                continue
            for samples in divisors(batch):
                number, few = batch // samples, samples * inner < outer or samples > MAX_AXIS_SAMPLES * outer
                pinned = number if pins.micro_batch is None else batch // (pins.micro_batch * outer)
                if not few and number == pinned == (num_microbatches or number):
                    yield Point(ranks, outer, inner, number, samples, names)


def orders(point: Point, depth: int, pins: Pins) -> Iterator[Order]:
    """How a point may run, with the least memory first."""
    for virtual in VIRTUAL if pins.virtual is None else (pins.virtual,):
        schedule = SCHEDULES[virtual > 1]
        suits = virtual == 1 or (point.num_ranks > 1 and point.num_microbatches % point.num_ranks == 0)
        if suits and point.num_ranks * virtual <= depth and pins.schedule in (None, schedule):
            yield Order(schedule, point.num_ranks, point.num_microbatches, virtual)


class Ideal:
    """The seconds of a microbatch when every operator is cut evenly over all devices of all stages and nothing is communicated.

    A roofline at the device's best rates: no strategy's operator is faster, whatever its shape.
    """

    def __init__(self, cluster: Cluster, run: Run) -> None:
        self.cluster, self.run = cluster, run

    def seconds(self, graph: OpGraph, rules: Sequence[OpRule], outer: int, inner: int) -> Parts:
        """Of one block, and of what is before and behind the run, on a mesh of `outer` x `inner` devices. An axis that divides no factor of an operator
        does not cut it."""
        found = [0.0, 0.0, 0.0]
        for where, work, backward, sizes in self._work(graph, tuple(rules)):
            devices = math.prod(axis for axis in (outer, inner) if any(size % axis == 0 for size in sizes))
            found[where] += self._op(work._replace(flops=work.flops / devices, num_bytes=work.num_bytes / devices), backward)
        return Parts(*found)

    def _op(self, work: Work, backward: int) -> float:
        """Of the forward, and of a backward that is so many times its work unless another number was measured."""
        device = self.cluster.device
        rate = device.peak(work.dtype) * max(device.efficiency(work.dtype), device.attention_efficiency or 0.0) * device.sustained_rate
        once = device.kernel_launch_s + max(work.flops / rate if work.kernel == "product" else 0.0, work.num_bytes / (device.memory_bytes_per_s * device.memory_efficiency))
        own = device.kernel(work.kind)
        if own is None:
            return (1 + backward) * once
        busy = measured_seconds(device, own, work)
        return own.call_s + busy + (backward * device.kernel_launch_s + min(backward, 1) * own.backward * busy if own.backward else backward * once)

    @lru_cache(maxsize=64)
    def _work(self, graph: OpGraph, rules: tuple[OpRule, ...]) -> tuple[tuple[int, Work, int, frozenset[int]], ...]:
        """(where, work, how many times that its backward does, sizes of its factors) of every operator; where: in the middle block (0), before, behind the run."""
        found = []
        live, searched = graph.differentiated, graph.searched
        for op, rule, place, where in zip(graph.ops, rules, places(self.run, graph), sides(self.run, graph), strict=True):
            if rule.cost == "view" or searched.isdisjoint(op.operands) or place in (0, 2):
                continue
            metas = [graph.values[v].meta for v in (*op.operands, *op.results)]
            dtype = graph.values[op.results[0]].meta.dtype if op.results else "float32"
            masked = rule.masked if rule.kernel else 1.0
            moved = float(sum(m.numel * DTYPE_BYTES[m.dtype] for m in metas))
            kernel = "product" if rule.cost == "contract" else "pointwise"
            work = Work(kernel, rule.flops * masked, moved, dtype if dtype in ("float16", "bfloat16") else "float32", kind=rule.kind or rule.kernel or kernel)
            backward = 0 if live.isdisjoint(op.results) else 2 if rule.cost == "contract" and not rule.kernel else 1
            found.append((where, work, backward, frozenset(size for f, size in enumerate(rule.sizes) if f not in rule.whole)))
        return tuple(found)
