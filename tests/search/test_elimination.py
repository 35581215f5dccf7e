"""Elimination against the oracle, and what it promises about repeated blocks, ties and large tables."""

import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest

from autopar.core.problem import Edge, Node, SearchProblem, evaluate
from autopar.errors import InfeasibleError, UsageError
from autopar.search.elimination import eliminate, minimise, prepare
from autopar.search.simplify import BYTES, SECONDS, Price
from autopar.search.tables import sum_and_minimise

CLOSE = 1e-12


@pytest.mark.parametrize("first", range(0, 400, 50))
@pytest.mark.parametrize("price", [SECONDS, BYTES, Price(1.0, 0.003)])
def test_equals_brute_force(first: int, price: Price, random_problem, oracle) -> None:
    for seed in range(first, first + 50):
        problem = random_problem(seed, density=1.0 + seed % 4)
        best = oracle(replace(problem, base_memory_bytes=0.0)).least(price.second, price.byte)
        if math.isinf(best):
            with pytest.raises(InfeasibleError, match="forbidden pair"):
                minimise(problem, price)
            continue
        found = minimise(problem, price)
        cost_s, memory_bytes = evaluate(problem, found.choices)
        assert found.exact and math.isfinite(cost_s), seed
        assert found.value == pytest.approx(best, rel=CLOSE), seed
        assert price.second * cost_s + price.byte * (memory_bytes - problem.base_memory_bytes) == pytest.approx(best, rel=CLOSE), seed


def test_assignment_of_a_slack_problem_is_exact(random_problem) -> None:
    problem = random_problem(2)
    plan = eliminate(problem)
    assert (plan.cost_s, plan.memory_bytes) == evaluate(problem, plan.choices)
    assert plan.bound_s == plan.cost_s and plan.proof == "exact" and plan.gap == 0.0


def test_priced_bound_holds_for_plans_within_the_limit(random_problem, oracle) -> None:
    for seed in range(60):
        problem = random_problem(seed, limited=True)
        best = oracle(problem).least_within()
        if math.isfinite(best):
            assert eliminate(problem, multiplier_s_per_byte=0.002).bound_s <= best * (1 + CLOSE), seed


@pytest.mark.parametrize("price", [SECONDS, Price(1.0, 0.003)])
def test_single_precision_bounds_from_below(price: Price, random_problem) -> None:
    rounded_up = 0
    for seed in range(200):
        problem = random_problem(seed, density=1.0 + seed % 4)
        problem = replace(problem, nodes=tuple([replace(n, cost_s=n.cost_s / 3) for n in problem.nodes]), edges=tuple([replace(e, cost_s=e.cost_s / 7) for e in problem.edges]))
        try:
            exact = minimise(problem, price)
        except InfeasibleError:
            continue
        prepared = prepare(problem, (SECONDS, BYTES), dtype=np.float32)
        found = prepared.minimise(price)
        assert exact.value * (1 - 1e-5) <= found.bound <= exact.value <= found.value <= exact.value * (1 + 1e-5), seed
        rounded_up += found.bound / (1 - prepared.recipe.num_terms * 2**-23) > exact.value
    assert rounded_up > 20, "what is taken off is not for nothing"


def test_a_price_needs_a_limit(random_problem) -> None:
    with pytest.raises(UsageError, match="limit"):
        eliminate(random_problem(0), multiplier_s_per_byte=1.0)


def test_empty_and_single() -> None:
    assert eliminate(SearchProblem((), ())).choices == ()
    lone = Node("n", np.array([3.0, 1.0, 1.0]), np.zeros(3))
    assert eliminate(SearchProblem((lone, lone), ())).choices == (1, 1)


def test_small_tables_give_bound_and_incumbent(random_problem, oracle) -> None:
    loose = 0
    for seed in range(80):
        problem = random_problem(seed, density=3.0)
        best = oracle(problem).least()
        if math.isinf(best):
            continue
        try:
            plan = eliminate(problem, max_table_entries=2)
        except InfeasibleError as error:
            assert "max_table_entries" in str(error)  # nothing was proven, and it says so
            continue
        assert plan.bound_s <= best * (1 + CLOSE) and best <= plan.cost_s * (1 + CLOSE), seed
        assert plan.proof == ("exact" if plan.gap <= 1e-9 else "bound"), seed
        loose += plan.proof == "bound"
    assert loose > 5  # the fallback was in fact taken


