"""Which search answers where nothing is asked for: that of meshes where its plan fits as it is, else the better of it and the joint one. And the front of plans
that hold less and less. And that a search which begins before all traces are there comes to the same."""

import multiprocessing
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autopar.core.cluster import Cluster
from autopar.core.mixed import parse_machines
from autopar.errors import InfeasibleError, UsageError
from autopar.models.load import load_model
from autopar.request import Request
from tests.test_families import NO_FAMILIES

NODE = Cluster.preset("a100-sxm", devices_per_node=4)


DEPTH = {"gpt2-tiny": {"n_layer": 4}}
"""Rows of blocks that are long enough."""


def request(name: str = "gpt2-tiny", batch: int = 16) -> Request:
    loaded = load_model(name, batch=batch, device="meta", dtype="bfloat16", overrides=DEPTH.get(name, {}))
    return Request(loaded.module, loaded.kwargs)


def test_what_fits_is_planned_mesh_by_mesh() -> None:
    """Operator by operator, with a proof: no plan that shards all blocks alike is faster."""
    found, alone = request().planned(NODE).plan, request().planned(NODE, joint=False).plan
    assert found == alone
    assert found.predicted.step_time_s <= request().planned(NODE, joint=True).plan.predicted.step_time_s


def test_where_memory_is_short_the_better_search_decides() -> None:
    asked = request()
    roomy = asked.planned(NODE).plan.predicted.memory.high_bytes
    share = 0.6 * roomy / NODE.device.memory_bytes
    given = {joint: asked.planned(NODE, max_memory=share, joint=joint).plan.predicted for joint in (False, True, None)}
    assert given[None].step_time_s == min(given[False].step_time_s, given[True].step_time_s)
    assert given[None].memory.high_bytes <= 0.6 * roomy


def test_one_device_may_take_its_batch_in_pieces() -> None:
    """The search of meshes keeps the one microbatch it is given; its plan then computes again what does not fit."""
    asked, one = request(batch=64), Cluster.preset("a100-sxm", devices_per_node=1)
    share = 0.3 * asked.planned(one).plan.predicted.memory.high_bytes / one.device.memory_bytes
    found = asked.planned(one, max_memory=share).plan
    assert found.residency.micro_batches > 1
    with pytest.raises(InfeasibleError):
        asked.planned(one, max_memory=share, joint=False)


def test_models_of_several_rows_are_searched_as_before() -> None:
    asked = request("t5-tiny")
    assert not asked.searches_jointly()
    assert asked.planned(NODE, max_memory=0.9).plan == request("t5-tiny").planned(NODE, joint=False).plan


def test_the_front_leaves_out_what_a_leaner_plan_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the gap of a search is wide, one with less memory may find what it missed."""
    found = [(1.0, 70), (1.2, 60), (1.5, 50), (1.4, 40), (1.6, 30), (1.6, 20)]

    def planned(self: Request, cluster: Cluster, *, max_memory: float, **given: Any) -> Any:
        fits = [pair for pair in found if pair[1] <= max_memory * NODE.device.memory_bytes]
        if not fits:
            raise InfeasibleError("nothing fits")
        memory = SimpleNamespace(high_bytes=fits[0][1])
        return SimpleNamespace(plan=SimpleNamespace(predicted=SimpleNamespace(step_time_s=fits[0][0], memory=memory)))

    monkeypatch.setattr(Request, "planned", planned)
    front = [p.predicted for p in request().front(NODE)]
    assert [(p.step_time_s, p.memory.high_bytes) for p in front] == [(1.0, 70), (1.2, 60), (1.4, 40), (1.6, 20)]


NODES = Cluster.preset("a100-sxm", nodes=2, devices_per_node=2)
HERE, BESIDE = 0, 2
"""Who traces what a search need not wait for: this process before it, or another meanwhile."""

beside = pytest.mark.parametrize("processes", [HERE, pytest.param(BESIDE, marks=pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked here"))])


def traced_by(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopar.trace.family.most_processes", lambda: processes)


def refused() -> Request:
    """Two batches have graphs that go together, and are planned without a fault; the third is not what they say."""
    make, reason = NO_FAMILIES["the square of the batch beside it"]
    assert reason == "linear function"
    return Request(make(), (torch.zeros(8, 4),))


@beside
def test_a_family_that_is_refused_late_is_refused(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to ask comes to what it comes to where no family is looked for."""
    traced_by(processes, monkeypatch)
    said: list[str] = []
    asked = refused()
    with pytest.raises(UsageError, match="^no joint search: the graph of Stack is no linear function of the number of samples; leave --joint out$"):
        asked.planned(NODES, joint=True, progress=said.append)
    assert any("searching" in text for text in said) == (processes == BESIDE)
    assert not asked.searches_jointly() and not asked.trace_ahead([NODES])
    assert refused().planned(NODES).plan == asked.planned(NODES).plan == refused().planned(NODES, joint=False).plan
    assert refused().planned(NODE).plan == asked.planned(NODE, joint=False).plan
    mixed = parse_machines("a100-sxm:1x2+h100-sxm:1x2")
    assert refused().planned(mixed).plan == refused().planned(mixed, joint=False).plan
    assert [plan.mesh for plan in refused().front(NODES)] == [plan.mesh for plan in refused().front(NODES, joint=False)]
    assert not multiprocessing.active_children()


@beside
@pytest.mark.parametrize("error", [InfeasibleError, ZeroDivisionError])
def test_a_refusal_goes_before_what_a_search_made_of_it(error: type[Exception], processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def search(*_: Any) -> None:
        raise error

    traced_by(processes, monkeypatch)
    monkeypatch.setattr("autopar.request.planned_jointly", search)
    with pytest.raises(UsageError, match="linear function"):
        refused().planned(NODES, joint=True)
    asked = request()
    with pytest.raises(error):
        asked.planned(NODES, joint=True)
    assert asked._family is not None and asked._family.is_confirmed
    assert not multiprocessing.active_children()


@beside
def test_an_interrupt_leaves_neither_processes_nor_what_was_not_confirmed(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[Any] = []

    def interrupt(text: str) -> None:
        if "searching" in text:
            children.extend(multiprocessing.active_children())
            raise KeyboardInterrupt

    traced_by(processes, monkeypatch)
    asked = request()
    with pytest.raises(KeyboardInterrupt):
        asked.planned(NODES, progress=interrupt)
    assert bool(children) == (processes == BESIDE) and not multiprocessing.active_children()
    assert (asked._family is None) == (processes == BESIDE)
    assert asked.planned(NODES).plan == request().planned(NODES).plan


def test_plans_do_not_depend_on_who_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    for processes in (0, 2, 3, 4) if "fork" in multiprocessing.get_all_start_methods() else (0,):
        traced_by(processes, monkeypatch)
        asked = request()
        plans.append([asked.planned(NODES, joint=True).plan, asked.planned(NODES, joint=True, max_memory=0.5).plan])
        assert not multiprocessing.active_children()
    assert all(found == plans[0] for found in plans)
