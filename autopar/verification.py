"""The proof that the parallel training is the same training: the emitted program on a simulated mesh against one process."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from autopar.core.ledger import Ledger
from autopar.core.plan import Plan
from autopar.errors import VerificationError
from autopar.planner.bind import bind
from autopar.program import Program
from autopar.rewrite.build import Built, build
from autopar.runtime.rank import Rank, Stream
from autopar.runtime.reference import Reference
from autopar.runtime.simulate import Simulation, simulated_ranks
from autopar.runtime.weights import Weights, shard, unshard
from autopar.trace.capture import Traced, trace

TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
"""Relative Frobenius error that still counts as equal (DESIGN: 1e-12 on own models, 1e-9 where a model hard-codes float32)."""

NEGLIGIBLE = {"float64": 1e-6, "float32": 1e-4}
"""A gradient below this share of the whole gradient norm is compared on that scale: some are zero but for rounding
(a key bias under softmax), and a relative error of rounding noise says nothing."""

SMALL_PARAMETER = 1e-2
"""Elements smaller than this share of the model's root mean square are compared on that scale: a bias that starts at zero
and has no gradient but rounding holds nothing but rounding."""

MAX_ELEMENTS = 200_000_000


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was compared and how far apart it was. Errors are relative; `equal` also needs predicted bytes == counted bytes."""

    equal: bool
    dtype: str
    num_ranks: int
    steps: int
    loss_rel_err: float
    grad_rel_err_max: float
    grad_norm_rel_err: float
    param_rel_err_max: float
    worst_parameter: str
    bytes_predicted: int
    bytes_counted: int
    ops_without_rule: tuple[str, ...]
    failures: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        verdict = "equal" if self.equal else "NOT EQUAL: " + "; ".join(self.failures)
        return (
            f"{verdict} ({self.dtype}, {self.num_ranks} ranks, {self.steps} steps): loss {self.loss_rel_err:.1e}, gradients {self.grad_rel_err_max:.1e}, "
            f"gradient norm {self.grad_norm_rel_err:.1e}, parameters {self.param_rel_err_max:.1e}, bytes {self.bytes_predicted} predicted, {self.bytes_counted} counted"
        )


class _OneProcess:
    """The unsharded run: whole tensors through the traced graph."""

    def __init__(self, traced: Traced, values: dict[int, torch.Tensor], inputs: Sequence[torch.Tensor], seed: int, make: "Optimizer") -> None:
        self.traced, self.inputs, self.stream = traced, inputs, Stream(seed)
        graph = traced.graph
        self.values = {v: x.clone().requires_grad_(graph.values[v].meta.requires_grad) for v, x in values.items()}
        self.params = [self.values[v] for v in graph.params]
        self.optimizer = make([p for p in self.params if p.requires_grad])

    def step(self, cotangents: Sequence[torch.Tensor] | None) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """(outputs, gradients of all parameters) of one step; the parameters are then updated."""
        graph = self.traced.graph
        given = iter(self.inputs)
        flat = [self.values[v] if v in self.values else next(given) for v, x in enumerate(graph.values) if x.role != "op"]
        results = Reference(self.traced.gm, self.stream).run(*flat)
        updates, outputs = results[: len(graph.updates)], list(results[len(graph.updates) :])
        self.optimizer.zero_grad()
        _backward(outputs, graph, cotangents)
        grads = [None if p.grad is None else p.grad.clone() for p in self.params]
        self.optimizer.step()
        with torch.no_grad():
            for (buffer, _), new in zip(graph.updates, updates):
                self.values[buffer].copy_(new)
        self.stream.step += 1
        return outputs, grads


Optimizer = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


def _backward(outputs: Sequence[torch.Tensor], graph: Any, cotangents: Sequence[torch.Tensor] | None) -> None:
    seeds = [graph.outputs.index(v) for v in graph.seeds]
    tensors = [outputs[i] for i in seeds]
    if tensors:
        torch.autograd.backward(tensors, [torch.ones_like(t) if c is None else c for t, c in zip(tensors, cotangents or [None] * len(tensors))])


