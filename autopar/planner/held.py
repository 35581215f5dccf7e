"""What a rank holds of each parameter, and how gradients and gathered weights travel: the sizes behind `runtime/store.py`, `reducer.py`
and `units.py`; and what lies beside a program that computes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from autopar.core.buckets import chunks
from autopar.core.graph import DTYPE_BYTES
from autopar.core.layout import local_outer
from autopar.core.memory import MemoryUse
from autopar.cost_models.memory import adam
from autopar.planner.allocator import Memory
from autopar.program import Program

MARGIN = 0.03
"""Of what lives within a step: alignment, scratch memory of kernels, scalars."""

UPDATE = "the optimizer step"


class Held(NamedTuple):
    """One parameter on one rank, in bytes. `working`: the copy that is computed with (whole where it is gathered); `stored`: the part
    that the optimizer updates, in its dtype; `inside`: that part lies in the working copy. `part`: its share of a gathered buffer."""

    value: int
    stage: int
    trained: bool
    working: int
    stored: int
    part: int
    reduced: int
    ranks: int
    reduced_over: int
    flat: bool
    inside: bool
    straight: bool
    key: tuple

    def device_bytes(self, *, offload: bool) -> int:
        """Bytes of the parameter on the device between steps."""
        stored = 0 if offload or self.inside else self.stored
        return stored if self.stage == 3 or not self.flat else self.working + stored


@dataclass(frozen=True)
class Group:
    """Parameters that travel together: bytes of their whole gradients, of the rows that are sent and of the part that comes back."""

    stage: int
    members: tuple[Held, ...]
    trained: bool = True

    @cached_property
    def rows(self) -> int:
        return sum(h.reduced * h.ranks for h in self.members)

    @property
    def part(self) -> int:
        return sum(h.reduced for h in self.members)

    @property
    def rows_of_others(self) -> int:
        """What the others send to be added, where that is held by itself."""
        return self.rows - self.part

    @property
    def sent_whole(self) -> bool:
        """Whether the one gradient is itself the rows that are sent."""
        return len(self.members) == 1 and self.members[0].straight and self.members[0].reduced == self.members[0].part

    @property
    def gathered_rows(self) -> int:
        return sum(h.part * h.ranks for h in self.members)

    @property
    def in_flight_bytes(self) -> int:
        """What bringing the working copies up to date holds: what is sent, where it is no stored tensor, and what is received; nothing
        where the one working copy is filled in place."""
        if len(self.members) == 1 and self.members[0].straight:
            return 0
        received = self.gathered_rows if self.members[0].ranks > 1 else 0
        return received + sum(h.part for h in self.members if h.inside or h.part != h.stored)

    @property
    def copies(self) -> int:
        """Weights taken out of gathered rows: views where one parameter fills the buffer row after row."""
        if len(self.members) == 1 and self.members[0].straight:
            return 0
        return sum(h.working for h in self.members)


@dataclass(frozen=True)
class Holdings:
    """All parameters of a rank."""

    program: Program

    @cached_property
    def parameters(self) -> dict[int, Held]:
        """By value; parameters kept alike are looked at once."""
        program = self.program
        known: dict[tuple, Held] = {}
        found = {}
        for v in program.graph.params:
            key = (program.graph.metas[v], program.storage[v], program.residency.zero.get(v), program.deferred[v], v in program.graph.differentiated)
            if key not in known:
                known[key] = self._held(v)
            found[v] = known[key] if known[key].value == v else known[key]._replace(value=v)
        return found

    def _held(self, v: int) -> Held:
        program, residency = self.program, self.program.residency
        dtype = program.graph.values[v].meta.dtype
        shape = program.graph.values[v].meta.shape
        zero = residency.zero.get(v)
        used, stored = program.storage[v], program.stored[v]
        cut = zero is not None and stored != used
        stage = zero.stage if zero is not None and cut else 0
        axes = zero.axes if zero is not None and cut else ()
        width, stored_width = DTYPE_BYTES[dtype], DTYPE_BYTES[residency.precision.stored(dtype)]
        part = math.prod(program.local_shape(v, stored))
        placements = [stored[a] for a in axes]
        nested = all(p.kind != "S" or local_outer(stored, program.mesh, a) == 1 for a, p in zip(axes, placements, strict=True))
        rest = tuple(a for a in program.deferred[v] if a not in axes)
        return Held(
            value=v, stage=stage, trained=v in program.graph.differentiated,
            working=program.local_bytes(v, used), stored=part * stored_width, part=part * width,
            reduced=part * DTYPE_BYTES[residency.precision.reduced(dtype)], ranks=math.prod(program.mesh.sizes[a] for a in axes),
            reduced_over=math.prod(program.mesh.sizes[a] for a in rest), flat=bool(stage) or width != stored_width or residency.offload,
            inside=stage in (1, 2) and width == stored_width and not residency.offload and nested,
            straight=bool(shape) and nested and all(p.kind == "S" and p.dim == 0 for p in placements), key=(stage, axes, rest, dtype),
        )  # fmt: skip

    @cached_property
    def flats(self) -> tuple[Group, ...]:
        """What is gathered once a step: working copies that are not the stored tensors."""
        return tuple(g for g in self._groups([h for h in self.parameters.values() if h.flat and h.stage < 3], gathered=True))

    @property
    def arriving_bytes(self) -> int:
        """What is held while all of them are gathered at a time."""
        return sum(group.in_flight_bytes for group in self.flats)

    @cached_property
    def buckets(self) -> tuple[Group, ...]:
        """What is reduced together: stages 0 to 2."""
        plain = [h for h in reversed(self.parameters.values()) if h.stage == 0 and h.trained and h.reduced_over > 1]
        return (*self._groups(plain, gathered=False), *(g for g in self.flats if g.stage and g.trained))

    def units(self) -> tuple[tuple[Group, ...], ...]:
        """What is gathered for every segment."""
        found = []
        for taken in self.program.gathered:
            kinds: dict[tuple, list[Held]] = {}
            for v in taken:
                h = self.parameters[v]
                if h.stage == 3:
                    kinds.setdefault((h.key, h.trained), []).append(h)
            found.append(tuple(Group(3, tuple(members), members[0].trained) for members in kinds.values()))
        return tuple(found)

    def _groups(self, members: Sequence[Held], *, gathered: bool) -> list[Group]:
        kinds: dict[tuple, list[Held]] = {}
        for h in members:
            kinds.setdefault((h.key, h.trained), []).append(h)
        found = []
        for of_kind in kinds.values():
            by_value = {h.value: h for h in of_kind}
            runs = chunks(list(by_value), lambda v, of=by_value: of[v].working, gathered=gathered)
            found += [Group(of_kind[0].stage, tuple(by_value[v] for v in run), of_kind[0].trained) for run in runs]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Bytes that a rank holds beside the program that is walked, and that do not change meanwhile."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    communication: int = 0
    temporaries: int = 0
    """Of the optimizer step, where it updates all parameters at once."""
    delivered: int = 0
    """Gradients as the optimizer step finds them, in place of `gradients`."""
    unsettled: int = 0
    """What may be there or not, for the margin."""


def received_bytes(program: Program) -> int:
    """Bytes that come from other stages, of one microbatch."""
    values = program.graph.values
    return sum(program.local_bytes(v, program.produced[v]) for v in program.graph.given if values[v].role == "input" and not values[v].source)


def resident(program: Program, holdings: Holdings) -> Memory:
    """What is there before a step: parameters, optimizer state, buffers and the batch."""
    graph, residency = program.graph, program.residency
    held = holdings.parameters.values()
    parameters = sum(h.device_bytes(offload=residency.offload) for h in held)
    for value in (graph.values[v] for v in graph.given):
        if value.role in ("buffer", "constant") or (value.role == "input" and value.source):
            parameters += value.meta.num_bytes * (residency.micro_batches if value.role == "input" else 1)
    kept = () if residency.offload else [(h.stored, graph.values[h.value].meta.dtype) for h in held if h.trained]
    stored = {dtype: residency.precision.stored(dtype) for _, dtype in kept}
    per_element = {dtype: adam(dtype, master=None).optimizer_bytes for dtype in stored.values()}
    optimizer = sum(size // DTYPE_BYTES[stored[dtype]] * per_element[stored[dtype]] for size, dtype in kept)
    return Memory(parameters=parameters, optimizer=optimizer, activations=received_bytes(program))


def state_of(program: Program) -> Beside:
    """What a program holds between its microbatches: parameters, optimizer state, gradients."""
    holdings = Holdings(program)
    parts = resident(program, holdings).parts
    trained = [h for h in holdings.parameters.values() if h.trained]
    gradients = sum(h.working if h.stage < 2 else h.reduced for h in trained)
    updated = 0 if program.residency.offload else sum(h.stored for h in trained)
    return Beside(parameters=parts["parameters"], gradients=gradients, optimizer=parts["optimizer"], temporaries=updated, delivered=updated)


def fullest(alone: Iterable[MemoryUse], beside: Beside) -> MemoryUse:
    """Of the moments of a program, with what lies beside it: all the time but for activations and messages, which are gone when the optimizer steps."""
    found = []
    for moment in alone:
        other = _at(moment, beside)
        parts = {part: size + getattr(other, part) for part, size in moment.parts}
        peak = replace(moment, **parts)
        found.append(peak.with_margin(round(MARGIN * (peak.activations + peak.temporaries + peak.communication)) + other.unsettled))
    return max(found, key=lambda peak: peak.expected_bytes)


def fullest_bytes(alone: Iterable[MemoryUse], beside: Beside, activations: np.ndarray) -> np.ndarray:
    """`fullest` in bytes, margin and all, for each of so many activations beside it."""
    expected, margin = [], []
    for moment in alone:
        other = _at(moment, beside)
        within = moment.activations + moment.temporaries + moment.communication + other.temporaries + other.communication
        within = within + (0 if moment.moment == UPDATE else 1) * activations
        expected.append(within + (moment.state_bytes + other.parameters + other.gradients + other.optimizer))
        margin.append(np.rint(MARGIN * within).astype(int) + other.unsettled)
    most = np.argmax(expected, axis=0)  # the first of equals, as above
    return np.choose(most, expected) + np.choose(most, margin)


def _at(moment: MemoryUse, beside: Beside) -> Beside:
    """What of it is there at this moment."""
    if moment.moment == UPDATE:
        return replace(beside, gradients=beside.delivered, activations=0, communication=0, unsettled=0)
    return replace(beside, temporaries=0)
