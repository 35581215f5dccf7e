"""The folded problem in parts, at prices of memory: what no plan of a point pays less for."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import numpy as np

from autopar.core.columns import Edges, Numbering
from autopar.core.problem import Edge, SearchProblem
from autopar.joint.bounds import Parts
from autopar.joint.envelope import Vertex
from autopar.joint.figures import Block, Figures
from autopar.joint.fold import Folded
from autopar.joint.near import Choosing
from autopar.planner.saved import Gathers
from autopar.search.elimination import Minimum, Prepared, prepare
from autopar.search.simplify import BYTES, SECONDS, Price
from autopar.search.solve import solve
from autopar.search.tables import Eliminated
from autopar.search.terms import Terms

T = TypeVar("T")

Allowed = tuple[tuple[int, tuple[int, ...]], ...]
"""Nodes of the folded problem, and the states that each of them may be in."""


@dataclass
class Relaxed:
    """Of a run of `depth` blocks; `params`, `modes`: nodes of the folded problem, those of modes with the names of their states. A cache, not
    a value.

    `leaner`: the form of the problem in which blocks gather again what all-gathers bring, where they may do that and keep it, which `lean` makes. `standing`: the share of the state
    that is there when most is kept.
    """

    folded: Folded
    params: frozenset[int]
    depth: int
    modes: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    lean: "Callable[[], Relaxed] | None" = None
    standing: float = 1.0
    eliminated: Eliminated = field(default_factory=Eliminated)
    """Without a price: of all problems of a point."""

    @cached_property
    def leaner(self) -> "Relaxed | None":
        return None if self.lean is None else self.lean()

    def ends(self) -> tuple[float, float]:
        """The least seconds of what is before and behind the run."""
        first, last = (solve(self.folded.part(side), use_ilp="never").bound_s for side in (1, 2))
        return first, last

    def end_bytes(self) -> tuple[float, float]:
        """No plan holds less of what is before and behind the run, of one microbatch: every table's least."""
        first, last = (self._least_bytes(self.folded.part(side), self.folded.nodes_of(side)) for side in (1, 2))
        return sum(first), sum(last)

    @cached_property
    def _block(self) -> Prepared:
        """All blocks alone, with the activations of one microbatch."""
        return prepare(self.folded.part(0), (SECONDS, BYTES), shared=self.eliminated, dtype=np.float32)

    def parts_of(self, choices: tuple[int, ...]) -> Parts:
        """Seconds of one sharding: of a block, and of what is before and behind the run."""
        block, first, last = (terms.of_plan([choices[n] for n in nodes])[0] for nodes, terms in self._terms)
        return Parts(block / self.depth, first, last)

    def figures(self, choices: tuple[int, ...]) -> Figures:
        """Of one sharding, whatever modes its blocks are in."""
        found: dict[str, Block] = {}
        for form in self.forms:
            nodes, terms = form._terms[0]
            for k, mode in enumerate(next(iter(form.modes.values()), ("none",))):
                states = np.array([k if node in form.modes else choices[node] for node in nodes])
                seconds, held = terms.of_plan(states)
                state = math.fsum(form.folded.problem.nodes[n].memory_bytes[s] for n, s in zip(nodes, states) if n in form.params)
                found[mode] = Block(seconds / self.depth, state * self.standing / self.depth, max(0.0, held - state) / self.depth)
        return Figures(found)

    @cached_property
    def _terms(self) -> tuple[tuple[tuple[int, ...], Terms], ...]:
        """The nodes of every side, and what they cost."""
        return tuple((self.folded.nodes_of(side), Terms(self.folded.part(side))) for side in range(3))

    @property
    def forms(self) -> "tuple[Relaxed, ...]":
        return (self,) if self.leaner is None else (self, self.leaner)

    def at(self, state_price: float, kept_price: float) -> Vertex:
        """What all blocks take at least in this form at these prices of a byte of their state, and of one that they keep of a microbatch in flight."""
        price = state_price * self.standing
        flight = kept_price / price if price else 1.0
        return self._vertex(self._in_flight(flight).minimise(Price(1.0, price)))

    @cached_property
    def least_bytes(self) -> tuple[float, float]:
        """No plan of the blocks has less state, or keeps less of a microbatch: every table's least."""
        return self._least_bytes(self._block.shrunk.problem, self.folded.nodes_of(0))

    def _least_bytes(self, problem: SearchProblem, nodes: Sequence[int]) -> tuple[float, float]:
        """Of the state, and kept: of a part whose nodes are these of the folded problem."""
        columns, edges = problem.node_columns, problem.edge_columns
        of_nodes = np.array([held.min() for _, held in columns.tables])[columns.number]
        of_edges = np.array([0.0 if held is None else held.min() for _, held in edges.tables])[edges.number]
        state = math.fsum(held for n, held in zip(nodes, of_nodes, strict=True) if n in self.params)
        return self.standing * state, math.fsum([*(held for n, held in zip(nodes, of_nodes) if n not in self.params), *of_edges])

    def _vertex(self, found: Minimum) -> Vertex:
        seconds, held = self._block.terms.of_plan(found.choices)
        nodes = self._block.shrunk.problem.node_columns
        state = math.fsum(nodes.tables[nodes.number[n]][1][found.choices[n]] for n in self._block_params)
        figures = seconds, state * self.standing, max(0.0, held - state)
        return Vertex(found.bound, *figures, self._choosing.near(found.choices, figures))

    @cached_property
    def _choosing(self) -> Choosing:
        """Parameters and modes of blocks."""
        modes = (n for n, node in enumerate(self.folded.nodes_of(0)) if node in self.modes)
        return Choosing(self._block.shrunk.problem, (*self._block_params, *modes), self._block_params, self.standing)

    @cached_property
    def _block_params(self) -> frozenset[int]:
        return frozenset(n for n, node in enumerate(self.folded.nodes_of(0)) if node in self.params)

    def _in_flight(self, flight: float) -> Prepared:
        """The blocks with so many microbatches in flight."""
        return self._block if flight == 1 else self._block.with_bytes(self._block.shrunk.problem.in_flight(flight, self._block_params))

    def where(self, states: Allowed) -> "Relaxed":
        """This form where nodes may be in these of their states alone."""
        return replace(self, folded=replace(self.folded, problem=in_states(self.folded.problem, {n: np.array(some) for n, some in states})), lean=None)

    def bytes_at(self, state_price: float, kept_price: float) -> dict[int, float]:
        """Of what blocks choose at these prices, but for modes: what each node takes of the state, or of what a microbatch keeps."""
        choices = self._in_flight(kept_price / state_price).minimise(Price(1.0, state_price)).choices
        nodes = self._block.shrunk.problem.nodes
        return {n: float(nodes[k].memory_bytes[choices[k]]) for k, n in enumerate(self.folded.nodes_of(0)) if n not in self.modes}

    @cached_property
    def _flights(self) -> dict[float, Folded]:
        return {}

    def in_flight(self, times: float) -> Folded:
        """The folded problem with the activations of so many microbatches of all stages."""
        if times not in self._flights:
            self._flights[times] = replace(self.folded, problem=self.folded.problem.in_flight(times, self.params))
        return self._flights[times]