def test_descent_from_small_tables_is_close(repeated_blocks) -> None:
    problem = repeated_blocks(3)
    best = eliminate(problem)
    plan = eliminate(problem, max_table_entries=6)
    assert plan.bound_s <= best.cost_s <= plan.cost_s <= 1.05 * best.cost_s


@pytest.mark.parametrize("seed", range(3))
def test_work_does_not_grow_with_the_number_of_blocks(seed: int, repeated_blocks) -> None:
    few, many = (minimise(repeated_blocks(n, seed=seed)) for n in (8, 64))
    assert many.num_steps == 8 * few.num_steps
    assert many.num_distinct == few.num_distinct
    assert few.num_distinct < 3 * 20


def test_equal_tables_need_not_be_one_object(repeated_blocks) -> None:
    shared = repeated_blocks(8)
    copies = replace(
        shared,
        nodes=tuple(Node(n.name, n.cost_s.copy(), n.memory_bytes.copy()) for n in shared.nodes),
        edges=tuple(Edge(e.v, e.u, e.cost_s.T.copy()) for e in shared.edges),
    )
    one, other = minimise(shared), minimise(copies)
    assert one == other


def test_ties_go_to_the_lowest_state() -> None:
    flat = Node("n", np.ones(4), np.ones(4))
    chain = tuple(Edge(i, i + 1, np.ones((4, 4))) for i in range(5))
    assert eliminate(SearchProblem((flat,) * 6, chain)).choices == (0,) * 6


