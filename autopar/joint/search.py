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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from autopar.core.cluster import Cluster
from autopar.core.graph import OpGraph
from autopar.core.layout import Layout
from autopar.core.memory import MemoryUse
from autopar.core.mesh import Mesh
from autopar.core.problem import Edge, Node, SearchProblem, evaluate
from autopar.core.units import size
from autopar.core.unroll import Run
from autopar.errors import InfeasibleError
from autopar.joint.bounds import Line, Parts, least_step_s
from autopar.joint.deep import Deep, Sharding, even_depths, mixed, roomy_depths, shifted
from autopar.joint.fold import fold
from autopar.joint.relaxed import Relaxed, passes_alone
from autopar.joint.space import Ideal, Point, orders, points
from autopar.planner.blocks import Order
from autopar.planner.decode import decode
from autopar.planner.keeping import Keeping
from autopar.planner.lengths import Task
from autopar.planner.liveness import Engine
from autopar.planner.pins import Pins
from autopar.planner.problem import Ports, ProblemBuilder
from autopar.planner.roles import Constraints
from autopar.planner.search import Options
from autopar.planner.states import Pricing, States
from autopar.program import Program
from autopar.search.elimination import prepare
from autopar.search.simplify import BYTES, SECONDS, Price

GAP = 0.01
"""A plan this near to the bound is near enough: the cost model is off by more."""

FAR = 0.2
"""Where a plan is so far above a point's bound, more of its shardings are looked at."""

LEAN_POWERS = range(-3, 11)
"""Of 4: prices of a byte, in what all bytes of the fastest sharding must cost to be as dear as its seconds."""

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

    def search(self) -> Joint:
        """Raises InfeasibleError where nothing fits. The time limit is for what comes after the first plan."""
        end = math.inf
        ideal = Ideal(self.cluster, self.run)
        heap: list[tuple[float, int, int, PointSearch]] = []
        free = self.options.free_micro_batches or self.pins.micro_batch is not None  # its number of samples is pinned, and what of dp follows is searched
        number = None if free else self.options.micro_batches
        for n, point in enumerate(points(self.cluster, self.batch, self.run.depth, self.pins, number)):
            search = PointSearch(self, point)
            heapq.heappush(heap, (search.ideal_s(ideal), 0, n, search))
        num_points, looked, found, closed = len(heap), [len(heap), 0, 0, 0], [], math.inf
        best = math.inf
        planned: list[tuple[float, PointSearch]] = []
        while heap and heap[0][0] < best * (1 - self.gap) and time.perf_counter() < end:
            bound, level, n, search = heapq.heappop(heap)
            self.progress(f"searching {search.point}: bound {bound:.4g} s, best {best:.4g} s")
            level += 1
            looked[level] += 1
            if level < 3:
                tighter = (search.fastest_s if level == 1 else search.fitting_s)()
                if tighter < math.inf:
                    heapq.heappush(heap, (max(bound, tighter), level, n, search))
                continue
            closed = min(closed, bound)
            planned.append((bound, search))
            made = search.plan(self.limit_bytes, best)
            if made is not None:
                end = min(end, time.perf_counter() + self.options.time_limit_s)
                found.append(made)
                best = min(best, made.step_s)
        for bound, search in planned:
            if bound < best * (1 - FAR) and time.perf_counter() < end:
                made = search.lean_plan(self.limit_bytes, best)
                if made is not None:
                    found.append(made)
                    best = made.step_s
        if not found:
            raise InfeasibleError(
                f"none of {num_points} ways to lay {self.run.depth} blocks on {self.cluster.name} fits {size(self.limit_bytes)} of a device; "
                "use more nodes or devices with more memory, or a larger --max-memory"
            )
        left = heap[0][0] if heap else math.inf
        found.sort(key=lambda f: (f.step_s, f.point.num_ranks, f.point.inner))
        found[0] = replace(found[0], deep=shifted(found[0].sharding, found[0].deep, self.limit_bytes))
        best = found[0].step_s
        return Joint(tuple(found), min(closed, left, best), num_points, tuple(looked), left >= best * (1 - self.gap))

    @property
    def limit_bytes(self) -> float:
        return self.cluster.device.memory_bytes * self.options.memory_share

    def task(self, samples: int) -> Task:
        """A microbatch of the short graph."""
        if samples not in self._tasks:
            self._tasks[samples] = Task.of(self.graphs(samples), self.options)
        return self._tasks[samples]

    @cached_property
    def _tasks(self) -> dict[int, Task]:
        return {}

    def pricing(self, point: Point) -> Pricing:
        """Of its mesh, which microbatches of other sizes share: parameters move alike."""
        key = point.num_ranks, point.mesh
        if key not in self._pricings:
            self._pricings[key] = Pricing(self.cluster, point.mesh, (point.num_ranks, 0))
        return self._pricings[key]

    @cached_property
    def _pricings(self) -> dict[tuple[int, Mesh], Pricing]:
        return {}


