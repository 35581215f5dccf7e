"""What processes beside this one find out of a row is what this one would; they end with it, however it ends."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable

import pytest

from autopar.core import forked
from autopar.core.forked import Aside, Say, Told, found_of_row, most_processes

needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked here")


def squares(number: int, processes: int, say: Say = lambda text: None, fault: Callable[[], None] = lambda: None) -> list[int]:
    """With a `fault` at every third place, but not in this process."""
    here = os.getpid()

    def find(n: int, told: Told, say: Say) -> int:
        say(f"at {n}")
        if os.getpid() != here and n % 3 == 2:
            fault()
        return n * n

    return found_of_row(find, number, processes, say, lambda square: square)


@needs_fork
@pytest.mark.parametrize("processes", [0, 1, 2, 4])
@pytest.mark.parametrize("number", [0, 1, 2, 7])
def test_a_row_is_in_order_whoever_finds_it(number: int, processes: int) -> None:
    said: list[str] = []
    assert squares(number, processes, said.append) == [n * n for n in range(number)]
    assert sorted(said) == [f"at {n}" for n in range(number)]
    assert not multiprocessing.active_children()


@needs_fork
@pytest.mark.parametrize("processes", [0, 1, 2, 4])
@pytest.mark.parametrize("number", [1, 2, 7])
def test_all_but_the_ends_are_told_of_both(number: int, processes: int) -> None:
    found = found_of_row(lambda n, told, say: (n, told), number, processes, lambda text: None, lambda pair: pair[0])
    ends = {0, number - 1}
    assert found == [(n, () if n in ends else (0, number - 1)) for n in range(number)]


@needs_fork
@pytest.mark.parametrize("backwards", [False, True])
def test_each_goes_along_its_own_part_and_helps_at_the_end_of_the_longest(backwards: bool) -> None:
    def find(n: int, told: Told, say: Say) -> tuple[int, float]:
        time.sleep(0.2 if n >= 6 else 0.01)
        return os.getpid(), time.monotonic()

    found = found_of_row(find, 12, 2, lambda text: None, lambda found: None, backwards=backwards)
    first, second = found[0][0], found[11][0]
    assert first != second and all(found[n][0] == first for n in range(6))
    own = [found[n][1] for n in range(1, 6)]
    assert own == sorted(own, reverse=backwards)
    shared = [found[n][0] for n in (range(10, 5, -1) if backwards else range(6, 11))]
    assert shared == sorted(shared, key=lambda process: process == first) and shared[0] == second and shared[-1] == first


@needs_fork
def test_what_processes_fail_at_is_found_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> None:
        print("not for anybody")
        raise RuntimeError

    expected = [n * n for n in range(9)]
    assert squares(9, 2, fault=wrong) == expected
    assert squares(9, 2, fault=lambda: os.kill(os.getpid(), signal.SIGKILL)) == expected
    monkeypatch.setattr(forked, "PATIENCE_S", 0.3)
    assert squares(9, 2, fault=lambda: time.sleep(600)) == expected
    assert not multiprocessing.active_children()


@needs_fork
def test_an_error_is_that_of_this_process() -> None:
    def find(n: int, told: Told, say: Say) -> int:
        raise ValueError(f"{n} in {os.getpid()}")

    with pytest.raises(ValueError, match=f"in {os.getpid()}"):
        found_of_row(find, 4, 2, lambda text: None, lambda found: found)
    assert not multiprocessing.active_children()


@needs_fork
def test_no_process_is_left_behind_by_an_interrupt(capfd: pytest.CaptureFixture[str]) -> None:
    def interrupt(text: str) -> None:
        children = multiprocessing.active_children()
        assert children
        for child in children:
            os.kill(child.pid, signal.SIGINT)  # as the terminal does; they leave it to this one
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        squares(4, 2, interrupt)
    assert not multiprocessing.active_children()
    assert capfd.readouterr() == ("", "")


@needs_fork
def test_processes_of_a_row_have_none_of_their_own() -> None:
    assert found_of_row(lambda n, told, say: most_processes(), 2, 2, lambda text: None, lambda found: found) == [0, 0]


@needs_fork
@pytest.mark.parametrize("processes", [0, 1, 2, 4])
def test_works_aside_are_found_or_left_to_who_asks(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise RuntimeError

    works = [lambda: 1, fail, lambda: 3, os.getpid]
    with Aside(works, processes) as aside:
        found = [aside.found(n) for n in (3, 1, 0, 2)]
        assert found[1:] == ([None, 1, 3] if processes else [None] * 3)
        assert (found[0] not in (None, os.getpid())) == bool(processes)
    monkeypatch.setattr(forked, "PATIENCE_S", 0.3)
    for gone in (lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: time.sleep(600)):
        with Aside([gone, lambda: 5], 1 if processes else 0) as aside:
            assert aside.found(1) is None and aside.found(0) is None
    assert not multiprocessing.active_children()


@needs_fork
@pytest.mark.parametrize("processes", [1, 2])
def test_works_that_no_process_has_begun_with_are_done_here(processes: int) -> None:
    def slow() -> int:
        time.sleep(0.3)
        return os.getpid()

    with Aside([slow] * 4, processes) as aside:
        aside.share()
        pids = [aside.found(n) for n in range(4)]
        assert os.getpid() in pids and len(set(pids)) == processes + 1  # each is done once


@needs_fork
def test_each_process_begins_as_it_is_told() -> None:
    begun: list[int] = []
    with Aside([lambda: list(begun)], 1, lambda: begun.append(1)) as aside:
        assert aside.found(0) == [1] and not begun


@needs_fork
def test_works_aside_answer_only_who_gave_them() -> None:
    """Another process forked from it would take away what it waits for."""
    with Aside([lambda: 1, lambda: 2], 1) as aside:
        assert found_of_row(lambda n, told, say: aside.found(n), 2, 1, lambda text: None, lambda found: None) == [None, None]
        assert [aside.found(n) for n in range(2)] == [1, 2]
    assert [aside.found(n) for n in range(2)] == [1, 2] and not aside.at_work


def test_there_is_none_for_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert most_processes() == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert most_processes() == (forked.MOST if "fork" in multiprocessing.get_all_start_methods() else 0)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert most_processes() == 0
