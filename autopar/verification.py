"""The proof that the parallel training is the same training: the emitted program on a simulated mesh against one process."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from autopar.core.graph import OpGraph, Value
from autopar.core.ledger import Ledger
from autopar.core.plan import Plan
from autopar.core.residency import Precision
from autopar.errors import VerificationError
from autopar.planner.bind import bind
from autopar.program import Program
from autopar.rewrite.build import build
from autopar.runtime.microbatches import Batch, loss_weights, split_batch
from autopar.runtime.rank import Stream
from autopar.runtime.reference import Reference
from autopar.runtime.simulated_module import Column, MakeOptimizer, SimulatedModule
from autopar.runtime.simulated_pipeline import SimulatedPipeline
from autopar.runtime.weights import Weights, shard, unshard
from autopar.schedules.plan import schedule_of, splits_backward
from autopar.stages import Stages, cut_into_stages
from autopar.trace.capture import Traced, trace

TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 3e-2}
"""Relative Frobenius error that still counts as equal (DESIGN: 1e-12 on own models, 1e-9 where a model hard-codes float32). A
bfloat16 carries 8 bits (4e-3), and sums in another order differ by a few of the last."""

NEGLIGIBLE = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 5e-2}
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


@dataclass(frozen=True)
class _Piece:
    """What one process computes at a time: a traced graph, its inputs and its share in the loss."""

    traced: Traced
    inputs: Sequence[torch.Tensor]
    weight: float


class _OneProcess:
    """The unsharded run: whole tensors through the traced graph. `values` by parameter or buffer name, in the dtype they are kept in."""

    def __init__(self, pieces: Sequence[_Piece], values: Mapping[str, torch.Tensor], precision: Precision, seed: int, make: MakeOptimizer) -> None:
        self.pieces, self.stream = pieces, Stream(seed)
        graph = pieces[0].traced.graph
        self.names = [graph.values[v].source[0] for v in graph.params]
        self.dtypes = {graph.values[v].source[0]: graph.values[v].meta.dtype for v in graph.params}
        trains = {graph.values[v].source[0]: graph.values[v].meta.requires_grad for v in graph.params}
        self.values = {n: x.clone() for n, x in values.items()}
        for n in self.names:
            self.values[n] = self.values[n].to(getattr(torch, precision.stored(self.dtypes[n]))).requires_grad_(trains[n])
        self.params = [self.values[n] for n in self.names]
        self.optimizer = make([p for p in self.params if p.requires_grad])

    def step(self, cotangents: Sequence[torch.Tensor] | None) -> tuple[list[list[torch.Tensor]], dict[str, torch.Tensor | None]]:
        """(outputs of every piece, gradients of all parameters by name) of one step; the parameters are then updated."""
        self.optimizer.zero_grad()
        found = []
        for n, piece in enumerate(self.pieces):
            self.stream.microbatch = n
            found.append(self._run(piece, cotangents))
        self.stream.microbatch = 0
        grads = {n: None if p.grad is None else p.grad.clone() for n, p in zip(self.names, self.params)}
        self.optimizer.step()
        self.stream.step += 1
        return found, grads

    def _run(self, piece: _Piece, cotangents: Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
        graph, given = piece.traced.graph, iter(piece.inputs)
        flat = [next(given) if x.role == "input" else self._value(x) for x in graph.values if x.role != "op"]
        results = Reference(piece.traced.gm, self.stream).run(*flat)
        updates, outputs = results[: len(graph.updates)], list(results[len(graph.updates) :])
        seeds = [outputs[graph.outputs.index(v)] for v in graph.seeds]
        if seeds:
            torch.autograd.backward(seeds, [piece.weight * (torch.ones_like(t) if cotangents is None else cotangents[n]) for n, t in enumerate(seeds)])
        with torch.no_grad():
            for (buffer, _), new in zip(graph.updates, updates):
                self.values[graph.values[buffer].source[0]].copy_(new)
        return [x.detach() for x in outputs]

    def _value(self, value: Value) -> torch.Tensor:
        """A parameter as it is computed with: a differentiable cast where a wider copy is kept."""
        kept = self.values[value.source[0]]
        return kept.to(getattr(torch, value.meta.dtype)) if value.role == "param" else kept


def verify(
    model: nn.Module, plan: Plan, example_inputs: Any, *, steps: int = 10, dtype: str = "float64", seed: int = 0, progress: Callable[[str], None] = lambda text: None
) -> VerifyReport:
    """Train `steps` steps both ways from the same weights and compare loss, every gradient, its norm and every parameter.

    `example_inputs` are one global batch, whatever the plan's number of microbatches. `dtype` is float64, float32, or that of a
    bfloat16 model. Runs in this process, for any mesh. Raises VerificationError if the emitted program is malformed,
    PlanMismatchError if the plan is for another model.
    """
    if dtype not in TOLERANCE:
        raise VerificationError(f"dtype {dtype!r}: verify in {', '.join(TOLERANCE)}")
    progress("tracing")
    wide = dtype == "float64"
    batch = example_inputs if isinstance(example_inputs, dict) else as_call(example_inputs)[0]
    pieces = split_batch(batch, plan.residency.micro_batches)
    traced = trace(model, *_call(pieces[0]), float64=wide)
    stages = cut_into_stages(bind(plan, traced.graph), plan.pipeline)
    elements = traced.graph.num_params
    if elements > MAX_ELEMENTS:
        raise VerificationError(f"{plan.model} has {elements / 1e9:.1f} billion parameters; verify a model of the same class with fewer layers")
    progress("emitting")
    schedule = schedule_of(stages)
    splits = splits_backward(schedule)
    built = [build(stage.program, traced, split_backward=splits) for stage in stages.stages]
    weights = Weights(model, seed=seed)
    values = {v: _wider(weights.get(x.source[0]), wide) for v, x in enumerate(traced.graph.values) if x.role in ("param", "buffer")}
    values |= {v: _wider(traced.constants[x.source[0]], wide) for v, x in enumerate(traced.graph.values) if x.role == "constant"}
    cut = [_Piece(traced, _tensors(traced, piece, wide), weight) for piece, weight in zip(pieces, loss_weights(traced, pieces))]
    if any(x.is_meta for piece in cut for x in piece.inputs):
        raise VerificationError("example inputs are on the meta device; give real tensors to verify")
    whole = cut
    if len(cut) > 1 and not _draws(traced.graph):  # one pass over the whole batch is the harder question
        once = trace(model, *_call(batch), float64=wide)
        whole = [_Piece(once, _tensors(once, batch, wide), 1.0)]
    make = _make_optimizer(dtype)
    modules = [
        SimulatedModule(stage.program, b, {v: x for v, x in values.items() if stage.program.graph.values[v].role != "elsewhere"}, make, seed, splits=splits)
        for stage, b in zip(stages.stages, built)
    ]
    mesh = SimulatedPipeline(stages, schedule, modules)
    names = {traced.graph.values[v].source[0]: x for v, x in values.items()}
    one = _OneProcess(whole, names, plan.residency.precision, seed, make)
    return _compare(mesh, one, cut, steps, dtype, seed, progress)


def _call(batch: Batch) -> tuple[tuple, dict[str, Any]]:
    return ((), dict(batch)) if isinstance(batch, dict) else (batch, {})


def _tensors(traced: Traced, batch: Batch, wide: bool) -> list[torch.Tensor]:
    return [_wider(x, wide) for x in traced.flat_inputs(*_call(batch))]


def _draws(graph: OpGraph) -> bool:
    """Whether the graph draws random numbers (dropout), which differ from microbatch to microbatch."""
    found = {"autopar.dropout.default": "p", "autopar.attention.default": "dropout_p"}
    return any(dict(op.args)[found[op.kind]] > 0 for op in graph.ops if op.kind in found)


def _wider(x: torch.Tensor, wide: bool) -> torch.Tensor:
    return x.double() if wide and x.dtype == torch.float32 else x


def as_call(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Example inputs as (args, kwargs): a dict is keywords, a tuple or list positions, a tensor one position."""
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _make_optimizer(dtype: str) -> MakeOptimizer:
    """AdamW in float64, with an eps that keeps it well conditioned: it divides by gradients, and where those are zero but for
    rounding two correct runs differ by lr / eps times the rounding. In float32 plain momentum for the same reason."""
    if dtype == "float64":
        return lambda params: torch.optim.AdamW(params, lr=1e-3, eps=1e-4) if params else torch.optim.SGD([torch.zeros(1)])
    return lambda params: torch.optim.SGD(params or [torch.zeros(1)], lr=1e-2, momentum=0.9)


