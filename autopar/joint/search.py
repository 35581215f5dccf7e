"""Best first over all points: a bound from a roofline, a bound from the solved sharding, a bound under the memory limit, and at last a plan.

    1. `space.Ideal`      every operator cut evenly, nothing communicated: no tables are built
    2. the fastest        the folded problem solved without a memory limit, every bubble counted that no cut avoids
    3. the fastest that   the same under the memory limit, by the price of a byte
       may fit
    4. a plan             state sharding and recomputation by the liveness of the stages, the step by the schedule's lists

A point goes through these as long as its bound is the least of all; the search ends when the best plan is no more than `GAP` above every bound that is
left. What it returns is proven to that: no plan of the space, by these costs, is faster than `bound_s`. (Blocks are sharded alike, stages of interleaved
pipelines are even, and memory is what the linear model says, which counts less than the walk of a plan does.)
"""

import heapq
import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

from autopar.core.cluster import Cluster
from autopar.core.graph import OpGraph
from autopar.core.memory import MemoryUse
from autopar.core.problem import evaluate
from autopar.core.units import size
from autopar.core.unroll import Run
from autopar.errors import InfeasibleError
from autopar.joint import asked
from autopar.joint.asked import AGAIN, GATHERED, KEPT, Asked
from autopar.joint.bounds import Line, Parts, least_step_s, sides
from autopar.joint.deep import Deep, Sharding, mixed, roomy_depths, shifted
from autopar.joint.known import SAFE, Flat, Floors, Known, Proved, without_memory
from autopar.joint.relaxed import Relaxed
from autopar.joint.space import Ideal, Point, orders, points
from autopar.joint.tables import PointTables
from autopar.planner.blocks import Order
from autopar.planner.keeping import Keeping
from autopar.planner.lengths import Task
from autopar.planner.pins import Pins
from autopar.planner.search import Options
from autopar.planner.states import Pricing

GAP = 0.01
"""A plan this near to the bound is near enough: the cost model is off by more."""

FAR = 0.2
"""Where a plan is so far above a point's bound, more of its shardings are looked at."""

NEAR = 1.02
"""Plans that take so much longer than the best are looked at again, with more of the shardings of their points."""

AHEAD, SEEN = 8, 0.97
"""Points from which the most promising is planned next; of the memory, what the linear model of a rank's blocks makes of it at most."""

FINE = 3
"""Points that are looked at again."""

Graphs = Callable[[int], OpGraph]
"""The short graph of so many samples."""


@dataclass(frozen=True)
class Found:
    """A plan that fits `limit_bytes`, and the search of its point."""

    search: "PointSearch"
    sharding: Sharding
    deep: Deep
    limit_bytes: float

    @property
    def point(self) -> Point:
        return self.search.point

    @property
    def step_s(self) -> float:
        return self.deep.step_s

    @property
    def memory(self) -> MemoryUse:
        return self.deep.memory


@dataclass(frozen=True)
class Joint:
    """`found`: plans, the fastest first; `bound_s`: no plan of the space is faster; `looked`: how many points came to each of the four levels;
    `in_time`: the search ended before its budget did."""

    found: tuple[Found, ...]
    bound_s: float
    num_points: int
    looked: tuple[int, ...]
    in_time: bool

    @property
    def best(self) -> Found:
        return self.found[0]

    @property
    def gap(self) -> float:
        return max(0.0, self.best.step_s - self.bound_s) / self.best.step_s


