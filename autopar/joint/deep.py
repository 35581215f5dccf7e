"""A sharding of a deep model cut into stages: the seconds and bytes of a step."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from heapq import heapify, heappop, heappush
from itertools import accumulate, permutations, product

import numpy as np

from autopar.core.memory import MemoryUse
from autopar.core.residency import GATHER, gathers_again
from autopar.core.schedule import Edge
from autopar.core.unroll import Run
from autopar.cost_models.pipeline import StageCost
from autopar.joint.cut import ALL, FIRST, LAST, MIDDLE, Cut
from autopar.joint.kinds import Depth, Held, Kinds, Mixture
from autopar.planner.blocks import Order, steady, step_seconds
from autopar.planner.liveness import Engine
from autopar.planner.states import Pricing
from autopar.program import Program

STEADY_ROUNDS = 3
"""After so many at least, see `steady`."""

TIMED_PASSES = 2048
"""Rounds of so many forwards are timed rather than taken from fewer."""


@dataclass(frozen=True)
class Sharding:
    """One sharding under the modes of recomputation of its blocks that it may mix."""

    cut: Cut
    given: tuple[str, ...]

    @classmethod
    def of(cls, program: Program, pricing: Pricing, run: Run, engine: Engine, modes: Sequence[str]) -> "Sharding":
        return cls(Cut(program, pricing, run, engine), tuple(modes))

    @cached_property
    def light(self) -> Kinds:
        """The fastest, which computes nothing again where it may."""
        return Kinds(self.cut, "none") if "none" in self.given else self.modes[0]

    @cached_property
    def modes(self) -> tuple[Kinds, ...]:
        """The fastest first. What gathers again is another mode only where there is something to gather."""
        made = [self.light if mode == "none" else Kinds(self.cut, mode) for mode in self.given]
        as_well = {k.mode for k in made if gathers_again(k.mode) and k.mode.removesuffix(GATHER) in self.given}
        differ = [k for k in made if k.mode not in as_well or any(move.again for move in k.program.moves)]
        return tuple(sorted(differ, key=lambda kinds: kinds.block_s))

    def even(self, num_stages: int) -> tuple[Depth, ...]:
        """See `even_depths`."""
        if num_stages not in self._even:
            self._even[num_stages] = even_depths(self.light, num_stages)
        return self._even[num_stages]

    def leanest(self, order: Order) -> "Deep":
        """All blocks in the slowest mode, cut evenly."""
        return Deep(self.modes[-1], self.modes[-1], order, self.even(order.num_stages))

    @cached_property
    def _even(self) -> dict[int, tuple[Depth, ...]]:
        return {}


@dataclass(frozen=True, eq=False)
class Deep:
    """Stages of these depths, run in this order. `light`, `heavy`: kinds of the two modes that are mixed; of a rank's stages the first get the heavier one first, or,
    if `late`, of those that hold most microbatches the last: their backwards begin a step, when ranks wait for each other anyway."""

    light: Kinds
    heavy: Kinds
    order: Order
    depths: tuple[Depth, ...]
    late: bool = False

    @cached_property
    def mixture(self) -> Mixture:
        return self.light.with_heavy(self.heavy)

    @cached_property
    def costs(self) -> tuple[StageCost, ...]:
        return tuple([self.mixture.cost(kind_of(s, len(self.depths)), depth) for s, depth in enumerate(self.depths)])

    @cached_property
    def least_s(self) -> float:
        """No order takes less: every rank does its passes behind the first stages of the ranks before it, there and back."""
        work = [c.forward_s + c.input_gradient_s + c.weight_gradient_s for c in self.costs]
        ranks, times = self.order.num_ranks, self.order.num_microbatches
        found = max([way + sum([times * stage for stage in work[rank::ranks]]) for rank, way in zip(range(ranks), accumulate(work, initial=0.0))])
        return found / self.light.cut.pricing.cluster.crowding

    @cached_property
    def step_s(self) -> float:
        """Of a step; long ones from the rounds of a short one."""
        return self.mixture.step_s(self.order, self.depths, self._step_s)

    def takes_less(self, below_s: float) -> bool:
        """Whether a step takes less than so many seconds, which may be known before its end."""
        return self.least_s < below_s and self.mixture.step_s(self.order, self.depths, self._step_s, below_s) < below_s

    def _step_s(self, enough_s: float) -> float:
        rounds = max(STEADY_ROUNDS, TIMED_PASSES // (len(self.depths) * self.order.num_ranks))
        number = self.order.num_microbatches
        return steady(number, self.order.num_ranks, rounds, lambda few: self._timed(few, enough_s if few == number else math.inf))

    def _timed(self, num_microbatches: int, enough_s: float) -> float:
        n, message, stages = len(self.depths), self.light.cut.message, self.light.cut.stages
        order = replace(self.order, num_microbatches=num_microbatches)
        edges = tuple(Edge(s, s + 1) for s in range(n - 1))
        trained = self.light.program.graph.differentiated
        shared = [v for v in stages.shared if v in trained] if self.order.num_ranks > 1 else []
        tied, tie_s = (((0, n - 1),), (sum(self.light.cut.pricing.tie((0, order.num_ranks - 1), stages.tied_bytes(v)) for v in shared),)) if shared else ((), ())
        return step_seconds(order, self.light.cut.pricing.cluster, self.costs, edges, (message,) * (n - 1), tied, tie_s, enough_s)

    # --- memory ----------------------------------------------------------------------------------------------------------

    def held(self, rank: int) -> list[int]:
        return list(range(rank, len(self.depths), self.order.num_ranks))

    @cached_property
    def memory(self) -> MemoryUse:
        """Of the fullest rank."""
        return max((self.rank_memory(rank) for rank in range(self.order.num_ranks)), key=lambda m: m.high_bytes)

    def rank_memory(self, rank: int, changed: Mapping[int, Depth] | None = None) -> MemoryUse:
        """With other depths of some stages where they are given."""
        depths = dict(enumerate(self.depths)) | dict(changed or {})
        return self.mixture.peak(self.order, rank, tuple((kind_of(s, len(depths)), depths[s]) for s in self.held(rank)))

    def least_bytes(self, rank: int) -> np.ndarray:
        """See `Mixture.least_bytes`."""
        return self.mixture.least_bytes(self.order, rank, self._blocks[rank])

    def high_bytes(self, rank: int, *, heavy: bool) -> np.ndarray:
        """See `Mixture.high_bytes`."""
        return self.mixture.high_bytes(self.order, rank, self._blocks[rank], heavy=heavy)

    def high_by_blocks(self, rank: int) -> np.ndarray:
        """See `Mixture.high_by_blocks`."""
        return self.mixture.high_by_blocks(self.order, rank, kind_of(rank, self.order.num_stages))

    def least_by_blocks(self, rank: int) -> np.ndarray:
        """See `Mixture.least_by_blocks`."""
        return self.mixture.least_by_blocks(self.order, rank, kind_of(rank, self.order.num_stages))

    def ways(self, rank: int) -> Hashable:
        """What the ways to mix the modes of a rank's blocks depend on."""
        return self.order, rank, self._blocks[rank]

    @cached_property
    def _blocks(self) -> tuple[Held, ...]:
        """By rank."""
        return _held_by_rank(self.order, tuple([depth.blocks for depth in self.depths]), self.late)

    def with_heavy(self, rank: int, number: int) -> dict[int, Depth]:
        """The stages of a rank with so many of its blocks in the heavier mode."""
        found = {}
        for s, (_, blocks) in self._blocks[rank]:
            found[s] = Depth(blocks, min(number, blocks))
            number -= found[s].heavy
        return found


