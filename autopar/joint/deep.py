"""A sharding of a deep model cut into stages: seconds and bytes of a step from three blocks, the middle one counted as often as there are such.

The program of the short graph is cut into three stages of one block each: with all that comes before the run, in the middle, with all that
comes after. A stage of n blocks costs what the stage of its kind does and n - 1 times the middle one; so it is with bytes. Blocks may be computed again
or not, each for itself: `Kinds` are made for every mode, and a stage mixes two of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np

from autopar.core.memory import MemoryUse
from autopar.core.pipeline import RECEIVES_AHEAD, SENDS_BEHIND, Pipeline
from autopar.core.schedule import Edge, Kind
from autopar.cost_models.pipeline import EdgeCost, StageCost
from autopar.joint.fold import SHOWN, Run
from autopar.planner.blocks import Order, timed
from autopar.planner.held import Beside, state_of
from autopar.planner.liveness import Engine, fullest, kept_by_segment, moments
from autopar.planner.states import Pricing
from autopar.planner.work import put_off_bytes, total_seconds
from autopar.program import Program
from autopar.schedules.orders import make_order
from autopar.stages import Stages, cut_into_stages

FIRST, MIDDLE, LAST, ALL = range(4)
"""Kinds of stages of one block, and that of all three, which stands for a model that is one stage."""

SHOWN_BY = (1, 1, 1, SHOWN)
"""Blocks of the run in a stage of each kind."""

STATE = ("parameters", "gradients", "optimizer", "temporaries")
"""What a rank holds of blocks that do not compute; temporaries are those of the optimizer."""

STEADY_ROUNDS = 3
"""After so many rounds of microbatches, each as many as a pipeline has ranks, every further round takes as long as the last."""


@dataclass(frozen=True, eq=False)
class Kinds:
    """The three stages of one block each, and the one of all three, of a program whose blocks are computed again in one mode. Figures are by kind."""

    program: Program
    pricing: Pricing
    run: Run
    engine: Engine

    @cached_property
    def stages(self) -> Stages:
        graph = self.program.graph
        first_op = {segment.block: graph.ops[segment.ops.start].name for segment in graph.segments}
        return cut_into_stages(self.program, Pipeline(3, tuple(first_op[block] for block in self.run.blocks[1:])))

    @cached_property
    def programs(self) -> tuple[Program, ...]:
        return (*(stage.program for stage in self.stages.stages), self.program)

    @cached_property
    def seconds(self) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(total_seconds(program, self.pricing).tolist()) for program in self.programs)

    @cached_property
    def kept_bytes(self) -> tuple[int, ...]:
        """Of one microbatch, from forward to backward."""
        return tuple(sum(kept_by_segment(program)) for program in self.programs)

    @cached_property
    def kept_inside(self) -> int:
        """The same of a block that takes from one and hands to one of its own stage."""
        block = [n for n, segment in enumerate(self.program.graph.segments) if segment.block == self.run.blocks[MIDDLE]]
        kept = kept_by_segment(self.program)
        return sum(kept[n] for n in block)

    @cached_property
    def put_off_bytes(self) -> tuple[int, ...]:
        return tuple(put_off_bytes(program, range(len(program.graph.ops))) for program in self.programs)

    @cached_property
    def states(self) -> tuple[Beside, ...]:
        return tuple(map(state_of, self.programs))

    @cached_property
    def message(self) -> EdgeCost:
        there, back = self.stages.message_bytes(FIRST, MIDDLE), self.stages.message_bytes(FIRST, MIDDLE, back=True)
        price = self.pricing.message
        return EdgeCost(activation_s=price(there), gradient_s=price(back), activation_bytes=there, gradient_bytes=back)

    def peak(self, kind: int, beside: Beside) -> MemoryUse:
        """The fullest moment of a stage of this kind. What lies beside it is there at every moment, so the moment is the same for all."""
        if kind not in self._alone:
            self._alone[kind] = moments(self.programs[kind], self.engine)
        return fullest(self._alone[kind], beside)

    @cached_property
    def _alone(self) -> dict[int, tuple[MemoryUse, ...]]:
        return {}


@dataclass(frozen=True)
class Sharding:
    """One sharding under each mode of recomputation that may be mixed."""

    modes: tuple[tuple[str, Kinds], ...]

    @classmethod
    def of(cls, program: Program, pricing: Pricing, run: Run, engine: Engine, modes: Sequence[str]) -> "Sharding":
        made = []
        for mode in modes:
            again = {block: mode for block in run.blocks if mode != "none"}
            others = {block: m for block, m in program.residency.recompute.items() if block not in run.blocks}
            made.append((mode, Kinds(replace(program, residency=replace(program.residency, recompute={**others, **again})), pricing, run, engine)))
        return cls(tuple(made))


@dataclass(frozen=True)
class Depth:
    """Blocks of a stage, of which `heavy` are computed again in the second mode of a `Deep`."""

    blocks: int
    heavy: int = 0


@dataclass(frozen=True, eq=False)
class Deep:
    """Stages of these depths, run in this order. `light`, `heavy`: kinds of the two modes that are mixed."""

    light: Kinds
    heavy: Kinds
    order: Order
    depths: tuple[Depth, ...]

    @cached_property
    def costs(self) -> tuple[StageCost, ...]:
        return tuple(self._cost(s) for s in range(len(self.depths)))

    def _kind(self, stage: int) -> int:
        last = len(self.depths) - 1
        return ALL if last == 0 else FIRST if stage == 0 else LAST if stage == last else MIDDLE

    def _sum(self, stage: int, light: Sequence[float], heavy: Sequence[float]) -> float:
        """Of a stage, from the figures of the kinds under both modes."""
        depth, kind = self.depths[stage], self._kind(stage)
        own = heavy if depth.heavy == depth.blocks else light
        return (depth.blocks - depth.heavy) * light[MIDDLE] + depth.heavy * heavy[MIDDLE] + own[kind] - SHOWN_BY[kind] * own[MIDDLE]

    def _cost(self, stage: int) -> StageCost:
        both = zip(zip(*self.light.seconds), zip(*self.heavy.seconds))
        forward, inputs, weights, gather, reduce, update = (max(0.0, self._sum(stage, a, b)) for a, b in both)
        return StageCost(
            forward_s=forward, input_gradient_s=inputs, weight_gradient_s=weights, gather_s=gather, reduce_s=reduce, step_s=update,
            activation_bytes=self._kept(stage),
            weight_activation_bytes=round(self._sum(stage, self.light.put_off_bytes, self.heavy.put_off_bytes)),
        )  # fmt: skip

    def _kept(self, stage: int) -> int:
        """Between forward and backward of a microbatch. What one block hands to another is kept by the one that makes it."""
        depth = self.depths[stage]
        every = depth.heavy == depth.blocks
        own, light, heavy = self.heavy if every else self.light, self.light.kept_inside, self.heavy.kept_inside
        kind = self._kind(stage)
        shown = SHOWN_BY[kind]
        inside = (depth.blocks - shown) * heavy if every else depth.heavy * heavy + (depth.blocks - depth.heavy - shown) * light
        return own.kept_bytes[kind] + inside

    @cached_property
    def least_s(self) -> float:
        """No order takes less: every rank does its work behind the first stages of the ranks before it, there and back."""
        once = [c.gather_s + c.reduce_s + c.step_s for c in self.costs]
        work = [c.forward_s + c.input_gradient_s + c.weight_gradient_s for c in self.costs]
        ways = accumulate(work, initial=0.0)
        ranks = range(self.order.num_ranks)
        return max(way + sum(self.order.num_microbatches * work[s] + once[s] for s in self.held(rank)) for rank, way in zip(ranks, ways))

    @cached_property
    def step_s(self) -> float:
        """Of a step; long ones from the rounds of a short one."""
        order, ranks = self.order, self.order.num_ranks
        few, number = STEADY_ROUNDS * ranks, order.num_microbatches
        if number <= few + ranks:
            return self._timed(number)
        base = self._timed(few)
        return base + (number - few) * (self._timed(few + ranks) - base) / ranks

    def _timed(self, num_microbatches: int) -> float:
        n, message, stages = len(self.depths), self.light.message, self.light.stages
        order = replace(self.order, num_microbatches=num_microbatches)
        edges = tuple(Edge(s, s + 1) for s in range(n - 1))
        trained = self.light.program.graph.differentiated
        shared = [v for v in stages.shared if v in trained] if self.order.num_ranks > 1 else []
        tied, tie_s = (((0, n - 1),), (sum(self.light.pricing.tie((0, order.num_ranks - 1), stages.tied_bytes(v)) for v in shared),)) if shared else ((), ())
        return timed(order, self.light.pricing.cluster, self.costs, edges, (message,) * (n - 1), tied, tie_s).step_time_s

    # --- memory ----------------------------------------------------------------------------------------------------------

    def held(self, rank: int) -> list[int]:
        return list(range(rank, len(self.depths), self.order.num_ranks))

    @cached_property
    def memory(self) -> MemoryUse:
        """Of the fullest rank."""
        return max((self.rank_memory(rank) for rank in range(self.order.num_ranks)), key=lambda m: m.high_bytes)

    @lru_cache(maxsize=256)
    def rank_memory(self, rank: int) -> MemoryUse:
        """What shows of it computes; the rank's other blocks, and the microbatches that are on their way, lie beside it."""
        held, order = self.held(rank), self.order
        kind = max((self._kind(s) for s in held), key=(MIDDLE, FIRST, LAST, ALL).index)
        kinds = self.heavy if all(self.depths[s].heavy == self.depths[s].blocks for s in held) else self.light
        counts = held_counts(order.schedule, order.num_ranks, min(order.num_microbatches, 2 * order.num_ranks), order.virtual)[rank]
        kept = int((counts @ np.array([self.costs[s].activation_bytes for s in held])).max())
        blocks = max(0, sum(self.depths[s].blocks for s in held) - SHOWN_BY[kind])
        parts = {part: blocks * getattr(kinds.states[MIDDLE], part) for part in STATE}
        if kinds.engine.one_by_one:
            parts["temporaries"] = 0
        message = max(kinds.message.activation_bytes, kinds.message.gradient_bytes) if self.order.num_ranks > 1 else 0
        beside = Beside(
            **parts, activations=max(0, kept - kinds.kept_bytes[kind]),
            communication=RECEIVES_AHEAD * message, unsettled=SENDS_BEHIND * len(held) * message,
        )  # fmt: skip
        return kinds.peak(kind, beside)


