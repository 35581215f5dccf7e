"""Random problems and a brute-force oracle that shares no code with the solvers."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from autopar.core.problem import Edge, Node, SearchProblem
from autopar.search.process import solvers


@dataclass(frozen=True)
class Oracle:
    """Seconds and bytes of every plan, as arrays with one axis per node."""

    seconds: np.ndarray
    held: np.ndarray
    limit: float

    def least(self, second: float = 1.0, byte: float = 0.0) -> float:
        """The minimum over all plans, whatever their memory; inf where none is legal."""
        legal = np.isfinite(self.seconds)
        return float((self.seconds[legal] * second + self.held[legal] * byte).min(initial=math.inf))

    def least_within(self) -> float:
        """The minimum cost over the plans within the limit; inf where there is none."""
        fits = np.isfinite(self.seconds) & (self.held <= self.limit)
        return float(self.seconds[fits].min(initial=math.inf))


def enumerate_plans(problem: SearchProblem) -> Oracle:
    sizes = tuple(len(node.cost_s) for node in problem.nodes)
    seconds, held = np.zeros(sizes), np.full(sizes, problem.base_memory_bytes)
    grid = np.indices(sizes, sparse=True)
    for axis, node in enumerate(problem.nodes):
        seconds = seconds + node.cost_s[grid[axis]]
        held = held + node.memory_bytes[grid[axis]]
    for edge in problem.edges:
        at = grid[edge.u], grid[edge.v]
        seconds = seconds + edge.cost_s[at]
        if edge.memory_bytes is not None:
            held = held + edge.memory_bytes[at]
    limit = math.inf if problem.memory_limit_bytes is None else problem.memory_limit_bytes
    return Oracle(seconds, held, limit)


def make_random(seed: int, *, max_nodes: int = 6, max_states: int = 4, density: float = 1.4, limited: bool = False) -> SearchProblem:
    """Cycles, parallel edges in both directions, forbidden pairs, ties, shared tables, single states, loose parts."""
    rng = np.random.default_rng(seed)
    whole = rng.random() < 0.5  # whole numbers give ties
    forbidden = rng.choice([0.0, 0.1, 0.3])

    def numbers(*shape: int) -> np.ndarray:
        return rng.integers(0, 6, shape).astype(float) if whole else rng.random(shape)

    def held(*shape: int) -> np.ndarray:
        return rng.integers(0, 1000, shape).astype(float)

    nodes: list[Node] = []
    for i in range(int(rng.integers(1, max_nodes + 1))):
        if nodes and rng.random() < 0.3:
            nodes.append(Node(f"n{i}", nodes[-1].cost_s, nodes[-1].memory_bytes))
        else:
            k = int(rng.integers(1, max_states + 1))
            nodes.append(Node(f"n{i}", numbers(k), held(k)))
    edges: list[Edge] = []
    for _ in range(int(density * len(nodes)) if len(nodes) > 1 else 0):
        u, v = (int(n) for n in rng.choice(len(nodes), 2, replace=False))
        shape = len(nodes[u].cost_s), len(nodes[v].cost_s)
        twins = [e for e in edges if e.cost_s.shape == shape]
        if twins and rng.random() < 0.3:
            edges.append(Edge(u, v, twins[0].cost_s, twins[0].memory_bytes))
            continue
        cost_s = np.where(rng.random(shape) < forbidden, np.inf, numbers(*shape))
        edges.append(Edge(u, v, cost_s, held(*shape) if rng.random() < 0.4 else None))
    base = float(rng.integers(0, 100))
    limit = base + float(rng.uniform(100, 700)) * len(nodes) if limited else None
    return SearchProblem(tuple(nodes), tuple(edges), limit, base)


def make_blocks(num_blocks: int, *, num_nodes: int = 20, num_states: int = 6, seed: int = 0) -> SearchProblem:
    """A row of identical residual blocks: entry, three branches that meet, a skip; the same array objects in every block."""
    rng = np.random.default_rng(seed)
    k = num_states
    costs, sizes = [rng.random(k) for _ in range(num_nodes)], [rng.integers(0, 10**9, k).astype(float) for _ in range(num_nodes)]
    inner = [(i, i + 1) for i in range(num_nodes - 1)] + [(1, 5), (1, 9), (4, 12), (8, 12), (0, 13), (13, num_nodes - 1)]
    tables = {pair: rng.random((k, k)) for pair in inner}
    link = rng.random((k, k))
    nodes, edges = [], []
    for b in range(num_blocks):
        first = b * num_nodes
        nodes += [Node(f"block{b}.{i}", cost, size) for i, (cost, size) in enumerate(zip(costs, sizes, strict=True))]
        edges += [Edge(first + u, first + v, table) for (u, v), table in tables.items()]
        if b:
            edges.append(Edge(first - 1, first, link))
    return SearchProblem(tuple(nodes), tuple(edges))


@pytest.fixture(scope="session", autouse=True)
def one_solver_process() -> Iterator[None]:
    """All integer programs of these tests in one process: it takes longer to start than most of them."""
    with solvers():
        yield


@pytest.fixture
def random_problem() -> Callable[..., SearchProblem]:
    return make_random


@pytest.fixture
def repeated_blocks() -> Callable[..., SearchProblem]:
    return make_blocks


@pytest.fixture
def oracle() -> Callable[[SearchProblem], Oracle]:
    return enumerate_plans
