"""What no pipeline beats: how many blocks each rank can do in a given time within its memory, and when that is all of them.

A rank that does n of the run's blocks, sharded and computed again as it likes, takes n c seconds for a step and holds n b bytes: n c <= T and n b <= L. For
any price p of a byte, with g(p) the least c + p b of all that could be chosen for a block,

    n g(p) <= n c + p n b <= T + p L,     so     n <= floor((T + p L) / g(p))

(the Lagrangian dual, with a price of its own for every rank; blocks are whole). The first and the last rank do what lies before and behind the run besides.
A rank also waits: for the ranks before it to forward the first microbatch, and at the end for them to take the last gradient back. If there are j
ranks behind it, it goes forward j + 1 times, waits until those have taken the first microbatch there and back, and at the end of the step until they did so with
the last one: the chain through both has all but j of its passes there and back, and twice those of the ranks behind it. And all wait for the first rank to exchange
the parameters of its k blocks, before the first pass and after the last. Say a block takes c seconds of passes and y of such exchange: then

    n c + k y + p n b  =  (n - k) (c + p b) + k (c + y + p b)  <=  T + p L,

with the least of both brackets known. The least T for which all ranks together can do all blocks, for some k, is a bound on every step under 1F1B, whatever the
cut. Where ranks have several stages see `even.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from autopar.planner.blocks import Order
from autopar.planner.held import MARGIN

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
    """A `price` of memory in seconds per byte: what fits T seconds of a rank is at most T + `relief_s`, counted in blocks of `block_s`; of `whole_s` (no less) where
    a block's exchange of parameters counts too."""

    block_s: float
    relief_s: float = 0.0
    price: float = 0.0
    whole_s: float = 0.0

    @property
    def with_exchange_s(self) -> float:
        return max(self.block_s, self.whole_s)


def counted(flight: float) -> float:
    """Times what a microbatch keeps is held at least with so many in flight. Of what is kept a plan counts the `MARGIN` too; only that of the microbatch at hand
    may be gone when most is held."""
    return flight + MARGIN * max(0.0, flight - 1)


def least_step_s(order: Order, depth: int, lines: Sequence[Sequence[Line]], ends_s: Parts, pass_s: Parts, message_s: float = 0.0) -> float:
    """No step in this order is shorter; inf where the memory of the ranks is too little for `depth` blocks.

    `lines`: by rank, of a whole step; `ends_s`: what is at the ends takes no less of a step; `pass_s`: nor do parts of one microbatch; `message_s`: nor does what
    a rank hands to the next.
    """
    return _least_step_s(order, depth, tuple(map(tuple, lines)), ends_s, pass_s, message_s)


@lru_cache(maxsize=4096)
def _least_step_s(order: Order, depth: int, lines: tuple[tuple[Line, ...], ...], ends_s: Parts, pass_s: Parts, message_s: float) -> float:
    """More than half of the questions of a search are asked again."""
    exchanging = any(line.with_exchange_s != line.block_s for of_rank in lines for line in of_rank)
    ranks = _Ranks(depth, lines, ends_s, pass_s, message_s, _turned(order, lines, pass_s), exchanging)
    high = (depth * max(line.with_exchange_s for of_rank in lines for line in of_rank) + ends_s.first + ends_s.last + 2 * len(lines) * message_s) * 2
    if math.isinf(high) or not ranks.can(high):
        return math.inf
    low = 0.0
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        low, high = (low, middle) if ranks.can(middle) else (middle, high)
    return low


@dataclass(frozen=True, slots=True)
class Turned:
    """What a rank with others behind it does between the first and the last microbatch that it waits for: `share` of its passes. `lines`: of its own blocks in
    place of blocks behind it."""

    share: float
    lines: Sequence[Line]


