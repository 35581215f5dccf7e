"""The points of the joint search: how many stages on which mesh, how many microbatches, in which order; and what no plan of a point can beat."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from autopar.core.cluster import Cluster
from autopar.core.mesh import Mesh, MeshAxis
from autopar.core.unroll import Run
from autopar.cost_models.kernels import backward_seconds, forward_seconds
from autopar.joint.bounds import Parts
from autopar.joint.fold import places, sides
from autopar.planner.blocks import Order
from autopar.planner.lengths import Task
from autopar.planner.pins import Pins
from autopar.planner.states import PRICED_DTYPES, work_of

SCHEDULES = ("1f1b", "interleaved")

VIRTUAL = (1, 2, 4, 8)
"""Stages of a rank: one under 1F1B, several under the interleaved schedule."""

MAX_AXIS_SAMPLES = 16
"""Samples of a microbatch for each rank of the outer axis: more than so many on one rank are two microbatches."""


ALONE = Mesh((MeshAxis("a", 1),))


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

    What a kernel does beside its launch takes no more than c times what a c-th of it takes, however it is cut (`kernels.py`: rates, waves and passes over bytes
    are all so). So no strategy's operator is faster than the launch and an equal share of the whole.
    """

    def __init__(self, cluster: Cluster, run: Run, task: Callable[[int], Task]) -> None:
        """`task`: a microbatch of so many samples."""
        self.device, self.run, self.task = cluster.device, run, task
        self._ops: dict[int, Mapping[tuple[int, frozenset[int]], tuple[float, float]]] = {}

    def seconds(self, samples: int, outer: int, inner: int) -> Parts:
        """Of one block, and of what is before and behind the run, on a mesh of `outer` x `inner` devices. An axis that divides no factor of an operator
        does not cut it."""
        if samples not in self._ops:
            self._ops[samples] = self._of_ops(self.task(samples))
        found = [0.0, 0.0, 0.0]
        for (where, sizes), (launch_s, busy_s) in self._ops[samples].items():
            devices = math.prod(axis for axis in (outer, inner) if any(size % axis == 0 for size in sizes))
            found[where] += launch_s + busy_s / devices
        return Parts(*found)

    def _of_ops(self, task: Task) -> Mapping[tuple[int, frozenset[int]], tuple[float, float]]:
        """Seconds of launches and of all else, uncut, of the operators in the middle block (0), before and behind the run, by the sizes of their factors."""
        graph, found = task.graph, dict[tuple[int, frozenset[int]], tuple[float, float]]()
        for op, rule, place, where in zip(graph.ops, task.rules, places(self.run, graph), sides(self.run, graph), strict=True):
            if rule.cost == "view" or graph.searched.isdisjoint(op.operands) or place in (0, 2):
                continue
            metas = [graph.values[v].meta for v in (*op.operands, *op.results)]
            dtype = graph.values[op.results[0]].meta.dtype if op.results else "float32"
            work = work_of(rule, (), ALONE, rule.flops, sum(m.num_bytes for m in metas), dtype if dtype in PRICED_DTYPES else "float32")
            nothing = work._replace(flops=0.0, num_bytes=0.0, functions=0.0, shape=work.shape and (0, 0, 0, 0))
            live = not graph.differentiated.isdisjoint(op.results)
            once_s, whole_s = (forward_seconds(self.device, w) + (backward_seconds(self.device, w) if live else 0.0) for w in (nothing, work))
            key = where, frozenset(size for f, size in enumerate(rule.sizes) if f not in rule.whole)
            launch_s, busy_s = found.get(key, (0.0, 0.0))
            found[key] = launch_s + once_s, busy_s + whole_s - once_s
        return found
