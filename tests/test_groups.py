"""Groups of different devices: stages priced on their own, cut as well as can be, within the memory of each, never slower than a part of the machines."""

import itertools
import json
import math
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import autopar
from autopar.choice import choose
from autopar.core.cluster import Cluster, Host
from autopar.core.mixed import MixedCluster
from autopar.core.objective import Objective
from autopar.core.plan import Plan
from autopar.errors import FileFormatError, InfeasibleError, PlanMismatchError, UsageError
from autopar.models.load import load_model
from autopar.planner.along import along
from autopar.planner.blocks import Blocks, Order
from autopar.planner.cuts import best_cut
from autopar.planner.groups import over_groups
from autopar.planner.mixed import shared_s
from autopar.planner.pipelines import StagedCandidate
from autopar.planner.plan import Planned
from autopar.program import Program
from autopar.request import Request
from autopar.stages import copies
from tests.cli.calling import Call
from tests.test_pipeline_search import ROUNDING, check_random_cuts, deep, program_of, with_memory

ORDERS = [Order("1f1b", 3, 4), Order("gpipe", 3, 4), Order("zero-bubble", 3, 4), Order("interleaved", 3, 6, 2), Order("1f1b", 3, 2)]


def mixed(a100: int = 1, h100: int = 1, devices: int = 2, **between: float) -> MixedCluster:
    found = MixedCluster.of(Cluster.preset("a100-sxm", a100, devices), Cluster.preset("h100-sxm", h100, devices))
    return replace(found, between=replace(found.between, **between))


def local_file(path: Path) -> MixedCluster:
    """Four processes of this machine, two of which are said to be three times as fast."""
    base = Cluster.local(2)

    def group(name: str, faster: float) -> Cluster:
        peaks = tuple((dtype, faster * rate) for dtype, rate in base.device.peak_flops_per_s)
        device = replace(base.device, name=name, memory_bytes=2 * 10**9, memory_bytes_per_s=faster * base.device.memory_bytes_per_s, peak_flops_per_s=peaks)
        return replace(base, name=f"local:{name}", device=device, host=Host())

    found = MixedCluster(name="local:lab", groups=(group("slow", 1.0), group("fast", 3.0)), between=base.inter_node)
    path.write_text(found.to_toml())
    return found


def on_three(program: Program, order: Order, groups: tuple[int, ...]) -> Blocks:
    """Three ranks on two nodes of A100 and two of H100, of two devices each."""
    program = replace(program, residency=replace(program.residency, micro_batches=order.num_microbatches))
    return Blocks(program, along(mixed(2, 2), groups, program.mesh))


# --- prices and cuts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [(0, 0, 1), (1, 1, 0), (0, 1, 1)], ids=str)
@pytest.mark.parametrize("name,layers", [("gpt2-tiny", {"n_layer": 6}), ("t5-tiny", {"num_layers": 3, "num_decoder_layers": 3})], ids=str)
def test_stages_cost_what_the_table_says(name: str, layers: dict[str, int], groups: tuple[int, ...]) -> None:
    """Any cut: skip connections over several stages, tied weights, values that several stages read; bounds hold on every one."""
    rng = random.Random(7)
    for order in ORDERS:
        check_random_cuts(on_three(program_of(name, **layers), order, groups), order, rng)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_best_cut_is_that_of_brute_force(order: Order) -> None:
    blocks = on_three(program_of("gpt2-tiny", n_layer=6), order, (0, 1, 1))
    every = itertools.combinations(range(1, blocks.num_blocks), order.num_stages - 1)
    best = min(blocks.timeline(cuts, order).step_time_s for cuts in every)
    found = best_cut(blocks, order, float("inf"))
    assert found.exact and found.timeline.step_time_s == pytest.approx(best, rel=ROUNDING)


