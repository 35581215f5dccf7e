"""Where costs and search meet: one table of numbers per operator and one per pair of operators.

A problem is a graph. Node i is a decision with k_i states; choosing state s costs `nodes[i].cost_s[s]` seconds and
holds `nodes[i].memory_bytes[s]` bytes. An edge prices a pair of states (resharding between two operators). The cost
of a plan is the sum over nodes and edges at the chosen states, its memory is `base_memory_bytes` plus the same kind
of sum, and `evaluate` is the one definition of both.

A state that is illegal is left out of its node. A pair that is illegal has no place to be left out of a matrix, so
it is `inf` in the edge's `cost_s`, and nowhere else: `inf` is absorbing under + and min, so such a pair is never
chosen and no number has to be "big enough". Everything else is finite and not negative.

Arrays may be shared, and should be: where the same array object prices an operator in each of 32 layers, the search
sees that the layers are alike and solves one of them.
"""

import math
import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from autopar.errors import UsageError

PROOFS = ("exact", "bound", "budget")


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One decision: seconds and bytes of each of its k states, both of shape [k], finite, not negative."""

    name: str
    cost_s: np.ndarray
    memory_bytes: np.ndarray

    @property
    def num_states(self) -> int:
        return len(self.cost_s)


@dataclass(frozen=True, slots=True, eq=False)
class Edge:
    """Seconds of each pair of states of nodes u and v, shape [k_u, k_v]; `inf` forbids the pair.

    `memory_bytes` has the same shape and is finite; None stands for zero bytes everywhere.
    """

    u: int
    v: int
    cost_s: np.ndarray
    memory_bytes: np.ndarray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SearchProblem:
    """Choose one state per node: least seconds, and at most `memory_limit_bytes` bytes where a limit is given.

    Parallel edges add up. Two edges may share arrays, in either orientation. `copies`: groups of repeated blocks as the nodes that play the same
    role in each, in the same order; a hint, which no result depends on. No node is in two of them.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    memory_limit_bytes: float | None = None
    base_memory_bytes: float = 0.0
    copies: tuple[tuple[tuple[int, ...], ...], ...] = ()

    def __post_init__(self) -> None:
        sizes = [len(node.cost_s) if node.cost_s.ndim else 0 for node in self.nodes]
        num = len(sizes)
        for u, v in [(e.u, e.v) for e in self.edges if not (0 <= e.u < num and 0 <= e.v < num) or e.u == e.v]:
            raise UsageError(f"edge ({u}, {v}) does not join two different nodes of 0..{num - 1}")
        # arrays are shared by many layers: look into each combination once
        for node in {(id(node.cost_s), id(node.memory_bytes)): node for node in reversed(self.nodes)}.values():
            _check_node(node)
        for edge in {(id(e.cost_s), id(e.memory_bytes), sizes[e.u], sizes[e.v]): e for e in reversed(self.edges)}.values():
            _check_edge(edge, self.nodes)
        limit = self.memory_limit_bytes
        if limit is not None and not limit >= 0:
            raise UsageError(f"memory limit {limit!r} bytes is not a number >= 0; leave it None for no limit")
        if not 0 <= self.base_memory_bytes < math.inf:
            raise UsageError(f"base memory {self.base_memory_bytes!r} bytes is not a finite number >= 0")

    @property
    def limit_bytes(self) -> float:
        """The memory limit, inf where there is none."""
        return math.inf if self.memory_limit_bytes is None else self.memory_limit_bytes

    def fits(self, memory_bytes: float) -> bool:
        """Whether a plan that holds this many bytes, base included, is within the limit."""
        return memory_bytes <= self.limit_bytes

    def in_flight(self, times: float, params: Set[int]) -> "SearchProblem":
        """The same with the activations of so many microbatches: all bytes `times` as many but those of the nodes of `params`."""
        known: dict[int, np.ndarray] = {}

        def more(table: np.ndarray) -> np.ndarray:
            return known.setdefault(id(table), times * table)

        nodes = tuple([node if n in params else replace(node, memory_bytes=more(node.memory_bytes)) for n, node in enumerate(self.nodes)])
        edges = tuple([e if e.memory_bytes is None else replace(e, memory_bytes=more(e.memory_bytes)) for e in self.edges])
        return replace(self, nodes=nodes, edges=edges)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """A plan, what it costs, and a proof of how good it is: no feasible plan costs less than `bound_s` seconds.

    `proof` is "exact" where cost and bound meet, "bound" where a gap is left, "budget" where the time ran out first.
    `multiplier_s_per_byte` is the price of memory: seconds that one more byte of limit would save at the margin.
    """

    choices: tuple[int, ...]
    cost_s: float
    memory_bytes: float
    bound_s: float
    solver: str
    multiplier_s_per_byte: float = 0.0
    proof: str = "exact"

    def __post_init__(self) -> None:
        if self.proof not in PROOFS:
            raise UsageError(f"proof {self.proof!r} is not one of {', '.join(PROOFS)}")

    @property
    def gap(self) -> float:
        """(cost - bound) / cost: at most this fraction of the cost could still be saved."""
        return max(0.0, self.cost_s - self.bound_s) / max(self.cost_s, sys.float_info.min)


