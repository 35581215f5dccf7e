"""A search on one of a row of machines begins with plans of others: it finds none that is slower for that, and is as far as any from what is proven."""

from dataclasses import replace

import pytest

from autopar.joint.known import Known
from autopar.joint.likely import Likely, planned_like
from autopar.joint.plan import planned_jointly
from autopar.joint.search import GAP, JointSearch
from autopar.planner.plan import Planned
from tests.joint.models import LLAMA, graphs, joint_search
from tests.joint.test_known import A100, linked


def planned(search: JointSearch) -> Planned:
    return planned_jointly(search, graphs(LLAMA, LLAMA.layers))


def of_row(factor: float, share: float, row: tuple | None) -> JointSearch:
    search = joint_search(LLAMA, linked(A100, factor), 16, memory_share=share, known=Known())
    return replace(search, options=replace(search.options, row=row))


@pytest.mark.parametrize("share", [0.9, 0.3])
def test_plans_of_a_row_are_near_to_what_is_proven_and_no_slower_than_those_they_begin_with(share: float) -> None:
    likes = tuple(planned(of_row(factor, share, ())).like for factor in (0.1, 10.0))
    for factor in (0.3, 3.0):
        alone, search = planned(of_row(factor, share, None)).plan, of_row(factor, share, likes)
        like = planned_like(likes, search_points(factor, share), search.limit_bytes)
        found = planned(search).plan
        assert like and found.predicted.step_time_s <= like[-1].step_s * (1 + 1e-9)
        assert found.proof.bound <= alone.predicted.step_time_s
        assert found.proof.gap <= max(GAP, alone.proof.gap + 1e-3)
        assert planned(of_row(factor, share, likes)).plan == found


def search_points(factor: float, share: float) -> list:
    return [made.search for made in of_row(factor, share, None).search().found]


def test_what_is_likely_of_another_problem_is_left_out() -> None:
    search = next(made.search for made in of_row(1.0, 0.9, None).search().found)
    sizes = search.tables.sizes
    for choices in (None, (0,) * (len(sizes) + 1), tuple(sizes)):
        assert Likely(search.point, choices, 1).planned(search, search.joint.limit_bytes, float("inf")) is None
    assert planned_like(["nothing"], [search], search.joint.limit_bytes) == []