def passes_alone(problem: SearchProblem, once_s: Mapping[int, np.ndarray]) -> SearchProblem:
    """A problem without the seconds that its edges cost `once_s` a step."""
    return _with_tables(problem, once_s, lambda cost_s, held, once: ((cost_s - once).clip(min=0.0), held))


def with_gathers(problem: SearchProblem, gathers: Mapping[int, Gathers], *, again: bool) -> SearchProblem:
    """A problem in which what all-gathers bring is kept, or not kept but gathered again for the backward."""

    def formed(cost_s: np.ndarray, _: np.ndarray | None, found: Gathers) -> Table:
        if not again:
            return cost_s, found.kept_bytes
        again_s, again_bytes = found.again
        return cost_s + again_s, again_bytes

    return _with_tables(problem, gathers, formed)


Table = tuple[np.ndarray, np.ndarray | None]


def _with_tables(problem: SearchProblem, by_edge: Mapping[int, T], made: Callable[[np.ndarray, np.ndarray | None, T], Table]) -> SearchProblem:
    """With seconds and bytes of some edges `made` of what they were. Edges that were alike are."""
    edges, found, known = problem.edge_columns, Numbering(), dict[tuple[int, int], int]()
    numbers = []
    for n, number in enumerate(edges.number.tolist()):
        what = by_edge.get(n)
        if (key := (number, id(what))) not in known:
            known[key] = found.of(*(edges.tables[number] if what is None else made(*edges.tables[number], what)))
        numbers.append(known[key])
    return problem.derived(problem.nodes, Edges(edges.u, edges.v, np.array(numbers, dtype=int), found.tables))


def in_states(problem: SearchProblem, states: Mapping[int, np.ndarray]) -> SearchProblem:
    """With these states alone of some nodes, numbered anew."""
    nodes = tuple([replace(node, cost_s=node.cost_s[states[n]], memory_bytes=node.memory_bytes[states[n]]) if n in states else node for n, node in enumerate(problem.nodes)])
    edges = tuple([_between(edge, states) if edge.u in states or edge.v in states else edge for edge in problem.edges])
    return replace(problem, nodes=nodes, edges=edges)


def _between(edge: Edge, states: Mapping[int, np.ndarray]) -> Edge:
    """An edge of these states alone."""
    rows, columns = (states.get(end, np.arange(size)) for end, size in zip((edge.u, edge.v), edge.cost_s.shape))
    return Edge(edge.u, edge.v, *(None if table is None else table[np.ix_(rows, columns)] for table in (edge.cost_s, edge.memory_bytes)))
