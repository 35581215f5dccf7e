"""Processes forked from this one: each knows what it knew then, and ends with it, killed, or by itself when nobody is there to ask it."""

import multiprocessing
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

MOST = 4
"""At most: what a search does alone was a fifth to a third of the processor seconds where it was measured, and each has memory of its own."""

PATIENCE_S = 60.0
"""For a word of a process. One that says none for longer is ended."""

T = TypeVar("T")
Say = Callable[[str], None]
Told = tuple[object, ...]
"""What is known of both ends of a row."""


def most_processes() -> int:
    """As many as there are cores for this process, where there are several and it may be forked: itself it waits most of the time."""
    if "fork" not in multiprocessing.get_all_start_methods() or multiprocessing.current_process().daemon:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST, cores) if cores > 1 else 0


def forked(serve: Callable[..., None], others: Iterable[Connection], *given: Any) -> tuple[BaseProcess, Connection]:
    """A process in which `serve` answers at the other end of a connection; `others`: those to processes forked before. Raises OSError where there can be none."""
    context = multiprocessing.get_context("fork")
    ours, its = context.Pipe()
    process = context.Process(target=_alone, args=([ours, *others], serve, its, *given), daemon=True)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is for this process, which then ends the other
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of other threads: where one held a lock that is wanted, who asks waits for `PATIENCE_S` and does it here
            process.start()
    except OSError:
        ours.close()
        raise
    finally:
        its.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return process, ours


def end(process: BaseProcess, its: Connection) -> None:
    process.kill()
    process.join()
    process.close()
    its.close()


def _alone(inherited: Iterable[Connection], serve: Callable[..., None], *given: Any) -> None:
    for other in inherited:  # else their ends would never be seen as closed
        other.close()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    with suppress(EOFError, OSError):
        serve(*given)


class Aside(Generic[T]):
    """Works that are done in processes while this one does something else, or its share of them. Each takes the next that none has begun with."""

    def __init__(self, works: Sequence[Callable[[], T]], processes: int, begin: Callable[[], object] = lambda: None) -> None:
        """In so many `processes` at most, each of which does `begin` first."""
        self._works, self._count, self._begin, self._asks = works, min(processes, len(works)), begin, os.getpid()
        self._processes: list[tuple[BaseProcess, Connection]] = []
        self._found: dict[int, T | None] = {}

    @property
    def at_work(self) -> bool:
        """Whether there are processes."""
        return bool(self._processes)

    def __enter__(self) -> Self:
        self._left, numbers = os.pipe()  # one byte for each, which one process alone reads
        os.write(numbers, bytes(range(len(self._works))))
        os.close(numbers)
        with suppress(OSError):
            for _ in range(self._count):
                self._processes.append(forked(self._work, [theirs for _, theirs in self._processes]))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._processes:
            end(*self._processes.pop())
        os.close(self._left)

    def _work(self, answers: Connection) -> None:
        self._begin()
        while number := os.read(self._left, 1):
            answers.send((number[0], self._done(number[0])))

    def _done(self, number: int) -> T | None:
        with suppress(Exception):  # who asks will find out itself
            return self._works[number]()
        return None

    def share(self) -> None:
        """Does what no process has begun with here, while there is any."""
        while number := os.read(self._left, 1):
            self._found[number[0]] = self._done(number[0])

    def found(self, number: int) -> T | None:
        """What a work found out, for which is waited. None where it failed, or its process is gone, or in a process forked from this one: whoever asks does it then."""
        if self._asks == os.getpid():
            while number not in self._found and self._processes:
                self._hear()
        return self._found.get(number)

    def _hear(self) -> None:
        """Of what is done next. Who says nothing for too long is ended, as is who has nothing more to do."""
        ready = connection.wait([theirs for _, theirs in self._processes], PATIENCE_S)
        for process, theirs in list(self._processes):
            if theirs in ready or not ready:
                try:
                    number, found = theirs.recv() if ready else (None, None)
                except (EOFError, OSError):
                    number = None
                if number is not None:
                    self._found[number] = found
                else:
                    self._processes.remove((process, theirs))
                    end(process, theirs)


