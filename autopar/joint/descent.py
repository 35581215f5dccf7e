"""Plans of one question within less and less memory: the front of time against memory, where there is little time for it.

What is asked of a point holds for every limit: its tables, the shardings that cost least at a price of a byte, and what each of these is to take by the linear model
(`Reach`). So a limit costs hardly more than what is new of it. The shardings that promise most are planned until none promises less than the best plan takes; what
plans of a sharding held beside what the model counts, and took beside what was promised, is what it promises with from then on, and so do others of its point that are
more like it than like any that was planned.

One point of each number of ranks is explored first, then those next to the best plan's. Points that promise to be better are asked for all shardings that cost
least at any price about the one that binds. Nothing is proven of it: bounds are those of a search that looked at operators alone.
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from statistics import median

import numpy as np

from autopar.joint.asked import KEPT, Asked, first
from autopar.joint.at_point import Found, PointSearch
from autopar.joint.bounds import sides
from autopar.joint.early import beside, of_all_ranks
from autopar.joint.priced import Priced
from autopar.joint.reach import Reach
from autopar.joint.space import Point

# How these were chosen: by what the front of 70B on 64 GPUs takes, and how far its steps are above those of other settings (`examples/benchmark_replan.py --only front`).

DEARER, ABOUT = range(2), range(2)
"""Of 2: up to so many times the price that binds others are asked for when a point is explored, and from the one that binds the most promising sharding on later."""

ROOMY = 1.15
"""Where a step takes less than so many times what it takes with any memory the fastest shardings are asked for too."""

ROUNDS = 3
"""How often the most promising one is looked at again then."""

BEYOND = 8.0
"""A sharding that is to take so many times what it takes with any memory does not fit."""

FAILED, TRIES = 2, 6
"""So many shardings in a row that promised to be better than the best plan and were not end the search within a limit; so many in all, where there is no plan yet."""


@dataclass(eq=False)
class Candidate:
    """A sharding of a point. What plans of it took of what was promised, and held beside what was counted; None where there was none. `held_bytes`: of a rank by mode, by which
    shardings are more or less alike; `virtual`: stages of a rank that its last plan had; `looked_at`: the limit within which it was planned last."""

    choices: tuple[int, ...]
    reaches: tuple[Reach, ...]
    held_bytes: np.ndarray
    ratio: float | None = None
    unseen_bytes: float | None = None
    virtual: int = 1
    looked_at: float = math.inf
    _alike: "Candidate | None" = None
    _last: tuple[float, float] = (math.nan, math.inf)

    @property
    def known(self) -> "Candidate":
        """The one whose figures are taken for its own: itself, or the most alike one while it was not planned."""
        return self if self.unseen_bytes is not None or self._alike is None else self._alike

    def hear(self, other: "Candidate") -> None:
        """That another was planned."""
        if self._alike is None or self._far(other) < self._far(self._alike):
            self._alike = other

    def _far(self, other: "Candidate") -> float:
        return float(np.abs(self.held_bytes - other.held_bytes).sum())

    def step_s(self, room_bytes: float) -> float:
        """By the linear model; inf where it does not fit."""
        if self._last[0] != room_bytes:
            least = min([reach.step_s(room_bytes) for reach in self.reaches])
            self._last = room_bytes, least if least < BEYOND * self._free_s else math.inf
        return self._last[1]

    def price(self, room_bytes: float) -> float:
        return min(self.reaches, key=lambda reach: reach.step_s(room_bytes)).price(room_bytes)

    @cached_property
    def _free_s(self) -> float:
        return min([reach.free_s for reach in self.reaches])


@dataclass(eq=False)
class Explored:
    """A point and its shardings. `hoped`: the ratio of those of which nothing is known."""

    search: PointSearch
    candidates: dict[tuple[int, ...], Candidate] = field(default_factory=dict)
    hoped: float = 1.0
    _is_lean: bool = False
    _powers: set[int] = field(default_factory=set)
    """Of 2, the prices from which on to the next all shardings were asked for."""
    _figures: set[Hashable] = field(default_factory=set)
    """Of all candidates."""

    def promised_s(self, candidate: Candidate, limit_bytes: float) -> float:
        return candidate.step_s(self._room_bytes(candidate, limit_bytes)) * self._ratio(candidate)

    def least_s(self, limit_bytes: float) -> float:
        return min([self.promised_s(candidate, limit_bytes) for candidate in self.candidates.values()], default=math.inf)

    def _ratio(self, candidate: Candidate) -> float:
        return self.hoped if candidate.known.ratio is None else candidate.known.ratio

    @staticmethod
    def _room_bytes(candidate: Candidate, limit_bytes: float) -> float:
        return limit_bytes - (candidate.known.unseen_bytes or 0.0)

    def ask(self, limit_bytes: float) -> None:
        """For those that cost least at the price that binds and above; for the fastest too where memory costs little."""
        if price := self._price(limit_bytes):
            powers = [round(math.log2(price)) + dearer for dearer in DEARER]
            kept, again = product(powers, (KEPT,)), product(powers[:1], self._ways)
            self._add(Asked(self._flight, 2.0**power, None, how) for power, how in (*kept, *again))
        if self.least_s(limit_bytes) < ROOMY * self.search.free_s or not self.candidates:
            self._add(first(self.search.keeping.stages, (), self._ways))

    def ask_nearer(self, limit_bytes: float) -> None:
        """For those that cost least at any price about the one that binds the most promising, until that is one of them."""
        for _ in range(ROUNDS):
            price = self._price(limit_bytes)
            fresh = {math.floor(math.log2(price)) + more for more in ABOUT} - self._powers if price else set[int]()
            if not fresh:
                break
            self._powers |= fresh
            for how, power in product((KEPT, *self._ways), sorted(fresh)):
                between = self.search.tables.between(self._flight, 2.0**power, 2.0 ** (power + 1), how)
                self._add(Asked(self._flight, price, None, how) for price in between)

    def ask_leanest(self) -> None:
        if not self._is_lean:
            self._is_lean = True
            self._add(self.search.leanest())

    def _add(self, asking: Iterable[Asked]) -> None:
        for choices in self.search.tables.chosen(asking):
            whole = self.search.tables.side("whole")
            parts, blocks = whole.parts_of(choices), whole.figures(choices).blocks
            if (figures := (parts, tuple(blocks.items()))) not in self._figures:  # else another costs in all what this does
                self._figures.add(figures)
                of_rank = self.search.joint.run.depth / self.search.point.num_ranks
                held_bytes = of_rank * np.array([held for block in blocks.values() for held in (block.state_bytes, self._flight * block.kept_bytes)])
                made = self.candidates[choices] = Candidate(choices, tuple([Reach.of(self.search, choices, order) for order in self.search.orders]), held_bytes)
                for other in self.candidates.values():
                    if other.unseen_bytes is not None:
                        made.hear(other)

    @property
    def _ways(self) -> tuple[str, ...]:
        return self.search.tables.ways

    @property
    def _flight(self) -> float:
        return max(self.search.orders[0].in_flight)

    def _price(self, limit_bytes: float) -> float:
        """Of a byte: that which binds the most promising sharding, or else all together, as near as is known at little cost; 0 where none does."""
        room_bytes = limit_bytes
        if self.candidates:
            promising = min(self.candidates.values(), key=lambda candidate: self.promised_s(candidate, limit_bytes))
            room_bytes = self._room_bytes(promising, limit_bytes)
            if promising.step_s(room_bytes) < math.inf and (price := promising.price(room_bytes)):
                return price
        tables, side = self.search.tables, sides(self.search.orders[0])[0]
        return next(iter(Priced(tables.side(side), tables.rough(side)).binding([self._flight], room_bytes)), 0.0)

    def planned(self, candidate: Candidate, limit_bytes: float, below_s: float) -> Found | None:
        """The best plan of a sharding that takes less than `below_s`, and what is learned of it."""
        search, tables, ratio, is_new = self.search, self.search.tables, self._ratio(candidate), candidate.unseen_bytes is None
        sharding = tables.sharding(candidate.choices)
        candidate.looked_at = limit_bytes
        made = search.planned(sharding, limit_bytes * search.joint.known.shares.get(search.point, 1.0), below_s, candidate.virtual)
        if made is not None or candidate.unseen_bytes is None:
            deep = made.deep if made is not None else sharding.leanest(search.orders[0])
            candidate.unseen_bytes = max(0.0, tables.unseen_bytes(candidate.choices, deep))
        promised_s = candidate.step_s(limit_bytes - candidate.unseen_bytes)
        if made is not None:
            candidate.virtual = made.deep.order.virtual
            candidate.ratio = made.step_s / promised_s if promised_s < math.inf else None
        elif below_s == math.inf:
            candidate.looked_at = 0.0  # nor does it fit in less
        elif promised_s < math.inf:
            candidate.ratio = max(ratio, below_s / promised_s)
        if is_new:
            for other in self.candidates.values():
                other.hear(candidate)
        return made


@dataclass
class Descent:
    """A cache, not a value: points that were explored within a limit, and the last plan's."""

    points: dict[Point, Explored] = field(default_factory=dict)
    _limit_bytes: float = math.inf
    _last: tuple[Explored, Candidate] | None = None
    _tries: int = 0

    def plan(self, searches: Sequence[PointSearch], limit_bytes: float, most: int) -> Found | None:
        """The best plan within a limit that is found with so many more points. It begins anew where the limit is larger than the one before."""
        if limit_bytes > self._limit_bytes:
            self.points, self._last = {}, None
        self._limit_bytes = limit_bytes
        for search in searches:
            if (explored := self.points.get(search.point)) is not None:
                explored.search = search  # of the new limit
        self._tries = 0
        best = self._last[0].planned(self._last[1], limit_bytes, math.inf) if self._last is not None else None
        if not self.points:
            for search in of_all_ranks(searches):
                if search.free_s < min([explored.least_s(limit_bytes) for explored in self.points.values()], default=math.inf):
                    self._explore(search, limit_bytes)
        best = self._better(limit_bytes, best)
        for search in self._upcoming(searches, most):
            if best is None or search.free_s < best.step_s:
                self._explore(search, limit_bytes)
                best = self._better(limit_bytes, best)
        for explored in self.points.values():
            if best is None:
                explored.ask_leanest()
            elif explored.least_s(limit_bytes) <= best.step_s:
                explored.ask_nearer(limit_bytes)
        return self._better(limit_bytes, best, hopeless=True)

    def _explore(self, search: PointSearch, limit_bytes: float) -> None:
        self.points[search.point] = Explored(search)
        self.points[search.point].ask(limit_bytes)

    def _upcoming(self, searches: Sequence[PointSearch], most: int) -> Iterator[PointSearch]:
        """So many that were not explored next to the best plan's point, wherever that is by then."""
        for _ in range(most):
            if self._last is None:
                break
            centre = self._last[0].search.point
            if (fresh := next((search for search in beside(searches, centre) if search.point not in self.points), None)) is None:
                break
            yield fresh

    def _better(self, limit_bytes: float, best: Found | None, *, hopeless: bool = False) -> Found | None:
        """The best plan of the shardings that are known; of those that are not to fit too, where none that is to does and they are wanted."""
        failed, candidates = 0, [(explored, candidate) for explored in self.points.values() for candidate in explored.candidates.values()]
        ratios = [candidate.ratio for _, candidate in candidates if candidate.ratio is not None]
        for explored in self.points.values():
            explored.hoped = min(1.0, median(ratios)) if ratios else 1.0
        while self._tries < TRIES if best is None else failed < FAILED:
            best_s = best.step_s if best is not None else math.inf
            left = [(explored, candidate) for explored, candidate in candidates if candidate.looked_at > limit_bytes]
            promised_s, number = min([(explored.promised_s(candidate, limit_bytes), n) for n, (explored, candidate) in enumerate(left)], default=(math.inf, 0))
            if promised_s == math.inf and best is None and hopeless:
                promised_s, number = min([(candidate.step_s(limit_bytes), n) for n, (_, candidate) in enumerate(left)], default=(math.inf, 0))
            if promised_s >= best_s:
                break
            explored, candidate = left[number]
            made = explored.planned(candidate, limit_bytes, best_s)
            self._tries, failed = self._tries + 1, 0 if made is not None else failed + 1
            if made is not None:
                best, self._last = made, left[number]
        return best