class _Mesh:
    """The sharded run: every rank's local tensors through the emitted program, in lockstep."""

    def __init__(self, program: Program, built: Built, values: dict[int, torch.Tensor], inputs: Sequence[torch.Tensor], seed: int, make: Optimizer) -> None:
        self.program, self.built, self.inputs = program, built, inputs
        self.ranks: list[Rank] = simulated_ranks(program.mesh, seed=seed)
        self.local: list[dict[int, torch.Tensor]] = []
        graph = program.graph
        for r in range(program.mesh.num_ranks):
            point = program.mesh.coordinates(r)
            mine = {v: shard(x, program.storage[v], program.mesh, point) if v in program.storage else x.clone() for v, x in values.items()}
            self.local.append({v: x.requires_grad_(graph.values[v].meta.requires_grad) for v, x in mine.items()})
        trained = [v for v in graph.params if graph.values[v].meta.requires_grad]
        self.optimizers = [make([mine[v] for v in trained]) for mine in self.local]

    def step(self, cotangents: Sequence[torch.Tensor] | None) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor | None]]]:
        """(outputs of every rank, complete local gradients of every rank) of one step; the parameters are then updated."""
        graph, module = self.program.graph, self.built.module
        rows = []
        for mine in self.local:
            given = iter(self.inputs)
            rows.append([mine[v] if v in mine else next(given) for v in self.built.inputs])
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        results = Simulation(self.ranks).run(module, rows)
        self._backward_all([out for out, _ in results], cotangents)
        self._reduce()
        grads = [[mine[v].grad for v in graph.params] for mine in self.local]
        grads = [[None if g is None else g.clone() for g in row] for row in grads]
        for optimizer in self.optimizers:
            optimizer.step()
        for mine, (_, updates) in zip(self.local, results):
            with torch.no_grad():
                for (buffer, _), new in zip(graph.updates, updates):
                    mine[buffer].copy_(new)
        self.ranks[0].stream.step += 1
        return [list(out) for out, _ in results], grads

    def _backward_all(self, outputs: Sequence[Sequence[torch.Tensor]], cotangents: Sequence[torch.Tensor] | None) -> None:
        """One backward through all ranks; every output is whole on each rank, and so is its gradient."""
        graph = self.program.graph
        tensors, grads = [], []
        for out in outputs:
            for n, v in enumerate(graph.seeds):
                t = out[graph.outputs.index(v)]
                tensors.append(t)
                grads.append(torch.ones_like(t) if cotangents is None else cotangents[n])
        if tensors:
            torch.autograd.backward(tensors, grads)

    def _reduce(self) -> None:
        """The once-per-step sum of gradients over deferred axes."""
        mesh = self.program.mesh
        for v, axes in self.program.deferred.items():
            if not axes or v not in self.program.graph.differentiated:
                continue
            name = "+".join(mesh.names[a] for a in axes)
            for group in mesh.groups(axes):
                leaves = [self.local[r][v] for r in group]
                total = sum(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)
                for r, leaf in zip(group, leaves):
                    self.ranks[r].count("all_reduce", name, leaf)
                    leaf.grad = total.clone()


