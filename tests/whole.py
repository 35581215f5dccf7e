"""Whole models under random plans: traced, cut at random, run on a simulated mesh and compared with one process."""

import random
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import nn

from autopar.core.cluster import Cluster
from autopar.core.mesh import Mesh
from autopar.core.plan import Plan, Prediction, Proof
from autopar.planner.bind import decisions
from autopar.planner.decode import decode
from autopar.planner.keeping import Keeping
from autopar.planner.pins import Pins
from autopar.planner.problem import Ports, ProblemBuilder
from autopar.planner.roles import Constraints, batch_factors
from autopar.planner.rulebook import rules_of
from autopar.planner.states import Pricing
from autopar.program import Program
from autopar.rewrite.build import build
from autopar.runtime.rank import Rank, Stream
from autopar.runtime.reducer import make_dense
from autopar.runtime.reference import Reference
from autopar.trace.capture import Traced, trace
from tests.harness import Lockstep, Outcome, collect, distribute, gradients, relative_error, run_backward

NEGLIGIBLE = 1e-2
"""A gradient smaller than this share of the whole gradient is compared on that scale: some are zero but for rounding,
which is 1e-16 of the whole; a gradient that is wrong is wrong by its own size."""

SEED = 7


def plan_of(program: Program) -> Plan:
    """The plan that names the program's decisions, with no prediction."""
    nothing = Prediction(**{f.name: 0 for f in fields(Prediction) if f.name not in ("memory", "stages")})
    proof = Proof(0.0, 0.0, 0.0, "random", "none")
    return Plan(
        program.graph.digest, program.graph.name, "none", program.mesh, **decisions(program, program.mesh), predicted=nothing, proof=proof
    )


class _StatesOnly(ProblemBuilder):
    """A random plan needs to know the states of every node, not what the edges cost."""

    def _connect(self, *args: Any, **kwargs: Any) -> None:
        pass


@cache
def pricing_of(mesh: Mesh) -> Pricing:
    """One cache of routes per mesh."""
    return Pricing(Cluster.local(mesh.num_ranks), mesh)


@dataclass(frozen=True)
class Whole:
    """What one process computes: every placeholder's whole tensor, the outputs and the gradients of the parameters."""

    values: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    updates: tuple[torch.Tensor, ...]
    grads: dict[int, torch.Tensor | None]


