"""In which order nodes are eliminated: cheapest table first, alike nodes together.

The work of eliminating a node is its number of states times those of its neighbours. Taking the least each time
(min-weight, the weighted min-degree rule) finds the optimum width on trees and series-parallel graphs and good ones
elsewhere. Ties go to the node class that appears first, then to the lower node number: with classes in front, all
copies of a repeated block go through the same steps side by side, which is what makes their tables meet in the store.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_NEIGHBOURS = 62
"""A numpy array has at most 64 axes; one more is that of the node itself."""


@dataclass(frozen=True, slots=True)
class Step:
    """Eliminate `node`; `neighbours` are those that remain at that time, ascending, and span its table."""

    node: int
    neighbours: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """Steps that eliminate every node but the `fixed` ones, and the entries of the largest table among the steps."""

    steps: tuple[Step, ...]
    fixed: tuple[int, ...]
    max_table_entries: int


def find_order(
    sizes: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    classes: Sequence[int],
    *,
    limit_entries: float = math.inf,
    reluctance: Sequence[int] | None = None,
) -> Order:
    """An order for nodes with these numbers of states, joined by `pairs`.

    Where every next table would exceed `limit_entries`, a node is taken out of the graph ("fixed": its state is taken
    as given) until one fits: of those with the least `reluctance` the one with the most work around it.
    """
    graph: list[set[int]] = [set() for _ in sizes]
    for u, v in pairs:
        graph[u].add(v)
        graph[v].add(u)
    entries = [size * math.prod([sizes[other] for other in around]) for size, around in zip(sizes, graph, strict=True)]
    work = [_work(table, len(around)) for table, around in zip(entries, graph, strict=True)]
    heap = [(work[node], classes[node], node) for node in range(len(sizes))]
    heapq.heapify(heap)
    alive = set(range(len(sizes)))
    steps: list[tuple[int, list[int]]] = []
    fixed: list[int] = []
    largest = 1
    while heap:
        least, _, node = heapq.heappop(heap)
        if node not in alive or least != work[node]:
            continue  # a newer entry of this node is in the heap
        fits = least // sizes[node] <= limit_entries
        if not fits:
            heapq.heappush(heap, (least, classes[node], node))
            node = min(alive, key=lambda n: (reluctance[n] if reluctance else 0, -work[n], n))
        around = graph[node]
        alive.discard(node)
        for other in around:
            near = graph[other]
            near.discard(node)
            table = entries[other] // sizes[node]
            for third in around if fits else ():
                if third != other and third not in near:
                    near.add(third)
                    table *= sizes[third]
            entries[other] = table
            now = _work(table, len(near))
            if now != work[other]:
                work[other] = now
                heapq.heappush(heap, (now, classes[other], other))
        if fits:
            steps.append((node, sorted(around)))
            largest = max(largest, least // sizes[node])
        else:
            fixed.append(node)
    given = set(fixed)  # a node can be fixed after it was a neighbour: its state is given from the start all the same
    ordered = tuple([Step(node, tuple([n for n in around if n not in given] if given else around)) for node, around in steps])
    return Order(ordered, tuple(sorted(fixed)), largest)


def _work(entries: int, num_neighbours: int) -> int:
    """Entries of the table; twice as many for every axis too many, so that a node of one state waits until it has fewer neighbours."""
    return entries if num_neighbours <= MAX_NEIGHBOURS else entries << num_neighbours - MAX_NEIGHBOURS