def test_messages_take_the_links_that_they_cross() -> None:
    machines = mixed(2, 2, bandwidth_bytes_per_s=1e9)
    program = program_of("gpt2-tiny", n_layer=6)
    pricing = along(machines, (0, 0, 1, 1), program.mesh)
    a100, h100 = machines.groups
    launches = {g.name: g.device.kernel_launch_s for g in machines.groups}
    assert pricing.message(1e9, 0, 1) == pytest.approx(a100.inter_node.seconds(1e9) + launches[a100.name])
    assert pricing.message(1e9, 2, 3) == pytest.approx(h100.inter_node.seconds(1e9) + launches[h100.name])
    assert pricing.message(1e9, 1, 2) == pricing.message(1e9, 2, 1) == pytest.approx(machines.between.seconds(1e9) + max(launches.values()))
    assert pricing.message(1e9, 1, 1) == pricing.message(0, 1, 2) == 0
    assert pricing.places == ("a100-sxm:2x2",) * 2 + ("h100-sxm:2x2",) * 2


def test_the_bound_on_shared_work() -> None:
    assert shared_s([[6.0, 6.0], [3.0, 3.0]], [1, 1]) == pytest.approx(4.0), "speeds 1 and 2 together"
    assert shared_s([[6.0, 6.0]], [3]) == pytest.approx(4.0)
    for seed in range(50):  # every way to share five operators between three ranks of two kinds
        rng = random.Random(seed)
        kinds = [[rng.uniform(0.1, 2) for _ in range(5)] for _ in range(2)]
        of_rank = (0, 0, 1)
        best = min(
            max(sum(kinds[of_rank[r]][op] for op in range(5) if where[op] == r) for r in range(3)) for where in itertools.product(range(3), repeat=5)
        )
        assert shared_s(kinds, [2, 1]) <= best * (1 + ROUNDING)


# --- what is chosen --------------------------------------------------------------------------------------------------


@cache
def searched() -> tuple[Request, MixedCluster]:
    model, inputs = deep(hidden=2048, layers=9, batch=64, seq=512)
    return Request(model, inputs), mixed()


def test_deeper_stages_on_faster_devices_and_never_slower_than_a_part() -> None:
    request, machines = searched()
    planned = request.planned(machines)
    plan, step_s = planned.plan, planned.plan.predicted.step_time_s
    parts = [request.planned(part).plan.predicted.step_time_s for part in (*machines.groups, machines.slowest)]
    assert step_s < min(parts)
    assert plan.pipeline is not None and not plan.pipeline.shares and sorted(set(plan.pipeline.places)) == ["a100-sxm:1x2", "h100-sxm:1x2"]
    on = {place: sum(s.num_params for s in plan.predicted.stages if plan.pipeline.places[s.rank] == place) for place in plan.pipeline.places}
    assert 1.5 * on["a100-sxm:1x2"] < on["h100-sxm:1x2"]
    assert 0 < plan.proof.bound <= step_s and plan.cluster == machines.name
    assert [f"{s:.4g} s" in plan.notes[-1] for s in (*parts, step_s)] == [True] * 4
    assert set(parts) <= {p.predicted.step_time_s for p in planned.others(9)}
    assert request.appraised(plan, machines).step_s == pytest.approx(step_s, rel=ROUNDING)
    assert request.planned(machines).plan.to_json() == plan.to_json()


def test_a_plan_of_groups_is_saved_and_one_of_equal_devices_as_ever(tmp_path: Path) -> None:
    request, machines = searched()
    plan = request.planned(machines, pins=("pp=2", "dp=2")).plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan and plan.pipeline is not None and len(plan.pipeline.places) == 2
    data = json.loads(plan.to_json())
    data["pipeline"]["places"] = ["h100-sxm:1x2"]
    with pytest.raises(FileFormatError, match="name a group for every rank"):
        Plan.from_json(json.dumps(data))
    with pytest.raises(PlanMismatchError, match="100-sxm:1x2, which is no group of h100-sxm:2"):
        request.appraised(plan, Cluster.preset("h100-sxm", 2))
    alone = request.planned(machines.groups[1], pins=("pp=2",)).plan
    assert "places" not in json.loads(alone.to_json())["pipeline"]
    assert request.appraised(alone, machines).step_s == request.appraised(alone, machines.groups[1]).step_s, "a plan of one group costs what it costs there"


