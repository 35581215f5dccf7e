"""Bounds on all plans of one point, and the best of them that is found."""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, product

from autopar.core.memory import MemoryUse
from autopar.core.problem import evaluate
from autopar.joint import asked
from autopar.joint.asked import KEPT, Asked
from autopar.joint.bounds import Line, Parts, counted, least_step_s, sides
from autopar.joint.deep import Deep, Sharding, mixed, roomy_depths
from autopar.joint.envelope import Envelope
from autopar.joint.even import Cuts, Held, even_cuts, quick_cuts
from autopar.joint.given import Given
from autopar.joint.known import SAFE, Flat, Floors, Proved, Told, Tried, without_memory
from autopar.joint.priced import Care, Priced, around, binding_flights
from autopar.joint.space import Ideal, Point, orders
from autopar.joint.tables import STANDING, PointTables
from autopar.planner.blocks import Order
from autopar.planner.keeping import Keeping
from autopar.planner.states import Pricing

TOLERANCE = 3e-4
"""Of the seconds of the blocks: how much more a bound could be at some price."""

KNOWN = 2
"""Points whose known bounds are looked at for one: those of itself, if there are any, and of the next larger microbatches."""

SEEN = 0.97
"""Of the memory, what the linear model of a rank's blocks makes of it at most: a guess that only orders the points."""


@dataclass(frozen=True)
class Found:
    """A plan that fits `limit_bytes`, and the search of its point. `like`: where its sharding is from, if another search found it."""

    search: "PointSearch"
    sharding: Sharding
    deep: Deep
    limit_bytes: float
    like: Tried | None = None

    @property
    def point(self) -> Point:
        return self.search.point

    @property
    def step_s(self) -> float:
        return self.deep.step_s

    @property
    def memory(self) -> MemoryUse:
        return self.deep.memory


