"""What may be done about memory, and its price: ZeRO for a parameter, recomputation for a block."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from autopar.core.buckets import bucket_limit
from autopar.core.graph import OpGraph, TensorMeta
from autopar.core.layout import I, Layout, R, local_shape
from autopar.core.mesh import Mesh
from autopar.core.residency import GATHER, MODES, RECOMPUTE, Precision, computes_again, gathers_again, keeps_contractions
from autopar.core.zero import Zero, zero_layout
from autopar.cost_models.memory import adam
from autopar.planner.pins import Pins
from autopar.planner.states import TIE_BREAK_S, Pricing
from autopar.program import Program


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """What the search may choose (`stages` of ZeRO, modes of recomputation) and what is given (the rest)."""

    stages: tuple[int, ...] = (0,)
    recompute: tuple[str, ...] = ("none",)
    micro_batches: int = 1
    precision: Precision = Precision()
    offload: bool = False

    def narrowed(self, pins: Pins) -> "Keeping":
        """With what the pins fix."""
        stages = self.stages if pins.zero is None else (pins.zero,)
        recompute = self.recompute if pins.recompute is None else (pins.recompute,)
        return Keeping(stages=stages, recompute=recompute, micro_batches=self.micro_batches, precision=self.precision, offload=self.offload)

    @property
    def programs(self) -> tuple[str, ...]:
        """The modes that a program may be given."""
        return RECOMPUTE if self.recompute == MODES else self.recompute

    @property
    def gathers_again(self) -> bool:
        """Whether some program may keep no results of all-gathers."""
        return any(map(gathers_again, self.programs))

    def everything(self) -> "Keeping":
        return Keeping(stages=(0, 1, 2, 3), recompute=MODES, micro_batches=self.micro_batches, precision=self.precision, offload=self.offload)


@dataclass(frozen=True, slots=True)
class Use:
    """How a parameter is used: by how many segments (`forward`), of which `backward` take part in the backward; `live`: it is trained.

    It travels in company: `bucket` is its share of a full bucket of gradients, `unit` that of what ZeRO-3 gathers for a segment.
    """

    forward: int
    backward: int
    live: bool
    returned: bool = False
    bucket: float = 1.0
    unit: float = 1.0


@dataclass(frozen=True, slots=True)
class Exchange:
    """Seconds of a parameter's collectives: of every forward and every backward of a microbatch, before and after all of them."""

    forward_s: float
    backward_s: float
    gather_s: float
    reduce_s: float


def uses(graph: OpGraph) -> dict[int, Use]:
    """The use of every parameter."""
    live = graph.differentiated
    found: dict[int, list[bool]] = {v: [] for v in graph.params}
    for wiring in graph.wirings:
        back = not live.isdisjoint(wiring.results)
        for v in wiring.entries:
            if v in found:
                found[v].append(back)
    ends, size = set(graph.finals), {v: graph.values[v].meta.num_bytes for v in graph.params}
    limit = bucket_limit(sum(size[v] for v in graph.params if v in live))
    units = _unit_bytes(graph, size)
    return {
        v: Use(len(segments), sum(segments), v in live, v in ends, min(1.0, size[v] / limit), size[v] / units[v] if v in units else 1.0) for v, segments in found.items()
    }


def _unit_bytes(graph: OpGraph, size: Mapping[int, int]) -> dict[int, int]:
    """Bytes of all parameters of the segment that uses a parameter first."""
    found: dict[int, int] = {}
    for wiring in graph.wirings:
        here = [v for v in wiring.entries if v in size]
        total = sum(size[v] for v in here)
        for v in here:
            found.setdefault(v, total)
    return found


