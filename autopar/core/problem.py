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

from autopar.core.columns import Edge, Edges, Node, Nodes, without_faults
from autopar.errors import UsageError

PROOFS = ("exact", "bound", "budget")


@dataclass(frozen=True, slots=True, eq=False)
class SearchProblem:
    """Choose one state per node: least seconds, and at most `memory_limit_bytes` bytes where a limit is given.

    Parallel edges add up. Two edges may share arrays, in either orientation. `copies`: groups of repeated blocks as the nodes that play the same
    role in each, in the same order; a hint, which no result depends on. No node is in two of them. However nodes and edges are given, they are kept as columns.
    """

    nodes: Sequence[Node]
    edges: Sequence[Edge]
    memory_limit_bytes: float | None = None
    base_memory_bytes: float = 0.0
    copies: tuple[tuple[tuple[int, ...], ...], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", Nodes.of(self.nodes))
        object.__setattr__(self, "edges", Edges.of(self.edges))
        self.node_columns.check()
        self.edge_columns.check(self.node_columns)
        limit = self.memory_limit_bytes
        if limit is not None and not limit >= 0:
            raise UsageError(f"memory limit {limit!r} bytes is not a number >= 0; leave it None for no limit")
        if not 0 <= self.base_memory_bytes < math.inf:
            raise UsageError(f"base memory {self.base_memory_bytes!r} bytes is not a finite number >= 0")

    @property
    def node_columns(self) -> Nodes:
        return Nodes.of(self.nodes)

    @property
    def edge_columns(self) -> Edges:
        return Edges.of(self.edges)

    @property
    def limit_bytes(self) -> float:
        """The memory limit, inf where there is none."""
        return math.inf if self.memory_limit_bytes is None else self.memory_limit_bytes

    def fits(self, memory_bytes: float) -> bool:
        """Whether a plan that holds this many bytes, base included, is within the limit."""
        return memory_bytes <= self.limit_bytes

    def derived(self, nodes: Sequence[Node], edges: Sequence[Edge], copies: tuple[tuple[tuple[int, ...], ...], ...] = ()) -> "SearchProblem":
        """A problem of parts, sums and multiples of these tables: its numbers are sound where these are."""
        made = without_faults(Nodes.of(nodes), self.node_columns.faults), without_faults(Edges.of(edges), self.edge_columns.faults)
        return SearchProblem(*made, self.memory_limit_bytes, self.base_memory_bytes, copies)

    def in_flight(self, times: float, params: Set[int]) -> "SearchProblem":
        """The same with the activations of so many microbatches: all bytes `times` as many but those of the nodes of `params`."""
        return replace(self, nodes=self.node_columns.with_bytes(times, params), edges=self.edge_columns.with_bytes(times))


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
    nodes, edges = problem.node_columns, problem.edge_columns
    for name, size, state in zip(nodes.names, nodes.sizes.tolist(), choices, strict=True):
        if not 0 <= state < size:
            raise UsageError(f"node {name!r} has states 0..{size - 1}, not {state}")
    seconds, held = [], [problem.base_memory_bytes]
    for number, state in zip(nodes.number.tolist(), choices):
        cost_s, memory_bytes = nodes.tables[number]
        seconds.append(cost_s[state])
        held.append(memory_bytes[state])
    for number, u, v in zip(edges.number.tolist(), edges.u.tolist(), edges.v.tolist()):
        cost_s, moved_bytes = edges.tables[number]
        seconds.append(cost_s[choices[u], choices[v]])
        if moved_bytes is not None:
            held.append(moved_bytes[choices[u], choices[v]])
    return math.fsum(seconds), math.fsum(held)
