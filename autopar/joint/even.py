"""What no pipeline whose ranks have several stages beats, cut evenly: chains of passes that wait for each other.

The passes of a step that follow each other on a rank, and those of a microbatch from stage to stage with a message between them, make chains through the
lists of an order. A step takes at least what any of its chains takes. One that goes f_s times forward and b_s times back through stage s, of d_s blocks of c
seconds each, takes

    c min(sum_s f_s d_s, sum_s b_s d_s)  +  messages  +  what its ends take besides,

as all blocks are sharded alike, and their forwards take the same share. What a rank computes again for want of memory is behind its backwards: a block that takes
e more of a step of m microbatches makes the chain longer by e b_s / m. So do mixtures of chains, whose mean no step is shorter than either. Which blocks compute
again is up to the plan: with a price of memory for every rank, each block pays the least that its chains and its bytes ask for (`Within`). And every chain begins
behind the gathers of the first stage's parameters and ends before the sums of its gradients: if a block takes y of a step for these, then d_0 y on top, which is
shared out among the blocks of the chain, so that what one of them takes is the least of c + e + share * y together. How many blocks the
stages at the ends have depends on what else they do (`deep.even_depths`): all cuts that may come of it are looked at, each with what its ends take then at least.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np

from autopar.joint.bounds import Parts
from autopar.joint.chains import BACK, MESSAGE, Chain, chains_by_rank, longest_chain, may_be_walked, rank_chain
from autopar.joint.within import Within, corners
from autopar.planner.blocks import Order

FEW = 2
"""Microbatches for every rank, or fewer: where bubbles are large. Of Llama-3.1-70B on 256 GPUs 85 points need tables then, not 91 (`Joint.looked` of that search)."""

LONGEST = 4
"""Longest chains that are looked for, each in the cut that those before leave as the fastest."""


@dataclass(frozen=True, slots=True)
class Held:
    """The least seconds of a block of a step with its bytes at a `price`, by microbatches in flight; `whole_s` with its exchange of parameters too."""

    price: float
    block_s: Mapping[int, float]
    whole_s: Mapping[int, float] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.price, *self.block_s.values(), *self.whole_s.values()))

    def mixed_s(self, flight: int, share: float) -> float:
        """With so much of the exchange."""
        block_s = self.block_s[flight]
        return block_s + share * max(0.0, self.whole_s.get(flight, block_s) - block_s)


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
        fastest = int((self._passes[0] + MESSAGE / (1 + BACK) * self._messages).max(axis=1).argmin())  # in forwards and backwards of a block
        longest = longest_chain(self.order, self.blocks[fastest].tolist())
        return self if longest in self.chains else replace(self, chains=(*self.chains, longest))

    def of(self, cut: int) -> "Cuts":
        """With chains that are the longest of one of them where ranks differ in how much they compute again."""
        if cut not in self._of:
            more = chains_by_rank(self.order, self.blocks[cut].tolist()) if may_be_walked(self.order) else ()
            self._of[cut] = replace(self, chains=tuple(dict.fromkeys((*self.chains, *more))))
        return self._of[cut]

    @cached_property
    def _of(self) -> dict[int, "Cuts"]:
        return {}

    @cached_property
    def _ways(self) -> tuple[np.ndarray, np.ndarray]:
        """[chain, stage]: how often a chain goes forward, and back."""
        return np.array([c.forwards for c in self.chains], float), np.array([c.backwards for c in self.chains], float)

    @cached_property
    def _messages(self) -> np.ndarray:
        return np.array([chain.messages for chain in self.chains], float)

    @cached_property
    def _passes(self) -> tuple[np.ndarray, np.ndarray]:
        """[cut, chain]: forward and back through so many blocks, and of the way back alone which part that is. The forward takes the same share of all blocks: it
        may be nothing, or all there is."""
        there, back = (self.blocks @ way.T for way in self._ways)
        both = np.minimum(there, back)
        return both, both / np.maximum(back, 1.0)

    def _found_s(self, parts: Parts, message_s: float) -> np.ndarray:
        """[cut, chain]: what it takes at least, whatever memory there is."""
        number, ends = self.order.num_microbatches, np.minimum(*self._ways)
        first, last = (np.maximum(part, beside * parts.block) / number for part, beside in ((parts.first, self.first), (parts.last, self.last)))
        return self._passes[0] * parts.block / number + self._messages * message_s + first[:, None] * ends[:, 0] + last[:, None] * ends[:, -1]

    def least_step_s(
        self, parts: Parts, message_s: float, held: Sequence[Held] = (), room_bytes: Sequence[float] = (), *, whole_s: float = 0.0, ahead: bool = True,
        enough_s: float = np.inf, by_rank: bool = True,
    ) -> float:  # fmt: skip
        """`parts`: of a step; `held`: what its bytes cost at some prices, of which every rank has `room_bytes`. `whole_s`: of a block with its exchange of parameters,
        of those of the first stage. `ahead`: forwards take the same whatever is computed again. No higher bound is looked for than `enough_s`.
        `by_rank`: by the longest chains where ranks differ, too."""
        return self._least_step_s(parts, message_s, tuple(held), tuple(room_bytes), whole_s, ahead, enough_s, by_rank)

    @lru_cache(maxsize=4096)  # noqa: B019 - cuts are few, and kept
    def _least_step_s(
        self, parts: Parts, message_s: float, held: tuple[Held, ...], room_bytes: tuple[float, ...], whole_s: float, ahead: bool, enough_s: float, by_rank: bool
    ) -> float:  # fmt: skip
        """Shardings often have equal figures, and what needs no memory is asked for by all."""
        exchange_s = max(0.0, whole_s - parts.block)
        bounds = self._found_s(parts, message_s).max(axis=1) + self.blocks[:, 0] * exchange_s
        if not held:
            return float(bounds.min())
        least, free = enough_s, Held(0.0, dict.fromkeys(self.order.flights, parts.block), dict.fromkeys(self.order.flights, parts.block + exchange_s))
        while bounds.min() < least:  # the fastest cut first: what bounds it bounds others too
            cut = int(bounds.argmin())
            bound, of_all = (self.of(cut) if by_rank else self)._bound_s(cut, parts, message_s, [free, *held], room_bytes, ahead=ahead, enough_s=least)
            bounds = np.maximum(bounds, of_all)
            bounds[cut], least = np.inf, min(least, bound)
        return float(least)

    def _bound_s(
        self, cut: int, parts: Parts, message_s: float, held: Sequence[Held], room_bytes: Sequence[float], *, ahead: bool, enough_s: float
    ) -> tuple[float, np.ndarray]:  # fmt: skip
        """Of a cut, and what follows for all cuts."""
        ways = self._ways[1] * self._passes[1].min(axis=0)[:, None] if ahead else np.minimum(*self._ways)
        shares = (self.blocks[:, :1] * self.order.num_microbatches / np.maximum(self.blocks @ ways.T, 1.0)).min(axis=1).clip(max=1.0)  # of y, for every block
        fronts, found_s = self._fronts(held, shares[cut], parts.block), self._found_s(parts, message_s)
        within = Within(found_s, self._blocks_by_rank, self._by_rank(ways / self.order.num_microbatches), fronts, np.array(room_bytes))
        bound, of_all = within.highest(cut, enough_s)
        return bound, np.where(shares >= shares[cut], of_all, 0.0)

    def _fronts(self, held: Sequence[Held], share: float, fastest_s: float) -> np.ndarray:
        """[rank, stage of a rank, corner, 2]: what a block of each stage may take and hold."""
        flights, of_stages = self._flights
        found = [corners([(at.price, at.mixed_s(flight, share)) for at in held], fastest_s) for flight in flights]
        most = max(map(len, found))
        return np.array([line + line[-1:] * (most - len(line)) for line in found])[of_stages]

    @cached_property
    def _flights(self) -> tuple[list[int], np.ndarray]:
        """All numbers of microbatches in flight, and which of them a stage of a rank has."""
        flights = self.order.flights
        return flights, np.searchsorted(flights, self.order.in_flight_by_stage)

    @cached_property
    def _blocks_by_rank(self) -> np.ndarray:
        """[cut, rank, stage of a rank]"""
        return np.ascontiguousarray(self._by_rank(self.blocks))

    def _by_rank(self, of_stages: np.ndarray) -> np.ndarray:
        """[..., rank, stage of a rank]"""
        return of_stages.reshape(*of_stages.shape[:-1], -1, self.order.num_ranks).swapaxes(-1, -2)


@lru_cache(maxsize=256)
def even_cuts(order: Order, depth: int) -> Cuts:
    """All that `deep.even_depths` may make of `depth` blocks, whatever the ends take besides, with their longest chains."""
    cuts = rank_cuts(order, depth)
    for _ in range(LONGEST if may_be_walked(order) else 0):
        before, cuts = cuts, cuts.with_longest()
        if cuts is before:
            break
    return cuts


def quick_cuts(order: Order, depth: int) -> Cuts:
    """The same with the chains of ranks alone, which say little where ranks often wait for each other: then there are few microbatches, and lists are short."""
    return even_cuts(order, depth) if order.num_microbatches <= FEW * order.num_ranks else rank_cuts(order, depth)


@lru_cache(maxsize=1024)
def rank_cuts(order: Order, depth: int) -> Cuts:
    """The same with the chains of ranks alone, which are known without looking at lists."""
    first, last = (ends.ravel() for ends in np.mgrid[1:depth, 1:depth])
    number = order.num_stages - 2
    least, more = np.divmod(depth - first - last, number)
    may_be = (least >= 1) & (np.maximum(first, last) <= least + 1)
    first, last, least, more = first[may_be], last[may_be], least[may_be], more[may_be]
    middle = least[:, None] + (np.arange(number) >= number - more[:, None])
    firsts, lasts = (np.maximum(0, middle[:, -1] - end - 1).astype(float) for end in (first, last))
    return Cuts(order, np.column_stack([first, middle, last]).astype(float), firsts, lasts, tuple(rank_chain(order, rank) for rank in range(order.num_ranks)))
