"""A graph of cost tables, and its exact minimum along a given order of nodes.

Node x with neighbours N meets in the tables that mention x; minimising their sum over the states of x leaves one table
over N (for |N| = 1 a fold into the neighbour, for |N| = 2 MindSpore's operator elimination, beyond that bucket
elimination along a tree decomposition). Going back, every node takes its best state given its neighbours' states.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.search.order import Order, Step, find_order
from autopar.search.tables import Key, TableStore

Entry = tuple[int, tuple[int, ...]]  # table number, nodes of its axes


@dataclass(frozen=True, slots=True)
class CostGraph:
    """What is minimised: `unary[i]` of shape [k_i] and `pairs` (u, v, table [k_u, k_v]), at most one per pair of nodes."""

    unary: tuple[np.ndarray, ...]
    pairs: tuple[tuple[int, int, np.ndarray], ...]
    classes: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(table.shape[0] for table in self.unary)

    def value(self, choices: Sequence[int]) -> float:
        """The sum at the chosen states."""
        at_nodes = (table[choice] for table, choice in zip(self.unary, choices, strict=True))
        at_pairs = (table[choices[u], choices[v]] for u, v, table in self.pairs)
        return math.fsum([*at_nodes, *at_pairs])

    def order(self, limit_entries: float = math.inf, reluctance: Sequence[int] | None = None) -> Order:
        pairs = [(u, v) for u, v, _ in self.pairs]
        return find_order(self.sizes, pairs, self.classes, limit_entries=limit_entries, reluctance=reluctance)


@dataclass(frozen=True, slots=True)
class Forward:
    """What eliminating along some steps left behind: per step its key, the number of its table, and the minimum taken off it."""

    keys: tuple[Key, ...]
    tables: tuple[int, ...]
    constants: tuple[float, ...]


def eliminate_forward(store: TableStore, graph: CostGraph, steps: Sequence[Step]) -> Forward:
    """Eliminate the nodes of a graph one after the other; the optimum is the sum of the constants, inf if nothing is allowed."""
    tables_at = tables_by_node(store, graph)
    keys, tables, constants = [], [], []
    for step in steps:
        node, around = step.node, step.neighbours
        key = key_of(tables_at[node], node, around)
        number, lowest = store.eliminate(key)
        for other in around:
            tables_at[other] = [entry for entry in tables_at[other] if node not in entry[1]]
            tables_at[other].append((number, around))
        keys.append(key)
        tables.append(number)
        constants.append(lowest)
    return Forward(tuple(keys), tuple(tables), tuple(constants))


def run_steps(store: TableStore, graph: CostGraph, steps: Sequence[Step]) -> tuple[tuple[int, ...], float]:
    """(optimal choices, optimal value) of a graph whose nodes are all among the steps; the value is inf if nothing is allowed."""
    forward = eliminate_forward(store, graph, steps)
    choices = [0] * len(graph.unary)
    if not all(map(math.isfinite, forward.constants)):
        return tuple(choices), math.inf
    for step, key in zip(reversed(steps), reversed(forward.keys), strict=True):
        choices[step.node] = store.best_state(key, tuple([choices[other] for other in step.neighbours]))
    return tuple(choices), math.fsum(forward.constants)


def tables_by_node(store: TableStore, graph: CostGraph) -> list[list[Entry]]:
    """For each node the tables that mention it, with the nodes of their axes."""
    tables_at: list[list[Entry]] = [[(store.add(table), (i,))] for i, table in enumerate(graph.unary)]
    for u, v, table in graph.pairs:
        entry = store.add(table), (u, v)
        tables_at[u].append(entry)
        tables_at[v].append(entry)
    return tables_at


def key_of(entries: Sequence[Entry], node: int, around: Sequence[int]) -> Key:
    """The tables that meet in a node, with its role (0) and those of its neighbours (1, 2, ...) instead of node numbers."""
    role = {other: i for i, other in enumerate(around, start=1)}
    role[node] = 0
    return tuple(sorted([(table, tuple([role[n] for n in scope])) for table, scope in entries]))
