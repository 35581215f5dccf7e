"""A plan applied to a graph: every operator with its strategy, every value with its layout, every edge with its steps.

The predicted ledger, the static check and the rewriter all read this one object, so they cannot disagree.
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from autopar.core.again import AGAIN, RESHAPES, Part, computed_again, kept_by_selective, replayed
from autopar.core.graph import DTYPE_BYTES, OpGraph
from autopar.core.layout import Layout, local_shape
from autopar.core.ledger import Ledger, LedgerKey
from autopar.core.mesh import Mesh
from autopar.core.moves import COLLECTIVES, step_input_bytes
from autopar.core.residency import Residency, computes_again
from autopar.core.routes import Move, Route, route_steps, without_r
from autopar.core.rule import OpRule, Strategy
from autopar.core.zero import zero_layout

MODELESS = "stored", "gathered", "backward_segments", "_first_user", "communicates_once"  # found whatever the modes of recomputation are

Tensor = tuple[int, Route]
"""A value at the end of a route."""


@dataclass(frozen=True)
class Program:
    """Everything the plan decided, bound to the graph.

    `produced[v]` is the layout in which value v comes into being, after the deferred gradient reduction of a parameter
    (`deferred[v]`: axes over which the gradient of parameter v is summed once per optimizer step). `relay[v]` is the
    route to the layout in which v is handed to several users. `routes[op, k]` leads from there to operand k;
    `output_routes[i]` to the i-th output; `update_routes[i]` to the i-th buffer update. The last `num_handed` outputs go to other
    stages of a pipeline, in any layout.
    """

    graph: OpGraph
    mesh: Mesh
    rules: tuple[OpRule, ...]
    strategies: tuple[Strategy, ...]
    storage: Mapping[int, Layout]
    deferred: Mapping[int, tuple[int, ...]]
    produced: tuple[Layout, ...]
    relay: Mapping[int, Route]
    routes: Mapping[tuple[int, int], Route]
    output_routes: tuple[Route, ...]
    update_routes: tuple[Route, ...]
    residency: Residency[int] = Residency()
    num_handed: int = 0

    @cached_property
    def stored(self) -> Mapping[int, Layout]:
        """The layout of every parameter between steps: `storage`, and what ZeRO cuts of it."""
        zero, values = self.residency.zero, self.graph.values
        return {v: zero_layout(values[v].meta.shape, x, zero[v].axes, self.mesh) if v in zero else x for v, x in self.storage.items()}

    def form(self) -> Hashable:
        """What it is but for the numbers of values and the names of blocks, which `blocks` has: parts of one program with equal forms cost the same."""
        graph, zero = self.graph, self.residency.zero
        given = [v for v in graph.given if graph.values[v].role != "elsewhere"]
        values = sorted({*given, *(v for op in graph.ops for v in op.results)})
        number = {v: n for n, v in enumerate(values)}
        places = tuple([(tuple([number[v] for v in op.operands]), tuple([number[v] for v in op.results])) for op in graph.ops])
        kept = tuple([(graph.values[v].role, bool(graph.values[v].source), self.storage.get(v), self.deferred.get(v), zero.get(v)) for v in given])
        layouts = tuple([(graph.metas[v], self.produced[v], self.relay.get(v)) for v in values])
        block_number = {block: n for n, block in enumerate(self.blocks)}
        segments = tuple([(block_number.get(s.block), len(s.ops)) for s in graph.segments])
        between = tuple([(graph.ops[i].module_path, graph.ops[i].name) for s in graph.segments if not s.block for i in s.ops])
        numbered = [tuple([number[v] for v in found]) for found in (given, graph.outputs, sum(graph.updates, ()), graph.seeds)]
        ends = self.output_routes, self.update_routes, self.num_handed
        state = self.residency.micro_batches, self.residency.precision, self.residency.offload
        modes = tuple(map(self.mode, range(len(graph.segments))))
        return modes, graph.calls, places, kept, layouts, segments, between, self.strategies, tuple(self.routes.items()), *numbered, *ends, *state

    @property
    def blocks(self) -> tuple[str, ...]:
        """Module paths of the blocks that it has operators of."""
        return tuple(dict.fromkeys([segment.block for segment in self.graph.segments if segment.block]))

    @cached_property
    def gathered(self) -> tuple[tuple[int, ...], ...]:
        """For every segment of the graph the ZeRO-3 parameters that it takes in, in order of use. A parameter that moves on its
        way comes in once, where its first move is made; a direct user takes it in itself."""
        if all(zero.stage < 3 for zero in self.residency.zero.values()):
            return ((),) * len(self.graph.segments)
        found = []
        moved: set[int] = set()
        for segment in self.graph.segments:
            taken: dict[int, None] = {}
            for i in segment.ops:
                for k, v in enumerate(self.graph.ops[i].operands):
                    if self.residency.stage(v) < 3:
                        continue
                    moves = len(self.full_route(v, self.routes[i, k])) > 1
                    if not moves or v not in moved:
                        taken.setdefault(v)
                    if moves:
                        moved.add(v)
            found.append(tuple(taken))
        return tuple(found)

    def copies(self, v: int) -> int:
        """Over how many ranks that ZeRO reduce-scatters have the same gradient, not an addend of it."""
        zero = self.residency.zero.get(v)
        return math.prod(self.mesh.sizes[a] for a in zero.axes if a not in self.deferred[v]) if zero is not None else 1

    @property
    def groups(self) -> frozenset[tuple[int, ...]]:
        """Sets of mesh axes that gradients are summed or parameters gathered over."""
        zero = {v: z.axes for v, z in self.residency.zero.items()}
        rest = {tuple(a for a in axes if a not in zero.get(v, ())) for v, axes in self.deferred.items()}
        return frozenset({*rest, *zero.values()} - {()})

    @cached_property
    def backward_segments(self) -> tuple[bool, ...]:
        """Whether a backward runs through each segment."""
        return tuple(not self.graph.differentiated.isdisjoint(wiring.results) for wiring in self.graph.wirings)

    def needed(self, op: int, k: int) -> Layout:
        """Layout in which operand k of an op is used."""
        value = self.graph.ops[op].operands[k]
        layout = self.rules[op].operand_layout(k, self.strategies[op], self.mesh)
        return layout if self.graph.values[value].meta.requires_grad else without_r(layout)

    def local_shape(self, value: int, layout: Layout) -> tuple[int, ...]:
        return local_shape(self.graph.values[value].meta.shape, layout, self.mesh)

    def local_bytes(self, value: int, layout: Layout) -> int:
        meta = self.graph.values[value].meta
        total = DTYPE_BYTES[meta.dtype]
        for n in self.local_shape(value, layout):
            total *= n
        return total

    def moving(self) -> Iterator[tuple[int, Route, bool]]:
        """(value, whole route from where it is produced, whether a gradient comes back), for every use on a route of some steps, in program order."""
        live, seeds, ops, relay = self.graph.differentiated, self.graph.seeds, self.graph.ops, self.relay
        handed = {place for v in relay for place in self.graph.consumers[v]}
        for (i, k), tail in [(place, tail) for place, tail in self.routes.items() if len(tail) > 1 or place in handed]:
            v = ops[i].operands[k]
            yield v, self.full_route(v, tail), v in live and not live.isdisjoint(ops[i].results)
        for n, (v, route) in enumerate(zip(self.graph.outputs, self.output_routes)):
            yield v, self.full_route(v, route), v in seeds and (n >= self.first_handed or v not in self.handed)
        for (_, v), route in zip(self.graph.updates, self.update_routes):
            yield v, self.full_route(v, route), False

    @property
    def first_handed(self) -> int:
        """The first output that goes to another stage."""
        return len(self.graph.outputs) - self.num_handed

    @property
    def handed(self) -> tuple[int, ...]:
        """Values that go to other stages; the gradient of one comes through this output, not through one for the user."""
        return self.graph.outputs[self.first_handed :]

    def full_route(self, value: int, tail: Route) -> Route:
        head = self.relay.get(value)
        return tail if head is None else (*head, *tail[1:])

    @cached_property
    def moves(self) -> tuple[Move, ...]:
        """Every distinct step: uses that share the beginning of a route share its steps, so gradients are summed first."""
        return tuple(self.move_of.values())

    @cached_property
    def move_of(self) -> Mapping[tuple[int, Route], Move]:
        """By value and route up to and with the step, which is made for the first operator that uses it; of what is computed once those that stand for all."""
        return {**self._modeless._moves, **self._repeated_moves}

    @cached_property
    def _repeated_moves(self) -> Mapping[tuple[int, Route], Move]:
        moves = ((key, self._modeless._moves.get(key)) for key, what in self.becomes.items() if what == AGAIN)
        return {key: replace(move, again=True) for key, move in moves if move is not None and move.step.forward in COLLECTIVES}

    @cached_property
    def _moves(self) -> Mapping[tuple[int, Route], Move]:
        """The same where none is repeated."""
        seen: dict[tuple[int, Route], Move] = {}
        for value, route, live in self.moving():
            for n, step in enumerate(route_steps(route), start=1):
                key = (value, route[: n + 1])
                key = self.once.get(key, key)
                if key not in seen:
                    seen[key] = Move(value, route[n - 1], step, live)
                elif live and not seen[key].live:
                    seen[key] = replace(seen[key], live=True)
        return seen

    @cached_property
    def once(self) -> Mapping[Tensor, Tensor]:
        """Tensors that are the same for every microbatch, `graph.once` along all routes -> the first that is made alike, which stands for all: it is
        computed once a step and kept through it. What is given, and not moved, is in no need of that, and stands for itself."""
        graph, produced = self.graph, self.produced
        found = {(v, (produced[v],)): (v, (produced[v],)) for v in graph.given if v in graph.once}
        made: dict[Hashable, tuple[int, ...]] = {}
        moved: dict[Hashable, Tensor] = {}

        def at(v: int, tail: Route) -> Tensor:
            route = self.full_route(v, tail)
            for n in range(1, len(route)):
                if (v, route[: n + 1]) not in found:
                    found[v, route[: n + 1]] = moved.setdefault((found[v, route[:n]], route[n]), (v, route[: n + 1]))
            return found[v, route]

        for i, op in enumerate(graph.ops):
            operands = [at(v, self.routes[i, k]) for k, v in enumerate(op.operands) if v in graph.once]
            if self.made_once(i):
                first = made.setdefault((graph.calls[i], tuple(operands), self.strategies[i]), op.results)
                found.update(((v, (produced[v],)), (same, (produced[same],))) for v, same in zip(op.results, first, strict=True))
        for v, route in zip(graph.finals, (*self.output_routes, *self.update_routes), strict=True):
            if v in graph.once:
                at(v, route)
        return found

    def made_once(self, op: int) -> bool:
        """Whether an operator's results are the same for every microbatch."""
        return not self.graph.once.isdisjoint(self.graph.ops[op].results)

    def standing(self, ops: Iterable[int] | None = None) -> list[Tensor]:
        """What stands for the tensors of these that some operators take, or all of them and the outputs, in program order: the same places in programs of
        the same form."""
        uses = [(v, self.routes[i, k]) for i in (range(len(self.graph.ops)) if ops is None else ops) for k, v in enumerate(self.graph.ops[i].operands)]
        uses += zip(self.graph.finals, (*self.output_routes, *self.update_routes), strict=True) if ops is None else ()
        routes = [(v, self.full_route(v, tail)) for v, tail in uses if v in self.graph.once]
        return [self.once[v, route[:n]] for v, route in routes for n in range(1, len(route) + 1)]

    @cached_property
    def communicates_once(self) -> bool:
        """Whether that takes communication, which every stage of a rank does for itself; else what several of them read is there once."""
        inner = ((i, x.factor) for i, rule in enumerate(self.rules) if rule.inner and self.made_once(i) for x in rule.inner)
        moved = (step for _, route in self.once for step in route_steps(route))
        return any(step.forward in COLLECTIVES for step in moved) or any(choice == ("cut", factor) for i, factor in inner for choice in self.strategies[i])

    def mode(self, s: int) -> str:
        """What segment s keeps for its backward."""
        return self.residency.recompute.get(self.graph.segments[s].block, "none")

    def in_modes(self, recompute: Mapping[str, str]) -> "Program":
        """The same under other modes of recomputation."""
        made, known = replace(self, residency=replace(self.residency, recompute=recompute)), vars(self)
        vars(made).update({name: known[name] for name in MODELESS if name in known}, _first=self._modeless, once=self.once)  # a search asks for many modes
        return made

    @property
    def _modeless(self) -> "Program":
        """The first of those that differ in modes of recomputation alone: what these do not change is found of that."""
        return vars(self).get("_first", self)

    def parts(self, s: int) -> tuple[Part, ...]:
        """The moves and operators of a segment that every microbatch makes, in the order in which they are emitted. Tensors are named (value, route)."""
        if s not in (known := self._modeless._parts):
            known[s] = tuple(self._parts_of(s))
        return known[s]

    @cached_property
    def _parts(self) -> dict[int, tuple[Part, ...]]:
        return {}

    @cached_property
    def _replayed(self) -> dict[tuple[int, str], tuple[str, ...]]:
        return {}

    def _parts_of(self, s: int) -> Iterator[Part]:
        graph, live, segment = self.graph, self.graph.differentiated, self.graph.segments[s]
        made: set[Tensor] = set()
        for i in (i for i in segment.ops if not self.made_once(i)):
            op, rule = graph.ops[i], self.rules[i]
            operands = [(v, self.full_route(v, self.routes[i, k])) for k, v in enumerate(op.operands)]
            for v, route in (x for x in operands if x[0] not in graph.once):
                for n, step in enumerate(route_steps(route), start=1):
                    key = (v, route[: n + 1])
                    if key not in made and self._first_user[key] in segment.ops:
                        made.add(key)
                        yield Part(((v, route[:n]),), (key,), collective=step.forward in COLLECTIVES, gather=step.forward == "all_gather")
            results = [(v, (self.produced[v],)) for v in op.results]
            saved: list[Tensor] = []
            backward = not live.isdisjoint(op.results)
            if backward:
                wanting = [k for k, v in enumerate(op.operands) if v in live]
                saved = [x for k, x in enumerate(operands) if rule.keeps_operand(k, wanting) or not rule.known] + [results[j] for j in rule.saved_results]
            contraction = kept_by_selective(op, [graph.values[v].meta for v in op.operands])
            yield Part(
                tuple(operands), tuple(results), tuple(saved), prepares=backward and bool(rule.kept or not rule.known), view=op.kind.startswith(RESHAPES),
                contraction=contraction, addends=any(p.kind == "P" for v in op.results for p in self.produced[v]),
            )  # fmt: skip

    @cached_property
    def _first_user(self) -> Mapping[Tensor, int]:
        """Of what every move makes; after all operators where that is an output."""
        found: dict[Tensor, int] = {}
        for (i, k), tail in self.routes.items():
            v = self.graph.ops[i].operands[k]
            if len(tail) > 1 or v in self.relay:
                route = self.full_route(v, tail)
                for n in range(2, len(route) + 1):
                    found.setdefault((v, route[:n]), i)
        return found

    @cached_property
    def replays(self) -> Mapping[int, tuple[str, ...]]:
        """Segment of which not everything is kept -> what becomes of the results of each of its parts."""
        known = self._modeless._replayed
        again = [(s, mode) for s, backward in enumerate(self.backward_segments) if backward and (mode := self.mode(s)) != "none"]
        known.update({(s, mode): replayed(self.parts(s), mode) for s, mode in again if (s, mode) not in known})
        return {s: known[s, mode] for s, mode in again}

    @cached_property
    def repeated(self) -> Mapping[int, float]:
        """Operator -> the part of its forward that is done a second time."""
        graph, found = self.graph, dict[int, float]()
        shares = computed_again(graph, self.rules) if self.replays else {}
        for i in (i for s in self.replays if computes_again(self.mode(s)) for i in graph.segments[s].ops if i in shares and not self.made_once(i)):
            op = graph.ops[i]
            spared = kept_by_selective(op, [graph.values[v].meta for v in op.operands]) and self.becomes[op.results[0], (self.produced[op.results[0]],)] != AGAIN
            found |= {} if spared else {i: shares[i]}
        return found

    @cached_property
    def becomes(self) -> Mapping[Tensor, str]:
        """The same by tensor."""
        return {x: what for s, found in self.replays.items() for part, what in zip(self.parts(s), found, strict=True) for x in part.makes}

    @cached_property
    def ledger(self) -> Ledger:
        """Predicted communication of one training step, per rank."""
        times = self.residency.micro_batches
        again = ((self.key(move.step.forward, (move.step.axis,)), times * self.local_bytes(move.value, move.src)) for move in self._repeated_moves.values())
        return Ledger.sum((*self._modeless._plain_ledger.input_bytes, *again))

    @cached_property
    def _plain_ledger(self) -> Ledger:
        """The same where nothing is repeated."""
        return Ledger.sum(self._entries())

    def key(self, primitive: str, axes: tuple[int, ...]) -> LedgerKey:
        size = 1
        for a in axes:
            size *= self.mesh.axes[a].size
        return primitive, "+".join(self.mesh.axes[a].name for a in axes), size

    def _entries(self) -> Iterator[tuple[LedgerKey, int]]:
        live, times = self.graph.differentiated, self.residency.micro_batches
        for move in self._moves.values():
            size = self.local_bytes(move.value, move.src) * (1 if move.value in self.graph.once else times)
            step = move.step
            if step.forward in COLLECTIVES:
                yield self.key(step.forward, (step.axis,)), size
            if step.backward in COLLECTIVES and move.live:
                yield self.key(step.backward, (step.axis,)), round(step_input_bytes(step.backward, step, self.mesh, size, backward=True))
        yield from self._inner_entries(live)
        for value in self.graph.params:
            yield from self._state_entries(value, value in live, times)

    def _state_entries(self, v: int, live: bool, times: int) -> Iterator[tuple[LedgerKey, int]]:
        """What ZeRO gathers of a parameter and what is summed of its gradient, in one step."""
        dtype, zero = self.graph.values[v].meta.dtype, self.residency.zero.get(v)
        width, reduced = DTYPE_BYTES[dtype], DTYPE_BYTES[self.residency.precision.reduced(dtype)]
        part = math.prod(self.local_shape(v, self.stored[v]))
        cut = zero is not None and self.stored[v] != self.storage[v]
        rest, gathers, sums = self.deferred[v], 1, 1
        if zero is not None and cut:
            ranks = math.prod(self.mesh.sizes[a] for a in zero.axes)
            rest = tuple(a for a in rest if a not in zero.axes)
            uses = sum(v in taken for taken in self.gathered)
            again = sum(v in taken and back for taken, back in zip(self.gathered, self.backward_segments))
            gathers = 1 if zero.stage < 3 else times * (uses + again)
            scatters = 1 if zero.stage == 1 else times * (uses if zero.stage == 3 else 1)
            yield self.key("all_gather", zero.axes), part * width * gathers
            if live:
                yield self.key("reduce_scatter", zero.axes), part * ranks * reduced * scatters
            sums = uses if zero.stage == 3 else 1
        if rest and live:
            yield self.key("all_reduce", rest), part * reduced * sums
        if self.residency.offload:
            stored = DTYPE_BYTES[self.residency.precision.stored(dtype)]
            yield ("to_device", "host", 1), part * stored * (gathers)
            if live:
                yield ("to_host", "host", 1), part * (reduced if rest or cut else width) * sums

    def _inner_entries(self, live: frozenset[int]) -> Iterator[tuple[LedgerKey, int]]:
        done: set[Tensor] = set()
        for i, op, rule, strategy in [(i, *found) for i, found in enumerate(zip(self.graph.ops, self.rules, self.strategies)) if found[1].inner]:
            result = op.results[0], (self.produced[op.results[0]],)
            if self.once.get(result) in done:
                continue
            done.update([self.once[result]] if self.made_once(i) else [])
            for inner in rule.inner:
                size = rule.local_numel(inner.dims, strategy, self.mesh) * DTYPE_BYTES[self.graph.values[op.results[0]].meta.dtype]
                count = (inner.forward + (inner.backward if op.operands[0] in live else 0)) * (1 if self.made_once(i) else self.residency.micro_batches)
                for axis, choice in enumerate(strategy):
                    if choice == ("cut", inner.factor):
                        yield self.key(inner.primitive, (axis,)), size * count

    @property
    def ops_without_rule(self) -> tuple[str, ...]:
        """Kinds of operators that no rule covers and that are therefore computed replicated."""
        return tuple(sorted({op.kind for op, rule in zip(self.graph.ops, self.rules) if not rule.known}))
