"""`Terms` against `evaluate`, bit for bit, and its floor of memory against the oracle."""

import math

import numpy as np
import pytest

from autopar.core.problem import Edge, Node, SearchProblem, evaluate
from autopar.errors import InfeasibleError
from autopar.search.solve import solve
from autopar.search.terms import Terms


def test_equals_evaluate_bit_for_bit(random_problem) -> None:
    for seed in range(200):
        problem = random_problem(seed, density=1.0 + seed % 3, limited=True)
        rng = np.random.default_rng(seed)
        terms = Terms(problem)
        for _ in range(5):
            choices = tuple(int(rng.integers(node.num_states)) for node in problem.nodes)
            assert terms.of_plan(choices) == evaluate(problem, choices), (seed, choices)


def test_no_plan_holds_less_than_the_floor(random_problem, oracle) -> None:
    reached = 0
    for seed in range(200):
        problem = random_problem(seed, limited=True)
        least = float(oracle(problem).held.min())
        assert Terms(problem).least_bytes <= least * (1 + 1e-12), seed
        reached += math.isclose(Terms(problem).least_bytes, least)
    assert reached > 50  # a floor of 0 would pass the rest


def test_a_limit_below_the_floor_is_infeasible_by_the_least_memory_of_a_plan() -> None:
    """The floor (4 bytes) finds it out; the message gives what a whole plan needs (6 bytes)."""
    nodes = tuple(Node(f"n{i}", np.zeros(2), np.array([2.0, 4.0])) for i in range(2))
    edge = Edge(0, 1, np.array([[np.inf, 0.0], [0.0, 0.0]]))
    problem = SearchProblem(nodes, (edge,), 3.0)
    assert Terms(problem).least_bytes == 4.0
    with pytest.raises(InfeasibleError, match=r" 3 bytes \("):
        solve(problem)
