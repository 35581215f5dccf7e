"""The search itself finds the plans that people write by hand, from costs alone."""

import dataclasses
from collections import Counter

import pytest
import torch
from torch import nn

import autopar
from autopar.core.mesh import Mesh
from autopar.errors import PinConflictError
from autopar.models.load import load_model
from autopar.models.own import TransformerBlock
from autopar.planner.pins import Pins
from autopar.planner.plan import Planned, plan_graph
from autopar.planner.problem import ProblemBuilder
from autopar.planner.roles import Constraints, batch_factors
from autopar.planner.rulebook import rules_of
from autopar.planner.search import Options
from autopar.planner.states import Pricing
from autopar.search.elimination import minimise
from autopar.trace.capture import Traced, trace


def planned(traced: Traced, cluster: autopar.Cluster, **options: object) -> Planned:
    return plan_graph(traced.graph, cluster, Options(**options))


def node_of_four(latency_s: float) -> autopar.Cluster:
    node = autopar.Cluster.preset("h100-sxm", 1, 4)
    return dataclasses.replace(node, intra_node=dataclasses.replace(node.intra_node, latency_s=latency_s))


def blocks(hidden: int, seq: int, batch: int, layers: int = 3) -> Traced:
    with torch.device("meta"):
        model = nn.Sequential(*(TransformerBlock(hidden=hidden, heads=16, inner=4 * hidden) for _ in range(layers)))
        return trace(model, (torch.zeros(batch, seq, hidden),))


def words(traced: Traced, result: Planned, block: str) -> dict[str, str]:
    """Module path -> strategy of the contractions of one block."""
    rows = zip(traced.graph.ops, result.program.rules, result.program.strategies)
    return {op.module_path.removeprefix(f"{block}."): rule.describe(s, result.program.mesh) for op, rule, s in rows if rule.cost == "contract" and op.module_path.startswith(block)}


def activation_moves(traced: Traced, result: Planned) -> Counter:
    moves = result.program.moves
    return Counter((m.step.forward, m.step.backward) for m in moves if traced.graph.values[m.value].role == "op")


def test_megatron_is_found_where_tensor_parallelism_is_asked_for() -> None:
    traced = blocks(hidden=1024, seq=128, batch=4)
    result = planned(traced, node_of_four(2e-5), pins=("tp=4",))
    found = words(traced, result, "1")
    assert [found[name] for name in ("q", "k", "v", "up")] == ["tp:o"] * 4
    assert [found[name] for name in ("o", "down")] == ["tp:i"] * 2
    assert found["1"] == "tp:g"
    # 3 layers: two all-reduces forward and two backward a layer, and nothing between the two linears. The very first has nothing
    # before it: the gradient of its input is wanted by the weights of a norm alone, and those are summed for less.
    assert activation_moves(traced, result) == {("all_reduce", "identity"): 6, ("identity", "all_reduce"): 5}


def test_sequence_parallelism_is_found_where_it_is_cheaper() -> None:
    traced = blocks(hidden=4096, seq=4096, batch=1)
    result = planned(traced, node_of_four(1e-6), mesh=Mesh.of(a=4))
    found = words(traced, result, "1")
    assert [found[name].split(":")[1] for name in ("q", "k", "v", "up", "o", "down")] == ["o"] * 4 + ["i"] * 2
    moves = activation_moves(traced, result)
    # 3 layers, 6 partial sums: between blocks all are scattered. The last is the output, which must be whole: one all-reduce
    # of (partial sum + residual) moves the same bytes as a reduce-scatter and an all-gather, in one message.
    assert moves["reduce_scatter", "all_gather"] == 5 and moves["all_gather", "reduce_scatter"] >= 5
    assert {pair: count for pair, count in moves.items() if "all_reduce" in pair} == {("all_reduce", "identity"): 1}


def test_small_weights_and_a_large_batch_give_data_parallelism() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 16))
        traced = trace(model, (torch.zeros(1 << 20, 256),))
    result = planned(traced, autopar.Cluster.preset("h100-sxm", 1, 4), mesh=Mesh.of(dp=4))
    rules = zip(traced.graph.ops, result.program.rules, result.program.strategies)
    assert all(rule.describe(s, result.program.mesh) == "dp:b0" for _, rule, s in rules if rule.cost == "contract")


def test_large_weights_and_a_small_batch_do_not() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8192, 32768), nn.ReLU(), nn.Linear(32768, 8192))
        traced = trace(model, (torch.zeros(16, 8192),))
    result = planned(traced, autopar.Cluster.preset("h100-sxm", 1, 4), mesh=Mesh.of(a=4))
    rules = zip(traced.graph.ops, result.program.rules, result.program.strategies)
    assert [rule.describe(s, result.program.mesh) for _, rule, s in rules if rule.cost == "contract"] == ["tp:o", "tp:i"]


def test_alexnet_cuts_the_batch_of_its_convolutions_and_the_weights_of_its_classifier() -> None:
    loaded = load_model("alexnet", batch=256, device="meta")
    traced = trace(loaded.module, (), loaded.kwargs)
    result = planned(traced, autopar.Cluster.preset("a100-sxm", 1), mesh=Mesh.of(a=8))
    features, classifier = (words(traced, result, part) for part in ("features", "classifier"))
    assert len(features) == 5 and {word.split(":")[1] for word in features.values()} == {"n"}
    assert len(classifier) == 3 and {word.split(":")[1] for word in classifier.values()} == {"o", "i"}


def test_annotating_two_weights_yields_the_megatron_mlp() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        traced = trace(model, (torch.zeros(32, 64),))
    result = planned(traced, node_of_four(1e-6), mesh=Mesh.of(tp=4), pins=("0.weight=tp:S0", "2.weight=tp:S1"))
    rules = zip(traced.graph.ops, result.program.rules, result.program.strategies)
    assert [rule.describe(s, result.program.mesh) for _, rule, s in rules if rule.cost == "contract"] == ["tp:o", "tp:i"]


def test_contradictory_pins_name_both() -> None:
    traced = blocks(hidden=64, seq=16, batch=4, layers=1)
    with pytest.raises(PinConflictError, match=r"0\.up\.weight=tp:S0.*0\.up\.weight=tp:S1|0\.up\.weight=tp:S1.*0\.up\.weight=tp:S0"):
        planned(traced, node_of_four(1e-6), mesh=Mesh.of(tp=4), pins=("0.up.weight=tp:S0", "0.up.weight=tp:S1"))


def test_blocks_are_searched_once() -> None:
    """Of the tables of further equal layers the search computes only those that carry the costs of layouts from one to the next."""
    distinct, nodes = [], []
    for layers in (4, 12):
        graph = blocks(hidden=256, seq=64, batch=4, layers=layers).graph
        rules = rules_of(graph)
        mesh = Mesh.of(a=2, b=2)
        builder = ProblemBuilder(graph, rules, batch_factors(graph, rules), Pricing(node_of_four(1e-6), mesh), Constraints(mesh, Pins(), False))
        problem = builder.build(None)[0]
        distinct.append(minimise(problem).num_distinct)
        nodes.append(len(problem.nodes))
    assert distinct[1] - distinct[0] <= 0.1 * (nodes[1] - nodes[0])
