"""A folded problem is that of the whole depth, for plans whose blocks are alike."""

import math
from dataclasses import replace

import pytest

from autopar.core.cluster import Cluster
from autopar.core.mesh import Mesh
from autopar.core.problem import evaluate
from autopar.core.residency import Precision
from autopar.core.unroll import Run
from autopar.forecast.transformer import Dims
from autopar.joint.fold import fold
from autopar.planner.keeping import Keeping
from autopar.planner.pins import Pins
from autopar.planner.problem import ProblemBuilder
from autopar.planner.roles import Constraints, batch_factors
from autopar.planner.rulebook import rules_of
from autopar.planner.states import Pricing
from autopar.search.solve import solve
from tests.joint.models import GPT, LLAMA, graphs

KEEPING = Keeping(micro_batches=3, precision=Precision(master="float32"))


def built(dims: Dims, layers: int, mesh: Mesh, keeping: Keeping):
    graph = graphs(dims, layers)(8)
    rules = rules_of(graph)
    pricing = Pricing(Cluster.preset("a100-sxm", nodes=2), mesh, (2, 0))
    return graph, *ProblemBuilder(graph, rules, batch_factors(graph, rules), pricing, Constraints(mesh, Pins(), strict=False), keeping).build(None)


@pytest.mark.parametrize("keeping", [KEEPING, KEEPING.everything()], ids=["fastest", "everything"])
@pytest.mark.parametrize("mesh", [Mesh.of(a=4, b=2), Mesh.of(a=8)], ids=str)
@pytest.mark.parametrize("dims", [LLAMA, GPT], ids=["llama", "gpt"])
def test_the_folded_optimum_is_that_of_the_whole_depth(dims: Dims, mesh: Mesh, keeping: Keeping) -> None:
    graph, problem, ports = built(dims, 3, mesh, keeping)
    folded = fold(graph, Run("blocks", 0, dims.layers), problem, ports)
    assert len(folded.problem.nodes) < 0.6 * len(problem.nodes)
    small, (_, whole, _) = solve(folded.problem), built(dims, dims.layers, mesh, keeping)
    deep = solve(whole)
    assert small.cost_s == pytest.approx(deep.cost_s, rel=1e-9)
    assert small.memory_bytes == pytest.approx(deep.memory_bytes, rel=0.02)  # of equal plans one or the other is found
    if keeping is not KEEPING:
        limit = 0.6 * deep.memory_bytes
        bound = solve(replace(folded.problem, memory_limit_bytes=limit)).bound_s
        best = solve(replace(whole, memory_limit_bytes=limit), time_limit_s=5.0)
        assert best.bound_s <= bound * 1.02 and bound <= best.cost_s * 1.02  # blocks that are not alike may fill the limit better


@pytest.mark.parametrize("dims", [LLAMA, GPT], ids=["llama", "gpt"])
def test_any_choices_cost_what_they_do_three_deep(dims: Dims) -> None:
    """A run of three is its own short graph: folding and unfolding changes no number."""
    graph, problem, ports = built(dims, 3, Mesh.of(a=4, b=2), KEEPING.everything())
    folded = fold(graph, Run("blocks", 0, 3), problem, ports)
    for n in range(40):
        choices = [(7 * n + 3 * k) % node.num_states for k, node in enumerate(folded.problem.nodes)]
        ours, its = evaluate(folded.problem, choices), evaluate(problem, folded.unfolded(choices))
        assert ours[1] == pytest.approx(its[1], rel=1e-9)
        assert ours[0] == pytest.approx(its[0], rel=1e-9) if math.isfinite(its[0]) else math.isinf(ours[0])


def test_parts_bound_the_whole() -> None:
    graph, problem, ports = built(LLAMA, 3, Mesh.of(a=4, b=2), KEEPING)
    folded = fold(graph, Run("blocks", 0, LLAMA.layers), problem, ports)
    parts = [solve(folded.part(side)).cost_s for side in range(3)]
    whole = solve(folded.problem).cost_s
    assert 0.8 * whole < sum(parts) <= whole * (1 + 1e-9)
    assert parts[0] > parts[2] > parts[1] > 0  # seven blocks, a head with the loss, an embedding
