"""Processes beside the search that find out ahead what it will ask of the points that it is likely to come to.

The search goes its way as if it were alone. Before it looks at a point it takes over what the helper of that point has answered, for which it waits; a point that
no helper was asked of it looks at itself. An answer depends on its question alone (`solved.Answers`), and is taken over only where the search asks it: so plans, bounds and what was looked
at are the same however many helpers there are, and whatever becomes of them.

Helpers are forked (`core.forked`) when the search has shown that it has work to share. Each keeps the tables of its points.
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple

from autopar.core.forked import end, forked
from autopar.joint.at_point import PointSearch
from autopar.joint.steps import Step

QUEUED = 3
"""Jobs that a helper has at once, so that it need not wait while the search plans a point."""

ALONE = 4
"""So many points that nothing was known of are looked at before there are helpers: most questions ask of no more."""

PATIENCE_S = 10.0
"""For a word of a helper that is waited for. One that says none for longer is ended, and the search finds out itself."""


class Job(NamedTuple):
    """To do a step with a point of the search, by number and place, with what else is given."""

    number: int
    level: int
    given: tuple = ()


class Done(NamedTuple):
    """`sent`: None where the search does it."""

    sent: Any
    answers: Mapping[Hashable, Any]


@dataclass(eq=False)
class Helper:
    """One process, and what it was asked and has not answered."""

    process: BaseProcess
    connection: Connection
    asked: set[Job] = field(default_factory=set)

    @classmethod
    def forked(cls, searches: Sequence[PointSearch], steps: Sequence[Step], others: Iterable["Helper"]) -> "Helper":
        """Raises OSError where there can be none."""
        return cls(*forked(_serve, [other.connection for other in others], searches, steps))

    def tell(self, key: float, job: Job) -> None:
        """To do a job; those of the lowest key first."""
        self.asked.add(job)
        with suppress(OSError):  # that it is gone is seen where an answer is waited for
            self.connection.send((key, job))

    def heard(self, seconds: float) -> list[tuple[Job, Done]]:
        """What it has found out since; waits so long for something. Raises EOFError or OSError where it is gone."""
        found: list[tuple[Job, Done]] = []
        while self.connection.poll(0.0 if found else seconds):
            found.append(self.connection.recv())
            self.asked.discard(found[-1][0])
        return found

    def close(self) -> None:
        end(self.process, self.connection)


def _serve(questions: Connection, searches: Sequence[PointSearch], steps: Sequence[Step]) -> None:
    """Answer until nobody is there to ask."""
    left: dict[Job, float] = {}
    while True:
        while not left or questions.poll():
            key, job = questions.recv()
            left[job] = key
        job = min(left, key=lambda job: (left[job], job))
        del left[job]
        answers = searches[job.number].tables.answers
        before, sent = len(answers), None
        with suppress(Exception):  # the search will find out itself
            sent = steps[job.level].aside(searches[job.number], *job.given)
        questions.send((job, Done(sent, dict(islice(answers.items(), before, None)))))


@dataclass
class Ahead:
    """Helpers of a search of points, with which `steps` are done, the first of them by level. There are none before it has `started`, and no more than `most`."""

    searches: Sequence[PointSearch]
    steps: Sequence[Step]
    most: int
    started: bool = False
    _helpers: list[Helper] = field(default_factory=list)
    _done: dict[Job, Done] = field(default_factory=dict)
    _of: dict[int, Helper] = field(default_factory=dict)
    """Who goes through the levels of a point, by its number, and has the tables of it."""
    _own: set[int] = field(default_factory=set)
    """Points that the search itself has gone on with since there are helpers."""
    _alone: int = 0

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._helpers:
            self._helpers.pop().close()

    def start(self) -> None:
        self.started = True
        with suppress(OSError):
            while len(self._helpers) < self.most:
                self._helpers.append(Helper.forked(self.searches, self.steps, self._helpers))

    def offer(self, upcoming: Sequence[tuple[float, Job]], enough: float, given: Mapping[int, tuple] = MappingProxyType({})) -> None:
        """What the search will come to, by its least bound; of no use where that is `enough`. `given`: what goes with levels beyond."""
        for helper in tuple(self._helpers):
            self._hear(helper)
        if all(len(helper.asked) >= QUEUED for helper in self._helpers):
            return
        for key, job in sorted(self._next(key, job, given) for key, job in upcoming if key < enough):
            helper = self._of.get(job.number) or min(self._helpers, key=lambda helper: len(helper.asked))
            if key < enough and job.number not in self._own and job not in helper.asked and len(helper.asked) < QUEUED:
                self._of[job.number] = helper
                helper.tell(key, job)

    def _next(self, key: float, job: Job, given: Mapping[int, tuple]) -> tuple[float, Job]:
        """What is left to be done with a point, as far as it is known."""
        while job in self._done:
            bound = self.steps[job.level].bound_s(sent) if (sent := self._done[job].sent) is not None else None
            key, job = max(key, math.inf if bound is None else bound), Job(job.number, job.level + 1, given.get(job.level + 1, ()))
        return key, job

    def do(self, job: Job) -> Any:
        """Takes over what a helper made of a job, or does it here."""
        self.settle(job)
        search, step, done = self.searches[job.number], self.steps[job.level], self._done.get(job)
        if done is not None and done.sent is not None:
            return step.taken(search, done.sent)
        if self.started:
            self._own.add(job.number)
            self._of.pop(job.number, None)
        return step.here(search, *job.given)

    def row(self, jobs: Sequence[Job]) -> Iterator[Any]:
        """What each comes to, in turn, while helpers do others: which go by nothing but tables, so that it does not matter who does them."""
        for n, job in enumerate(jobs):
            if self._helpers and job not in self._done:
                min(self._helpers, key=lambda helper: len(helper.asked)).tell(-1 / (n + 1), job)  # before all that may be of use
        yield from map(self.do, jobs)

    def settle(self, job: Job) -> None:
        """Before the search does a job: hear what a helper has found out of it. One that has the point is waited for."""
        helper = next((helper for helper in self._helpers if job in helper.asked), self._of.get(job.number))
        if helper is not None and job not in self._done and job not in helper.asked:
            helper.tell(0.0, job)
        while helper in self._helpers and job not in self._done:
            self._hear(helper, PATIENCE_S)
        answers = self.searches[job.number].tables.answers
        if job in self._done:
            answers.update(self._done[job].answers)
        elif not self.started and not answers:
            self._alone += 1
            if self._alone > ALONE:
                self.start()

    def _hear(self, helper: Helper, seconds: float = 0.0) -> None:
        """What it says, waiting so long for a word; ends one that says none then, or is gone."""
        try:
            heard = helper.heard(seconds)
        except (EOFError, OSError):
            heard, seconds = [], PATIENCE_S
        self._done.update(heard)
        if seconds and not heard:
            self._helpers.remove(helper)
            gone = {number for number, owner in self._of.items() if owner is helper}
            self._own |= gone  # no other has come so far with them
            self._of = {number: owner for number, owner in self._of.items() if number not in gone}
            helper.close()
