"""How much memory a rank holds when most is held: the emitted program walked step by step, every tensor from its making to its last use.

What is walked is what the runtime does: what is the same for all microbatches, and is kept through them; the forward of every segment, whose
values die at their last use unless the backward reads them; the backward in reverse, with gradients in the memory that autograd gives them (those of
sums and views share it); what blocks compute again; weights gathered one unit ahead; gradients in buckets; the optimizer. Microbatches after the
second are like it, so at most three are walked: one on empty gradients, one on full ones, one that ends in the reduction.

A stage of a pipeline is a program of its own. What its rank holds besides (`Beside`: other microbatches in flight, its other stages) stays
as it is while this program runs. What is received is kept until it has been differentiated, and so is what is handed on.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from autopar.core.again import KEPT, UNREAD
from autopar.core.buckets import IN_FLIGHT
from autopar.core.cluster import Cluster
from autopar.core.memory import MemoryUse
from autopar.core.residency import computes_again
from autopar.planner.allocator import Memory
from autopar.planner.held import UPDATE, Beside, Group, Held, Holdings, fullest, received_bytes, resident
from autopar.planner.regather import gathers, regathered
from autopar.planner.steps import ONCE, Run, Step, Steps, steps_of
from autopar.program import Program


@dataclass(frozen=True, slots=True)
class Engine:
    """What executes a step. `receives`: a reduce-scatter holds what all others send before it adds, as over gloo; `one_by_one`: the optimizer updates one
    parameter after the other, as torch does on a CPU, elsewhere all at once with a temporary for each."""

    receives: bool = False
    one_by_one: bool = False

    @classmethod
    def of(cls, cluster: Cluster) -> "Engine":
        return cls(receives=cluster.is_local, one_by_one=cluster.is_local)


Values = dict[int, int]
"""Node that owns memory -> storage."""


@dataclass
class _Walk:
    """One training step of a rank. `leaf`: gradients of working copies; `totals`: sums of buckets (negative keys: of units); `saved`: by segment and step."""

    program: Program
    steps: Steps
    holdings: Holdings
    memory: Memory
    engine: Engine
    saved: dict[int, dict[int, list[int]]] = field(default_factory=dict)
    inputs: dict[int, Values] = field(default_factory=dict)
    taped: dict[int, Values] = field(default_factory=dict)
    gradient: Values = field(default_factory=dict)
    leaf: Values = field(default_factory=dict)
    totals: Values = field(default_factory=dict)
    in_flight: list[tuple[int, list[int], int]] = field(default_factory=list)
    fetched: tuple[int, list[int]] | None = None
    awaited: dict[int, int] = field(default_factory=dict)
    missing: dict[int, int] = field(default_factory=dict)
    filling: Values = field(default_factory=dict)
    handed: list[int] = field(default_factory=list)
    first_storage: list[int] = field(default_factory=list)

    # --- what is known beforehand ------------------------------------------------------------------------------------

    @cached_property
    def units(self) -> tuple[tuple[Group, ...], ...]:
        return (*self.holdings.units(), ())

    @cached_property
    def neighbours(self) -> Mapping[int, tuple[int | None, int | None]]:
        """Segment with gathered weights -> the one before it that has a backward, and the one after it."""
        chain = [s for s, units in enumerate(self.units) if units]
        backward = self.program.backward_segments
        return {s: (max((t for t in chain if t < s and backward[t]), default=None), min((t for t in chain if t > s), default=None)) for s in chain}

    @cached_property
    def contributions(self) -> Mapping[int, int]:
        """How many steps contribute to the gradient of each parameter."""
        found: dict[int, int] = {}
        for run in self.steps.runs:
            for n, times in run.script.contributions:
                if run.numbers[n] in self.steps.leaves:
                    found[run.numbers[n]] = found.get(run.numbers[n], 0) + times
        return found

    @cached_property
    def bucket_of(self) -> Mapping[int, int]:
        return {h.value: b for b, bucket in enumerate(self.holdings.buckets) for h in bucket.members}

    def again(self, s: int) -> bool:
        """Whether a segment is computed again."""
        return s < len(self.program.graph.segments) and computes_again(self.program.mode(s))

    # --- once a step -------------------------------------------------------------------------------------------------

    def once(self) -> None:
        """What is the same for all microbatches, kept until the next step."""
        values: Values = {}
        self._run(ONCE, values, "preparation", keep=False)
        for storage in values.values():
            self.memory.move(storage, "parameters")

    # --- forward -----------------------------------------------------------------------------------------------------

    def forward(self) -> None:
        values: Values = {}
        self.first_storage = []
        for s, run in enumerate(self.steps.runs):
            self.first_storage.append(self.memory.num_storages)
            weights = self._gather(s, back=False, moment=("forward", run.where))
            if self.again(s):
                self.inputs[s] = {o: self.memory.hold(values[o]) for n in run.script.inputs if (o := run.numbers[n]) in values}
            self._run(s, values, "forward", keep=not self.again(s))
            self._drop(weights)
        handed = self.steps.ends[self.program.first_handed : len(self.program.graph.outputs)]
        owners = dict.fromkeys(owner for owner, live in handed if live)
        self.handed = [self.memory.move(self.memory.hold(values[o]), "activations") for o in owners if o in values]
        self._drop(values.values())  # the loss has read them

    def _run(self, s: int, values: Values, what: str, *, keep: bool) -> None:
        memory, replay, run = self.memory, self.program.replays.get(s, ()), self.steps.once if s == ONCE else self.steps.runs[s]
        numbers, expiring, tape, saved = run.numbers, run.expiring, self.taped.setdefault(s, {}), self.saved.setdefault(s, {})
        again, taping = what != "forward", bool(replay) and not keep
        assert not replay or len(replay) == len(run.script.steps), "steps are the parts of a segment"
        gathered = gathers(run.script, replay) if keep and not again else {}
        for i, step in enumerate(run.script.steps):
            unmade = again and replay and replay[i] == UNREAD and (step.contraction or step.collective)
            for n, num_bytes in step.made:
                o = numbers[n]
                values[o] = tape.pop(o) if again and o in tape else memory.new(0 if unmade else num_bytes, "temporaries")
            kept = [memory.new(step.kept_bytes, "activations" if keep else "temporaries")] if step.kept_bytes else []
            if memory.total + step.workspace_bytes > memory.most:  # hardly ever, and a call takes longer than this
                memory.note(what, step.moment or run.block, workspace=step.workspace_bytes, part=step.workspace_part)
            if keep and step.recorded:
                source = () if step.source is None or gathered.get(step.results[0]) != i else (step.source,)
                for n in (*step.saved, *source):
                    if n not in gathered and (o := numbers[n]) in values:
                        kept.append(memory.move(memory.hold(values[o]), "activations"))
                if kept:
                    saved[i] = kept
            elif kept:
                self._drop(kept)
            if taping and replay[i] == KEPT:
                tape.update({numbers[n]: memory.move(memory.hold(values[numbers[n]]), "activations") for n, _ in step.made})
            for n in expiring.get(i, ()):
                o = numbers[n]
                if o in values:
                    memory.drop(values.pop(o))
        self._drop(values.pop(numbers[n]) for n in expiring.get(len(run.script.steps), ()) if numbers[n] in values)

    def _drop(self, storages: Iterable[int]) -> None:
        for storage in list(storages):
            self.memory.drop(storage)

    def _gather(self, s: int, *, back: bool, moment: tuple[str, str]) -> list[int]:
        """Weights of a segment; those of the segment that comes next are on their way when these are there."""
        if not self.units[s]:
            return []
        if self.fetched is None or self.fetched[0] != s:
            self._drop(self.fetched[1] if self.fetched is not None else ())
            self._fetch(s, moment)
        assert self.fetched is not None
        rows, self.fetched = self.fetched[1], None
        ahead = self.neighbours[s][0 if back else 1]
        if ahead is not None:
            self._fetch(ahead, moment)
        found = []
        for unit, row in zip(self.units[s], rows):
            found.append(self.memory.new(unit.copies, "parameters") if unit.copies else self.memory.move(self.memory.hold(row), "parameters"))
            self.memory.note(*moment)
            self.memory.drop(row)
        return found

    def _fetch(self, s: int, moment: tuple[str, str]) -> None:
        self.fetched = (s, [self.memory.new(unit.gathered_rows, "communication") for unit in self.units[s]])
        self.memory.note(*moment)

    def refresh(self) -> None:
        """Working copies, gathered once a step."""
        open_at_a_time = [g.in_flight_bytes for g in self.holdings.flats]
        for n in range(len(open_at_a_time)):
            self.memory.note("gathering of parameters", workspace=sum(open_at_a_time[n : n + IN_FLIGHT]), part="communication")

    # --- backward ----------------------------------------------------------------------------------------------------

    def backward(self, *, last: bool) -> None:
        self.awaited = dict(self.contributions)
        self.missing = {b: len(bucket.members) for b, bucket in enumerate(self.holdings.buckets)}
        runs = self.steps.runs
        for s, saved in self.saved.items():
            steps = runs[s].script.steps
            for i in [i for i in saved if not steps[i].live]:
                self._drop(saved.pop(i))
        for n, num_bytes in self.steps.seeds:
            self.gradient[n] = self.memory.new(num_bytes, "temporaries")
        self._drop(self.handed)
        for s in reversed(range(len(runs))):
            self._back(s, last)
        self._drop(self.gradient.values())
        self.gradient.clear()
        self._end(last)

    def _back(self, s: int, last: bool) -> None:
        run = self.steps.runs[s]
        weights = self._gather(s, back=True, moment=("backward", run.where)) if run.script.live else []
        if self.again(s):
            values = {o: self.memory.hold(storage) for o, storage in self.inputs[s].items()}
            self._run(s, values, "computing again", keep=True)
            self._drop(values.values())
        gathered = {} if self.again(s) else regathered(run.script, self.program.replays.get(s, ()))
        there, saved = dict[int, int](), self.saved.get(s, {})
        for i, step in reversed([*enumerate(run.script.steps)]):
            if step.live:
                read = saved.pop(i, [])
                for gather in gathered.get(i, ()) if gathered else ():
                    if gather.first:
                        self._drop(saved.pop(gather.gather, ()))
                        there[gather.owner] = self.memory.new(gather.num_bytes, "temporaries")
                        self.memory.note("backward", step.moment or run.block, workspace=gather.workspace_bytes, part="communication")
                    read += [there.pop(gather.owner)] if gather.last else []
                self._differentiate(step, run, read, last)
        self._drop(self.inputs.pop(s, {}).values())
        self._drop(self.taped.pop(s, {}).values())
        self._drop(weights)
        for n, unit in enumerate(self.units[s]):
            grads = [self.leaf.pop(h.value) for h in unit.members if h.value in self.leaf]
            if unit.trained and grads:
                self._fill(-1 - (s << 10) - n, unit, grads)
                self._launch(-1 - (s << 10) - n, unit)

    def _differentiate(self, step: Step, run: Run, saved: Iterable[int], last: bool) -> None:
        memory, numbers, gradient, moment = self.memory, run.numbers, self.gradient, step.moment or run.block
        arrived = [gradient.pop(n) for here in step.results if (n := numbers[here]) in gradient]
        if arrived:
            found = [memory.hold(arrived[0]) if new is None else memory.new(new, "temporaries") for _, _, new in step.gradients]
        if memory.total + step.backward_workspace_bytes > memory.most:
            memory.note("backward", moment, workspace=step.backward_workspace_bytes, part=step.workspace_part)
        for storage in (*arrived, *saved):
            memory.drop(storage)
        for (here, num_bytes, _), storage in zip(step.gradients, found) if arrived else ():
            n = numbers[here]
            if n in gradient:
                self._add(n, num_bytes, storage, moment)
            else:
                gradient[n] = storage
            if n in self.awaited:
                self.awaited[n] -= 1
                if self.awaited[n] == 0:
                    self._arrived(self.holdings.parameters[self.steps.leaves[n]], gradient.pop(n), last)

    def _add(self, n: int, num_bytes: int, storage: int, moment: str) -> None:
        """Sum in the memory of one of the two where nobody else reads it."""
        memory, before = self.memory, self.gradient[n]
        if not memory.shared(before):
            memory.drop(storage)
        elif not memory.shared(storage):
            memory.drop(before)
            self.gradient[n] = storage
        else:
            self.gradient[n] = memory.new(num_bytes, "temporaries")
            memory.note("backward", moment)
            self._drop((before, storage))

    def _arrived(self, held: Held, storage: int, last: bool) -> None:
        """The whole local gradient of a parameter."""
        memory, v = self.memory, held.value
        if v in self.leaf:
            memory.drop(storage)
        else:
            if memory.shared(storage):
                memory.drop(storage)
                storage = memory.new(held.working, "gradients")
            self.leaf[v] = memory.move(storage, "gradients")
        b = self.bucket_of.get(v)
        if b is not None and (last or held.stage == 2):
            bucket = self.holdings.buckets[b]
            self._fill(b, bucket, [self.leaf.pop(v)])
            self.missing[b] -= 1
            if self.missing[b] == 0:
                self._launch(b, bucket)

    def _fill(self, key: int, bucket: Group, grads: list[int]) -> None:
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
        self.memory.note("reduction of gradients")
        self._drop(grads)

    def _launch(self, key: int, bucket: Group) -> None:
        rows = self.filling.pop(key)
        if bucket.stage == 0:
            self.totals[key] = rows
        else:
            sent = [rows, self.memory.new(bucket.rows_of_others if self.engine.receives else 0, "communication")]
            self.in_flight.append((key, sent, self.memory.new(bucket.part, "communication")))
            self.memory.note("reduction of gradients")

    def _collect(self) -> None:
        key, sent, part = self.in_flight.pop(0)
        self._drop(sent)
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
            self._deliver(storage, list(members), device)
        for v, storage in self.leaf.items():
            self._deliver(storage, [self.holdings.parameters[v]], device)

    def _deliver(self, storage: int, members: list[Held], device: bool) -> None:
        """Gradients as the optimizer wants them: in the dtype of what it updates."""
        memory = self.memory
        if device and all(h.stored == h.reduced if h.reduced_over * h.ranks > 1 else h.stored == h.working for h in members):
            memory.move(storage, "gradients")
            return
        if device:
            memory.new(sum(h.stored for h in members), "gradients")
            memory.note("reduction of gradients")
        memory.drop(storage)


@dataclass(frozen=True)
class Liveness:
    """A program with its steps and what it holds of parameters, neither of which depends on what is computed again."""

    program: Program
    steps: Steps
    holdings: Holdings

    @classmethod
    def of(cls, program: Program) -> "Liveness":
        return cls(program, steps_of(program), Holdings(program))

    def _walk(self, engine: Engine) -> _Walk:
        return _Walk(self.program, self.steps, self.holdings, resident(self.program, self.holdings), engine)

    def kept_by_segment(self) -> tuple[int, ...]:
        """For each segment, and for what leads to the outputs, the bytes of its results that one microbatch keeps from forward to backward; what
        comes from other stages is counted with the first."""
        walk = self._walk(Engine())
        walk.once()
        walk.forward()
        first = [*walk.first_storage, walk.memory.num_storages]
        kept = [walk.memory.held_between(a, b) for a, b in zip(first, first[1:])]
        return (kept[0] + received_bytes(self.program), *kept[1:])

    def moments(self, engine: Engine) -> tuple[MemoryUse, ...]:
        """The fullest moment of the passes, and the optimizer step; of a rank that holds nothing else."""
        walk = self._walk(engine)
        memory, residency = walk.memory, self.program.residency
        walk.once()
        walk.refresh()
        times = min(residency.micro_batches, 3)
        for m in range(times):
            walk.forward()
            walk.backward(last=m + 1 == times)
        stored = [h.stored for h in self.holdings.parameters.values() if h.trained]
        if not stored or residency.offload:
            return (memory.peak,)
        parts = memory.parts | {"activations": 0}  # the square root of the second moment, and its quotient
        parts["temporaries"] += 2 * max(stored) if engine.one_by_one else sum(stored)
        return memory.peak, MemoryUse(moment=UPDATE, **parts)


def kept_by_segment(program: Program) -> tuple[int, ...]:
    """See `Liveness.kept_by_segment`."""
    return Liveness.of(program).kept_by_segment()


def memory_use(program: Program, engine: Engine = Engine(), beside: Beside = Beside()) -> MemoryUse:
    """The fullest moment of a training step with AdamW on one rank."""
    return fullest(Liveness.of(program).moments(engine), beside)
