"""A plan applied to a graph: every operator with its strategy, every value with its layout, every edge with its steps.

The predicted ledger, the static check and the rewriter all read this one object, so they cannot disagree.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from autopar.core.graph import DTYPE_BYTES, OpGraph
from autopar.core.layout import I, Layout, R, local_shape
from autopar.core.ledger import Ledger, LedgerKey
from autopar.core.mesh import Mesh
from autopar.core.moves import COLLECTIVES, Step, step_input_bytes
from autopar.core.rule import OpRule, Strategy

Route = tuple[Layout, ...]
"""The layouts a value goes through, first to last; one entry where nothing moves."""


def without_r(layout: Layout) -> Layout:
    """For a tensor without gradient R and I are the same; I is the canonical one."""
    return tuple(I if p == R else p for p in layout)


def route_steps(route: Route) -> tuple[Step, ...]:
    """Steps between neighbouring layouts of a route (each changes one axis)."""
    found = []
    for here, there in zip(route, route[1:]):
        axis = next(a for a in range(len(here)) if here[a] != there[a])
        found.append(Step(axis, here[axis], there[axis]))
    return tuple(found)


@dataclass(frozen=True)
class Move:
    """One step of one value: the unit of communication. `src` is the layout before it; `live`: a gradient comes back."""

    value: int
    src: Layout
    step: Step
    live: bool


@dataclass(frozen=True)
class Program:
    """Everything the plan decided, bound to the graph.

    `produced[v]` is the layout in which value v comes into being, after the deferred gradient reduction of a parameter
    (`deferred[v]`: axes over which the gradient of parameter v is summed once per optimizer step). `relay[v]` is the
    route to the layout in which v is handed to several users. `routes[op, k]` leads from there to operand k;
    `output_routes[i]` to the i-th output; `update_routes[i]` to the i-th buffer update.
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

    def all_routes(self) -> Iterator[tuple[int, Route, bool]]:
        """(value, whole route from where it is produced, whether a gradient comes back), for every use in program order."""
        live, seeds = self.graph.differentiated, self.graph.seeds
        for i, op in enumerate(self.graph.ops):
            used = any(v in live for v in op.results)
            for k, v in enumerate(op.operands):
                yield v, self.full_route(v, self.routes[i, k]), used and v in live
        for v, route in zip(self.graph.outputs, self.output_routes):
            yield v, self.full_route(v, route), v in seeds
        for (_, v), route in zip(self.graph.updates, self.update_routes):
            yield v, self.full_route(v, route), False

    def full_route(self, value: int, tail: Route) -> Route:
        head = self.relay.get(value, (self.produced[value],))
        return (*head, *tail[1:])

    @cached_property
    def moves(self) -> tuple[Move, ...]:
        """Every distinct step: uses that share the beginning of a route share its steps, so gradients are summed first."""
        seen: dict[tuple[int, Route], Move] = {}
        for value, route, live in self.all_routes():
            for n, step in enumerate(route_steps(route), start=1):
                key = (value, route[: n + 1])
                if key not in seen or (live and not seen[key].live):
                    seen[key] = Move(value, route[n - 1], step, live)
        return tuple(seen.values())

    @cached_property
    def ledger(self) -> Ledger:
        """Predicted communication of one training step, per rank."""
        return Ledger.sum(self._entries())

    def key(self, primitive: str, axes: tuple[int, ...]) -> LedgerKey:
        size = 1
        for a in axes:
            size *= self.mesh.axes[a].size
        return primitive, "+".join(self.mesh.axes[a].name for a in axes), size

    def _entries(self) -> Iterator[tuple[LedgerKey, int]]:
        live = self.graph.differentiated
        for move in self.moves:
            size = self.local_bytes(move.value, move.src)
            step = move.step
            if step.forward in COLLECTIVES:
                yield self.key(step.forward, (step.axis,)), size
            if step.backward in COLLECTIVES and move.live:
                yield self.key(step.backward, (step.axis,)), round(step_input_bytes(step.backward, step, self.mesh, size, backward=True))
        for value, axes in self.deferred.items():
            if axes and value in live:
                yield self.key("all_reduce", axes), self.local_bytes(value, self.storage[value])
        yield from self._inner_entries(live)

    def _inner_entries(self, live: frozenset[int]) -> Iterator[tuple[LedgerKey, int]]:
        for op, rule, strategy in zip(self.graph.ops, self.rules, self.strategies):
            for inner in rule.inner:
                size = rule.local_numel(inner.dims, strategy, self.mesh) * DTYPE_BYTES[self.graph.values[op.results[0]].meta.dtype]
                count = inner.forward + (inner.backward if op.operands[0] in live else 0)
                for axis, choice in enumerate(strategy):
                    if choice == ("cut", inner.factor):
                        yield self.key(inner.primitive, (axis,)), size * count

    @property
    def ops_without_rule(self) -> tuple[str, ...]:
        """Kinds of operators that no rule covers and that are therefore computed replicated."""
        return tuple(sorted({op.kind for op, rule in zip(self.graph.ops, self.rules) if not rule.known}))
