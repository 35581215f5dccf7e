"""The public verbs: plan, verify, parallelize."""

import math
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from autopar.choice import Chosen, choose
from autopar.core.mixed import Machines
from autopar.core.objective import Objective
from autopar.core.plan import Plan
from autopar.core.schedule import Schedule
from autopar.errors import UsageError
from autopar.planner.bind import bind
from autopar.request import Progress, Request, quiet
from autopar.rewrite.build import build
from autopar.runtime.distributed import connect, connect_stages, device_mesh
from autopar.runtime.module import ParallelModule, SpmdModule
from autopar.runtime.pipeline_module import PipelineModule
from autopar.runtime.share import Share
from autopar.runtime.store import HOST
from autopar.runtime.weights import Weights
from autopar.schedules.plan import own_schedule, schedule_of, splits_backward
from autopar.stages import cut_into_stages
from autopar.trace.capture import Traced
from autopar.verification import VerifyReport, verify

__all__ = ["VerifyReport", "parallelize", "plan", "plan_timed", "verify"]


def plan_timed(
    model: nn.Module, cluster: Machines, example_inputs: Any = None, *, objective: Objective = Objective(), progress: Progress = quiet, **given: Any
) -> tuple[Chosen, dict[str, float]]:
    """The plan that is best by an objective with what it was chosen from, and the wall seconds of its two parts: {"trace", "search"}."""
    start = time.perf_counter()
    request = Request(model, example_inputs)
    found = choose(request, cluster, objective, progress=progress, **given)
    return found, {"trace": request.trace_s, "search": time.perf_counter() - start - request.trace_s}


def plan(model: nn.Module, cluster: Machines, example_inputs: Any = None, *, objective: str = "time", within_s: float = math.inf, fewer_devices: bool = False, **options: Any) -> Plan:
    """The best plan found for a model on a cluster, or on groups of different machines (`MixedCluster`). Needs no device and no weights: meta tensors do.

    `example_inputs` are one global batch. `objective`: "time" (the fastest step), "memory" (the fewest bytes on the fullest device), "devices" (the
    fewest) or "cost" (the fewest device-seconds a step), of the plans whose step takes at most `within_s`; the last two use part of the cluster where
    that is better, the first does with `fewer_devices`. Options: `pins` constrain the search (`"tp=2"`, `"zero=3"`, `"*.mlp.*=tp:o"`); `mesh` fixes
    the mesh (of one stage, where `pp` is pinned), else all of one and two axes are searched; `pipelines` looks at pipelines of them too (it is
    done without asking where nothing else fits); `max_memory` is the share of a device's memory a plan may use; `micro_batches` the number of
    passes that make a step, else one, or as many as suit a pipeline; `precision` the dtypes beside the model's own; `offload` keeps the
    optimizer's state on the host; `budget_s` ends the joint search after so many seconds with the best plan so far and what is proven of it,
    `budget_points` after so many points. Raises TraceError, UsageError, InfeasibleError.
    """
    return plan_timed(model, cluster, example_inputs, objective=Objective(objective, within_s, fewer_devices), **options)[0].plan


def parallelize(
    model: nn.Module, cluster: Machines, example_inputs: Any = None, *, plan: Plan | None = None, schedule: Schedule | None = None, seed: int = 0,
    device: torch.device | None = None, **options: Any,
) -> ParallelModule:
    """Plan (unless a plan is given), rewrite for this rank and return the module to train; call under torchrun. `options`: of `plan`.

    Weights come from the model, or, where it is on the meta device, are initialised module by module from `seed`, so that
    no rank holds the whole model. Every rank calls the module with the same global batch (one microbatch at a time where the plan has
    several: `train_step` cuts the batch). `schedule`: lists of actions in place of those that a pipeline plan names. Of a plan over groups of different machines
    the processes lie as its `pipeline.places` say, a mesh of the plan for each, in their order.
    """
    request = Request(model, example_inputs)
    if plan is None:
        plan = _agree(request.planned(cluster, **options).plan)
    traced = request.traced(plan.residency.micro_batches)
    return assemble(plan, traced, model, schedule=schedule, seed=seed, device=device)


def assemble(
    plan: Plan, traced: Traced, model: nn.Module, *, schedule: Schedule | None = None, seed: int = 0, device: torch.device | None = None
) -> ParallelModule:
    """`parallelize` from where the plan is made and one of its microbatches is traced: several plans can share one trace."""
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
    return SpmdModule(program, built, traced, weights, rank, mesh, stored_mesh)


def _staged(plan: Plan, traced: Traced, weights: Weights, device: torch.device, seed: int, own: Schedule | None) -> ParallelModule:
    """This rank's stages of a pipeline; every rank cuts them all, and emits its own."""
    stages = cut_into_stages(bind(plan, traced.graph), plan.pipeline)
    schedule, forward = own_schedule(own, stages) if own is not None else schedule_of(stages), schedule_of(stages, "forward")
    places = connect_stages(stages, device, seed=seed)
    module = PipelineModule(stages, schedule, forward, traced, places)
    offload = plan.residency.offload
    stored_mesh = device_mesh(plan.whole_mesh, HOST)[plan.mesh.names] if offload else places.whole[plan.mesh.names]
    splits = splits_backward(schedule)
    for number in schedule.stages_of(places.rank):
        program = stages.stages[number].program
        built = build(program, traced, device, split_backward=splits)
        rank = places.stage_rank_of(plan.mesh)
        rank.offload = offload
        module.add_stage(number, Share(program, built, traced.constants, weights, rank, stored_mesh, module, module.lasting), splits=splits)
    return module


def _agree(plan: Plan) -> Plan:
    """Rank 0's plan on every rank, as text: ranks never act on plans of their own."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return plan
    box = [plan.to_json() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return Plan.from_json(str(box[0]))
