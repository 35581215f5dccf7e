"""Which pipeline: how many ranks, on which mesh each, how many microbatches, which schedule, and where its axis lies.

    1. shapes      (ranks, mesh of a stage) for every length that divides the devices; each is sharded once, as if stages were free
    2. orders      microbatches x schedule x stages per rank, each cut by the formula and simulated (`blocks.py`); where the number of
                   microbatches is free, from the shape's own solution as an estimate, and again from the graphs of the best few numbers
    3. placement   the pipeline's axis outermost, and for the best shapes in every other place among the axes
    4. the best    cut as the simulated lists ask for, built, and walked for its memory; what does not fit is searched within its limit

How many are looked at is bounded by the constants below. Plans are as good as the best of these: what is left out has no bound but the last:
no rank of a pipeline does less than its share of the least compute of the whole graph.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from autopar.core.cluster import Cluster
from autopar.core.graph import OpGraph
from autopar.core.mesh import Mesh
from autopar.core.rule import OpRule
from autopar.cost_models.collectives import group_spans
from autopar.errors import InfeasibleError, UsageError
from autopar.planner.advice import Retrace
from autopar.planner.blocks import Blocks, Order
from autopar.planner.cuts import Cut, fits, formula_cut
from autopar.planner.meshes import candidate_meshes, forced_mesh
from autopar.planner.pins import Pins
from autopar.planner.pipelines import StagedCandidate, StageSearch
from autopar.planner.roles import batch_factors
from autopar.planner.rulebook import rules_of
from autopar.planner.search import Candidate, DoesNotFit, MeshSearch, Options

MAX_SHAPES = 24
MAX_PER_RANK = 8
"""Microbatches for each rank of a pipeline: with more the bubble is small, and every one has its launches."""

MAX_GRAPHS = 2
"""Numbers of microbatches whose graphs are made."""

MAX_SHARDED = 6
"""Shapes that are looked at with each of these."""

MAX_PLACED = 2
"""Shapes whose axis is tried in every place."""

MAX_BUILT = 3
"""Pipelines whose best cut is sought, and whose memory is walked; as many are searched within the limit where they do not fit."""

ROUNDING = 1e-9

CLOSE = 1.05
"""A pipeline this much slower by the formula's cut may still be the fastest by the best."""


@dataclass(frozen=True)
class Task:
    """One microbatch, with its rules."""

    graph: OpGraph
    rules: Sequence[OpRule]
    batch: Sequence[frozenset[int]]
    options: Options

    @classmethod
    def of(cls, graph: OpGraph, options: Options) -> "Task":
        rules = rules_of(graph)
        return cls(graph, rules, batch_factors(graph, rules), options)


@dataclass(frozen=True)
class Row:
    """A pipeline by the formula's cut: `base` is its sharding."""

    search: StageSearch
    base: Candidate
    cut: Cut

    @property
    def step_s(self) -> float:
        return self.cut.timeline.step_time_s

    @property
    def fits(self) -> bool:
        return fits(self.search.along, self.cut.timeline, self.search.limit_bytes)


