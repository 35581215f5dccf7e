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
from autopar.planner.allocator import Memory, Peak
from autopar.planner.arrivals import Arrival, Arrivals, Stretch
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
    """The passes of a rank, gradients of parameters left out from where they are whole (`Arrivals`). `saved`: by segment and step; `opening`: the fullest moment before the
    passes, `between`: what is held between them; `stretches`: of the microbatch at hand."""

    program: Program
    steps: Steps
    holdings: Holdings
    memory: Memory
    saved: dict[int, dict[int, list[int]]] = field(default_factory=dict)
    inputs: dict[int, Values] = field(default_factory=dict)
    taped: dict[int, Values] = field(default_factory=dict)
    gradient: Values = field(default_factory=dict)
    fetched: tuple[int, list[int]] | None = None
    awaited: dict[int, int] = field(default_factory=dict)
    handed: list[int] = field(default_factory=list)
    first_storage: list[int] = field(default_factory=list)
    opening: Peak | None = None
    between: Mapping[str, int] = field(default_factory=dict)
    stretches: list[Stretch] = field(default_factory=list)

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
        self._refresh()
        self.opening, self.between = self.memory.fullest(), self.memory.parts.copy()

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

    def _refresh(self) -> None:
        """Working copies, gathered once a step."""
        open_at_a_time = [g.in_flight_bytes for g in self.holdings.flats]
        for n in range(len(open_at_a_time)):
            self.memory.note("gathering of parameters", workspace=sum(open_at_a_time[n : n + IN_FLIGHT]), part="communication")

    # --- backward ----------------------------------------------------------------------------------------------------

    def backward(self) -> None:
        self.awaited, self.stretches = dict(self.contributions), []
        runs = self.steps.runs
        for s, saved in self.saved.items():
            steps = runs[s].script.steps
            for i in [i for i in saved if not steps[i].live]:
                self._drop(saved.pop(i))
        for n, num_bytes in self.steps.seeds:
            self.gradient[n] = self.memory.new(num_bytes, "temporaries")
        self._drop(self.handed)
        for s in reversed(range(len(runs))):
            self._back(s)
        self._drop(self.gradient.values())
        self.gradient.clear()
        self._until()

    def _until(self, arrival: Arrival | None = None) -> None:
        self.stretches.append(Stretch(self.memory.fullest(), self.memory.total, self.memory.parts.copy(), arrival))

    @property
    def is_as_before(self) -> bool:
        """Whether a microbatch finds what the first one found."""
        return self.fetched is None and self.memory.parts == self.between

    def _back(self, s: int) -> None:
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
                self._differentiate(step, run, read)
        self._drop(self.inputs.pop(s, {}).values())
        self._drop(self.taped.pop(s, {}).values())
        self._drop(weights)
        for n, unit in enumerate(self.units[s]):
            if unit.trained:
                self._until(Arrival(s, n, None))

    def _differentiate(self, step: Step, run: Run, saved: Iterable[int]) -> None:
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
                    self._arrived(self.holdings.parameters[self.steps.leaves[n]], gradient.pop(n))

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

    def _arrived(self, held: Held, storage: int) -> None:
        """The whole local gradient of a parameter: from here on it is no matter of the passes, but in memory of its own."""
        num_bytes = held.working if self.memory.shared(storage) else self.memory.size(storage)
        self.memory.drop(storage)
        self._until(Arrival(held.value, num_bytes, held))


@dataclass(frozen=True)
class Liveness:
    """A program with its steps and what it holds of parameters, neither of which depends on what is computed again. `_begun`: a walk that stands at the end of its first
    forward, for who goes on from there."""

    program: Program
    steps: Steps
    holdings: Holdings
    _begun: list[_Walk] = field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, program: Program) -> "Liveness":
        return cls(program, steps_of(program), Holdings(program))

    def _forward(self) -> _Walk:
        """The passes up to the end of the first forward."""
        walk = _Walk(self.program, self.steps, self.holdings, resident(self.program, self.holdings))
        walk.once()
        walk.forward()
        return walk

    def kept_by_segment(self) -> tuple[int, ...]:
        """For each segment, and for what leads to the outputs, the bytes of its results that one microbatch keeps from forward to backward; what
        comes from other stages is counted with the first."""
        walk = self._forward()
        self._begun[:] = [walk]
        first = [*walk.first_storage, walk.memory.num_storages]
        kept = [walk.memory.held_between(a, b) for a, b in zip(first, first[1:])]
        return (kept[0] + received_bytes(self.program), *kept[1:])

    def moments(self, engine: Engine) -> tuple[MemoryUse, ...]:
        """The fullest moment of the passes, and the optimizer step; of a rank that holds nothing else."""
        residency = self.program.residency
        walk = self._begun.pop() if self._begun else self._forward()
        assert walk.opening is not None, "what a rank holds is looked at before the passes"
        arrivals, times = Arrivals(self.program, self.holdings, walk.units, engine.receives, walk.opening), min(residency.micro_batches, 3)
        for m in range(times):
            if m == 0 or not walk.is_as_before:
                if m:
                    walk.forward()
                walk.backward()
            arrivals.follow(walk.stretches, last=m + 1 == times)
        stored = [h.stored for h in self.holdings.parameters.values() if h.trained]
        if not stored or residency.offload:
            return (arrivals.peak,)
        parts = arrivals.held | {"activations": 0}  # the square root of the second moment, and its quotient
        parts["temporaries"] += 2 * max(stored) if engine.one_by_one else sum(stored)
        return arrivals.peak, MemoryUse(moment=UPDATE, **parts)


def kept_by_segment(program: Program) -> tuple[int, ...]:
    """See `Liveness.kept_by_segment`."""
    return Liveness.of(program).kept_by_segment()


def memory_use(program: Program, engine: Engine = Engine(), beside: Beside = Beside()) -> MemoryUse:
    """The fullest moment of a training step with AdamW on one rank."""
    return fullest(Liveness.of(program).moments(engine), beside)
