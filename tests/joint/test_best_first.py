"""The order in which points are looked at, with bounds and plans that are drawn: what is said of all of them holds."""

from random import Random
from types import SimpleNamespace

import pytest

from autopar.core.cluster import Cluster
from autopar.joint import search as best_first
from autopar.joint.at_point import PointSearch
from autopar.joint.search import JointSearch
from tests.joint.models import LLAMA, joint_search

A100 = Cluster.preset("a100-sxm", nodes=2, devices_per_node=4)


@pytest.mark.parametrize("gap", [0.0, 0.05, 0.2])
def test_no_bound_is_above_a_point_that_was_left_out(gap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or was to be planned when another plan was found to be near enough."""
    random, bounds, made, planned = Random(7), dict[object, float](), dict[object, float](), list[object]()

    def bound_of(search: PointSearch) -> float:
        if search.point not in bounds:
            bounds[search.point] = random.uniform(1.0, 1.3)
            made[search.point] = bounds[search.point] * random.choice([1.0, random.uniform(1.0, 1.2)])
        return bounds[search.point]

    def plan(search: PointSearch, limit_bytes: float, below_s: float) -> SimpleNamespace:
        planned.append(search.point)
        return SimpleNamespace(point=search.point, step_s=made[search.point], sharding=None, deep=None)

    monkeypatch.setattr(PointSearch, "ideal_s", lambda search, ideal: 0.5)
    for level, share in (("fastest_s", 0.6), ("rough_s", 0.8), ("fitting_s", 1.0)):
        monkeypatch.setattr(PointSearch, level, lambda search, *care, share=share: share * bound_of(search))
    monkeypatch.setattr(PointSearch, "promised_s", lambda search, limit_bytes: random.uniform(bound_of(search), made[search.point]))
    monkeypatch.setattr(PointSearch, "plan", plan)
    monkeypatch.setattr(best_first, "bound_by_cases", lambda search, enough, goes_on, look: bound_of(search))
    monkeypatch.setattr(best_first, "shifted", lambda sharding, deep, limit_bytes: deep)
    monkeypatch.setattr(best_first, "tried", lambda found: found)
    monkeypatch.setattr(JointSearch, "_look_further", lambda *given: None)
    monkeypatch.setattr("autopar.joint.known.Known.add_tried", lambda *given: None)
    for _ in range(30):
        for drawn in (bounds, made, planned):
            drawn.clear()
        found = joint_search(LLAMA, A100, 16, helpers=0, gap=gap).search()
        assert len(bounds) > 20
        assert found.bound_s <= min(bounds.values()) * (1 + 1e-12) and found.best.step_s == min(made[point] for point in planned)
        assert all(bound >= found.best.step_s * (1 - gap) for point, bound in bounds.items() if point not in planned), "others may be faster"
