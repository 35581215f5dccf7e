"""All plans that differ from one in what its parameters and its modes choose alone: the cheapest of them at any price takes no elimination.

Where operators stay in their states, how the state of each parameter is kept costs what it costs whatever others do, and so does the mode in which blocks are
computed again. So the price that binds is looked for among all of these, and fewer minima are needed until it is found.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.core.problem import SearchProblem

Figure = tuple[float, float, float]
"""Seconds, bytes of state, and bytes that a microbatch in flight keeps."""


@dataclass(frozen=True, eq=False)
class Near:
    """`rest`: what does not choose. `options`: [option, figure] of one node after the other, `first`: where those of each begin."""

    rest: np.ndarray
    options: np.ndarray
    first: np.ndarray

    def cheapest(self, face: np.ndarray) -> np.ndarray:
        """The figures of the plan that costs least at these prices of a second and of bytes."""
        ends = [*self.first[1:].tolist(), len(self.options)]
        costs = self.options @ face
        chosen = [begin + int(costs[begin:end].argmin()) for begin, end in zip(self.first.tolist(), ends)]
        return self.rest + self.options[chosen].sum(axis=0)

    def least(self, face: np.ndarray) -> float:
        """What it costs."""
        return float(self.rest @ face + np.minimum.reduceat(self.options @ face, self.first).sum()) if len(self.first) else float(self.rest @ face)


class Choosing:
    """Nodes of a problem that choose alone: what they may, given the states of others. Of two that are joined the first. `params`: those whose bytes are state."""

    def __init__(self, problem: SearchProblem, nodes: Iterable[int], params: Iterable[int], standing: float) -> None:
        self._nodes, self._edges, self._standing = problem.node_columns, problem.edge_columns, standing
        self._params = frozenset(params)
        ends, of_them = list(zip(self._edges.u.tolist(), self._edges.v.tolist())), set(nodes)
        joined = {max(pair) for pair in ends if of_them.issuperset(pair)}
        self._joined: dict[int, list[tuple[int, int, bool]]] = {node: [] for node in sorted(of_them - joined)}
        for (u, v), number in zip(ends, self._edges.number.tolist()):
            for node, other, turned in ((u, v, False), (v, u, True)):
                if node in self._joined:
                    self._joined[node].append((number, other, turned))

    def near(self, choices: Sequence[int], figures: Figure) -> Near:
        """Of a plan."""
        rest, options = np.array(figures), []
        for node in self._joined:
            found = self._options(node, choices)
            rest = rest - found[choices[node]]
            options.append(_least(found))
        sizes = [len(found) for found in options]
        return Near(rest, np.concatenate([*options, np.zeros((0, 3))]), np.cumsum([0, *sizes[:-1]]) if sizes else np.zeros(0, dtype=int))

    def _options(self, node: int, choices: Sequence[int]) -> np.ndarray:
        cost_s, held = self._nodes.tables[self._nodes.number[node]]
        param = node in self._params
        found = np.stack([cost_s, self._standing * held if param else np.zeros_like(held), np.zeros_like(held) if param else held], axis=1)
        for number, other, turned in self._joined[node]:
            for figure, table in zip((0, 2), self._edges.tables[number]):
                if table is not None:
                    found[:, figure] += table[choices[other]] if turned else table[:, choices[other]]
        return found


def _least(options: np.ndarray) -> np.ndarray:
    """Without those that another is no more than in any figure."""
    found = options[np.lexsort(options.T[::-1])]
    found = found[: int(np.isfinite(found[:, 0]).sum())]
    if (found[:, 2] == found[0, 2]).all():
        less = np.minimum.accumulate(found[:, 1])
        return found[np.concatenate([[True], less[1:] < less[:-1]])]
    under = (found[:, None] <= found).all(axis=2)
    return found[~np.triu(under, 1).any(axis=0)]
