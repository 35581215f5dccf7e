"""What helpers find out ahead changes nothing but when it is known; they end with the search, however it ends."""

import math
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest

from autopar.core.cluster import Cluster
from autopar.errors import InfeasibleError
from autopar.joint import ahead
from autopar.joint.ahead import Ahead, Helper, Job, Offered
from autopar.joint.at_point import PointSearch
from autopar.joint.known import Known
from autopar.joint.plan import planned_jointly
from autopar.joint.search import JointSearch
from autopar.joint.space import Point
from autopar.joint.steps import PARTING, PLANNING, steps
from autopar.joint.tables import PointTables
from tests.joint.brute_force import drawn
from tests.joint.models import LLAMA, graphs, joint_search

A100 = Cluster.preset("a100-sxm", nodes=2, devices_per_node=4)
HELPERS = (0, 1, 3)

pytestmark = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked here")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small searches have helpers too."""
    monkeypatch.setattr(ahead, "ALONE", 0)


def outcome(search: JointSearch) -> tuple | str:
    """All that a search says."""
    try:
        found = search.search()
    except InfeasibleError as error:
        return str(error)
    plans = [(f.point, f.step_s, f.deep.order, f.deep.depths, f.deep.light.mode, f.deep.heavy.mode, f.memory) for f in found.found]
    return found.bound_s, found.gap, found.looked, found.num_points, found.in_time, plans


def asked(share: float = 0.3, **given: object) -> JointSearch:
    return joint_search(LLAMA, A100, 16, memory_share=share, **given)


@pytest.mark.parametrize("share", [0.9, 0.3])
def test_plans_do_not_depend_on_the_number_of_helpers(share: float) -> None:
    alone, *others = (outcome(asked(share, helpers=number)) for number in HELPERS)
    assert all(other == alone for other in others)
    assert not multiprocessing.active_children()


def test_neither_does_what_is_said_of_them_nor_what_is_known_afterwards() -> None:
    """Byte by byte, and for the searches that follow."""
    said = []
    for number in HELPERS:
        known, progress = Known(), list[str]()
        searches = [asked(share, helpers=number, known=known, progress=progress.append) for share in (0.9, 0.3, 0.9)]
        texts = [planned_jointly(search, graphs(LLAMA, LLAMA.layers)).plan.to_json() for search in searches]
        said.append((texts, progress, outcome(asked(0.5, helpers=number, known=known))))
    assert all(other == said[0] for other in said)


