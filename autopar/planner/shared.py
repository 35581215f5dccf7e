"""Copies of a model on groups of different devices that share out the microbatches of a step: a faster copy runs more of them.

Every copy is a mesh of the same shape, so many devices as divide every group, sharded alike; a group of more devices has more copies. Gradients, which
microbatches add up in each copy, are summed over all copies once a step.

    1. shapes     every mesh, with a number of microbatches that can be shared out finely enough, sharded as is fastest on each of the groups; with ZeRO 1 too,
                  which leaves each device less to sum
    2. numbers    the best of these with other numbers of microbatches
    3. the best   its shares exactly those that end soonest (`search/shares.py`), simulated and walked as all plans over groups

A copy must fit devices with the least memory. The model must not have buffers that microbatches change.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from autopar.core.mesh import Mesh
from autopar.core.pipeline import SHARED, Pipeline
from autopar.errors import UsageError
from autopar.planner.along import MixedPricing, along
from autopar.planner.blocks import Order
from autopar.planner.lengths import Task, least_compute_s
from autopar.planner.meshes import candidate_meshes, forced_mesh
from autopar.planner.mixed import MAX_RANKS, MixedPipelines, shared_s
from autopar.planner.pipelines import StagedCandidate
from autopar.planner.search import Candidate, DoesNotFit, MeshSearch
from autopar.planner.staging import Staged
from autopar.planner.work import total_seconds
from autopar.search.shares import share_out
from autopar.stages import copies

FINE = 4
"""Microbatches for each copy that are looked at first."""

MAX_EACH = 16
"""Microbatches for each copy at most: every one has its launches."""

MAX_NUMBERS = 4
"""Numbers of microbatches that are looked at on one mesh."""

MAX_BUILT = 2
"""Meshes on which other numbers are looked at, and plans that are simulated and walked."""


@dataclass(frozen=True)
class Row:
    """A sharding of a copy with the shares of `number` microbatches. `variant`: the group on whose devices it is the fastest, and
    the stage of ZeRO that is asked for beside the pins, 0 for none; `step_s`: before it is simulated."""

    found: Candidate
    prices: MixedPricing
    variant: tuple[int, int]
    number: int
    shares: tuple[int, ...]
    step_s: float


@dataclass
class SharedSearch:
    """All plans of copies that the pins allow; `over`: what knows the shapes and makes the graphs."""

    over: MixedPipelines
    num_tried: int = 0
    bound_s: float = math.inf
    _limit_bytes: float = field(init=False)

    def __post_init__(self) -> None:
        self._limit_bytes = self.over.cluster.device.memory_bytes * self.over.task.options.memory_share

    def best(self) -> StagedCandidate | None:
        """The fastest that fits; None where there is none."""
        if self.over.pins.wants_pipeline or self.over.task.graph.updates:
            return None
        rows = [row for mesh in self._meshes() for row in self._first(mesh)]
        looked = {(row.prices.mesh, row.number) for row in rows}
        for row in sorted(rows, key=lambda row: row.step_s)[:MAX_BUILT]:
            near = sorted(self._numbers(row.prices.mesh), key=lambda m: (abs(math.log2(m / row.number)), -m))
            for number in [m for m in near if (row.prices.mesh, m) not in looked][: MAX_NUMBERS - 1]:
                rows += self._rows(row.prices.mesh, number, (row.variant,))
                looked.add((row.prices.mesh, number))
        return self._built(sorted(rows, key=lambda row: row.step_s))

    def _meshes(self) -> Iterator[Mesh]:
        """Of a copy, the largest first; pinned degrees are those of a copy."""
        cluster, options = self.over.cluster, self.over.task.options
        largest = math.gcd(*(group.num_devices for group in self.over.mixed.groups))
        for size in (d for d in range(largest, 0, -1) if largest % d == 0 and cluster.num_devices <= d * MAX_RANKS):
            try:
                forced = options.mesh or forced_mesh(replace(self.over.pins, pp=cluster.num_devices // size), cluster)
            except UsageError:
                continue
            meshes = candidate_meshes(size) if forced is None else (forced,) if forced.num_ranks == size else ()
            yield from (mesh for mesh in meshes if forced or len(mesh.axes) == 1 or mesh.sizes[-1] <= cluster.devices_per_node)

    def _first(self, mesh: Mesh) -> list[Row]:
        """With shares as fine as they should be, or as fine as they must be for a copy to fit."""
        numbers = self._numbers(mesh)
        fine = [m for m in numbers if m >= FINE * len(self._groups(mesh))] or numbers[-1:]
        variants = [(n, zero) for n in range(len(self.over.mixed.groups)) for zero in ((0, 1) if self.over.pins.zero is None and mesh.num_ranks > 1 else (0,))]
        return next((rows for number in fine if (rows := self._rows(mesh, number, variants))), [])

    def _groups(self, mesh: Mesh) -> tuple[int, ...]:
        """The group of each copy."""
        return tuple(n for n, group in enumerate(self.over.mixed.groups) for _ in range(group.num_devices // mesh.num_ranks))

    def _numbers(self, mesh: Mesh) -> list[int]:
        """Numbers of microbatches to share out, the smallest first."""
        least, given, batch = len(self._groups(mesh)), self.over.task.options, self.over.batch
        if not given.free_micro_batches:
            return [given.micro_batches] if given.micro_batches >= least else []
        return [m for m in range(least, min(batch, MAX_EACH * least) + 1) if batch % m == 0]

    def _rows(self, mesh: Mesh, number: int, variants: Sequence[tuple[int, int]]) -> list[Row]:
        """`variants`: see `Row`."""
        task = self.over.task_of(number)
        if task is None:
            return []
        self.over.progress(f"sharing {number} microbatches out over copies on mesh {mesh}")
        rows, least = [], {}
        for variant in variants:
            try:
                found = self._search(task, mesh, number, variant).best()
            except DoesNotFit:
                continue
            finally:
                self.num_tried += 1
            least[variant[0]] = [seconds / self._each(mesh, number) for seconds in least_compute_s(found)]
            rows.append(self._row(found, task, mesh, number, variant))
        if len(least) == len(self.over.mixed.groups):
            counts = [self._groups(mesh).count(n) for n in sorted(least)]
            self.bound_s = min(self.bound_s, number * shared_s([least[n] for n in sorted(least)], counts))
        return rows

    def _each(self, mesh: Mesh, number: int) -> int:
        """Microbatches of a copy, on average."""
        return math.ceil(number / len(self._groups(mesh)))

    def _search(self, task: Task, mesh: Mesh, number: int, variant: tuple[int, int]) -> MeshSearch:
        n, zero = variant
        group, pins = self.over.mixed.groups[n], self.over.pins
        lean = replace(group, device=replace(group.device, memory_bytes=self.over.cluster.device.memory_bytes))
        options = replace(task.options, micro_batches=self._each(mesh, number))
        strict = bool(pins.mesh_axes) and options.mesh is None
        return MeshSearch(task.graph, task.rules, task.batch, lean, mesh, replace(pins, zero=zero) if zero else pins, options, strict)

    def _row(self, found: Candidate, task: Task, mesh: Mesh, number: int, variant: tuple[int, int]) -> Row:
        groups = self._groups(mesh)
        prices = along(self.over.mixed, groups, mesh, task.options.memory_share)
        seconds = {n: total_seconds(found.program, prices.on(groups.index(n))).tolist() for n in sorted(set(groups))}
        start_s = 2 * prices.cluster.host.action_s
        times, once = [sum(seconds[n][:3]) + start_s for n in groups], [sum(seconds[n][3:5]) for n in groups]  # optimizers step behind the sum over all
        shares = share_out(times, once, number)
        ends = max(o + share * t for o, share, t in zip(once, shares, times, strict=True))
        stages = copies(found.program, Pipeline(len(groups), (), SHARED, shares=shares))
        tie_s = sum(prices.tie(tuple(range(len(groups))), stages.tied_bytes(v)) for v in stages.shared if v in task.graph.differentiated)
        return Row(found, prices, variant, number, shares, ends + tie_s + max(seconds[n][5] for n in groups))

    def _built(self, rows: Sequence[Row]) -> StagedCandidate | None:
        best: StagedCandidate | None = None
        built = 0
        for row in rows:
            if built == MAX_BUILT or row.step_s >= self.over.below_s:
                break
            made = self._made(row)
            if made.pressing_bytes <= self._limit_bytes:
                built += 1
                best = made if best is None or made.step_s < best.step_s else best
        return best

    def _made(self, row: Row) -> StagedCandidate:
        found, ranks = row.found, len(row.shares)
        program = replace(found.program, residency=replace(found.program.residency, micro_batches=row.number))
        stages = copies(program, Pipeline(ranks, (), SHARED, 0, row.prices.places, row.shares))
        staged = Staged(stages, Order(SHARED, ranks, row.number, shares=row.shares), row.prices, found.engine)
        return StagedCandidate(program, found.assignment, found.problem, found.ports, found.engine, staged, exact=True)
