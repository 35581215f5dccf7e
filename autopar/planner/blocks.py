"""A program as a chain of blocks that may be cut apart, and what every cut of it costs; nothing is built to know that.

A block begins where a segment of the graph does that holds parameters: every stage must have some. A stage is a run of blocks. Its seconds and
bytes are sums over its pieces (`work.py`); what crosses a cut is known from who makes and who reads each value, as `stages.py` sends it.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate, groupby, pairwise

import numpy as np

from autopar.core.cluster import Cluster
from autopar.core.schedule import Edge, Schedule
from autopar.cost_models.outline import Outline
from autopar.cost_models.pipeline import EdgeCost, PipelineCost, StageCost
from autopar.cost_models.stopwatch import Stopwatch
from autopar.cost_models.timeline import simulate
from autopar.planner.liveness import kept_by_segment
from autopar.planner.states import Pricing
from autopar.planner.work import PHASES, pieces, put_off_bytes
from autopar.program import Program
from autopar.schedules.held import most_held
from autopar.schedules.lower import add_updates, lower, make_schedule
from autopar.schedules.orders import share_order
from autopar.search.stages import Devices, StageOption, cut_along
from autopar.stages import merged, tied_bytes

STATE, PARAMETERS = len(PHASES), len(PHASES) + 1
"""Columns behind the phases of `work.PHASES`: bytes of state, number of parameters."""

Row = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """How a pipeline runs: which schedule, on how many ranks, with how many stages each; or with what `shares` of the microbatches copies of a model."""

    schedule: str
    num_ranks: int
    num_microbatches: int
    virtual: int = 1
    shares: tuple[int, ...] = ()

    def microbatches_of(self, rank: int) -> int:
        """How many a rank runs: all, or its share where every rank has a copy of the model."""
        return self.shares[rank] if self.shares else self.num_microbatches

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.virtual

    @property
    def in_flight(self) -> tuple[float, ...]:
        """By rank, the most microbatches of all its stages whose activations it holds at once."""
        return tuple([sum(of_rank) / self.virtual for of_rank in self.in_flight_by_stage])

    @property
    def in_flight_by_stage(self) -> tuple[tuple[int, ...], ...]:
        """By rank, the microbatches that it holds then of each of its stages."""
        return most_held(self.schedule, self.num_ranks, self.num_microbatches, self.virtual)

    @property
    def flights(self) -> list[int]:
        """All these numbers, once."""
        return sorted({flight for by_stage in self.in_flight_by_stage for flight in by_stage})


@dataclass(frozen=True, slots=True)
class Crossing:
    """A value that other blocks than its own read: those that send a gradient back are `answering`."""

    maker: int
    readers: frozenset[int]
    answering: frozenset[int]
    num_bytes: float


@dataclass
class Blocks:
    """`parts`: every microbatch so many times smaller than the program's, as an estimate. Runs of blocks are [first, end).

    `kept`: `kept_by_segment` of the program where it is known. A cache, not a value: one per sharding.
    """

    program: Program
    pricing: Pricing
    parts: int = 1
    kept: tuple[int, ...] = ()
    _on: dict[int, "Blocks"] = field(default_factory=dict)
    _costs: dict[tuple[int, int], Row] = field(default_factory=dict)
    _options: dict[tuple[int, int], tuple[StageOption, ...]] = field(default_factory=dict)
    _cuts: dict[tuple[int, int, float], tuple[int, ...]] = field(default_factory=dict)

    def in_parts(self, parts: int) -> "Blocks":
        return Blocks(self.program, self.pricing, parts, self._kept_by_segment)

    def on(self, rank: int) -> "Blocks":
        """The same, priced on the devices of one rank of the pipeline."""
        return self._by(self.pricing.on(rank))

    def _by(self, pricing: Pricing) -> "Blocks":
        if pricing is self.pricing:
            return self
        if id(pricing) not in self._on:
            self._on[id(pricing)] = Blocks(self.program, pricing, self.parts, self._kept_by_segment)
        return self._on[id(pricing)]

    @cached_property
    def _kept_by_segment(self) -> tuple[int, ...]:
        return self.kept or kept_by_segment(self.program)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first operator of every block."""
        graph = self.program.graph
        params = set(graph.params)
        found = [s.ops.start for s in graph.segments if any(v in params for i in s.ops for v in graph.ops[i].operands)]
        return (0, *found[1:])

    @property
    def num_blocks(self) -> int:
        return len(self.starts)

    def block_of(self, op: int) -> int:
        return bisect_right(self.starts, op) - 1

    @cached_property
    def _rows(self) -> tuple[list[Row], list[tuple[frozenset[int], Row]]]:
        """(sums over the first blocks of what one block alone wants, what several want with who)."""
        wanted: dict[object, set[int]] = {}
        rows: dict[object, Row] = {}
        for piece in pieces(self.program, self.pricing, self.parts):
            wanted.setdefault(piece.key, set()).add(self.block_of(piece.op))
            rows[piece.key] = (*piece.seconds, piece.state_bytes, float(piece.state_bytes > 0))
        own = np.zeros((self.num_blocks + 1, PARAMETERS + 1))
        shared = []
        for key, blocks in wanted.items():
            if len(blocks) == 1:
                own[next(iter(blocks)) + 1] += rows[key]
            else:
                shared.append((frozenset(blocks), rows[key]))
        return [tuple(row) for row in own.cumsum(axis=0).tolist()], shared

    def cost(self, first: int, end: int) -> Row:
        """Seconds by phase, bytes of state and number of parameters of a stage."""
        if (first, end) not in self._costs:
            sums, shared = self._rows
            extra = [row for blocks, row in shared if any(first <= b < end for b in blocks)]
            own = tuple(b - a for a, b in zip(sums[first], sums[end]))
            self._costs[first, end] = tuple(map(math.fsum, zip(own, *extra)))
        return self._costs[first, end]

    @cached_property
    def paths_s(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
        """Per block the longest way to its end in forwards, and down from it in gradients of inputs, and in whole backwards; on the fastest devices for each."""
        kinds = [self._by(pricing) for pricing in self.pricing.kinds]
        rows = [tuple(map(min, zip(*(kind.cost(b, b + 1) for kind in kinds)))) for b in range(self.num_blocks)]
        found = []
        for column, readers in ((slice(0, 1), "readers"), (slice(1, 2), "answering"), (slice(1, 3), "answering")):
            longest = [sum(row[column]) for row in rows]
            alone = tuple(longest)
            for b in range(self.num_blocks):
                before = [longest[c.maker] for c in self.crossings if b in getattr(c, readers)]
                longest[b] = alone[b] + max(before, default=0.0)
            found.append(tuple(longest))
        return found[0], found[1], found[2]

    @cached_property
    def _kept(self) -> tuple[list[float], list[float]]:
        """Bytes that a microbatch keeps of the first blocks: between forward and backward, and between the halves of a split backward."""
        kept = [0.0] * self.num_blocks
        segments = self.program.graph.segments
        for n, size in enumerate(self._kept_by_segment):
            kept[self.block_of(segments[n].ops.start) if n < len(segments) else -1] += size / self.parts
        bounds = (*self.starts, len(self.program.graph.ops))
        put_off = [put_off_bytes(self.program, range(a, b)) / self.parts for a, b in pairwise(bounds)]
        return list(accumulate(kept, initial=0.0)), list(accumulate(put_off, initial=0.0))

    @cached_property
    def crossings(self) -> tuple[Crossing, ...]:
        program, graph = self.program, self.program.graph
        found = []
        for v in sorted(graph.searched):
            if v not in graph.producer:
                continue
            maker = self.block_of(graph.producer[v][0])
            users = [i for i, _ in graph.consumers[v] if not graph.searched.isdisjoint(graph.ops[i].results)]
            readers = frozenset(b for b in map(self.block_of, users) if b != maker)
            if readers:
                live = v in graph.differentiated
                answering = frozenset(self.block_of(i) for i in users if live and not graph.differentiated.isdisjoint(graph.ops[i].results)) - {maker}
                layout = program.relay[v][-1] if v in program.relay else program.produced[v]
                found.append(Crossing(maker, readers, answering, program.local_bytes(v, layout) / self.parts))
        return tuple(found)

    def handed_bytes(self, cut: int, *, back: bool = False) -> float:
        """Bytes that cross between block cut - 1 and block `cut`, or come back."""
        return self._handed[back][cut]

    @cached_property
    def _handed(self) -> tuple[list[float], list[float]]:
        """By first block behind a cut, bytes there and back."""
        there, back = [0.0] * self.num_blocks, [0.0] * self.num_blocks
        for c in self.crossings:
            for sums, blocks in ((there, c.readers), (back, c.answering)):
                for cut in range(c.maker + 1, max(blocks, default=0) + 1):
                    sums[cut] += c.num_bytes
        return there, back

    def crossing_s(self, cut: int, source: int, target: int) -> float:
        """Seconds of the messages of one microbatch between blocks `cut` - 1 and `cut`, both ways, from one rank of the pipeline to another."""
        price = self.pricing.message
        return price(self.handed_bytes(cut), source, target) + price(self.handed_bytes(cut, back=True), target, source)

    def option(self, first: int, end: int) -> tuple[StageOption, ...]:
        """A stage as the dynamic programme over blocks sees it; none where it would hold no parameter."""
        if (first, end) not in self._options:
            row, kept = self.cost(first, end), self._kept[0]
            activation_bytes = max(0.0, kept[end] - kept[first]) + self.handed_bytes(first)
            made = StageOption(num_devices=1, time_s=sum(row[:3]), reduce_s=sum(row[3:STATE]), state_bytes=row[STATE], activation_bytes=activation_bytes)
            self._options[first, end] = (made,) if row[PARAMETERS] else ()
        return self._options[first, end]

    def formula_cut(self, order: Order, memory_limit_bytes: float = float("inf")) -> tuple[int, ...]:
        """The first block of every stage but the first, by the formula of `search/stages.py`; raises InfeasibleError where nothing fits."""
        n, times, limit = order.num_stages, order.num_microbatches, memory_limit_bytes / order.virtual
        if (n, times, limit) not in self._cuts:
            runs = [tuple(run) for _, run in groupby([s % order.num_ranks for s in range(n)], lambda rank: id(self.pricing.on(rank)))]
            kinds = {id(blocks): blocks.option for blocks in map(self.on, range(order.num_ranks))}  # one function of a kind: its costs are asked for once
            row = [Devices(len(run), kinds[id(self.on(run[0]))], limit + self.pricing.spare_bytes(run[0]) / order.virtual) for run in runs]
            ends = {(a, b): (runs[a][0], runs[a][-1]) if a == b else (runs[a][-1], runs[b][0]) for a in range(len(runs)) for b in range(a, len(runs))}
            found = cut_along(self.num_blocks, lambda cut, a, b: self.crossing_s(cut + 1, *ends[a, b]), row, num_microbatches=times, num_stages=n)
            self._cuts[n, times, limit] = found.starts[1:]
        return self._cuts[n, times, limit]

    def timeline(self, cuts: Sequence[int], order: Order) -> Outline:
        """The step that the schedule's lists make of these stages."""
        bounds = (0, *cuts, self.num_blocks)
        home = [bisect_right(cuts, b) for b in range(self.num_blocks)]
        there: dict[tuple[int, int], float] = {}
        back: dict[tuple[int, int], float] = {}
        for c in self.crossings:
            for blocks, sums in ((c.readers, there), (c.answering, back)):
                for target in {home[b] for b in blocks} - {home[c.maker]}:
                    sums[home[c.maker], target] = sums.get((home[c.maker], target), 0.0) + c.num_bytes
        edges = tuple(Edge(s, t, (s, t) in back) for s, t in sorted(there))
        sizes = [(there[e.source, e.target], back.get((e.source, e.target), 0.0)) for e in edges]
        messages = edge_costs(self.pricing, [(e.source % order.num_ranks, e.target % order.num_ranks) for e in edges], sizes)
        stages = tuple(self.on(s % order.num_ranks).stage_cost(a, b) for s, (a, b) in enumerate(pairwise(bounds)))
        return timed(order, self.pricing.cluster, stages, edges, messages, *self._ties(home, order))

    def stage_cost(self, first: int, end: int) -> StageCost:
        forward, inputs, weights, gather, reduce, update, state, _ = self.cost(first, end)
        kept, put_off = self._kept
        received = self.handed_bytes(first)
        return StageCost(
            forward_s=forward, input_gradient_s=inputs, weight_gradient_s=weights, gather_s=gather, reduce_s=reduce, step_s=update,
            state_bytes=round(state), activation_bytes=round(kept[end] - kept[first] + received), weight_activation_bytes=round(put_off[end] - put_off[first]),
        )  # fmt: skip

    @cached_property
    def _users(self) -> tuple[tuple[int, frozenset[int]], ...]:
        """Trained parameters that several blocks use."""
        graph = self.program.graph
        found = ((v, frozenset(self.block_of(i) for i, _ in graph.consumers[v])) for v in graph.params if v in graph.differentiated)
        return tuple((v, blocks) for v, blocks in found if len(blocks) > 1)

    def _ties(self, home: Sequence[int], order: Order) -> tuple[tuple[tuple[int, ...], ...], tuple[float, ...]]:
        """Groups of stages that share a trained weight, and the seconds to sum its gradients over their ranks."""
        by_value = {v: tuple(sorted({home[b] for b in blocks})) for v, blocks in self._users}
        by_value = {v: stages for v, stages in by_value.items() if len(stages) > 1}
        groups = merged(by_value.values())
        return groups, tuple(sum(self.tie_s(v, {s % order.num_ranks for s in stages}) for v, stages in by_value.items() if set(stages) <= set(g)) for g in groups)

    def tie_s(self, v: int, ranks: set[int]) -> float:
        """Seconds of the sum of one gradient over some ranks of the pipeline."""
        return self.pricing.tie(tuple(sorted(ranks)), tied_bytes(self.program, v)) if len(ranks) > 1 else 0.0


def edge_costs(pricing: Pricing, ends: Sequence[tuple[int, int]], sizes: Sequence[tuple[float, float]]) -> tuple[EdgeCost, ...]:
    """Of messages between ranks of a pipeline, by their bytes there and back."""
    price = pricing.message
    return tuple(
        EdgeCost(activation_s=price(there, a, b), gradient_s=price(back, b, a), activation_bytes=round(there), gradient_bytes=round(back))
        for (a, b), (there, back) in zip(ends, sizes, strict=True)
    )


def timed(
    order: Order, cluster: Cluster, stages: tuple[StageCost, ...], edges: tuple[Edge, ...], messages: tuple[EdgeCost, ...], tied: tuple[tuple[int, ...], ...],
    tie_s: tuple[float, ...],
) -> Outline:  # fmt: skip
    """The step of stages with these costs. Where devices share cores, a rank alone is faster than the costs say, and ranks slow each other down."""
    about = order, edges, tied, any(s.gather_s for s in stages), any(s.reduce_s for s in stages)
    if cluster.crowding == 1.0:
        return _stopwatch(*about).outline(_uncrowded(order, cluster, stages, messages, tie_s))
    split = order.schedule == "zero-bubble"
    there, back = _talking(order, len(stages), edges, messages)
    alone = tuple(_alone(stage, cluster, there[s], back[s], split=split) for s, stage in enumerate(stages))
    sent = tuple(replace(message, activation_s=0.0, gradient_s=0.0) for message in messages)
    return Outline.of(simulate(_lists(*about), PipelineCost(alone, sent, tie_s), at_once=order.num_ranks / cluster.crowding), len(stages))


def step_seconds(
    order: Order, cluster: Cluster, stages: tuple[StageCost, ...], edges: tuple[Edge, ...], messages: tuple[EdgeCost, ...], tied: tuple[tuple[int, ...], ...],
    tie_s: tuple[float, ...], enough_s: float = math.inf,
) -> float:  # fmt: skip
    """The step time of `timed` alone, which is known sooner; where it is no less than `enough_s`, it may be inf instead."""
    if cluster.crowding != 1.0:
        return timed(order, cluster, stages, edges, messages, tied, tie_s).step_time_s
    watch = _stopwatch(order, edges, tied, any(s.gather_s for s in stages), any(s.reduce_s for s in stages))
    return watch.step_s(_uncrowded(order, cluster, stages, messages, tie_s), enough_s)


def _uncrowded(order: Order, cluster: Cluster, stages: Sequence[StageCost], messages: tuple[EdgeCost, ...], tie_s: tuple[float, ...]) -> PipelineCost:
    split = order.schedule == "zero-bubble"
    return PipelineCost(tuple([_alone(stage, cluster, 0.0, 0.0, split=split) for stage in stages]), messages, tie_s)


def steady(num_microbatches: int, num_ranks: int, rounds: int, timed: Callable[[int], float]) -> float:
    """The step of many microbatches from that of few: after so many `rounds`, each of as many as a pipeline has ranks, every further one takes as long
    as the last. `timed`: of a number of microbatches."""
    few = rounds * num_ranks
    if num_microbatches <= few + num_ranks:
        return timed(num_microbatches)
    base = timed(few)
    return base + (num_microbatches - few) * (timed(few + num_ranks) - base) / num_ranks


def _talking(order: Order, num_stages: int, edges: Sequence[Edge], messages: Sequence[EdgeCost]) -> tuple[list[float], list[float]]:
    """Seconds that a forward and a backward of each stage spend on messages, where cores do both: half of each at either end."""
    there, back = [0.0] * num_stages, [0.0] * num_stages
    for edge, message in zip(edges, messages, strict=True):
        if edge.source % order.num_ranks != edge.target % order.num_ranks:
            for stage in (edge.source, edge.target):
                there[stage] += message.activation_s / 2
                back[stage] += message.gradient_s / 2
    return there, back


def _alone(stage: StageCost, cluster: Cluster, there_s: float, back_s: float, *, split: bool) -> StageCost:
    """What a stage takes while the others wait; with its messages, and what the runtime takes for every action."""
    start, faster = cluster.host.action_s, cluster.crowding
    return replace(
        stage, forward_s=(stage.forward_s + there_s + start) / faster, input_gradient_s=(stage.input_gradient_s + back_s + start) / faster,
        weight_gradient_s=(stage.weight_gradient_s + (start if split else 0.0)) / faster, gather_s=stage.gather_s / faster, step_s=stage.step_s / faster,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _lists(order: Order, edges: tuple[Edge, ...], tied: tuple[tuple[int, ...], ...], gathers: bool, reduces: bool) -> Schedule:  # noqa: FBT001
    """The lists of a step, with parameters gathered before it and gradients summed after it where there are any to gather or sum."""
    if order.shares:
        made = lower(share_order(order.shares), edges, tied)
    else:
        made = make_schedule(order.schedule, order.num_ranks, order.num_microbatches, order.virtual, edges=edges, tied=tied)
    return add_updates(made, replicas=2 if gathers or reduces else 1, zero_stage=1 if gathers else 0)


@lru_cache(maxsize=64)
def _stopwatch(order: Order, edges: tuple[Edge, ...], tied: tuple[tuple[int, ...], ...], gathers: bool, reduces: bool) -> Stopwatch:  # noqa: FBT001
    return Stopwatch(_lists(order, edges, tied, gathers, reduces))
