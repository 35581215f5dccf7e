"""Writes a program as one flat fx graph over local shards: operators, and the moves between them."""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from autopar.core.layout import Layout
from autopar.core.moves import Step
from autopar.program import Program, Route, route_steps
from autopar.rewrite.check import move_arguments
from autopar.rewrite.lower import Site, lower
from autopar.runtime.moves import MOVES
from autopar.trace.canonical import bound

ONCE = -1
"""The segment of what is computed once a step."""


@dataclass(frozen=True)
class Emitted:
    """The flat emitted graph. Placeholders: `mesh`, then every parameter, buffer, constant and input in value order. Nodes say which segment they are of,
    and of what is computed once, which tensor they make for all that are the same (`Program.once`)."""

    graph: Graph
    inputs: tuple[int, ...]


class _Emitter:
    def __init__(self, program: Program, source: GraphModule, node_of: Sequence[str], device: torch.device) -> None:
        self.program, self.device = program, device
        self.source = {n.name: n for n in source.graph.nodes}
        self.node_of = node_of
        self.graph = Graph()
        self.segment = 0
        self.mesh = self.graph.placeholder("mesh")
        self.nodes: dict[tuple[int, Route], Node] = {}
        self.inputs: list[int] = []

    def emit(self) -> Emitted:
        graph = self.program.graph
        for v, value in enumerate(graph.values):
            if value.role not in ("op", "elsewhere"):
                name = value.source[0] if value.role in ("param", "buffer") else self.node_of[v]
                node = self.graph.placeholder("".join(c if c.isalnum() else "_" for c in name))
                self.nodes[v, (self.program.produced[v],)] = node
                self.inputs.append(v)
        for self.segment, segment in enumerate(graph.segments):
            for i in segment.ops:
                self._op(i)
        self.segment = len(graph.segments)
        outs = [self._moved(v, route) for v, route in zip(graph.outputs, self.program.output_routes)]
        updates = [self._moved(v, route) for (_, v), route in zip(graph.updates, self.program.update_routes)]
        self.graph.output((tuple(outs), tuple(updates)))
        return Emitted(self.graph, tuple(self.inputs))

    def _op(self, i: int) -> None:
        op, once = self.program.graph.ops[i], self.program.made_once(i)
        if once and all(self._known(v, (self.program.produced[v],)) for v in op.results):
            return
        node = self.source[self.node_of[op.results[0]]]
        moved = iter([self._moved(v, self.program.routes[i, k]) for k, v in enumerate(op.operands)])
        args = {name: _replace(value, moved) for name, value in bound(node).items()}
        first = self._last()
        result = lower(Site(self.graph, self.program, i, node.target, args, self.mesh, self.device))
        self._tag(first, op.module_path, once=once)
        if isinstance(result, Node):
            result.meta["made"] = (op.results[0], (self.program.produced[op.results[0]],))
        for j, v in enumerate(op.results):
            self._add(v, (self.program.produced[v],), self._result(result, node, j, once))

    def _known(self, v: int, route: Route) -> bool:
        """Whether a value is there at the end of a route, made for it or for another that is the same."""
        same = self.program.once.get((v, route))
        if same in self.nodes:
            self.nodes[v, route] = self.nodes[same]
        return (v, route) in self.nodes

    def _add(self, v: int, route: Route, node: Node) -> None:
        self.nodes[v, route] = node
        if (v, route) in self.program.once:
            node.meta["same"] = same = self.program.once[v, route]
            self.nodes[same] = node

    def _result(self, result: Any, node: Node, j: int, once: bool) -> Node:
        if isinstance(result, (list, tuple)):
            return result[j]
        if isinstance(node.meta["val"], torch.Tensor):
            return result
        item = self.graph.call_function(operator.getitem, (result, j))
        item.meta["segment"] = ONCE if once else self.segment
        return item

    def _moved(self, v: int, tail: Route) -> Node:
        """The node of a value at the end of its route; steps that were already written are shared."""
        route = self.program.full_route(v, tail)
        for n, step in enumerate(route_steps(route), start=1):
            key = (v, route[: n + 1])
            if not self._known(*key):
                before = self.nodes[v, route[:n]]
                first = self._last()
                self._add(*key, self._step(before, step, route[n - 1]))
                self._tag(first, "", once=v in self.program.graph.once)
                self.nodes[key].meta["route"] = key
        return self.nodes[v, route]

    def _step(self, x: Node, step: Step, src: Layout) -> Node:
        function = MOVES[step.forward, step.backward]
        return self.graph.call_function(function, (x, self.mesh, self.program.mesh.names[step.axis]), move_arguments(self.program, step, src))

    def _last(self) -> Node:
        return next(iter(reversed(self.graph.nodes)))

    def _tag(self, first: Node, path: str, *, once: bool) -> None:
        for node in _after(first):
            node.meta.setdefault("segment", ONCE if once else self.segment)
            node.meta.setdefault("module_path", path)


def _after(node: Node) -> Iterator[Node]:
    node = node.next
    while node.op != "root":
        yield node
        node = node.next


def _replace(value: Any, moved: Iterator[Node]) -> Any:
    if isinstance(value, Node):
        return next(moved)
    if isinstance(value, (tuple, list)):
        return [_replace(v, moved) for v in value]
    return value


def emit(program: Program, source: GraphModule, node_of: Sequence[str], device: torch.device) -> Emitted:
    """The flat emitted graph of a program; `source` is the canonical traced graph module."""
    return _Emitter(program, source, node_of, device).emit()