@dataclass
class PointSearch:
    """All plans of one point."""

    joint: JointSearch
    point: Point

    @property
    def task(self) -> Task:
        return self.joint.task(self.point.samples)

    @cached_property
    def orders(self) -> tuple[Order, ...]:
        return tuple(orders(self.point, self.joint.run.depth, self.joint.pins))

    @property
    def pricing(self) -> Pricing:
        return self.joint.pricing(self.point)

    # --- bounds ----------------------------------------------------------------------------------------------------------

    def ideal_s(self, ideal: Ideal) -> float:
        """The bound from a roofline."""
        one = ideal.seconds(self.task.graph, self.task.rules, self.point.outer, self.point.inner)
        step = one.times(self.point.num_microbatches)
        return min((self._step_s(order, step, [[Line(step.block)]] * order.num_ranks, one) for order in self.orders), default=math.inf)

    def fastest_s(self) -> float:
        """The bound from the solved problem, without a memory limit."""
        return min(map(self._fastest_s, self.orders), default=math.inf)

    def _fastest_s(self, order: Order, parts: Callable[[Relaxed], Parts] = lambda relaxed: relaxed.parts) -> float:
        """`parts`: of one sharding rather than of all."""
        found = [(relaxed, parts(relaxed)) for relaxed in self._sides(order)]
        return max(self._step_s(order, p, [[Line(p.block)]] * order.num_ranks, self._waits(relaxed, p)) for relaxed, p in found)

    def fitting_s(self) -> float:
        """The bound under the memory limit of every rank, by the linear model of memory; inf where not even that can be met."""
        least = math.inf
        for fastest, order in sorted(((self._fastest_s(order), order) for order in self.orders), key=lambda pair: pair[0]):
            if fastest < least:
                relaxed = self._sides(order)[0]
                least = min(least, max(fastest, self._step_s(order, relaxed.parts, self._lines(relaxed, order), self._waits(relaxed, relaxed.parts))))
        return least

    def _lines(self, relaxed: Relaxed, order: Order) -> list[list[Line]]:
        """By rank; of memory for those that hold most microbatches, which it binds first."""
        most, free = max(order.in_flight), Line(relaxed.parts.block)
        return [[free, relaxed.line(flight)] if flight >= most / 2 else [free] for flight in order.in_flight]

    def _sides(self, order: Order) -> tuple[Relaxed, ...]:
        """A rank of one stage exchanges parameters before and after its passes, but may do so while it would wait for others. One of several stages
        may exchange those of one behind the passes of another."""
        return (self.whole,) if order.num_ranks == 1 else (self.passes, self.whole) if order.virtual == 1 else (self.passes,)

    def _waits(self, relaxed: Relaxed, parts: Parts) -> Parts:
        """What a microbatch takes at least of others while a rank waits for it."""
        return parts.times(1 / self.point.num_microbatches) if relaxed is self.passes else Parts(0.0)

    def _step_s(self, order: Order, ends: Parts, lines: Sequence[Sequence[Line]], one: Parts) -> float:
        least = least_step_s(order, self.joint.run.depth, lines, ends, one)
        return least / (self.joint.cluster.crowding if order.num_ranks > 1 else 1.0)  # ranks that share cores are faster while others wait

    # --- the sharding ----------------------------------------------------------------------------------------------------

    @cached_property
    def keeping(self) -> Keeping:
        options = self.joint.options
        given = Keeping(micro_batches=self.point.num_microbatches, precision=options.precision, offload=options.offload)
        return given.everything().narrowed(self.joint.pins)

    @cached_property
    def built(self) -> tuple[SearchProblem, Ports]:
        task, joint = self.task, self.joint
        constraints = Constraints(self.point.mesh, joint.pins, strict=bool(joint.pins.mesh_axes))
        return ProblemBuilder(task.graph, task.rules, task.batch, self.pricing, constraints, self.keeping).build(None)

    @cached_property
    def whole(self) -> Relaxed:
        """All that a step costs."""
        return self._relaxed(self.built[0])

    @cached_property
    def passes(self) -> Relaxed:
        """Only what its passes cost."""
        problem, ports = self.built
        return self._relaxed(passes_alone(problem, ports.once_s))

    def _relaxed(self, problem: SearchProblem) -> Relaxed:
        ports, run = self.built[1], self.joint.run
        folded = fold(self.task.graph, run, problem, ports)
        params = frozenset(folded.node[n] for n in ports.param_node.values())
        return Relaxed(folded, params, run.depth, self.point.num_ranks, self.joint.limit_bytes)

    # --- plans -----------------------------------------------------------------------------------------------------------

    def plan(self, limit_bytes: float, below_s: float = math.inf) -> Found | None:
        """The best plan of the point within a limit that takes less than `below_s`: every sharding that may be best, every order, as little recomputation
        as fits."""
        best: Found | None = None
        for program in self._programs(lambda: best.step_s if best else below_s):
            best = self._mixed(program, limit_bytes, best.step_s if best else below_s) or best
        return best

    def lean_plan(self, limit_bytes: float, below_s: float = math.inf) -> Found | None:
        """The same of shardings that hold less and less, up to that which holds least: for where what is kept beside them is more than the linear model of
        memory says."""
        best: Found | None = None
        for program in self._lean_programs():
            best = self._mixed(program, limit_bytes, best.step_s if best else below_s) or best
        return best

    def _mixed(self, program: Program, limit_bytes: float, below_s: float) -> Found | None:
        """The best plan of a sharding within a limit that takes less than `below_s`."""
        best: Deep | None = None
        sharding = Sharding.of(program, self.pricing, self.joint.run, Engine.of(self.joint.cluster), self.keeping.programs)
        for order in self.orders:
            even = even_depths(sharding.light, order.num_stages)
            made = mixed(sharding, order, even, limit_bytes, below_s)
            if made is None and order.virtual == 1 < order.num_ranks and Deep(sharding.light, sharding.light, order, even).least_s < below_s:
                roomy = roomy_depths(sharding, order, even, limit_bytes)
                made = mixed(sharding, order, roomy, limit_bytes, below_s) if roomy is not None else None
            if made is not None:
                best, below_s = made, made.step_s
        return Found(self, sharding, best, limit_bytes) if best is not None else None

    def _programs(self, below_s: Callable[[], float] = lambda: math.inf) -> Iterator[Program]:
        """The fastest sharding under every stage of ZeRO, and for every price of memory that the bound found those for any stage and for each, with
        blocks computed again or not; each once. Left out where no pipeline of it takes less than `below_s`."""
        stages = self.keeping.stages
        asked = [(1.0, 0.0, zero, False) for zero in stages]
        prices = {(flight, line.price) for relaxed in (self.whole, self.passes) for flight, line in relaxed.lines.items() if line.price}
        for flight, price in sorted(prices):
            asked += [(flight, price, zero, again) for zero, again in ((None, False), (None, True), *((z, True) for z in stages))]
        return self._shardings(asked, below_s)

    def _lean_programs(self) -> Iterator[Program]:
        """The cheapest sharding at prices of memory from so low that it is the fastest to so high that it holds least, with the most microbatches in flight."""
        flight = max(max(order.in_flight) for order in self.orders)
        problem = self.whole.in_flight(flight).problem
        fastest_s, num_bytes = evaluate(problem, self._cheapest(problem, 0.0, None, again=False))
        prices = [fastest_s / max(num_bytes, 1.0) * 4.0**n for n in LEAN_POWERS]
        return self._shardings([(flight, price, None, again) for price in prices for again in (False, True)])

    def _shardings(self, asked: Sequence[tuple[float, float, int | None, bool]], below_s: Callable[[], float] = lambda: math.inf) -> Iterator[Program]:
        """By (microbatches in flight, price, ZeRO, computed again), each once."""
        seen: set[tuple[int, ...]] = set()
        task, (_, ports) = self.task, self.built
        for flight, price, zero, again in asked:
            problem = self.whole.in_flight(flight).problem
            choices = self._cheapest(problem, price, zero, again=again)
            if choices in seen:
                continue
            seen.add(choices)
            if min(self._fastest_s(order, lambda relaxed, chosen=choices: relaxed.parts_of(chosen)) for order in self.orders) < below_s():
                yield decode(task.graph, task.rules, self.pricing, ports, self.whole.folded.unfolded(choices), self.keeping)

    def _cheapest(self, problem: SearchProblem, price: float, zero: int | None, *, again: bool) -> tuple[int, ...]:
        """The choices of a folded problem that cost least at this price of a byte, parameters with this stage of ZeRO as near as they have it (None:
        any). Blocks may be computed `again` where that pays; what is returned has them kept, as recomputation is decided later."""
        _, ports = self.built
        kept = [np.arange(node.num_states) for node in problem.nodes]
        for n in ports.param_node.values() if zero is not None else ():
            kept[self.whole.folded.node[n]] = _of_stage(ports.states[n], zero)
        blocks = {self.whole.folded.node[n] for n in ports.block_node.values()}
        for n in blocks if not again else ():
            kept[n] = np.array([0])
        nodes = tuple(Node(node.name, node.cost_s[k], node.memory_bytes[k]) for node, k in zip(problem.nodes, kept, strict=True))
        part = replace(problem, nodes=nodes, edges=tuple(_between(edge, kept[edge.u], kept[edge.v]) for edge in problem.edges))
        found = prepare(part, (SECONDS, BYTES)).minimise(Price(1.0, price)).choices
        return tuple([0 if n in blocks else int(k[c]) for n, (k, c) in enumerate(zip(kept, found, strict=True))])


def _of_stage(states: States, zero: int) -> np.ndarray:
    """Of the states of a parameter, for every layout those whose stage of ZeRO is nearest to this one."""
    stages = [z.stage if z else 0 for z in states.zeros]
    off = [(abs(stage - zero), stage) for stage in stages]
    nearest: dict[Layout, tuple[int, int]] = {}
    for layout, distance in zip(states.result_layouts[0], off, strict=True):
        nearest[layout] = min(distance, nearest.get(layout, distance))
    return np.array([n for n, layout in enumerate(states.result_layouts[0]) if off[n] == nearest[layout]])


def _between(edge: Edge, rows: np.ndarray, columns: np.ndarray) -> Edge:
    """An edge of these states alone."""
    chosen = np.ix_(rows, columns)
    return Edge(edge.u, edge.v, edge.cost_s[chosen], None if edge.memory_bytes is None else edge.memory_bytes[chosen])
