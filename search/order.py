"""In which order nodes are eliminated: cheapest table first, alike nodes together.

The work of eliminating a node is its number of states times those of its neighbours. Taking the least each time
(min-weight, the weighted min-degree rule) finds the optimum width on trees and series-parallel graphs and good ones
elsewhere. Ties go to the node class that appears first, then to the lower node number: with classes in front, all
copies of a repeated block go through the same steps side by side, which is what makes their tables meet in the store.

Where copies are known beforehand (`copies.py`), what is inside them and has few neighbours goes first, in an order that is
found for one copy and repeated for the others.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from autopar.core.columns import Edges
from autopar.search.copies import Alike

MAX_NEIGHBOURS = 62
"""A numpy array has at most 64 axes; one more is that of the node itself."""

FEW_NEIGHBOURS = 2
"""Up to here eliminating a node makes no graph wider, wherever in the order it comes."""

GONE = -1


@dataclass(frozen=True, slots=True)
class Step:
    """Eliminate `node`; `neighbours` are those that remain at that time and span its table, ascending (in a copy: as in the first)."""

    node: int
    neighbours: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Repeated:
    """Steps that are alike in all of these copies: (role of the node that goes, roles of its neighbours), role r of a copy being its node `copy[r]`."""

    copies: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[int, tuple[int, ...]], ...]

    def of(self, copy: tuple[int, ...]) -> list[Step]:
        return [Step(copy[role], tuple([copy[r] for r in around])) for role, around in self.steps]


@dataclass(frozen=True)
class Order:
    """Steps that eliminate every node but the `fixed` ones: first what repeats in copies, then the `rest`. `max_table_entries`: of the largest table among
    them."""

    repeats: tuple[Repeated, ...]
    rest: tuple[Step, ...]
    fixed: tuple[int, ...]
    max_table_entries: int

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """One after the other, copy by copy."""
        return (*[step for run in self.repeats for copy in run.copies for step in run.of(copy)], *self.rest)

    @property
    def copied(self) -> list[int]:
        """Nodes that go as those of a first copy did."""
        return [copy[role] for run in self.repeats for copy in run.copies[1:] for role, _ in run.steps]

    @property
    def num_steps(self) -> int:
        return sum(len(run.steps) * len(run.copies) for run in self.repeats) + len(self.rest)


def find_order(
    sizes: Sequence[int],
    pairs: Iterable[tuple[int, int]],
    classes: Sequence[int],
    *,
    limit_entries: float = math.inf,
    reluctance: Sequence[int] | None = None,
) -> Order:
    """An order for nodes with these numbers of states, joined by `pairs`.

    Where every next table would exceed `limit_entries`, a node is taken out of the graph ("fixed": its state is taken
    as given) until one fits: of those with the least `reluctance` the one with the most work around it.
    """
    ordering = _Ordering(sizes, classes, _joined(len(sizes), pairs), limit_entries)
    fixed = ordering.eliminate(range(len(sizes)), reluctance)
    given = set(fixed)  # a node can be fixed after it was a neighbour: its state is given from the start all the same
    ordered = tuple([Step(node, tuple([n for n in around if n not in given]) if given else around) for node, around in ordering.steps])
    return Order((), ordered, tuple(sorted(fixed)), ordering.largest)


def find_order_of_copies(sizes: Sequence[int], edges: Edges, classes: Sequence[int], copies: Sequence[Alike]) -> Order:
    """The same where copies are known. Of what is inside them only the first is looked at."""
    within, number = np.full(len(sizes), -1), 0
    for group in copies:
        others = np.array(group.copies[1:])
        within[others] = np.arange(number, number + len(others))[:, None]
        number += len(others)
    looked_at = (within[edges.u] != within[edges.v]) | (within[edges.u] < 0)
    graph = _joined(len(sizes), zip(edges.u[looked_at].tolist(), edges.v[looked_at].tolist()))
    ordering = _Ordering(sizes, classes, graph, math.inf)
    repeats = tuple([run for group in copies if (run := ordering.repeat(group)).steps])
    ordering.eliminate(range(len(sizes)))
    return Order(repeats, tuple([Step(*step) for step in ordering.steps]), (), ordering.largest)


def _joined(num_nodes: int, pairs: Iterable[tuple[int, int]]) -> list[set[int]]:
    graph: list[set[int]] = [set() for _ in range(num_nodes)]
    for u, v in pairs:
        graph[u].add(v)
        graph[v].add(u)
    return graph


@dataclass
class _Ordering:
    """A graph that loses its nodes one by one; `steps` are (node, its neighbours then)."""

    sizes: Sequence[int]
    classes: Sequence[int]
    graph: list[set[int]]
    limit_entries: float
    steps: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    work: dict[int, int] = field(default_factory=dict)
    largest: int = 1

    def eliminate(self, nodes: Iterable[int], reluctance: Sequence[int] | None = None) -> list[int]:
        """Eliminate those of these nodes that are there, the least work first; returns those that were fixed instead."""
        sizes, classes, work, fixed = self.sizes, self.classes, self.work, []
        heap = []
        for node in nodes:
            if work.get(node) != GONE:
                work[node] = self._work(node)
                heap.append((work[node], classes[node], node))
        heapq.heapify(heap)
        while heap:
            least, _, node = heapq.heappop(heap)
            if least != work[node]:
                continue  # gone, or a newer entry of this node is in the heap
            fits = least // sizes[node] <= self.limit_entries
            if not fits:
                heapq.heappush(heap, (least, classes[node], node))
                left = (n for n, amount in work.items() if amount != GONE)
                node = min(left, key=lambda n: (reluctance[n] if reluctance else 0, -work[n], n))
                fixed.append(node)
            for other in self._remove(node, joined=fits):
                now = self._work(other)
                if now != work[other]:
                    work[other] = now
                    heapq.heappush(heap, (now, classes[other], other))
        return fixed

    def repeat(self, group: Alike) -> Repeated:
        """Eliminate what is inside copies and has few neighbours. The graph need not have the edges inside further copies."""
        start, first, sizes = len(self.steps), group.copies[0], self.sizes
        inner = {first[k] for k in group.inner}
        heap = [(self._work(node), self.classes[node], node) for node in inner]
        heapq.heapify(heap)
        while heap:
            least, _, node = heapq.heappop(heap)
            if self.work.get(node) == GONE or least != self._work(node):
                continue
            if len(self.graph[node]) > FEW_NEIGHBOURS or least // sizes[node] > self.limit_entries:
                continue  # it comes again when it has fewer
            for other in self._remove(node, joined=True):
                if other in inner:
                    heapq.heappush(heap, (self._work(other), self.classes[other], other))
        found, role = self.steps[start:], {node: k for k, node in enumerate(first)}
        del self.steps[start:]
        steps = tuple([(role[node], tuple([role[n] for n in around])) for node, around in found])
        gone = [k for k, _ in steps]
        stays = [k for k in range(len(first)) if self.work.get(first[k]) != GONE]
        near = [[role[n] for n in self.graph[first[k]] if n in role] for k in stays]
        for copy in group.copies[1:]:
            self.work.update([(copy[k], GONE) for k in gone])
            mine = set(copy)
            for k, others in zip(stays, near, strict=True):
                self.graph[copy[k]] = {n for n in self.graph[copy[k]] if n not in mine}.union([copy[n] for n in others])
        return Repeated(group.copies, steps)

    def _remove(self, node: int, *, joined: bool) -> set[int]:
        """Take a node out of the graph, in a step that joins its neighbours or by fixing it; its neighbours."""
        graph, around = self.graph, self.graph[node]
        if joined:
            self.largest = max(self.largest, math.prod([self.sizes[n] for n in around]))
            self.steps.append((node, tuple(sorted(around))))
        self.work[node] = GONE
        for other in around:
            if joined and len(around) > 1:
                graph[other] |= around
                graph[other].discard(other)
            graph[other].discard(node)
        return around

    def _work(self, node: int) -> int:
        """Entries of the table of a node and its neighbours; twice as many for every axis too many, so that a node of one state waits until it
        has fewer neighbours."""
        around = self.graph[node]
        entries = self.sizes[node] * math.prod([self.sizes[n] for n in around])
        return entries if len(around) <= MAX_NEIGHBOURS else entries << len(around) - MAX_NEIGHBOURS
