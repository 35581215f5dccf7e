"""What a point's plans may do and what that costs, whatever the limit of memory: the folded problem, its bounds, and the programs of its shardings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from autopar.core.layout import Layout
from autopar.core.problem import Edge, Node, SearchProblem
from autopar.core.residency import GATHER, gathers_again
from autopar.core.unroll import Run
from autopar.errors import InfeasibleError
from autopar.joint.asked import GATHERED, KEPT, Asked
from autopar.joint.bounds import Parts
from autopar.joint.deep import Sharding
from autopar.joint.fold import fold, places, sides, times
from autopar.joint.relaxed import Relaxed, passes_alone, with_gathers
from autopar.joint.space import Point
from autopar.planner.decode import decode
from autopar.planner.keeping import Keeping
from autopar.planner.lengths import Task
from autopar.planner.liveness import Engine
from autopar.planner.pins import Pins
from autopar.planner.problem import Ports, ProblemBuilder
from autopar.planner.roles import Constraints
from autopar.planner.states import Pricing, States
from autopar.search.elimination import prepare
from autopar.search.simplify import BYTES, SECONDS, Price


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

    @property
    def _forms(self) -> tuple[bool, ...]:
        """Whether blocks gather again what all-gathers bring, of all that they may do."""
        return tuple(sorted(set(map(gathers_again, self.keeping.programs))))

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
        ports, found = self.built[1], None
        for again in reversed(self._forms):
            folded = fold(self.task.graph, self.run, with_gathers(problem, ports.gathers, again=again), ports)
            params = frozenset(folded.node[n] for n in ports.param_node.values())
            modes = {folded.node[n]: tuple(_in_form(mode, again=again) for mode in ports.states[n].modes) for n in ports.block_node.values()}
            found = Relaxed(folded, params, self.run.depth, self.point.num_ranks, modes, found)
        assert found is not None
        return found

    def sharding(self, choices: tuple[int, ...]) -> Sharding:
        """Of these choices of the folded problem."""
        if choices not in self._shardings:
            task, ports = self.task, self.built[1]
            program = decode(task.graph, task.rules, self.pricing, ports, self.whole.folded.unfolded(choices), self.keeping)
            self._shardings[choices] = Sharding.of(program, self.pricing, self.run, Engine.of(self.pricing.cluster), self.keeping.programs)
        return self._shardings[choices]

    def cheapest(self, asked: Asked) -> tuple[int, ...] | None:
        """The choices of the folded problem that cost least; what is returned has blocks kept, as recomputation is decided later. None where none may be
        joined to what is fixed."""
        if asked not in self._cheapest:
            form = self.whole.leaner if asked.how == GATHERED and self.whole.leaner is not None else self.whole
            try:
                self._cheapest[asked] = self._free(form, asked) if asked.free else self._least(form.in_flight(asked.flight).problem, asked)
            except InfeasibleError:
                self._cheapest[asked] = None
        return self._cheapest[asked]

    def chosen(self, asking: Iterable[Asked]) -> list[tuple[int, ...]]:
        """The choices of each sharding, once."""
        return [choices for choices in dict.fromkeys(map(self.cheapest, asking)) if choices is not None]

    @cached_property
    def _cheapest(self) -> dict[Asked, tuple[int, ...] | None]:
        return {}

    def _free(self, form: Relaxed, asked: Asked) -> tuple[int, ...]:
        """Where all may be chosen."""
        prepared = form.prepared(asked.flight)
        found = prepared.shrunk.restore(prepared.minimise(Price(1.0, asked.price)).choices)
        return tuple([0 if n in form.modes else c for n, c in enumerate(found)])

    def _least(self, problem: SearchProblem, asked: Asked) -> tuple[int, ...]:
        _, ports = self.built
        kept, zero = [np.arange(node.num_states) for node in problem.nodes], asked.zero
        for n in ports.param_node.values() if zero is not None else ():
            kept[self.whole.folded.node[n]] = _of_stage(ports.states[n], zero)
        blocks = {self.whole.folded.node[n] for n in ports.block_node.values()}
        for n in blocks if asked.how == KEPT else ():
            kept[n] = np.array([0])
        if asked.fixed is not None:
            node, state = asked.fixed
            kept[node] = kept[node][kept[node] == state]
            if not len(kept[node]):
                raise InfeasibleError("the state is none of those that are left")
        nodes = tuple([Node(node.name, node.cost_s[k], node.memory_bytes[k]) for node, k in zip(problem.nodes, kept, strict=True)])
        part = replace(problem, nodes=nodes, edges=tuple([_between(edge, kept[edge.u], kept[edge.v]) for edge in problem.edges]))
        prepared = prepare(part, (SECONDS, BYTES))
        found = prepared.shrunk.restore(prepared.minimise(Price(1.0, asked.price)).choices)
        return tuple([0 if n in blocks else int(k[c]) for n, (k, c) in enumerate(zip(kept, found, strict=True))])


def _in_form(mode: str, *, again: bool) -> str:
    return mode + GATHER if again and not gathers_again(mode) else mode


def _of_stage(states: States, zero: int) -> np.ndarray:
    """Of the states of a parameter, for every layout those whose stage of ZeRO is nearest to this one."""
    stages = [z.stage if z else 0 for z in states.zeros]
    off = [(abs(stage - zero), stage) for stage in stages]
    nearest: dict[Layout, tuple[int, int]] = {}
    for layout, distance in zip(states.result_layouts[0], off, strict=True):
        nearest[layout] = min(distance, nearest.get(layout, distance))
    return np.array([n for n, layout in enumerate(states.result_layouts[0]) if off[n] == nearest[layout]])


def _between(edge: Edge, rows: Sequence[int] | np.ndarray, columns: Sequence[int] | np.ndarray) -> Edge:
    """An edge of these states alone."""
    chosen = np.ix_(rows, columns)
    return Edge(edge.u, edge.v, edge.cost_s[chosen], None if edge.memory_bytes is None else edge.memory_bytes[chosen])
