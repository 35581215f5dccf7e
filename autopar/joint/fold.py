"""Many equal blocks as one: of a graph with three of a run's blocks, the problem in which all blocks of the run are sharded alike.

The first and the last of the three stand for themselves, the second for all others. A decision that every block takes becomes one decision;
its costs are those of a block times how many there are. Between neighbours lie depth - 1 borders, of which the graph shows two. So the folded
problem costs every plan whose blocks are alike exactly what the problem of the whole depth does, and its bound is one on all such plans.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from autopar.core.columns import Edges, Nodes, Numbering, first_seen
from autopar.core.graph import DTYPE_BYTES, OpGraph
from autopar.core.problem import SearchProblem
from autopar.core.unroll import Run
from autopar.errors import UsageError
from autopar.planner.problem import Ports

SHOWN = 3
"""Blocks of a run that a short graph has."""

BORDER = -1
"""The place of what lies between two blocks of the run."""


def shown(run: Run) -> tuple[str, ...]:
    """The blocks that the short graph has."""
    return tuple(map(run.block, range(SHOWN)))


def times(run: Run, place: int | None) -> float:
    """How often there is in truth what lies at a `place`: in one of the three blocks, between two of them, or elsewhere (None)."""
    if place is None:
        return 1.0
    return (run.depth - 1) / (SHOWN - 1) if place == BORDER else (1.0, run.depth - 2.0, 1.0)[place]


def places(run: Run, graph: OpGraph) -> tuple[int | None, ...]:
    """The place of every operator."""
    numbers: list[int | None] = [None] * len(graph.ops)
    place = {block: n for n, block in enumerate(shown(run))}
    for segment in graph.segments:
        if segment.block in place:
            for i in segment.ops:
                numbers[i] = place[segment.block]
    return tuple(numbers)


def sides(run: Run, graph: OpGraph) -> tuple[int, ...]:
    """Of every operator whether it is in the run (0), before its first (1) or behind it (2)."""
    found = places(run, graph)
    first = next(i for i, place in enumerate(found) if place is not None)
    return tuple(0 if place is not None else 1 if i < first else 2 for i, place in enumerate(found))


def border_bytes(graph: OpGraph, run: Run) -> int:
    """What one block of the run makes for the next. What depends on no parameter a stage computes where it is read."""
    place = places(run, graph)
    made = (v for i, op in enumerate(graph.ops) if place[i] == 1 for v in op.operands if v in graph.producer and v in graph.searched)
    crossing = {v for v in made if place[graph.producer[v][0]] == 0}
    return sum(graph.values[v].meta.numel * DTYPE_BYTES[graph.values[v].meta.dtype] for v in crossing)


@dataclass(frozen=True)
class Folded:
    """`problem`, and the node in it of every node of the short graph's problem. `sides`: of its own nodes, as `Run.sides`; None: of several."""

    problem: SearchProblem
    node: tuple[int, ...]
    sides: tuple[int | None, ...]

    def nodes_of(self, side: int) -> tuple[int, ...]:
        return tuple(n for n, where in enumerate(self.sides) if where == side)

    def part(self, side: int) -> SearchProblem:
        """The decisions of one side alone: no plan pays less for them."""
        if side not in self._parts:
            self._parts[side] = self._part(side)
        return self._parts[side]

    @cached_property
    def _parts(self) -> dict[int, SearchProblem]:
        return {}

    def _part(self, side: int) -> SearchProblem:
        nodes, edges = self.problem.node_columns, self.problem.edge_columns
        kept = np.array(self.nodes_of(side), dtype=int)
        place = np.full(len(nodes), -1)
        place[kept] = np.arange(len(kept))
        u, v = place[edges.u], place[edges.v]
        inside = (u >= 0) & (v >= 0)
        of_nodes, of_edges = nodes.number[kept], edges.number[inside]
        (number, first), (across, first_across) = first_seen(of_nodes), first_seen(of_edges)
        return replace(self.problem, memory_limit_bytes=None, base_memory_bytes=0.0).derived(
            Nodes([nodes.names[n] for n in kept], number, [nodes.tables[n] for n in of_nodes[first]]),
            Edges(u[inside], v[inside], across, [edges.tables[n] for n in of_edges[first_across]]),
        )

    def unfolded(self, choices: Sequence[int]) -> tuple[int, ...]:
        """The choices of the short graph's problem."""
        return tuple([choices[n] for n in self.node])