@dataclass
class Pipelines:
    """All pipelines that the pins allow. `below_s`: only faster ones are wanted."""

    task: Task
    cluster: Cluster
    pins: Pins
    retrace: Retrace
    below_s: float
    progress: Callable[[str], None]
    failures: list[tuple[MeshSearch, DoesNotFit]] = field(default_factory=list)
    num_tried: int = 0
    bound_s: float = math.inf
    _tasks: dict[int, Task | None] = field(default_factory=dict)

    def best(self) -> StagedCandidate | None:
        """The fastest that fits; None where there is none, with the reasons in `failures`."""
        shapes = self.shapes()
        rows = [row for ranks, mesh in shapes for row in self._rows(self.task, ranks, mesh, self._numbers(ranks))]
        if self.task.options.free_micro_batches:
            rows = self._retraced(rows)
        return self._built(self._placed(self._near(rows)))

    # --- shapes ------------------------------------------------------------------------------------------------------

    def shapes(self) -> list[tuple[int, Mesh]]:
        """(ranks of the pipeline, mesh of a stage)."""
        n, blocks, options = self.cluster.num_devices, self._num_blocks, self.task.options
        lengths = [self.pins.pp] if self.pins.pp else [d for d in range(2, min(n, blocks) + 1) if n % d == 0]
        stages = max(lengths, default=2) * (self.pins.virtual or (2 if self.pins.schedule == "interleaved" else 1))
        if self.pins.wants_pipeline and (stages > blocks or not lengths):
            raise UsageError(
                f"{self.task.graph.name} has {blocks} blocks with parameters to cut between, too few for a pipeline of {stages} stages on {self.cluster.name}; "
                "pin a smaller pp or fewer virtual stages"
            )
        found: list[tuple[int, Mesh]] = []
        for ranks in lengths:
            forced = options.mesh or forced_mesh(replace(self.pins, pp=ranks), self.cluster)
            if forced is not None and forced.num_ranks * ranks > n:
                raise UsageError(f"pp={ranks} times mesh {forced} makes {forced.num_ranks * ranks} devices, {self.cluster.name} has {n}")
            meshes = (forced,) if forced else candidate_meshes(n // ranks)
            found += [(ranks, mesh) for mesh in meshes if forced or len(mesh.axes) == 1 or mesh.sizes[-1] <= self.cluster.devices_per_node]
        return found[:MAX_SHAPES]

    @property
    def _num_blocks(self) -> int:
        graph, params = self.task.graph, set(self.task.graph.params)
        return sum(any(v in params for i in segment.ops for v in graph.ops[i].operands) for segment in graph.segments)

    def _numbers(self, ranks: int) -> list[int]:
        """Numbers of microbatches to look at."""
        given = self.task.options.micro_batches
        if not self.task.options.free_micro_batches:
            return [given]
        return [1, *(m for m in range(max(2, ranks // 2), min(self.batch, MAX_PER_RANK * ranks) + 1) if self.batch % m == 0)]

    @property
    def batch(self) -> int:
        """Samples that microbatches of the task's may divide."""
        return math.gcd(*(v.meta.shape[0] for v in self.task.graph.values if v.role == "input" and v.meta.shape))

    def _orders(self, ranks: int, micro_batches: int) -> Iterator[Order]:
        for name in [self.pins.schedule] if self.pins.schedule else ["1f1b", "zero-bubble", "interleaved", "gpipe"]:
            for virtual in [self.pins.virtual] if self.pins.virtual else [2, 4] if name == "interleaved" else [1]:
                order = Order(name, ranks, micro_batches, virtual)
                if order.num_stages <= self._num_blocks and self._suits(order):
                    yield order

    def _suits(self, order: Order) -> bool:
        """Whether an order is one of those to look at; where all of it is given it is, and `make_order` says if it cannot be."""
        if self.pins.schedule and not self.task.options.free_micro_batches:
            return True
        if order.schedule == "interleaved":
            return order.virtual > 1 and order.num_microbatches % order.num_ranks == 0
        return bool(self.pins.schedule) or (order.virtual == 1 and not (order.schedule == "zero-bubble" and self.pins.zero in (2, 3)))

    # --- rows --------------------------------------------------------------------------------------------------------

    def _search(self, task: Task, mesh: Mesh, order: Order, position: int) -> StageSearch:
        strict = bool(self.pins.mesh_axes) and self.task.options.mesh is None
        return StageSearch(task.graph, task.rules, task.batch, self.cluster, mesh, self.pins, task.options, strict, order, position)

    def _rows(self, task: Task, ranks: int, mesh: Mesh, numbers: Sequence[int], position: int = 0) -> Iterator[Row]:
        """A row for every order; estimates where the number of microbatches is not that of the task."""
        self.progress(f"searching pipelines of {ranks} on mesh {mesh}")
        for first, base in self._bases(task, ranks, mesh, position):
            whole = Blocks(base.program, first.along)
            for number in numbers:
                blocks = whole.in_parts(max(1, number // task.options.micro_batches))
                for order in self._orders(ranks, number):
                    try:
                        cut = _cut(blocks, order, first.limit_bytes)
                    except InfeasibleError:
                        continue
                    self.num_tried += 1
                    yield Row(replace(first, order=order), base, cut)

    def _bases(self, task: Task, ranks: int, mesh: Mesh, position: int) -> Iterator[tuple[StageSearch, Candidate]]:
        """Shardings to cut, each with the search that it comes from; what all of them take at least is in the bound."""
        first = self._search(task, mesh, Order("gpipe", ranks, 1), position)
        base = first.sharded()
        self.bound_s = min(self.bound_s, math.fsum(least_compute_s(base)) / ranks)
        yield first, base

    def _near(self, rows: Sequence[Row]) -> list[Row]:
        """Rows that may be among the fastest, the fastest first; those that look as if they fitted come before those that do not."""
        wanted = [row for row in rows if row.step_s < CLOSE * self.below_s]
        return sorted(wanted, key=lambda row: (not row.fits, float(f"{row.step_s:.9g}")))  # of equals the first: orders are listed by their memory

    def _retraced(self, estimates: Sequence[Row]) -> list[Row]:
        """Rows from the graphs of the numbers of microbatches that look best."""
        found: list[Row] = []
        looked: set[int] = set()
        while len(looked) < MAX_GRAPHS:
            limit = min((row.step_s for row in found if row.fits), default=math.inf)
            left = [row for row in self._near(estimates) if row.search.order.num_microbatches not in looked and (row.step_s < limit or not found)]
            number = next((row.search.order.num_microbatches for row in left), None)
            if number is None:
                break
            looked.add(number)
            task = self.task_of(number)
            if task is not None:
                shapes = dict.fromkeys((row.search.order.num_ranks, row.search.mesh) for row in left if row.search.order.num_microbatches == number)
                found += [row for ranks, mesh in list(shapes)[:MAX_SHARDED] for row in self._rows(task, ranks, mesh, [number])]
        return found

    def task_of(self, micro_batches: int) -> Task | None:
        """The task with this number of microbatches; None where the batch does not divide."""
        if micro_batches == self.task.options.micro_batches:
            return self.task
        if micro_batches not in self._tasks:
            self.progress(f"tracing one of {micro_batches} microbatches")
            graph = self.retrace(micro_batches)
            options = replace(self.task.options, micro_batches=micro_batches)
            self._tasks[micro_batches] = None if graph is None else Task.of(graph, options)
        return self._tasks[micro_batches]

    # --- placement and building --------------------------------------------------------------------------------------

    def _placed(self, rows: Sequence[Row]) -> list[Row]:
        """With the pipeline's axis elsewhere too, for the best shapes: where other links lie between neighbours."""
        found = list(rows)
        shapes = dict.fromkeys((row.search.order.num_ranks, row.search.mesh, row.search.order.num_microbatches) for row in rows)
        for ranks, mesh, number in list(shapes)[:MAX_PLACED]:
            task = self._tasks.get(number) or self.task
            seen = {self._links(mesh, ranks, 0)}
            for position in range(1, len(mesh.axes) + 1):
                links = self._links(mesh, ranks, position)
                if links not in seen:
                    seen.add(links)
                    found += self._rows(task, ranks, mesh, [number], position)
        return self._near(found)

    def _links(self, mesh: Mesh, ranks: int, position: int) -> tuple:
        """What the groups of every axis span, the pipeline's first."""
        pricing = self._search(self.task, mesh, Order("gpipe", ranks, 1), position).pricing
        spans = [group_spans(self.cluster, pricing.whole, (a,)) for a in range(len(mesh.axes) + 1)]
        return (spans.pop(position), *spans)

    def _built(self, rows: Sequence[Row]) -> StagedCandidate | None:
        """The best of the rows that fit, else of what can be done about memory."""
        best: StagedCandidate | None = None
        tight: list[Row] = []
        built = 0
        for row in rows:
            if not row.fits or built == MAX_BUILT:
                tight += [] if row.fits else [row]
                continue
            built += 1
            made = row.search.staged(row.base, best=True)
            if made.pressing_bytes > row.search.limit_bytes:
                tight.append(row)
            elif best is None or made.step_s < best.step_s * (1 - ROUNDING):
                best = made
        for row in tight[:MAX_BUILT]:
            if best is not None and row.step_s >= best.step_s:
                continue
            try:
                found = row.search.best()
            except DoesNotFit as error:
                self.failures.append((row.search, error))
                continue
            finer = row.search.staged(found, best=True)
            found = finer if finer.pressing_bytes <= row.search.limit_bytes and finer.step_s < found.step_s else found
            best = found if best is None or found.step_s < best.step_s else best
        return best


def least_compute_s(base: Candidate) -> list[float]:
    """Of every operator, whatever the sharding."""
    return [float(base.problem.nodes[n].cost_s.min()) for n in base.ports.op_node.values()]


def _cut(blocks: Blocks, order: Order, limit_bytes: float) -> Cut:
    """The formula's cut, within the limit where there is one."""
    try:
        return formula_cut(blocks, order, limit_bytes)
    except InfeasibleError:
        return formula_cut(blocks, order, math.inf)
