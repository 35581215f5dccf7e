"""Pipelines that the planner finds: priced like the programs they are, cut as well as can be, placed on the right links, within memory."""

import itertools
import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.core.cluster import Cluster
from autopar.core.graph import OpGraph
from autopar.core.mesh import Mesh
from autopar.core.pipeline import PP
from autopar.core.plan import Plan
from autopar.errors import InfeasibleError, PinConflictError, UsageError
from autopar.models.load import load_model
from autopar.models.own import TransformerBlock
from autopar.planner.bind import bind
from autopar.planner.blocks import Blocks, Order
from autopar.planner.cuts import best_cut, bound_s, formula_cut
from autopar.planner.lengths import Task
from autopar.planner.liveness import Engine
from autopar.planner.pins import parse_pins
from autopar.planner.pipelines import StageSearch
from autopar.planner.plan import plan_graph
from autopar.planner.search import Options
from autopar.planner.staging import Staged
from autopar.planner.states import Pricing
from autopar.planner.work import step_seconds
from autopar.program import Program
from autopar.runtime.microbatches import split_batch
from autopar.stages import cut_into_stages
from autopar.trace.capture import trace

ROUNDING = 1e-9
TIE_BREAKS = 1e-5
"""A nanosecond per step of a route and per ZeRO stage, which the search counts for every parameter."""

ORDERS = [Order("1f1b", 3, 4), Order("gpipe", 3, 4), Order("zero-bubble", 3, 4), Order("interleaved", 2, 4, 2), Order("naive", 2, 3), Order("1f1b", 4, 2)]


@cache
def graph_of(name: str, micro_batches: int = 2, batch: int = 16, **overrides: Any) -> OpGraph:
    loaded = load_model(name, batch=batch, device="meta", overrides=overrides)
    return trace(loaded.module, (), split_batch(loaded.kwargs, micro_batches)[0]).graph


def nodes_of(num_nodes: int, devices: int, **inter_node: float) -> Cluster:
    cluster = Cluster.preset("h100-sxm", num_nodes, devices)
    return replace(cluster, inter_node=replace(cluster.inter_node, **inter_node))


def with_memory(cluster: Cluster, num_bytes: float) -> Cluster:
    return replace(cluster, device=replace(cluster.device, memory_bytes=int(num_bytes)))


class Deep(nn.Module):
    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TransformerBlock(hidden=hidden, heads=16, inner=4 * hidden) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def deep(hidden: int, layers: int, batch: int, seq: int) -> tuple[nn.Module, tuple[torch.Tensor]]:
    with torch.device("meta"):
        return Deep(hidden, layers), (torch.zeros(batch, seq, hidden),)


# --- prices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pins", [("dp=8",), ("dp=4", "tp=2"), ("dp=8", "zero=1"), ("dp=4", "tp=2", "zero=2"), ("dp=4", "tp=2", "zero=3", "recompute=full")], ids=str)
@pytest.mark.parametrize("name", ["gpt2-tiny", "mixtral-tiny", "alexnet-tiny"])
def test_a_program_costs_what_the_search_said(name: str, pins: tuple[str, ...]) -> None:
    """Two ways to one number: tables of states, and the pieces of the program that came out."""
    cluster = nodes_of(4, 2)
    planned = plan_graph(graph_of(name), cluster, Options(pins=pins, micro_batches=2))
    assert step_seconds(planned.program, Pricing(cluster, planned.program.mesh)) == pytest.approx(planned.plan.proof.objective, rel=TIE_BREAKS)


@cache
def program_of(name: str, **overrides: Any) -> Program:
    """Data parallel on two devices: the mesh of a stage."""
    return plan_graph(graph_of(name, **overrides), nodes_of(1, 2), Options(pins=("dp=2",), micro_batches=2)).program


def blocks_of(program: Program, order: Order, cluster: Cluster) -> Blocks:
    """For as many microbatches as the order has."""
    program = replace(program, residency=replace(program.residency, micro_batches=order.num_microbatches))
    return Blocks(program, Pricing(cluster, program.mesh, (order.num_ranks, 0)))


def check_random_cuts(blocks: Blocks, order: Order, rng: random.Random) -> None:
    """What the table says of three of them, against the stages themselves and the bound."""
    for _ in range(3):
        cuts = tuple(sorted(rng.sample(range(1, blocks.num_blocks), order.num_stages - 1)))
        table = blocks.timeline(cuts, order)
        staged = Staged.of(blocks, replace(formula_cut(blocks, order, float("inf")), cuts=cuts), order, Engine())
        assert staged.timeline.step_time_s == pytest.approx(table.step_time_s, rel=ROUNDING)
        assert bound_s(blocks, cuts, order) <= table.step_time_s * (1 + ROUNDING)


