"""A program cut into the stages of a pipeline: their programs built, their step simulated, their memory walked."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

from autopar.core.graph import block_of
from autopar.core.memory import MemoryUse
from autopar.core.mixed import Machines
from autopar.core.pipeline import RECEIVES_AHEAD, SENDS_BEHIND, Pipeline, StagePrediction
from autopar.core.plan import Prediction
from autopar.cost_models.outline import Outline
from autopar.cost_models.pipeline import StageCost
from autopar.planner.blocks import Blocks, Order, edge_costs, timed
from autopar.planner.cuts import Cut
from autopar.planner.held import Beside, state_of
from autopar.planner.keeping import recomputed_flops
from autopar.planner.liveness import Engine, Liveness, fullest
from autopar.planner.meshes import flops_share
from autopar.planner.states import Pricing
from autopar.planner.work import Pieces, put_off_bytes
from autopar.program import Program
from autopar.stages import Stage, Stages, cut_into_stages


@dataclass(frozen=True, eq=False)
class Walked:
    """What is found of a stage, and so of all that are the same but for names. `plain`: the same stage under other modes of recomputation. A cache, not a value."""

    program: Program
    plain: "Walked | None" = None
    _in_modes: dict[tuple[str, ...], "Walked"] = field(default_factory=dict)
    _costs: dict[int, tuple[Pricing, StageCost]] = field(default_factory=dict)
    _moments: dict[Engine, tuple[MemoryUse, ...]] = field(default_factory=dict)
    _pieces: dict[int, tuple[Pricing, Pieces]] = field(default_factory=dict)

    @cached_property
    def walk(self) -> Liveness:
        return Liveness.of(self.program) if self.plain is None else replace(self.plain.walk, program=self.program)

    @cached_property
    def state(self) -> Beside:
        return state_of(self.program) if self.plain is None else self.plain.state

    @cached_property
    def put_off_bytes(self) -> int:
        return put_off_bytes(self.program, range(len(self.program.graph.ops))) if self.plain is None else self.plain.put_off_bytes

    def in_modes(self, modes: tuple[str, ...]) -> "Walked":
        """By segment."""
        if modes not in self._in_modes:
            by_block = {segment.block: mode for segment, mode in zip(self.program.graph.segments, modes, strict=True) if mode != "none"}
            self._in_modes[modes] = Walked(self.program.in_modes(by_block), self)
        return self._in_modes[modes]

    def pieces(self, pricing: Pricing) -> Pieces:
        if id(pricing) not in self._pieces:
            made = Pieces(self.program, pricing) if self.plain is None else self.plain.pieces(pricing).in_modes(self.program)
            self._pieces[id(pricing)] = pricing, made
        return self._pieces[id(pricing)][1]

    def cost(self, pricing: Pricing) -> StageCost:
        if id(pricing) not in self._costs:
            self._costs[id(pricing)] = pricing, self._cost(pricing)
        return self._costs[id(pricing)][1]

    def _cost(self, pricing: Pricing) -> StageCost:
        forward, inputs, weights, gather, reduce, update = self.pieces(pricing).total_seconds().tolist()
        return StageCost(
            forward_s=forward, input_gradient_s=inputs, weight_gradient_s=weights, gather_s=gather, reduce_s=reduce, step_s=update,
            activation_bytes=sum(self.walk.kept_by_segment()), weight_activation_bytes=self.put_off_bytes,
            arriving_bytes=self.walk.holdings.arriving_bytes,
        )  # fmt: skip

    def moments(self, engine: Engine) -> tuple[MemoryUse, ...]:
        """Of the stage by itself."""
        if engine not in self._moments:
            self._moments[engine] = self.walk.moments(engine)
        return self._moments[engine]


@dataclass(frozen=True)
class Staged:
    """What a plan predicts of a pipeline comes from here: the programs that its ranks run, not the table that chose the cut. `known`: stages by their form, of other
    cuts of the same program too. `plain`: the same plan under other modes of recomputation."""

    stages: Stages
    order: Order
    pricing: Pricing
    engine: Engine
    known: dict[Hashable, Walked] = field(default_factory=dict)
    plain: "Staged | None" = None

    def in_modes(self, recompute: Mapping[str, str]) -> "Staged":
        """Under other modes of recomputation: what these do not change is found once."""
        return replace(self, stages=self.stages.in_modes(recompute), plain=self)

    @classmethod
    def of(cls, blocks: Blocks, cut: Cut, order: Order, engine: Engine) -> "Staged":
        """Raises UsageError where a cut cannot be made."""
        graph = blocks.program.graph
        names = tuple(graph.ops[blocks.starts[b]].name for b in cut.cuts)
        pipeline = Pipeline(order.num_ranks, names, order.schedule, blocks.pricing.pp[1], blocks.pricing.places)
        return cls(cut_into_stages(blocks.program, pipeline), order, blocks.pricing, engine)

    @cached_property
    def costs(self) -> tuple[StageCost, ...]:
        return tuple(walked.cost(self.pricing.on(rank)) for walked, rank in zip(self._walked, self.stages.placement, strict=True))

    @cached_property
    def _walked(self) -> tuple[Walked, ...]:
        if self.plain is not None:
            return tuple(walked.in_modes(stage.modes) for walked, stage in zip(self.plain._walked, self.stages.stages, strict=True))
        known = self.known if len(self.stages.stages) > 1 else {}
        found = {form: known.setdefault(form, Walked(program)) for form, program in zip(self.stages.forms, self.stages.alike, strict=True)}
        return tuple(found[form] for form in self.stages.forms)

    @cached_property
    def _lasting(self) -> tuple[Mapping[Hashable, int], ...]:
        """What every stage computes once a step and keeps: bytes by what stages of a rank may share."""
        if self.plain is not None:
            return self.plain._lasting
        return tuple(self._lasting_of(stage, walked.walk) for stage, walked in zip(self.stages.stages, self._walked, strict=True))

    def _lasting_of(self, stage: Stage, walk: Liveness) -> dict[Hashable, int]:
        named, alone = dict(zip(walk.program.standing(), stage.program.standing(), strict=True)), stage.number if stage.program.communicates_once else None
        return {(frozenset(map(named.__getitem__, there)), alone): size for there, size in walk.steps.lasting.items()}

    @cached_property
    def _moments(self) -> tuple[tuple[MemoryUse, ...], ...]:
        """Of every stage by itself."""
        return tuple(
            tuple(_named(moment, dict(zip(walked.program.blocks, stage.program.blocks, strict=True))) for moment in walked.moments(self.engine))
            for walked, stage in zip(self._walked, self.stages.stages, strict=True)
        )

    @cached_property
    def timeline(self) -> Outline:
        stages, rank = self.stages, self.stages.placement
        sizes = [(stages.message_bytes(e.source, e.target), stages.message_bytes(e.source, e.target, back=True)) for e in stages.edges]
        messages = edge_costs(self.pricing, [(rank[e.source], rank[e.target]) for e in stages.edges], sizes)
        return timed(self.order, self.pricing.cluster, self.costs, stages.edges, messages, stages.tied, self.ties_s)

    @cached_property
    def ties_s(self) -> tuple[float, ...]:
        """Of the sums of gradients over each group of stages that share weights."""
        return tuple(map(self._tie_s, self.stages.tied))

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
        return max((memory for memory, where in zip(self._memory_of, self.stages.placement) if where == rank), key=lambda m: m.high_bytes)

    @cached_property
    def _memory_of(self) -> tuple[MemoryUse, ...]:
        """While each of the stages computes."""
        return tuple(self._memory_beside(stage.number) for stage in self.stages.stages)

    def _memory_beside(self, number: int) -> MemoryUse:
        """One stage computes while microbatches in flight and the rank's other stages are held at their most."""
        rank = self.stages.placement[number]
        here = [stage.number for stage in self.stages.stages if self.stages.placement[stage.number] == rank]
        others = [self._walked[other].state for other in here if other != number]
        lasting = {same: size for other in here for same, size in self._lasting[other].items() if same not in self._lasting[number]}
        message = self._largest_message(set(here))
        in_flight = self.timeline.peak_bytes(rank) - self.costs[number].activation_bytes
        beside = Beside(
            parameters=sum(o.parameters for o in others) + sum(lasting.values()), gradients=sum(o.gradients for o in others), optimizer=sum(o.optimizer for o in others),
            activations=max(0, in_flight), communication=RECEIVES_AHEAD * message, unsettled=SENDS_BEHIND * len(here) * message,
            temporaries=0 if self.engine.one_by_one else sum(o.temporaries for o in others), delivered=sum(o.delivered for o in others),
        )  # fmt: skip
        return fullest(self._moments[number], beside)

    def _largest_message(self, here: set[int]) -> int:
        """Bytes of the largest message that stages of one rank receive or send."""
        stages, placement = self.stages, self.stages.placement
        away = [e for e in stages.edges if placement[e.source] != placement[e.target] and not here.isdisjoint((e.source, e.target))]
        return max((stages.message_bytes(e.source, e.target, back=back) for e in away for back in (False, True)), default=0)

    @property
    def worst_memory(self) -> MemoryUse:
        """Of the rank with the least room."""
        return max(enumerate(self.memory), key=lambda item: item[1].high_bytes - self.pricing.spare_bytes(item[0]))[1]

    @property
    def pressing_bytes(self) -> float:
        """What that rank holds beyond what its devices have more than those with the least memory."""
        return max(memory.high_bytes - self.pricing.spare_bytes(rank) for rank, memory in enumerate(self.memory))

    @property
    def communicated_bytes(self) -> int:
        """Of the rank that receives most."""
        return max(self.stages.ledger(rank, self._programs).total_bytes for rank in range(self.order.num_ranks))

    @cached_property
    def _programs(self) -> tuple[Program, ...]:
        """Of the stages, or the same but for names, of which more is known."""
        return tuple(walked.program for walked in self._walked)

    def sum_of(self, rank: int, cost: Callable[[Program], float]) -> float:
        """Of the stages of a rank."""
        programs = [program for program, where in zip(self._programs, self.stages.placement, strict=True) if where == rank]
        costs = {id(program): cost(program) for program in {id(program): program for program in programs}.values()}
        return sum(costs[id(program)] for program in programs)

    def compute_s(self, rank: int) -> float:
        """Of the operators of a rank's stages, for one microbatch."""
        walks = [walked for walked, where in zip(self._walked, self.stages.placement, strict=True) if where == rank]
        costs = {id(walked): walked.pieces(self.pricing.on(rank)).compute_seconds() for walked in {id(walked): walked for walked in walks}.values()}
        return sum(costs[id(walked)] for walked in walks)

    def stage_prediction(self, stage: Stage) -> StagePrediction:
        rank, cost, graph = self.stages.placement[stage.number], self.costs[stage.number], self.stages.alike[stage.number].graph
        first, last = self._ends(stage.number)
        return StagePrediction(
            rank=rank,
            first=first,
            last=last,
            num_params=sum(graph.values[v].meta.numel for v in graph.params),
            forward_s=cost.forward_s,
            backward_s=cost.input_gradient_s + cost.weight_gradient_s,
            in_flight=self.timeline.in_flight[stage.number],
            peak_memory_bytes=self._memory_of[stage.number].high_bytes,
            sent_bytes=self._sent_bytes(stage.number),
        )

    def _ends(self, stage: int) -> tuple[str, str]:
        """The first and the last block or module of a stage."""
        ops = self.stages.whole.graph.ops
        start, end = list(pairwise((*self.stages.starts, len(ops))))[0 if self.stages.pipeline.shares else stage]  # copies are whole
        there = (next((op.module_path for op in run if op.module_path), "") for run in (ops[start:end], reversed(ops[start:end])))
        first, last = (block_of(path) or path for path in there)
        return first, last

    def _sent_bytes(self, stage: int) -> int:
        stages, placement = self.stages, self.stages.placement
        times = stages.whole.residency.micro_batches
        away = [e for e in stages.edges if placement[e.source] != placement[e.target]]
        there = sum(stages.message_bytes(e.source, e.target) for e in away if e.source == stage)
        return times * (there + sum(stages.message_bytes(e.source, e.target, back=True) for e in away if e.target == stage))


