"""A program as the steps that the emitted code makes, each with the memory it takes. Segments that are copies of each other share one script.

A *node* is a value in one layout, its *owner* the node whose memory it lies in: views own none. How long memory lives is not decided here
(`liveness.py`).
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from autopar.core.again import kept_by_selective
from autopar.core.graph import DTYPE_BYTES, Op
from autopar.core.layout import Layout
from autopar.core.moves import COLLECTIVES
from autopar.core.strides import Strides, row_major
from autopar.planner.storages import WRITTEN_OUT, Node, backward_workspace, forward_workspace, in_flight, move_shares, new_gradient_bytes, result_strides
from autopar.program import Program, Route, Tensor, route_steps

ONCE = -1
"""In place of the number of a segment: what is computed once a step, before all of them."""


@dataclass(frozen=True, slots=True)
class Step:
    """One operator or move of a segment; nodes are named by local number (see `Script`).

    `made`: (node that owns new memory, bytes); `saved`: owners of what the backward reads, `kept_bytes`: what it keeps beside them;
    `gradients`: (operand that has one, its bytes, bytes of new memory or None where it shares the result's). `source`: owner of what a collective takes.
    """

    moment: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    made: tuple[tuple[int, int], ...]
    recorded: bool
    live: bool
    saved: tuple[int, ...] = ()
    kept_bytes: int = 0
    workspace_bytes: int = 0
    gradients: tuple[tuple[int, int, int | None], ...] = ()
    backward_workspace_bytes: int = 0
    contraction: bool = False
    collective: bool = False
    source: int | None = None

    @property
    def workspace_part(self) -> str:
        """What its workspace is counted under."""
        return "communication" if self.collective else "temporaries"


@dataclass(frozen=True, eq=False)
class Script:
    """What segments that are copies of each other do alike, on nodes of its own numbering.

    The nodes that it makes are 0, 1, ...; those that it is `given` are -1, -2, ...: (value of the segment, route, whether the owner of that
    node is meant). `owners` of the nodes it makes, None for what a rank holds anyway; `found`: (value of the segment, route, node);
    `inputs`: owners of what it reads and does not make; `contributions`: (given node, how many steps contribute to its gradient);
    `last_use`: owner that it makes -> the last step that reads it.
    """

    steps: tuple[Step, ...]
    made: tuple[Node, ...]
    owners: tuple[int | None, ...]
    given: tuple[tuple[int, Route, bool], ...]
    found: tuple[tuple[int, Route, int], ...]
    inputs: tuple[int, ...]
    contributions: tuple[tuple[int, int], ...]
    last_use: Mapping[int, int]

    @cached_property
    def live(self) -> bool:
        return any(step.live for step in self.steps)

    def expiring(self, leaving: frozenset[int], entered: Sequence[int]) -> dict[int, list[int]]:
        """Step -> owners that nothing reads after it, where the `leaving` ones are read by later segments and nobody reads the `entered`
        ones any more. What enters a segment lives until its end."""
        found: dict[int, list[int]] = {len(self.steps): list(entered)}
        for owner, step in self.last_use.items():
            if owner not in leaving:
                found.setdefault(step, []).append(owner)
        return found


Numbered = tuple[Script, Sequence[int]]
"""A script and the nodes of the program that it is about, by their numbers in it."""


@dataclass(frozen=True, slots=True)
class Run:
    """A script on the nodes of one segment: `numbers[n]` is the node of the program that the script calls n. `expiring`: see `Script.expiring`."""

    block: str
    script: Script
    numbers: Sequence[int]
    expiring: Mapping[int, Sequence[int]]

    @property
    def where(self) -> str:
        return self.block or (self.script.steps[0].moment if self.script.steps else "outputs")


@dataclass(frozen=True)
class Steps:
    """`runs[s]`: segment s; one more at the end for what leads to the outputs. `ends`: for every output, then every update, the node whose
    memory it lies in, if any, and whether a gradient comes back. `seeds`: (node, bytes) that the backward starts from; `leaves`: node -> parameter.
    `once`: what is computed before the first microbatch of a step; `lasting`: tensors that are kept of it, those that lie in one memory -> its bytes."""

    runs: tuple[Run, ...]
    once: Run
    lasting: Mapping[frozenset[Tensor], int]
    ends: tuple[tuple[int | None, bool], ...]
    seeds: tuple[tuple[int, int], ...]
    leaves: Mapping[int, int]


@dataclass
class _Builder:
    """`nodes`, `owners` and `names` (value, route) by number; `found`: value -> route -> node. `base`: the first node of the segment at hand;
    `given`: earlier node -> its local number; `called`: node that stands for others -> what the segment calls it; `standing`: node of each tensor that stands for all that are
    the same (`Program.once`)."""

    program: Program
    nodes: list[Node] = field(default_factory=list)
    owners: list[int | None] = field(default_factory=list)
    names: list[tuple[int, Route]] = field(default_factory=list)
    found: dict[int, dict[Route, int]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    place: str = ""
    base: int = 0
    given: dict[int, int] = field(default_factory=dict)
    given_as: list[tuple[int, Route, bool]] = field(default_factory=list)
    local_value: dict[int, int] = field(default_factory=dict)
    called: dict[int, tuple[int, Route]] = field(default_factory=dict)
    standing: dict[Tensor, int] = field(default_factory=dict)
    made: dict[tuple, Node] = field(default_factory=dict)

    def build(self) -> Steps:
        program, graph = self.program, self.program.graph
        for v in graph.given:
            if graph.values[v].role != "elsewhere":
                layout = program.produced[v]
                self._add(v, layout, (layout,), held=True)
        once, lasting = self._once()
        known: dict[Any, Script] = {}
        scripts: list[Numbered] = []
        bases = []
        for s in range(len(graph.segments)):
            bases.append(len(self.nodes))
            key = self._key(s)
            script = known.get(key)
            if script is not None:
                scripts.append((script, self._copy(s, script)))
            else:
                scripts.append(self._script(s))
                known[key] = scripts[-1][0]
        bases.append(len(self.nodes))
        self._start({})
        ends = [self._moved(v, route) for v, route in zip(graph.finals, (*program.output_routes, *program.update_routes), strict=True)]
        scripts.append(self._finish())
        seeds = tuple((n, self.nodes[n].num_bytes) for v, n in zip(graph.outputs, ends) if v in graph.seeds)
        leaves = {self.found[v][program.produced[v],]: v for v in graph.params}
        runs = self._runs(scripts, bases, {o for n in ends if (o := self.owners[n]) is not None})
        return Steps(runs, once, lasting, tuple((self.owners[n], self.nodes[n].live) for n in ends), seeds, leaves)

    def _once(self) -> tuple[Run, dict[frozenset[Tensor], int]]:
        """What is computed once a step, and what of it is kept. To all that follows that is there anyway."""
        program, graph = self.program, self.program.graph
        self._start({})
        read: list[tuple[int, Route]] = []
        for i, op in enumerate(graph.ops):
            if program.made_once(i):
                self.place = op.module_path or op.name
                self._op(i)
            else:
                read += [(v, program.routes[i, k]) for k, v in enumerate(op.operands) if v in graph.once]
        read += [end for end in zip(graph.finals, (*program.output_routes, *program.update_routes), strict=True) if end[0] in graph.once]
        nodes = dict.fromkeys(self._moved(v, route) for v, route in read)
        script, numbers = self._finish()
        tensors, inside = {n: x for x, n in self.standing.items()}, dict[int, list[Tensor]]()
        for n in nodes:
            if (owner := self.owners[n]) is not None:
                inside.setdefault(owner, []).append(tensors[n])
        run = Run("", script, numbers, script.expiring(frozenset(o - self.base for o in inside), ()))
        self.owners[self.base :] = [None] * (len(self.nodes) - self.base)
        return run, {frozenset(there): self.nodes[o].num_bytes for o, there in inside.items()}

    def _runs(self, scripts: Sequence[Numbered], bases: Sequence[int], ends: set[int]) -> tuple[Run, ...]:
        """With what expires where; `ends` never do. `bases`: the first node that each segment makes."""
        last: dict[int, int] = {}
        for s, (script, numbers) in enumerate(scripts):
            last.update((numbers[o], s) for o in script.inputs)
        leaving: list[list[int]] = [[] for _ in scripts]
        for owner in {*last, *ends}:
            s = bisect_right(bases, owner) - 1
            leaving[s].append(owner - bases[s])
        blocks = (*(segment.block for segment in self.program.graph.segments), "outputs")
        known: dict[tuple, dict[int, list[int]]] = {}
        runs = []
        for s, (block, (script, numbers)) in enumerate(zip(blocks, scripts, strict=True)):
            entered = tuple([o for o in script.inputs if last[numbers[o]] == s and numbers[o] not in ends])
            key = (id(script), frozenset(leaving[s]), entered)
            if key not in known:
                known[key] = script.expiring(key[1], entered)
            runs.append(Run(block, script, numbers, known[key]))
        return tuple(runs)

    # --- one segment -------------------------------------------------------------------------------------------------

    def _key(self, s: int) -> tuple:
        """What the script of a segment depends on; ops outside blocks are named one by one, so only blocks are copies."""
        program, graph = self.program, self.program.graph
        segment, wiring = graph.segments[s], graph.wirings[s]
        aliases: dict[int | None, int] = {None: -1}
        entries = []
        for v in wiring.entries:
            known = [(route, self.nodes[n], aliases.setdefault(self.owners[n], len(aliases))) for route, n in self.found[v].items()]
            entries.append((program.relay.get(v), tuple(known)))
        produced, relay, live = program.produced, program.relay, graph.differentiated
        made = tuple([(produced[v], relay.get(v), v in live) for v in wiring.results])
        routes = tuple(map(program.routes.__getitem__, graph.places[s]))
        return (-1 if segment.block else s, wiring.form, program.strategies[segment.ops.start : segment.ops.stop], tuple(entries), made, routes)

    def _start(self, local_value: dict[int, int]) -> None:
        self.base, self.steps, self.given, self.given_as, self.local_value, self.called = len(self.nodes), [], {}, [], local_value, {}
        self.place = "outputs"

    def _script(self, s: int) -> Numbered:
        graph = self.program.graph
        segment, wiring = graph.segments[s], graph.wirings[s]
        self._start({v: n for n, v in enumerate(wiring.values)})
        for i in (i for i in segment.ops if not self.program.made_once(i)):
            self.place = "" if segment.block else graph.ops[i].module_path or graph.ops[i].name
            self._op(i)
        return self._finish()

    def _finish(self) -> Numbered:
        owners = [None if o is None else self._local(o) for o in self.owners[self.base :]]

        def owner(n: int) -> int | None:
            return owners[n] if n >= 0 else given_owner[n]

        given_owner = {n: None if self.owners[g] is None else self.given[self.owners[g]] for g, n in list(self.given.items())}
        last: dict[int, int] = {}
        inputs: dict[int, None] = {}
        contributions: Counter[int] = Counter()
        for i, step in enumerate(self.steps):
            for o in map(owner, (*step.operands, *step.results)):
                if o is not None and o >= 0:
                    last[o] = i
                elif o is not None:
                    inputs.setdefault(o)
            if step.live:
                contributions.update(n for n, _, _ in step.gradients if n < 0)
        found = tuple((self.local_value.get(v, -1), route, n) for n, (v, route) in enumerate(self.names[self.base :]))
        script = Script(
            tuple(self.steps), tuple(self.nodes[self.base :]), tuple(owners), tuple(self.given_as), found, tuple(inputs), tuple(contributions.items()), last
        )  # fmt: skip
        return script, [*range(self.base, len(self.nodes)), *reversed(self.given)]

    def _copy(self, s: int, script: Script) -> Sequence[int]:
        """The numbers of the nodes of one more copy."""
        wiring, base = self.program.graph.wirings[s], len(self.nodes)
        values = wiring.values
        given = []
        for value, route, is_owner in script.given:
            n = self.found[values[value]][route]
            given.append(self.owners[n] if is_owner else n)
        numbers = [*range(base, base + len(script.made)), *reversed(given)]
        self.nodes += script.made
        self.owners += [None if o is None else numbers[o] for o in script.owners]
        self.names += [(values[v], route) for v, route, _ in script.found]
        seen = {*range(len(wiring.entries)), *wiring.crossing}  # nobody looks for the others
        for v, route, n in script.found:
            if v in seen:
                self.found.setdefault(values[v], {})[route] = base + n
        return numbers

    def _local(self, n: int) -> int:
        """The number of a node in the script at hand."""
        if n >= self.base:
            return n - self.base
        if n not in self.given:
            v, route = self.called.get(n, self.names[n])
            self._give(n, (self.local_value.get(v, -1), route, False))
            owner = self.owners[n]
            if owner is not None and owner not in self.given:
                self._give(owner, (self.local_value.get(v, -1), route, True))
        return self.given[n]

    def _give(self, n: int, how: tuple[int, Route, bool]) -> None:
        self.given[n] = -1 - len(self.given)
        self.given_as.append(how)

    # --- one step ----------------------------------------------------------------------------------------------------

    def _add(self, v: int, layout: Layout, route: Route, *, strides: Strides | None = None, source: int | None = None, held: bool = False) -> int:
        """A node; with `source` in its memory."""
        graph, n = self.program.graph, len(self.nodes)
        look = graph.metas[v], layout, strides, v in graph.differentiated
        if look not in self.made:
            shape = self.program.local_shape(v, layout)
            size = math.prod(shape) * DTYPE_BYTES[graph.values[v].meta.dtype]
            self.made[look] = Node(size, shape, strides or row_major(shape), v in graph.differentiated)
        self.nodes.append(self.made[look])
        self.owners.append(None if held else n if source is None else self.owners[source])
        self.names.append((v, route))
        self.found.setdefault(v, {})[route] = n
        if (v, route) in self.program.once:
            self.standing[self.program.once[v, route]] = n
        return n

    def _there(self, v: int, route: Route) -> bool:
        """Whether a value is there at the end of a route, made for it or for another that is the same."""
        found, same = self.found.setdefault(v, {}), self.program.once.get((v, route))
        if route not in found and same in self.standing:
            found[route] = self.standing[same]
        return route in found

    def _made(self, results: Sequence[int]) -> tuple[tuple[int, int], ...]:
        return tuple((n - self.base, self.nodes[n].num_bytes) for n in results if self.owners[n] == n)

    def _moved(self, v: int, tail: Route) -> int:
        route, found = self.program.full_route(v, tail), self.found[v]
        for n, step in enumerate(route_steps(route), start=1):
            if not self._there(v, route[: n + 1]):
                self._move(v, found[route[:n]], step.forward, step.backward, route[: n + 1])
        if v in self.program.graph.once:
            self.called[found[route]] = v, route
        return found[route]

    def _move(self, v: int, source: int, forward: str, backward: str, route: Route) -> None:
        before = self.nodes[source]
        shares = move_shares(forward, before.shape, self.program.local_shape(v, route[-1]))
        n = self._add(v, route[-1], route, source=source if shares else None)
        after = self.nodes[n]
        live = before.live and after.live
        here = self._local(source)
        self.steps.append(
            Step(
                self.place, (here,), (n - self.base,), self._made((n,)), live, live,
                workspace_bytes=in_flight(forward, before.num_bytes, after.num_bytes),
                gradients=((here, before.num_bytes, None if backward == "identity" else before.num_bytes),) if before.live else (),
                backward_workspace_bytes=in_flight(backward, after.num_bytes, before.num_bytes),
                collective=forward in COLLECTIVES,
                source=None if self.owners[source] is None else self._local(self.owners[source]),
            )  # fmt: skip
        )

    def _op(self, i: int) -> None:
        program, graph = self.program, self.program.graph
        op, rule, strategy = graph.ops[i], program.rules[i], program.strategies[i]
        if program.made_once(i) and all(self._there(v, (program.produced[v],)) for v in op.results):
            return
        operands = tuple(self._moved(v, program.routes[i, k]) for k, v in enumerate(op.operands))
        given = [self.nodes[n] for n in operands]
        results = tuple(self._result(op, i, v, operands) for v in op.results)
        recorded = any(graph.values[v].meta.requires_grad for v in op.results)
        wanting = [k for k, v in enumerate(op.operands) if graph.values[v].meta.requires_grad]
        saved = [operands[k] for k in range(len(operands)) if rule.keeps_operand(k, wanting) or not rule.known] + [results[j] for j in rule.saved_results]
        kept = rule.kept_bytes(strategy, program.mesh) if recorded else 0
        made = max((self.nodes[n].num_bytes for n in results), default=0)
        largest = max(kept // max(len(rule.kept), 1), made)
        written_out = op.kind.startswith(WRITTEN_OUT) or any(choice == ("cut", inner.factor) for choice in strategy for inner in rule.inner)
        here = [self._local(n) for n in operands]
        owners = dict.fromkeys(self.owners[n] for n in saved) if recorded else ()
        self.steps.append(
            Step(
                self.place, tuple(here), tuple(n - self.base for n in results), self._made(results), recorded, not graph.differentiated.isdisjoint(op.results),
                saved=tuple(self._local(o) for o in owners if o is not None),
                kept_bytes=kept,
                workspace_bytes=forward_workspace(op.kind, largest) if written_out else 0,
                gradients=tuple((n, node.num_bytes, new_gradient_bytes(op, node, self.nodes[results[0]])) for n, node in zip(here, given) if node.live),
                backward_workspace_bytes=backward_workspace(op.kind, rule, given, largest, made),
                contraction=kept_by_selective(op, [graph.values[v].meta for v in op.operands]),
            )  # fmt: skip
        )

    def _result(self, op: Op, i: int, v: int, operands: Sequence[int]) -> int:
        layout = self.program.produced[v]
        strides, shared = result_strides(op, self.program.rules[i], [self.nodes[n] for n in operands], self.program.local_shape(v, layout))
        return self._add(v, layout, (layout,), strides=strides, source=operands[0] if shared else None)


def steps_of(program: Program) -> Steps:
    """The steps of one microbatch of a program."""
    return _Builder(program).build()