def kind_of(stage: int, num_stages: int) -> int:
    return ALL if num_stages == 1 else FIRST if stage == 0 else LAST if stage == num_stages - 1 else MIDDLE


@lru_cache(maxsize=64)
def _held_by_rank(order: Order, blocks: tuple[int, ...], late: bool) -> tuple[Held, ...]:
    found = []
    for rank, flights in enumerate(order.in_flight_by_stage):
        stages = range(rank, len(blocks), order.num_ranks)
        flight = dict(zip(stages, flights, strict=True))
        first = sorted(stages, key=lambda s: (-flight[s], -s)) if late else stages
        found.append(tuple([(s, (kind_of(s, len(blocks)), blocks[s])) for s in first]))
    return tuple(found)


def even_depths(kinds: Kinds, num_stages: int, most: Sequence[int] = ()) -> tuple[Depth, ...]:
    """Blocks of every stage so that the slowest one is as fast as can be; of equals the first stages, which wait longest, have fewer. `most`: a stage has
    no more than so many, which together are enough."""
    first, block, last = (sum(kinds.seconds[kind][:3]) for kind in (FIRST, MIDDLE, LAST))
    beside = [0.0] * num_stages
    beside[0] += first - block
    beside[-1] += last - block
    depths = [1] * num_stages

    def with_one_more(s: int) -> tuple[float, int]:
        return round((depths[s] + 1) * block + beside[s], 12), -s

    free = [with_one_more(s) for s in range(num_stages) if not most or most[s] > 1]
    heapify(free)
    for _ in range(kinds.cut.run.depth - num_stages):
        s = -heappop(free)[1]
        depths[s] += 1
        if not most or depths[s] < most[s]:
            heappush(free, with_one_more(s))
    return tuple(map(Depth, depths))


def roomy_depths(sharding: Sharding, order: Order, even: Sequence[Depth], limit_bytes: float) -> tuple[Depth, ...] | None:
    """As even as fits where ranks have one stage each: none has more blocks than fit in the mode that holds least. None where the even ones do not
    want for room, or there is not enough for all blocks."""
    alone, depth = [Deep(kinds, kinds, order, tuple(even)) for kinds in sharding.modes], sharding.cut.run.depth
    most = [max([_largest(deep.least_by_blocks(rank) <= limit_bytes) for deep in alone]) for rank in range(order.num_ranks)]
    for rank in range(order.num_ranks):
        if sum(most) < depth or min(most) < 1:
            return None  # what is known without a walk of the modes is often enough
        most[rank] = _most_blocks(alone, rank, limit_bytes)
    if sum(most) < depth or min(most) < 1 or all(blocks.blocks <= number for blocks, number in zip(even, most)):
        return None
    return even_depths(sharding.light, len(even), most)


