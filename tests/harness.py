"""What the numeric tests share: whole tensors laid out over a mesh and back, and programs run on a simulated mesh.

Every expectation comes from whole tensors in one process. Partial sums are made lopsided and with alternating signs, and
cotangents are random, so that a wrong rule does not pass by symmetry.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from autopar.core.graph import OpGraph, TensorMeta, Value
from autopar.core.layout import I, Layout, P, Placement, R, shard_index
from autopar.core.ledger import Ledger
from autopar.core.mesh import Mesh
from autopar.program import Program, Route
from autopar.rewrite.emit import Emitted, emit
from autopar.runtime.rank import Rank
from autopar.runtime.simulate import Simulation, simulated_ranks

TOLERANCE = 1e-12
"""Relative Frobenius error that two orders of summation in float64 may differ by."""

GRADIENT_OF: dict[str, Placement] = {"R": P, "P": R, "I": I}

CPU = torch.device("cpu")


def mesh_of(*sizes: int) -> Mesh:
    """A mesh with axes a, b, c, ... of these sizes."""
    return Mesh.of(**dict(zip("abcdef", sizes)))


def gradient_layout(layout: Layout) -> Layout:
    """The layout in which the gradient of a tensor with this layout lies."""
    return tuple(GRADIENT_OF.get(p.kind, p) for p in layout)


@lru_cache(maxsize=4096)
def _index(layout: Layout, mesh: Mesh, shape: tuple[int, ...]) -> tuple[tuple[torch.Tensor, ...], ...]:
    """For every rank the index that picks its slice of a whole tensor."""
    found = []
    for rank in range(mesh.num_ranks):
        ids = [torch.tensor(i, dtype=torch.long) for i in shard_index(layout, mesh, mesh.coordinates(rank), shape)]
        found.append(torch.meshgrid(*ids, indexing="ij") if ids else ())
    return tuple(found)


def _addend_number(layout: Layout, mesh: Mesh, rank: int) -> int:
    """Which addend of a partial sum a rank holds: its position along the P axes."""
    number = 0
    for size, place, p in zip(mesh.sizes, mesh.coordinates(rank), layout):
        number = number * size + place if p.kind == "P" else number
    return number


def addends(x: torch.Tensor, count: int, gen: torch.Generator) -> list[torch.Tensor]:
    """`count` lopsided tensors of mixed signs that sum to x."""
    if count == 1:
        return [x]
    if not x.is_floating_point():
        parts = [torch.randint(-9, 9, x.shape, generator=gen).to(x.dtype) for _ in range(count - 1)]
    else:
        scale = float(x.abs().mean()) + 1.0
        weights = [0.6, -0.35, 0.85, -0.7, 0.45, -0.15, 0.3]
        noise = [scale * torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x.dtype) for _ in range(count - 1)]
        parts = [x * weights[k % 7] + offset for k, offset in enumerate(noise)]
    rest = x
    for part in parts:
        rest = rest - part
    return [rest, *parts]


def distribute(x: torch.Tensor, layout: Layout, mesh: Mesh, gen: torch.Generator) -> list[torch.Tensor]:
    """What every rank holds of a whole tensor."""
    count = math.prod(size for size, p in zip(mesh.sizes, layout) if p.kind == "P")
    parts = addends(x.detach(), count, gen)
    index = _index(layout, mesh, tuple(x.shape))
    return [parts[_addend_number(layout, mesh, r)][index[r]].clone() for r in range(mesh.num_ranks)]


@dataclass(frozen=True)
class Collected:
    """A whole tensor put together from the ranks' parts; `replicas`: largest difference between parts that must be equal."""

    whole: torch.Tensor
    replicas: float


def collect(parts: Sequence[torch.Tensor], layout: Layout, mesh: Mesh, shape: tuple[int, ...]) -> Collected:
    """Inverse of `distribute`. A part of the wrong shape makes the result NaN."""
    index = _index(layout, mesh, shape)
    sums: dict[int, torch.Tensor] = {}
    replicas = 0.0
    first: dict[tuple, torch.Tensor] = {}
    for r, part in enumerate(parts):
        if part.shape != _local_shape(index[r]):
            return Collected(torch.full(shape, math.nan), math.nan)
        number = _addend_number(layout, mesh, r)
        held = tuple(c for c, p in zip(mesh.coordinates(r), layout) if p.kind in "SP")
        if held in first:
            replicas = max(replicas, _difference(part, first[held]))
            continue
        first[held] = part
        total = sums.setdefault(number, torch.zeros(shape, dtype=part.dtype))
        total[index[r]] = part
    whole = sum(list(sums.values())[1:], start=next(iter(sums.values())))
    return Collected(whole, replicas)


def _local_shape(index: tuple[torch.Tensor, ...]) -> torch.Size:
    return index[0].shape if index else torch.Size(())


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    return float((a.double() - b.double()).abs().max())


def relative_error(found: torch.Tensor, want: torch.Tensor, floor: float = 0.0) -> float:
    """Relative Frobenius error; `floor` bounds the denominator from below; inf where shapes differ, NaN where a NaN appears."""
    if found.shape != want.shape:
        return math.inf
    if want.numel() == 0:
        return 0.0
    if not want.is_floating_point() or not torch.isfinite(want).all():
        return 0.0 if torch.equal(found, want) else math.inf
    return float((found.double() - want.double()).norm() / max(float(want.double().norm()), floor, 1e-12))


