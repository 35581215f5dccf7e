"""What is said of a plan beside another: recomputed from its program, and true of the search."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from autopar.core.change import changed
from autopar.core.cluster import Cluster, Host
from autopar.errors import UsageError
from autopar.models.load import load_model
from autopar.planner.appraisal import AGAIN, LEFT_FREE, STARTING, UPDATE, WAITING
from autopar.planner.baselines import baseline_pins
from autopar.planner.explain import decisions_of
from autopar.request import Request

PLANS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    ((), {}),
    (("dp=2", "tp=2"), {}),
    (("dp=4", "zero=3"), {"micro_batches": 2}),
    (("dp=2", "zero=2", "recompute=full"), {"micro_batches": 2}),
    (("tp=2", "dp=2", "recompute=selective", "zero=1"), {}),
    (("tp=4", "recompute=selective+gather"), {"micro_batches": 2}),
    (("tp=2", "dp=2", "recompute=full+gather", "zero=2"), {}),
    (("pp=2", "tp=2", "schedule=1f1b", "recompute=full+gather"), {"micro_batches": 4}),
    (("pp=2", "tp=2", "schedule=1f1b"), {"micro_batches": 4}),
    (("pp=2", "dp=2", "schedule=interleaved", "virtual=2"), {"micro_batches": 4}),
]


MEASURED = replace(Cluster.local(4), host=Host(cores=2.0, action_s=1e-3, watch_s=5e-5, update_bytes_per_s=8e9))


def request_for(name: str, **given: Any) -> Request:
    loaded = load_model(name, batch=8, device="meta", **given)
    return Request(loaded.module, loaded.kwargs)


@pytest.fixture(scope="module")
def gpt2() -> Request:
    return request_for("gpt2-tiny", overrides={"n_layer": 4})


@pytest.mark.parametrize("pins,given", PLANS, ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
@pytest.mark.parametrize("cluster", [MEASURED, Cluster.local(4), Cluster.preset("h100-sxm", 1, 4)], ids=["measured", "local", "h100"])
def test_a_plan_costs_what_the_search_said(gpt2: Request, pins: tuple[str, ...], given: dict[str, Any], cluster: Cluster) -> None:
    plan = gpt2.planned(cluster, pins=pins, **given).plan
    found = gpt2.appraised(plan, cluster)
    assert sum(found.terms.values()) == pytest.approx(found.step_s, rel=1e-12)
    assert found.step_s == pytest.approx(plan.predicted.step_time_s, rel=1e-5)  # tie breaks of some nanoseconds
    assert found.memory == plan.predicted.memory and found.communicated_bytes == plan.predicted.communicated_bytes
    assert ("computed again" in found.terms) == bool(plan.residency.recompute)
    assert bool({WAITING, LEFT_FREE} & set(found.terms)) == (plan.pipeline is not None)
    assert ({UPDATE, STARTING} <= set(found.terms)) == (cluster is MEASURED)


class Feedforward(nn.Module):
    """Products alone; the backward needs no result of the last one."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, 3 * width, bias=False), nn.Linear(3 * width, width, bias=False)) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sum()


def test_recomputation_is_paid_until_all_is_there() -> None:
    """On a device where products alone take time: the flops that are done again, by the search and by the program."""
    rate, depth, width, rows = 1e9, 3, 8, 5
    device = replace(Cluster.local(1).device, memory_bytes_per_s=1e30, peak_flops_per_s=(("float32", rate),), kernel_launch_s=0.0, matmul_efficiency=1.0)
    cluster = replace(Cluster.local(1), device=device)
    asked = Request(Feedforward(width, depth), (torch.randn(rows, width),))
    none, full = (asked.planned(cluster, pins=(f"recompute={mode}",)).plan for mode in ("none", "full"))
    again = depth * 2.0 * rows * width * 3 * width
    assert full.predicted.recomputed_flops == again
    assert full.predicted.step_time_s - none.predicted.step_time_s == pytest.approx(again / rate, rel=1e-6)
    assert asked.appraised(full, cluster).terms[AGAIN] == pytest.approx(again / rate, rel=1e-6)


@pytest.mark.parametrize("name", ["gpt2-tiny", "mlp-tiny", "t5-tiny"])
def test_no_baseline_is_faster_than_the_searched_plan(name: str) -> None:
    request, cluster = request_for(name), Cluster.parse("h100-sxm:1x4")
    best = request.planned(cluster).plan.predicted.step_time_s
    for baseline in ("ddp", "zero1", "zero2", "fsdp", "tp", "megatron:tp2"):
        pins = baseline_pins(baseline, cluster)
        assert pins is not None
        assert request.planned(cluster, pins=pins).plan.predicted.step_time_s >= best * (1 - 1e-9), baseline


