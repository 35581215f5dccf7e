"""Best first over all points: a bound from operators cut evenly, one from the solved sharding, one under the memory limit, and at last a plan.

    1. `space.Ideal`      every operator cut evenly, nothing communicated: no tables are built
    2. the fastest        the folded problem solved without a memory limit, every bubble counted that no cut avoids
    3. roughly, and       the same under the memory limit, by the price of a byte, from few eliminations: by one price, then by those that bind all ranks,
    4. as near as counts  and from some more: at these prices, then around them
    5. a plan             state sharding and recomputation by the liveness of the stages, the step by the schedule's lists

A point goes through these as long as its bound is the least of all; the search ends when the best plan is no more than `GAP` above every bound that is
left. Bounds of points that were planned, and are lower, are raised by cases (`cases.py`). What it returns is proven to that: no plan of the space, by these costs, is faster than `bound_s`. (Blocks are sharded alike
and computed again in two modes at most, and stages of interleaved pipelines are even. Memory in the bounds is what the linear model says, which counts no more than the walk of a plan does.)
"""

import heapq
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from autopar.core.forked import most_processes
from autopar.core.units import size
from autopar.errors import InfeasibleError
from autopar.joint.ahead import Ahead, Job, Offered
from autopar.joint.at_point import Found, PointSearch
from autopar.joint.cases import Case, Part, bound_by_cases
from autopar.joint.clock import FINISHED, UNKNOWN_S, Clock
from autopar.joint.deep import shifted
from autopar.joint.descent import Descent
from autopar.joint.early import Early, tried
from autopar.joint.given import Given
from autopar.joint.known import without_memory
from autopar.joint.likely import planned_like
from autopar.joint.space import Ideal, Point, points
from autopar.joint.steps import PARTING, PLANNING, PROMISING, Step, steps
from autopar.planner.search import Options

GAP = 0.01
"""A plan this near to the bound is near enough: the cost model is off by more."""

FAR = 0.2
"""Where a plan is so far above a point's bound, more of its shardings are looked at; where these are few, wherever the gap is not closed."""

NEAR = 1.02
"""Plans that take so much longer than the best are looked at again, with more of the shardings of their points."""

AHEAD = 8
"""Points, at most, from which the most promising is planned next."""

FINE = 3
"""Points that are looked at again."""

EARLY = 8
"""Points that are planned early under a budget of seconds."""

IN_TIME = 0.9
"""Of the budget: works take longer than they did, and something lies between them. Which re-plans are made in time: `examples/benchmark_replan.py --only replan`."""

HELPED_S = 5.0
"""Helpers are not worth to be forked for less."""

KNOWN, PLANNED, FINER, SHIFTED = "bounds known of others", "a plan of a point", "more shardings of a point", "blocks shifted"
LEVELS = "fastest", "at one price of memory", "roughly within memory", "within memory", "closely within memory", "promised"
"""Kinds of work that a search under a budget begins where they would end in time."""


@dataclass(frozen=True)
class Joint:
    """`found`: plans, the fastest first; `bound_s`: no plan of the space is faster; `looked`: how many points came to each of the levels;
    `in_time`: the search ended before its budget did."""

    found: tuple[Found, ...]
    bound_s: float
    num_points: int
    looked: tuple[int, ...]
    in_time: bool

    @property
    def best(self) -> Found:
        return self.found[0]

    @property
    def gap(self) -> float:
        return max(0.0, self.best.step_s - self.bound_s) / self.best.step_s