def test_same_plan_under_another_hash_seed_and_twice(repeated_blocks) -> None:
    program = """
import numpy as np
from dataclasses import replace
from autopar.core.problem import Edge, Node, SearchProblem
from autopar.search.solve import solve
rng = np.random.default_rng(0)
nodes = tuple(Node(str(i), rng.integers(0, 5, 4) * 1.0, rng.integers(0, 9, 4) * 1.0) for i in range(12))
pairs = [rng.choice(12, 2, replace=False) for _ in range(20)]
edges = tuple(Edge(int(u), int(v), rng.integers(0, 5, (4, 4)) * 1.0) for u, v in pairs)
for limit in (None, 30.0):
    plan = solve(SearchProblem(nodes, edges, limit))
    print(plan.choices, plan.cost_s.hex(), plan.bound_s.hex())
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1 and "None" not in outputs.pop()
    problem = repeated_blocks(4)
    assert eliminate(problem) == eliminate(problem)


@pytest.mark.parametrize("sizes", [(5,), (40, 30), (50, 40, 45), (7, 90, 3, 80), (3, 4, 200, 300)])
def test_tables_are_minimised_whatever_the_tiles(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(sizes))
    operands = [(rng.random(sizes[r : r + 1] if r == 0 else (sizes[r], sizes[0])), (0,) if r == 0 else (r, 0)) for r in range(len(sizes))]
    if len(sizes) == 4:
        operands.append((rng.random((sizes[3], sizes[0], sizes[1])), (3, 0, 1)))
    total = np.zeros(sizes)
    for table, roles in operands:
        shape = [sizes[r] if r in roles else 1 for r in range(len(sizes))]
        total = total + table.transpose(np.argsort(roles)).reshape(shape)
    result = sum_and_minimise(operands)
    assert result.shape == sizes[1:]
    np.testing.assert_allclose(result, total.min(axis=0), rtol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sizes", [(35, 1, 35, 105), (61, 3, 35, 37), (9, 4, 17, 50), (7, 1, 190, 300), (35, 3, 3, 3), (40, 100, 3, 2), (5, 2, 1, 400), (64, 1, 129, 1)])
def test_two_tables_are_added_up_exactly(sizes: tuple[int, ...], dtype: type[np.floating]) -> None:
    """As one number after the other is, where some of them are forbidden too: by products of matrices or not."""
    rng = np.random.default_rng(sum(sizes))
    states, common, rows, columns = sizes
    one, other = (rng.lognormal(0, 5, shape).astype(dtype) for shape in ((states, rows, common), (columns, common, states)))
    one[rng.random(one.shape) < 0.1], other[rng.random(other.shape) < 0.1] = np.inf, np.inf
    one[:, 0, 0] = np.inf
    total = one.transpose(0, 2, 1)[..., None] + other.transpose(2, 1, 0)[:, :, None]
    with warnings.catch_warnings(action="error"):
        result = sum_and_minimise([(one, (0, 2, 1)), (other, (3, 1, 0))])
    assert result.dtype == dtype and np.isinf(result[0, 0]).all()
    np.testing.assert_array_equal(result, total.min(axis=0))


def test_a_hub_of_one_state_with_more_neighbours_than_an_array_has_axes() -> None:
    """Rotary embeddings on one device: one state, read by every layer."""
    layers = 70
    reads = [Node(f"read {n}", np.array([1.0]), np.zeros(1)) for n in range(layers)]
    computes = [Node(f"compute {n}", np.array([2.0, 1.0]), np.zeros(2)) for n in range(layers)]
    edges = [Edge(0, 1 + n, np.array([[0.5]])) for n in range(layers)]
    edges += [Edge(1 + n, 1 + layers + n, np.array([[0.0, 3.0]])) for n in range(layers)]
    found = minimise(SearchProblem((Node("hub", np.zeros(1), np.zeros(1)), *reads, *computes), tuple(edges)))
    assert found.exact and found.value == layers * 3.5 and set(found.choices) == {0}


def _repeated(seed: int) -> SearchProblem:
    """Copies of a random block in a ring, joined by one of their nodes to the next; in some seeds one copy has tables of its own, or the
    hint names roles in another order."""
    rng = np.random.default_rng(seed)
    num_copies, roles = int(rng.integers(2, 5)), int(rng.integers(3, 6))
    sizes = rng.integers(1, 4, roles)
    blocks = [[rng.integers(0, 9, size).astype(float) for size in sizes]] * num_copies
    inner = [(u, v, rng.integers(0, 9, (sizes[u], sizes[v])).astype(float)) for u in range(roles) for v in range(u) if rng.random() < 0.5]
    between = rng.integers(0, 9, (sizes[0], sizes[-1])).astype(float)
    if seed % 3 == 1:
        blocks[-1] = [table + 1.0 for table in blocks[0]]
    nodes = [Node(f"{c}.{k}", table, np.zeros(len(table))) for c, block in enumerate(blocks) for k, table in enumerate(block)]
    edges = [Edge(c * roles + u, c * roles + v, table) for c in range(num_copies) for u, v, table in inner]
    edges += [Edge(c * roles, (c - 1) % num_copies * roles + roles - 1, between) for c in range(num_copies)]
    copies = [tuple(range(c * roles, (c + 1) * roles)) for c in range(num_copies)]
    if seed % 3 == 2:
        copies[0] = tuple(reversed(copies[0]))
    return SearchProblem(tuple(nodes), tuple(edges), copies=(tuple(copies),))


@pytest.mark.parametrize("seed", range(120))
def test_named_copies_change_no_result(seed: int) -> None:
    problem = _repeated(seed)
    named, unnamed = minimise(problem), minimise(replace(problem, copies=()))
    assert evaluate(problem, named.choices)[0] == named.value == unnamed.value and named.exact


def test_what_is_inside_named_copies_is_ordered_once() -> None:
    prepared = [prepare(replace(_repeated(seed), copies=()) if bare else _repeated(seed), (SECONDS,)) for seed in range(0, 120, 3) for bare in (True, False)]
    assert all(sorted(s.node for s in p.order.steps) == list(range(len(p.classes))) for p in prepared), "every node goes once"
    assert not any(p.order.repeats for p in prepared[::2])
    assert sum(bool(p.order.repeats) for p in prepared[1::2]) > 20