def evaluate(problem: SearchProblem, choices: Sequence[int]) -> tuple[float, float]:
    """(seconds, bytes) of the plan that gives node i the state `choices[i]`; seconds are inf for a forbidden pair.

    Sums are correctly rounded, so they depend neither on the order of nodes nor on the solver that made the plan.
    """
    if len(choices) != len(problem.nodes):
        raise UsageError(f"{len(choices)} choices were given for {len(problem.nodes)} nodes")
    for node, state in zip(problem.nodes, choices, strict=True):
        if not 0 <= state < len(node.cost_s):
            raise UsageError(f"node {node.name!r} has states 0..{node.num_states - 1}, not {state}")
    seconds = [node.cost_s[state] for node, state in zip(problem.nodes, choices)]
    held = [problem.base_memory_bytes, *[node.memory_bytes[state] for node, state in zip(problem.nodes, choices)]]
    seconds += [edge.cost_s[choices[edge.u], choices[edge.v]] for edge in problem.edges]
    held += [edge.memory_bytes[choices[edge.u], choices[edge.v]] for edge in problem.edges if edge.memory_bytes is not None]
    return math.fsum(seconds), math.fsum(held)


def _check_node(node: Node) -> None:
    shape = node.cost_s.shape
    if len(shape) != 1 or shape[0] == 0:
        raise UsageError(f"node {node.name!r}: cost_s has shape {shape}; it needs one axis with at least one state")
    if node.memory_bytes.shape != shape:
        raise UsageError(f"node {node.name!r}: memory_bytes has shape {node.memory_bytes.shape}, cost_s has {shape}")
    _check_values(node.cost_s, f"node {node.name!r}: cost_s", inf_allowed=False)
    _check_values(node.memory_bytes, f"node {node.name!r}: memory_bytes", inf_allowed=False)


def _check_edge(edge: Edge, nodes: tuple[Node, ...]) -> None:
    u, v = nodes[edge.u], nodes[edge.v]
    shape = u.num_states, v.num_states
    for label, table in (("cost_s", edge.cost_s), ("memory_bytes", edge.memory_bytes)):
        if table is None:
            continue
        where = f"edge {u.name!r} -> {v.name!r}: {label}"
        if table.shape != shape:
            raise UsageError(f"{where} has shape {table.shape}, its nodes have {shape} states")
        _check_values(table, where, inf_allowed=label == "cost_s")


def _check_values(table: np.ndarray, where: str, *, inf_allowed: bool) -> None:
    if table.dtype.kind not in "fiu":
        raise UsageError(f"{where} has dtype {table.dtype}; it needs real numbers")
    lowest, highest = table.min(), table.max()  # both are nan where any entry is
    if not lowest >= 0:
        raise UsageError(f"{where} holds {lowest}; entries are numbers >= 0")
    if highest == math.inf and not inf_allowed:
        raise UsageError(f"{where} holds inf; leave an illegal state out instead (only edge costs may be inf)")
