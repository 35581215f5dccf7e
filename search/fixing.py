"""Which states and pairs can still be part of a better plan than the best one known: most cannot.

At a price p of memory let V be the least cost + p * bytes of any plan, and V(s) the least of the plans in which a node is
in state s. Every plan within the limit that uses s costs at least bound + V(s) - V, where bound = V - p * limit; if
that exceeds the cost of a known plan, s can go (reduced-cost fixing, with exact min-marginals for reduced costs). The
same holds for the pair of states of an edge. With a duality gap of 0.1 % this leaves a small fraction of the states,
which is what brings large problems within reach of CP-SAT.

V(s) - V for all s comes from one pass back over the elimination: each step's tables, plus what the rest of the graph
costs as a function of the step's neighbours (`outside`), minimised over everything but the node.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.core.problem import Edge, Node
from autopar.search.bucket import CostGraph, Forward, follow
from autopar.search.elimination import Prepared
from autopar.search.simplify import Price, Shrunk
from autopar.search.tables import Key, TableStore

Marginal = tuple[Key, int, tuple[int, ...], int]  # what a marginal depends on: tables, outside, roles kept, table taken off

MARGIN = 1e-9  # relative to the optimum: sums here are rounded, and nothing optimal may be dropped
MAX_WORK = 60_000_000  # table entries of all steps that differ; two seconds or so


@dataclass(frozen=True, slots=True, eq=False)
class Regrets:
    """V(s) - V per node, arrays [k], and per pair of nodes of the graph, arrays [k_u, k_v]; inf where no plan is legal."""

    at_nodes: tuple[np.ndarray, ...]
    at_pairs: tuple[np.ndarray, ...]


def restrict(prepared: Prepared, multiplier: float, slack_s: float) -> Shrunk | None:
    """The problem without states and pairs of which every plan exceeds the least priced cost by more than `slack_s`.

    None where the tables of the backward pass would be too large. Pairs that go become forbidden.
    """
    found = _followed(prepared, multiplier)
    if found is None:
        return None
    store, graph, forward = found
    slack_s += MARGIN * abs(forward.value)
    regrets = find_regrets(store, graph, forward)
    kept = [np.flatnonzero(regret <= slack_s) for regret in regrets.at_nodes]
    source = prepared.shrunk
    nodes = tuple(Node(n.name, n.cost_s[k], n.memory_bytes[k]) for n, k in zip(source.problem.nodes, kept, strict=True))
    edges = []
    for edge, regret in zip(source.problem.edges, regrets.at_pairs, strict=True):
        part = np.ix_(kept[edge.u], kept[edge.v])
        cost_s = np.where(regret[part] <= slack_s, edge.cost_s[part], np.inf)
        edges.append(Edge(edge.u, edge.v, cost_s, None if edge.memory_bytes is None else edge.memory_bytes[part]))
    problem = replace(source.problem, nodes=nodes, edges=tuple(edges))
    return Shrunk(problem, tuple(states[k] for states, k in zip(source.kept, kept, strict=True)))


def regrets_at(prepared: Prepared, multiplier: float) -> Regrets | None:
    """How much more than the optimum at a price of memory plans with a given state, or pair of states, cost; None where the tables would be too large."""
    found = _followed(prepared, multiplier)
    return find_regrets(*found) if found is not None else None


def _followed(prepared: Prepared, multiplier: float) -> tuple[TableStore, CostGraph, Forward] | None:
    if prepared.recipe is None:
        return None
    graph = prepared.graph(Price(1.0, multiplier))
    sizes = graph.sizes
    work = {kind: math.prod([sizes[n] for n in (step.node, *step.neighbours)]) for kind, step in zip(prepared.recipe.kinds, prepared.order.steps, strict=True)}
    if sum(work.values()) > MAX_WORK:
        return None
    store = TableStore()
    return store, graph, follow(store, prepared.recipe, prepared.tables(Price(1.0, multiplier)))


def find_regrets(store: TableStore, graph: CostGraph, forward: Forward) -> Regrets:
    """How much more than the optimum the best plan with a given state, or pair of states, costs."""
    return _Backward(store, graph, forward).run()


class _Backward:
    """One pass over the steps in reverse. `outside[i]` is the table over the neighbours of step i of all that is not below it."""

    def __init__(self, store: TableStore, graph: CostGraph, forward: Forward) -> None:
        self.store, self.graph, self.forward = store, graph, forward
        self.steps = steps = forward.recipe.steps
        self.position = {step.node: i for i, step in enumerate(steps)}
        self.children: list[list[int]] = [[] for _ in steps]
        for i, step in enumerate(steps):
            if step.neighbours:
                self.children[self._first(step.neighbours)].append(i)
        self.edges: list[list[int]] = [[] for _ in steps]
        for e, (u, v, _) in enumerate(graph.pairs):
            self.edges[self._first((u, v))].append(e)
        self.outside = [-1] * len(steps)
        self.known: dict[Marginal, int] = {}

    def _first(self, nodes: Sequence[int]) -> int:
        """The earliest step that eliminates one of the nodes: where a table over them is used up."""
        return min(self.position[node] for node in nodes)

    def run(self) -> Regrets:
        nothing = self.store.add(np.zeros(()))
        at_nodes: list[np.ndarray] = [np.zeros(0)] * len(self.steps)
        at_pairs: list[np.ndarray] = [np.zeros(0)] * len(self.graph.pairs)
        for i in reversed(range(len(self.steps))):
            step = self.steps[i]
            if not step.neighbours:
                self.outside[i] = nothing
            role = {node: r for r, node in enumerate((step.node, *step.neighbours))}
            frame = _Frame(self.store, self.forward.keys[self.forward.recipe.kinds[i]], self.outside[i], len(role), self.known)
            at_nodes[step.node] = self.store.arrays[frame.marginal((0,), -1)]
            for e in self.edges[i]:
                u, v, _ = self.graph.pairs[e]
                at_pairs[e] = self.store.arrays[frame.marginal((role[u], role[v]), -1)]
            for child in self.children[i]:
                roles = tuple(role[node] for node in self.steps[child].neighbours)
                self.outside[child] = frame.marginal(roles, self.forward.tables[self.forward.recipe.kinds[child]])
        return Regrets(tuple(at_nodes), tuple(at_pairs))


class _Frame:
    """All the tables of one step on their common axes, summed only if some marginal has not been computed before."""

    def __init__(self, store: TableStore, key: Key, outside: int, num_roles: int, known: dict[Marginal, int]) -> None:
        self.store, self.key, self.outside, self.num_roles, self.known = store, key, outside, num_roles, known
        self._total: np.ndarray | None = None

    def marginal(self, roles: tuple[int, ...], without: int) -> int:
        """Number of the table [roles] of minima over all other roles, shifted to minimum 0, less table `without` (-1: none)."""
        name = self.key, self.outside, roles, without
        if name not in self.known:
            total = self.total()
            others = tuple(r for r in range(self.num_roles) if r not in roles)
            table = total.min(axis=others).transpose(np.argsort(np.argsort(roles)))
            if without >= 0:
                message = self.store.arrays[without]
                # where the message is inf the child has no legal state, and what is outside no longer matters
                table = np.where(np.isinf(message), 0.0, table - np.where(np.isinf(message), 0.0, message))
            lowest = table.min()
            self.known[name] = self.store.add(table - lowest if math.isfinite(lowest) else table)
        return self.known[name]

    def total(self) -> np.ndarray:
        if self._total is None:
            total = np.zeros(())
            operands = [*self.key, (self.outside, tuple(range(1, self.num_roles)))]
            for number, roles in operands:
                table = self.store.arrays[number].transpose(np.argsort(roles))
                total = total + np.expand_dims(table, [r for r in range(self.num_roles) if r not in roles])
            self._total = total
        return self._total