@dataclass(eq=False)
class Worker:
    """One process, the part of the row that is its own, and the one that it is at."""

    process: BaseProcess
    connection: Connection
    part: deque[int] = field(default_factory=deque)
    at: int | None = None
    heard_s: float = 0.0

    def ask(self, number: int | None, told: Told) -> None:
        self.at, self.heard_s = number, time.monotonic()
        with suppress(OSError):  # that it is gone is seen where its answer is waited for
            if number is not None:
                self.connection.send((number, told))


def found_of_row(find: Callable[[int, Told, Say], T], number: int, processes: int, say: Say, tell: Callable[[T], object], *, backwards: bool = False) -> list[T]:
    """What `find` finds out of each of a row, by place: it may `say` what it is doing. Both ends come first, without being told anything; all others are told what
    there is to `tell` of those. So what it finds does not depend on how many processes there are.

    Every process goes from one end of its part of the row to the other, `backwards` or not, so that what it learned at one place is near at hand for the next; where
    it is through, it takes the last of the longest part that is left. What fails in a process, or is left by one that is gone, is found here.
    """
    count, found = min(processes, number), dict[int, T]()
    ends = list(range(number)[:: max(1, number - 1)])
    inside = range(1, number - 1)
    workers: list[Worker] = []
    told: Told = ()
    try:
        with suppress(OSError):
            for _ in range(count):
                workers.append(Worker(*forked(_find, [worker.connection for worker in workers], find)))
        for these, parts in ((ends, [ends[n::count] for n in range(count)]), (inside, [part[::-1] if backwards else part for part in _parts(inside, count)])):
            _share_out(workers, list(map(deque, parts)), told, found, find, say)
            found.update({n: find(n, told, say) for n in these if n not in found})
            told = tuple([tell(found[n]) for n in ends])
    finally:
        for worker in workers:
            end(worker.process, worker.connection)
    return [found[n] for n in range(number)]


def _parts(row: range, count: int) -> list[range]:
    return [row[len(row) * n // count : len(row) * (n + 1) // count] for n in range(count)]


def _share_out(workers: Sequence[Worker], parts: Sequence[deque[int]], told: Told, found: dict[int, T], find: Callable[[int, Told, Say], T], say: Say) -> None:
    for worker, part in zip(workers, parts):
        worker.part = part
        worker.ask(_next(part, parts), told)
    while busy := [worker for worker in workers if worker.at is not None]:
        ready = connection.wait([worker.connection for worker in busy], PATIENCE_S)
        for worker in busy:
            if worker.connection in ready:
                number = worker.at
                assert number is not None, "it was asked"
                if (word := _heard(worker, say)) is not None:
                    worker.ask(_next(worker.part, parts), told)
                    found[number] = word[0] if word else find(number, told, say)
            elif time.monotonic() - worker.heard_s > PATIENCE_S:
                worker.at = None
                worker.process.kill()


def _next(own: deque[int], parts: Iterable[deque[int]]) -> int | None:
    longest = max(parts, key=len)
    return own.popleft() if own else longest.pop() if longest else None


def _heard(worker: Worker, say: Say) -> tuple | None:
    """What a worker has found, if it has: nothing where it failed. None where it only says what it is doing, or is gone."""
    worker.heard_s = time.monotonic()
    try:
        word = worker.connection.recv()
    except (EOFError, OSError):
        worker.at = None
        return None
    if isinstance(word, str):
        say(word)
        return None
    return word


def _find(asked: Connection, find: Callable[[int, Told, Say], object]) -> None:
    """Until nobody asks."""
    while True:
        number, told = asked.recv()
        answer: tuple[object, ...] = ()
        with suppress(Exception):  # who asks will find out itself
            answer = (find(number, told, asked.send),)
        asked.send(answer)
