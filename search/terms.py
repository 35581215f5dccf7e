"""Seconds and bytes of whole plans, table by table instead of node by node: `evaluate` for those who ask often.

Nodes that share their tables are read with one numpy index, and so are edges. Sums are correctly rounded like those of
`evaluate`, so the two agree bit for bit.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from autopar.core.problem import SearchProblem

MANY = 8
"""Nodes or edges with one table, from which an index into it is faster than to read entry by entry."""


class Terms:
    """What the nodes and edges of one problem contribute to plans."""

    def __init__(self, problem: SearchProblem) -> None:
        self.base_memory_bytes = problem.base_memory_bytes
        nodes, edges = problem.node_columns, problem.edge_columns
        self.u, self.v = edges.u, edges.v
        self._nodes = _by_table(nodes.number, nodes.tables)
        self._edges = _by_table(edges.number, edges.tables)

    def of_nodes(self, states: np.ndarray) -> np.ndarray:
        """[2, nodes]: seconds and bytes of every node in its state."""
        terms = np.zeros((2, len(states)))
        for (cost_s, memory_bytes), members in self._nodes:
            terms[0, members] = cost_s[states[members]]
            terms[1, members] = memory_bytes[states[members]]
        return terms

    def of_edges(self, at_u: np.ndarray, at_v: np.ndarray) -> np.ndarray:
        """[2, edges]: seconds and bytes of every edge, given the states at its ends."""
        terms = np.zeros((2, len(at_u)))
        for (cost_s, memory_bytes), members in self._edges:
            pairs = at_u[members], at_v[members]
            terms[0, members] = cost_s[pairs]
            if memory_bytes is not None:
                terms[1, members] = memory_bytes[pairs]
        return terms

    @cached_property
    def least_bytes(self) -> float:
        """No plan holds less: every node and edge at its own least, whatever its neighbours do. Takes no search."""
        tables = [(memory_bytes, len(members)) for (_, memory_bytes), members in (*self._nodes, *self._edges)]
        return math.fsum([self.base_memory_bytes, *[table.min() * n for table, n in tables if table is not None]])

    def of_plan(self, choices: Sequence[int]) -> tuple[float, float]:
        """(seconds, bytes) of a plan, as `evaluate` gives them."""
        states = np.asarray(choices, dtype=int)
        chosen, (nodes, edges) = states.tolist(), self._few
        at_nodes = [(cost_s(chosen[n]), held(chosen[n])) for cost_s, held, n in nodes]
        at_edges = [(cost_s(chosen[u], chosen[v]), held(chosen[u], chosen[v]) if held is not None else 0.0) for cost_s, held, u, v in edges]
        seconds, held_bytes = [[pair[k] for pairs in (at_nodes, at_edges) for pair in pairs] for k in (0, 1)]
        held_bytes.append(self.base_memory_bytes)
        for tables, members in self._nodes:
            if len(members) >= MANY:
                _read(tables, (states[members],), seconds, held_bytes)
        for tables, members in self._edges:
            if len(members) >= MANY:
                _read(tables, (states[self.u[members]], states[self.v[members]]), seconds, held_bytes)
        return math.fsum(seconds), math.fsum(held_bytes)

    @cached_property
    def _few(self) -> tuple[list[tuple[Any, Any, int]], list[tuple[Any, Any, int, int]]]:
        """Of nodes and edges that share their tables with few: how to read their seconds and bytes, and where they are."""
        nodes = [(cost_s.item, held.item, n) for (cost_s, held), members in self._nodes if len(members) < MANY for n in members.tolist()]
        u, v = self.u.tolist(), self.v.tolist()
        edges = [
            (cost_s.item, None if held is None else held.item, u[n], v[n]) for (cost_s, held), members in self._edges if len(members) < MANY for n in members.tolist()
        ]
        return nodes, edges


def _read(tables: tuple[np.ndarray, Any], index: tuple[np.ndarray, ...], seconds: list[float], held_bytes: list[float]) -> None:
    """Adds what the tables say there."""
    cost_s, memory_bytes = tables
    seconds += cost_s[index].tolist()
    if memory_bytes is not None:
        held_bytes += memory_bytes[index].tolist()


def _by_table(number: np.ndarray, tables: Sequence[tuple[np.ndarray, Any]]) -> list[tuple[tuple[np.ndarray, Any], np.ndarray]]:
    """Every table that is used, and all that have it."""
    order = np.argsort(number, kind="stable")
    ends = np.bincount(number, minlength=len(tables)).cumsum()
    return [(table, members) for table, members in zip(tables, np.split(order, ends[:-1])) if len(members)] if tables else []
