"""A repeated block is built once: what comes out is, to the bit, what building every block gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from autopar.core.cluster import Cluster
from autopar.core.graph import OpGraph
from autopar.core.mesh import Mesh
from autopar.core.problem import Node, SearchProblem, evaluate
from autopar.models.load import load_model
from autopar.planner.decode import decode
from autopar.planner.keeping import Keeping
from autopar.planner.liveness import Engine, memory_use
from autopar.planner.pins import Pins
from autopar.planner.plan import plan_graph
from autopar.planner.problem import Ports
from autopar.planner.roles import batch_factors
from autopar.planner.rulebook import rules_of
from autopar.planner.search import MeshSearch, Options
from autopar.planner.steps import steps_of
from autopar.search.lagrange import leanest
from autopar.search.solve import solve
from autopar.trace.capture import trace

CLUSTER = Cluster.local(4)
OPTIONS = {
    "free": Options(mesh=Mesh.of(a=2, b=2)),
    "dp": Options(pins=("dp=4",)),
    "tp": Options(pins=("tp=4",)),
    "one block pinned": Options(mesh=Mesh.of(a=2, b=2), pins=("blocks.1.*=a:I",)),
    "sharded": Options(pins=("dp=4", "zero=3"), micro_batches=2),
    "scattered": Options(pins=("dp=2", "zero=2"), micro_batches=3),
    "computed again": Options(pins=("dp=4", "recompute=full", "zero=1")),
    "partly computed again": Options(pins=("dp=2", "recompute=selective")),
}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, scale: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x)))) * scale
        return x if skip is None else x + skip


class Irregular(nn.Module):
    """Blocks that are alike, and yet not: some are given what an earlier one made (which therefore lives longer), one is frozen, one is
    used twice, two share a weight, and something happens between the last two."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(64, width), nn.Linear(width, 64)
        self.blocks = nn.ModuleList(Block(width) for _ in range(8))
        self.blocks[2].requires_grad_(False)
        self.blocks[4].up.weight = self.blocks[3].up.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.token(ids)
        scale = x.mean(-1, keepdim=True).sigmoid()
        made = []
        for n in (0, 1, 2, 3, 4, 5, 5, 6):
            x = self.blocks[n](x, scale, made[n - 4] if n in (4, 6) else None)
            made.append(x)
        logits = self.head(self.blocks[7](torch.tanh(x), scale))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), made[2]


def regular() -> OpGraph:
    loaded = load_model("transformer", batch=8, seq=16, overrides={"hidden": 32, "layers": 6, "heads": 4, "vocab": 64, "positions": 16})
    return trace(loaded.module, (), loaded.kwargs).graph


def irregular() -> OpGraph:
    ids = torch.zeros(8, 16, dtype=torch.long, device="meta")
    return trace(Irregular().to("meta"), (ids, ids), {}).graph


def one_by_one(graph: OpGraph) -> OpGraph:
    """The same graph, of whose segments none is known to be a copy."""
    apart = replace(graph)
    apart.__dict__["wirings"] = tuple(replace(wiring, form=n) for n, wiring in enumerate(graph.wirings))  # where cached_property looks
    return apart


@pytest.fixture(scope="module", params=[regular, irregular])
def graph(request) -> OpGraph:
    return request.param()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_planning_is_the_same_where_copies_are_not_seen(graph: OpGraph, options: Options) -> None:
    """Of plans that cost the same, which one is found depends on the order of elimination; what they cost does not."""
    planned, apart = plan_graph(graph, CLUSTER, options), plan_graph(one_by_one(graph), CLUSTER, options)
    ours, its = planned.plan, apart.plan
    assert (ours.mesh, ours.params, ours.residency, ours.proof.status) == (its.mesh, its.params, its.residency, its.proof.status)
    assert ours.predicted.step_time_s == pytest.approx(its.predicted.step_time_s, rel=1e-12)
    assert ours.proof.bound == pytest.approx(its.proof.bound, rel=1e-12)
    assert (ours.predicted.communicated_bytes, ours.predicted.memory.state_bytes) == (its.predicted.communicated_bytes, its.predicted.memory.state_bytes)
    program = replace(planned.program, graph=one_by_one(graph))
    for engine in (Engine(), Engine(receives=True, one_by_one=True)):
        assert memory_use(planned.program, engine) == memory_use(program, engine)


def built(graph: OpGraph) -> tuple[MeshSearch, Keeping, SearchProblem, Ports]:
    rules = rules_of(graph)
    search = MeshSearch(graph, rules, batch_factors(graph, rules), CLUSTER, Mesh.of(a=2, b=2), Pins(), Options(), False)
    keeping = search.given.everything()
    return search, keeping, *search.problem(keeping)


def test_problems_and_any_choices_are_the_same(graph: OpGraph) -> None:
    """Also where copies of a block are in different states: a plan for the least time or memory, changed here and there."""
    search, keeping, problem, ports = built(graph)
    apart, _, twin, its_ports = built(one_by_one(graph))
    for ours, its in ((problem.nodes, twin.nodes), (problem.edges, twin.edges)):
        for one, other in zip(ours, its, strict=True):
            assert (one.name == other.name) if isinstance(one, Node) else ((one.u, one.v) == (other.u, other.v))
            assert np.array_equal(one.cost_s, other.cost_s) and np.array_equal(one.memory_bytes, other.memory_bytes)
    rng = np.random.default_rng(0)
    starts = [solve(problem).choices, leanest(problem).choices]
    seen = set()
    for trial in range(60):
        choices = list(starts[trial % 2])
        for node in rng.permutation(len(problem.nodes))[: rng.integers(1, 40)]:
            before, choices[node] = choices[node], int(rng.integers(problem.nodes[node].num_states))
            choices[node] = choices[node] if np.isfinite(evaluate(problem, choices)[0]) else before
        ours = decode(search.graph, search.rules, search.pricing, ports, choices, keeping)
        its = decode(apart.graph, apart.rules, apart.pricing, its_ports, choices, keeping)
        assert dict(ours.routes) == dict(its.routes) and ours.relay == its.relay
        assert (ours.produced, ours.residency, ours.ledger) == (its.produced, its.residency, its.ledger)
        found = memory_use(ours, Engine())
        assert found == memory_use(its, Engine())
        seen.add(found)
    assert len(seen) > 30


def test_copies_share_their_scripts() -> None:
    """Of six equal blocks at most the first differs; where blocks differ, they do not share."""
    graph = regular()
    assert [w.form for w in graph.wirings] == [0, 1, 1, 1, 1, 1, 1, 2]
    scripts = [run.script for run in steps_of(plan_graph(graph, CLUSTER, OPTIONS["dp"]).program).runs]
    assert len({id(s) for s in scripts[2:7]}) == 1
    graph = irregular()
    form = {segment.block: wiring.form for segment, wiring in zip(graph.segments, graph.wirings, strict=True)}
    alike = [{0, 1, 3, 7}, {2}, {4, 6}, {5}]
    assert [{n for n in range(8) if form[f"blocks.{n}"] == form[f"blocks.{min(group)}"]} for group in alike] == alike


def test_calls_tell_arguments_apart_that_are_equal() -> None:
    class Powers(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.pow(2) + x.pow(2.0)).sum()

    graph = trace(Powers(), (torch.zeros(4),), {}).graph
    powers = [call for call, op in zip(graph.calls, graph.ops, strict=True) if "pow" in op.kind]
    assert len(powers) == 2 and len(set(powers)) == 2