class Unfoldable(UsageError):
    """Blocks that take different decisions cannot be folded."""


def fold(graph: OpGraph, run: Run, problem: SearchProblem, ports: Ports) -> Folded:
    """Raises Unfoldable where the three blocks differ in what they may do."""
    return Fold(graph, run, ports).folded(problem)


@dataclass
class Fold:
    """Which decisions are one, whatever they cost: problems that differ in the tables of edges share it. A cache, not a value."""

    graph: OpGraph
    run: Run
    ports: Ports
    _of_nodes: tuple[Nodes | None, Any] = (None, None)
    _of_edges: tuple[np.ndarray | None, Any] = (None, None)
    _products: dict[tuple[float, int], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @cached_property
    def of_op(self) -> tuple[int | None, ...]:
        return places(self.run, self.graph)

    @cached_property
    def local(self) -> Mapping[int, tuple[int, int]]:
        """(place, number) of the values that the blocks of the run hold; what one takes from another belongs to its maker."""
        found: dict[int, tuple[int, int]] = {}
        for segment, wiring in zip(self.graph.segments, self.graph.wirings):
            if segment.block in shown(self.run):
                place = shown(self.run).index(segment.block)
                for n, v in enumerate(wiring.values):
                    if v not in self.graph.producer or self.of_op[self.graph.producer[v][0]] == place:
                        found.setdefault(v, (place, n))
        return found

    def _place_of_value(self, v: int) -> int | None:
        """Where a value lies: in the only block that has to do with it, at the border between two, or elsewhere."""
        around = {self.of_op[i] for i, _ in self.graph.consumers[v]}
        made = self.graph.producer.get(v)
        if made is None:
            return around.pop() if len(around) == 1 and v not in self.graph.finals else None
        here = self.of_op[made[0]]
        if here is None or around <= {here}:
            return here
        return BORDER if around & ({0, 1, 2} - {here}) else here

    @cached_property
    def roles(self) -> tuple[tuple[int | None, tuple], ...]:
        """Per node its place, and a name that it shares with those that play its part in other blocks."""
        found: list[tuple[int | None, tuple]] = [(None, ("alone", n)) for n in range(len(self.ports.states))]
        starts = {segment.block: segment.ops.start for segment in self.graph.segments if segment.block in shown(self.run)}
        for i, node in self.ports.op_node.items():
            place = self.of_op[i]
            if place is not None:
                found[node] = (place, ("op", i - starts[shown(self.run)[place]]))
        for kind, nodes in (("param", self.ports.param_node), ("relay", self.ports.relay_node)):
            for v, node in nodes.items():
                place = self._place_of_value(v)
                if place is not None and v in self.local:
                    found[node] = (place, (kind, place == BORDER, self._leaves(v, place), self.local[v][1]))
        for name, node in self.ports.block_node.items():
            if name in shown(self.run):
                found[node] = (shown(self.run).index(name), ("block",))
        return tuple(found)

    def _leaves(self, v: int, place: int) -> bool:
        """Whether a block's value is handed on to what comes after the run."""
        return place != BORDER and any(self.of_op[i] != place for i, _ in self.graph.consumers[v])

    def _edge_times(self, u: int, v: int) -> float:
        found = {self.roles[u][0], self.roles[v][0]} - {None}
        return times(self.run, BORDER if len(found) > 1 or BORDER in found else found.pop() if found else None)

    @cached_property
    def node(self) -> tuple[int, ...]:
        number: dict[tuple, int] = {}
        return tuple([number.setdefault(name, len(number)) for _, name in self.roles])

    def folded(self, problem: SearchProblem) -> Folded:
        """Raises Unfoldable."""
        names, seconds, memory = map(list, self._nodes(problem.node_columns))
        edges, of_nodes, of_edges, known = problem.edge_columns, Numbering(), Numbering(), dict[tuple[int, float], int]()
        left, right, often = self._joined(edges)
        alike, first = first_seen((left * len(names) + right) * len(edges.tables) + edges.number)
        found = []
        for u, v, number, some in zip(left[first].tolist(), right[first].tolist(), edges.number[first].tolist(), np.bincount(alike, often).tolist()):
            cost_s, held = edges.tables[number]
            if u == v:
                seconds[u] = seconds[u] + some * np.diag(cost_s)
                memory[u] = memory[u] + (0.0 if held is None else np.diag(some * held))
                continue
            if (number, some) not in known:
                known[number, some] = of_edges.of(self._times(some, cost_s), None if held is None else self._times(some, held))
            found.append((u, v, known[number, some]))
        nodes = Nodes(names, np.array([of_nodes.of(*both) for both in zip(seconds, memory, strict=True)], dtype=int), of_nodes.tables)
        joined = Edges(*np.array(found, dtype=int).reshape(-1, 3).T, of_edges.tables)
        return Folded(problem.derived(nodes, joined), self.node, self._sides_of_nodes)

    def _nodes(self, nodes: Nodes) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
        """Names, seconds and bytes of what is folded. Problems that differ in their edges have the same nodes."""
        if nodes is not self._of_nodes[0]:
            self._of_nodes = nodes, self._folded_nodes(nodes)
        return self._of_nodes[1]

    def _folded_nodes(self, nodes: Nodes) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
        number = max(self.node, default=-1) + 1
        names, seconds, memory = [""] * number, [np.zeros(0)] * number, [np.zeros(0)] * number
        for new, old, (place, _) in zip(self.node, nodes, self.roles, strict=True):
            often = times(self.run, place)
            if names[new] and len(seconds[new]) != old.num_states:
                raise Unfoldable(f"{old.name} has {old.num_states} states, {names[new]} has {len(seconds[new])}")
            seconds[new] = often * old.cost_s + (seconds[new] if names[new] else 0.0)
            memory[new] = often * old.memory_bytes + (memory[new] if names[new] else 0.0)
            names[new] = names[new] or old.name
        return names, seconds, memory

    def _joined(self, edges: Edges) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every edge the folded nodes that it joins, and how often there is one. Problems that differ in their tables have the same ends."""
        if edges.u is not self._of_edges[0]:
            node, often = np.array(self.node, dtype=int), [self._edge_times(u, v) for u, v in zip(edges.u.tolist(), edges.v.tolist())]
            self._of_edges = edges.u, (node[edges.u], node[edges.v], np.array(often))
        return self._of_edges[1]

    def _times(self, often: float, table: np.ndarray) -> np.ndarray:
        """The product, once."""
        key = often, id(table)
        if key not in self._products:
            self._products[key] = table, often * table  # the table beside it: an id is only a name while its object lives
        return self._products[key][1]

    @cached_property
    def _sides_of_nodes(self) -> tuple[int | None, ...]:
        """Of those of the folded problem."""
        found: dict[int, int | None] = {}
        for new, where in zip(self.node, self._sides()):
            found[new] = where if found.get(new, where) == where else None
        return tuple([found[n] for n in range(len(found))])

    def _sides(self) -> list[int | None]:
        """Of every node of the short graph's problem."""
        of_op = sides(self.run, self.graph)
        found: list[int | None] = [None if place is None else 0 for place, _ in self.roles]
        for i, node in self.ports.op_node.items():
            found[node] = of_op[i]
        for nodes in (self.ports.param_node, self.ports.relay_node):
            for v, node in nodes.items():
                users = {of_op[i] for i, _ in self.graph.consumers[v]}
                if found[node] is None and len(users) == 1:
                    found[node] = users.pop() or None  # what only the run uses, but several blocks of it, is no part of one block
        return found
