"""Seconds and bytes of a whole step of a forced plan: one block of each kind is priced and counted as often as there are such blocks.

Three blocks are laid out (`forced.py`) and cut into three stages as a pipeline would be: the first with the embedding, one in the middle, the
last with the head and the loss. A stage of n blocks is the stage of its kind with n - 1 times the middle one added, of none that less the middle one;
the schedule's lists, run against the clock (`cost_models/timeline.py`), make the step of that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from autopar.core.cluster import Cluster
from autopar.core.graph import DTYPE_BYTES
from autopar.core.memory import MemoryUse
from autopar.core.pipeline import Pipeline
from autopar.core.residency import Precision
from autopar.core.schedule import Edge
from autopar.cost_models.kernels import PLAIN, Kernels
from autopar.cost_models.overlap import occupied, overlapped_seconds
from autopar.cost_models.pipeline import EdgeCost, StageCost
from autopar.errors import UsageError
from autopar.forecast.forced import Forced, Layout3D
from autopar.forecast.kept import spared_bytes
from autopar.forecast.transformer import Dims
from autopar.planner.blocks import Order, steady, step_seconds
from autopar.planner.held import Beside, state_of
from autopar.planner.liveness import Engine, kept_by_segment, memory_use
from autopar.planner.updates import Traffic, Updates, traffic_seconds, update_seconds, updates
from autopar.planner.work import launches, pass_seconds
from autopar.stages import Stages, cut_into_stages

STEADY_ROUNDS = 1
"""After so many, see `steady`; a test holds this against pipelines that are run to their end."""


EVENNESS = 3.0
"""Of a host and a device that are equally slow, both together are 2 ** (1 / EVENNESS) times slower. Source: assumed, set by hand from vTrain's rows (cost_models/README.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """A forced plan: the layout of a stage, `pp` ranks with `vpp` stages each, `num_microbatches` a step."""

    layout: Layout3D
    pp: int = 1
    vpp: int = 1
    num_microbatches: int = 1

    @property
    def num_devices(self) -> int:
        return self.pp * self.layout.mesh.num_ranks