@dataclass
class JointSearch(Given):
    """Of all points of what is given. `helpers`: processes beside this one, at most, on which nothing but the time it takes depends."""

    progress: Callable[[str], None] = lambda text: None
    gap: float = GAP
    helpers: int = field(default_factory=most_processes)

    @property
    def question(self) -> Hashable:
        """What the answer depends on beside the model."""
        return self.run, self.batch, self.cluster, self.pins, replace(self.options, pins=()), self.gap

    @property
    def free_question(self) -> Hashable:
        """The same without a budget."""
        free = Options()
        return replace(self, options=replace(self.options, budget_s=free.budget_s, budget_points=free.budget_points)).question

    @property
    def _roomy_question(self) -> Hashable:
        """What steps depend on beside memory."""
        return without_memory(self.cluster), self.batch

    def search(self) -> Joint:
        """Raises InfeasibleError where nothing fits. The time limit is for what comes after the first plan. A budget is for all: likely plans come first, and
        bounds take what is left of it."""
        clock = Clock(took_s=self.known.took_s)
        clock.ends_in(IN_TIME * self.options.budget_s - self.known.took_s.get(FINISHED, UNKNOWN_S))
        heap: list[Waiting] = []
        free = self.options.free_micro_batches or self.pins.micro_batch is not None  # its number of samples is pinned, and what of dp follows is searched
        number = None if free else self.options.micro_batches
        searches = [PointSearch(self, point) for point in points(self.cluster, self.batch, self.run.depth, self.pins, number)]
        larger = _larger(searches)
        self._look_at_ideal(searches)
        for n, search in enumerate(searches):
            search.larger = larger[search.point]
            key = max(search.free_s, search.roomier_s()) if self.options.has_budget else search.free_s
            heapq.heappush(heap, Waiting(key, 0, n, search.free_s, search))
        if not heap:
            raise InfeasibleError(
                f"no pipeline of {self.run.depth} blocks, mesh and microbatches of {self.batch} samples go with these pins on {self.cluster.name}: degrees and microbatches must divide"
                " devices and batch; leave one of the pins out"
            )
        with Ahead(searches, steps(), self.helpers if self.options.budget_s > HELPED_S else 0) as ahead:
            joint = self._best_first(heap, ahead, clock)
        self.known.add_tried(self.about, self._roomy_question, [tried(made) for made in reversed(joint.found)])
        return joint

    def _look_at_ideal(self, searches: Sequence[PointSearch]) -> None:
        """It does not depend on memory."""
        question = self.about, self._roomy_question, tuple(search.point for search in searches)
        if (found := self.known.ideal.get(question)) is None:
            ideal = Ideal(self.cluster, self.run, self.task)
            for search in sorted(searches, key=lambda search: -search.point.samples):  # the graph of one sample may still be traced
                search.ideal_s(ideal)
            self.known.ideal.put(question, [(search.free_s, search.ideal) for search in searches])
            return
        for search, known in zip(searches, found, strict=True):
            search.free_s, search.ideal = known

    def _best_first(self, heap: list["Waiting"], ahead: Ahead, clock: Clock) -> Joint:
        num_points, looked, closed = len(heap), [len(heap), *[0] * len(LEVELS)], math.inf
        like = planned_like(self.options.row or (), ahead.searches, self.limit_bytes) if not self.options.has_budget else []
        found = self._early(heap, ahead.searches, clock, looked) if self.options.has_budget else list(like)
        best = before = min((made.step_s for made in found), default=math.inf)
        planned: list[Waiting] = []
        ready: list[Waiting] = []  # to be planned, by what they promise
        while ready or (heap and heap[0].key < best * (1 - self.gap)):
            promised = ready[0].key if ready else math.inf  # no point promises less than its bound
            looks = heap and heap[0].key < min(promised, best * (1 - self.gap)) and len(ready) < (AHEAD if found or not self.options.has_budget else 1)
            if looks and clock.allows(KNOWN) and self._raised(heap, clock):
                continue
            if found and not self._goes_on(clock, LEVELS[heap[0].level] if looks else PLANNED):
                break
            ahead.offer(_offered(heap, ready, (before * NEAR, best * NEAR), min(promised, best * (1 - self.gap))))
            if looks:
                waiting = heapq.heappop(heap)
                self.progress(f"searching {waiting.search.point}: bound {waiting.bound:.4g} s, best {best:.4g} s")
                with clock.timed(LEVELS[waiting.level]):
                    self._look(waiting, heap, ready, looked, ahead)
                continue
            waiting = heapq.heappop(ready)
            looked[-1] += 1
            closed = min(closed, waiting.bound)
            planned.append(waiting)
            with clock.timed(PLANNED):
                made = ahead.do(waiting.job(before * NEAR))
            before = best
            if made is not None and made.step_s < best * NEAR:
                clock.ends_in(self.options.time_limit_s)
                found.append(made)
                best = min(best, made.step_s)
                near = [waiting for waiting in ready if waiting.bound >= best * (1 - self.gap)]  # enough, like what is left in the heap
                ready = sorted(waiting for waiting in ready if waiting.bound < best * (1 - self.gap))
                planned, closed = planned + near, min([closed, *(waiting.bound for waiting in near)])
        closed = min([closed, *(waiting.bound for waiting in ready)])
        in_time = not ready and (not heap or heap[0].key >= best * (1 - self.gap))
        further = in_time and self.options.row is None
        while heap and heap[0].level < PROMISING and heap[0].key < min(best, closed) < math.inf and further and self._may_end_late(clock, LEVELS[heap[0].level]):
            if not self._raised(heap, clock):
                self._tighten(heap, heapq.heappop(heap), looked, ahead)
        rest = heap[0].key if heap else math.inf
        if min(closed, rest) < best * (1 - self.gap) <= rest and in_time and self._may_end_late(clock, LEVELS[PROMISING - 1]):
            closed = self._by_cases(ready + planned, best * (1 - self.gap), clock, ahead)
        bound = min(closed, rest)
        if bound < best * (1 - self.gap) and not like and self._may_end_late(clock, FINER):
            self._look_further(found, planned, best, clock, self.helpers if ahead.started else 0)
        if not found:
            raise InfeasibleError(
                f"none of {num_points} ways to lay {self.run.depth} blocks on {self.cluster.name} fits {size(self.limit_bytes)} of a device; "
                "use more nodes or devices with more memory, or a larger --max-memory"
            )
        found.sort(key=lambda f: (f.step_s, f.point.num_ranks, f.point.inner))
        with clock.timed(SHIFTED):
            uneven = shifted(found[0].sharding, found[0].deep, self.limit_bytes) if self.options.budget_points is not None or self._may_end_late(clock, SHIFTED) else found[0].deep
        if uneven is not found[0].deep:
            found.insert(0, replace(found[0], deep=uneven))  # beside the other, which may fit where this does not on the whole graph
        best = found[0].step_s
        return Joint(tuple(found), min(bound, best), num_points, tuple(looked), in_time)

    def _early(self, heap: list["Waiting"], searches: Sequence[PointSearch], clock: Clock, looked: list[int]) -> list[Found]:
        """See `Early`: what was found elsewhere, bounds that cost next to nothing, and what is likely of points that are left. Or see `Descent`."""
        if self.options.descends:
            descent = self.known.kept(("descent", self.about, self.pins, self._roomy_question), Descent)
            found = descent.plan(searches, self.limit_bytes, self.options.budget_points or 0)
            if found is None:
                raise InfeasibleError(f"none of {len(descent.points)} points that were explored fits {size(self.limit_bytes)} of a device; plan without a budget to know whether another does")
            return [found]
        before, here = self.known.tried(self.about, self._roomy_question)
        early = Early(searches, before, here, self.limit_bytes, clock, EARLY if self.options.budget_points is None else self.options.budget_points)
        early.plan_like()
        while early.found and heap[0].key < early.best_s * (1 - self.gap) and clock.allows(KNOWN) and self._raised(heap, clock):
            pass
        early.plan()
        self.known.add_tried(self.about, self._roomy_question, early.now.values())
        looked[-1] += len(early.now)
        if not early.found and here and self.options.budget_points is not None:
            raise InfeasibleError(f"none of {len(early.now)} points that were planned again fits {size(self.limit_bytes)} of a device; plan without a budget to know whether another does")
        return early.found

    def _goes_on(self, clock: Clock, work: str) -> bool:
        """Where there is a plan."""
        return self.options.budget_points is None and clock.allows(work)

    def _may_end_late(self, clock: Clock, work: str) -> bool:
        """What is done however long it takes, unless there is a budget."""
        return not self.options.has_budget or self._goes_on(clock, work)

    def _look(self, waiting: "Waiting", heap: list["Waiting"], ready: list["Waiting"], looked: list[int], ahead: Ahead) -> None:
        """By the next level."""
        if waiting.level < PROMISING:
            self._tighten(heap, waiting, looked, ahead)
        else:
            heapq.heappush(ready, replace(waiting, key=ahead.do(waiting.job()), level=PLANNING))

    @staticmethod
    def _raised(heap: list["Waiting"], clock: Clock) -> bool:
        """The least bound by what is known of others, before its next level. So the levels that a point goes through depend on those, but what it is planned by does not."""
        waiting = heap[0]
        if waiting.level < PROMISING:
            with clock.timed(KNOWN):
                for n, floor_s in enumerate((waiting.search.roomier_s, waiting.search.floor_s)[waiting.floors :], waiting.floors + 1):
                    if (floor := floor_s()) > waiting.key:
                        heapq.heapreplace(heap, replace(waiting, key=floor, floors=n))
                        return True
        return False

    def _tighten(self, heap: list["Waiting"], waiting: "Waiting", looked: list[int], ahead: Ahead) -> None:
        bound, level = waiting.bound, waiting.level
        looked[level + 1] += 1
        bound = max(bound, ahead.do(waiting.job()))
        if bound < math.inf:
            heapq.heappush(heap, Waiting(bound, level + 1, waiting.number, bound, waiting.search))

    def _by_cases(self, planned: Sequence["Waiting"], enough: float, clock: Clock, ahead: Ahead) -> float:
        """The bound on all of these points; the lowest are raised, until one cannot be raised to `enough`, or not in time."""
        left = sorted(planned, key=lambda waiting: waiting.bound)
        bounds = [waiting.bound for waiting in left]
        for n, waiting in enumerate(left):
            if waiting.bound >= enough:
                break
            self.progress(f"looking at {waiting.search.point} by cases: bound {waiting.bound:.4g} s")

            def look(parts: Sequence[Part], number: int = waiting.number) -> Iterator[Case]:
                return ahead.row([Job(number, PARTING, part) for part in parts])

            bounds[n] = max(bounds[n], bound_by_cases(waiting.search, enough, lambda: clock.allows(LEVELS[PROMISING - 1]), look))
            if bounds[n] < enough:
                break
        return min(bounds)

    def _look_further(self, found: list[Found], planned: Sequence["Waiting"], best: float, clock: Clock, helpers: int) -> None:
        """Adds what is better: at the few points of the best plans, and, while there is time, at those that may be far better than what was found."""
        near = list({made.point: made.search for made in sorted(found, key=lambda made: made.step_s)}.values())[:FINE]
        with Ahead(near, [Step(_finer)], helpers) as ahead:
            if len(near) > 1:
                ahead.start()
                ahead.offer(Offered([(0.0, Job(n, 0)) for n in range(len(near))], math.inf))
            for n in range(len(near)):
                ahead.settle(Job(n, 0))
        for search, asking in [*((s, s.fine) for s in near), *((w.search, w.search.lean) for w in planned if w.bound < best * (1 - (self.gap if w.search.tables.few else FAR)))]:
            if (search in near and not self.options.has_budget) or clock.allows(FINER):
                with clock.timed(FINER):
                    made = search.plan(self.limit_bytes, best, asking)
                if made is not None:
                    found.append(made)
                    best = made.step_s