@pytest.mark.parametrize("seed", range(8))
def test_random_small_problems(seed: int) -> None:
    instance = drawn(seed)
    held = instance.search().search().best.memory.high_bytes
    for memory in (held, held // 2):
        alone, helped = (outcome(replace(instance.search(memory), gap=0.0, helpers=number)) for number in (0, 2))
        assert helped == alone


STEPS = "fastest_s", "rough_s", "fitting_s", "promised_s", "plan"


def test_helpers_that_are_slow_hang_or_die_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, here = outcome(asked(helpers=0)), os.getpid()

    def helped(fault: object) -> tuple | str:
        """With a fault in every third step of a helper."""
        number = iter(range(1_000_000))

        def faulty(step: object) -> object:
            def run(search: PointSearch, *given: object) -> object:
                if os.getpid() != here and next(number) % 3 == 2:
                    fault()  # type: ignore[operator]
                return step(search, *given)  # type: ignore[operator]

            return run

        with monkeypatch.context() as patched:
            for name in STEPS:
                patched.setattr(PointSearch, name, faulty(getattr(PointSearch, name)))
            return outcome(asked(helpers=2))

    def wrong() -> None:
        print("not for anybody")
        raise RuntimeError

    assert helped(lambda: time.sleep(0.3)) == alone
    assert helped(lambda: os.kill(os.getpid(), signal.SIGKILL)) == alone
    assert helped(wrong) == alone
    monkeypatch.setattr(ahead, "PATIENCE_S", 0.5)
    assert helped(lambda: time.sleep(600)) == alone
    assert not multiprocessing.active_children()


def test_it_does_not_matter_which_helper_goes_on_with_a_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step by another than the one before: what that found is sent along."""
    alone, moved = outcome(asked(helpers=0)), []

    def another(self: Ahead, job: Job) -> Helper | None:
        owner = self._of.get(job.number)
        others = [helper for helper in self._helpers if helper is not owner and not helper.asked]
        moved.append(owner is not None and bool(others))
        return others[0] if others else None

    monkeypatch.setattr(Ahead, "_ready_for", another)
    assert outcome(asked(helpers=2)) == alone
    assert any(moved)


def test_tables_are_made_of_few_points_that_helpers_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search takes bounds over; it makes tables of that by which helpers are started, and of what is planned."""
    monkeypatch.setattr(ahead, "QUEUED", 100)
    search = asked(helpers=1)
    joint = search.search()
    made = [found for found in search.known._kept._values.values() if isinstance(found, PointTables) and "built" in vars(found)]
    assert len(made) < joint.looked[1], (len(made), joint.looked)


def test_a_search_is_where_it_would_be_by_steps_of_its_own() -> None:
    """By all that it goes by from there."""
    point = Point(2, 4, 1, 2, 8)
    own, told = (PointSearch(asked(known=Known()), point) for _ in range(2))
    with Ahead([told], steps(), 1) as ahead:
        ahead.start()
        for level, step in enumerate(steps()[:PARTING]):
            for below_s in (1e-9, math.inf) if level == PLANNING else (None,):  # what is asked in vain leaves nothing behind
                given = (below_s,) if below_s else ()
                ahead.offer(Offered(sure=[(0.0, Job(0, level, given))]))
                found = ahead.do(Job(0, level, given))
            assert not ahead._own
            result = step.here(own, *given)
            assert (found.step_s, found.deep.depths, found.memory) == (result.step_s, result.deep.depths, result.memory) if level == PLANNING else found == result
            assert told.least == own.least and told.told == own.told
            assert {side: priced.prices for side, priced in told.priced.items()} == {side: priced.prices for side, priced in own.priced.items()}
            for side, price in ((side, price) for side, priced in own.priced.items() for price in (0.0, 1e-12, *priced.prices.values())):
                assert told.priced[side].block_s(3, price) == own.priced[side].block_s(3, price)
                assert level < 1 or told.tables.rough(side).low(price, price) == own.tables.rough(side).low(price, price)
    assert told.joint.known._proved == own.joint.known._proved and told.joint.known._bounds == own.joint.known._bounds


def test_helpers_are_started_where_there_is_work_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    forked, made = [], Helper.forked
    monkeypatch.setattr(Helper, "forked", lambda *given: forked.append(1) or made(*given))
    known = Known()
    first = outcome(asked(helpers=2, known=known))
    assert len(forked) >= 2
    forked.clear()
    assert outcome(asked(helpers=2, known=known))[0] == first[0] and not forked  # all is known
    monkeypatch.setattr(ahead, "ALONE", 1000)
    outcome(asked(helpers=2))
    assert not forked


def test_no_process_is_left_behind_by_an_interrupted_search(capfd: pytest.CaptureFixture[str]) -> None:
    seen = []

    def interrupt(text: str) -> None:
        seen.extend(multiprocessing.active_children())
        if seen:
            for child in seen:
                os.kill(child.pid, signal.SIGINT)  # as the terminal does; they leave it to the search
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asked(helpers=2, progress=interrupt).search()
    assert seen and not multiprocessing.active_children()
    assert capfd.readouterr() == ("", "")


def test_a_helper_ends_when_nobody_asks_any_more() -> None:
    """As after a search that was killed."""
    search = PointSearch(asked(), Point(1, 4, 2, 2, 8))
    helpers = [Helper.forked([search], steps(), [])]
    helpers.append(Helper.forked([search], steps(), helpers))
    for helper in helpers:
        helper.connection.close()
        helper.process.join(30)
        assert helper.process.exitcode == 0
        helper.process.close()