def verify(
    model: nn.Module, plan: Plan, example_inputs: Any, *, steps: int = 10, dtype: str = "float64", seed: int = 0, progress: Callable[[str], None] = lambda text: None
) -> VerifyReport:
    """Train `steps` steps both ways from the same weights and compare loss, every gradient, its norm and every parameter.

    `dtype` is float64 or float32. Runs in this process, for any mesh. Raises VerificationError if the emitted program is
    malformed, PlanMismatchError if the plan is for another model.
    """
    args, kwargs = as_call(example_inputs)
    if dtype not in TOLERANCE:
        raise VerificationError(f"dtype {dtype!r}: verify in float64 or float32")
    progress("tracing")
    wide = dtype == "float64"
    traced = trace(model, args, kwargs, name=plan.model, float64=wide)
    program = bind(plan, traced.graph)
    elements = traced.graph.num_params
    if elements > MAX_ELEMENTS:
        raise VerificationError(f"{plan.model} has {elements / 1e9:.1f} billion parameters; verify a model of the same class with fewer layers")
    progress("emitting")
    built = build(program, traced)
    weights = Weights(model, seed=seed)
    values = {v: _wider(weights.get(x.source[0]), wide) for v, x in enumerate(traced.graph.values) if x.role in ("param", "buffer")}
    values |= {v: _wider(traced.constants[x.source[0]], wide) for v, x in enumerate(traced.graph.values) if x.role == "constant"}
    inputs = [_wider(x, wide) for x in traced.flat_inputs(args, kwargs)]
    if any(x.is_meta for x in inputs):
        raise VerificationError("example inputs are on the meta device; give real tensors to verify")
    return _compare(program, traced, built, values, inputs, steps, dtype, seed, progress)


def _wider(x: torch.Tensor, wide: bool) -> torch.Tensor:
    return x.double() if wide and x.dtype == torch.float32 else x