def _turned(order: Order, lines: Sequence[Sequence[Line]], pass_s: Parts) -> list[Turned | None]:
    """By rank. None where the last microbatch goes forward before the first comes back, or there is nothing to wait for."""
    found: list[Turned | None] = []
    number, twice_s = order.num_microbatches, 2 * pass_s.block
    for behind, of_rank in zip(reversed(range(len(lines))), lines):
        share = 1 - behind / number
        turned = [Line(share * n.block_s - twice_s, share * n.relief_s, n.price, share * n.with_exchange_s - twice_s) for n in of_rank]
        found.append(Turned(share, [line for line in turned if line.block_s > 0]) if behind and twice_s and number > behind + 1 else None)
    return found


@dataclass(frozen=True, slots=True)
class _Ranks:
    """See `least_step_s`."""

    depth: int
    lines: Sequence[Sequence[Line]]
    ends_s: Parts
    pass_s: Parts
    message_s: float
    turned: Sequence[Turned | None]
    exchanging: bool

    def can(self, step_s: float) -> bool:
        """Whether all ranks together can do all blocks in this time."""
        most = self._of_first(step_s)
        if self._with(most, step_s) >= self.depth:
            return True
        if not self.exchanging:
            return False
        others = self._with(1, step_s, turning=False) - 1  # the fewer blocks the first rank has, the more the others can do
        return any(self._with(first, step_s) >= self.depth for first in range(most - 1, max(0, self.depth - others - 1), -1))

    def _of_first(self, step_s: float) -> int:
        left = step_s - self.ends_s.first - (self.ends_s.last if len(self.lines) == 1 else 0.0)
        turned = self.turned[0]
        number = min((left + line.relief_s) / line.with_exchange_s for line in self.lines[0])
        if turned is not None:
            left_s = step_s - turned.share * self.ends_s.first - self._turning_s(0, 0)
            number = min([number, *((left_s + line.relief_s) / line.whole_s for line in turned.lines)])
        return self._whole(number)

    def _whole(self, blocks: float) -> int:
        return max(0, min(math.floor(blocks * (1 + PRECISION)), self.depth))

    def _with(self, first: int, step_s: float, *, turning: bool = True) -> int:
        """How many blocks all can do where the first rank does so many; no more are counted than there are. A block of another rank keeps those behind it waiting a
        microbatch's work on it; that costs them no more than one block, so each may take all it can: there is less behind them to wait for then."""
        found, last = first, len(self.lines) - 1
        for rank in range(1, len(self.lines)):
            own_s, turned = step_s - (self.ends_s.last if rank == last else 0.0), self.turned[rank] if turning else None
            left_s = own_s - self.pass_s.first - found * self.pass_s.block - 2 * rank * self.message_s
            number = min([_behind(line, first, left_s, own_s) for line in self.lines[rank]])
            if turned is not None:
                left_s = step_s - self.pass_s.first - self._turning_s(rank, found)
                number = min([number, *[_behind(line, first, left_s, math.inf) for line in turned.lines]])
            found += self._whole(number)
            if found >= self.depth:
                break
        return found

    def _turning_s(self, rank: int, before: int) -> float:
        """What the first and the last microbatch take on other ranks and between them, of blocks: once on so many `before`, twice on the others, as if its own
        were among those."""
        messages = 2 * rank + 4 * (len(self.lines) - 1 - rank)
        return (2 * self.depth - before) * self.pass_s.block + 2 * self.pass_s.last + messages * self.message_s


def _behind(line: Line, first: int, left_s: float, own_s: float) -> float:
    """How many blocks a rank can do that has `left_s` beside what it waits for, if the first rank exchanges the parameters of so many; with those of its own
    blocks it has `own_s`."""
    left_s, whole_s = left_s + line.relief_s, line.with_exchange_s
    more_s = left_s - first * whole_s
    number = first + more_s / line.block_s if more_s >= 0 else left_s / whole_s
    return min(number, (own_s + line.relief_s) / whole_s)


def sides(order: Order) -> tuple[str, ...]:
    """Which of a point's problems bound it. A rank of one stage exchanges parameters before and after its passes, but may do so while it would wait for
    others. One of several stages may exchange those of one behind the passes of another."""
    return ("whole",) if order.num_ranks == 1 else ("passes", "whole") if order.virtual == 1 else ("passes",)
