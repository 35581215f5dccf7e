"""What a plan is best at: of all parts of a cluster, each planned alone, no other is better; and a time that no plan keeps is refused."""

import math
from dataclasses import replace

import pytest

from autopar import plan
from autopar.choice import choose
from autopar.core.cluster import Cluster
from autopar.core.host import Host
from autopar.core.objective import Objective
from autopar.core.parts import parts
from autopar.errors import InfeasibleError, UsageError
from autopar.models.load import load_model
from autopar.request import Request

CLUSTER = Cluster.preset("a100-sxm", nodes=2, devices_per_node=4)


CROWDED = replace(Cluster.preset("a100-sxm"), host=Host(cores=2.0))
"""Devices that share two cores: half as many are twice as fast."""


@pytest.fixture(scope="module")
def request_() -> Request:
    loaded = load_model("gpt2-tiny", batch=16, device="meta", dtype="bfloat16")
    return Request(loaded.module, loaded.kwargs)


def alone(request: Request, cluster: Cluster = CLUSTER) -> dict[int, float]:
    """Seconds of a step by number of devices, every part planned on its own."""
    return {part.num_devices: request.planned(part).plan.predicted.step_time_s for part in parts(cluster)}


def test_the_best_of_all_parts(request_: Request) -> None:
    steps = alone(request_)
    assert len(steps) == 4
    chosen = {best: choose(request_, CLUSTER, Objective(best, fewer_devices=best == "time")) for best in ("time", "devices", "cost")}
    assert chosen["time"].best.step_s == min(steps.values())
    assert chosen["devices"].best.cluster.num_devices == 1
    assert chosen["cost"].best.device_s == min(n * s for n, s in steps.items())
    for best, found in chosen.items():
        assert found.plan.num_ranks == found.best.cluster.num_devices
        assert any(best in note for note in found.plan.notes)


def test_fewest_devices_within_a_time(request_: Request) -> None:
    steps = alone(request_)
    limit = sorted(set(steps.values()))[len(set(steps.values())) // 2]
    found = choose(request_, CLUSTER, Objective("devices", within_s=limit))
    assert found.best.cluster.num_devices == min(n for n, s in steps.items() if s <= limit)
    with pytest.raises(InfeasibleError, match="fastest takes"):
        choose(request_, CLUSTER, Objective("devices", within_s=min(steps.values()) / 2))


def test_least_memory_is_the_end_of_the_front() -> None:
    loaded = load_model("mlp-tiny", batch=8, device="meta")
    request, one = Request(loaded.module, loaded.kwargs), Cluster.preset("a100-sxm", devices_per_node=2)
    fast, lean = request.planned(one).plan, choose(request, one, Objective("memory")).plan
    assert lean.predicted.memory.high_bytes < fast.predicted.memory.high_bytes
    limit = (fast.predicted.step_time_s + lean.predicted.step_time_s) / 2
    within = choose(request, one, Objective("memory", within_s=limit)).plan
    assert within.predicted.step_time_s <= limit
    assert lean.predicted.memory.high_bytes <= within.predicted.memory.high_bytes < fast.predicted.memory.high_bytes


@pytest.mark.parametrize("cluster", [CLUSTER, CROWDED], ids=["accelerators", "processes"])
def test_parts_too_slow_for_the_flops_alone_are_left_out(cluster: Cluster) -> None:
    """What is skipped cannot have been better. Of processes fewer are faster each, which the least time of the flops must know."""
    loaded = load_model("mlp-tiny", batch=65536, device="meta", overrides={"width": 1024})
    request = Request(loaded.module, loaded.kwargs)
    found = choose(request, cluster, Objective("time", fewer_devices=True))
    steps, looked = alone(request, cluster), {part.cluster.num_devices for part in found.looked}
    assert found.best.step_s == min(steps.values()) and len(looked) < len(steps)


def test_by_default_the_whole_cluster_is_used(request_: Request) -> None:
    found = choose(request_, CLUSTER, Objective())
    assert found.looked == (found.best,) and found.best.cluster is CLUSTER and not any("objective" in note for note in found.plan.notes)


def test_pins_that_need_more_devices_rule_parts_out(request_: Request) -> None:
    found = choose(request_, CLUSTER, Objective("devices"), pins=("tp=4",))
    assert found.best.cluster.num_devices == 4
    with pytest.raises(UsageError, match="make 3 devices"):
        choose(request_, CLUSTER, Objective("devices"), pins=("tp=3",))


@pytest.mark.parametrize("given,words", [(("speed",), "choose from"), (("time", 0.0), "above 0"), (("time", math.nan), "above 0"), (("memory", 1.0, True), "leave one")])
def test_objectives_that_make_no_sense(given: tuple, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Objective(*given)


def test_from_python() -> None:
    loaded = load_model("gpt2-tiny", batch=8, device="meta")
    found = plan(loaded.module, Cluster.local(4), loaded.kwargs, objective="cost")
    assert found.num_ranks == 1
