"""What becomes of gradients of parameters once they are whole: summed over microbatches, packed, sent and kept, beside the passes that they come from.

The passes of all microbatches hold the same, and gradients of parameters only differ from one to the next. So the passes are walked once, as *stretches* from
one arrival to the next, and every microbatch is a look at these with what is held of gradients meanwhile.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from autopar.core.buckets import IN_FLIGHT
from autopar.core.memory import MemoryUse
from autopar.planner.allocator import Memory, Peak
from autopar.planner.held import Group, Held, Holdings
from autopar.program import Program


class Arrival(NamedTuple):
    """The gradient of a parameter is there (`held`: its number and its bytes), or the backward of a segment has ended (`held` None: its number, and that of a unit
    of those whose weights are gathered for it)."""

    number: int
    size: int
    held: Held | None


class Stretch(NamedTuple):
    """The passes from one arrival to the next. `peak`: the fullest moment, if any was looked at; `total` and `parts`: what is held at the end; `arrival`: None
    where that is the end of the backward."""

    peak: Peak | None
    total: int
    parts: Mapping[str, int]
    arrival: Arrival | None


@dataclass
class Arrivals:
    """`leaf`: gradients of working copies; `totals`: sums of buckets (negative keys: of units). `receives`: see `liveness.Engine`; `fullest`: so far, with the passes."""

    program: Program
    holdings: Holdings
    units: Sequence[Sequence[Group]]
    receives: bool
    fullest: Peak
    memory: Memory = field(default_factory=Memory)
    leaf: dict[int, int] = field(default_factory=dict)
    totals: dict[int, int] = field(default_factory=dict)
    in_flight: list[tuple[int, list[int], int]] = field(default_factory=list)
    missing: dict[int, int] = field(default_factory=dict)
    filling: dict[int, int] = field(default_factory=dict)
    beside: Stretch | None = None

    @property
    def peak(self) -> MemoryUse:
        return MemoryUse(moment=" of ".join(self.fullest.moment), **self.fullest.parts)

    @property
    def held(self) -> dict[str, int]:
        """By part, with the passes, at the end of the last stretch."""
        assert self.beside is not None, "no stretch has been looked at"
        return self._with(self.beside.parts)

    @cached_property
    def bucket_of(self) -> Mapping[int, int]:
        return {h.value: b for b, bucket in enumerate(self.holdings.buckets) for h in bucket.members}

    def follow(self, stretches: Sequence[Stretch], *, last: bool) -> None:
        """One microbatch."""
        self.missing = {b: len(bucket.members) for b, bucket in enumerate(self.holdings.buckets)}
        for self.beside in stretches:
            if (peak := self.beside.peak) is not None:
                self._look(peak.total, peak.parts, peak.moment)
            arrival = self.beside.arrival
            if arrival is None:
                self._end(last)
            elif arrival.held is not None:
                self._arrived(arrival.held, arrival.size, last)
            else:
                self._unit(arrival.number, arrival.size)

    def _with(self, parts: Mapping[str, int]) -> dict[str, int]:
        return {part: size + parts[part] for part, size in self.memory.parts.items()}

    def _look(self, total: int, parts: Mapping[str, int], moment: tuple[str, ...]) -> None:
        if total + self.memory.total > self.fullest.total:
            self.fullest = Peak(total + self.memory.total, self._with(parts), moment)

    def _note(self) -> None:
        assert self.beside is not None, "something arrives at the end of a stretch"
        self._look(self.beside.total, self.beside.parts, ("reduction of gradients",))

    def _arrived(self, held: Held, num_bytes: int, last: bool) -> None:
        """The whole local gradient of a parameter."""
        v = held.value
        if v not in self.leaf:
            self.leaf[v] = self.memory.new(num_bytes, "gradients")
        b = self.bucket_of.get(v)
        if b is not None and (last or held.stage == 2):
            bucket = self.holdings.buckets[b]
            self._fill(b, bucket, [self.leaf.pop(v)])
            self.missing[b] -= 1
            if self.missing[b] == 0:
                self._launch(b, bucket)

    def _unit(self, s: int, n: int) -> None:
        """Those of weights that were gathered for a segment."""
        unit, key = self.units[s][n], -1 - (s << 10) - n
        grads = [self.leaf.pop(h.value) for h in unit.members if h.value in self.leaf]
        if grads:
            self._fill(key, unit, grads)
            self._launch(key, unit)

    def _fill(self, key: int, bucket: Group, grads: Sequence[int]) -> None:
        """Copy gradients to the rows of their bucket and drop them; of a leaf's that is alone the rows are made."""
        if key >= 0 and bucket.sent_whole:
            while len(self.in_flight) >= IN_FLIGHT:
                self._collect()
            self.filling[key] = self.memory.move(grads[0], "communication")
            return
        if key not in self.filling:
            while len(self.in_flight) >= IN_FLIGHT:
                self._collect()
            self.filling[key] = self.memory.new(bucket.rows, "communication")
        self._note()
        for storage in grads:
            self.memory.drop(storage)

    def _launch(self, key: int, bucket: Group) -> None:
        rows = self.filling.pop(key)
        if bucket.stage == 0:
            self.totals[key] = rows
        else:
            sent = [rows, self.memory.new(bucket.rows_of_others if self.receives else 0, "communication")]
            self.in_flight.append((key, sent, self.memory.new(bucket.part, "communication")))
            self._note()

    def _collect(self) -> None:
        key, sent, part = self.in_flight.pop(0)
        for storage in sent:
            self.memory.drop(storage)
        if key in self.totals:
            self.memory.drop(part)
        else:
            self.totals[key] = self.memory.move(part, "gradients")

    def _end(self, last: bool) -> None:
        for key in list(self.filling):
            self._launch(key, self.holdings.buckets[key])
        while self.in_flight:
            self._collect()
        if not last:
            return
        device = not self.program.residency.offload
        for key, storage in self.totals.items():
            members = self.holdings.buckets[key].members if key >= 0 else self.units[(-1 - key) >> 10][(-1 - key) & 1023].members
            self._deliver(storage, members, device)
        for v, storage in self.leaf.items():
            self._deliver(storage, [self.holdings.parameters[v]], device)

    def _deliver(self, storage: int, members: Sequence[Held], device: bool) -> None:
        """Gradients as the optimizer wants them: in the dtype of what it updates."""
        memory = self.memory
        if device and all(h.stored == h.reduced if h.reduced_over * h.ranks > 1 else h.stored == h.working for h in members):
            memory.move(storage, "gradients")
            return
        if device:
            memory.new(sum(h.stored for h in members), "gradients")
            self._note()
        memory.drop(storage)
