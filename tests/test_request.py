"""Which search answers where nothing is asked for: that of meshes where its plan fits as it is, else the better of it and the joint one. And the front of plans
that hold less and less."""

from types import SimpleNamespace
from typing import Any

import pytest

from autopar.core.cluster import Cluster
from autopar.errors import InfeasibleError
from autopar.models.load import load_model
from autopar.request import Request

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