def _compare(
    mesh: SimulatedPipeline, one: _OneProcess, cut: Sequence[_Piece], steps: int, dtype: str, seed: int, progress: Callable[[str], None]
) -> VerifyReport:
    graph = mesh.stages.whole.graph
    cotangents = _cotangents(graph, dtype, seed)
    worst = _Worst(NEGLIGIBLE[dtype])
    numbers = [v for v, value in enumerate(graph.values) if value.role == "input"]
    inputs, weights = [dict(zip(numbers, piece.inputs)) for piece in cut], [piece.weight for piece in cut]
    for step in range(max(steps, 1)):
        progress(f"step {step + 1} of {steps}")
        expected, expected_grads = one.step(cotangents)
        outputs = mesh.step(inputs, weights, cotangents)
        grads = [module.gradients() for module in mesh.modules]
        mesh.update()
        if step == 0:
            counted = mesh.counted()
        if len(one.pieces) == len(cut):
            for want, columns in zip(expected, outputs):
                worst.outputs(mesh.stages.whole, want, columns)
        else:
            worst.loss_of_pieces(mesh.stages.whole, expected[0], outputs, weights)
        worst.gradients(mesh.stages, expected_grads, grads)
        if step in (0, steps - 1):
            for stage, module in zip(mesh.stages.stages, mesh.modules):
                worst.parameters(stage.program, one.values, [stored | fixed for stored, fixed in zip(module.stored, module.fixed)])
    return worst.report(mesh.stages, counted, dtype, steps)


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

    def outputs(self, program: Program, expected: Sequence[torch.Tensor], found: Sequence[Column]) -> None:
        for n, v in enumerate(program.graph.outputs):
            layout = program.full_route(v, program.output_routes[n])[-1]
            whole = unshard(found[n], layout, program.mesh, program.graph.values[v].meta.shape)
            error = relative(whole, expected[n].detach())
            replicas = max(relative(x, shard(whole, layout, program.mesh, program.mesh.coordinates(r))) for r, x in enumerate(found[n]))
            self.loss = max(self.loss, error, replicas)

    def loss_of_pieces(self, program: Program, expected: Sequence[torch.Tensor], found: Sequence[Sequence[Column]], weights: Sequence[float]) -> None:
        """The loss of a batch against the weighted losses of its microbatches (other outputs have other shapes)."""
        for v in program.graph.seeds:
            n = program.graph.outputs.index(v)
            for r in range(program.mesh.num_ranks):
                total = sum(w * columns[n][r] for w, columns in zip(weights, found))
                self.loss = max(self.loss, relative(torch.as_tensor(total), expected[n]))

    def gradients(self, stages: Stages, expected: Mapping[str, torch.Tensor | None], found: Sequence[Sequence[Sequence[torch.Tensor | None]]]) -> None:
        """`found`: by stage, rank and parameter of the stage."""
        total = math.sqrt(sum(float(g.norm()) ** 2 for g in expected.values() if g is not None))
        squares: dict[int, float] = {}
        for stage, rows in zip(stages.stages, found):
            for n, v in enumerate(stage.program.graph.params):
                name = stage.program.graph.values[v].source[0]
                error, squares[v] = self._gradient(stage.program, v, expected[name], [row[n] for row in rows], self.negligible * total)
                if not error <= self.grad:
                    self.grad, self.name = error, name
        self.norm = max(self.norm, abs(math.sqrt(sum(squares.values())) - total) / max(total, 1e-300))

    @staticmethod
    def _gradient(program: Program, v: int, want: torch.Tensor | None, parts: Sequence[torch.Tensor | None], floor: float) -> tuple[float, float]:
        """(error of one parameter's gradient, its squared norm)."""
        if want is None and all(p is None or not p.any() for p in parts):
            return 0.0, 0.0
        shape, layout, mesh = program.graph.values[v].meta.shape, program.stored[v], program.mesh
        dtype = next((p.dtype for p in (want, *parts) if p is not None))
        mine = [shard(torch.zeros(shape, dtype=dtype), layout, mesh, mesh.coordinates(r)) if p is None else p for r, p in enumerate(parts)]
        whole = unshard(mine, layout, mesh, shape)
        replicas = max(float((p - shard(whole, layout, mesh, mesh.coordinates(r))).norm()) for r, p in enumerate(mine))
        want = torch.zeros_like(whole) if want is None else want
        return max(relative(whole, want, floor), replicas / max(float(want.norm()), floor, 1e-300)), float(whole.norm()) ** 2

    def parameters(self, program: Program, expected: Mapping[str, torch.Tensor], found: Sequence[Mapping[int, torch.Tensor]]) -> None:
        values = program.graph.values
        params = [expected[values[v].source[0]].detach() for v in program.graph.params]
        rms = math.sqrt(sum(float(p.norm()) ** 2 for p in params) / max(sum(p.numel() for p in params), 1))
        for v, value in enumerate(program.graph.values):
            if value.role not in ("param", "buffer") or "float" not in value.meta.dtype:
                continue
            floor = SMALL_PARAMETER * rms * math.sqrt(value.meta.numel)
            layout = program.stored.get(v, program.produced[v])
            whole = unshard([row[v].detach() for row in found], layout, program.mesh, value.meta.shape)
            self.param = max(self.param, relative(whole, expected[value.source[0]].detach(), floor))

    def report(self, stages: Stages, counted: Sequence[Ledger], dtype: str, steps: int) -> VerifyReport:
        """`counted`: of every rank of the whole mesh, stage by stage."""
        per_stage = stages.whole.mesh.num_ranks
        predicted = [stages.ledger(rank) for rank in range(stages.pipeline.num_ranks) for _ in range(per_stage)]
        limit = TOLERANCE[dtype]
        checks = (("loss or output", self.loss), ("gradient", self.grad), ("gradient norm", self.norm), ("parameter", self.param))
        failures = [f"{name} differs by {error:.1e}, allowed {limit:.0e}" for name, error in checks if not error <= limit]
        wrong = next((r for r, ledger in enumerate(counted) if ledger != predicted[r]), None)
        if wrong is not None:
            failures.append(f"rank {wrong} communicated {counted[wrong].total_bytes} bytes, predicted {predicted[wrong].total_bytes}")
        shown = wrong if wrong is not None else max(range(len(predicted)), key=lambda r: predicted[r].total_bytes)
        return VerifyReport(
            equal=not failures, dtype=dtype, num_ranks=len(predicted), steps=steps, loss_rel_err=self.loss, grad_rel_err_max=self.grad,
            grad_norm_rel_err=self.norm, param_rel_err_max=self.param, worst_parameter=self.name, bytes_predicted=predicted[shown].total_bytes,
            bytes_counted=counted[shown].total_bytes, ops_without_rule=stages.whole.ops_without_rule, failures=tuple(failures),
        )  # fmt: skip


def relative(found: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Frobenius norm of the difference over that of the expected (at least `floor`); exact for integers."""
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else math.inf
    scale = max(float(expected.norm()), floor)
    error = float((found - expected).norm())
    return 0.0 if error == 0 else error / max(scale, 1e-300)