@pytest.mark.parametrize("name,layers", [("gpt2-tiny", {"n_layer": 6}), ("t5-tiny", {"num_layers": 3, "num_decoder_layers": 3}), ("mlp-tiny", {})], ids=str)
def test_stages_cost_what_the_table_says(name: str, layers: dict[str, int]) -> None:
    """Any cut: skip connections over several stages, tied weights, values that several stages read."""
    rng = random.Random(7)
    for order in ORDERS:
        check_random_cuts(blocks_of(program_of(name, **layers), order, nodes_of(4, 2)), order, rng)


# --- cuts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_best_cut_is_that_of_brute_force(order: Order) -> None:
    cluster = nodes_of(4, 2, latency_s=2e-5)
    blocks = blocks_of(program_of("gpt2-tiny", n_layer=6), order, cluster)
    every = itertools.combinations(range(1, blocks.num_blocks), order.num_stages - 1)
    best = min(blocks.timeline(cuts, order).step_time_s for cuts in every)
    found = best_cut(blocks, order, float("inf"))
    assert found.exact and found.timeline.step_time_s == pytest.approx(best, rel=ROUNDING)


def test_the_plan_is_the_best_of_all_cuts_and_schedules() -> None:
    """Of a pipeline of two: every schedule, every cut, built and simulated."""
    cluster, graph = nodes_of(1, 2), graph_of("gpt2-tiny", 4, n_layer=5)
    plan = plan_graph(graph, cluster, Options(pins=("pp=2",), micro_batches=4)).plan
    task = Task.of(graph, Options(micro_batches=4))
    times = {}
    for order in (Order("1f1b", 2, 4), Order("gpipe", 2, 4), Order("zero-bubble", 2, 4), Order("interleaved", 2, 4, 2)):
        search = StageSearch(graph, task.rules, task.batch, cluster, Mesh.of(a=1), parse_pins(()), task.options, False, order, 0)
        blocks = Blocks(search.sharded().program, search.pricing)
        for cuts in itertools.combinations(range(1, blocks.num_blocks), order.num_stages - 1):
            times[order, cuts] = blocks.timeline(cuts, order).step_time_s
    assert plan.predicted.step_time_s == pytest.approx(min(times.values()), rel=ROUNDING)
    assert plan.proof.bound <= plan.predicted.step_time_s


# --- what is chosen --------------------------------------------------------------------------------------------------


def test_no_pipeline_for_a_tiny_model_on_a_slow_link() -> None:
    cluster = Cluster.local(4)
    slow = replace(cluster, intra_node=replace(cluster.intra_node, latency_s=0.02))
    loaded = load_model("gpt2-tiny", batch=16, device="meta")
    plan = autopar.plan(loaded.module, slow, loaded.kwargs, pipelines=True)
    assert plan.pipeline is None and plan.proof.gap == 0 and "pipelines tried" in plan.proof.status


@pytest.mark.parametrize("micro_batches", [None, 1])
@pytest.mark.parametrize("action_s", [1e-3, 0.0])
def test_a_pipeline_needs_no_margin_where_its_actions_are_priced(action_s: float, micro_batches: int | None) -> None:
    """Where ranks share cores even one microbatch may run faster in stages: those that wait leave their cores to the others."""
    loaded = load_model("mlp", batch=1024, device="meta", overrides={"width": 1024, "depth": 1, "classes": 1024})
    local = Cluster.local(4)
    cluster = replace(
        local, host=replace(local.host, cores=2.0, action_s=action_s), intra_node=replace(local.intra_node, bandwidth_bytes_per_s=8 * local.intra_node.bandwidth_bytes_per_s)
    )
    whole, staged = (autopar.plan(loaded.module, cluster, loaded.kwargs, pins=pins, micro_batches=micro_batches) for pins in (("pp=1",), ("pp=2",)))
    assert 1.0 < whole.predicted.step_time_s / staged.predicted.step_time_s < 1.05
    found = autopar.plan(loaded.module, cluster, loaded.kwargs, pipelines=True, micro_batches=micro_batches)
    assert (found.pipeline is not None) == (action_s > 0)


