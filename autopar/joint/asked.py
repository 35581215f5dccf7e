"""Which shardings of a point are looked at: each is the cheapest at some price of a byte, under some restriction."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

LEAN_POWERS = range(-6, 22)
"""Of 2: prices of a byte, in what all bytes of the fastest sharding must cost to be as dear as its seconds."""

DEARER, FEWER = 4.0, (0.5, 0.7)
"""Up to so many times the price of a byte that the bound found; shares of the fewest microbatches in flight that it has a price for. They say where to look, no
bound rests on them: GPT-3 175B on 64 A100 needed 0.7 of 4 in flight (`examples/benchmark_cards.py --only c175-64a`)."""

FEW = 200
"""Where all decisions of a point have no more states together, a sharding is looked at for each."""

KEPT, AGAIN, GATHERED = "kept", "again", "gathered"
"""How blocks are computed again: not at all, where that pays, or where that pays if they gather again."""


class Asked(NamedTuple):
    """For a sharding: the cheapest with so many microbatches in `flight` at this `price` of a byte, parameters with this stage of ZeRO as near as they have
    it (None: any), blocks computed again as `how` says. `fixed`: a node of the folded problem and its state."""

    flight: float
    price: float
    zero: int | None
    how: str
    fixed: tuple[int, int] | None = None


Prices = Sequence[tuple[float, float]]
"""Microbatches in flight, and the price of a byte that the bound found for so many; the most last."""


def first(stages: Sequence[int], prices: Prices, ways: Sequence[str]) -> Iterator[Asked]:
    """The fastest sharding under every stage of ZeRO, and those at every price of memory, with blocks computed again in one of these `ways` or not; at that
    of most microbatches in flight for each stage too."""
    yield from (Asked(1.0, 0.0, zero, KEPT) for zero in stages)
    for flight, price in prices:
        yield from (Asked(flight, price, None, how) for how in (KEPT, *ways))
    for flight, price in prices[-1:]:
        yield from (Asked(flight, price, zero, how) for how in ways for zero in stages)


def around_price(flight: float, price: float, ways: Sequence[str]) -> Iterator[Asked]:
    """At a price that is roughly the one to look at, and at higher ones."""
    for dearer, how in product((1.0, DEARER / 2, DEARER), (KEPT, *ways)):
        yield Asked(flight, price * dearer, None, how)


def finer(prices: Prices) -> Iterator[tuple[float, float, float]]:
    """Microbatches in flight, and between which prices all shardings are looked at that are the cheapest at any: above those, as the linear model counts too
    little memory; also with fewer in flight, as later ranks and stages have."""
    least = min(prices, default=None)
    fewer = [(least[0] * share, least[1]) for share in FEWER] if least is not None else []
    yield from ((flight, price, price * DEARER) for flight, price in (*fewer, *prices))


def leaner(flight: float, price: float, ways: Sequence[str]) -> Iterator[Asked]:
    """From so low a price that the sharding is the fastest to so high that it holds least, for where what is kept beside shardings is more than the linear
    model of memory says. `price`: at which all bytes of the fastest cost its seconds."""
    for power in LEAN_POWERS:
        yield from (Asked(flight, price * 2.0**power, None, how) for how in (KEPT, *ways))


def around(sizes: Sequence[int], stages: Sequence[int], flight: float, price: float, ways: Sequence[str]) -> Iterator[Asked]:
    """For the same, where states are few: with a node in each of its states the fastest, and at the highest of those prices the cheapest: of equals in the
    linear model one may hold less beside it. `sizes`: how many states every node has."""
    for node, size in enumerate(sizes):
        for fixed in ((node, state) for state in range(size) if size > 1):
            yield from (Asked(1.0, 0.0, zero, KEPT, fixed) for zero in (None, *stages))
            yield from (Asked(flight, price * 2.0 ** LEAN_POWERS[-1], None, how, fixed) for how in (KEPT, *ways))
