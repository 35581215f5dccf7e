"""What no pipeline beats: how many blocks each rank can do in a given time within its memory, and when that is all of them.

A rank that does n of the run's blocks, sharded and computed again as it likes, takes n c seconds for a step and holds n b bytes: n c <= T and n b <= L. For
any price p of a byte, with g(p) the least c + p b of all that could be chosen for a block,

    n g(p) <= n c + p n b <= T + p L,     so     n <= floor((T + p L) / g(p))

(the Lagrangian dual, with a price of its own for every rank; blocks are whole). The first and the last rank do what lies before and behind the run besides.
A rank also waits: for the ranks before it to forward the first microbatch, and at the end for them to take the last gradient back. The least T for which all
ranks together can do all blocks is a bound on every step under 1F1B, whatever the cut. Where ranks have several stages see `even.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autopar.planner.blocks import Order
from autopar.planner.liveness import MARGIN

PRECISION = 1e-6
"""Of the bound, relative."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Something of a block, of all that lies before the run, and of all that lies behind it."""

    block: float
    first: float = 0.0
    last: float = 0.0

    def times(self, number: float) -> "Parts":
        return Parts(self.block * number, self.first * number, self.last * number)


@dataclass(frozen=True, slots=True)
class Line:
    """A `price` of memory in seconds per byte: what fits T seconds of a rank is at most T + `relief_s`, counted in blocks of `block_s`."""

    block_s: float
    relief_s: float = 0.0
    price: float = 0.0

    def within(self, room_bytes: float) -> "Line":
        """With another memory."""
        return replace(self, relief_s=self.price * room_bytes)


def counted(flight: float) -> float:
    """Times what a microbatch keeps is held at least with so many in flight. Of what is kept a plan counts the `MARGIN` too; only that of the microbatch at hand
    may be gone when most is held."""
    return flight + MARGIN * max(0.0, flight - 1)


def least_step_s(order: Order, depth: int, lines: Sequence[Sequence[Line]], ends_s: Parts, pass_s: Parts) -> float:
    """No step in this order is shorter; inf where the memory of the ranks is too little for `depth` blocks.

    `lines`: by rank, of a whole step; `ends_s`: what is at the ends takes no less of a step; `pass_s`: nor do parts of one microbatch.
    """
    high = (depth * max(line.block_s for of_rank in lines for line in of_rank) + ends_s.first + ends_s.last) * 2
    if math.isinf(high) or _blocks(order, depth, lines, ends_s, pass_s, high) < depth:
        return math.inf
    low = 0.0
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _blocks(order, depth, lines, ends_s, pass_s, middle) < depth else (low, middle)
    return low


def _blocks(order: Order, depth: int, lines: Sequence[Sequence[Line]], ends_s: Parts, pass_s: Parts, step_s: float) -> int:
    """How many blocks all ranks can do. A block of a rank keeps those behind it waiting a microbatch's work on it; that costs them no more than one block,
    so the first ranks may take all they can."""
    found, last = 0, len(lines) - 1
    for rank, of_rank in enumerate(lines):
        left = step_s - (pass_s.first + found * pass_s.block if rank else ends_s.first) - (ends_s.last if rank == last else 0.0)
        number = min(math.floor((left + line.relief_s) / line.block_s * (1 + PRECISION)) for line in of_rank)
        found += max(0, min(number, depth))
    return found


def sides(order: Order) -> tuple[str, ...]:
    """Which of a point's problems bound it. A rank of one stage exchanges parameters before and after its passes, but may do so while it would wait for
    others. One of several stages may exchange those of one behind the passes of another."""
    return ("whole",) if order.num_ranks == 1 else ("passes", "whole") if order.virtual == 1 else ("passes",)
