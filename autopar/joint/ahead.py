"""Processes beside the search that do ahead what it will come to.

The search goes its way as if it were alone. Before it takes a step with a point it takes over what a helper made of it, for which it waits; what no helper was asked
of it does itself. An answer depends on its question alone (`solved.Answers`), and what a step comes to on the steps before it at the same point (`steps`): those
a helper did not do itself it is sent. So plans, bounds and what was looked at are the same however many helpers there are, and whatever becomes of them.

Helpers are forked (`core.forked`) when the search has shown that it has work to share. Each keeps the tables of its points.
"""

import math
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, NamedTuple

from autopar.core.forked import end, forked
from autopar.joint.at_point import PointSearch
from autopar.joint.steps import LONG, PARTING, PLANNING, PROMISING, Step

QUEUED = 3
"""Jobs that a helper has at once, so that it need not wait while the search is at work."""

ALONE = 4
"""So many points that nothing was known of are looked at before there are helpers: most questions ask of no more."""

PATIENCE_S = 10.0
"""For a word of a helper that is waited for. One that says none for longer is ended, and the search finds out itself."""


class Job(NamedTuple):
    """To take a step with a point of the search, by number and level, with what else is `given`."""

    number: int
    level: int
    given: tuple = ()


class Done(NamedTuple):
    """`sent`: None where the search is to do it."""

    sent: Any
    answers: Mapping[Hashable, Any]


@dataclass(eq=False)
class Helper:
    """One process, what it was asked and has not answered, and what it has done or was told of."""

    process: BaseProcess
    connection: Connection
    asked: set[Job] = field(default_factory=set)
    knows: set[Job] = field(default_factory=set)
    heard_s: float = 0.0

    @classmethod
    def forked(cls, searches: Sequence[PointSearch], steps: Sequence[Step], others: Iterable["Helper"]) -> "Helper":
        """Raises OSError where there can be none."""
        return cls(*forked(_serve, [other.connection for other in others], searches, steps))

    def tell(self, key: float, job: Job, done: Mapping[Job, Done]) -> None:
        """To do a job; those of the lowest key first. `done`: by others, of what the job goes by."""
        self.heard_s = self.heard_s if self.asked else time.monotonic()
        self.asked.add(job)
        self.knows.update(done)
        with suppress(OSError):  # that it is gone is seen where an answer is waited for
            self.connection.send((key, job, done))

    def heard(self) -> list[tuple[Job, Done]]:
        """What it has done since. Raises EOFError or OSError where it is gone."""
        found: list[tuple[Job, Done]] = []
        while self.connection.poll():
            found.append(self.connection.recv())
            self.asked.discard(found[-1][0])
            self.knows.add(found[-1][0])
            self.heard_s = time.monotonic()
        return found

    def close(self) -> None:
        end(self.process, self.connection)


def _serve(questions: Connection, searches: Sequence[PointSearch], steps: Sequence[Step]) -> None:
    """Answer until nobody is there to ask."""
    left: dict[Job, float] = {}
    while True:
        while not left or questions.poll():
            key, job, before = questions.recv()
            left[job] = key
            for other, done in before.items():
                _take(searches[other.number], steps[other.level], done)
        job = min(left, key=lambda job: (left[job], job))
        del left[job]
        answers = searches[job.number].tables.answers
        known, sent = len(answers), None
        with suppress(Exception):  # the search will find out itself
            sent = steps[job.level].aside(searches[job.number], *job.given)
        questions.send((job, Done(sent, dict(islice(answers.items(), known, None)))))


def _take(search: PointSearch, step: Step, done: Done) -> Any:
    search.tables.answers.update(done.answers)
    return step.taken(search, done.sent)


@dataclass(frozen=True)
class Offered:
    """What the search will come to, by its least bound: of points, which is of no use where that is `enough`, with what is `given` with levels beyond; and what is
    of use in any case."""

    upcoming: Sequence[tuple[float, Job]] = ()
    enough: float = math.inf
    given: Mapping[int, tuple] = field(default_factory=dict)
    sure: Sequence[tuple[float, Job]] = ()