def test_alternatives_cost_what_pinning_them_costs() -> None:
    """The price of another layout of a parameter is what the search finds where that layout is pinned."""
    request, cluster, pins = request_for("mlp-tiny"), Cluster.parse("h100-sxm:1x4"), ("dp=2", "tp=2")
    planned = request.planned(cluster, pins=pins)
    step_s = planned.plan.predicted.step_time_s
    compared = 0
    for d in decisions_of(planned):
        assert d.extra_s >= -1e-9 * step_s, d
        axis, equals, word = ("tp", "=", "I") if d.alternative == "whole" else d.alternative.partition("=")
        if equals and axis == "tp" and " " not in word and "," not in word:
            other = request.planned(cluster, pins=(*pins, f"{d.what}=tp:{word}")).plan
            assert other.predicted.step_time_s - step_s == pytest.approx(d.extra_s, rel=1e-6, abs=1e-9 * step_s), d
            compared += 1
    assert compared >= 3


def test_baselines_are_the_pins_people_expect() -> None:
    cluster = Cluster.parse("h100-sxm:2")
    assert baseline_pins("ddp", cluster) == ("dp=16", "tp=1", "zero=0")
    assert baseline_pins("fsdp", cluster) == baseline_pins("zero3", cluster) == ("dp=16", "tp=1", "zero=3")
    assert baseline_pins("megatron:tp4,pp2", cluster) == ("dp=2", "tp=4", "pp=2", "schedule=1f1b", "zero=1")
    assert baseline_pins("megatron:tp8,pp2,vpp2", cluster) == ("dp=1", "tp=8", "pp=2", "virtual=2", "schedule=interleaved")
    assert baseline_pins("tp=2,dp=8", cluster) is None
    for text, words in (("megatron:tp3", "makes"), ("megatron:tp2,tp4", "each once"), ("megatron:", "write its degrees"), ("megatron:tp0", "each once")):
        with pytest.raises(UsageError, match=words):
            baseline_pins(text, cluster)


def test_a_changed_cluster_is_the_same_but_for_the_change() -> None:
    cluster = Cluster.preset("h100-sxm", nodes=2)
    twice = changed(cluster, ["inter_node.bandwidth*=2", "device.memory=40 GB", "num_nodes*=3"])
    assert twice.inter_node.bandwidth_bytes_per_s == 2 * cluster.inter_node.bandwidth_bytes_per_s
    assert (twice.device.memory_bytes, twice.num_nodes) == (40 * 10**9, 6)
    assert (twice.intra_node, twice.device.peak_flops_per_s) == (cluster.intra_node, cluster.device.peak_flops_per_s)
    assert changed(cluster, []) == cluster and changed(Cluster.local(2), ["intra_node.latency*=0.5"]).is_local
    assert changed(cluster, ["device.peak.bfloat16*=0.5"]).device.peak("bfloat16") == 0.5 * cluster.device.peak("bfloat16")


@pytest.mark.parametrize(
    "text,words",
    [
        ("inter_node.bandwith*=2", "did you mean inter_node.bandwidth"), ("inter_node.bandwidth", "write KEY=VALUE"), ("inter_node.bandwidth*=fast", "not a factor"),
        ("inter_node.bandwidth*=-1", "not a factor"), ("num_nodes*=0.3", "no whole number"), ("num_nodes=many", "not a count"), ("device.memory=40", "no unit"),
        ("device.matmul_efficiency=2", "not a share"), ("device.source.default=x", "no number"),
    ],
)  # fmt: skip
def test_what_is_no_change_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        changed(Cluster.preset("h100-sxm", nodes=2), [text])


def test_a_request_traces_each_microbatch_once(gpt2: Request) -> None:
    assert gpt2.traced(2) is gpt2.traced(2) and gpt2.graph(3) is None


def test_microbatches_do_the_same_flops() -> None:
    """Model flops of a step do not depend on how many microbatches its batch is cut into, nor on stages."""
    request, cluster = request_for("gpt2-tiny"), Cluster.parse("h100-sxm:1x4")
    pinned = [(("dp=2", "tp=2"), 1), (("dp=2", "tp=2"), 2), (("dp=2", "tp=2"), 4), (("pp=2", "dp=2", "schedule=gpipe"), 4)]
    found = [request.planned(cluster, pins=pins, micro_batches=number).plan.predicted for pins, number in pinned]
    assert [p.mfu * p.step_time_s for p in found] == pytest.approx([found[0].mfu * found[0].step_time_s] * 4, rel=1e-9)