def _largest(fits: np.ndarray) -> int:
    """Number of blocks that fits, where `fits` says so of one and more."""
    return int(fits.nonzero()[0].max(initial=-1)) + 1


def _most_blocks(alone: Sequence[Deep], rank: int, limit_bytes: float) -> int:
    """How many fit on a rank of one stage in one of these, the last of which is likely to hold least."""
    low, depth = 0, alone[0].light.cut.run.depth
    for deep in reversed(alone):

        def fits(blocks: int, deep: Deep = deep) -> bool:
            return bool(deep.high_by_blocks(rank)[blocks - 1] <= limit_bytes)

        if low < depth and deep.least_by_blocks(rank)[low] <= limit_bytes and fits(low + 1):  # the bound is known without a walk of the mode
            low, high = low + 1, depth + 1
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def mixed(sharding: Sharding, order: Order, depths: Sequence[Depth], limit_bytes: float, below_s: float = math.inf) -> Deep | None:
    """The fastest mixture of modes that fits: for every pair of modes the fewest blocks in the heavier one, rank by rank.

    None where none fits, or none takes less than `below_s`.
    """
    best: Deep | None = None
    if Deep(sharding.light, sharding.light, order, tuple(depths)).least_s >= below_s:
        return None
    for a, light in enumerate(sharding.modes):
        if Deep(light, light, order, tuple(depths)).least_s >= below_s:
            break  # heavier modes take longer
        for heavy, late in product(sharding.modes[a + 1 :] or [light], (False, True) if order.virtual > 1 else (False,)):
            deep = Deep(light, heavy, order, tuple(depths), late)
            lightest = _lightest(deep, limit_bytes)
            if lightest is None or lightest.least_s >= below_s:
                continue
            made = _fitted(deep, limit_bytes)
            if made is not None and made.takes_less(below_s):
                best, below_s = made, made.step_s
            if made is not None and not any(d.heavy for d in made.depths):
                return best
    return best


def shifted(sharding: Sharding, deep: Deep, limit_bytes: float) -> Deep:
    """A plan whose ranks have one stage each, or a faster one that moves blocks one by one from stage to stage: they may differ in how long they wait for
    messages and sums, and in how much they have to compute again."""
    best, moved = deep, deep.order.virtual == 1
    while moved:
        moved = False
        for giver, taker in permutations(range(len(best.depths)), 2):
            blocks = [depth.blocks for depth in best.depths]
            blocks[giver], blocks[taker] = blocks[giver] - 1, blocks[taker] + 1
            made = mixed(sharding, deep.order, tuple(map(Depth, blocks)), limit_bytes, best.step_s) if blocks[giver] else None
            if made is not None:
                best, moved = made, True
    return best


def _lightest(deep: Deep, limit_bytes: float) -> Deep | None:
    """With no more blocks in the heavier mode than what is kept for the backward leaves no room for: nothing that fits takes less. None where nothing fits."""
    return _with_heavy(deep, lambda rank: deep.mixture.number(("least", deep.ways(rank)), limit_bytes, lambda: _least(deep, rank, limit_bytes)))


def _least(deep: Deep, rank: int, limit_bytes: float) -> int | None:
    fits = deep.least_bytes(rank) <= limit_bytes
    number = int(fits.argmax())
    return number if fits[number] and not (number and deep.heavy is deep.light) else None


def _fitted(deep: Deep, limit_bytes: float) -> Deep | None:
    """With as few blocks in the heavier mode as fit, on every rank."""
    return _with_heavy(deep, lambda rank: deep.mixture.number(("fewest", deep.ways(rank)), limit_bytes, lambda: _fewest(deep, rank, limit_bytes)))


def _fewest(deep: Deep, rank: int, limit_bytes: float) -> int | None:
    least = deep.least_bytes(rank)

    low, high = 0, len(least) - 1
    if least[low] <= limit_bytes and deep.high_bytes(rank, heavy=False)[low] <= limit_bytes:
        return low
    if deep.heavy is deep.light or least[high] > limit_bytes or deep.high_bytes(rank, heavy=True)[high] > limit_bytes:
        return None

    def fits(number: int) -> bool:
        return bool(least[number] <= limit_bytes) and all(deep.high_bytes(rank, heavy=heavy)[number] <= limit_bytes for heavy in (True, False))

    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _with_heavy(deep: Deep, number_of: Callable[[int], int | None]) -> Deep | None:
    """With so many blocks of every rank in the heavier mode; None where a rank has no number."""
    depths = list(deep.depths)
    for rank in range(deep.order.num_ranks):
        number = number_of(rank)
        if number is None:
            return None
        for s, depth in deep.with_heavy(rank, number).items():
            depths[s] = depth
    return replace(deep, depths=tuple(depths))