@dataclass
class Ahead:
    """Helpers of a search of points, with which `steps` are taken, the first of them by level. There are none before it has `started`, and no more than `most`."""

    searches: Sequence[PointSearch]
    steps: Sequence[Step]
    most: int
    started: bool = False
    _offered: Offered = field(default_factory=Offered)
    _helpers: list[Helper] = field(default_factory=list)
    _done: dict[Job, Done] = field(default_factory=dict)
    _of: dict[int, Helper] = field(default_factory=dict)
    """Who has come farthest with a point, by its number, and has the tables of it."""
    _own: set[int] = field(default_factory=set)
    """Points that the search itself goes on with."""
    _floors: dict[Job, float] = field(default_factory=dict)
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

    def offer(self, offered: Offered) -> None:
        """In place of what was offered before."""
        self._offered = offered
        for helper in tuple(self._helpers):
            self._hear(helper)
        self._share_out()

    def _share_out(self, *wanted: tuple[float, Job]) -> None:
        """What is `wanted` and what is offered, that of the lowest key first, as far as helpers are ready for it."""
        if any(len(helper.asked) < QUEUED for helper in self._helpers):
            for key, job in sorted((*wanted, *self._offered.sure, *self._promising())):
                if (job.number in self._own and job.level < PARTING) or job in self._done or self._asked(job) is not None:
                    continue
                helper = self._ready_for(job)
                if helper is None and job.level >= LONG:
                    break  # the next that has nothing to do is for this
                if helper is not None and ((key, job) in wanted or self._floor_s(job) < self._offered.enough):
                    self._ask(helper, key, job)

    def _promising(self) -> Iterator[tuple[float, Job]]:
        """What is left to be done with points that are offered, as far as that is known; nothing behind what is to be planned: a plan is likely to take no less than
        is promised, and no more than its bound is then asked of what promises less."""
        enough = self._offered.enough
        for key, job in sorted(self._next(key, job) for key, job in self._offered.upcoming):
            if key >= enough:
                break
            yield key, job
            if job.level == PLANNING:
                break

    def _next(self, key: float, job: Job) -> tuple[float, Job]:
        while job.level < PLANNING and (done := self._done.get(job)) is not None:
            bound_s = self.steps[job.level].bound_s(done.sent) if done.sent is not None else math.inf
            key, job = max(key, bound_s), Job(job.number, job.level + 1, self._offered.given.get(job.level + 1, ()))
        return key, job

    def _floor_s(self, job: Job) -> float:
        """What is known of its point from others before long work is begun; the search looks at it when it comes to that."""
        if job not in self._floors:
            search = self.searches[job.number]
            self._floors[job] = max(search.roomier_s(), search.floor_s()) if LONG <= job.level < PROMISING else 0.0
        return self._floors[job]

    def _ready_for(self, job: Job) -> Helper | None:
        """Who has the tables of its point, if anybody; for long work another where that one has other."""
        owner, idlest = self._of.get(job.number), min(self._helpers, key=lambda helper: len(helper.asked))
        helper = idlest if owner is None or (job.level >= LONG and owner.asked) else owner
        return helper if len(helper.asked) < (QUEUED if job.level < LONG else 1) else None

    def _asked(self, job: Job) -> Helper | None:
        return next((helper for helper in self._helpers if job in helper.asked), None)

    def _ask(self, helper: Helper, key: float, job: Job) -> None:
        before: dict[Job, Done] = {}
        if job.level < PARTING:  # a part goes by nothing but tables
            self._of[job.number] = helper
            before = {other: done for other, done in self._done.items() if other.number == job.number and other.level < min(job.level, PLANNING)}
        helper.tell(key, job, {other: done for other, done in before.items() if other not in helper.knows})

    def do(self, job: Job) -> Any:
        """Takes over what a helper made of a job, or does it here."""
        self.settle(job)
        search, step, done = self.searches[job.number], self.steps[job.level], self._done.get(job)
        if done is not None and done.sent is not None:
            return _take(search, step, done)
        if self.started:
            self._own.add(job.number)
            self._of.pop(job.number, None)
        return step.here(search, *job.given)

    def row(self, jobs: Sequence[Job]) -> Iterator[Any]:
        """What each comes to, in turn, while helpers do others: parts of a case."""
        self.offer(Offered(sure=list(enumerate(jobs))))
        yield from map(self.do, jobs)

    def settle(self, job: Job) -> None:
        """Before the search does a job: what a helper has found out of it, which is waited for if one was or is to be asked."""
        since_s = time.monotonic()
        while job not in self._done and (job.number in self._of or self._asked(job) is not None or (job.level == PARTING and self._helpers)):
            self._share_out((-math.inf, job))
            self._wait(since_s)
        answers = self.searches[job.number].tables.answers
        if job in self._done:
            answers.update(self._done[job].answers)
        elif not self.started and not answers:
            self._alone += 1
            if self._alone > ALONE:
                self.start()

    def _wait(self, since_s: float) -> None:
        """For a word of anybody who is at work; ends those that have said none for too long since then."""
        busy = [helper for helper in self._helpers if helper.asked]
        ready = connection.wait([helper.connection for helper in busy], PATIENCE_S)
        for helper in busy:
            if helper.connection in ready:
                self._hear(helper)
            elif time.monotonic() - max(since_s, helper.heard_s) > PATIENCE_S:
                self._end(helper)

    def _hear(self, helper: Helper) -> None:
        """What it says; ends one that is gone."""
        try:
            self._done.update(helper.heard())
        except (EOFError, OSError):
            self._end(helper)

    def _end(self, helper: Helper) -> None:
        self._helpers.remove(helper)
        gone = {number for number, owner in self._of.items() if owner is helper}
        self._own |= gone  # no other has come so far with them
        self._of = {number: owner for number, owner in self._of.items() if number not in gone}
        helper.close()
