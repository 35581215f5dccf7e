"""Models cut into pipeline stages at random operators, run on a simulated mesh, and compared with one pass over the whole batch."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

import autopar
from autopar.core.pipeline import Pipeline
from autopar.core.plan import Plan
from autopar.models.load import LoadedModel, load_model
from autopar.planner.bind import bind
from autopar.planner.plan import plan_graph
from autopar.planner.search import Options
from autopar.rewrite.build import build
from autopar.runtime.microbatches import loss_weights, split_batch
from autopar.runtime.rank import Stream
from autopar.runtime.reference import Reference
from autopar.runtime.simulated_module import SimulatedModule
from autopar.runtime.simulated_pipeline import SimulatedPipeline
from autopar.runtime.weights import Weights, unshard
from autopar.schedules.plan import schedule_of
from autopar.stages import Stages, cut_into_stages
from autopar.trace.capture import Traced, trace


def random_starts(graph: Any, num_stages: int, rng: random.Random) -> tuple[str, ...]:
    """Cuts before operators that depend on parameters, anywhere but where a stage would have none."""
    candidates = [i for i, op in enumerate(graph.ops) if any(v in graph.searched for v in op.results)]
    while True:
        cuts = sorted(rng.sample(candidates[1:], num_stages - 1))
        bounds = [0, *cuts, len(graph.ops)]
        if all(any(v in graph.params for i in range(a, b) for v in graph.ops[i].operands) for a, b in zip(bounds, bounds[1:])):
            return tuple(graph.ops[i].name for i in cuts)


@dataclass(frozen=True)
class Work:
    """A model and its batch, in float64: one microbatch traced, and the gradients of the whole batch in one process."""

    loaded: LoadedModel
    pieces: tuple[Any, ...]
    traced: Traced
    values: dict[str, torch.Tensor]
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]

    @classmethod
    @lru_cache(maxsize=12)
    def of(cls, name: str, micro_batches: int, rows: int = 2, layers: int = 4) -> "Work":
        key = "num_hidden_layers" if "llama" in name else "n_layer"
        given: dict[str, Any] = {} if "mlp" in name or "t5" in name else {"overrides": {key: layers}}
        loaded = load_model(name, batch=rows * micro_batches, seq=8, device="cpu", ragged="mlp" not in name, **given)
        loaded.module.eval()
        whole = trace(loaded.module, (), loaded.kwargs, float64=True)
        pieces = tuple(split_batch(loaded.kwargs, micro_batches))
        traced = whole if micro_batches == 1 else trace(loaded.module, (), pieces[0], float64=True)
        weights = Weights(loaded.module, seed=0)
        values = {x.source[0]: wide(weights.get(x.source[0])) for x in whole.graph.values if x.role in ("param", "buffer")}
        values |= {x.source[0]: wide(whole.constants[x.source[0]]) for x in whole.graph.values if x.role == "constant"}
        given_inputs = iter([wide(x) for x in whole.flat_inputs((), loaded.kwargs)])
        flat = []
        for x in whole.graph.values:
            if x.role != "op":
                flat.append(next(given_inputs) if x.role == "input" else values[x.source[0]].clone().requires_grad_(x.meta.requires_grad))
        results = Reference(whole.gm, Stream(0)).run(*flat)
        loss = results[len(whole.graph.updates) + whole.graph.outputs.index(whole.graph.seeds[0])]
        loss.backward()
        leaves = dict(zip((x for x in whole.graph.values if x.role != "op"), flat))
        gradients = {x.source[0]: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for x, leaf in leaves.items() if x.role == "param"}
        return cls(loaded, pieces, traced, values, loss.detach(), gradients)

    def plan(self, pins: Sequence[str] = ("dp=1",), num_ranks: int = 1, **options: Any) -> Plan:
        """Without a pipeline, for the mesh of a stage."""
        return plan_graph(self.traced.graph, autopar.Cluster.local(num_ranks), Options(pins=tuple(pins), micro_batches=len(self.pieces), **options)).plan


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.dtype == torch.float32 else x


def cut(plan: Plan, graph: Any, num_ranks: int, schedule: str, virtual_stages: int, seed: int) -> Plan:
    """The plan with a pipeline of random cuts."""
    return replace(plan, pipeline=Pipeline(num_ranks, random_starts(graph, num_ranks * virtual_stages, random.Random(seed)), schedule))


def simulated(work: Work, plan: Plan) -> SimulatedPipeline:
    stages = cut_into_stages(bind(plan, work.traced.graph), plan.pipeline)
    splits = stages.pipeline.schedule == "zero-bubble"
    modules = []
    for stage in stages.stages:
        built = build(stage.program, work.traced, split_backward=splits)
        here = {v: x for v, x in enumerate(stage.program.graph.values) if x.role in ("param", "buffer", "constant")}
        values = {v: work.values[x.source[0]] for v, x in here.items()}
        modules.append(SimulatedModule(stage.program, built, values, sgd, splits=splits))
    return SimulatedPipeline(stages, schedule_of(stages), modules)


def sgd(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params or [torch.zeros(1)], lr=1.0)


@dataclass(frozen=True)
class Outcome:
    """Errors relative to the whole gradient, and whether every rank communicated what was predicted."""

    loss: float
    gradient: float
    as_predicted: bool


def outcome(work: Work, mesh: SimulatedPipeline) -> Outcome:
    """One step against one process."""
    graph = work.traced.graph
    numbers = [v for v, x in enumerate(graph.values) if x.role == "input"]
    inputs = [dict(zip(numbers, (wide(x) for x in work.traced.flat_inputs((), piece)))) for piece in work.pieces]
    weights = loss_weights(work.traced, work.pieces)
    outputs = mesh.step(inputs, weights)
    place = graph.outputs.index(graph.seeds[0])
    loss = sum(w * columns[place][0] for w, columns in zip(weights, outputs))
    total = sum(float(g.norm()) ** 2 for g in work.gradients.values()) ** 0.5
    worst = 0.0
    for stage, module in zip(mesh.stages.stages, mesh.modules):
        program = stage.program
        rows = module.gradients()
        for n, v in enumerate(program.graph.params):
            want = work.gradients[program.graph.values[v].source[0]]
            parts = [torch.zeros_like(stored[v]) if row[n] is None else row[n] for row, stored in zip(rows, module.stored)]
            found = unshard(parts, program.stored[v], program.mesh, program.graph.values[v].meta.shape)
            worst = max(worst, float((found - want).norm()) / max(float(want.norm()), 1e-2 * total))
    return Outcome(float((torch.as_tensor(loss) - work.loss).abs() / work.loss.abs()), worst, mesh.counted() == predicted(mesh.stages))


def predicted(stages: Stages) -> list[Any]:
    return [stages.ledger(rank) for rank in range(stages.pipeline.num_ranks) for _ in range(stages.whole.mesh.num_ranks)]