@dataclass
class JointSearch:
    """`graphs` of a model with one run of blocks, `batch` samples a step, on a cluster."""

    graphs: Graphs
    run: Run
    batch: int
    cluster: Cluster
    options: Options
    pins: Pins = field(default_factory=Pins)
    progress: Callable[[str], None] = lambda text: None
    gap: float = GAP
    known: Known = field(default_factory=Known)

    def search(self) -> Joint:
        """Raises InfeasibleError where nothing fits. The time limit is for what comes after the first plan."""
        end = math.inf
        ideal = Ideal(self.cluster, self.run)
        heap: list[Waiting] = []
        free = self.options.free_micro_batches or self.pins.micro_batch is not None  # its number of samples is pinned, and what of dp follows is searched
        number = None if free else self.options.micro_batches
        for n, point in enumerate(points(self.cluster, self.batch, self.run.depth, self.pins, number)):
            search = PointSearch(self, point)
            bound = search.ideal_s(ideal)
            heapq.heappush(heap, Waiting(bound, 0, n, bound, search))
        num_points, looked, found, closed = len(heap), [len(heap), 0, 0, 0], [], math.inf
        best = math.inf
        planned: list[tuple[float, PointSearch]] = []
        ready: list[Waiting] = []  # to be planned, by what they promise
        while (ready or (heap and heap[0].key < best * (1 - self.gap))) and time.perf_counter() < end:
            if heap and heap[0].key < best * (1 - self.gap) and len(ready) < AHEAD:
                waiting = heapq.heappop(heap)
                self.progress(f"searching {waiting.search.point}: bound {waiting.bound:.4g} s, best {best:.4g} s")
                if waiting.level < 2:
                    _tighten(heap, waiting, looked)
                else:
                    heapq.heappush(ready, replace(waiting, key=waiting.search.promised_s(self.limit_bytes)))
                continue
            waiting = heapq.heappop(ready)
            looked[3] += 1
            closed = min(closed, waiting.bound)
            planned.append((waiting.bound, waiting.search))
            made = waiting.search.plan(self.limit_bytes, best * NEAR)
            if made is not None:
                end = min(end, time.perf_counter() + self.options.time_limit_s)
                found.append(made)
                best = min(best, made.step_s)
        closed = min([closed, *(waiting.bound for waiting in ready)])
        in_time = not ready and (not heap or heap[0].key >= best * (1 - self.gap))
        while heap and heap[0].level < 2 and heap[0].key < best < math.inf and in_time:
            _tighten(heap, heapq.heappop(heap), looked)
        self._look_further(found, planned, best, end)
        if not found:
            raise InfeasibleError(
                f"none of {num_points} ways to lay {self.run.depth} blocks on {self.cluster.name} fits {size(self.limit_bytes)} of a device; "
                "use more nodes or devices with more memory, or a larger --max-memory"
            )
        left = heap[0].key if heap else math.inf
        found.sort(key=lambda f: (f.step_s, f.point.num_ranks, f.point.inner))
        uneven = shifted(found[0].sharding, found[0].deep, self.limit_bytes)
        if uneven is not found[0].deep:
            found.insert(0, replace(found[0], deep=uneven))  # beside the other, which may fit where this does not on the whole graph
        best = found[0].step_s
        return Joint(tuple(found), min(closed, left, best), num_points, tuple(looked), in_time)

    def _look_further(self, found: list["Found"], planned: Sequence[tuple[float, "PointSearch"]], best: float, end: float) -> None:
        """Adds what is better: at the few points of the best plans, and, while there is time, at those that may be far better than what was found."""
        near = [made.search for made in sorted(found, key=lambda made: made.step_s)[:FINE]]
        for search, asking in [*((s, s.fine) for s in near), *((s, s.lean) for bound, s in planned if bound < best * (1 - FAR))]:
            made = search.plan(self.limit_bytes, best, asking) if search in near or time.perf_counter() < end else None
            if made is not None:
                found.append(made)
                best = made.step_s

    @property
    def limit_bytes(self) -> float:
        return self.cluster.device.memory_bytes * self.options.memory_share

    @property
    def about(self) -> Hashable:
        """What tables depend on beside point and cluster."""
        return self.options.precision, self.options.offload, self.pins, self.run

    def task(self, samples: int) -> Task:
        """A microbatch of the short graph."""
        return self.known.kept(("task", samples), lambda: Task.of(self.graphs(samples), self.options))

    def tables(self, point: Point) -> PointTables:
        cluster, options = without_memory(self.cluster), self.options
        task = self.task(point.samples)
        # microbatches of other sizes share the prices of a mesh: parameters move alike
        pricing = self.known.kept((cluster, point.num_ranks, point.mesh), lambda: Pricing(cluster, point.mesh, (point.num_ranks, 0)))
        given = Keeping(micro_batches=point.num_microbatches, precision=options.precision, offload=options.offload)
        keeping = given.everything().narrowed(self.pins)
        return self.known.kept((self.about, cluster, point), lambda: PointTables(point, self.run, task, pricing, keeping, self.pins))


@dataclass(frozen=True, order=True, slots=True)
class Waiting:
    """A point with its `bound`, which is that of its level. Its `key` may be higher: a bound that other searches left."""

    key: float
    level: int
    number: int
    bound: float = field(compare=False)
    search: "PointSearch" = field(compare=False)
    floored: bool = field(default=False, compare=False)


def _tighten(heap: list[Waiting], waiting: Waiting, looked: list[int]) -> None:
    """By what other searches know, else by the next level. So the levels that a point goes through depend on those, but what it is planned by does not."""
    bound, level, search = waiting.bound, waiting.level, waiting.search
    floor = 0.0 if waiting.floored else search.floor_s(solved=level > 0)
    if floor > waiting.key:
        heapq.heappush(heap, replace(waiting, key=floor, floored=True))
        return
    looked[level + 1] += 1
    bound = max(bound, (search.fastest_s if level == 0 else search.fitting_s)())
    if bound < math.inf:
        heapq.heappush(heap, Waiting(bound, level + 1, waiting.number, bound, search))


