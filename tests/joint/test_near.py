"""What is near to a plan, against all that differ from it in the nodes that choose alone."""

from itertools import product
from random import Random

import numpy as np
import pytest

from autopar.core.problem import SearchProblem
from autopar.errors import InfeasibleError
from autopar.joint.near import Choosing, Near
from autopar.search.elimination import minimise
from tests.search.conftest import make_random

STANDING = 0.5


def figures(problem: SearchProblem, choices: list[int], params: set[int]) -> np.ndarray:
    """Seconds, bytes of state and others of a plan."""
    nodes = [node.memory_bytes[k] for node, k in zip(problem.nodes, choices)]
    seconds = sum(node.cost_s[k] for node, k in zip(problem.nodes, choices)) + sum(e.cost_s[choices[e.u], choices[e.v]] for e in problem.edges)
    moved = sum(e.memory_bytes[choices[e.u], choices[e.v]] for e in problem.edges if e.memory_bytes is not None)
    return np.array([seconds, STANDING * sum(nodes[n] for n in params), sum(held for n, held in enumerate(nodes) if n not in params) + moved])


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_the_cheapest_is_that_of_all_that_choose_alone(first: int) -> None:
    better = 0
    for seed in range(first, first + 50):
        problem, random = make_random(seed, max_nodes=5), Random(seed)
        try:
            choices = list(minimise(problem).choices)
        except InfeasibleError:
            continue
        nodes = set(random.sample(range(len(choices)), min(3, len(choices))))
        params = {n for n in nodes if random.random() < 0.5}
        joined = {frozenset((e.u, e.v)) for e in problem.edges}
        alone = [n for n in nodes if not any(frozenset((n, m)) in joined for m in nodes if m < n)]
        own = figures(problem, choices, params)
        near: Near = Choosing(problem, nodes, params, STANDING).near(choices, tuple(own))
        plans = []
        for states in product(*(range(problem.nodes[n].num_states) for n in alone)):
            for n, state in zip(alone, states):
                choices[n] = state
            plans.append(figures(problem, choices, params))
        for _ in range(5):
            face = np.array([1.0, 10.0 ** random.uniform(-6, 0), 10.0 ** random.uniform(-6, 0)])
            least = min(float(plan @ face) for plan in plans if np.isfinite(plan[0]))
            found = near.cheapest(face)
            assert near.least(face) == pytest.approx(least, rel=1e-9) and float(found @ face) == pytest.approx(least, rel=1e-9), seed
            assert any(np.allclose(found, plan, rtol=1e-9) for plan in plans), seed
            better += least < float(own @ face) * (1 - 1e-6)
    assert better > 20
