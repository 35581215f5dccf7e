"""Plans that are likely to be among the best, made before bounds are: what a search begins with that has only so much time.

What earlier searches of the model found is planned first, for the machine, batch and memory that are asked for: their shardings where meshes and microbatches are
those, else what the same questions find. Where nothing is known, a point of each number of ranks. Then those next to the best plan's point, as long as there are
any: better plans move on to others. Nothing rests on this but which plans there are when the time is over.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from autopar.joint.at_point import Found, PointSearch
from autopar.joint.clock import Clock
from autopar.joint.deep import Sharding
from autopar.joint.known import Winner
from autopar.joint.space import Point
from autopar.planner.liveness import Engine

NEXT = 1.0
"""Doublings and halvings between the best plan's point and those that are looked at beside it."""

SHARDING, LIKELY = "a plan of a sharding", "likely shardings"
"""Kinds of work."""


@dataclass
class Early:
    """`searches`: the points; `most`: so many are planned at most."""

    searches: Sequence[PointSearch]
    winners: Sequence[Winner]
    limit_bytes: float
    clock: Clock
    most: int
    found: list[Found] = field(default_factory=list)
    """Each is better than those before it."""
    num_planned: int = 0
    _seen: set[Point] = field(default_factory=set)

    @property
    def best_s(self) -> float:
        return min((found.step_s for found in self.found), default=math.inf)

    def plan(self) -> None:
        for winner, search in self._like_winners():
            if have_one_mesh(search.point, winner.point) and self._goes_on(SHARDING) and self._may_be_better(search):
                with self.clock.timed(SHARDING):
                    self._add(plan_like(search, winner, self.limit_bytes, self.best_s))
        asked = [asked for winner in self.winners for asked in winner.asked]
        for search in self._upcoming():
            if self.num_planned >= self.most or not self._goes_on(LIKELY):
                break
            self._seen.add(search.point)
            self.num_planned += 1
            with self.clock.timed(LIKELY):
                likely = list(dict.fromkeys((*asked, *search.likely())))
                search.tables.chosen(likely)
            self._add(search.plan(self.limit_bytes, self.best_s, lambda likely=likely: likely, lambda: not self.clock.allows(SHARDING)))

    def _add(self, made: Found | None) -> None:
        if made is not None:
            self.found.append(made)

    def _goes_on(self, work: str) -> bool:
        return not self.found or self.clock.allows(work)

    def _upcoming(self) -> Iterator[PointSearch]:
        for search in [search for _, search in self._like_winners()] or self._of_all_ranks():
            if search.point not in self._seen and self._may_be_better(search):
                yield search
        while self.found and (left := next(filter(self._may_be_better, self._beside(self.found[-1].point)), None)):
            yield left

    def _like_winners(self) -> Iterator[tuple[Winner, PointSearch]]:
        return ((winner, min(self.searches, key=lambda search: (distance(search.point, winner.point), search.free_s))) for winner in self.winners)

    def _of_all_ranks(self) -> Iterator[PointSearch]:
        """One sample for each rank of the outer axis, and an inner axis as long as can be: such points are seldom the best, and seldom far from it."""
        by_ranks: dict[int, PointSearch] = {}
        for search in sorted(self.searches, key=lambda search: (abs(math.log2(search.point.samples / search.point.outer)), -search.point.inner)):
            by_ranks.setdefault(search.point.num_ranks, search)
        yield from sorted(by_ranks.values(), key=lambda search: search.free_s)

    def _beside(self, centre: Point) -> list[PointSearch]:
        """What was not looked at next to a point, the nearest first and of equals what may be the fastest."""
        near = [(far, n) for n, search in enumerate(self.searches) if search.point not in self._seen and (far := distance(search.point, centre)) <= NEXT]
        return [self.searches[n] for _, n in sorted(near, key=lambda pair: (pair[0], self.searches[pair[1]].free_s, pair[1]))]

    def _may_be_better(self, search: PointSearch) -> bool:
        if search.free_s < self.best_s and max(search.roomier_s(), search.floor_s()) < self.best_s:
            return True
        self._seen.add(search.point)
        return False


def distance(one: Point, other: Point) -> float:
    """Doublings and halvings of the pipeline's ranks, of the inner axis, and of a microbatch: of its samples, or of those for each rank of the outer axis."""
    samples = one.samples / other.samples
    pairs = one.num_ranks / other.num_ranks, one.inner / other.inner
    return sum(abs(math.log2(ratio)) for ratio in pairs) + min(abs(math.log2(ratio)) for ratio in (samples, samples * other.outer / one.outer))


def have_one_mesh(one: Point, other: Point) -> bool:
    """Whether shardings of one may be those of the other."""
    return (one.mesh, one.samples, one.num_microbatches > 1) == (other.mesh, other.samples, other.num_microbatches > 1)


def plan_like(search: PointSearch, winner: Winner, limit_bytes: float, below_s: float = math.inf) -> Found | None:
    """The best plan of a point with the sharding of another, which has the same mesh."""
    sharding, number = winner.sharding, search.point.num_microbatches
    cut, residency = sharding.cut, sharding.cut.program.residency
    if cut.pricing is not search.pricing or residency.micro_batches != number:
        program = replace(cut.program, residency=replace(residency, micro_batches=number))
        sharding = Sharding.of(program, search.pricing, search.joint.run, Engine.of(search.pricing.cluster), search.keeping.programs)
    found = search.planned(sharding, limit_bytes, below_s, winner.virtual)
    return replace(found, like=winner) if found is not None else None


def winner_of(found: Found) -> Winner:
    """For searches that follow."""
    asked = found.like.asked if found.like is not None else found.search.tables.asked_for(found.sharding)
    return Winner(found.point, found.deep.order.virtual, found.sharding, asked)
