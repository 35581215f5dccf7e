"""Searches under a budget: plans that hold, bounds that no plan is under, the same for so many points, and nothing of it in searches without one."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from autopar.core.change import changed
from autopar.core.cluster import Cluster
from autopar.errors import InfeasibleError
from autopar.joint import clock
from autopar.joint.clock import Clock
from autopar.joint.early import distance
from autopar.joint.known import Known
from autopar.joint.plan import planned_jointly
from autopar.joint.search import Joint, JointSearch
from autopar.joint.space import Point
from autopar.models.load import load_model
from autopar.planner.baselines import baseline_pins
from autopar.planner.plan import Planned
from autopar.request import Request
from tests.joint.brute_force import drawn
from tests.joint.models import LLAMA, graphs, joint_search
from tests.joint.test_known import linked, outcome

A100 = Cluster.preset("a100-sxm", nodes=2, devices_per_node=4)


def within(search: JointSearch, **budget: float) -> JointSearch:
    return replace(search, options=replace(search.options, **budget))


def found(search: JointSearch) -> Joint | None:
    try:
        return search.search()
    except InfeasibleError:
        return None


@pytest.mark.parametrize("seed", range(12))
def test_random_changes_of_small_problems(seed: int) -> None:
    """A plan that is found fits and takes no less than the bound; neither does that of the whole search, which is the same as if nothing had been asked."""
    random, histories, instance = Random(seed), [Known(), Known()], drawn(seed)
    held = instance.search().search().best.memory.high_bytes
    for known in histories:
        replace(instance.search(held), known=known).search()
    for _ in range(4):
        factors = [random.choice((1.0, 0.5, 0.9, 1.1, 2.0, 8.0)) for _ in range(3)]
        asked = replace(instance, cluster=linked(instance.cluster, *factors), batch=random.choice((instance.batch, 8, 16)))
        memory = int(held * random.choice((0.5, 0.9, 1.0, 2.0)))
        alone = found(asked.search(memory))
        quick, again = (found(within(replace(asked.search(memory), known=known), budget_points=3)) for known in histories)
        assert (quick is None) == (again is None) and (alone is not None or quick is None)
        if quick is not None and again is not None and alone is not None:
            assert (quick.bound_s, quick.looked, [f.deep.depths for f in quick.found]) == (again.bound_s, again.looked, [f.deep.depths for f in again.found])
            assert quick.best.memory.high_bytes <= memory
            assert quick.bound_s <= min(quick.best.step_s, alone.best.step_s) * (1 + 1e-9)
            assert quick.best.step_s >= alone.bound_s * (1 - 1e-9)
        assert outcome(replace(asked.search(memory), known=histories[0])) == outcome(asked.search(memory))
        outcome(replace(asked.search(memory), known=histories[1]))  # so that both know the same again


def planned(known: Known, cluster: Cluster = A100, share: float = 0.3, batch: int = 16, **budget: float) -> Planned:
    search = within(joint_search(LLAMA, cluster, batch, memory_share=share, known=known), **budget)
    return planned_jointly(search, graphs(LLAMA, LLAMA.layers))


CHANGES = {"links": (linked(A100, 1.0, 2.0), 0.3, 16), "memory": (A100, 0.25, 16), "batch": (A100, 0.3, 32), "nodes": (replace(A100, num_nodes=4), 0.3, 16)}


@pytest.mark.parametrize("change", CHANGES)
def test_plans_made_again_are_as_good(change: str) -> None:
    cluster, share, batch = CHANGES[change]
    known = Known()
    planned(known)
    quick = planned(known, cluster, share, batch, budget_points=4).plan
    whole = planned(Known(), cluster, share, batch).plan
    assert quick.predicted.memory.high_bytes <= cluster.device.memory_bytes * share
    assert quick.predicted.step_time_s <= 1.02 * whole.predicted.step_time_s
    assert quick.proof.bound <= whole.predicted.step_time_s and quick.proof.bound <= quick.predicted.step_time_s
    assert quick.proof.status.startswith("budget") == (quick.proof.gap > 0.01)


def test_so_many_points_are_one_plan_byte_by_byte() -> None:
    def texts() -> Iterator[str]:
        known = Known()
        planned(known)
        yield from (planned(known, cluster, share, batch, budget_points=4).plan.to_json() for cluster, share, batch in CHANGES.values())

    assert list(texts()) == list(texts())


def test_there_is_a_plan_when_there_is_no_time_at_all() -> None:
    """Where nothing is known too; it is no answer to those who have time, and their answer is one to those who have none."""
    for share in (0.9, 0.3):
        known = Known()
        quick = planned(known, share=share, budget_s=1e-6).plan
        assert quick.proof.status.startswith("budget") and quick.predicted.memory.high_bytes <= A100.device.memory_bytes * share
        whole = planned(known, share=share)
        assert whole.plan.to_json() == planned(Known(), share=share).plan.to_json()
        assert planned(known, share=share, budget_s=1e-6) is whole


def test_work_begins_where_it_would_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    free, tight = Clock(), Clock()
    tight.ends_in(10.0)
    tight.ends_in(20.0)
    with tight.timed("walk"):
        now[0] += 3.0
    assert free.allows("walk") and tight.allows("walk")
    now[0] += 4.5
    assert free.allows("walk") and not tight.allows("walk") and tight.allows("step")


def test_whole_searches_within_a_budget_end_with_a_proof() -> None:
    quick = planned(Known(), budget_s=600.0).plan
    assert not quick.proof.status.startswith("budget") and quick.proof.gap <= planned(Known()).plan.proof.gap + 0.01


def test_points_of_other_machines_and_batches_are_found_again() -> None:
    point = Point(8, 16, 8, 64, 16)
    assert distance(point, point) == distance(point, replace(point, num_microbatches=128)) == 0.0
    assert distance(point, Point(8, 8, 8, 64, 16)) == distance(point, Point(8, 8, 8, 128, 8)) == 0.0
    assert distance(point, Point(8, 16, 8, 32, 32)) == distance(point, Point(4, 32, 8, 64, 16)) == 1.0


def test_nothing_that_fits_is_known_soon() -> None:
    known = Known()
    planned(known)
    with pytest.raises(InfeasibleError, match="planned again"):
        planned(known, share=0.001, budget_points=2)


def small(batch: int = 8) -> Request:
    loaded = load_model("gpt2-tiny", batch=batch, device="meta", overrides={"n_layer": 4})
    return Request(loaded.module, loaded.kwargs)


def test_a_front_under_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster.preset("h100-sxm", 1, 4)
    quick = small().front(cluster, joint=True, budget_s=600.0)
    held = [plan.predicted.memory.high_bytes for plan in quick]
    assert all(b <= 0.97 * a for a, b in pairwise(held))
    assert all(a.predicted.step_time_s < b.predicted.step_time_s for a, b in pairwise(quick))
    request = small()
    monkeypatch.setattr("autopar.request.most_processes", lambda: 0)
    for again in (request.front(cluster, joint=True, budget_s=600.0), request.front(cluster, joint=True, budget_s=600.0)):  # whatever was asked before
        assert [plan.to_json() for plan in again] == [plan.to_json() for plan in quick]
    for plan in small().front(cluster, joint=True):
        fits = [p.predicted.step_time_s for p in quick if p.predicted.memory.high_bytes <= plan.predicted.memory.high_bytes * 1.01]
        assert not fits or min(fits) <= 1.25 * plan.predicted.step_time_s  # of a few points, and nothing was known


def test_no_baseline_is_faster() -> None:
    request, cluster = small(16), Cluster.preset("h100-sxm", 2, 4)
    request.planned(cluster)
    for change in ("inter_node.bandwidth*=0.5", "num_nodes=1"):
        machine = changed(cluster, [change])
        quick = request.planned(machine, joint=True, budget_points=8).plan
        for name in ("ddp", "fsdp", "zero3", "megatron:tp2,pp2"):
            forced = request.planned(machine, joint=True, pins=baseline_pins(name, machine)).plan
            assert quick.predicted.step_time_s <= forced.predicted.step_time_s * (1 + 1e-9), (change, name)


def test_a_work_may_take_half_as_long_again_as_the_last_of_its_kind() -> None:
    clock = Clock(took_s={"short": 6.0, "long": 7.0})
    clock.ends_in(10.0)
    assert clock.allows("short") and not clock.allows("long")
