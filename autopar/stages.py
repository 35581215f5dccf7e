"""A program cut into the stages of a pipeline, each a program of its own.

Values keep their numbers. A stage holds the operators of its range that depend on a parameter, and all those that do not (masks,
positions) which it needs: the inputs they are made of are on every rank, so computing them again costs less than sending; what is made of
no input either is there once for all stages of a rank. Whatever else crosses a cut goes from the stage that makes it straight to each that
reads it, once, in the layout in which it is handed to its users there.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from autopar.core.graph import DTYPE_BYTES, OpGraph, Value
from autopar.core.ledger import Ledger, LedgerKey
from autopar.core.pipeline import PP, Pipeline
from autopar.core.schedule import Action, Edge, Kind
from autopar.errors import PlanMismatchError, UsageError
from autopar.program import Program


@dataclass(frozen=True)
class Stage:
    """`takes[s]`: values that come from stage s; `gives[t]`: those that go to stage t; `output_numbers`: which of the model's outputs the
    stage makes."""

    number: int
    program: Program
    takes: Mapping[int, tuple[int, ...]]
    gives: Mapping[int, tuple[int, ...]]
    output_numbers: tuple[int, ...]

    @cached_property
    def answered(self) -> frozenset[int]:
        """Values from other stages whose gradient goes back to them."""
        live = self.program.graph.differentiated
        return frozenset(v for values in self.takes.values() for v in values if v in live)

    @property
    def modes(self) -> tuple[str, ...]:
        """Of recomputation, by segment."""
        return tuple(map(self.program.mode, range(len(self.program.graph.segments))))

    @property
    def own_outputs(self) -> tuple[int, ...]:
        """The model's outputs that this stage makes."""
        return self.program.graph.outputs[: self.program.first_handed]


