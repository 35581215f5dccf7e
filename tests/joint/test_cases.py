"""Bounds by cases: shardings of a point told apart, each part with a bound of its own."""

import math
from collections.abc import Iterator
from dataclasses import replace

from autopar.core.cluster import Cluster
from autopar.joint.at_point import PointSearch
from autopar.joint.cases import Case, bound_by_cases, parted
from autopar.joint.space import Ideal, points
from tests.joint.models import GPT, joint_search

WIDE = replace(GPT, layers=8, hidden=8192, heads=64, kv_heads=64, inner=32768)
"""Parameters weigh more than activations, so that shardings of much and of little state are mixed."""


def searches(share: float) -> Iterator[PointSearch]:
    """Of points with two ranks, where memory binds."""
    joint = joint_search(WIDE, Cluster.preset("a100-sxm", 2), 32, ("pp=2",), share)
    ideal = Ideal(joint.cluster, joint.run, joint.task)
    for point in points(joint.cluster, joint.batch, joint.run.depth, joint.pins):
        search = PointSearch(joint, point)
        if point.outer == 4 and point.samples in (4, 16) and search.ideal_s(ideal) < math.inf and search.fitting_s() < math.inf:
            yield search


def test_some_are_higher_and_none_is_above_a_plan() -> None:
    raised, plans = [], []
    for search in (*searches(0.15), *searches(0.25)):
        bound, by_cases = search.fitting_s(), bound_by_cases(search, math.inf)
        made = [found.step_s for asking in (search.first, search.fine) if (found := search.plan(search.joint.limit_bytes, asking=asking)) is not None]
        assert bound <= by_cases <= min(made, default=math.inf)
        raised.append(by_cases / bound)
        plans += made
    assert plans and max(raised) > 1.001


def test_no_higher_bound_is_looked_for_than_is_enough() -> None:
    (search, *_) = searches(0.1)
    bound, highest = search.fitting_s(), bound_by_cases(search, math.inf)
    enough = (bound + highest) / 2
    assert enough <= bound_by_cases(search, enough) <= highest
    assert bound_by_cases(search, math.inf, lambda: False) == bound


def test_parts_are_all_of_a_case_and_share_nothing() -> None:
    for search in searches(0.1):
        ((node, lean),), ((same, other),) = parted(search, Case(search.fitting_s(), (), search.priced))
        assert node == same and sorted((*lean, *other)) == list(range(search.tables.sizes[node])) and lean and other