def test_a_slow_link_between_leaves_a_group_idle() -> None:
    request, machines = searched()
    apart = replace(machines, between=replace(machines.between, bandwidth_bytes_per_s=1e6))
    found = choose(request, apart, Objective())
    assert found.best.cluster == apart.groups[1] and found.plan.cluster == "h100-sxm:1x2"
    assert "a100-sxm:1x2 alone" in found.plan.notes[-1]
    cheapest = choose(request, machines, Objective("cost"))
    assert len(cheapest.looked) == 5, "all, and the parts of every group"
    assert cheapest.best.device_s == min(looked.device_s for looked in cheapest.looked)


def test_each_group_keeps_to_its_own_memory() -> None:
    request, machines = searched()
    asked: dict[str, Any] = {"pins": ("pp=2", "dp=2", "schedule=1f1b"), "micro_batches": 8, "joint": False}
    plan = request.planned(machines, **asked).plan
    assert plan.pipeline is not None
    held = {plan.pipeline.places[s.rank]: s.peak_memory_bytes for s in plan.predicted.stages}
    slow, fast = machines.groups
    lean = replace(machines, groups=(with_memory(slow, 0.7 * held[slow.name] / 0.9), fast))
    within = request.planned(lean, **asked).plan
    assert within.pipeline is not None
    limits = {group.name: 0.9 * group.device.memory_bytes for group in lean.groups}
    for stage in within.predicted.stages:
        assert stage.peak_memory_bytes <= limits[within.pipeline.places[stage.rank]]
    assert within.predicted.peak_memory_bytes > 0 and within.predicted.step_time_s > plan.predicted.step_time_s
    nothing = replace(machines, groups=(with_memory(slow, 1e6), with_memory(fast, 1e6)))
    with pytest.raises(InfeasibleError):
        request.planned(nothing, **asked)


def test_what_does_not_apply_is_said() -> None:
    request, machines = searched()
    with pytest.raises(UsageError, match="make 12 devices, a100-sxm:1x2.h100-sxm:1x2 as slow as its slowest has 4"):
        request.planned(machines, pins=("dp=3", "pp=4"), joint=False)
    with pytest.raises(UsageError, match="memory of their own"):
        next(request.front(machines))
    with pytest.raises(UsageError, match="memory of their own"):
        choose(request, machines, Objective("memory"))


def test_a_plan_of_equal_devices_does_not_change() -> None:
    """Two groups of the same devices, with the link between them that joins their nodes: the pipeline of two nodes."""
    request, _ = searched()
    nodes = Cluster.preset("h100-sxm", 2, 2)
    one = Cluster.preset("h100-sxm", 1, 2)
    halves = MixedCluster(name="halves", groups=(one, replace(one, name="the other")), between=nodes.inter_node)
    pins = ("pp=2", "dp=2", "schedule=1f1b")
    plan, same = (request.planned(c, pins=pins, micro_batches=8, joint=False).plan for c in (nodes, halves))
    assert same.predicted.step_time_s == pytest.approx(plan.predicted.step_time_s, rel=ROUNDING)
    assert plan.pipeline is not None and same.pipeline is not None and same.pipeline.starts == plan.pipeline.starts


# --- copies that share the batch -------------------------------------------------------------------------------------


@cache
def copied() -> tuple[Planned, Request, MixedCluster]:
    """The best copies of a wide model of few layers on one node of A100 and two of H100, of two devices each."""
    model, inputs = deep(hidden=1024, layers=3, batch=96, seq=512)
    request, machines = Request(model, inputs), mixed(1, 2)
    offered = over_groups(request.traced().graph, machines, request.options(), lambda text: None, request.graph)
    found, bound_s = offered["copies that share the batch"](math.inf)
    assert found is not None and 0 < bound_s <= found.plan.predicted.step_time_s
    return found, request, machines


def test_faster_copies_run_more_microbatches() -> None:
    planned, request, machines = copied()
    plan = planned.plan
    assert plan.pipeline is not None and plan.pipeline.schedule == "shared"
    shares = dict(zip(plan.pipeline.places, plan.pipeline.shares))
    assert shares["h100-sxm:2x2"] > 1.5 * shares["a100-sxm:1x2"]
    assert sum(plan.pipeline.shares) == plan.residency.micro_batches
    assert request.appraised(plan, machines).step_s == pytest.approx(plan.predicted.step_time_s, rel=ROUNDING)
    assert Plan.from_json(plan.to_json()) == plan