def _finer(search: PointSearch) -> None:
    """Only so that it is known when the point is planned."""
    search.tables.chosen(search.fine())


@dataclass(frozen=True, order=True, slots=True)
class Waiting:
    """A point with its `bound`, which is that of its level. Its `key` may be higher: a bound that other searches left. Of those so many `floors` were looked at."""

    key: float
    level: int
    number: int
    bound: float = field(compare=False)
    search: PointSearch = field(compare=False)
    floors: int = field(default=0, compare=False)

    def job(self, *given: float) -> Job:
        return Job(self.number, self.level, given)


def _offered(heap: Sequence[Waiting], ready: Sequence[Waiting], below: tuple[float, float], enough: float) -> Offered:
    """`below`: what the plan that is next is to take less than, and the one after that, which is made beside it."""
    sure = [(waiting.key, waiting.job(below_s)) for waiting, below_s in zip(sorted(ready), below)]
    return Offered([(waiting.key, waiting.job()) for waiting in heap], enough, {PLANNING: (below[min(1, len(ready))],)}, sure)


def _larger(searches: Sequence[PointSearch]) -> dict[Point, tuple[PointSearch, ...]]:
    """By point those on the same mesh with microbatches that are several of its own, the smallest first."""
    alike: dict[Hashable, list[PointSearch]] = {}
    for search in sorted(searches, key=lambda search: search.point.samples):
        alike.setdefault((search.point.num_ranks, search.point.outer, search.point.inner), []).append(search)
    several = [(one, others) for others in alike.values() for one in others]
    return {one.point: tuple(o for o in others if o.point.samples > one.point.samples and o.point.samples % one.point.samples == 0) for one, others in several}
