"""Plans that are likely to be among the best, made before bounds are: what a search begins with that has only so much time.

Points that earlier searches of the model planned are planned again first, for the machine, batch and memory that are asked for: by the shardings that they had, where
mesh and microbatches are the same, and by those that the same questions find. Where nothing is known, a point of each number of ranks is. Then those next to the best
plan's point, as long as there are any: better plans move on to others. With less memory no point has a faster plan than with more; so what was no faster than the best
plan is now, is not planned again. A point that had a plan begins with the sharding of that, which tells at once what others are worth; while none has a plan, with
the sharding that holds least: where that does not fit, no other is looked at. Nothing rests on this but which plans there are when the time is over.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from autopar.joint.at_point import Found, PointSearch
from autopar.joint.clock import Clock
from autopar.joint.deep import Sharding
from autopar.joint.known import Tried
from autopar.joint.space import Point
from autopar.planner.liveness import Engine

NEXT = 1.0
"""Doublings and halvings between the best plan's point and those that are looked at beside it."""

SLACK = 1.05
"""Plans that take so much longer than the best are made too: with less memory they may be better."""

FEW = 4
"""Points of another machine or batch that are looked for again on this one."""

MOST = 8
"""Points that are planned where none has a plan yet."""

SHARDING, LIKELY, BUILT = "a plan of a sharding", "plans of likely shardings", "tables and plans of likely shardings"
"""Kinds of work."""


@dataclass
class Early:
    """`searches`: the points; `tried`: those that were planned before, the best first, `here`: on this machine, for this batch. Of others so many are
    planned at `most`; if none, only the best point by more than the sharding that it had."""

    searches: Sequence[PointSearch]
    tried: Sequence[Tried]
    here: bool
    limit_bytes: float
    clock: Clock
    most: int
    found: list[Found] = field(default_factory=list)
    """The best last."""
    now: dict[Point, Tried] = field(default_factory=dict)
    """What was planned of them."""
    _seen: set[Point] = field(default_factory=set)
    _num_new: int = 0

    @cached_property
    def _before(self) -> frozenset[Point]:
        return frozenset(tried.point for tried in self.tried)

    @property
    def best_s(self) -> float:
        return self.found[-1].step_s if self.found else math.inf

    @property
    def _best(self) -> Point | None:
        return self.found[-1].point if self.found else self.tried[0].point if self.here else None

    def plan_like(self) -> None:
        """By shardings of another machine or batch."""
        for tried, search in self._again() if not self.here else ():
            if have_one_mesh(search.point, tried.point) and self._goes_on(SHARDING) and self._may_be_better(search):
                with self.clock.timed(SHARDING):
                    self._add(search, plan_like(search, tried, self._limit_bytes(search), self.best_s))

    def plan(self) -> None:
        """By those that are likely on this one."""
        asked = [asked for tried in self.tried[:FEW] for asked in tried.asked]
        before = {tried.point: tried for tried in self.tried} if self.here else {}
        for search in self._upcoming():
            new, like = search.point not in before, before.get(search.point)
            if (new and self._num_new >= (self.most if self.found else max(self.most, MOST))) or not self._goes_on(SHARDING if like is not None else BUILT):
                break
            self._num_new += new
            self._seen.add(search.point)
            below_s = self.best_s * SLACK
            if like is not None:  # what its sharding takes now tells which others are worth a look
                with self.clock.timed(SHARDING):
                    made = plan_like(search, like, self._limit_bytes(search), below_s)
                if not self.most and self.found and (made is None or made.step_s >= self.best_s):  # slower, and no more is wanted of it
                    self.now[search.point] = tried(made) if made is not None else replace(like, step_s=below_s, limit_bytes=self.limit_bytes)
                    continue
                below_s = made.step_s if made is not None else below_s
                self._add(search, made)
            if not self.found and not self._fits(search):
                continue
            work = LIKELY if search.tables.are_built else BUILT
            if self._goes_on(work):
                with self.clock.timed(work):
                    likely = list(dict.fromkeys((*asked, *search.likely())))
                    made = search.plan(self._limit_bytes(search), below_s, lambda likely=likely: likely, lambda: not self.clock.allows(SHARDING))
                self._add(search, made)

    def _fits(self, search: PointSearch) -> bool:
        """Whether the plan of a point that holds least does: with less memory than any plan that is known has, this is what points are told apart by. In a hurry it
        would be the only one that there is."""
        if search.joint.options.budget_points is None:
            return True
        self._add(search, search.plan(self._limit_bytes(search), asking=search.leanest))
        return bool(self.found)

    def _add(self, search: PointSearch, made: Found | None) -> None:
        if made is not None and made.step_s < self.best_s:
            self.found.append(made)
        slow = Tried(search.point, self.best_s * SLACK, self.limit_bytes)
        self.now[search.point] = tried(made) if made is not None else self.now.get(search.point, slow)

    def _limit_bytes(self, search: PointSearch) -> float:
        return self.limit_bytes * search.joint.known.shares.get(search.point, 1.0)

    def _goes_on(self, work: str) -> bool:
        return not self.found or self.clock.allows(work)

    def _upcoming(self) -> Iterator[PointSearch]:
        for before, search in self._again() if self.tried else ((None, search) for search in of_all_ranks(self.searches)):
            slower = self.here and before is not None and before.limit_bytes >= self.limit_bytes and before.step_s >= self.best_s
            if search.point not in self._seen and not slower and self._may_be_better(search):
                yield search
        while (best := self._best) and (near := next(filter(self._may_be_better, self._beside(best)), None)):
            yield near

    def _again(self) -> Iterator[tuple[Tried, PointSearch]]:
        """What was tried, with its point or those that are as near to it as any."""
        by_point = {search.point: search for search in self.searches}
        if self.here:
            yield from ((tried, by_point[tried.point]) for tried in self.tried if tried.point in by_point)
            return
        for tried in self.tried[:FEW]:
            far = [distance(search.point, tried.point) for search in self.searches]
            nearest = [search for search, found in zip(self.searches, far, strict=True) if found == min(far)]
            yield from ((tried, search) for search in sorted(nearest, key=lambda search: (abs(math.log2(_of_rank(search.point) / _of_rank(tried.point))), search.free_s)))

    def _beside(self, centre: Point) -> Iterator[PointSearch]:
        """What was never planned next to a point."""
        seen = self._seen | (self._before if self.here else set())
        return (search for search in beside(self.searches, centre) if search.point not in seen)

    def _may_be_better(self, search: PointSearch) -> bool:
        return search.free_s < self.best_s and max(search.roomier_s(), search.floor_s()) < self.best_s


