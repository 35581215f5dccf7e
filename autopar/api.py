"""The public verbs: plan, verify, parallelize."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from autopar.core.cluster import Cluster
from autopar.core.graph import OpGraph
from autopar.core.mesh import Mesh
from autopar.core.plan import Plan
from autopar.core.residency import Precision
from autopar.core.schedule import Schedule
from autopar.errors import UsageError
from autopar.planner.bind import bind
from autopar.planner.pins import parse_pins
from autopar.planner.plan import plan_graph
from autopar.planner.search import MEMORY_SHARE, Options
from autopar.rewrite.build import build
from autopar.runtime.distributed import connect, connect_stages, device_mesh
from autopar.runtime.microbatches import batch_size, split_batch
from autopar.runtime.module import ParallelModule, SpmdModule
from autopar.runtime.pipeline_module import PipelineModule
from autopar.runtime.share import Share
from autopar.runtime.store import HOST
from autopar.runtime.weights import Weights
from autopar.schedules.plan import own_schedule, schedule_of, splits_backward
from autopar.stages import cut_into_stages
from autopar.trace.capture import Traced, trace
from autopar.verification import VerifyReport, as_call, verify

Progress = Callable[[str], None]

__all__ = ["VerifyReport", "parallelize", "plan", "plan_timed", "verify"]


def _quiet(text: str) -> None:
    """The default progress: none."""


def _inputs_of(model: nn.Module, example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    if example_inputs is None:
        example_inputs = getattr(model, "dummy_inputs", None)
    if example_inputs is None:
        raise UsageError(f"{type(model).__name__} offers no dummy_inputs; pass example_inputs (a dict of keyword arguments or a tuple)")
    return as_call(example_inputs)


def _trace(model: nn.Module, example_inputs: Any, micro_batches: int = 1) -> Traced:
    """One microbatch, traced."""
    args, kwargs = _inputs_of(model, example_inputs)
    piece = split_batch(kwargs or args, micro_batches)[0]
    return trace(model, () if kwargs else piece, piece if kwargs else {})


def _retrace(model: nn.Module, example_inputs: Any) -> Callable[[int], OpGraph | None]:
    """The graph of one of a number of microbatches, where the batch divides into as many."""

    def graph(micro_batches: int) -> OpGraph | None:
        args, kwargs = _inputs_of(model, example_inputs)
        return _trace(model, example_inputs, micro_batches).graph if batch_size(kwargs or args) % micro_batches == 0 else None

    return graph


def _micro_batches(model: nn.Module, example_inputs: Any, pins: Sequence[str], given: int | None) -> int | None:
    """The number of microbatches: as given, or from the pinned number of samples per data-parallel rank and microbatch; None: any."""
    parsed = parse_pins(pins)
    if parsed.micro_batch is None:
        return given
    args, kwargs = _inputs_of(model, example_inputs)
    per_pass = parsed.micro_batch * dict(parsed.degrees).get("dp", 1)
    batch = batch_size(kwargs or args)
    if batch % per_pass:
        raise UsageError(f"pin micro_batch={parsed.micro_batch}: {per_pass} samples a pass over all data-parallel ranks do not divide the batch of {batch}")
    return batch // per_pass


def default_precision(model: nn.Module) -> Precision:
    """A half-precision model is updated through a float32 master copy."""
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    return Precision(master="float32") if half else Precision()


def _options(
    model: nn.Module, example_inputs: Any, *, pins: Sequence[str] = (), mesh: Mesh | None = None, tokens: int = 0, time_limit_s: float = 30.0,
    max_memory: float = MEMORY_SHARE, micro_batches: int | None = None, precision: Precision | None = None, offload: bool = False,
    pipelines: bool = False,
) -> Options:  # fmt: skip
    number = _micro_batches(model, example_inputs, pins, micro_batches)
    return Options(
        pins=tuple(pins), mesh=mesh, memory_share=max_memory, time_limit_s=time_limit_s, tokens=tokens, offload=offload, pipelines=pipelines,
        micro_batches=number or 1, free_micro_batches=number is None, precision=precision or default_precision(model),
    )  # fmt: skip


def plan_timed(model: nn.Module, cluster: Cluster, example_inputs: Any = None, *, progress: Progress = _quiet, **given: Any) -> tuple[Plan, dict[str, float]]:
    """`plan`, and the wall seconds of its two parts: {"trace", "search"}."""
    start = time.perf_counter()
    progress("tracing")
    options = _options(model, example_inputs, **given)
    traced = _trace(model, example_inputs, options.micro_batches)
    middle = time.perf_counter()
    planned = plan_graph(traced.graph, cluster, options, progress, _retrace(model, example_inputs))
    return planned.plan, {"trace": middle - start, "search": time.perf_counter() - middle}


def plan(model: nn.Module, cluster: Cluster, example_inputs: Any = None, **options: Any) -> Plan:
    """The best plan found for a model on a cluster. Needs no device and no weights: meta tensors do.

    `example_inputs` are one global batch. Options: `pins` constrain the search (`"tp=2"`, `"zero=3"`, `"*.mlp.*=tp:o"`); `mesh` fixes
    the mesh (of one stage, where `pp` is pinned), else all of one and two axes are searched; `pipelines` looks at pipelines of them too (it is
    done without asking where nothing else fits); `max_memory` is the share of a device's memory a plan may use; `micro_batches` the number of
    passes that make a step, else one, or as many as suit a pipeline; `precision` the dtypes beside the model's own; `offload` keeps the
    optimizer's state on the host. Raises TraceError, UsageError, InfeasibleError.
    """
    return plan_timed(model, cluster, example_inputs, **options)[0]


def parallelize(
    model: nn.Module, cluster: Cluster, example_inputs: Any = None, *, plan: Plan | None = None, schedule: Schedule | None = None, seed: int = 0,
    device: torch.device | None = None, **options: Any,
) -> ParallelModule:
    """Plan (unless a plan is given), rewrite for this rank and return the module to train; call under torchrun. `options`: of `plan`.

    Weights come from the model, or, where it is on the meta device, are initialised module by module from `seed`, so that
    no rank holds the whole model. Every rank calls the module with the same global batch (one microbatch at a time where the plan has
    several: `train_step` cuts the batch). `schedule`: lists of actions in place of those that a pipeline plan names.
    """
    if plan is not None:
        traced = _trace(model, example_inputs, plan.residency.micro_batches)
    else:
        wanted = _options(model, example_inputs, **options)
        traced = _trace(model, example_inputs, wanted.micro_batches)
        plan = _agree(plan_graph(traced.graph, cluster, wanted, retrace=_retrace(model, example_inputs)).plan)
    device = device or (torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() and dist.get_backend() == "nccl" else torch.device("cpu"))
    weights = Weights(model, seed=seed)
    if plan.pipeline is not None:
        return _staged(plan, traced, weights, device, seed, schedule).train(model.training)
    if schedule is not None:
        raise UsageError(f"schedule {schedule.name} is for a pipeline, and the plan has none; leave it out, or pin pp")
    return _whole(plan, traced, weights, device, seed).train(model.training)


def _whole(plan: Plan, traced: Traced, weights: Weights, device: torch.device, seed: int) -> ParallelModule:
    program = bind(plan, traced.graph)
    built = build(program, traced, device)
    rank = connect(program.mesh, program.groups, device, seed=seed)
    rank.offload = program.residency.offload
    mesh = device_mesh(program.mesh, device)
    stored_mesh = device_mesh(program.mesh, HOST) if rank.offload else mesh
    return SpmdModule(program, built.module, built.inputs, built.positions, traced, weights, rank, mesh, stored_mesh)


def _staged(plan: Plan, traced: Traced, weights: Weights, device: torch.device, seed: int, own: Schedule | None) -> ParallelModule:
    """This rank's stages of a pipeline; every rank cuts them all, and emits its own."""
    stages = cut_into_stages(bind(plan, traced.graph), plan.pipeline)
    schedule, forward = own_schedule(own, stages) if own is not None else schedule_of(stages), schedule_of(stages, "forward")
    places = connect_stages(plan.mesh, stages.pipeline, stages.whole.groups, (stages.ranks_of(s) for s in stages.shared.values()), device, seed=seed)
    module = PipelineModule(stages, schedule, forward, traced, places)
    offload = plan.residency.offload
    stored_mesh = device_mesh(plan.whole_mesh, HOST)[plan.mesh.names] if offload else places.whole[plan.mesh.names]
    splits = splits_backward(schedule)
    for number in schedule.stages_of(places.rank):
        program = stages.stages[number].program
        built = build(program, traced, device, split_backward=splits)
        rank = places.stage_rank_of(plan.mesh)
        rank.offload = offload
        module.add_stage(number, Share(program, built.module, built.inputs, built.positions, traced.constants, weights, rank, stored_mesh, module), splits=splits)
    return module


def _agree(plan: Plan) -> Plan:
    """Rank 0's plan on every rank, as text: ranks never act on plans of their own."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return plan
    box = [plan.to_json() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return Plan.from_json(str(box[0]))