def test_a_deep_model_over_slow_links_between_nodes_is_a_pipeline_of_nodes() -> None:
    cluster = nodes_of(2, 4, bandwidth_bytes_per_s=2e9)
    model, inputs = deep(hidden=2048, layers=4, batch=16, seq=512)
    plan = autopar.plan(model, cluster, inputs, pipelines=True)
    assert plan.pipeline is not None and plan.pipeline.position == 0
    flat = autopar.plan(model, cluster, inputs, pins=("pp=1",))
    assert plan.predicted.step_time_s < flat.predicted.step_time_s
    names = {axis.name: (axis.size, stride) for axis, stride in zip(plan.whole_mesh.axes, plan.whole_mesh.strides)}
    assert names[PP][0] * names[PP][1] == 8, "the pipeline's axis is the outermost: its messages cross the nodes, and nothing else does"
    assert all(stride * size <= 4 for name, (size, stride) in names.items() if name != PP)


def placed(cluster: Cluster, graph: OpGraph, mesh: Mesh, order: Order, position: int) -> Staged:
    task = Task.of(graph, Options(micro_batches=order.num_microbatches))
    search = StageSearch(graph, task.rules, task.batch, cluster, mesh, parse_pins(("tp=4", "pp=2")), task.options, True, order, position)
    return search.staged(search.sharded()).staged


def test_the_axis_that_moves_the_most_bytes_is_the_innermost() -> None:
    """Tensor parallelism moves more than a pipeline: reversed, it would cross the nodes."""
    cluster = nodes_of(2, 4, bandwidth_bytes_per_s=5e9)
    model, inputs = deep(hidden=1024, layers=4, batch=8, seq=256)
    graph = trace(model, split_batch(inputs, 4)[0]).graph
    plan = plan_graph(graph, cluster, Options(pins=("tp=4", "pp=2", "dp=1", "schedule=1f1b"), micro_batches=4)).plan
    assert plan.pipeline is not None and plan.pipeline.position == 0
    order = Order("1f1b", 2, 4)
    chosen, reverse = (placed(cluster, graph, Mesh.of(tp=4), order, position) for position in (0, 1))
    assert chosen.timeline.step_time_s < reverse.timeline.step_time_s
    moved: dict[str, float] = {}
    for key, size in chosen.stages.ledger(0).moved.items():
        moved[key.split()[1]] = moved.get(key.split()[1], 0.0) + size
    assert moved["tp"] > moved[PP] and plan.whole_mesh.names[-1] == "tp"


# --- figures ---------------------------------------------------------------------------------------------------------


def test_predicted_bytes_are_those_of_the_stages_and_the_plan_survives_its_file() -> None:
    graph = graph_of("gpt2-tiny", 4, n_layer=4)
    plan = plan_graph(graph, nodes_of(2, 2), Options(pins=("pp=2", "dp=2", "zero=1", "schedule=interleaved"), micro_batches=4)).plan
    read = Plan.from_json(plan.to_json())
    assert read == plan and read.pipeline is not None
    stages = cut_into_stages(bind(read, graph), read.pipeline)
    assert read.predicted.communicated_bytes == max(stages.ledger(rank).total_bytes for rank in range(2))
    assert [s.num_params for s in read.predicted.stages] == [sum(s.program.graph.values[v].meta.numel for v in s.program.graph.params) for s in stages.stages]
    assert plan.summary() == "pp2(interleaved v2) x dp2(zero1), 4 microbatches"
    figures = plan.predicted
    assert max(s.peak_memory_bytes for s in figures.stages) == figures.peak_memory_bytes
    assert figures.compute_s + figures.communication_s <= figures.step_time_s and 0 < figures.bubble < 1


def test_in_flight_microbatches_are_those_of_the_schedule() -> None:
    graph = graph_of("gpt2-tiny", 8, n_layer=4)
    for schedule, wanted in (("1f1b", [4, 3, 2, 1]), ("gpipe", [8, 8, 8, 8])):
        plan = plan_graph(graph, nodes_of(1, 4), Options(pins=("pp=4", f"schedule={schedule}"), micro_batches=8)).plan
        assert [s.in_flight for s in plan.predicted.stages] == wanted


def test_fewer_microbatches_than_stages() -> None:
    plan = plan_graph(graph_of("gpt2-tiny", 2, n_layer=4), nodes_of(1, 4), Options(pins=("pp=4", "schedule=1f1b"), micro_batches=2)).plan
    assert plan.pipeline is not None and plan.predicted.bubble > 0.5


# --- memory ----------------------------------------------------------------------------------------------------------