@dataclass(frozen=True)
class Sharding:
    """ZeRO on one mesh."""

    pricing: Pricing
    keeping: Keeping
    axes: tuple[int, ...] | None = None
    """The axes that pinned degrees leave for state sharding; None: any."""

    @property
    def mesh(self) -> Mesh:
        return self.pricing.mesh

    @cached_property
    def about(self) -> Hashable:
        """What its prices depend on beside those of the mesh, and parameters. Where the optimizer's step is priced, it adds up the gradients of all microbatches."""
        summed = self.keeping.micro_batches if self.pricing.cluster.host.update_bytes_per_s else 1
        return self.axes, replace(self.keeping, micro_batches=summed)

    def options(self, meta: TensorMeta, layouts: Sequence[Layout], use: Use) -> tuple[tuple[Layout, Zero | None], ...]:
        """(layout in use, ZeRO) for every allowed stage; a parameter that cannot be cut has stage 0, whatever is allowed."""
        found: list[tuple[Layout, Zero | None]] = []
        for layout in layouts:
            cut = [Zero(stage, axes) for stage in self.keeping.stages if stage and not (stage == 3 and use.returned) for axes in self._axes(meta, layout)]
            if 0 in self.keeping.stages or not cut:
                found.append((layout, None))
            found += [(layout, zero) for zero in cut]
        return tuple(found)

    def _axes(self, meta: TensorMeta, layout: Layout) -> list[tuple[int, ...]]:
        free = tuple(a for a, p in enumerate(layout) if p == I and self.mesh.sizes[a] > 1 and (self.axes is None or a in self.axes))
        sets = [free, *((a,) for a in free if self.axes is None)] if len(free) > 1 else [free] if free else []
        return [axes for axes in sets if zero_layout(meta.shape, layout, axes, self.mesh) != layout]

    def _elements(self, meta: TensorMeta, layout: Layout, zero: Zero | None) -> tuple[int, int]:
        """Elements of a rank (in use, stored)."""
        stored = layout if zero is None else zero_layout(meta.shape, layout, zero.axes, self.mesh)
        return math.prod(local_shape(meta.shape, layout, self.mesh)), math.prod(local_shape(meta.shape, stored, self.mesh))

    def memory_bytes(self, meta: TensorMeta, layout: Layout, zero: Zero | None, live: bool) -> float:
        """Bytes of parameter, gradient and optimizer state that stay on a rank's device."""
        used, part = self._elements(meta, layout, zero)
        policy = adam(meta.dtype, master=self.keeping.precision.master)
        stage = zero.stage if zero is not None else 0
        total = policy.parameter_bytes * (part if stage == 3 else used)
        if live:
            total += policy.gradient_bytes * (part if stage >= 2 else used)
            total += 0 if self.keeping.offload else policy.optimizer_bytes * (part if stage >= 1 else used)
        return float(total)

    def seconds(self, meta: TensorMeta, layout: Layout, zero: Zero | None, deferred: tuple[int, ...], use: Use) -> tuple[float, float]:
        """What gathering a parameter, summing its gradient (over `deferred`) and updating it costs in the passes of a microbatch, and before and after all of
        a step, where a pipeline may hide it behind other stages of a rank."""
        found = self.exchange(meta, layout, zero, deferred, use)
        once = found.gather_s + found.reduce_s + self.update_s(meta, layout, zero, use.live)
        return found.forward_s + found.backward_s, once

    def edge_seconds(
        self, meta: TensorMeta, src: Sequence[Layout], zeros: Sequence[Zero | None], dst: Sequence[Layout], use: Use
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """By how a parameter is stored and how it is used: seconds of moves and of ZeRO's exchanges in the passes of one microbatch, and once a step. Its gradient
        over axes where it is stored whole and used as R is summed once a step, in one go."""
        lifted = [tuple(R if p == I and meta.requires_grad else p for p in x) for x in src]
        red = self.pricing.redistribution(meta, (*src, *dst, *lifted), grad=meta.requires_grad)
        # of the layout a parameter is used in, only its R axes say what is deferred
        partial = np.array([[p == R for p in used] for used in dst])
        _, columns, of_column = np.unique(partial, axis=0, return_index=True, return_inverse=True)
        start = np.empty((len(src), len(columns)), dtype=int)
        passes, once = (np.empty(start.shape) for _ in range(2))
        known: dict[tuple[int, tuple[int, ...]], tuple[float, float]]  # by state and the axes over which its gradient is summed
        known = self.pricing.kept(("exchanges", meta, tuple(src), tuple(zeros), use, self.about), dict)
        for s, (stored, zero) in enumerate(zip(src, zeros)):
            for group, column in enumerate(columns.tolist()):
                axes = deferred_axes(stored, dst[column]) if meta.requires_grad else ()
                if (s, axes) not in known:
                    known[s, axes] = self.seconds(meta, stored, zero, axes, use)
                start[s, group] = red.index[lift(stored, axes)]
                passes[s, group], once[s, group] = known[s, axes]
        of_column, end = of_column.reshape(-1), [red.index[used] for used in dst]
        return red.seconds[start[:, of_column], end], passes[:, of_column], once[:, of_column]

    def update_s(self, meta: TensorMeta, layout: Layout, zero: Zero | None, live: bool) -> float:
        """Seconds of the optimizer's step, which reads the gradient, and reads and writes the parameter and its state; and of adding up the gradients
        of all microbatches, each of which is read and added to the sum."""
        rate = self.pricing.cluster.host.update_bytes_per_s
        if rate is None or not live:
            return 0.0
        used, part = self._elements(meta, layout, zero)
        policy = adam(meta.dtype, master=self.keeping.precision.master)
        step = (part if zero is not None else used) * (2 * policy.parameter_bytes + policy.gradient_bytes + 2 * policy.optimizer_bytes)
        summed = part if zero is not None and zero.stage >= 2 else used
        return (step + (self.keeping.micro_batches - 1) * 3 * policy.gradient_bytes * summed) / rate

    def exchange(self, meta: TensorMeta, layout: Layout, zero: Zero | None, deferred: tuple[int, ...], use: Use) -> Exchange:
        """The same by when it is done. A parameter takes its share of what its bucket or its unit takes."""
        used, part = self._elements(meta, layout, zero)
        width = meta.num_bytes / max(meta.numel, 1)
        if zero is None:
            return Exchange(0.0, 0.0, 0.0, self._summed(deferred, used * width, use.bucket) if use.live else 0.0)
        share = use.unit if zero.stage == 3 else use.bucket
        gather = share * self.pricing.collective("all_gather", zero.axes, part * width / share)
        scatter = share * self.pricing.collective("reduce_scatter", zero.axes, used * width / share) if use.live else 0.0
        rest = tuple(a for a in deferred if a not in zero.axes)
        reduce = self._summed(rest, part * width, share) if use.live else 0.0
        if zero.stage == 3:
            return Exchange(use.forward * gather, use.backward * gather + use.forward * scatter, 0.0, use.forward * reduce + 3 * TIE_BREAK_S)
        return Exchange(0.0, scatter if zero.stage == 2 else 0.0, gather, reduce + zero.stage * TIE_BREAK_S + (scatter if zero.stage == 1 else 0.0))

    def _summed(self, axes: tuple[int, ...], num_bytes: float, share: float) -> float:
        return share * self.pricing.gradient_reduction(axes, num_bytes / share)


def recompute_tables(
    modes: Sequence[str], again_s: np.ndarray, saved_bytes: np.ndarray, made_bytes: np.ndarray, *, kept: bool, times: int, watch_s: float = 0.0, summed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(extra seconds, bytes kept inside the block) of one operator: rows are modes, columns its states.

    `again_s`: of the part of its forward that is done again where nothing is kept; `watch_s`: what keeping a result adds, there and again.
    `saved_bytes`: what the backward reads; `made_bytes`: results, which selective recomputation keeps of an operator that is `kept`, and all recomputation where they
    are `summed` over ranks, as that is not repeated.
    """
    nothing = np.zeros_like(again_s)
    seconds, held = [], []
    for mode in modes:
        some = kept and keeps_contractions(mode)
        seconds.append(times * (2 * watch_s + nothing if some else again_s * computes_again(mode)))
        held.append(made_bytes if some else made_bytes * (summed & kept) if computes_again(mode) else saved_bytes)
    return np.stack(seconds), np.stack(held)


def recomputed_flops(program: Program) -> float:
    """Flops of contractions that a rank does a second time in one step because their results were not kept."""
    rules, mesh = program.rules, program.mesh
    again = ((i, share) for i, share in program.repeated.items() if rules[i].cost == "contract")
    return program.residency.micro_batches * sum(share * rules[i].flops / rules[i].degree(program.strategies[i], mesh) for i, share in again)


def gathering_again(program: Program) -> Program | None:
    """The same, but blocks do not keep what was gathered; None where they do not gather."""
    given = program.residency.recompute
    modes = {s.block: given.get(s.block, "none").removesuffix(GATHER) + GATHER for s in program.graph.segments if s.block}
    made = program.in_modes(modes)
    return made if any(move.again for move in made.moves) else None


def recomputed_early(program: Program) -> Program:
    """The same number of recomputed blocks, but the earliest of those that are alike: what an early block keeps is there at every later
    moment, what the last keeps is made again just when most is held. The search's linear model does not tell them apart."""
    graph, modes = program.graph, program.residency.recompute
    if not modes:
        return program
    looks: dict[str, list[Any]] = {}
    for segment in graph.segments:
        if segment.block:
            ops = [(graph.ops[i].kind, program.strategies[i], [graph.values[v].meta for v in graph.ops[i].results]) for i in segment.ops]
            looks.setdefault(segment.block, []).append(ops)
    alike: dict[str, list[str]] = {}
    for block, look in looks.items():
        alike.setdefault(repr(look), []).append(block)
    order = sorted(RECOMPUTE, key=RECOMPUTE.index, reverse=True)
    moved = {b: m for blocks in alike.values() for b, m in zip(blocks, sorted((modes.get(b, "none") for b in blocks), key=order.index))}
    return program.in_modes({b: m for b, m in moved.items() if m != "none"})


def deferred_axes(stored: Layout, used: Layout) -> tuple[int, ...]:
    """Axes over which the gradient of a parameter is summed once per step: stored whole, used with partial gradients."""
    return tuple(a for a, (s, u) in enumerate(zip(stored, used)) if s == I and u == R)


def lift(stored: Layout, axes: Sequence[int]) -> Layout:
    """The storage layout as the program sees it: R on the deferred axes."""
    return tuple(R if a in axes else p for a, p in enumerate(stored))
