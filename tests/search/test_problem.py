"""The table of numbers: what it refuses, and what a plan costs."""

import math
from dataclasses import replace

import numpy as np
import pytest

from autopar.core.problem import Assignment, Edge, Node, SearchProblem, evaluate
from autopar.errors import UsageError


def node(*cost_s: float) -> Node:
    return Node("n", np.array(cost_s), np.ones(len(cost_s)))


def test_evaluate_adds_nodes_edges_and_base() -> None:
    edges = (Edge(0, 1, np.array([[1.0, math.inf]]), np.array([[10.0, 20.0]])), Edge(1, 0, np.array([[2.0], [4.0]])))
    problem = SearchProblem((node(0.5), node(0.25, 0.125)), edges, base_memory_bytes=100.0)
    assert evaluate(problem, (0, 0)) == (3.75, 112.0)
    assert evaluate(problem, (0, 1)) == (math.inf, 122.0)


@pytest.mark.parametrize(
    ("nodes", "edges", "message"),
    [
        ((node(),), (), "at least one state"),
        ((node(1.0, math.nan),), (), "nan"),
        ((node(-1.0),), (), ">= 0"),
        ((node(math.inf),), (), "leave an illegal state out"),
        ((Node("n", np.ones(2), np.ones(3)),), (), "memory_bytes has shape"),
        ((Node("n", np.array(["a"]), np.ones(1)),), (), "dtype"),
        ((node(1.0), node(1.0)), (Edge(0, 1, np.ones((1, 2))),), "shape"),
        ((node(1.0), node(1.0)), (Edge(0, 1, np.array([[math.nan]])),), "nan"),
        ((node(1.0), node(1.0)), (Edge(0, 1, np.ones((1, 1)), np.array([[math.inf]])),), "inf"),
        ((node(1.0),), (Edge(0, 0, np.ones((1, 1))),), "two different nodes"),
        ((node(1.0),), (Edge(0, 1, np.ones((1, 1))),), "two different nodes"),
    ],
)
def test_refuses(nodes: tuple, edges: tuple, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SearchProblem(nodes, edges)


def test_refuses_a_shared_table_of_the_wrong_shape_the_second_time() -> None:
    table = np.ones((1, 2))
    nodes = (node(1.0), node(1.0, 2.0), node(1.0))
    with pytest.raises(UsageError, match="shape"):
        SearchProblem(nodes, (Edge(0, 1, table), Edge(0, 2, table)))


@pytest.mark.parametrize("limit", [-1.0, math.nan])
def test_refuses_a_limit(limit: float) -> None:
    with pytest.raises(UsageError, match="memory limit"):
        SearchProblem((node(1.0),), (), limit)


@pytest.mark.parametrize("choices", [(0,), (0, 2), (-1, 0)])
def test_refuses_choices_that_are_no_plan(choices: tuple[int, ...]) -> None:
    with pytest.raises(UsageError):
        evaluate(SearchProblem((node(1.0, 1.0), node(1.0, 1.0)), ()), choices)


def test_gap_is_a_fraction_of_the_cost() -> None:
    plan = Assignment(choices=(), cost_s=2.0, memory_bytes=0.0, bound_s=1.5, solver="none", proof="bound")
    assert plan.gap == 0.25
    assert replace(plan, cost_s=0.0, bound_s=0.0).gap == 0.0
    with pytest.raises(UsageError, match="proof"):
        replace(plan, proof="sure")
