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
        nodes, edges = self.of_nodes(states), self.of_edges(states[self.u], states[self.v])
        return math.fsum([*nodes[0].tolist(), *edges[0].tolist()]), math.fsum([self.base_memory_bytes, *nodes[1].tolist(), *edges[1].tolist()])


def _by_table(number: np.ndarray, tables: Sequence[tuple[np.ndarray, Any]]) -> list[tuple[tuple[np.ndarray, Any], np.ndarray]]:
    """Every table that is used, and all that have it."""
    order = np.argsort(number, kind="stable")
    ends = np.bincount(number, minlength=len(tables)).cumsum()
    return [(table, members) for table, members in zip(tables, np.split(order, ends[:-1])) if len(members)] if tables else []
