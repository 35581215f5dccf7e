"""One operator call: whole in one process, and under any strategy of its rule on a simulated mesh."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule

import autopar.rules.families
import autopar.trace.operators  # noqa: F401 - defines autopar's own operators
from autopar.core.graph import OpGraph
from autopar.core.layout import Layout
from autopar.core.mesh import Mesh
from autopar.core.rule import OpRule, Strategy, strategies
from autopar.program import Program, without_r
from autopar.rewrite.emit import emit
from autopar.rules.registry import rule_of
from autopar.runtime.rank import Stream
from autopar.runtime.reference import Reference
from autopar.trace.convert import _Builder, _meta
from tests.harness import CPU, Lockstep, Outcome, collect, distribute, gradient_layout, gradients, mesh_of, relative_error, run_backward

SEED = 11

ONE_AXIS = tuple(mesh_of(n) for n in (2, 3, 4))
TWO_AXES = (mesh_of(2, 2), mesh_of(2, 3))


@dataclass(frozen=True)
class Draw:
    """A tensor to draw: how, its shape, and whether a gradient flows into it."""

    shape: tuple[int, ...]
    how: Callable[[tuple[int, ...], torch.Generator], torch.Tensor]
    grad: bool = True

    def frozen(self) -> "Draw":
        return Draw(self.shape, self.how, False)

    def plus(self, shift: float) -> "Draw":
        return Draw(self.shape, lambda shape, gen: self.how(shape, gen) + shift, self.grad)

    def sorted(self) -> "Draw":
        return Draw(self.shape, lambda shape, gen: self.how(shape, gen).sort().values, self.grad)

    def minus(self, shift: float) -> "Draw":
        return self.plus(-shift)


@dataclass(frozen=True)
class Sample:
    """An operator and its arguments, tensors as `Draw`; `exact=False` where the values are not defined (empty tensors)."""

    kind: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    note: str = ""
    exact: bool = True
    known: bool = True

    def __str__(self) -> str:
        return f"{self.kind.removesuffix('.default')}{'-' if self.note else ''}{self.note}"

    @property
    def target(self) -> Any:
        namespace, name, overload = self.kind.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def with_frozen(sample: Sample) -> Iterator[Sample]:
    """The sample with every single one of its differentiable tensors frozen, and with all but one."""
    number = sum(_draws(sample.args))
    chosen = {frozenset({i}) for i in range(number)} | {frozenset(range(number)) - {i} for i in range(number)}
    for frozen in sorted(chosen, key=sorted) if number > 1 else ():
        count = iter(range(number))
        yield replace(sample, args=tuple(_freeze(a, frozen, count) for a in sample.args), note=f"{sample.note} without {sorted(frozen)}")


def _draws(value: Any) -> Iterator[bool]:
    if isinstance(value, (tuple, list)):
        for v in value:
            yield from _draws(v)
    elif isinstance(value, Draw) and value.grad:
        yield True


def _freeze(value: Any, frozen: frozenset[int], count: Iterator[int]) -> Any:
    if isinstance(value, (tuple, list)):
        return [_freeze(v, frozen, count) for v in value]
    if isinstance(value, Draw) and value.grad and next(count) in frozen:
        return value.frozen()
    return value


class OpCase:
    """A sample with its graph, its rule, its whole inputs and the whole results and gradients they must give."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.gen = torch.Generator().manual_seed(SEED)
        self.inputs: list[torch.Tensor] = []
        graph = Graph()
        self._builder = _Builder(None, nn.Module())  # type: ignore[arg-type] - a program is only read for its inputs
        args = tuple(self._place(graph, a) for a in sample.args)
        kwargs = {k: self._place(graph, a) for k, a in sample.kwargs}
        node = graph.call_function(sample.target, args, kwargs)
        graph.output(node)
        self.gm = GraphModule(nn.Module(), graph)
        self.node = next(n for n in self.gm.graph.nodes if n.op == "call_function")
        with torch.no_grad():
            self.node.meta["val"] = self._whole([x.detach() for x in self.inputs])
        self._builder.add_op(self.node)
        op = self._builder.ops[0]
        self.graph = OpGraph(tuple(self._builder.values), (op,), op.results)
        self.node_of = tuple(self._builder.names)
        self.rule: OpRule = rule_of(op, self.graph)

    def _place(self, graph: Graph, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [self._place(graph, v) for v in value]
        if not isinstance(value, Draw):
            return value
        x = value.how(value.shape, self.gen)
        node = graph.placeholder(f"x{len(self.inputs)}")
        grad = value.grad and x.is_floating_point()
        node.meta["val"] = x
        self._builder.add_value(node.name, _meta(x, grad), "input", (node.name,))
        self.inputs.append(x.requires_grad_(grad))
        return node

    def _whole(self, inputs: list[torch.Tensor]) -> Any:
        return Reference(self.gm, Stream(SEED)).run(*inputs)

    @cached_property
    def reference(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...], tuple[torch.Tensor | None, ...]]:
        """(results, cotangents, gradients) of the whole operator; a cotangent is None where torch lets no gradient through."""
        leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in self.inputs]
        found = self._whole([x.view_as(x) for x in leaves])  # views, for operators that refuse leaves
        results = (found,) if isinstance(found, torch.Tensor) else tuple(found)
        cotangents = tuple(
            torch.randn(y.shape, generator=self.gen, dtype=torch.float64).to(y.dtype) + 0.1 if y.requires_grad else None for y in results
        )
        run_backward(results, [torch.zeros(()) if g is None else g for g in cotangents])
        return tuple(y.detach() for y in results), cotangents, tuple(x.grad for x in leaves)

    @property
    def differentiable(self) -> bool:
        op, values = self.graph.ops[0], self.graph.values
        return any(values[v].meta.requires_grad for v in op.operands) and any(values[v].meta.requires_grad for v in op.results)

    def gradient_marks_agree(self) -> bool:
        """Whether torch lets a gradient through wherever the graph claims one (the graph may leave out gradients of zero)."""
        claimed = [self.graph.values[v].meta.requires_grad for v in self.graph.ops[0].results]
        return all(g is not None for claim, g in zip(claimed, self.reference[1]) if claim)

    def program(self, mesh: Mesh, strategy: Strategy) -> Program:
        """The operator alone, fed and read in the layouts of the strategy, so that nothing moves around it."""
        op, graph = self.graph.ops[0], self.graph
        produced: dict[int, Layout] = {}
        for k, v in enumerate(op.operands):
            produced[v] = self._canonical(v, self.rule.operand_layout(k, strategy, mesh))
        for j, v in enumerate(op.results):
            produced[v] = self._canonical(v, self.rule.result_layout(j, strategy, mesh))
        layouts = tuple(produced[v] for v in range(len(graph.values)))
        routes = {(0, k): (layouts[v],) for k, v in enumerate(op.operands)}
        return Program(graph, mesh, (self.rule,), (strategy,), {}, {}, layouts, {}, routes, tuple((layouts[v],) for v in op.results), ())

    def _canonical(self, v: int, layout: Layout) -> Layout:
        return layout if self.graph.values[v].meta.requires_grad else without_r(layout)

    def strategies(self, mesh: Mesh) -> Iterator[Strategy]:
        return strategies(self.rule, mesh, differentiable=self.differentiable)

    def check(self, mesh: Mesh, strategy: Strategy) -> Outcome:
        """Forward and backward under one strategy against the whole operator."""
        program = self.program(mesh, strategy)
        lockstep = Lockstep(emit(program, self.gm, self.node_of, CPU), mesh, SEED)
        leaves = []
        for v, x in enumerate(self.inputs):
            parts = distribute(x, program.produced[v], mesh, self.gen)
            leaves.append([part.requires_grad_(x.requires_grad) for part in parts])
        outs = lockstep.run([[part.view_as(part) for part in parts] for parts in leaves])
        outcome = self._check_results(program, outs).worse(self._check_marks(outs))
        if self.differentiable:
            outcome = outcome.worse(self._check_gradients(program, outs, leaves))
        return outcome.worse(Outcome(ledger=lockstep.counted(program.ledger)))

    def _check_results(self, program: Program, outs: list[tuple[torch.Tensor, ...]]) -> Outcome:
        outcome = Outcome()
        for v, parts, want in zip(self.graph.ops[0].results, outs, self.reference[0]):
            got = collect([y.detach() for y in parts], program.produced[v], program.mesh, tuple(want.shape))
            if not self.sample.exact:
                outcome = outcome.worse(Outcome(value=0.0 if got.whole.shape == want.shape else 1.0))
            else:
                outcome = outcome.worse(Outcome(value=relative_error(got.whole, want), replicas=got.replicas))
        return outcome

    def _check_marks(self, outs: list[tuple[torch.Tensor, ...]]) -> Outcome:
        """A gradient comes back to exactly those results that the graph marks: others would move bytes nobody predicted."""
        claimed = (self.graph.values[v].meta.requires_grad for v in self.graph.ops[0].results)
        agree = all(y.requires_grad == claim for claim, parts in zip(claimed, outs) for y in parts)
        return Outcome(gradient=0.0 if agree else math.inf)

    def _check_gradients(self, program: Program, outs: list[tuple[torch.Tensor, ...]], leaves: list[list[torch.Tensor]]) -> Outcome:
        mesh, outcome = program.mesh, Outcome()
        pulled: list[torch.Tensor] = []
        ends: list[torch.Tensor] = []
        for v, parts, cotangent in zip(self.graph.ops[0].results, outs, self.reference[1]):
            if cotangent is not None and self.graph.values[v].meta.requires_grad:
                ends += parts
                pulled += distribute(cotangent, gradient_layout(program.produced[v]), mesh, self.gen)
        run_backward(ends, pulled)
        total = sum(float(g.norm()) ** 2 for g in self.reference[2] if g is not None) ** 0.5
        for v, (parts, want) in enumerate(zip(leaves, self.reference[2])):
            if not parts[0].requires_grad:
                continue
            want = torch.zeros_like(self.inputs[v]) if want is None else want
            got = collect(gradients(parts), gradient_layout(program.produced[v]), mesh, tuple(want.shape))
            outcome = outcome.worse(Outcome(gradient=relative_error(got.whole, want, 1e-6 * total), replicas=got.replicas))
        return outcome


def combinations(case: OpCase, *, sampled: int | None = 12) -> list[tuple[Mesh, Strategy]]:
    """Every strategy on one axis, and on two axes all (None) or a fixed random sample."""
    found = [(mesh, s) for mesh in ONE_AXIS for s in case.strategies(mesh)]
    for mesh in TWO_AXES:
        legal = list(case.strategies(mesh))
        if sampled is not None and len(legal) > sampled:
            legal = random.Random(f"{case.sample}{mesh}").sample(legal, sampled)
        found += [(mesh, s) for s in legal]
    return found
