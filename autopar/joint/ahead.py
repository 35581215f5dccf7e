"""Processes beside the search that find out ahead what it will ask of the points that it is likely to come to.

The search goes its way as if it were alone. Before it looks at a point it takes over what the helper of that point has answered, for which it waits; a point that
no helper was asked of it looks at itself. An answer depends on its question alone (`solved.Answers`), and is taken over only where the search asks it: so plans, bounds and what was looked
at are the same however many helpers there are, and whatever becomes of them.

Helpers are forked (`core.forked`) when the search has shown that it has work to share. Each keeps the tables of its points.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, NamedTuple

from autopar.core.forked import end, forked
from autopar.joint.at_point import PointSearch

QUEUED = 3
"""Jobs that a helper has at once, so that it need not wait while the search plans a point."""

ALONE = 4
"""So many points that nothing was known of are looked at before there are helpers: most questions ask of no more."""

PATIENCE_S = 10.0
"""For a word of a helper that is waited for. One that says none for longer is ended, and the search finds out itself."""


class Job(NamedTuple):
    """To look at a point of the search, by number, by the bound of a `level`."""

    number: int
    level: int


class Done(NamedTuple):
    bound: float
    answers: Mapping[Hashable, Any]


Step = Callable[[PointSearch], float]
"""Looks at a point; what it finds out is among the `Answers` of that."""


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
        before, bound = len(answers), math.inf
        with suppress(Exception):  # the search will find out itself
            bound = steps[job.level](searches[job.number])
        questions.send((job, Done(bound, dict(islice(answers.items(), before, None)))))


@dataclass
class Ahead:
    """Helpers of a search of points, which are looked at in `steps`, by level. There are none before it has `started`, and no more than `most`."""

    searches: Sequence[PointSearch]
    steps: Sequence[Step]
    most: int
    started: bool = False
    _helpers: list[Helper] = field(default_factory=list)
    _done: dict[Job, Done] = field(default_factory=dict)
    _of: dict[int, Helper] = field(default_factory=dict)
    """Who looks at a point, by its number, and has the tables of it."""
    _before: set[int] = field(default_factory=set)
    """Points whose tables the helpers were forked with."""
    _alone: int = 0

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._helpers:
            self._helpers.pop().close()

    def start(self) -> None:
        self.started = True
        self._before = {n for n, search in enumerate(self.searches) if search.has_tables}
        with suppress(OSError):
            while len(self._helpers) < self.most:
                self._helpers.append(Helper.forked(self.searches, self.steps, self._helpers))

    def offer(self, upcoming: Sequence[tuple[float, Job]], enough: float) -> None:
        """What the search will come to, by its least bound; of no use where that is `enough`. Points whose tables the search has made since are its own."""
        for helper in tuple(self._helpers):
            self._hear(helper)
        if all(len(helper.asked) >= QUEUED for helper in self._helpers):
            return
        for key, job in sorted(self._next(key, job) for key, job in upcoming if key < enough):
            helper = self._of.get(job.number) or min(self._helpers, key=lambda helper: len(helper.asked))
            known = job.level == len(self.steps) or job in helper.asked or (job.number not in self._before and self.searches[job.number].has_tables)
            if key < enough and not known and len(helper.asked) < QUEUED:
                self._ask(helper, key, job)

    def _next(self, key: float, job: Job) -> tuple[float, Job]:
        """What is left to be done of a point, as far as it is known."""
        while job in self._done:
            key, job = max(key, self._done[job].bound), job._replace(level=job.level + 1)
        return key, job

    def _ask(self, helper: Helper, key: float, job: Job) -> None:
        self._of[job.number] = helper
        helper.tell(key, job)

    def settle(self, job: Job) -> None:
        """Before the search does a job: take over what a helper has found out of it. One that has the tables of the point is waited for."""
        helper = self._of.get(job.number)
        if helper is not None and job not in self._done and job not in helper.asked:
            self._ask(helper, 0.0, job)
        while self._of.get(job.number) is helper is not None and job not in self._done:
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
            self._of = {number: owner for number, owner in self._of.items() if owner is not helper}
            helper.close()
