"""Bounds by cases: shardings of a point told apart, each part with a bound of its own."""

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from random import Random

import pytest

from autopar.core.cluster import Cluster
from autopar.core.residency import GATHER, MODES
from autopar.joint import cases
from autopar.joint.ahead import Ahead, Job
from autopar.joint.at_point import PointSearch
from autopar.joint.cases import Case, bound_by_cases, by_modes, part_s, parted
from autopar.joint.deep import mixed
from autopar.joint.priced import Care
from autopar.joint.space import Ideal, points
from autopar.joint.steps import PARTING, steps
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


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked here")
def test_helpers_look_at_parts_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is the same, also where one of them is gone in the middle of it."""
    (search, *_), (again, *_), (other, *_) = (searches(0.1) for _ in range(3))
    alone, here, part, looked = bound_by_cases(search, math.inf), os.getpid(), cases.part_s, []

    def by_helpers(search: PointSearch) -> float:
        with Ahead([search], steps(), 2) as ahead:
            ahead.start()
            found = bound_by_cases(search, math.inf, look=lambda parts: ahead.row([Job(0, PARTING, part) for part in parts]))
        assert not multiprocessing.active_children()
        return found

    def seen(*given: object) -> float:
        looked.append(given)
        return part(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(cases, "part_s", seen)
    assert by_helpers(again) == alone and not looked

    def dies(*given: object) -> float:
        if os.getpid() != here:
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        return seen(*given)

    monkeypatch.setattr(cases, "part_s", dies)
    assert by_helpers(other) == alone and looked


def test_a_choice_of_a_case_is_in_one_of_its_parts() -> None:
    random = Random(0)
    for search in searches(0.1):
        steps = [(dict(little), dict(much)) for little, much in parted(search, Case(search.fitting_s(), (), search.priced))]
        parts = [little for little, _ in steps] + [steps[-1][1]]
        assert len(parts) > 2
        for _ in range(200):
            chosen = [random.randrange(size) for size in search.tables.sizes]
            assert sum(all(chosen[node] in left for node, left in part.items()) for part in parts) == 1


def test_whatever_two_modes_a_plan_mixes_it_is_in_a_part() -> None:
    """They are told apart where all but one pair are known to take longer than is asked for."""
    for search in searches(0.15):
        ((node, modes),) = search.tables.whole.modes.items()
        whole = Case(search.fitting_s(), (), search.priced)
        assert by_modes(search, whole, math.inf) == [whole]  # each would have to be parted
        _, second, _ = sorted(_bounds(search, Care.ROUGH).values())
        parts = by_modes(search, whole, second)
        pairs = [dict(part.states)[node] for part in parts]
        assert all(any({*some} <= {*pair} for pair in pairs) for some in product(range(len(modes)), repeat=2))
        assert all(whole.bound_s <= part.bound_s for part in parts) and second <= parts[1].bound_s


def test_plans_of_two_modes_take_no_less_than_their_part() -> None:
    looked = 0
    for search in searches(0.15):
        bounds = _bounds(search, Care.CLOSE)
        for choices in search.tables.chosen(search.first())[:3]:
            sharding = search.tables.sharding(choices)
            for order, pair in product(search.orders, combinations(sharding.modes, 2)):
                number = sorted({MODES.index(kinds.mode.removesuffix(GATHER)) for kinds in pair})
                made = mixed(replace(sharding, given=tuple(kinds.mode for kinds in pair)), order, sharding.even(order.num_stages), search.joint.limit_bytes, math.inf)
                if made is not None and len(number) == 2:
                    assert bounds[tuple(number)] <= made.step_s
                    looked += 1
    assert looked > 10


def _bounds(search: PointSearch, care: Care) -> dict[tuple[int, ...], float]:
    """By pair of modes, without what is known of all."""
    ((node, modes),) = search.tables.whole.modes.items()
    return {pair: part_s(search, ((node, pair),), {}, care) for pair in combinations(range(len(modes)), 2)}