def merged(groups: Iterable[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Groups of stages, those that meet made one."""
    found: list[set[int]] = []
    for stages in groups:
        meeting = [g for g in found if g & set(stages)]
        found = [g for g in found if g not in meeting] + [set(stages).union(*meeting)]
    return tuple(sorted(tuple(sorted(g)) for g in found))


def tied_bytes(program: Program, v: int) -> int:
    """Bytes of a rank's part of the gradient of a parameter that is summed over stages."""
    stored = program.residency.precision.stored(program.graph.values[v].meta.dtype)
    return math.prod(program.local_shape(v, program.stored[v])) * DTYPE_BYTES[stored]


@dataclass(frozen=True)
class Stages:
    """All stages of a program. `shared[v]`: the stages that hold a parameter of several."""

    whole: Program
    pipeline: Pipeline
    stages: tuple[Stage, ...]

    def in_modes(self, recompute: Mapping[str, str]) -> "Stages":
        """The same under other modes of recomputation."""
        made = replace(self, whole=self.whole.in_modes(recompute), stages=tuple([replace(s, program=s.program.in_modes(recompute)) for s in self.stages]))
        forms = tuple([(number, stage.modes) for number, stage in zip(self._form_numbers, made.stages, strict=True)])
        vars(made).update(forms=forms, edges=self.edges, shared=self.shared, tied=self.tied)
        return made

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        return tuple(Edge(s.number, t, bool(self.answers(s.number, t))) for s in self.stages for t in sorted(s.gives))

    def answers(self, source: int, target: int) -> tuple[int, ...]:
        """Values from `source` whose gradient comes back from `target`."""
        return tuple(v for v in self.stages[source].gives[target] if v in self.stages[target].answered)

    def message(self, action: Action) -> tuple[int, ...]:
        """The values that a send or receive carries."""
        assert action.peer is not None
        source, target = sorted((action.stage, action.peer))
        return self.stages[source].gives[target] if action.kind in (Kind.SEND_F, Kind.RECV_F) else self.answers(source, target)

    @cached_property
    def shared(self) -> Mapping[int, tuple[int, ...]]:
        held = {v: tuple(s.number for s in self.stages if v in s.program.storage) for v in self.whole.graph.params}
        return {v: stages for v, stages in held.items() if len(stages) > 1}

    @cached_property
    def tied(self) -> tuple[tuple[int, ...], ...]:
        """Groups of stages that share a weight; groups that meet are one."""
        return merged(self.shared.values())

    def shared_by(self, first: int) -> Mapping[int, tuple[int, ...]]:
        """Trained parameters that a group of stages shares, and the stages that hold each; `first`: the group's first stage."""
        group = next(g for g in self.tied if g[0] == first)
        return {v: stages for v, stages in self.shared.items() if stages[0] in group and v in self.whole.graph.differentiated}

    @cached_property
    def alike(self) -> tuple[Program, ...]:
        """For every stage the program of the first one that is the same but for names: what is found of that is so of all."""
        first: dict[Hashable, Program] = {}
        return tuple(first.setdefault(form, stage.program) for form, stage in zip(self.forms, self.stages, strict=True))

    @cached_property
    def forms(self) -> tuple[Hashable, ...]:
        """Of every stage's program; None where there is but one."""
        forms = {id(stage.program): stage.program.form() if len(self.stages) > 1 else None for stage in self.stages}
        return tuple(forms[id(stage.program)] for stage in self.stages)

    @cached_property
    def _form_numbers(self) -> tuple[int, ...]:
        """Equal where forms are."""
        number: dict[Hashable, int] = {}
        return tuple(number.setdefault(form, len(number)) for form in self.forms)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first operator of each, by its number in the whole graph."""
        return _first_ops(self.whole.graph, self.pipeline)

    @cached_property
    def placement(self) -> tuple[int, ...]:
        return tuple(s % self.pipeline.num_ranks for s in range(len(self.stages)))

    @property
    def gathered_ahead(self) -> frozenset[tuple[int, ...]]:
        """Sets of mesh axes over which a rank gathers parameters of one stage, once a step, while it computes another."""
        return frozenset(zero.axes for zero in self.whole.residency.zero.values() if zero.stage < 3 and self.pipeline.virtual_stages > 1)

    def message_bytes(self, source: int, target: int, *, back: bool = False) -> int:
        """Bytes of one microbatch that one rank of `source` sends to its counterpart of `target`, or that come back."""
        program = self.stages[target].program
        return sum(program.local_bytes(v, program.produced[v]) for v in (self.answers(source, target) if back else self.stages[source].gives[target]))

    def ledger(self, rank: int, alike: Sequence[Program] = ()) -> Ledger:
        """Predicted communication of a training step of each device of one rank of the pipeline; `alike`: programs to take in place of those of the stages."""
        return Ledger.sum(self._entries(rank, alike or self.alike))

    def _entries(self, rank: int, alike: Sequence[Program]) -> Iterable[tuple[LedgerKey, int]]:
        times, placement = self.whole.residency.micro_batches, self.placement
        for program, where in zip(alike, placement, strict=True):
            if where == rank:
                yield from program.ledger.input_bytes
        for edge in self.edges:
            ends = placement[edge.source], placement[edge.target]
            if ends[0] != ends[1]:
                there, back = self.message_bytes(edge.source, edge.target), self.message_bytes(edge.source, edge.target, back=True)
                sent = (there if ends[0] == rank else 0) + (back if ends[1] == rank else 0)
                received = (there if ends[1] == rank else 0) + (back if ends[0] == rank else 0)
                yield ("send", PP, 2), sent * times
                yield ("receive", PP, 2), received * times
        for v, stages in self.shared.items():
            ranks = self.ranks_of(stages)
            if rank in ranks and len(ranks) > 1 and v in self.whole.graph.differentiated:
                yield ("all_reduce", PP, len(ranks)), self.tied_bytes(v)

    def ranks_of(self, stages: Sequence[int]) -> tuple[int, ...]:
        """Ranks of the pipeline that hold some of these stages."""
        return tuple(sorted({self.placement[s] for s in stages}))

    def tied_bytes(self, v: int) -> int:
        return tied_bytes(self.whole, v)


def one_stage(program: Program) -> Stages:
    """A program that is not cut, as a pipeline of one."""
    return Stages(program, Pipeline(1, ()), (Stage(0, program, {}, {}, tuple(range(len(program.graph.outputs)))),))


def copies(program: Program, pipeline: Pipeline) -> Stages:
    """The whole program on every rank, for its share of the microbatches. Raises UsageError for a model whose buffers every microbatch changes, which copies
    would each change on their own."""
    if program.graph.updates:
        name = program.graph.values[program.graph.updates[0][0]].source[0]
        raise UsageError(f"buffer {name} is updated by every microbatch; copies of the model that share them out would each have their own")
    outputs = tuple(range(len(program.graph.outputs)))
    alike = {share: replace(program, residency=replace(program.residency, micro_batches=share)) for share in sorted(set(pipeline.shares))}
    return Stages(program, pipeline, tuple(Stage(s, alike[share], {}, {}, outputs) for s, share in enumerate(pipeline.shares)))


def cut_into_stages(program: Program, pipeline: Pipeline | None) -> Stages:
    """The stages of a program, one without a pipeline; raises PlanMismatchError where a cut is not where the pipeline says, UsageError where it cannot be made."""
    if pipeline is not None and pipeline.shares:
        return copies(program, pipeline)
    return one_stage(program) if pipeline is None else _Cutter(program, _first_ops(program.graph, pipeline)).stages(pipeline)


def _first_ops(graph: OpGraph, pipeline: Pipeline) -> tuple[int, ...]:
    number = {op.name: i for i, op in enumerate(graph.ops)}
    missing = next((name for name in pipeline.starts if name not in number), None)
    if missing is not None:
        raise PlanMismatchError(f"the plan cuts before operator {missing}, which the model does not have; plan again")
    starts = (0, *(number[name] for name in pipeline.starts))
    if any(a >= b for a, b in zip(starts, starts[1:])):
        raise PlanMismatchError(f"the plan's cuts {', '.join(pipeline.starts)} are not in the order of the model; plan again")
    return starts


class _Cutter:
    def __init__(self, program: Program, starts: Sequence[int]) -> None:
        self.program, self.graph = program, program.graph
        self.num_stages = len(starts)
        graph = self.graph
        self.home = [s for s, (start, end) in enumerate(pairwise((*starts, len(graph.ops)))) for _ in range(start, end)]
        self.maker = {v: self.home[i] for i, op in enumerate(graph.ops) for v in op.results}
        self.bound: list[list[int]] = [[] for _ in starts]  # operators that stay in their range
        self.free: set[int] = set()  # those that are computed where they are needed
        self.roots: list[set[int]] = [set() for _ in starts]  # values that a stage must have
        for i, op in enumerate(graph.ops):
            if graph.searched.isdisjoint(op.results):
                self.free.add(i)
            else:
                self.bound[self.home[i]].append(i)
                self.roots[self.home[i]].update(op.operands)
        for v in graph.outputs:
            self.roots[self._at(v)].add(v)
        for _, v in graph.updates:
            self.roots[self._at(v)].add(v)
        self.ops = [self._ops(s) for s in range(self.num_stages)]

    @cached_property
    def elsewhere(self) -> tuple[Value, ...]:
        """All values as a stage sees them that has none."""
        return tuple([value if value.role == "op" else replace(value, role="elsewhere") for value in self.graph.values])

    def _at(self, v: int) -> int:
        """The stage that hands a value to the user; one that is no result of an operator comes from the last."""
        return self.maker.get(v, self.num_stages - 1)

    def _ops(self, stage: int) -> list[int]:
        needed = set(self.roots[stage])
        found = []
        for i in sorted((*self.bound[stage], *self.free), reverse=True):
            op = self.graph.ops[i]
            if i not in self.free or not needed.isdisjoint(op.results):
                found.append(i)
                needed.update(op.operands)
        return found[::-1]

    def stages(self, pipeline: Pipeline) -> Stages:
        made = [{v for i in ops for v in self.graph.ops[i].results} for ops in self.ops]
        read = [{v for i in ops for v in self.graph.ops[i].operands} | roots for ops, roots in zip(self.ops, self.roots)]
        takes: list[dict[int, tuple[int, ...]]] = []
        for s in range(self.num_stages):
            foreign = sorted(v for v in read[s] - made[s] if v in self.maker)
            sources = sorted({self.maker[v] for v in foreign})
            takes.append({source: tuple(v for v in foreign if self.maker[v] == source) for source in sources})
        stages: list[Stage] = []
        answered: set[int] = set()
        for s in reversed(range(self.num_stages)):
            gives = {t: takes[t][s] for t in range(s + 1, self.num_stages) if s in takes[t]}
            received = [v for values in takes[s].values() for v in values]
            numbers = tuple(n for n, v in enumerate(self.graph.outputs) if self._at(v) == s)
            stage = Stage(s, self._program(s, received, gives, answered), takes[s], gives, numbers)
            answered |= stage.answered
            stages.append(stage)
        self._check(pipeline, stages[::-1])
        return Stages(self.program, pipeline, tuple(stages[::-1]))

    def _program(self, s: int, received: Sequence[int], gives: Mapping[int, tuple[int, ...]], answered: set[int]) -> Program:
        """The part of the program that stage `s` runs; `answered`: values that later stages send gradients of."""
        whole, graph, ops = self.program, self.graph, self.ops[s]
        handed = tuple(dict.fromkeys(v for values in gives.values() for v in values))
        own = [n for n, v in enumerate(graph.outputs) if self._at(v) == s]
        updates = [n for n, (_, v) in enumerate(graph.updates) if self._at(v) == s]
        held = {v for i in ops for v in graph.ops[i].operands} | {graph.outputs[n] for n in own} | {b for n in updates for b in graph.updates[n]}
        seeds = tuple(v for v in graph.seeds if any(graph.outputs[n] == v for n in own))
        values, produced, relay = list(self.elsewhere), list(whole.produced), dict(whole.relay)
        for v in held:
            values[v] = graph.values[v]
        for v in received:
            values[v], produced[v] = replace(graph.values[v], role="input"), relay.pop(v, (produced[v],))[-1]
        part = graph.part(
            ops, tuple(values), outputs=(*(graph.outputs[n] for n in own), *handed), updates=tuple(graph.updates[n] for n in updates),
            differentiate=(*seeds, *(v for v in handed if v in answered and v not in seeds)),
        )  # fmt: skip
        params = {v: None for v in graph.params if v in held}
        made = replace(
            whole, graph=part,
            rules=tuple(whole.rules[i] for i in ops), strategies=tuple(whole.strategies[i] for i in ops),
            storage={v: whole.storage[v] for v in params}, deferred={v: whole.deferred[v] for v in params},
            produced=tuple(produced), relay=relay,
            routes={(n, k): whole.routes[i, k] for n, i in enumerate(ops) for k in range(len(graph.ops[i].operands))},
            output_routes=(*(whole.output_routes[n] for n in own), *((relay.get(v, (produced[v],))[-1],) for v in handed)),
            update_routes=tuple(whole.update_routes[n] for n in updates),
            residency=replace(whole.residency, zero={v: z for v, z in whole.residency.zero.items() if v in params}),
            num_handed=len(handed),
        )  # fmt: skip
        vars(made).update(once=whole.once, communicates_once=whole.communicates_once)  # what stands for all does so in every stage
        return made

    def _check(self, pipeline: Pipeline, stages: Sequence[Stage]) -> None:
        for stage in stages:
            if not stage.program.storage:
                raise UsageError(f"stage {stage.number} of the pipeline holds no parameter; cut elsewhere")
        for buffer, v in self.graph.updates:
            users = {s.number for s in stages if s.program.graph.values[buffer].role == "buffer"}
            if len(users) > 1 and self._at(v) in users:
                name = self.graph.values[buffer].source[0]
                raise UsageError(f"buffer {name} is updated by stage {self._at(v)} and read by stages {sorted(users)}; cut elsewhere")