@dataclass
class PointSearch:
    """All plans of one point."""

    joint: JointSearch
    point: Point
    ideal: Parts = Parts(0.0)
    _known: dict[tuple[tuple[int, ...], float], float] = field(default_factory=dict)

    @cached_property
    def orders(self) -> tuple[Order, ...]:
        return tuple(orders(self.point, self.joint.run.depth, self.joint.pins))

    @cached_property
    def tables(self) -> PointTables:
        return self.joint.tables(self.point)

    @property
    def keeping(self) -> Keeping:
        return self.tables.keeping

    @property
    def pricing(self) -> Pricing:
        return self.tables.pricing

    # --- bounds ----------------------------------------------------------------------------------------------------------

    def ideal_s(self, ideal: Ideal) -> float:
        """The bound from a roofline."""
        task = self.joint.task(self.point.samples)
        one = ideal.seconds(task.graph, task.rules, self.point.outer, self.point.inner)
        step = self.ideal = one.times(self.point.num_microbatches)
        return min((self._step_s(order, step, [[Line(step.block)]] * order.num_ranks, one) for order in self.orders), default=math.inf)

    def fastest_s(self) -> float:
        """The bound from the solved problem, without a memory limit."""
        found = min(map(self._fastest_s, self.orders), default=math.inf)
        self._tell()
        return found

    def _fastest_s(self, order: Order, parts: Callable[[str], Parts] | None = None) -> float:
        """`parts`: of one sharding rather than of all, by side."""
        found = [(side, parts(side) if parts else self.side(side).parts) for side in sides(order)]
        return max(self._step_s(order, p, [[Line(p.block)]] * order.num_ranks, self._waits(side, p)) for side, p in found)

    def fitting_s(self) -> float:
        """The bound under the memory limit of every rank, by the linear model of memory; inf where not even that can be met."""
        least = math.inf
        for fastest, order in sorted(((self._fastest_s(order), order) for order in self.orders), key=lambda pair: pair[0]):
            if fastest < least:
                side = sides(order)[0]
                parts = self.side(side).parts
                least = min(least, max(fastest, self._step_s(order, parts, self._lines(self.side(side), order), self._waits(side, parts))))
        self._tell()
        return least

    def _lines(self, relaxed: Relaxed, order: Order) -> list[list[Line]]:
        """By rank; of memory for those that hold most microbatches, which it binds first."""
        most, free = max(order.in_flight), Line(relaxed.parts.block)
        return [[free, relaxed.line(flight, self._room_bytes(self.joint.limit_bytes))] if flight >= most / 2 else [free] for flight in order.in_flight]

    def _room_bytes(self, limit_bytes: float) -> float:
        """What a rank may hold by the linear model. Gradients of a single microbatch, which are no more than parameters, grow as activations go."""
        return limit_bytes * (2.0 if self.point.num_microbatches == 1 else 1.0)

    def floor_s(self, *, solved: bool) -> float:
        """What other searches leave of `fitting_s`, 0 where they know nothing; `solved`: the parts of a step are known."""
        floors = self.joint.known.floors(self.joint.about, self.point, self.joint.cluster, self.ideal)
        return SAFE * min((self._floor_s(order, floors, solved=solved) for order in self.orders), default=math.inf) if floors else 0.0

    def _floor_s(self, order: Order, floors: Floors, *, solved: bool) -> float:
        def parts(side: str) -> Parts:
            return self.side(side).parts if solved else floors.parts.get(side, self.ideal)

        side, most = sides(order)[0], max(order.in_flight)
        free, limit = Line(parts(side).block), self._room_bytes(self.joint.limit_bytes)
        lines = [[free, *(floors.lines(side, flight, limit) if flight >= most / 2 else ())] for flight in order.in_flight]
        return max(self._fastest_s(order, parts), self._step_s(order, parts(side), lines, self._waits(side, parts(side))))

    def _tell(self) -> None:
        """What is found out, to the searches that follow."""
        asked = {side: self.side(side) for order in self.orders for side in sides(order)}
        lines = {
            side: tuple(Flat(flight, line.price, line.block_s) for flight, line in relaxed.lines(self._room_bytes(self.joint.limit_bytes)).items() if 0 < line.block_s < math.inf)
            for side, relaxed in asked.items()
        }
        parts = {side: relaxed.parts for side, relaxed in asked.items()}
        self.joint.known.add(self.joint.about, Proved(self.joint.cluster, self.point, self.tables.operators, parts, lines))

    def side(self, side: str) -> Relaxed:
        return self.tables.whole if side == "whole" else self.tables.passes

    def _waits(self, side: str, parts: Parts) -> Parts:
        """What a microbatch takes at least of others while a rank waits for it."""
        return parts.times(1 / self.point.num_microbatches) if side == "passes" else Parts(0.0)

    def _step_s(self, order: Order, ends: Parts, lines: Sequence[Sequence[Line]], one: Parts) -> float:
        least = least_step_s(order, self.joint.run.depth, lines, ends, one)
        return least / (self.joint.cluster.crowding if order.num_ranks > 1 else 1.0)  # ranks that share cores are faster while others wait

    # --- plans -----------------------------------------------------------------------------------------------------------

    def plan(self, limit_bytes: float, below_s: float = math.inf, asking: Callable[[], Iterable[Asked]] | None = None) -> Found | None:
        """The best plan of the point within a limit that takes less than `below_s`: every sharding that is asked for and may be best, every order, as little
        recomputation as fits.

        The most promising sharding is planned first: what a rank holds beside what the linear model counts is about the same for all.
        """
        best: Found | None = None
        left, unseen = self.tables.chosen((asking or self.first)()), 0.0
        while left := [choices for choices in left if self._least_s(choices, limit_bytes) < (best.step_s if best else below_s)]:
            choices = min(left, key=lambda c: self._least_s(c, limit_bytes - unseen))
            left.remove(choices)
            sharding = self.tables.sharding(choices)
            made = self._mixed(sharding, limit_bytes, best.step_s if best else below_s)
            best = made or best
            unseen = max(0.0, self.tables.whole.figures(choices).unseen_bytes(made.deep if made else sharding.leanest(self.orders[0])))
        return best

    def promised_s(self, limit_bytes: float) -> float:
        """Of the sharding that is planned first: how soon the point is worth to be planned."""
        return min((self._least_s(choices, limit_bytes * SEEN) for choices in self.tables.chosen(self.first())), default=math.inf)

    def _mixed(self, sharding: Sharding, limit_bytes: float, below_s: float) -> Found | None:
        """The best plan of a sharding within a limit that takes less than `below_s`."""
        best: Deep | None = None
        for order in self.orders:
            even = sharding.even(order.num_stages)
            made = mixed(sharding, order, even, limit_bytes, below_s)
            if made is None and order.virtual == 1 < order.num_ranks and Deep(sharding.light, sharding.light, order, even).least_s < below_s:
                roomy = roomy_depths(sharding, order, even, limit_bytes)
                made = mixed(sharding, order, roomy, limit_bytes, below_s) if roomy is not None else None
            if made is not None:
                best, below_s = made, made.step_s
        return Found(self, sharding, best, limit_bytes) if best is not None else None

    def first(self) -> Iterator[Asked]:
        return asked.first(self.keeping.stages, self._prices, self._ways)

    def fine(self) -> Iterator[Asked]:
        return asked.finer(self._prices, self._ways)

    def lean(self) -> Iterator[Asked]:
        """With the most microbatches in flight."""
        flight, whole = max(max(order.in_flight) for order in self.orders), self.tables.whole
        fastest = self.tables.cheapest(Asked(1.0, 0.0, None, KEPT))
        assert fastest is not None, "nothing is fixed"
        seconds, num_bytes = evaluate(whole.in_flight(flight).problem, fastest)
        sizes = [node.num_states for node in whole.folded.problem.nodes]
        return chain(asked.leaner(flight, seconds / max(num_bytes, 1.0), self._ways), asked.around(sizes, self.keeping.stages))

    @property
    def _prices(self) -> list[tuple[float, float]]:
        """Microbatches in flight, and the price of a byte that goes with them."""
        room = self._room_bytes(self.joint.limit_bytes)
        asked_sides = {side: self.side(side) for order in self.orders for side in sides(order)}
        return sorted({(flight, line.price) for relaxed in asked_sides.values() for flight, line in relaxed.lines(room).items() if line.price})

    @property
    def _ways(self) -> tuple[str, ...]:
        return (AGAIN,) if self.tables.whole.leaner is None else (AGAIN, GATHERED)

    def _least_s(self, choices: tuple[int, ...], limit_bytes: float) -> float:
        """No plan of a sharding takes less, by the linear model of memory."""
        key = choices, limit_bytes
        if key not in self._known:
            self._known[key] = min(self._sharding_s(order, choices, limit_bytes) for order in self.orders)
        return self._known[key]

    def _sharding_s(self, order: Order, choices: tuple[int, ...], limit_bytes: float) -> float:
        fastest, side = self._fastest_s(order, lambda side: self.side(side).parts_of(choices)), sides(order)[0]
        parts, figures = self.side(side).parts_of(choices), self.side(side).figures(choices)
        by_flight = {flight: figures.lines(flight, self._room_bytes(limit_bytes)) for flight in set(order.in_flight)}
        return max(fastest, self._step_s(order, parts, [by_flight[flight] for flight in order.in_flight], self._waits(side, parts)))