"""The search trades time for memory: stage and recomputation come on as the budget shrinks, and what it returns is the optimum."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from autopar.core.cluster import Cluster
from autopar.core.graph import OpGraph
from autopar.core.mesh import Mesh
from autopar.core.plan import Plan
from autopar.core.problem import SearchProblem
from autopar.core.residency import RECOMPUTE
from autopar.errors import InfeasibleError
from autopar.models.load import load_model
from autopar.planner.keeping import Keeping
from autopar.planner.pins import Pins
from autopar.planner.plan import plan_graph
from autopar.planner.problem import ProblemBuilder
from autopar.planner.roles import Constraints, batch_factors
from autopar.planner.rulebook import rules_of
from autopar.planner.search import Options
from autopar.planner.states import Pricing
from autopar.runtime.microbatches import split_batch
from autopar.search.solve import solve
from autopar.trace.capture import trace

MAX_POINTS = 40_000_000
LINEAR = 0.02
"""Plans are chosen under a linear memory limit; which block is computed again, and so what else is held then, it does not see."""


def shrunk(cluster: Cluster, memory_bytes: int) -> Cluster:
    return replace(cluster, device=replace(cluster.device, memory_bytes=memory_bytes))


def stages(plan: Plan) -> float:
    """The mean ZeRO stage of the parameters."""
    return sum(z.stage for z in plan.residency.zero.values()) / len(plan.params)


def test_a_shrinking_budget_turns_sharding_and_recomputation_on() -> None:
    """The vocabulary is small, so that the logits of one sample, which nothing takes away, do not set the pace."""
    loaded = load_model("gpt2", batch=16, seq=1024, device="meta", dtype="bfloat16", overrides={"n_layer": 4, "vocab_size": 2048})
    graph = trace(loaded.module, (), split_batch(loaded.kwargs, 2)[0]).graph
    cluster = Cluster.preset("h100-sxm", nodes=1)
    options = Options(pins=("dp=8",), memory_share=1.0, micro_batches=2)
    plan = plan_graph(graph, cluster, options).plan
    assert stages(plan) == 0 and not plan.residency.recompute
    whole = plan.predicted.peak_memory_bytes
    found, share = [plan], 1.0
    while True:
        share *= 0.9
        try:
            found.append(plan_graph(graph, shrunk(cluster, int(whole * share)), options).plan)
        except InfeasibleError as error:
            needs = re.search(r"needs (\d+) bytes .* over the limit of \d+ .* at its fullest moment, \w+ of .*; it would fit", str(error))
            assert needs
            found.append(plan_graph(graph, shrunk(cluster, int(needs[1])), options).plan)
            break
        assert found[-1].predicted.peak_memory_bytes <= whole * share
    assert share < 0.4
    for more, less in zip(found, found[1:]):
        slack = 1 + LINEAR + more.proof.gap
        assert more.proof.objective <= less.proof.objective * slack, "less memory cannot be faster"
        leaner = more.predicted.peak_memory_bytes < less.predicted.peak_memory_bytes
        assert not leaner or less.proof.objective <= more.proof.objective * slack, "a plan that is leaner and faster was there"
    highest = [max((z.stage for z in p.residency.zero.values()), default=0) for p in found]
    assert highest[0] == 0 and highest[-1] == 3 and set(highest) == {0, 1, 2, 3}, "between the ends stages and recomputation take turns"
    assert found[-1].residency.recompute
    for less in found:
        modes = [less.residency.recompute.get(f"model.transformer.h.{n}", less.residency.recompute.get(f"transformer.h.{n}", "none")) for n in range(4)]
        assert modes == sorted(modes, key=RECOMPUTE[::-1].index), "early blocks are held longest"


class Blocks(nn.Module):
    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x.square().sum()


def problem_of(graph: OpGraph, mesh: Mesh, keeping: Keeping, limit: float | None) -> SearchProblem:
    rules = rules_of(graph)
    pricing = Pricing(Cluster.preset("h100-sxm", nodes=1), mesh)
    return ProblemBuilder(graph, rules, batch_factors(graph, rules), pricing, Constraints(mesh, Pins(), False), keeping).build(limit)[0]


def every_point(problem: SearchProblem) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, bytes) of every assignment of states to nodes: one axis per node."""
    shape = [len(node.cost_s) for node in problem.nodes]
    assert np.prod(shape, dtype=float) <= MAX_POINTS, shape
    seconds, memory = np.zeros(shape), np.zeros(shape)
    for n, node in enumerate(problem.nodes):
        place = [1] * len(shape)
        place[n] = -1
        seconds += node.cost_s.reshape(place)
        memory += node.memory_bytes.reshape(place)
    for edge in problem.edges:
        order = (edge.u, edge.v) if edge.u < edge.v else (edge.v, edge.u)
        place = [1] * len(shape)
        place[order[0]], place[order[1]] = shape[order[0]], shape[order[1]]
        seconds += (edge.cost_s if edge.u < edge.v else edge.cost_s.T).reshape(place)
        if edge.memory_bytes is not None:
            memory += (edge.memory_bytes if edge.u < edge.v else edge.memory_bytes.T).reshape(place)
    return seconds, memory


@pytest.mark.parametrize("width,batch,micro_batches", [(512, 8, 1), (64, 4096, 1), (256, 256, 3)])
def test_the_search_returns_the_optimum_of_stage_recomputation_and_sharding(width: int, batch: int, micro_batches: int) -> None:
    graph = trace(Blocks(width, 1), (torch.empty(batch, width),)).graph
    keeping = Keeping(micro_batches=micro_batches).everything()
    problem = problem_of(graph, Mesh.of(a=2), keeping, None)
    seconds, memory = every_point(problem)
    least, most = float(memory.min()), float(memory[seconds == seconds.min()].min())
    for limit in np.linspace(least, most, 7):
        limited = replace(problem, memory_limit_bytes=float(limit) * (1 + 1e-9))
        best = float(seconds[memory <= limited.memory_limit_bytes].min())
        found = solve(limited)
        assert found.bound_s <= best * (1 + 1e-9)
        assert found.cost_s <= best * (1 + max(found.gap, 1e-6))
        assert found.gap <= 1e-6 or found.proof == "budget", "small problems are solved to the end"