def pairing(values: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], layout: Layout, mesh: Mesh) -> float:
    """<value, gradient> of a laid-out tensor: the sum over ranks, tensors that are whole on an I axis counted once."""
    copies = math.prod(size for size, p in zip(mesh.sizes, layout) if p.kind == "I")
    return sum(float((v.double() * g.double()).sum()) for v, g in zip(values, grads)) / copies


@dataclass(frozen=True)
class Outcome:
    """How far a sharded run is from the whole one: relative errors, largest replica difference, whether the bytes agree."""

    value: float = 0.0
    gradient: float = 0.0
    replicas: float = 0.0
    ledger: bool = True

    @property
    def equal(self) -> bool:
        return self.value <= TOLERANCE and self.gradient <= TOLERANCE and self.replicas <= TOLERANCE and self.ledger

    def worse(self, other: "Outcome") -> "Outcome":
        """The worst of both; NaN counts as worst."""
        pairs = ((self.value, other.value), (self.gradient, other.gradient), (self.replicas, other.replicas))
        worst = (math.nan if math.isnan(a) or math.isnan(b) else max(a, b) for a, b in pairs)
        return Outcome(*worst, self.ledger and other.ledger)


class Lockstep:
    """An emitted program on a simulated mesh, with every rank's counter."""

    def __init__(self, emitted: Emitted | GraphModule, mesh: Mesh, seed: int = 0) -> None:
        self.ranks: list[Rank] = simulated_ranks(mesh, seed=seed)
        self.module = emitted if isinstance(emitted, GraphModule) else GraphModule(nn.Module(), emitted.graph)

    def run(self, inputs: Sequence[Sequence[torch.Tensor]]) -> list[tuple[torch.Tensor, ...]]:
        """`inputs[k]` is the k-th placeholder of every rank; returns the k-th output of every rank."""
        return self.run_all(inputs)[0]

    def run_all(self, inputs: Sequence[Sequence[torch.Tensor]]) -> tuple[list[tuple[torch.Tensor, ...]], list[tuple[torch.Tensor, ...]]]:
        """(outputs, buffer updates), each of every rank."""
        rows = [[column[r] for column in inputs] for r in range(len(self.ranks))]
        results = Simulation(self.ranks).run(self.module, rows)
        return list(zip(*(outs for outs, _ in results))), list(zip(*(updates for _, updates in results)))

    def once(self, module: GraphModule, inputs: Sequence[Sequence[torch.Tensor]]) -> list[tuple[torch.Tensor, ...]]:
        """What a module returns that runs once a step."""
        rows = [[column[r] for column in inputs] for r in range(len(self.ranks))]
        return list(zip(*Simulation(self.ranks).run(module, rows)))

    def counted(self, predicted: Ledger) -> bool:
        """Whether every rank counted what was predicted."""
        return all(rank.counter.ledger == predicted for rank in self.ranks)


def run_backward(outs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]) -> None:
    """Differentiate all ranks' outputs at once."""
    pairs = [(out, g) for out, g in zip(outs, cotangents) if out.requires_grad]
    if pairs:
        torch.autograd.backward([out for out, _ in pairs], [g for _, g in pairs])


def gradients(leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def route_program(route: Route, meta: TensorMeta, mesh: Mesh) -> Program:
    """A program that does nothing but take one input along a route."""
    graph = OpGraph((Value("x", meta, "input"),), (), (0,))
    return Program(graph, mesh, (), (), {}, {}, (route[0],), {}, {}, (route,), ())


def emit_route(program: Program) -> Emitted:
    return emit(program, GraphModule(nn.Module(), Graph()), ("x",), CPU)


def check_route(route: Route, meta: TensorMeta, mesh: Mesh, gen: torch.Generator) -> Outcome:
    """Run a route forward and backward: the value survives, the gradient survives, the bytes are those predicted."""
    program = route_program(route, meta, mesh)
    lockstep = Lockstep(emit_route(program), mesh)
    x = torch.randn(meta.shape, generator=gen, dtype=torch.float64)
    local = [part.requires_grad_(meta.requires_grad) for part in distribute(x, route[0], mesh, gen)]
    (outs,) = lockstep.run([local])
    got = collect([out.detach() for out in outs], route[-1], mesh, meta.shape)
    outcome = Outcome(value=relative_error(got.whole, x), replicas=got.replicas)
    if math.isnan(outcome.value):
        return outcome
    if meta.requires_grad:
        cotangent = torch.randn(meta.shape, generator=gen, dtype=torch.float64)
        pulled = distribute(cotangent, gradient_layout(route[-1]), mesh, gen)
        run_backward(outs, pulled)
        grads = gradients(local)
        back = collect(grads, gradient_layout(route[0]), mesh, meta.shape)
        ahead = pairing([out.detach() for out in outs], pulled, route[-1], mesh)
        behind = pairing([part.detach() for part in local], grads, route[0], mesh)
        adjoint = abs(ahead - behind) / (float(x.norm() * cotangent.norm()) * mesh.num_ranks)
        outcome = outcome.worse(Outcome(gradient=relative_error(back.whole, cotangent), replicas=back.replicas))
        outcome = outcome.worse(Outcome(gradient=adjoint))
    return outcome.worse(Outcome(ledger=lockstep.counted(program.ledger)))


def all_layouts(per_axis: Sequence[Sequence[Placement]]) -> list[Layout]:
    return [tuple(layout) for layout in itertools.product(*per_axis)]
