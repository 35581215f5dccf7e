"""What a joint search is given, and the tables of its points."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property

from autopar.core.cluster import Cluster
from autopar.core.graph import OpGraph
from autopar.core.unroll import Run
from autopar.joint.fold import border_bytes
from autopar.joint.known import Known, without_memory
from autopar.joint.space import Point
from autopar.joint.tables import PointTables
from autopar.planner.keeping import Keeping
from autopar.planner.lengths import Task
from autopar.planner.pins import Pins
from autopar.planner.search import Options
from autopar.planner.states import Pricing

Graphs = Callable[[int], OpGraph]
"""The short graph of so many samples."""


@dataclass
class Given:
    """`graphs` of a model with one run of blocks, `batch` samples a step, on a cluster; what other searches of it found out is `known`."""

    graphs: Graphs
    run: Run
    batch: int
    cluster: Cluster
    options: Options
    pins: Pins = field(default_factory=Pins)
    known: Known = field(default_factory=Known)

    @property
    def limit_bytes(self) -> float:
        return self.cluster.device.memory_bytes * self.options.memory_share

    @property
    def about(self) -> Hashable:
        """What tables depend on beside point and cluster; pinned degrees and orders only say which points there are."""
        pins = self.pins
        return self.options.precision, self.options.offload, pins.zero, pins.recompute, bool(pins.mesh_axes), self.run

    def task(self, samples: int) -> Task:
        """A microbatch of the short graph."""
        return self.known.kept(("task", samples), lambda: Task.of(self.graphs(samples), self.options))

    def border_bytes(self, samples: int) -> int:
        """What one of its blocks makes for the next."""
        if samples not in self._borders:
            self._borders[samples] = border_bytes(self.task(samples).graph, self.run)
        return self._borders[samples]

    @cached_property
    def _borders(self) -> dict[int, int]:
        return {}

    def pricing(self, point: Point) -> Pricing:
        """Microbatches of all sizes share the prices of a mesh: parameters move alike."""
        cluster = without_memory(self.cluster)
        return self.known.kept((cluster, point.num_ranks, point.mesh), lambda: Pricing(cluster, point.mesh, (point.num_ranks, 0)))

    def tables(self, point: Point) -> PointTables:
        cluster, options = without_memory(self.cluster), self.options
        task, pricing = self.task(point.samples), self.pricing(point)
        given = Keeping(micro_batches=point.num_microbatches, precision=options.precision, offload=options.offload)
        keeping = given.everything().narrowed(self.pins)
        return self.known.kept((self.about, cluster, point), lambda: PointTables(point, self.run, task, pricing, keeping, self.pins))
