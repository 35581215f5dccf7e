"""Splits a flat emitted graph into what is computed once a step and one `GraphModule` per segment; equal segments share one module.

A segment whose weights are gathered for it, or which is computed again in the backward, is called through `run_block`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from autopar.program import Program
from autopar.rewrite.emit import ONCE, Emitted
from autopar.runtime.block import run_block
from autopar.runtime.built import Built

Segment = list[Node]


def _segments(graph: Graph) -> list[Segment]:
    """The nodes of every segment, in order, without what is computed once."""
    runs: list[tuple[int, Segment]] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        segment = node.meta["segment"]
        if segment == ONCE:
            continue
        if not runs or runs[-1][0] != segment:
            runs.append((segment, []))
        runs[-1][1].append(node)
    return [nodes for _, nodes in runs]


def _inputs(segment: Segment) -> list[Node]:
    inside = set(segment)
    found: dict[Node, None] = {}
    for node in segment:
        for n in node.all_input_nodes:
            if n not in inside:
                found.setdefault(n)
    return list(found)


def _outputs(segment: Segment) -> list[Node]:
    inside = set(segment)
    return [node for node in segment if any(user not in inside for user in node.users)]


def _site_numbers(segment: Segment) -> list[Node]:
    return [node for node in segment if node.op == "call_function" and node.target.__name__ in ("dropout", "attention") and "kernels" in node.target.__module__]


def _name_of(node: Node, block: str) -> str:
    """A parameter's name inside its block."""
    return node.name.replace(block.replace(".", "_") + "_", "", 1) if block else node.name


class _Splitter:
    def __init__(self, emitted: Emitted, program: Program) -> None:
        self.flat, self.program = emitted.graph, program
        placeholders = [n for n in self.flat.nodes if n.op == "placeholder"]
        self.inputs = emitted.inputs
        self.value_of = dict(zip(placeholders[1:], emitted.inputs))
        self.top = Graph()
        self.modules = nn.Module()
        self.known: dict[str, str] = {}
        self.mapped: dict[Node, Node] = {}
        self.positions: dict[int, dict[int, int]] = {}

    def split(self) -> Built:
        for node in self.flat.nodes:
            if node.op == "placeholder":
                self.mapped[node] = self.top.placeholder(node.name)
        once = [node for node in self.flat.nodes if node.meta.get("segment") == ONCE]
        kept = _outputs(once)
        for node in kept:
            self.mapped[node] = self.top.placeholder(node.name)
        for segment in _segments(self.flat):
            self._add(segment)
        result = next(n for n in self.flat.nodes if n.op == "output")
        self.top.output(torch.fx.map_arg(result.args[0], lambda n: self.mapped[n]))
        module = GraphModule(self.modules, self.top, "Program")
        return Built(module, self.inputs, self.positions, *self._once(once, kept), self.program.communicates_once)

    def _once(self, nodes: Segment, kept: Sequence[Node]) -> tuple[GraphModule, tuple[int, ...]]:
        """The module of what is computed once, and the values that it takes."""
        graph = Graph()
        inner = {node: graph.placeholder(node.name) for node in self.flat.nodes if node.op == "placeholder" and (node not in self.value_of or not node.users.keys().isdisjoint(nodes))}
        for node in nodes:
            inner[node] = graph.node_copy(node, lambda n: inner[n])
        graph.output(tuple(inner[n] for n in kept))
        return GraphModule(nn.Module(), graph, "Once"), tuple(self.value_of[n] for n in inner if n in self.value_of)

    def _add(self, nodes: Segment) -> None:
        inputs, outputs = _inputs(nodes), _outputs(nodes)
        if not outputs:
            return
        number, segments = nodes[0].meta["segment"], self.program.graph.segments
        block = segments[number].block if number < len(segments) else ""
        graph, sites = self._copy(nodes, inputs, outputs, block)
        code = graph.python_code("self").src
        name = self.known.get(code)
        if name is None:
            name = f"block_{len(self.known)}"
            self.known[code] = name
            self.modules.add_module(name, GraphModule(nn.Module(), graph, f"Block{len(self.known) - 1}"))
        call = self._call(name, number, block, inputs, sites)
        if len(outputs) == 1:
            self.mapped[outputs[0]] = call
            return
        for k, node in enumerate(outputs):
            self.mapped[node] = self.top.call_function(_pick, (call, k))

    def _call(self, name: str, number: int, block: str, inputs: Sequence[Node], sites: Sequence[int]) -> Node:
        args = (*(self.mapped[n] for n in inputs), *sites)
        gathered = self.program.gathered[number] if number < len(self.program.gathered) else ()
        recompute = self.program.residency.recompute.get(block, "none")
        if not gathered and recompute == "none":
            return self.top.call_module(name, args)
        position = {self.value_of[n]: p for p, n in enumerate(inputs) if n in self.value_of}
        kwargs: dict[str, Any] = {"recompute": recompute} if recompute != "none" else {}
        if gathered:
            self.positions[number] = {v: position[v] for v in gathered}
            kwargs["gather"] = number
        mesh = next(n for n in self.top.nodes if n.op == "placeholder")
        return self.top.call_function(run_block, (mesh, self.top.get_attr(name), *args), kwargs)

    def _copy(self, segment: Segment, inputs: Sequence[Node], outputs: Sequence[Node], block: str) -> tuple[Graph, list[int]]:
        """The segment as a graph of its own, with names that do not depend on where it stands; random sites become inputs."""
        graph = Graph()
        inner: dict[Node, Any] = {}
        taken: dict[str, int] = {}

        def placeholder(name: str) -> Node:
            taken[name] = taken.get(name, 0) + 1
            return graph.placeholder(name if taken[name] == 1 else f"{name}_{taken[name]}")

        for n in inputs:
            inner[n] = placeholder(_name_of(n, block) if n.op == "placeholder" else "x")
        sites: list[int] = []
        numbered = {}
        for node in _site_numbers(segment):
            numbered[node] = placeholder("site")
            position = 3 if node.target.__name__ == "dropout" else 8
            sites.append(node.args[position])
        for node in segment:
            args = torch.fx.map_arg(node.args, lambda n: inner[n])
            if node in numbered:
                position = 3 if node.target.__name__ == "dropout" else 8
                args = (*args[:position], numbered[node], *args[position + 1 :])
            inner[node] = graph.call_function(node.target, args, torch.fx.map_arg(node.kwargs, lambda n: inner[n]))
        results = tuple(inner[n] for n in outputs)
        graph.output(results[0] if len(results) == 1 else results)
        return graph, sites


def _pick(values: tuple, k: int) -> Any:
    """One of a block's results."""
    return values[k]


def split_into_blocks(emitted: Emitted, program: Program) -> Built:
    """A top module that calls one module per segment; segments that print the same share one."""
    return _Splitter(emitted, program).split()
