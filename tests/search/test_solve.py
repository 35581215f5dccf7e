"""The whole path under a memory limit: never above the limit, never a bound above the optimum."""

import math
from dataclasses import replace

import numpy as np
import pytest

from autopar.core.problem import Edge, Node, SearchProblem, evaluate
from autopar.errors import InfeasibleError, UsageError
from autopar.search.elimination import eliminate, minimise
from autopar.search.lagrange import price_memory
from autopar.search.local import relink, repair, spend, splice
from autopar.search.simplify import BYTES
from autopar.search.solve import GAP_TARGET, solve


def halfway(problem: SearchProblem, fraction: float = 0.5) -> SearchProblem:
    """The problem with a limit between the least memory of any plan and that of the cheapest."""
    least = evaluate(problem, minimise(problem, BYTES).choices)[1]
    return replace(problem, memory_limit_bytes=least + fraction * (eliminate(problem).memory_bytes - least))


def test_equals_brute_force_under_the_limit(random_problem, oracle) -> None:
    binding = 0
    for seed in range(200):
        problem = random_problem(seed, limited=True, density=1.0 + seed % 3)
        best = oracle(problem).least_within()
        if math.isinf(best):
            with pytest.raises(InfeasibleError):
                solve(problem)
            continue
        plan = solve(problem, use_ilp="always")
        assert plan.cost_s == pytest.approx(best, rel=1e-9, abs=1e-12), seed
        assert plan.proof == "exact" and problem.fits(plan.memory_bytes), seed
        assert (plan.cost_s, plan.memory_bytes) == evaluate(problem, plan.choices)
        near = solve(problem)
        assert near.bound_s <= best * (1 + 1e-9) and best <= near.cost_s * (1 + 1e-12) <= best * (1 + 2 * GAP_TARGET), seed
        binding += plan.multiplier_s_per_byte > 0
    assert binding > 20


def test_price_of_memory_bounds_the_optimum(random_problem, oracle) -> None:
    for seed in range(150):
        problem = random_problem(seed, limited=True)
        best = oracle(problem).least_within()
        if math.isfinite(best):
            plan = price_memory(problem)
            assert plan.bound_s <= best * (1 + 1e-12) and best <= plan.cost_s * (1 + 1e-12), seed
            assert problem.fits(plan.memory_bytes) and plan.multiplier_s_per_byte >= 0, seed


def test_small_tables_under_a_limit(random_problem, oracle) -> None:
    for seed in range(60):
        problem = random_problem(seed, limited=True, density=3.0)
        best = oracle(problem).least_within()
        try:
            plan = solve(problem, max_table_entries=2, use_ilp="never")
        except InfeasibleError as error:
            assert math.isinf(best) or "max_table_entries" in str(error), seed
            continue
        assert problem.fits(plan.memory_bytes), seed
        assert plan.bound_s <= best * (1 + 1e-12) and best <= plan.cost_s * (1 + 1e-12), seed


def test_the_program_closes_what_small_tables_leave_open(random_problem, oracle) -> None:
    for seed in range(30):
        problem = random_problem(seed, density=3.0)
        best = oracle(problem).least()
        if math.isinf(best):
            continue
        try:
            plan = solve(problem, max_table_entries=2, use_ilp="always")
        except InfeasibleError as error:
            assert "max_table_entries" in str(error), seed
            continue
        assert plan.cost_s == pytest.approx(best, rel=1e-9, abs=1e-12), seed


def test_infeasible_says_by_how_much() -> None:
    nodes = tuple(Node(f"n{i}", np.zeros(2), np.array([3.0, 5.0]) * 2**30) for i in range(2))
    edge = Edge(0, 1, np.array([[np.inf, 0.0], [0.0, 0.0]]))
    with pytest.raises(InfeasibleError, match=r"1073741824 bytes \(1\.00 GiB\) over the limit of 7\.00 GiB"):
        solve(SearchProblem(nodes, (edge,), 7.0 * 2**30))
    assert solve(SearchProblem(nodes, (edge,), 8.0 * 2**30)).memory_bytes == 8.0 * 2**30


def test_base_memory_alone_over_the_limit() -> None:
    with pytest.raises(InfeasibleError, match="over the limit"):
        solve(SearchProblem((), (), memory_limit_bytes=1.0, base_memory_bytes=2.0))


def test_repeated_blocks_within_a_limit(repeated_blocks) -> None:
    problem = halfway(repeated_blocks(12), 0.8)
    plan = solve(problem)
    assert problem.fits(plan.memory_bytes) and plan.gap <= GAP_TARGET and plan.proof != "budget"
    assert plan == solve(problem)
    priced = price_memory(problem)
    assert priced.gap < 0.01  # a small gap is what makes the rest cheap
    assert priced.bound_s <= plan.bound_s <= plan.cost_s <= priced.cost_s


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(UsageError, match="use_ilp"):
        solve(SearchProblem((), ()), use_ilp="perhaps")  # type: ignore[arg-type]


def test_local_search_stays_within_the_limit_and_only_gains(random_problem) -> None:
    for seed in range(80):
        problem = random_problem(seed, limited=True)
        try:
            over, within = minimise(problem).choices, minimise(problem, BYTES).choices
        except InfeasibleError:
            continue
        if not problem.fits(evaluate(problem, within)[1]):
            assert repair(problem, over) is None
            continue
        start = evaluate(problem, within)[0]
        for plan in (spend(problem, within), relink(problem, over, within)):
            cost_s, memory_bytes = evaluate(problem, plan)
            assert cost_s <= start * (1 + 1e-12) and problem.fits(memory_bytes), seed
        for maybe in (repair(problem, over), splice(problem, over, within), splice(problem, within, over)):
            assert maybe is None or (problem.fits(evaluate(problem, maybe)[1]) and math.isfinite(evaluate(problem, maybe)[0])), seed
