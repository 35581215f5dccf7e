"""What one sharding costs in every mode of recomputation, by the linear model: which shardings are worth to be planned, and in which order.

A rank whose blocks are each in one mode or another takes at least what the mixture of modes takes that just fits. That is the bound of `bounds.py` with one
sharding in place of all, at the few prices of a byte at which two modes cost the same.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from autopar.joint.bounds import Line, counted
from autopar.joint.deep import Deep
from autopar.joint.even import Held

FULL = 1e3
"""Of the seconds of a step: what all memory of a rank costs at a price at which bytes alone count."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block of the run in one mode: seconds of a step, bytes that it holds always, and for every microbatch in flight."""

    seconds: float
    state_bytes: float
    kept_bytes: float

    def held_bytes(self, flight: float) -> float:
        return self.state_bytes + counted(flight) * self.kept_bytes


@dataclass(frozen=True, eq=False)
class Figures:
    """Of one sharding, by mode of recomputation."""

    blocks: Mapping[str, Block]

    def __reduce__(self) -> tuple:
        return Figures, (self.blocks,)  # without what follows from them

    def lines(self, flight: float, limit_bytes: float, whole: "Figures") -> list[Line]:
        """What a rank of so much memory with so many microbatches in flight can do of the step, whatever modes its blocks are in. Memory may have no limit. `whole`:
        of all that it costs, where these are passes alone."""
        lines = self._lines(flight, whole)
        return [lines[0], *(replace(line, relief_s=line.price * limit_bytes) for line in lines[1:])] if limit_bytes < math.inf else lines[:1]

    def _lines(self, flight: float, whole: "Figures") -> list[Line]:
        """Of no memory, the first of free memory."""
        key = flight, whole
        if key not in self._of_flight:
            prices = [0.0, *self._prices(flight)]
            self._of_flight[key] = [Line(self._block_s(flight, price), 0.0, price, whole._block_s(flight, price)) for price in prices]
        return self._of_flight[key]

    @cached_property
    def _of_flight(self) -> dict[tuple[float, "Figures"], list[Line]]:
        return {}

    def held(self, flights: Collection[int], limit_bytes: float, whole: "Figures") -> list[Held]:
        """What bytes cost a block with so many microbatches in flight, at all prices at which it matters. Memory may have no limit."""
        if limit_bytes == math.inf:
            return []
        key = tuple(flights), whole
        if key not in self._held:
            prices = sorted({line.price for flight in flights for line in self._lines(flight, whole)[1:]})
            self._held[key] = [Held(price, {f: self._block_s(f, price) for f in flights}, {f: whole._block_s(f, price) for f in flights}) for price in prices]
        return self._held[key]

    @cached_property
    def _held(self) -> dict[tuple[tuple[int, ...], "Figures"], list[Held]]:
        return {}

    def _block_s(self, flight: float, price: float) -> float:
        return min(block.seconds + price * block.held_bytes(flight) for block in self.blocks.values())

    def _prices(self, flight: float) -> list[float]:
        """Those at which two modes next to each other cost the same, and one at which bytes alone count."""
        hull: list[tuple[float, float]] = []
        for seconds, held in sorted((block.seconds, block.held_bytes(flight)) for block in self.blocks.values()):
            while len(hull) > 1 and _price(hull[-2], hull[-1]) >= _price(hull[-1], (seconds, held)):
                hull.pop()
            if not hull or held < hull[-1][1]:
                hull.append((seconds, held))
        return [*(_price(a, b) for a, b in zip(hull, hull[1:])), FULL * hull[-1][0] / max(hull[-1][1], 1.0)]

    def beside_bytes(self, deep: Deep, rank: int) -> float:
        """What a rank of a plan of this sharding holds, at its fullest, beside what this counts of its blocks."""
        light, heavy = self.blocks[deep.light.mode], self.blocks[deep.heavy.mode]
        depths = zip([deep.depths[s] for s in deep.held(rank)], deep.order.in_flight_by_stage[rank], strict=True)
        counted = sum((d.blocks - d.heavy) * light.held_bytes(flight) + d.heavy * heavy.held_bytes(flight) for d, flight in depths)
        return deep.rank_memory(rank).high_bytes - counted


def _price(fast: tuple[float, float], lean: tuple[float, float]) -> float:
    """Of a byte: at it the slower one, which holds less, costs as much as the other."""
    return (lean[0] - fast[0]) / max(fast[1] - lean[1], 1e-9)
