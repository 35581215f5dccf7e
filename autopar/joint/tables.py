"""What a point's plans may do and what that costs, whatever the limit of memory: the folded problem, its bounds, and the programs of its shardings."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from autopar.core.layout import Layout
from autopar.core.problem import Edge, SearchProblem
from autopar.core.unroll import Run
from autopar.joint.bounds import Parts
from autopar.joint.deep import Sharding
from autopar.joint.fold import fold, places, sides, times
from autopar.joint.relaxed import Relaxed, passes_alone
from autopar.joint.space import Point
from autopar.planner.decode import decode
from autopar.planner.keeping import Keeping
from autopar.planner.lengths import Task
from autopar.planner.liveness import Engine
from autopar.planner.pins import Pins
from autopar.planner.problem import Ports, ProblemBuilder
from autopar.planner.roles import Constraints
from autopar.planner.states import Pricing, States
from autopar.search.elimination import Prepared, prepare
from autopar.search.simplify import BYTES, SECONDS, Price
from autopar.search.tables import TableStore

Asked = tuple[float, float, int | None, bool]
"""For the choices that cost least: microbatches in flight, price of a byte, stage of ZeRO (as near as a parameter has it; None: any), whether blocks may be
computed again."""


@dataclass
class PointTables:
    """Of one point on one cluster. A cache, not a value."""

    point: Point
    run: Run
    task: Task
    pricing: Pricing
    keeping: Keeping
    pins: Pins
    _shardings: dict[tuple[int, ...], Sharding] = field(default_factory=dict)

    @cached_property
    def built(self) -> tuple[SearchProblem, Ports]:
        constraints = Constraints(self.point.mesh, self.pins, strict=bool(self.pins.mesh_axes))
        return ProblemBuilder(self.task.graph, self.task.rules, self.task.batch, self.pricing, constraints, self.keeping).build(None)

    @cached_property
    def whole(self) -> Relaxed:
        """All that a step costs."""
        return self._relaxed(self.built[0])

    @cached_property
    def passes(self) -> Relaxed:
        """Only what its passes cost."""
        problem, ports = self.built
        return self._relaxed(passes_alone(problem, ports.once_s))

    @cached_property
    def operators(self) -> Parts:
        """What every operator takes of a step at least, whatever the links do: those with collectives inside are left out."""
        graph, rules, (problem, ports) = self.task.graph, self.task.rules, self.built
        place, side, found = places(self.run, graph), sides(self.run, graph), [0.0, 0.0, 0.0]
        for i, node in ports.op_node.items():
            if not rules[i].inner:
                found[side[i]] += times(self.run, place[i]) * float(problem.nodes[node].cost_s.min())
        return Parts(found[0] / self.run.depth, found[1], found[2])

    def _relaxed(self, problem: SearchProblem) -> Relaxed:
        ports = self.built[1]
        folded = fold(self.task.graph, self.run, problem, ports)
        params = frozenset(folded.node[n] for n in ports.param_node.values())
        return Relaxed(folded, params, self.run.depth, self.point.num_ranks)

    def sharding(self, choices: tuple[int, ...]) -> Sharding:
        """Of these choices of the folded problem."""
        if choices not in self._shardings:
            task, ports = self.task, self.built[1]
            program = decode(task.graph, task.rules, self.pricing, ports, self.whole.folded.unfolded(choices), self.keeping)
            self._shardings[choices] = Sharding.of(program, self.pricing, self.run, Engine.of(self.pricing.cluster), self.keeping.programs)
        return self._shardings[choices]

    def cheapest(self, asked: Sequence[Asked]) -> list[tuple[int, ...]]:
        """For each the choices of the folded problem that cost least. Blocks may be computed again where that is said and pays; what is returned has them
        kept, as recomputation is decided later."""
        store, shared = TableStore(), None
        for one in asked:
            flight, price, zero, again = one
            if one not in self._cheapest:
                prepared = self._prepared(flight, again=again)
                if (flight, price, again) != shared:
                    store, shared = prepared.store(Price(1.0, price)), (flight, price, again)
                found = prepared.shrunk.restore(prepared.minimise(Price(1.0, price), store, self._of_stage(zero)).choices)
                self._cheapest[one] = tuple([0 if n in self._block_nodes else c for n, c in enumerate(found)])
        return [self._cheapest[one] for one in asked]

    @cached_property
    def _cheapest(self) -> dict[Asked, tuple[int, ...]]:
        return {}

    def _prepared(self, flight: float, *, again: bool) -> Prepared:
        """The folded problem with so many microbatches in flight."""
        if again not in self._alone:
            folded = self.whole.folded.problem
            self._alone[again] = prepare(folded if again else _at_first(folded, self._block_nodes), (SECONDS, BYTES), apart=self.whole.params)
        alone = self._alone[again]
        return alone.with_bytes(alone.shrunk.problem.in_flight(flight, self.whole.params))

    @cached_property
    def _alone(self) -> dict[bool, Prepared]:
        """By whether blocks may be computed again, with one microbatch in flight."""
        return {}

    def _of_stage(self, zero: int | None) -> dict[int, np.ndarray]:
        """By parameter, for every layout the states whose stage of ZeRO is nearest to this one."""
        ports = self.built[1]
        return {} if zero is None else {self.whole.folded.node[n]: _nearest(ports.states[n], zero) for n in ports.param_node.values()}

    def in_modes(self, choices: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The same choices of the folded problem with blocks in every mode of recomputation."""
        nodes, problem = self._block_nodes, self.whole.folded.problem
        return tuple([tuple([mode if n in nodes else c for n, c in enumerate(choices)]) for mode in range(min([problem.nodes[n].num_states for n in nodes], default=1))])

    @cached_property
    def _block_nodes(self) -> frozenset[int]:
        """In the folded problem."""
        return frozenset(self.whole.folded.node[n] for n in self.built[1].block_node.values())


def _nearest(states: States, zero: int) -> np.ndarray:
    stages = [z.stage if z else 0 for z in states.zeros]
    off = [(abs(stage - zero), stage) for stage in stages]
    nearest: dict[Layout, tuple[int, int]] = {}
    for layout, distance in zip(states.result_layouts[0], off, strict=True):
        nearest[layout] = min(distance, nearest.get(layout, distance))
    return np.array([off[n] == nearest[layout] for n, layout in enumerate(states.result_layouts[0])])


def _at_first(problem: SearchProblem, decided: frozenset[int]) -> SearchProblem:
    """With nodes that are `decided` in their first state."""
    kept = [slice(0, 1) if n in decided else slice(None) for n in range(len(problem.nodes))]
    nodes = tuple([replace(node, cost_s=node.cost_s[k], memory_bytes=node.memory_bytes[k]) if n in decided else node for n, (node, k) in enumerate(zip(problem.nodes, kept))])
    edges = tuple([_between(edge, kept[edge.u], kept[edge.v]) if decided & {edge.u, edge.v} else edge for edge in problem.edges])
    return replace(problem, nodes=nodes, edges=edges)


def _between(edge: Edge, rows: slice, columns: slice) -> Edge:
    """An edge of these states alone."""
    return Edge(edge.u, edge.v, edge.cost_s[rows, columns], None if edge.memory_bytes is None else edge.memory_bytes[rows, columns])