def of_all_ranks(searches: Iterable[PointSearch]) -> list[PointSearch]:
    """One sample for each rank of the outer axis, and an inner axis as long as can be: such points are seldom the best, and seldom far from it."""
    by_ranks: dict[int, PointSearch] = {}
    for search in sorted(searches, key=lambda search: (abs(math.log2(_of_rank(search.point))), -search.point.inner)):
        by_ranks.setdefault(search.point.num_ranks, search)
    return sorted(by_ranks.values(), key=lambda search: search.free_s)


def beside(searches: Sequence[PointSearch], centre: Point) -> list[PointSearch]:
    """Those next to a point, the nearest first and of equals what may be the fastest."""
    near = [(far, n) for n, search in enumerate(searches) if (far := distance(search.point, centre)) <= NEXT]
    return [searches[n] for _, n in sorted(near, key=lambda pair: (pair[0], searches[pair[1]].free_s, pair[1]))]


def distance(one: Point, other: Point) -> float:
    """Doublings and halvings of the pipeline's ranks, of the inner axis, and of a microbatch: of its samples, or of those for each rank of the outer axis."""
    pairs = one.num_ranks / other.num_ranks, one.inner / other.inner
    return sum(abs(math.log2(ratio)) for ratio in pairs) + min(abs(math.log2(ratio)) for ratio in (one.samples / other.samples, _of_rank(one) / _of_rank(other)))


def _of_rank(point: Point) -> float:
    """Samples of a microbatch for each rank of the outer axis."""
    return point.samples / point.outer


def have_one_mesh(one: Point, other: Point) -> bool:
    """Whether shardings of one may be those of the other."""
    return (one.mesh, one.samples, one.num_microbatches > 1) == (other.mesh, other.samples, other.num_microbatches > 1)


def plan_like(search: PointSearch, like: Tried, limit_bytes: float, below_s: float = math.inf) -> Found | None:
    """The best plan of a point with the sharding of another, which has the same mesh."""
    sharding, number = like.sharding, search.point.num_microbatches
    if sharding is None:
        return None
    cut, residency = sharding.cut, sharding.cut.program.residency
    if cut.pricing is not search.pricing or residency.micro_batches != number:
        program = replace(cut.program, residency=replace(residency, micro_batches=number))
        sharding = Sharding.of(program, search.pricing, search.joint.run, Engine.of(search.pricing.cluster), search.keeping.programs)
    found = search.planned(sharding, limit_bytes, below_s, like.virtual)
    return replace(found, like=like) if found is not None else None


def tried(found: Found) -> Tried:
    """For searches that follow."""
    asked = found.like.asked if found.like is not None else found.search.tables.asked_for(found.sharding)
    return Tried(found.point, found.step_s, found.limit_bytes, found.deep.order.virtual, found.sharding, asked)