def _named(moment: MemoryUse, blocks: Mapping[str, str]) -> MemoryUse:
    """With the block's name in another stage."""
    what, of, where = moment.moment.partition(" of ")
    return replace(moment, moment=f"{what}{of}{blocks.get(where, where)}")


def pipeline_prediction(cluster: Machines, staged: Staged, tokens: int) -> Prediction:
    """The figures of the rank that computes longest, of the fullest, and of the one that receives most."""
    timeline, stages = staged.timeline, staged.stages
    step = timeline.step_time_s
    busiest = max(range(timeline.num_ranks), key=timeline.busy_s)
    here = [stage for stage, rank in enumerate(stages.placement) if rank == busiest]
    compute = staged.order.microbatches_of(busiest) * staged.compute_s(busiest)
    once = sum(staged.costs[stage].gather_s + staged.costs[stage].reduce_s for stage in here)
    once += sum(staged.ties_s) if staged.order.shares else 0.0  # nothing of a step of copies hides their sum
    return Prediction(
        step_time_s=step,
        compute_s=compute,
        communication_s=max(0.0, timeline.busy_s(busiest) - compute) + once,
        peak_memory_bytes=staged.worst_memory.high_bytes,
        memory=staged.worst_memory,
        communicated_bytes=staged.communicated_bytes,
        recomputed_flops=max(staged.sum_of(rank, recomputed_flops) for rank in range(timeline.num_ranks)),
        tokens_per_s=tokens / step if step else 0.0,
        mfu=flops_share(cluster, stages.whole, step),
        bubble=timeline.bubble_fraction,
        stages=tuple(map(staged.stage_prediction, stages.stages)),
    )