def test_every_stage_fits_its_memory_or_what_is_missing_is_said() -> None:
    cluster, graph = nodes_of(1, 2), graph_of("gpt2-tiny", 4, n_layer=3)
    options = Options(pins=("pp=2", "schedule=1f1b"), micro_batches=4, memory_share=1.0)
    plan = plan_graph(graph, cluster, options).plan
    whole = plan.predicted.peak_memory_bytes
    share, slower = 1.0, 0
    while True:
        share *= 0.7
        limit = whole * share
        try:
            lean = plan_graph(graph, with_memory(cluster, limit), options).plan
        except InfeasibleError as error:
            assert "over the limit" in str(error) and "it would fit" in str(error)
            break
        assert max(s.peak_memory_bytes for s in lean.predicted.stages) == lean.predicted.peak_memory_bytes <= limit
        slower += lean.predicted.step_time_s > plan.predicted.step_time_s
    assert slower and share < 0.7


def test_a_pipeline_where_one_device_cannot_hold_the_model() -> None:
    """Pure data parallelism does not fit; stages do, without cutting any tensor."""
    graph = graph_of("gpt2-tiny", 4, n_layer=4)
    need = plan_graph(graph, nodes_of(1, 2), Options(pins=("dp=2", "recompute=full", "zero=0"), micro_batches=4)).plan.predicted.peak_memory_bytes
    cluster = with_memory(nodes_of(1, 2, latency_s=1e-3), 0.9 * need)
    options = Options(pins=("zero=0",), micro_batches=4, memory_share=1.0)
    with pytest.raises(InfeasibleError):
        plan_graph(graph, cluster, replace(options, pins=("zero=0", "dp=2", "pp=1")))
    plan = plan_graph(graph, cluster, replace(options, pins=("zero=0", "pp=2"))).plan
    assert plan.pipeline is not None and plan.predicted.peak_memory_bytes <= 0.9 * need


# --- pins ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pins,error,words",
    [
        (("pp=1", "schedule=1f1b"), PinConflictError, "pp=1 is no pipeline"),
        (("pp=2", "schedule=interleaved", "virtual=1"), PinConflictError, "pin virtual=2 or more"),
        (("pp=2", "schedule=1f1b", "virtual=2"), PinConflictError, "pin schedule=interleaved"),
        (("pp=2", "schedule=zero-bubble", "zero=3"), PinConflictError, "twice the traffic; pin zero=1 or schedule=1f1b"),
        (("pp=2", "schedule=forward"), UsageError, "schedule is naive, gpipe, 1f1b, interleaved, zero-bubble"),
        (("pp=3",), UsageError, "divides 4"),
        (("pp=2", "dp=4"), UsageError, "pp=2 x dp=4 make 8 devices"),
        (("pp=4", "virtual=4"), UsageError, "too few for a pipeline of 16 stages"),
        (("pp=4", "schedule=interleaved"), UsageError, "not a multiple of 4 ranks"),
    ],
    ids=str,
)  # fmt: skip
def test_what_no_pipeline_can_be_is_refused_in_one_line(pins: tuple[str, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as raised:
        plan_graph(graph_of("gpt2-tiny", 2, n_layer=7), nodes_of(1, 4), Options(pins=pins, micro_batches=2))
    assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("zero", [2, 3])
def test_zero_goes_with_schedules_that_do_not_split_the_backward(zero: int) -> None:
    graph = graph_of("gpt2-tiny", 4, n_layer=4)
    plan = plan_graph(graph, nodes_of(1, 4), Options(pins=("pp=2", f"zero={zero}"), micro_batches=4)).plan
    assert plan.pipeline is not None and plan.pipeline.schedule != "zero-bubble"
    assert {z.stage for z in plan.residency.zero.values()} == {zero}


def test_the_number_of_microbatches_is_chosen_where_it_is_open() -> None:
    """Many where a microbatch is work, one where it is launches."""
    model, inputs = deep(hidden=1024, layers=4, batch=16, seq=256)
    pins, cluster = ("pp=2", "schedule=1f1b"), nodes_of(1, 2)
    chosen, *given = (autopar.plan(model, cluster, inputs, pins=pins, micro_batches=number) for number in (None, 1, 2, 16))
    assert chosen.residency.micro_batches > 1
    assert all(chosen.predicted.step_time_s <= plan.predicted.step_time_s for plan in given)
    tiny = load_model("gpt2-tiny", batch=16, device="meta", overrides={"n_layer": 4})
    assert autopar.plan(tiny.module, cluster, tiny.kwargs, pins=pins).residency.micro_batches == 1