class ModelCase:
    """A model with example inputs in float64; `run` executes it under any program."""

    def __init__(self, model: nn.Module, inputs: dict[str, torch.Tensor], seed: int = 0) -> None:
        meta = {k: x.to("meta") for k, x in inputs.items()}
        self.traced: Traced = trace(model, (), meta, float64=True)
        self.graph = self.traced.graph
        self.rules = rules_of(self.graph)
        self.gen = torch.Generator().manual_seed(seed)
        self.given = [x.double() if x.is_floating_point() else x for x in self.traced.flat_inputs((), inputs)]
        self.whole = self._one_process()
        self._ports: dict[Mesh, Ports] = {}

    def _one_process(self) -> Whole:
        given = iter(self.given)
        values = []
        for value in self.graph.values:
            if value.role == "input":
                values.append(next(given))
            elif value.role == "constant":
                values.append(self.traced.constants[value.source[0]])
            elif value.role in ("param", "buffer"):
                values.append(self._weight(value))
        leaves = [x.clone().requires_grad_(v.meta.requires_grad) for x, v in zip(values, self._placeholders())]
        results = Reference(self.traced.gm, Stream(SEED)).run(*leaves)
        updates, outputs = results[: len(self.graph.updates)], results[len(self.graph.updates) :]
        self._loss(outputs).backward()
        ids = [v for v, value in enumerate(self.graph.values) if value.role != "op"]
        grads = {v: x.grad for v, x in zip(ids, leaves) if self.graph.values[v].role == "param"}
        return Whole(tuple(values), tuple(y.detach() for y in outputs), tuple(y.detach() for y in updates), grads)

    def _placeholders(self) -> list[Any]:
        return [v for v in self.graph.values if v.role != "op"]

    def _weight(self, value: Any) -> torch.Tensor:
        dtype = getattr(torch, value.meta.dtype)
        if not dtype.is_floating_point:
            return torch.zeros(value.meta.shape, dtype=dtype)
        x = 0.2 * torch.randn(value.meta.shape, generator=self.gen, dtype=torch.float64)
        if "var" in value.source[0]:
            x = x.abs() + 0.5
        return (x + 1.0 if len(value.meta.shape) == 1 and "bias" not in value.source[0] else x).to(dtype)

    def _loss(self, outputs: Any) -> torch.Tensor:
        return next(y for y, v in zip(outputs, self.graph.outputs) if v in self.graph.seeds)

    def ports(self, mesh: Mesh) -> Ports:
        if mesh not in self._ports:
            batch = batch_factors(self.graph, self.rules)
            builder = _StatesOnly(self.graph, self.rules, batch, pricing_of(mesh), Constraints(mesh, Pins(), False))
            self._ports[mesh] = builder.build(None)[1]
        return self._ports[mesh]

    def random_program(self, mesh: Mesh, rng: random.Random) -> Program:
        """A program with a random state at every search node."""
        ports = self.ports(mesh)
        choices = [rng.randrange(len(states.seconds)) for states in ports.states]
        return decode(self.graph, self.rules, pricing_of(mesh), ports, choices, Keeping())

    def run(self, program: Program) -> Outcome:
        """Loss, other outputs, buffer updates, every gradient, replicas and bytes of one step under a program."""
        mesh = program.mesh
        built = build(program, self.traced)
        lockstep = Lockstep(built.module, mesh, SEED)
        columns = {}
        for x, v in zip(self.whole.values, (v for v, value in enumerate(self.graph.values) if value.role != "op")):
            parts = (
                distribute(x, program.storage[v], mesh, self.gen) if v in program.storage else [x.clone() for _ in range(mesh.num_ranks)]
            )
            columns[v] = [part.requires_grad_(self.graph.values[v].meta.requires_grad) for part in parts]
        once = lockstep.once(built.once, [columns[v] for v in built.once_inputs])
        outs, updates = lockstep.run_all([*(columns[v] for v in built.inputs), *once])
        outcome = self._check_outputs(program, outs, updates)
        losses = self._loss(outs)
        run_backward(losses, [torch.ones_like(y) for y in losses])
        for part in (part for column in columns.values() for part in column):
            make_dense(part)
        outcome = outcome.worse(self._check_gradients(program, columns, lockstep.ranks))
        return outcome.worse(Outcome(ledger=lockstep.counted(program.ledger)))

    def _check_outputs(self, program: Program, outs: Any, updates: Any) -> Outcome:
        outcome = Outcome()
        ends = [program.full_route(v, route)[-1] for v, route in zip(self.graph.outputs, program.output_routes)]
        ends += [program.full_route(v, route)[-1] for (_, v), route in zip(self.graph.updates, program.update_routes)]
        for parts, layout, want in zip((*outs, *updates), ends, (*self.whole.outputs, *self.whole.updates)):
            got = collect([y.detach() for y in parts], layout, program.mesh, tuple(want.shape))
            outcome = outcome.worse(Outcome(value=relative_error(got.whole, want), replicas=got.replicas))
        return outcome

    def _check_gradients(self, program: Program, columns: dict[int, list[torch.Tensor]], ranks: list[Rank]) -> Outcome:
        mesh, outcome = program.mesh, Outcome()
        total = sum(float(g.norm()) ** 2 for g in self.whole.grads.values() if g is not None) ** 0.5
        for v, want in self.whole.grads.items():
            if not self.graph.values[v].meta.requires_grad:
                continue
            parts = _summed(gradients(columns[v]), program.deferred[v] if v in self.graph.differentiated else (), mesh, ranks)
            want = (
                torch.zeros_like(collect(parts, program.storage[v], mesh, self.graph.values[v].meta.shape).whole) if want is None else want
            )
            got = collect(parts, program.storage[v], mesh, tuple(want.shape))
            outcome = outcome.worse(
                Outcome(gradient=relative_error(got.whole, want, NEGLIGIBLE * total), replicas=got.replicas / max(total, 1.0))
            )
        return outcome


def _summed(parts: list[torch.Tensor], axes: tuple[int, ...], mesh: Mesh, ranks: list[Rank]) -> list[torch.Tensor]:
    """Gradients after the once-per-step reduction over the deferred axes."""
    if not axes:
        return parts
    found = list(parts)
    for group in mesh.groups(axes):
        total = sum(parts[r] for r in group)
        for r in group:
            ranks[r].count("all_reduce", "+".join(mesh.names[a] for a in axes), parts[r])
            found[r] = total
    return found
