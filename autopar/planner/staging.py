"""A program cut into the stages of a pipeline: their programs built, their step simulated, their memory walked."""

from dataclasses import dataclass
from functools import cached_property

from autopar.core.memory import MemoryUse
from autopar.core.pipeline import Pipeline
from autopar.core.timeline import Timeline
from autopar.cost_models.pipeline import EdgeCost, StageCost
from autopar.planner.blocks import Blocks, Order, timed
from autopar.planner.cuts import Cut
from autopar.planner.held import Beside, state_of
from autopar.planner.liveness import Engine, kept_by_segment, memory_use
from autopar.planner.states import Pricing
from autopar.planner.work import put_off_bytes, total_seconds
from autopar.program import Program
from autopar.stages import Stage, Stages, cut_into_stages


@dataclass(frozen=True)
class Staged:
    """What a plan predicts of a pipeline comes from here: the programs that its ranks run, not the table that chose the cut."""

    stages: Stages
    order: Order
    pricing: Pricing
    engine: Engine

    @classmethod
    def of(cls, blocks: Blocks, cut: Cut, order: Order, engine: Engine) -> "Staged":
        """Raises UsageError where a cut cannot be made."""
        graph = blocks.program.graph
        names = tuple(graph.ops[blocks.starts[b]].name for b in cut.cuts)
        pipeline = Pipeline(order.num_ranks, names, order.schedule, blocks.pricing.pp[1])
        return cls(cut_into_stages(blocks.program, pipeline), order, blocks.pricing, engine)

    @cached_property
    def costs(self) -> tuple[StageCost, ...]:
        return tuple(self._cost(stage.program) for stage in self.stages.stages)

    def _cost(self, program: Program) -> StageCost:
        forward, inputs, weights, gather, reduce = total_seconds(program, self.pricing).tolist()
        return StageCost(
            forward_s=forward, input_gradient_s=inputs, weight_gradient_s=weights, gather_s=gather, reduce_s=reduce,
            activation_bytes=sum(kept_by_segment(program)), weight_activation_bytes=put_off_bytes(program, range(len(program.graph.ops))),
        )  # fmt: skip

    @cached_property
    def timeline(self) -> Timeline:
        stages, price = self.stages, self.pricing.message
        sizes = [(stages.message_bytes(e.source, e.target), stages.message_bytes(e.source, e.target, back=True)) for e in stages.edges]
        messages = tuple(EdgeCost(activation_s=price(there), gradient_s=price(back), activation_bytes=there, gradient_bytes=back) for there, back in sizes)
        return timed(self.order, self.costs, stages.edges, messages, stages.tied, tuple(map(self._tie_s, stages.tied)))

    def _tie_s(self, group: tuple[int, ...]) -> float:
        stages = self.stages
        inside = [v for v, members in stages.shared.items() if set(members) <= set(group) and v in stages.whole.graph.differentiated]
        by_value = [(stages.ranks_of(stages.shared[v]), stages.tied_bytes(v)) for v in inside]
        return sum(self.pricing.tie(ranks, size) for ranks, size in by_value if len(ranks) > 1)

    @cached_property
    def memory(self) -> tuple[MemoryUse, ...]:
        """Of each rank at its fullest."""
        return tuple(self._rank_memory(rank) for rank in range(self.order.num_ranks))

    def _rank_memory(self, rank: int) -> MemoryUse:
        """One stage computes while microbatches in flight and the rank's other stages are held at their most."""
        here = [stage for stage in self.stages.stages if self.stages.placement[stage.number] == rank]
        return max((self._memory_beside(stage, here, rank) for stage in here), key=lambda m: m.high_bytes)

    def _memory_beside(self, stage: Stage, here: list[Stage], rank: int) -> MemoryUse:
        others = [state_of(other.program) for other in here if other is not stage]
        in_flight = self.timeline.peak_bytes(rank) - self.costs[stage.number].activation_bytes
        beside = Beside(
            parameters=sum(o.parameters for o in others), gradients=sum(o.gradients for o in others), optimizer=sum(o.optimizer for o in others),
            activations=max(0, in_flight),
        )  # fmt: skip
        return memory_use(stage.program, self.engine, beside)

    @property
    def worst_memory(self) -> MemoryUse:
        return max(self.memory, key=lambda m: m.high_bytes)

    @property
    def communicated_bytes(self) -> int:
        """Of the rank that receives most."""
        return max(self.stages.ledger(rank).total_bytes for rank in range(self.order.num_ranks))