def as_call(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Example inputs as (args, kwargs): a dict is keywords, a tuple or list positions, a tensor one position."""
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _make_optimizer(dtype: str) -> Optimizer:
    """AdamW in float64, with an eps that keeps it well conditioned: it divides by gradients, and where those are zero but for
    rounding two correct runs differ by lr / eps times the rounding. In float32 plain momentum for the same reason."""
    if dtype == "float64":
        return lambda params: torch.optim.AdamW(params, lr=1e-3, eps=1e-4) if params else torch.optim.SGD([torch.zeros(1)])
    return lambda params: torch.optim.SGD(params or [torch.zeros(1)], lr=1e-2, momentum=0.9)


def _compare(
    program: Program, traced: Traced, built: Built, values: dict[int, torch.Tensor], inputs: Sequence[torch.Tensor], steps: int, dtype: str, seed: int,
    progress: Callable[[str], None],
) -> VerifyReport:  # fmt: skip
    graph = program.graph
    make = _make_optimizer(dtype)
    one, mesh = _OneProcess(traced, values, inputs, seed, make), _Mesh(program, built, values, inputs, seed, make)
    cotangents = _cotangents(graph, dtype, seed)
    worst = _Worst(NEGLIGIBLE[dtype])
    for step in range(max(steps, 1)):
        progress(f"step {step + 1} of {steps}")
        expected, expected_grads = one.step(cotangents)
        outputs, grads = mesh.step(cotangents)
        if step == 0:
            counted = [rank.counter.ledger for rank in mesh.ranks]
        worst.outputs(program, expected, outputs)
        worst.gradients(program, expected_grads, grads)
        if step in (0, steps - 1):
            worst.parameters(program, one.values, mesh.local)
    return worst.report(program, counted, dtype, steps)


def _cotangents(graph: Any, dtype: str, seed: int) -> list[torch.Tensor] | None:
    """Random gradients for the outputs of a model without a loss."""
    if any(graph.values[v].meta.shape == () for v in graph.seeds):
        return None
    generator = torch.Generator().manual_seed(seed + 1)
    return [torch.randn(graph.values[v].meta.shape, generator=generator, dtype=getattr(torch, dtype)) for v in graph.seeds]


class _Worst:
    """The largest errors seen."""

    def __init__(self, negligible: float) -> None:
        self.negligible = negligible
        self.loss = self.grad = self.norm = self.param = 0.0
        self.name = ""

    def outputs(self, program: Program, expected: Sequence[torch.Tensor], found: Sequence[Sequence[torch.Tensor]]) -> None:
        for n, v in enumerate(program.graph.outputs):
            layout = program.full_route(v, program.output_routes[n])[-1]
            whole = unshard([out[n].detach() for out in found], layout, program.mesh, program.graph.values[v].meta.shape)
            error = relative(whole, expected[n].detach())
            replicas = max(relative(out[n].detach(), shard(whole, layout, program.mesh, program.mesh.coordinates(r))) for r, out in enumerate(found))
            self.loss = max(self.loss, error, replicas)

    def gradients(self, program: Program, expected: Sequence[torch.Tensor | None], found: Sequence[Sequence[torch.Tensor | None]]) -> None:
        total = math.sqrt(sum(float(g.norm()) ** 2 for g in expected if g is not None))
        squares = 0.0
        for n, v in enumerate(program.graph.params):
            want = expected[n]
            parts = [row[n] for row in found]
            if want is None and all(p is None or not p.any() for p in parts):
                continue
            shape, layout = program.graph.values[v].meta.shape, program.storage[v]
            filled = [torch.zeros(program.local_shape(v, layout), dtype=(parts[0] if want is None else want).dtype) if p is None else p for p in parts]
            whole = unshard(filled, layout, program.mesh, shape)
            replicas = max(float((p - shard(whole, layout, program.mesh, program.mesh.coordinates(r))).norm()) for r, p in enumerate(filled))
            want = torch.zeros_like(whole) if want is None else want
            floor = self.negligible * total
            error = max(relative(whole, want, floor), replicas / max(float(want.norm()), floor, 1e-300))
            squares += float(whole.norm()) ** 2
            if not error <= self.grad:
                self.grad, self.name = error, program.graph.values[v].source[0]
        self.norm = max(self.norm, abs(math.sqrt(squares) - total) / max(total, 1e-300))

    def parameters(self, program: Program, expected: dict[int, torch.Tensor], found: Sequence[dict[int, torch.Tensor]]) -> None:
        params = [expected[v].detach() for v in program.graph.params]
        rms = math.sqrt(sum(float(p.norm()) ** 2 for p in params) / max(sum(p.numel() for p in params), 1))
        for v, value in enumerate(program.graph.values):
            if value.role not in ("param", "buffer") or not value.meta.dtype.startswith("float"):
                continue
            floor = SMALL_PARAMETER * rms * math.sqrt(value.meta.numel)
            layout = program.storage.get(v, program.produced[v])
            whole = unshard([row[v].detach() for row in found], layout, program.mesh, value.meta.shape)
            self.param = max(self.param, relative(whole, expected[v].detach(), floor))

    def report(self, program: Program, counted: Sequence[Ledger], dtype: str, steps: int) -> VerifyReport:
        predicted = program.ledger
        limit = TOLERANCE[dtype]
        checks = (("loss or output", self.loss), ("gradient", self.grad), ("gradient norm", self.norm), ("parameter", self.param))
        failures = [f"{name} differs by {error:.1e}, allowed {limit:.0e}" for name, error in checks if not error <= limit]
        wrong = [r for r, ledger in enumerate(counted) if ledger != predicted]
        if wrong:
            failures.append(f"rank {wrong[0]} communicated {counted[wrong[0]].total_bytes} bytes, predicted {predicted.total_bytes}")
        return VerifyReport(
            equal=not failures, dtype=dtype, num_ranks=program.mesh.num_ranks, steps=steps, loss_rel_err=self.loss, grad_rel_err_max=self.grad,
            grad_norm_rel_err=self.norm, param_rel_err_max=self.param, worst_parameter=self.name, bytes_predicted=predicted.total_bytes,
            bytes_counted=(counted[wrong[0]] if wrong else counted[0]).total_bytes, ops_without_rule=program.ops_without_rule, failures=tuple(failures),
        )  # fmt: skip


def relative(found: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Frobenius norm of the difference over that of the expected (at least `floor`); exact for integers."""
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else math.inf
    scale = max(float(expected.norm()), floor)
    error = float((found - expected).norm())
    return 0.0 if error == 0 else error / max(scale, 1e-300)