@lru_cache(maxsize=1024)
def held_counts(schedule: str, num_ranks: int, num_microbatches: int, virtual: int) -> tuple[np.ndarray, ...]:
    """Per rank: how many microbatches it holds of each of its stages, after every action that adds one: [times, stages]."""
    usable = -(-num_microbatches // num_ranks) * num_ranks if virtual > 1 else num_microbatches
    found = []
    for actions in make_order(schedule, num_ranks, usable, virtual).ranks:
        held, rows = [0] * virtual, set()
        for action in actions:
            held[action.stage // num_ranks] += {Kind.F: 1, Kind.B: -1}.get(action.kind, 0)
            rows.add(tuple(min(n, num_microbatches) for n in held))
        found.append(np.array(sorted(rows)))
    return tuple(found)


def in_flight(order: Order) -> list[float]:
    """Microbatches of all of a rank's stages that it holds at once, by rank."""
    counts = held_counts(order.schedule, order.num_ranks, min(order.num_microbatches, 2 * order.num_ranks), order.virtual)
    return [float(of_rank.sum(axis=1).max()) / order.virtual for of_rank in counts]


def even_depths(kinds: Kinds, num_stages: int) -> tuple[Depth, ...]:
    """Blocks of every stage so that the slowest one is as fast as can be; of equals the first stages, which wait longest, have fewer."""
    first, block, last = (sum(kinds.seconds[kind][:3]) for kind in (FIRST, MIDDLE, LAST))
    beside = [0.0] * num_stages
    beside[0] += first - block
    beside[-1] += last - block
    depths = [1] * num_stages
    for _ in range(kinds.run.depth - num_stages):
        s = min(range(num_stages), key=lambda s: (round((depths[s] + 1) * block + beside[s], 12), -s))
        depths[s] += 1
    return tuple(map(Depth, depths))


def mixed(sharding: Sharding, order: Order, depths: Sequence[Depth], limit_bytes: float, below_s: float = math.inf) -> Deep | None:
    """The fastest mixture of modes that fits: for every pair of modes the fewest blocks in the heavier one, rank by rank.

    None where none fits, or none takes less than `below_s`.
    """
    best: Deep | None = None
    modes = [kinds for _, kinds in sharding.modes]
    for a, light in enumerate(modes):
        if Deep(light, light, order, tuple(depths)).least_s >= below_s:
            break  # heavier modes take longer
        for heavy in modes[a + 1 :] or [light]:
            made = _fitted(Deep(light, heavy, order, tuple(depths)), limit_bytes)
            if made is not None and made.least_s < below_s and made.step_s < below_s:
                best, below_s = made, made.step_s
            if made is not None and not any(d.heavy for d in made.depths):
                return best
    return best


def _fitted(deep: Deep, limit_bytes: float) -> Deep | None:
    """With as few blocks in the heavier mode as fit, on every rank."""
    depths = list(deep.depths)
    for rank in range(deep.order.num_ranks):
        if deep.rank_memory(rank).high_bytes <= limit_bytes:
            continue
        held = deep.held(rank)

        def with_heavy(number: int, held: list[int] = held) -> dict[int, Depth]:
            left, found = number, {}
            for s in held:
                found[s] = Depth(depths[s].blocks, min(left, depths[s].blocks))
                left -= found[s].heavy
            return found

        def peak(number: int, rank: int = rank) -> float:
            changed = with_heavy(number)
            return replace(deep, depths=tuple(changed.get(s, d) for s, d in enumerate(depths))).rank_memory(rank).high_bytes

        low, high = 0, sum(depths[s].blocks for s in held)
        if deep.heavy is deep.light or peak(high) > limit_bytes:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if peak(middle) <= limit_bytes else (middle, high)
        for s, d in with_heavy(high).items():
            depths[s] = d
    return replace(deep, depths=tuple(depths))
