"""The integer program, its relaxation, and its distrust of the solver."""

import math

import numpy as np
import pytest

from autopar.core.problem import Edge, Node, SearchProblem, evaluate
from autopar.errors import InfeasibleError, UsageError
from autopar.search.elimination import eliminate
from autopar.search.ilp import solve_ilp


@pytest.mark.parametrize("limited", [False, True])
def test_equals_brute_force(limited: bool, random_problem, oracle) -> None:
    solvers = set()
    for seed in range(60):
        problem = random_problem(seed, limited=limited, density=1.0 + seed % 3)
        best = oracle(problem).least_within()
        if math.isinf(best):
            with pytest.raises(InfeasibleError):
                solve_ilp(problem)
            continue
        plan = solve_ilp(problem)
        assert plan.cost_s == pytest.approx(best, rel=1e-9, abs=1e-12), seed
        assert plan.proof == "exact" and plan.bound_s <= best * (1 + 1e-9), seed
        assert (plan.cost_s, plan.memory_bytes) == evaluate(problem, plan.choices) and problem.fits(plan.memory_bytes)
        solvers.add(plan.solver)
    assert solvers == {"lp", "cp-sat"}  # both paths were taken


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_elimination_on_larger_problems(seed: int, repeated_blocks) -> None:
    problem = repeated_blocks(3, num_states=4, seed=seed)
    exact, second_opinion = eliminate(problem), solve_ilp(problem)
    assert second_opinion.proof == "exact"
    assert second_opinion.cost_s == pytest.approx(exact.cost_s, rel=1e-9)


def test_warm_start_must_be_a_plan_within_the_limit(random_problem) -> None:
    problem = random_problem(3, limited=True)
    heaviest = [int(node.memory_bytes.argmax()) for node in problem.nodes]
    tight = SearchProblem(problem.nodes, (), evaluate(problem, heaviest)[1] / 2)
    with pytest.raises(UsageError, match="within the limit"):
        solve_ilp(tight, warm_start=heaviest)


def test_out_of_time_returns_the_warm_start_and_says_so(repeated_blocks) -> None:
    problem = repeated_blocks(6)
    start = (0,) * len(problem.nodes)
    plan = solve_ilp(problem, warm_start=start, time_limit_s=1e-3)
    assert plan.proof == "budget"
    assert plan.cost_s <= evaluate(problem, start)[0] and plan.bound_s <= eliminate(problem).cost_s


def test_fractional_bytes_and_huge_ranges(random_problem, oracle) -> None:
    problem = random_problem(11, limited=True, density=2.0)
    nodes = tuple(Node(n.name, n.cost_s * 1e-9, n.memory_bytes * np.pi * 1e9) for n in problem.nodes)
    scaled = SearchProblem(nodes, (), problem.memory_limit_bytes * np.pi * 1e9)
    assert solve_ilp(scaled).cost_s == pytest.approx(oracle(scaled).least_within(), rel=1e-9)


def test_costs_of_zero_and_outliers(oracle) -> None:
    held = np.array([4.0, 3.0, 1.0])
    free = tuple(Node(f"n{i}", np.zeros(3), held) for i in range(3))
    assert solve_ilp(SearchProblem(free, (), 8.0)).cost_s == 0.0
    spread = tuple(Node(f"n{i}", np.array([1.0, 1.25 + i, 1e12]) * 1e-6, held) for i in range(3))
    problem = SearchProblem(spread, (Edge(0, 1, np.eye(3) * 1e9), Edge(1, 2, np.eye(3) * 1e-7)), 11.0)
    assert solve_ilp(problem).cost_s == pytest.approx(oracle(problem).least_within(), rel=1e-9)


def test_empty() -> None:
    assert solve_ilp(SearchProblem((), ())).choices == ()