@dataclass
class PointSearch:
    """All plans of one point."""

    joint: Given
    point: Point
    ideal: Parts = Parts(0.0)
    free_s: float = 0.0
    """See `ideal_s`."""
    priced: dict[str, Priced] = field(default_factory=dict)
    """The sides that were asked for."""
    larger: "tuple[PointSearch, ...]" = ()
    """The same with microbatches that are several of these, the smallest first."""
    least: dict[tuple[int, ...], dict[float, tuple[float, float]]] = field(default_factory=dict)
    """By sharding and limit: what its plans take at least, and up to what that was looked for."""
    told: Told | None = None
    """What other searches were told last."""

    @cached_property
    def orders(self) -> tuple[Order, ...]:
        return tuple(orders(self.point, self.joint.run.depth, self.joint.pins))

    @cached_property
    def tables(self) -> PointTables:
        return self.joint.tables(self.point)

    @property
    def keeping(self) -> Keeping:
        return self.tables.keeping

    @property
    def pricing(self) -> Pricing:
        return self.tables.pricing

    def ideal_s(self, ideal: Ideal) -> float:
        """The bound from operators that are cut evenly."""
        one = ideal.seconds(self.point.samples, self.point.outer, self.point.inner)
        step = self.ideal = one.times(self.point.num_microbatches)
        self.free_s = min((self._free_s(order, step, one, quick_cuts) for order in self.orders), default=math.inf)
        return self.free_s

    def rough_s(self, care: Care = Care.ROUGH) -> float:
        """The bound under the memory limit as near as is needed to tell points apart."""
        found: dict[str, Priced] = {}

        def priced(side: str) -> Priced:
            return found.setdefault(side, Priced(self.tables.side(side), self.tables.rough(side)))

        least = SAFE * self.within_s(priced, care)
        self._tell(found, least, self.joint.limit_bytes)
        return least

    def fastest_s(self) -> float:
        """The bound from the solved problem, without a memory limit."""
        least = math.inf
        for sooner, order in self._soonest(self._solved):
            if sooner < least:
                least = min(least, self._fastest_of(order, sides(order)[0], self._solved))
        self._tell(self.priced, least, math.inf)
        return least

    def _soonest(self, parts: Callable[[str], Parts]) -> list[tuple[float, Order]]:
        """A bound on every order by the first of its sides and what its ranks do alone, the lowest first."""
        return sorted(((self._fastest_of(order, sides(order)[0], parts, quick_cuts), order) for order in self.orders), key=lambda pair: pair[0])

    def _fastest_s(self, order: Order, parts: Callable[[str], Parts]) -> float:
        """`parts`: by side, of all shardings or of one."""
        return max(self._fastest_of(order, side, parts) for side in sides(order))

    def _fastest_of(self, order: Order, side: str, parts: Callable[[str], Parts], cuts: Callable[[Order, int], Cuts] = even_cuts) -> float:
        found = parts(side)
        return self._free_s(order, found, self._waits(side, found), cuts)

    def _solved(self, side: str) -> Parts:
        return self._priced(side).parts

    def fitting_s(self, care: Care = Care.CLOSE) -> float:
        """The bound under the memory limit of every rank, by the linear model of memory; inf where not even that can be met."""
        least = self.within_s(self._priced, care)
        self._tell(self.priced, least, self.joint.limit_bytes)
        return least

    def _priced(self, side: str) -> Priced:
        if side not in self.priced:
            solved = self.tables.side(side)
            self.priced[side] = Priced(solved, Envelope(solved.forms, TOLERANCE))
        return self.priced[side]

    def within_s(self, asked: Callable[[str], Priced], care: Care) -> float:
        """The same of all shardings, or a part of them, which are priced by side as `asked`."""
        least, room = math.inf, self.joint.limit_bytes

        def parts(side: str) -> Parts:
            return asked(side).parts

        for sooner, order in sorted(self._soonest(parts), key=lambda found: found[1].virtual > 1):  # what bounds one stage a rank is known sooner
            side = sides(order)[0]
            fastest = self._fastest_of(order, side, parts) if care.is_rough else self._fastest_s(order, parts)
            if max(sooner, fastest) >= least:
                continue
            priced, ends, whole = asked(side), parts(side), None if care.is_rough else asked("whole")
            rooms = self.rooms(order, room, self.tables.end_bytes(priced.solved))
            whole_s = whole.parts.block if whole is not None else 0.0
            prices = priced.binding(binding_flights(order, care), room)
            if order.virtual > 1:
                if prices and not care.is_rough:
                    prices = sorted({*prices, *(around(prices[0]) if care == Care.CLOSE else ())})
                    self._look((priced, whole), order.flights, prices)
                    prices.append(priced.lean_price(room))  # no plan holds less than every table's least
                held = [priced.held(order.flights, price, whole) for price in prices]
                least = min(least, self._even_s(order, ends, held, rooms, least, whole_s=whole_s, by_rank=not care.is_rough))
            else:
                if not care.is_rough:
                    self._look((priced, whole), sorted(order.in_flight), prices)
                of_ranks = zip(order.in_flight, rooms, strict=True)
                lines = [[Line(ends.block, whole_s=whole_s), *(priced.line(flight, price, own, whole) for price in prices)] for flight, own in of_ranks]
                least = min(least, max(fastest, self._step_s(order, ends, lines, self._waits(side, ends))))
        return least

    @staticmethod
    def _look(found: Iterable[Priced | None], flights: Sequence[float], prices: Iterable[float]) -> None:
        for priced, price in product(found, prices):
            if priced is not None:
                priced.look(flights, price)

    def rooms(self, order: Order, room_bytes: float, end_bytes: tuple[float, float] = (0.0, 0.0)) -> list[float]:
        """What every rank has of it for its blocks: what a stage receives for every microbatch in flight lies beside that which its blocks make, as does what is
        before and behind them."""
        received = [self._border_bytes * sum(counted(flight) for flight in by_stage) for by_stage in order.in_flight_by_stage]
        received[0] += end_bytes[0] - self._border_bytes * counted(order.in_flight_by_stage[0][0])
        received[-1] += end_bytes[1] if order.in_flight_by_stage[-1][-1] else 0.0
        return [room_bytes - held for held in received]

    def floor_s(self) -> float:
        """What is known of `fitting_s` from other searches, and from larger microbatches of this mesh, which may be cut at least as these; 0 where nothing is."""
        known = ((search, self.joint.known.floors(self.joint.about, search.point, self.joint.cluster, search.ideal)) for search in (self, *self.larger))
        found = [floors.of_part(self.point.samples / search.point.samples) for search, floors in known if floors is not None]
        return SAFE * max(map(self._floor_s, found[:KNOWN]), default=0.0)

    def _floor_s(self, floors: Floors) -> float:
        def parts(side: str) -> Parts:
            return self.priced[side].parts if side in self.priced else floors.parts.get(side, floors.parts.get("passes", self.ideal))

        least = math.inf
        limit = self.joint.limit_bytes / (STANDING if self.point.num_microbatches == 1 else 1.0)  # searches of more count all of the state
        for sooner, order in self._soonest(parts):
            side, most = sides(order)[0], max(order.in_flight)
            free = Line(parts(side).block)
            if sooner >= least:
                continue
            if order.virtual > 1:
                least = min(least, self._even_s(order, parts(side), floors.held(side, order.flights, free.block_s), self.rooms(order, limit), least, by_rank=False))
                continue
            lines = [[free, *(floors.lines(side, flight, limit) if flight >= most / 2 else ())] for flight in order.in_flight]
            least = min(least, max(self._fastest_s(order, parts), self._step_s(order, parts(side), lines, self._waits(side, parts(side)))))
        return least

    def roomier_s(self) -> float:
        """What is known of `fitting_s` from searches of this point with more memory; 0 where nothing is."""
        return self.joint.known.bound(self._about, self.joint.limit_bytes)

    @property
    def _about(self) -> Hashable:
        return self.joint.about, self.joint.pins, without_memory(self.joint.cluster), self.point

    def _tell(self, found: Mapping[str, Priced], least_s: float, limit_bytes: float) -> None:
        """What is found out, by side and within a limit."""
        lines = {side: tuple(Flat(flight, price, priced.block_s(flight, price)) for (flight, _), price in priced.prices.items() if price) for side, priced in found.items()}
        self.tell(Told(limit_bytes, least_s, {side: priced.parts for side, priced in found.items()}, lines))

    def tell(self, told: Told) -> None:
        """To the searches that follow."""
        self.told = told
        self.joint.known.add_bound(self._about, told.limit_bytes, told.least_s)
        self.joint.known.add(self.joint.about, Proved(self.joint.cluster, self.point, self.tables.operators, told.parts, told.lines))

    def _waits(self, side: str, parts: Parts) -> Parts:
        """What a microbatch takes at least of others while a rank waits for it."""
        return parts.times(1 / self.point.num_microbatches) if side == "passes" else Parts(0.0)

    def _free_s(self, order: Order, step: Parts, one: Parts, cuts: Callable[[Order, int], Cuts] = even_cuts) -> float:
        """Whatever memory there is. `one`: what is waited for, of a microbatch."""
        return self._even_s(order, step, cuts=cuts) if order.virtual > 1 else self._step_s(order, step, [[Line(step.block)]] * order.num_ranks, one)

    def _step_s(self, order: Order, ends: Parts, lines: Sequence[Sequence[Line]], one: Parts) -> float:
        return least_step_s(order, self.joint.run.depth, lines, ends, one, self._message_s) / self._faster(order)

    def _even_s(
        self, order: Order, step: Parts, held: Sequence[Held] = (), rooms: Sequence[float] = (), enough_s: float = math.inf, *, whole_s: float = 0.0,
        cuts: Callable[[Order, int], Cuts] = even_cuts, by_rank: bool = True,
    ) -> float:  # fmt: skip
        ahead = not self.joint.cluster.host.watch_s  # else what is kept costs forwards too
        faster = self._faster(order)
        found = cuts(order, self.joint.run.depth)
        return found.least_step_s(step, self._message_s, held, rooms, whole_s=whole_s, ahead=ahead, enough_s=enough_s * faster, by_rank=by_rank) / faster

    def _faster(self, order: Order) -> float:
        """Ranks that share cores are faster while others wait."""
        return self.joint.cluster.crowding if order.num_ranks > 1 else 1.0

    @cached_property
    def _message_s(self) -> float:
        """What blocks hand on, cut over all devices of a rank, takes at least; nothing where cores, which compute besides, do it."""
        return self.joint.pricing(self.point).message(self._border_bytes) if self.joint.cluster.crowding == 1.0 else 0.0

    @cached_property
    def _border_bytes(self) -> float:
        """What a block hands on of a microbatch, at least."""
        return self.joint.border_bytes(self.point.samples) / (self.point.outer * self.point.inner)

    def plan(self, limit_bytes: float, below_s: float = math.inf, asking: Callable[[], Iterable[Asked]] | None = None, ended: Callable[[], bool] | None = None) -> Found | None:
        """The best plan of the point within a limit that takes less than `below_s`: every sharding that is asked for and may be best, every order, as little
        recomputation as fits.

        The most promising sharding is planned first: what a rank holds beside what the linear model counts is about the same for all, so that of the first will do.
        `ended`: of a search in a hurry, whether there is no time for another.
        """
        best: Found | None = None
        left, unseen = self.tables.chosen((asking or self.first)()), 0.0

        def may_be_best(choices: tuple[int, ...]) -> bool:
            return self.least_s(choices, limit_bytes, below_s) < below_s

        while left:
            left = left if ended is not None else list(filter(may_be_best, left))
            choices = self._soonest_of(left, limit_bytes - unseen, below_s) or next(filter(may_be_best, left), None)
            if choices is None:
                break
            left.remove(choices)
            sharding = self.tables.sharding(choices)
            made = self.planned(sharding, limit_bytes, below_s)
            best, below_s = (made, made.step_s) if made is not None else (best, below_s)
            if ended is not None and ended():
                break
            unseen = unseen or max(0.0, self.tables.unseen_bytes(choices, made.deep if made else sharding.leanest(self.orders[0])))
        return best

    def promised_s(self, limit_bytes: float) -> float:
        """Of the sharding that is planned first: how soon the point is worth to be planned."""
        chosen, room_bytes = self.tables.chosen(self.first()), limit_bytes * SEEN
        soonest = self._soonest_of(chosen, room_bytes)
        return self.least_s(soonest, room_bytes) if soonest is not None else math.inf

    def _soonest_of(self, left: Sequence[tuple[int, ...]], limit_bytes: float, below_s: float = math.inf) -> tuple[int, ...] | None:
        """The sharding with the least `least_s`, where one is under `below_s`. None is looked at more closely than it takes to know that another has less."""
        found = None
        for choices in sorted(left, key=lambda c: self._roomier_s(c, limit_bytes)):
            if self._roomier_s(choices, limit_bytes) < below_s and (least := self.least_s(choices, limit_bytes, below_s)) < below_s:
                found, below_s = choices, least
        return found

    def planned(self, sharding: Sharding, limit_bytes: float, below_s: float = math.inf, first: int = 1) -> Found | None:
        """The best plan of a sharding within a limit that takes less than `below_s`. `first`: so many stages a rank are looked at before others."""
        best: Deep | None = None
        for order in sorted(self.orders, key=lambda order: order.virtual != first):
            even = sharding.even(order.num_stages)
            made = mixed(sharding, order, even, limit_bytes, below_s)
            if made is None and order.virtual == 1 < order.num_ranks and Deep(sharding.light, sharding.light, order, even).least_s < below_s:
                roomy = roomy_depths(sharding, order, even, limit_bytes)
                made = mixed(sharding, order, roomy, limit_bytes, below_s) if roomy is not None else None
            if made is not None:
                best, below_s = made, made.step_s
        return Found(self, sharding, best, limit_bytes) if best is not None else None

    def first(self) -> Iterator[Asked]:
        return asked.first(self.keeping.stages, self._prices, self.tables.ways)

    def likely(self) -> Iterator[Asked]:
        """The same with hardly more than the price that binds the fullest rank, as near as is known at little cost."""
        yield from asked.first(self.keeping.stages, (), self.tables.ways)
        order = self.orders[0]
        priced, flight = Priced(self.tables.side(sides(order)[0]), self.tables.rough(sides(order)[0])), max(order.in_flight)
        for price in priced.binding([flight], self.joint.limit_bytes):
            yield from asked.around_price(flight, price, self.tables.ways)

    def fine(self) -> Iterator[Asked]:
        for flight, low, high in asked.finer(self._prices):
            for how in self.tables.ways:
                yield from (Asked(flight, price, None, how) for price in self.tables.between(flight, low, high, how))

    def lean(self) -> Iterator[Asked]:
        """With the most microbatches in flight."""
        flight, whole = max(max(order.in_flight) for order in self.orders), self.tables.whole
        (fastest,) = self.tables.chosen([Asked(1.0, 0.0, None, KEPT)])
        seconds, num_bytes = evaluate(whole.in_flight(flight).problem, fastest)
        price = seconds / max(num_bytes, 1.0)
        around = asked.around(self.tables.sizes if self.tables.few else (), self.keeping.stages, flight, price, self.tables.ways)
        return chain(asked.leaner(flight, price, self.tables.ways), around)

    def leanest(self) -> Iterator[Asked]:
        """At a price at which bytes alone count."""
        order = self.orders[0]
        flight, price = max(order.in_flight), Priced(self.tables.side(sides(order)[0]), self.tables.rough(sides(order)[0])).lean_price(self.joint.limit_bytes)
        return (Asked(flight, price, None, how) for how in self.tables.ways)

    @property
    def _prices(self) -> list[tuple[float, float]]:
        """Microbatches in flight, and the price of a byte that goes with them."""
        return sorted({(flight, price) for priced in self.priced.values() for (flight, _), price in priced.prices.items() if price})

    def least_s(self, choices: tuple[int, ...], limit_bytes: float, enough_s: float = math.inf) -> float:
        """No plan of a sharding takes less, by the linear model of memory. No higher bound is looked for than `enough_s`."""
        known = self.least.setdefault(choices, {})
        least, looked_for = known.get(limit_bytes, (self._roomier_s(choices, limit_bytes), 0.0))
        if looked_for <= least < enough_s:
            least, _ = known[limit_bytes] = max(least, self._sharding_s(choices, limit_bytes, enough_s)), enough_s
        return least

    def _roomier_s(self, choices: tuple[int, ...], limit_bytes: float) -> float:
        """What is known of it, with so much memory or with more."""
        roomier = (least for limit, (least, _) in self.least.get(choices, {}).items() if limit >= limit_bytes)
        return max(roomier, default=self._fastest_orders(choices)[0][0])

    def _fastest_orders(self, choices: tuple[int, ...]) -> list[tuple[float, Order]]:
        """Every order with what it takes at least, whatever memory there is; the fastest first."""
        if choices not in self._orders:
            parts = {side: self.tables.side(side).parts_of(choices) for order in self.orders for side in sides(order)}
            found = [(self._fastest_s(order, parts.__getitem__), order) for order in self.orders]
            self._orders[choices] = sorted(found, key=lambda pair: pair[0])
        return self._orders[choices]

    @cached_property
    def _orders(self) -> dict[tuple[int, ...], list[tuple[float, Order]]]:
        return {}

    def _sharding_s(self, choices: tuple[int, ...], room_bytes: float, enough_s: float) -> float:
        whole_s, whole = self.tables.side("whole").parts_of(choices).block, self.tables.side("whole").figures(choices)
        least, end_bytes = enough_s, self.tables.end_bytes(self.tables.side("whole"))
        for fastest, order in sorted(self._fastest_orders(choices), key=lambda pair: pair[1].virtual > 1):
            if fastest < least:
                solved = self.tables.side(sides(order)[0])
                parts, figures = solved.parts_of(choices), solved.figures(choices)
                if order.virtual > 1:
                    held = figures.held(order.flights, room_bytes, whole)
                    least = min(least, self._even_s(order, parts, held, self.rooms(order, room_bytes, end_bytes), least, whole_s=whole_s))
                    continue
                lines = [figures.lines(flight, room, whole) for flight, room in zip(order.in_flight, self.rooms(order, room_bytes, end_bytes), strict=True)]
                least = min(least, max(fastest, self._step_s(order, parts, lines, self._waits(sides(order)[0], parts))))
        return least
