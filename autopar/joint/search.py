"""Best first over all points: a bound from a roofline, a bound from the solved sharding, a bound under the memory limit, and at last a plan.

    1. `space.Ideal`      every operator cut evenly, nothing communicated: no tables are built
    2. the fastest        the folded problem solved without a memory limit, every bubble counted that no cut avoids
    3. the fastest that   the same under the memory limit, by the price of a byte
       may fit
    4. a plan             state sharding and recomputation by the liveness of the stages, the step by the schedule's lists

A point goes through these as long as its bound is the least of all; the search ends when the best plan is no more than `GAP` above every bound that is
left. What it returns is proven to that: no plan of the space, by these costs, is faster than `bound_s`.
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
from autopar.core.memory import MemoryUse
from autopar.core.problem import Edge, Node, SearchProblem, evaluate
from autopar.core.residency import RECOMPUTE
from autopar.core.rule import OpRule
from autopar.core.units import size
from autopar.errors import InfeasibleError
from autopar.joint.bounds import Line, Parts, least_step_s
from autopar.joint.deep import Deep, Sharding, even_depths, mixed
from autopar.joint.fold import Folded, Run, fold
from autopar.joint.kinds import in_flight
from autopar.joint.space import Ideal, Point, orders, points
from autopar.planner.blocks import Order
from autopar.planner.decode import decode
from autopar.planner.keeping import Keeping
from autopar.planner.liveness import Engine
from autopar.planner.pins import Pins
from autopar.planner.problem import Ports, ProblemBuilder
from autopar.planner.roles import Constraints, batch_factors
from autopar.planner.rulebook import rules_of
from autopar.planner.search import Options
from autopar.planner.states import Pricing
from autopar.program import Program
from autopar.search.elimination import prepare
from autopar.search.lagrange import price_memory
from autopar.search.simplify import BYTES, SECONDS, Price
from autopar.search.solve import solve

GAP = 0.01
"""A plan this near to the bound is near enough: the cost model is off by more."""

Graphs = Callable[[int], OpGraph]
"""The short graph of so many samples."""


@dataclass(frozen=True)
class Found:
    """A plan of a point."""

    point: Point
    deep: Deep

    @property
    def zero(self) -> int:
        """The highest stage of ZeRO of any parameter."""
        return max((z.stage for z in self.deep.light.program.residency.zero.values()), default=0)

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
        """Raises InfeasibleError where nothing fits."""
        start = time.perf_counter()
        ideal = Ideal(self.cluster, self.run)
        heap: list[tuple[float, int, int, PointSearch]] = []
        number = None if self.options.free_micro_batches else self.options.micro_batches
        for n, point in enumerate(points(self.cluster, self.batch, self.run.depth, self.pins, number)):
            search = PointSearch(self, point)
            heapq.heappush(heap, (search.ideal_s(ideal), 0, n, search))
        num_points, looked, found, closed = len(heap), [len(heap), 0, 0, 0], [], math.inf
        best = math.inf
        while heap and heap[0][0] < best * (1 - self.gap) and (not found or time.perf_counter() - start < self.options.time_limit_s):
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
            made = search.plan(best)
            if made is not None:
                found.append(made)
                best = min(best, made.step_s)
        if not found:
            raise InfeasibleError(
                f"none of {num_points} ways to lay {self.run.depth} blocks on {self.cluster.name} fits {size(self.limit_bytes)} of a device; "
                "use more nodes or devices with more memory, or a larger --max-memory"
            )
        left = heap[0][0] if heap else math.inf
        found.sort(key=lambda f: (f.step_s, f.point.num_ranks, f.point.inner))
        return Joint(tuple(found), min(closed, left, best), num_points, tuple(looked), left >= best * (1 - self.gap))

    @property
    def limit_bytes(self) -> float:
        return self.cluster.device.memory_bytes * self.options.memory_share

    def task(self, samples: int) -> "Task":
        if samples not in self._tasks:
            self._tasks[samples] = Task(self.graphs(samples))
        return self._tasks[samples]

    @cached_property
    def _tasks(self) -> dict[int, "Task"]:
        return {}


@dataclass(frozen=True, eq=False)
class Task:
    """A microbatch of the short graph, with its rules."""

    graph: OpGraph

    @cached_property
    def rules(self) -> tuple[OpRule, ...]:
        return tuple(rules_of(self.graph))

    @cached_property
    def batch(self) -> tuple[frozenset[int], ...]:
        return tuple(batch_factors(self.graph, self.rules))


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

    @cached_property
    def pricing(self) -> Pricing:
        return Pricing(self.joint.cluster, self.point.mesh, (self.point.num_ranks, 0))

    def ideal_s(self, ideal: Ideal) -> float:
        self.least_pass_s = ideal.seconds(self.task.graph, self.task.rules, self.point.outer * self.point.inner)
        self.ends_s = self.least_pass_s.times(self.point.num_microbatches)
        only = [Line(self.ends_s.block)]
        return self._step_bound_s(lambda order: [only] * order.num_ranks)

    def _step_bound_s(self, lines: Callable[[Order], Sequence[Sequence[Line]]]) -> float:
        depth = self.joint.run.depth
        return min((least_step_s(order, depth, lines(order), self.ends_s, self.least_pass_s) for order in self.orders), default=math.inf)

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
    def folded(self) -> Folded:
        problem, ports = self.built
        return fold(self.task.graph, self.joint.run, problem, ports)

    def fastest_s(self) -> float:
        """The bound without a memory limit."""
        block, first, last = (solve(self.folded.part(side), use_ilp="never").bound_s for side in range(3))
        self.ends_s = Parts(block / self.joint.run.depth, first, last)
        self.free = Line(self.ends_s.block)
        return self._step_bound_s(lambda order: [[self.free]] * order.num_ranks)

    def fitting_s(self) -> float:
        """The bound under the memory limit of every rank, by the linear model of memory; inf where not even that can be met."""
        return self._step_bound_s(lambda order: [[self.free, *self._priced(flight)] for flight in in_flight(order)])

    def _priced(self, flight: float) -> tuple[Line, ...]:
        """What a rank with so many microbatches in flight can do of the step, by the price of a byte; of fewer in flight, as a bound."""
        known = 2.0 ** (math.floor(2 * math.log2(flight)) / 2)
        if known not in self._lines:
            ranks, limit, depth = self.point.num_ranks, self.joint.limit_bytes, self.joint.run.depth
            try:
                found = price_memory(replace(self._in_flight(known).part(0), memory_limit_bytes=ranks * limit))
            except InfeasibleError:
                self._lines[known] = (Line(math.inf),)
            else:
                price = found.multiplier_s_per_byte
                self._lines[known] = (Line((found.bound_s + price * ranks * limit) / depth, price * limit, price),)
        return self._lines[known]

    @cached_property
    def _lines(self) -> dict[float, tuple[Line, ...]]:
        return {}

    def _in_flight(self, times: float) -> Folded:
        """The folded problem with the activations of so many microbatches of all stages."""
        problem, (_, ports) = self.folded.problem, self.built
        params = {self.folded.node[n] for n in ports.param_node.values()}
        nodes = tuple(node if n in params else replace(node, memory_bytes=times * node.memory_bytes) for n, node in enumerate(problem.nodes))
        edges = tuple(Edge(e.u, e.v, e.cost_s, None if e.memory_bytes is None else times * e.memory_bytes) for e in problem.edges)
        return replace(self.folded, problem=replace(problem, nodes=nodes, edges=edges))

    # --- plans -----------------------------------------------------------------------------------------------------------

    def plan(self, below_s: float) -> Found | None:
        """The best plan of the point that takes less than `below_s`: every sharding that may be best, every order, as little recomputation as fits."""
        best: Found | None = None
        for program in self._programs(lambda: best.step_s if best else below_s):
            modes = [mode for mode in RECOMPUTE if mode in self.keeping.recompute]
            sharding = Sharding.of(program, self.pricing, self.joint.run, Engine.of(self.joint.cluster), modes)
            light = sharding.modes[0][1]
            for order in self.orders:
                made = mixed(sharding, order, even_depths(light, order.num_stages), self.joint.limit_bytes, best.step_s if best else below_s)
                best = Found(self.point, made) if made is not None else best
        return best

    def _programs(self, below_s: Callable[[], float] = lambda: math.inf) -> Iterator[Program]:
        """The fastest sharding under every stage of ZeRO, and for every price of memory that the bound found those for any stage and for each, with
        blocks computed again or not; each once. Left out where its work, spread evenly over the pipeline, takes no less than `below_s`."""
        seen: set[tuple[int, ...]] = set()
        stages = self.keeping.stages
        asked = [(1.0, 0.0, zero, False) for zero in stages]
        for flight in sorted(self._lines):
            for line in self._lines[flight]:
                asked += [(flight, line.price, zero, again) for zero, again in ((None, False), (None, True), *((z, True) for z in stages)) if line.price]
        task, (_, ports) = self.task, self.built
        for flight, price, zero, again in asked:
            problem = self._in_flight(flight).problem
            choices = self._cheapest(problem, price, zero, again=again)
            seconds, _ = evaluate(problem, choices)
            if choices not in seen and seconds < self.point.num_ranks * below_s():
                seen.add(choices)
                yield decode(task.graph, task.rules, self.pricing, ports, self.folded.unfolded(choices), self.keeping)

    def _cheapest(self, problem: SearchProblem, price: float, zero: int | None, *, again: bool) -> tuple[int, ...]:
        """The choices of a folded problem that cost least at this price of a byte, parameters with this stage of ZeRO as near as they have it (None:
        any). Blocks may be computed `again` where that pays; what is returned has them kept, as recomputation is decided later."""
        _, ports = self.built
        kept = [np.arange(node.num_states) for node in problem.nodes]
        for n in ports.param_node.values() if zero is not None else ():
            stages = np.array([z.stage if z else 0 for z in ports.states[n].zeros])
            nearest = min(stages.tolist(), key=lambda stage: (abs(stage - zero), stage))
            kept[self.folded.node[n]] = np.flatnonzero(stages == nearest)
        blocks = {self.folded.node[n] for n in ports.block_node.values()}
        for n in blocks if not again else ():
            kept[n] = np.array([0])
        nodes = tuple(Node(node.name, node.cost_s[k], node.memory_bytes[k]) for node, k in zip(problem.nodes, kept, strict=True))
        part = replace(problem, nodes=nodes, edges=tuple(_between(edge, kept[edge.u], kept[edge.v]) for edge in problem.edges))
        found = prepare(part, (SECONDS, BYTES)).minimise(Price(1.0, price)).choices
        return tuple([0 if n in blocks else int(k[c]) for n, (k, c) in enumerate(zip(kept, found, strict=True))])


def _between(edge: Edge, rows: np.ndarray, columns: np.ndarray) -> Edge:
    """An edge of these states alone."""
    chosen = np.ix_(rows, columns)
    return Edge(edge.u, edge.v, edge.cost_s[chosen], None if edge.memory_bytes is None else edge.memory_bytes[chosen])
