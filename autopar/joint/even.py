"""What no pipeline whose ranks have several stages beats, cut evenly: chains of passes that wait for each other.

The passes of a step that follow each other on a rank, and those of a microbatch from stage to stage with a message between them, make chains through the
lists of an order. A step takes at least what any of its chains takes. One that goes n_s times forward and back through stage s, of d_s blocks of c seconds each, takes

    c sum_s n_s d_s  +  messages  +  what its ends take besides.

A rank that has to compute blocks again for want of memory takes longer by e_r in a step of m microbatches; of a chain that goes through all stages of the
rank n times or more it is at least n / m of that. How many blocks the stages at the ends have depends on what else they do (`deep.even_depths`): all cuts that
may come of it are looked at, each with what its ends take then at least.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from autopar.core.schedule import Kind
from autopar.joint.bounds import Parts
from autopar.planner.blocks import Order
from autopar.schedules.orders import make_order

MESSAGE, BACK = 0.1, 2.0
"""Of a forward: a message and a backward, where the longest chain is looked for. It is a chain whatever they take."""

Pass = tuple[Kind, int, int | None]
"""Forward or backward, stage, microbatch."""

MOST_PASSES = 20_000
"""Of orders that have more, only the chains of their ranks are taken."""

LONGEST = 4
"""Longest chains that are looked for, each in the cut that those before leave as the fastest."""


@dataclass(frozen=True, slots=True)
class Held:
    """The least seconds of a block of a step with its bytes at a `price`, by microbatches in flight."""

    price: float
    block_s: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Chain:
    """How often it goes forward and back through every stage, and how many messages it waits for."""

    forwards: tuple[int, ...]
    backwards: tuple[int, ...]
    messages: int


def rank_chain(order: Order, rank: int) -> Chain:
    """All that a rank does, behind the first forward of the ranks before it, and before their last backward."""
    passes = tuple([1 if s < rank else order.num_microbatches if s % order.num_ranks == rank else 0 for s in range(order.num_stages)])
    return Chain(passes, passes, 2 * rank)


def longest_chain(order: Order, blocks: Sequence[float]) -> Chain:
    """Where stages have so many equal blocks, whose messages and backwards take `MESSAGE` and `BACK` of a forward."""
    lists = make_order(order.schedule, order.num_ranks, order.num_microbatches, order.virtual).ranks
    ends: dict[Pass, float] = {}
    behind: dict[Pass, Pass | None] = {}
    before: list[Pass | None] = [None] * order.num_ranks
    left, going = [iter(actions) for actions in lists], True
    waiting = [next(actions, None) for actions in left]
    while going:
        going = False
        for rank in range(order.num_ranks):
            while (action := waiting[rank]) is not None:
                forward = action.kind is Kind.F
                nearer = action.stage - 1 if forward else action.stage + 1
                needed = (action.kind, nearer, action.microbatch) if 0 <= nearer < order.num_stages else None
                if needed is not None and needed not in ends:
                    break
                own = before[rank]
                ready, there = ends[own] if own else 0.0, ends[needed] + MESSAGE if needed else 0.0
                this = action.kind, action.stage, action.microbatch
                behind[this] = needed if there > ready else own
                ends[this] = max(ready, there) + blocks[action.stage] * (1.0 if forward else BACK)
                before[rank], waiting[rank], going = this, next(left[rank], None), True
    return _counted(order, behind, max(ends, key=ends.__getitem__))


def _counted(order: Order, behind: Mapping[Pass, Pass | None], at: Pass | None) -> Chain:
    """The chain that ends with a pass."""
    forwards, backwards, messages = [0] * order.num_stages, [0] * order.num_stages, 0
    while at is not None:
        kind, stage, _ = at
        (forwards if kind is Kind.F else backwards)[stage] += 1
        at = behind[at]
        messages += at is not None and at[1] % order.num_ranks != stage % order.num_ranks
    return Chain(tuple(forwards), tuple(backwards), messages)


@dataclass(frozen=True, eq=False)
class Cuts:
    """Even cuts of a run by an order. `blocks`: [cut, stage]; `first`, `last`: what the ends take at least besides, in blocks. `chains`: those that bound them."""

    order: Order
    blocks: np.ndarray
    first: np.ndarray
    last: np.ndarray
    chains: tuple[Chain, ...]

    def with_longest(self) -> "Cuts":
        """With the longest chain too of the cut that by those at hand is the fastest."""
        fastest = int((self.passes + MESSAGE / (1 + BACK) * self.messages).max(axis=1).argmin())  # in forwards and backwards of a block
        longest = longest_chain(self.order, self.blocks[fastest].tolist())
        return self if longest in self.chains else replace(self, chains=(*self.chains, longest))

    @cached_property
    def both(self) -> np.ndarray:
        """[chain, stage]: how often a chain goes forward and back."""
        return np.array([np.minimum(chain.forwards, chain.backwards) for chain in self.chains], float)

    @cached_property
    def passes(self) -> np.ndarray:
        """[cut, chain]: forward and back through so many blocks. The forward takes the same share of all blocks: it may be nothing, or all there is."""
        there, back = (np.array([getattr(chain, way) for chain in self.chains], float) - self.both for way in ("forwards", "backwards"))
        return self.blocks @ self.both.T + np.minimum(self.blocks @ there.T, self.blocks @ back.T)

    @cached_property
    def messages(self) -> np.ndarray:
        return np.array([chain.messages for chain in self.chains], float)

    @cached_property
    def by_rank(self) -> np.ndarray:
        """[chain, rank]: how often it goes through all stages of a rank."""
        return self.both.reshape(len(self.chains), -1, self.order.num_ranks).min(axis=1)

    def least_step_s(self, parts: Parts, message_s: float, held: Sequence[Held] = (), room_bytes: float = 0.0) -> float:
        """`parts`: of a step; `held`: what its bytes cost at some prices, of which a rank has `room_bytes`."""
        number = self.order.num_microbatches
        block, first, last = parts.block / number, np.maximum(parts.first, self.first * parts.block) / number, np.maximum(parts.last, self.last * parts.block) / number
        found = self.passes * block + self.messages * message_s + first[:, None] * self.both[:, 0] + last[:, None] * self.both[:, -1]
        if held:
            found += self._longer_s(parts.block, held, room_bytes) @ self.by_rank.T / number
        return float(found.max(axis=1).min())

    def _longer_s(self, block_s: float, held: Sequence[Held], room_bytes: float) -> np.ndarray:
        """[cut, rank]: what memory costs a rank in a step, beyond its blocks at their fastest."""
        blocks, flights = self.blocks.reshape(len(self.blocks), -1, self.order.num_ranks), self._flights
        longer = [np.einsum("csr,sr->cr", blocks, np.vectorize(at.block_s.__getitem__)(flights) - block_s) - at.price * room_bytes for at in held]
        return np.maximum(0.0, np.maximum.reduce(longer))

    @cached_property
    def _flights(self) -> np.ndarray:
        """[stage of a rank, rank]: microbatches in flight."""
        return np.array(self.order.in_flight_by_stage).T


@lru_cache(maxsize=256)
def even_cuts(order: Order, depth: int) -> Cuts:
    """All that `deep.even_depths` may make of `depth` blocks, whatever the ends take besides, with their longest chains."""
    cuts = rank_cuts(order, depth)
    for _ in range(LONGEST if 2 * order.num_microbatches * order.num_stages <= MOST_PASSES else 0):
        before, cuts = cuts, cuts.with_longest()
        if cuts is before:
            break
    return cuts


@lru_cache(maxsize=1024)
def rank_cuts(order: Order, depth: int) -> Cuts:
    """The same with the chains of ranks alone, which are known without looking at lists."""
    found = []
    for first in range(1, depth):
        for last in range(1, depth):
            least, more = divmod(depth - first - last, order.num_stages - 2)
            if least >= 1 and max(first, last) <= least + 1:
                middle = [least] * (order.num_stages - 2 - more) + [least + 1] * more
                most = max(middle)
                found.append(([first, *middle, last], max(0, most - first - 1), max(0, most - last - 1)))
    blocks, firsts, lasts = zip(*found, strict=True)
    return Cuts(order, np.array(blocks, float), np.array(firsts, float), np.array(lasts, float), tuple(rank_chain(order, rank) for rank in range(order.num_ranks)))