def test_no_other_shares_are_faster() -> None:
    """All of them, of this sharding, simulated."""
    planned, _, _ = copied()
    best, number = planned.candidates[0], planned.plan.residency.micro_batches
    assert isinstance(best, StagedCandidate) and planned.plan.pipeline is not None
    staged, ranks = best.staged, len(planned.plan.pipeline.shares)
    every = [s for s in itertools.product(range(1, number), repeat=ranks) if sum(s) == number and s[1:] == (s[1],) * (ranks - 1)]
    times = []
    for shares in every:
        pipeline = replace(planned.plan.pipeline, shares=shares)
        times.append(replace(staged, stages=copies(best.program, pipeline), order=replace(staged.order, shares=shares)).timeline.step_time_s)
    assert len(times) > 2 and best.step_s <= min(times) * (1 + ROUNDING)


def test_the_best_of_all_kinds_is_taken() -> None:
    planned, request, machines = copied()
    whole = request.planned(machines).plan
    assert whole.predicted.step_time_s <= planned.plan.predicted.step_time_s
    assert "copies that share the batch" in whole.notes[-1] and "a pipeline over the groups" in whole.notes[-1]


@pytest.mark.parametrize("pins", [("dp=2",), ("tp=2",), ("zero=3",)], ids=str)
def test_copies_train_the_same_on_a_simulated_mesh(tmp_path: Path, pins: tuple[str, ...]) -> None:
    machines = local_file(tmp_path / "lab.toml")
    loaded = load_model("gpt2-tiny", batch=16, seq=8, device="cpu", ragged=True)
    request = Request(loaded.module, loaded.kwargs)
    offered = over_groups(request.traced().graph, machines, request.options(pins=pins), lambda text: None, request.graph)
    found, _ = offered["copies that share the batch"](math.inf)
    assert found is not None and found.plan.pipeline is not None and set(found.plan.pipeline.places) == {"local:slow", "local:fast"}
    report = autopar.verify(loaded.module, found.plan, loaded.kwargs, steps=2)
    assert report.equal, str(report)
    assert report.bytes_predicted == report.bytes_counted


# --- the same training -----------------------------------------------------------------------------------------------


def local_plan(machines: MixedCluster, *pins: str, micro_batches: int = 4) -> tuple[Plan, Any]:
    loaded = load_model("gpt2-tiny", batch=16, device="cpu", overrides={"n_layer": 5})
    return autopar.plan(loaded.module, machines, loaded.kwargs, pins=pins, micro_batches=micro_batches), loaded


@pytest.mark.parametrize("pins", [("pp=2", "dp=2"), ("pp=4",), ("pp=2", "tp=2", "schedule=1f1b"), ("pp=2", "dp=2", "zero=3", "recompute=full"), ("pp=2", "dp=2", "virtual=2", "schedule=interleaved")], ids=str)
def test_the_same_training_on_a_simulated_mesh(tmp_path: Path, pins: tuple[str, ...]) -> None:
    plan, loaded = local_plan(local_file(tmp_path / "lab.toml"), *pins)
    assert plan.pipeline is not None and set(plan.pipeline.places) == {"local:slow", "local:fast"}
    report = autopar.verify(loaded.module, plan, loaded.kwargs, steps=2)
    assert report.equal, str(report)
    assert report.bytes_predicted == report.bytes_counted


@pytest.mark.gloo
def test_the_same_training_on_real_processes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    call = Call(capsys)
    path, kept = tmp_path / "lab.toml", tmp_path / "plan.json"
    local_file(path)
    planned = call("plan", "gpt2-tiny", "-c", path, "--pin", "pp=2", "--pin", "dp=2", "--micro-batches", 4, "--batch", 16, "-o", kept)
    assert planned.code == 0 and "processes in this order: 0 to 1 on local:" in planned.out
    called = call("run", "gpt2-tiny", "-c", path, "--plan", kept, "--batch", 16, "--steps", 3, "--json")
    assert (called.code, called.err) == (0, "")
    assert json.loads(called.out)["max_difference"] < 1e-5
