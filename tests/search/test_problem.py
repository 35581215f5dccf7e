"""The table of numbers: what it refuses, and what a plan costs."""

import math
from dataclasses import replace

import numpy as np
import pytest

from autopar.core.columns import Edges, Nodes, first_seen
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


def test_nodes_and_edges_are_columns_that_read_as_rows() -> None:
    shared, moved = np.array([1.0, 2.0]), np.ones((2, 2))
    nodes = (Node("a", shared, shared), Node("b", np.ones(2), shared), Node("c", shared, shared))
    edges = (Edge(2, 0, moved), Edge(0, 1, moved, moved), Edge(1, 2, moved))
    problem = SearchProblem(nodes, edges)
    assert problem.node_columns.number.tolist() == [0, 1, 0] and problem.edge_columns.number.tolist() == [0, 1, 0]
    assert tuple(problem.nodes) == nodes and tuple(problem.edges) == edges, "who gave rows gets them back"
    u, v, number = np.array([2, 0, 1]), np.array([0, 1, 2]), np.array([0, 1, 0])
    columns = SearchProblem(Nodes("abc", number, problem.node_columns.tables), Edges(u, v, number, problem.edge_columns.tables))
    assert [n.name for n in columns.nodes] == ["a", "b", "c"] and [(e.u, e.v) for e in columns.edges] == [(2, 0), (0, 1), (1, 2)]
    assert all(x.cost_s is y.cost_s and x.memory_bytes is y.memory_bytes for x, y in zip((*columns.nodes, *columns.edges), (*nodes, *edges), strict=True))
    assert evaluate(columns, (0, 1, 1)) == evaluate(problem, (0, 1, 1))
    assert replace(columns, memory_limit_bytes=1.0).nodes is columns.nodes


def test_numbers_are_renamed_as_they_first_appear() -> None:
    numbers, where = first_seen(np.array([7, 3, 7, 5, 3]))
    assert numbers.tolist() == [0, 1, 0, 2, 1] and where.tolist() == [0, 1, 3]
    assert [len(x) for x in first_seen(np.array([], dtype=int))] == [0, 0]
