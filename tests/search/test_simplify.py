"""Making a problem smaller must not lose its optimum; and the regrets of states must be the true ones."""

import math
from dataclasses import replace

import numpy as np
import pytest

from autopar.core.problem import Edge, Node, SearchProblem, evaluate
from autopar.errors import InfeasibleError
from autopar.search.elimination import prepare
from autopar.search.fixing import restrict
from autopar.search.lagrange import price_memory
from autopar.search.simplify import BYTES, SECONDS, Price, canonical, shrink


def test_canonical_is_the_same_problem(random_problem) -> None:
    rng = np.random.default_rng(0)
    for seed in range(100):
        problem = random_problem(seed, density=3.0)
        merged = canonical(problem)
        assert len({(e.u, e.v) for e in merged.edges}) == len(merged.edges) and all(e.u < e.v for e in merged.edges)
        choices = [int(rng.integers(len(node.cost_s))) for node in problem.nodes]
        assert evaluate(merged, choices) == pytest.approx(evaluate(problem, choices), rel=1e-15)


@pytest.mark.parametrize("prices", [(SECONDS,), (BYTES,), (SECONDS, BYTES)])
def test_shrink_keeps_the_optimum(prices: tuple[Price, ...], random_problem, oracle) -> None:
    dropped = 0
    for seed in range(150):
        problem = random_problem(seed, density=2.0, limited=True)
        before = oracle(problem)
        try:
            shrunk = shrink(canonical(problem), prices)
        except InfeasibleError:
            assert math.isinf(before.least())
            continue
        dropped += sum(len(n.cost_s) for n in problem.nodes) - sum(len(states) for states in shrunk.kept)
        after = oracle(shrunk.problem)
        mixes = [(1.0, 0.0), (0.0, 1.0), (1.0, 0.01)] if len(prices) == 2 else [(p.second, p.byte) for p in prices]
        for second, byte in mixes:
            assert after.least(second, byte) == pytest.approx(before.least(second, byte), rel=1e-12), seed
        if len(prices) == 2:
            assert after.least_within() == pytest.approx(before.least_within(), rel=1e-12), seed
    assert dropped > 50


def test_of_equal_states_the_first_stays() -> None:
    nodes = tuple(Node("n", np.array([2.0, 1.0, 1.0]), np.zeros(3)) for _ in range(2))
    same = np.array([[0.0, 0.5, 0.5], [0.5, 0.0, 0.0], [0.5, 0.0, 0.0]])
    shrunk = shrink(canonical(SearchProblem(nodes, (Edge(0, 1, same),))), (SECONDS,))
    assert [states.tolist() for states in shrunk.kept] == [[1], [1]]
    assert shrunk.restore((0, 0)) == (1, 1)


def test_a_state_that_resharding_undercuts_is_dropped() -> None:
    layouts = np.abs(np.subtract.outer(np.arange(4.0), np.arange(4.0)))  # a metric: going via another layout never pays
    dear = Node("dear", np.array([0.0, 1.5, 9.0, 9.0]), np.zeros(4))
    free = Node("free", np.zeros(4), np.zeros(4))
    shrunk = shrink(canonical(SearchProblem((dear, free), (Edge(0, 1, layouts),))), (SECONDS,))
    assert shrunk.kept[0].tolist() == [0]


def test_restricting_keeps_every_better_plan(random_problem, oracle) -> None:
    fewer = 0
    for seed in range(150):
        problem = random_problem(seed, density=1.6, limited=True)
        best = oracle(problem).least_within()
        if math.isinf(best):
            continue
        plan = price_memory(problem)
        both = prepare(problem, (SECONDS, BYTES))
        rest = restrict(both, plan.multiplier_s_per_byte, plan.cost_s - plan.bound_s)
        assert rest is not None
        assert oracle(rest.problem).least_within() == pytest.approx(best, rel=1e-12), seed
        fewer += sum(len(states) for states in rest.kept) < sum(len(states) for states in both.shrunk.kept)
    assert fewer > 20


def test_regrets_are_the_true_ones(random_problem, oracle) -> None:
    for seed in range(80):
        problem = replace(random_problem(seed, density=1.6), base_memory_bytes=0.0)
        if math.isinf(oracle(problem).least()):
            continue
        both = prepare(problem, (SECONDS, BYTES))
        plans = oracle(both.shrunk.problem)
        total = plans.seconds + 0.001 * plans.held
        slack_s = 0.4 * float(total[np.isfinite(total)].max() - total.min())
        rest = restrict(both, 0.001, slack_s)
        assert rest is not None
        reachable = total <= total.min() + slack_s * (1 + 1e-9)
        for axis, (states, kept) in enumerate(zip(both.shrunk.kept, rest.kept, strict=True)):
            others = tuple(i for i in range(total.ndim) if i != axis)
            assert set(kept) == set(states[reachable.any(axis=others)]), seed
