"""What the blocks of a point cost at prices of memory: which prices bind its ranks, and what a block takes at least at them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from autopar.errors import InfeasibleError
from autopar.joint.bounds import Line, Parts, counted
from autopar.joint.envelope import LEAN, Envelope
from autopar.joint.even import Held
from autopar.joint.solved import Solved
from autopar.planner.blocks import Order

STEPS = 2
"""Numbers of microbatches in flight for which prices are looked for, between two powers of two. Any price makes a bound."""

AROUND = range(-2, 3)
"""Steps from the price that goes with what a rank holds in the mean: what bytes cost blocks that are on the longest chains more or less often than others. The steps
are halves of powers of two, so that limits of memory near to each other share them."""


class Care(IntEnum):
    """How closely memory is looked at: by the price that binds ranks with the most microbatches in flight, by that of all ranks, with what blocks cost there as near
    as counts and their exchange of parameters, and also at prices around it."""

    ONE = 0
    ROUGH = 1
    NEAR = 2
    CLOSE = 3

    @property
    def is_rough(self) -> bool:
        return self <= Care.ROUGH


def binding_flights(order: Order, care: Care) -> list[float]:
    """Numbers of microbatches in flight whose prices are looked at: memory binds those ranks first that hold most."""
    most = max(order.in_flight)
    if care == Care.ONE:
        return [most]
    return [most, min(order.in_flight)] if order.virtual > 1 else sorted({flight for flight in order.in_flight if flight >= most / 2})


def around(price: float) -> list[float]:
    near = round(2 * math.log2(price))
    return [2.0 ** ((near + step) / 2) for step in AROUND]


@dataclass
class Priced:
    """By an `envelope` of a problem's forms. A cache, not a value."""

    solved: Solved
    envelope: Envelope
    prices: dict[tuple[float, float], float] = field(default_factory=dict)
    """Of a byte, by microbatches in flight and memory of a rank: those that were asked for."""

    @property
    def parts(self) -> Parts:
        return self.solved.parts

    def block_s(self, flight: float, price: float) -> float:
        """A block of a step takes at least so many seconds, its bytes included."""
        return self.envelope.low(price, price * counted(flight)) / self.solved.depth

    def line(self, flight: float, price: float, limit_bytes: float, whole: "Priced | None" = None) -> Line:
        """What a rank of so much memory with so many microbatches in flight can do of the step; `whole`: of all that it costs, where these are passes alone."""
        return Line(self.block_s(flight, price), price * limit_bytes, price, whole.block_s(flight, price) if whole is not None else 0.0)

    def held(self, flights: Iterable[int], price: float, whole: "Priced | None" = None) -> Held:
        """What bytes cost a block with so many microbatches in flight."""
        flights = list(flights)
        return Held(price, {f: self.block_s(f, price) for f in flights}, {f: whole.block_s(f, price) for f in flights} if whole is not None else {})

    def look(self, flights: Sequence[float], price: float) -> None:
        """So that what blocks cost at this price is known well for the fewest, the most and some of these."""
        for flight in {flights[0], flights[len(flights) // 2], flights[-1]}:
            self.envelope.look(price, price * counted(flight))

    def binding(self, flights: Iterable[float], limit_bytes: float) -> list[float]:
        """The prices of a byte that make the best bounds where all ranks have so much memory, and so many microbatches in flight: those that are not 0."""
        return list(dict.fromkeys(price for flight in flights if (price := self._price(flight, limit_bytes))))

    def lean_price(self, limit_bytes: float) -> float:
        """At which hardly anything but bytes counts."""
        return LEAN * self.envelope.fastest_s / max(self.solved.num_ranks * limit_bytes, 1.0)

    def _price(self, flight: float, limit_bytes: float) -> float:
        near = 2.0 ** (math.floor(STEPS * math.log2(flight)) / STEPS) if flight > 0 else 0.0
        if (near, limit_bytes) not in self.prices:
            total = self.solved.num_ranks * limit_bytes
            try:
                price = self.envelope.best_price(counted(near), total)
            except InfeasibleError:
                price = self.lean_price(limit_bytes)  # other ranks may have more blocks than this one
            self.prices[near, limit_bytes] = price
        return self.prices[near, limit_bytes]