def fewest_layers(pp: int, vpp: int) -> int:
    """Of a model on so many stages: in an interleaved pipeline the embedding and the head may be stages of their own."""
    return pp * vpp - 2 if vpp > 1 else pp


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a step is expected to take, and what its fullest rank holds."""

    step_s: float
    memory: MemoryUse


@dataclass(frozen=True)
class Step:
    """The step of a model on a cluster under a plan."""

    dims: Dims
    plan: StepPlan
    cluster: Cluster
    precision: Precision = Precision(master="float32")
    dtype: str = "bfloat16"
    kernels: Kernels = PLAIN
    overlap: bool = False

    def __post_init__(self) -> None:
        if self.dims.layers < fewest_layers(self.plan.pp, self.plan.vpp):
            raise UsageError(f"{self.dims.layers} layers on {self.plan.pp} x {self.plan.vpp} stages; only the first and the last may have none")
        if self.plan.num_devices > self.cluster.num_devices:
            raise UsageError(f"a plan for {self.plan.num_devices} devices on {self.cluster.num_devices}")

    @cached_property
    def forced(self) -> Forced:
        plan = self.plan
        return _forced(self.dims.with_layers(3), plan.layout, self.cluster, plan.pp, self.precision, min(plan.num_microbatches, 3), self.dtype, self.kernels)

    @cached_property
    def kinds(self) -> "Kinds":
        return _kinds(self.forced, self.overlap)

    @cached_property
    def order(self) -> Order:
        plan = self.plan
        return Order("interleaved" if plan.vpp > 1 else "1f1b", plan.pp, plan.num_microbatches, plan.vpp)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Blocks of every stage: as even as can be, what is over in the middle, whose stages have neither embedding nor head."""
        n = self.plan.pp * self.plan.vpp
        each, over = divmod(self.dims.layers, n)
        first = (n - over + 1) // 2
        return tuple(each + (first <= s < first + over) for s in range(n))

    @cached_property
    def costs(self) -> tuple[StageCost, ...]:
        last = len(self.depths) - 1
        made = tuple(self.kinds.cost(depth, first=s == 0, last=s == last, virtual=self.plan.vpp) for s, depth in enumerate(self.depths))
        return made if self.overlap else gathered_first(made, self.plan.pp)

    @cached_property
    def step_s(self) -> float:
        plan, costs = self.plan, self.costs
        if plan.pp == 1:
            return sum(plan.num_microbatches * (c.forward_s + c.input_gradient_s + c.weight_gradient_s) + c.gather_s + c.reduce_s + c.step_s for c in costs)
        return steady(plan.num_microbatches, plan.pp, STEADY_ROUNDS, self._timed)

    def _timed(self, num_microbatches: int) -> float:
        n, message = len(self.costs), self.kinds.message
        order = replace(self.order, num_microbatches=num_microbatches)
        edges = tuple(Edge(s, s + 1) for s in range(n - 1))
        tied = ((0, n - 1),) if self.dims.tied else ()
        return step_seconds(order, self.forced.pricing.cluster, self.costs, edges, (message,) * (n - 1), tied, tuple(self._tie_s() for _ in tied))

    def _tie_s(self) -> float:
        stages = self.kinds.stages
        return sum(self.forced.pricing.tie((0, self.plan.pp - 1), stages.tied_bytes(v)) for v in stages.shared)

    # --- memory ----------------------------------------------------------------------------------------------------------

    @cached_property
    def memory(self) -> MemoryUse:
        """Of the fuller of the first and the last rank: one holds most microbatches, the other the logits."""
        ranks = (0, self.plan.pp - 1) if self.plan.pp > 1 else (0,)
        return max((self._memory(rank) for rank in ranks), key=lambda m: m.high_bytes)

    def _memory(self, rank: int) -> MemoryUse:
        """The stage that computes is walked; its rank's other blocks and microbatches lie beside it. Only the walked block's parameters have
        temporaries in the optimizer step, and only its gradients are delivered in another dtype: what others run is fused."""
        pp, last, kinds = self.plan.pp, len(self.depths) - 1, self.kinds
        held = [s for s in range(len(self.depths)) if s % pp == rank]
        flight = self.order.in_flight[rank]
        kept = [kinds.cost(self.depths[s], first=s == 0, last=s == last).activation_bytes for s in held]
        number = 2 if last in held else 0
        both = number == 2 and 0 in held
        blocks, states = sum(self.depths[s] for s in held) - 1 - both, kinds.states
        parameters, gradients, optimizer = (
            blocks * getattr(states[1], part) + both * getattr(states[0], part) for part in ("parameters", "gradients", "optimizer")
        )
        activations = max(0, round(flight * sum(kept)) - kinds.kept_bytes[number])
        gradients += round(self._sums_beside * sum(kinds.gradients(self.depths[s], first=s == 0, last=s == last) for s in held))
        beside = Beside(parameters=parameters, optimizer=optimizer, gradients=gradients, delivered=gradients, activations=activations)
        # of a single microbatch, gradients take the place of activations
        moments = (beside,) if self.plan.num_microbatches > 1 else (replace(beside, gradients=0, delivered=0), replace(beside, activations=0))
        if number == 2 and self.plan.layout.whole_loss:
            moments = tuple(replace(moment, communication=self._loss_bytes) for moment in moments)
        program = kinds.stages.stages[number].program
        return max((memory_use(program, Engine(), moment) for moment in moments), key=lambda m: m.high_bytes)

    @property
    def _loss_bytes(self) -> int:
        """What torch's cross entropy on whole logits holds beside what a program of its own makes: the gradient of every log-probability."""
        return self.plan.layout.micro_batch * self.dims.seq // self.plan.layout.cp * self.dims.vocab * DTYPE_BYTES["float32"]

    @property
    def _sums_beside(self) -> float:
        """Bytes of sums of gradients in a wider dtype beside (or in place of) the gradients themselves, over the bytes of those."""
        widths = DTYPE_BYTES[self.precision.reduced(self.dtype)] / DTYPE_BYTES[self.dtype]
        if self.plan.layout.zero >= 2 or widths == 1 or self.plan.num_microbatches == 1:
            return 0.0
        return widths if self.kernels.adds_gradients else widths - 1

    @property
    def forecast(self) -> Forecast:
        return Forecast(self.step_s, self.memory)


