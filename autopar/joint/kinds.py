"""What one sharding of a deep model costs by kind of stage: seconds and bytes of three blocks, from which those of any stage follow.

The program of the short graph is cut into three stages of one block each: with all that comes before the run, in the middle, with all that
comes after. A stage of n blocks costs what the stage of its kind does and n - 1 times the middle one; so it is with bytes. Blocks may be computed again
or not, each for itself: `Kinds` are made for every mode, and a `Mixture` has some blocks in one and some in another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from autopar.core.memory import MemoryUse
from autopar.core.pipeline import RECEIVES_AHEAD, SENDS_BEHIND, Pipeline
from autopar.core.unroll import Run
from autopar.cost_models.pipeline import EdgeCost, StageCost
from autopar.joint.fold import SHOWN, shown
from autopar.planner.blocks import Order
from autopar.planner.held import Beside, state_of
from autopar.planner.liveness import Engine, fullest, kept_by_segment, moments
from autopar.planner.states import Pricing
from autopar.planner.work import put_off_bytes, total_seconds
from autopar.program import Program
from autopar.schedules.held import held_counts
from autopar.stages import Stages, cut_into_stages

FIRST, MIDDLE, LAST, ALL = range(4)
"""Kinds of stages of one block, and that of all three, which stands for a model that is one stage."""

SHOWN_BY = (1, 1, 1, SHOWN)
"""Blocks of the run in a stage of each kind."""

STATE = ("parameters", "gradients", "optimizer", "temporaries")
"""What a rank holds of blocks that do not compute; temporaries are those of the optimizer."""

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
        return cut_into_stages(self.program, Pipeline(3, tuple(first_op[block] for block in shown(self.run)[1:])))

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
        block = [n for n, segment in enumerate(self.program.graph.segments) if segment.block == shown(self.run)[MIDDLE]]
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

    def with_heavy(self, heavy: "Kinds") -> "Mixture":
        """This mode for some blocks of a stage, `heavy` for others."""
        return self._mixtures.setdefault(heavy, Mixture(self, heavy))

    @cached_property
    def _mixtures(self) -> dict["Kinds", "Mixture"]:
        return {}


@dataclass(frozen=True)
class Depth:
    """Blocks of a stage, of which `heavy` are computed again in the second mode of a `Mixture`."""

    blocks: int
    heavy: int = 0


@dataclass(frozen=True, eq=False)
class Mixture:
    """Figures of stages whose blocks are computed again in one of two modes. A cache too: stages are priced once."""

    light: Kinds
    heavy: Kinds
    _costs: dict[tuple[int, Depth], StageCost] = field(default_factory=dict)
    _peaks: dict[tuple, MemoryUse] = field(default_factory=dict)

    def _sum(self, kind: int, depth: Depth, light: Sequence[float], heavy: Sequence[float]) -> float:
        """Of a stage, from the figures of the kinds under both modes."""
        own = heavy if depth.heavy == depth.blocks else light
        return (depth.blocks - depth.heavy) * light[MIDDLE] + depth.heavy * heavy[MIDDLE] + own[kind] - SHOWN_BY[kind] * own[MIDDLE]

    def cost(self, kind: int, depth: Depth) -> StageCost:
        if (kind, depth) not in self._costs:
            both = zip(zip(*self.light.seconds), zip(*self.heavy.seconds))
            forward, inputs, weights, gather, reduce, update = (max(0.0, self._sum(kind, depth, a, b)) for a, b in both)
            self._costs[kind, depth] = StageCost(
                forward_s=forward, input_gradient_s=inputs, weight_gradient_s=weights, gather_s=gather, reduce_s=reduce, step_s=update,
                activation_bytes=self._kept(kind, depth),
                weight_activation_bytes=round(self._sum(kind, depth, self.light.put_off_bytes, self.heavy.put_off_bytes)),
            )  # fmt: skip
        return self._costs[kind, depth]

    def _kept(self, kind: int, depth: Depth) -> int:
        """Between forward and backward of a microbatch. What one block hands to another is kept by the one that makes it."""
        every, counted = depth.heavy == depth.blocks, SHOWN_BY[kind]
        own, light, heavy = self.heavy if every else self.light, self.light.kept_inside, self.heavy.kept_inside
        inside = (depth.blocks - counted) * heavy if every else depth.heavy * heavy + (depth.blocks - depth.heavy - counted) * light
        return own.kept_bytes[kind] + inside

    def peak(self, order: Order, rank: int, held: tuple[tuple[int, Depth], ...]) -> MemoryUse:
        """Of a rank that holds stages of these kinds and depths: what shows of it computes; its other blocks, and the microbatches that are on their
        way, lie beside it."""
        key = order.schedule, order.num_ranks, order.num_microbatches, rank, held
        if key not in self._peaks:
            self._peaks[key] = self._peak(order, rank, held)
        return self._peaks[key]

    def _peak(self, order: Order, rank: int, held: tuple[tuple[int, Depth], ...]) -> MemoryUse:
        states = self.light.states
        counts = np.array(held_counts(order.schedule, order.num_ranks, order.num_microbatches, order.virtual)[rank])
        kept = int((counts @ np.array([self.cost(*stage).activation_bytes for stage in held])).max())
        whole = {part: sum(getattr(states[k], part) + (depth.blocks - SHOWN_BY[k]) * getattr(states[MIDDLE], part) for k, depth in held) for part in STATE}
        light = {k for k, depth in held if depth.heavy < depth.blocks}
        heavy = {k for k, depth in held if depth.heavy}
        message = max(self.light.message.activation_bytes, self.light.message.gradient_bytes) if order.num_ranks > 1 else 0
        queued = Beside(communication=RECEIVES_AHEAD * message, unsettled=SENDS_BEHIND * len(held) * message)
        computing = [(self.light, k) for k in sorted(light)] + [(self.heavy, k) for k in sorted(heavy)]
        return max((self._computing(kinds, k, whole, kept, queued) for kinds, k in computing), key=lambda peak: peak.high_bytes)

    @staticmethod
    def _computing(kinds: Kinds, kind: int, whole: Mapping[str, int], kept: int, queued: Beside) -> MemoryUse:
        """While a stage of this kind computes in one of the modes: what it has of the `whole` state and of the `kept` bytes is its own, the rest lies beside it."""
        parts = {part: max(0, total - getattr(kinds.states[kind], part)) for part, total in whole.items()}
        if kinds.engine.one_by_one:
            parts["temporaries"] = 0
        return kinds.peak(kind, replace(queued, **parts, activations=max(0, kept - kinds.kept_bytes[kind])))