def gathered_first(costs: Sequence[StageCost], num_ranks: int) -> tuple[StageCost, ...]:
    """The costs where every rank waits for the parameters of all its stages before it computes the first."""
    first = [sum(cost.gather_s for cost in costs[rank::num_ranks]) for rank in range(num_ranks)]
    return tuple(replace(cost, gather_s=seconds) for cost, seconds in zip(costs, first + [0.0] * (len(costs) - num_ranks), strict=True))


def with_host(device_s: float, host_s: float, blocked: int = 0) -> float:
    """Seconds of work that takes a device so long, and the host so long to launch: a line of two machines with a buffer between them, which keeps the
    pace of the slower one where they differ and falls behind both where they are equal, as either waits for the other now and then.

    `blocked`: ranks that meet at collectives, where launches block. Then there is no buffer, both add up, and all wait for the last of the hosts: of n
    whose time between two collectives is exponentially distributed (assumed), that one takes 1 + 1/2 + ... + 1/n times the mean."""
    if blocked or not host_s:
        return device_s + host_s * sum(1 / n for n in range(1, blocked + 1))
    return max(device_s, host_s) * (1 + (min(device_s, host_s) / max(device_s, host_s)) ** EVENNESS) ** (1 / EVENNESS)


@dataclass(frozen=True)
class Kinds:
    """The first, a middle and the last stage, each of one block."""

    forced: Forced
    overlap: bool

    @cached_property
    def stages(self) -> Stages:
        graph = self.forced.graph
        names = tuple(graph.ops[segment.ops.start].name for segment in graph.segments if segment.block in ("blocks.1", "blocks.2"))
        return cut_into_stages(self.forced.program, Pipeline(3, names))

    @cached_property
    def seconds(self) -> tuple[list[float], ...]:
        """Forward and the halves of the backward, without what is exchanged of parameters."""
        return tuple(pass_seconds(stage.program, self.forced.pricing) for stage in self.stages.stages)

    @cached_property
    def kept_bytes(self) -> tuple[int, ...]:
        """Of one microbatch, from forward to backward."""
        kernels = self.forced.pricing.kernels
        return tuple(sum(kept_by_segment(stage.program)) - spared_bytes(stage.program, kernels) for stage in self.stages.stages)

    @cached_property
    def states(self) -> tuple[Beside, ...]:
        return tuple(state_of(stage.program) for stage in self.stages.stages)

    @cached_property
    def launches(self) -> tuple[tuple[int, int], ...]:
        return tuple(launches(stage.program, self.forced.pricing) for stage in self.stages.stages)

    @cached_property
    def updates(self) -> tuple[Updates, ...]:
        return tuple(updates(stage.program) for stage in self.stages.stages)

    @lru_cache(maxsize=64)
    def cost(self, depth: int, *, first: bool, last: bool, virtual: int = 1) -> StageCost:
        """A stage of `depth` blocks, one of `virtual` of its rank."""
        ends = [i for i, there in ((0, first), (2, last)) if there]
        middle, kept, pricing = self.seconds[1], self.kept_bytes, self.forced.pricing
        blocked = self.forced.layout.tp if pricing.kernels.launches_block else 0
        forward, inputs, weights = (depth * m + sum(self.seconds[i][k] - m for i in ends) for k, m in enumerate(middle[:3]))
        there, back = (pricing.kernels.host_s * (depth * m + sum(self.launches[i][k] - m for i in ends)) for k, m in enumerate(self.launches[1]))
        forward = with_host(forward, there, blocked)
        weights = with_host(inputs + weights, back, blocked) - inputs + self._addition_s(depth, ends)
        forward, weights = self._with_units(depth, forward, inputs, weights)
        gather, reduce = (self._total(depth, ends, name) for name in ("gathers", "sums"))
        if pricing.kernels.sums_whole:
            reduce = _whole(reduce)
        gather_s, reduce_s = traffic_seconds(gather, pricing), traffic_seconds(reduce, pricing)
        if self.overlap:
            parts = max(1, depth)
            gather_s = overlapped_seconds((forward / parts,) * parts, (gather_s / parts,) * parts, taken=self.taken) - forward
            backward = inputs + weights
            reduce_s = overlapped_seconds((backward / parts,) * parts, (), (reduce_s / parts,) * parts, taken=self.taken) - backward
        stored = depth * self.updates[1].stored_bytes + sum(self.updates[i].stored_bytes - self.updates[1].stored_bytes for i in ends)
        return StageCost(
            forward_s=forward, input_gradient_s=inputs, weight_gradient_s=weights, gather_s=max(0.0, gather_s), reduce_s=max(0.0, reduce_s),
            step_s=update_seconds(self.forced.cluster.device, stored), activation_bytes=depth * kept[1] + sum(kept[i] - kept[1] for i in ends),
        )  # fmt: skip

    def gradients(self, depth: int, *, first: bool, last: bool) -> int:
        """Bytes of the gradients of a stage of `depth` blocks."""
        middle = self.states[1].gradients
        return depth * middle + sum(self.states[i].gradients - middle for i, there in ((0, first), (2, last)) if there)

    def _addition_s(self, depth: int, ends: Sequence[int]) -> float:
        """Seconds of adding a microbatch's gradients to the sum, where a pass of its own does that: gradient read, sum read and written."""
        if not self.forced.pricing.kernels.adds_gradients or self.forced.micro_batches == 1:
            return 0.0
        device, num_bytes = self.forced.cluster.device, self.gradients(depth, first=0 in ends, last=2 in ends)
        widths = DTYPE_BYTES[self.forced.precision.reduced(self.forced.dtype)] / DTYPE_BYTES[self.forced.dtype]
        return num_bytes * (1 + 2 * widths) / (device.memory_bytes_per_s * device.memory_efficiency)

    def _total(self, depth: int, ends: Sequence[int], name: str) -> Traffic:
        mid = getattr(self.updates[1], name)
        keys = dict.fromkeys(key for update in self.updates for key in getattr(update, name))
        return {key: depth * mid.get(key, 0.0) + sum(getattr(self.updates[i], name).get(key, 0.0) - mid.get(key, 0.0) for i in ends) for key in keys}

    def _with_units(self, depth: int, forward: float, inputs: float, weights: float) -> tuple[float, float]:
        """With what is gathered before and summed after every block, beside the blocks that compute."""
        pricing, unit = self.forced.pricing, self.updates[1]
        gather, scatter = traffic_seconds(unit.unit_gathers, pricing, math.inf), traffic_seconds(unit.unit_sums, pricing, math.inf)
        if not depth or (not gather and not scatter):
            return forward, weights
        backward = inputs + weights
        if not self.overlap:
            return forward + depth * gather, weights + depth * (gather + scatter)
        there = overlapped_seconds((forward / depth,) * depth, (gather,) * depth, taken=self.taken)
        back = overlapped_seconds((backward / depth,) * depth, (gather,) * depth, (scatter,) * depth, taken=self.taken)
        return there, back - inputs

    @property
    def taken(self) -> float:
        return occupied(self.forced.cluster.device.num_multiprocessors)

    @cached_property
    def message(self) -> EdgeCost:
        there, back = self.stages.message_bytes(0, 1), self.stages.message_bytes(0, 1, back=True)
        return EdgeCost(activation_s=self._sent_s(there), gradient_s=self._sent_s(back), activation_bytes=there, gradient_bytes=back)

    def _sent_s(self, num_bytes: int) -> float:
        """Seconds of a message; of one that all ranks of tp hold, each may send its part, to be gathered where it arrives."""
        pricing, layout = self.forced.pricing, self.forced.layout
        if not pricing.kernels.sends_parts or layout.sp or layout.tp == 1:
            return pricing.message(num_bytes)
        part = num_bytes / layout.tp
        return pricing.message(part) + pricing.collective("all_gather", (layout.mesh.names.index("tp"),), part)


def _whole(sums: Traffic) -> Traffic:
    """The same sums for every rank, where some were wanted in parts."""
    found: Traffic = {}
    for (_, axes), num_bytes in sums.items():
        found["all_reduce", axes] = found.get(("all_reduce", axes), 0.0) + num_bytes
    return found


@lru_cache(maxsize=4096)
def _forced(*args) -> Forced:
    return Forced(*args)


@lru_cache(maxsize=4096)
def _kinds(forced: Forced, overlap: bool) -> Kinds:
    return Kinds(forced, overlap)
