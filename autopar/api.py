"""The public verbs: plan, verify, parallelize."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from autopar.core.cluster import Cluster
from autopar.core.mesh import Mesh
from autopar.core.plan import Plan
from autopar.errors import UsageError
from autopar.planner.bind import bind
from autopar.planner.plan import MEMORY_SHARE, Options, plan_graph
from autopar.rewrite.build import build
from autopar.runtime.distributed import connect, device_mesh
from autopar.runtime.module import ParallelModule
from autopar.runtime.weights import Weights
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


def _trace(model: nn.Module, example_inputs: Any) -> Traced:
    args, kwargs = _inputs_of(model, example_inputs)
    return trace(model, args, kwargs)


def plan_timed(
    model: nn.Module, cluster: Cluster, example_inputs: Any = None, *, pins: Sequence[str] = (), mesh: Mesh | None = None, tokens: int = 0, time_limit_s: float = 30.0,
    max_memory: float = MEMORY_SHARE, progress: Progress = _quiet,
) -> tuple[Plan, dict[str, float]]:  # fmt: skip
    """`plan`, and the wall seconds of its two parts: {"trace", "search"}."""
    start = time.perf_counter()
    progress("tracing")
    traced = _trace(model, example_inputs)
    middle = time.perf_counter()
    options = Options(pins=tuple(pins), mesh=mesh, memory_share=max_memory, time_limit_s=time_limit_s, tokens=tokens)
    planned = plan_graph(traced.graph, cluster, options, progress)
    return planned.plan, {"trace": middle - start, "search": time.perf_counter() - middle}


def plan(
    model: nn.Module, cluster: Cluster, example_inputs: Any = None, *, pins: Sequence[str] = (), mesh: Mesh | None = None, tokens: int = 0, time_limit_s: float = 30.0,
    max_memory: float = MEMORY_SHARE, progress: Progress = _quiet,
) -> Plan:  # fmt: skip
    """The best plan found for a model on a cluster. Needs no device and no weights: meta tensors do.

    `example_inputs` are one global batch; `pins` constrain the search (`"tp=2"`, `"*.mlp.*=tp:o"`); `mesh`
    fixes the mesh, else all of one and two axes are searched; `max_memory` is the
    share of a device's memory a plan may use. Raises TraceError, UsageError, InfeasibleError.
    """
    return plan_timed(model, cluster, example_inputs, pins=pins, mesh=mesh, tokens=tokens, time_limit_s=time_limit_s, max_memory=max_memory, progress=progress)[0]


def parallelize(
    model: nn.Module, cluster: Cluster, example_inputs: Any = None, *, plan: Plan | None = None, pins: Sequence[str] = (), seed: int = 0, device: torch.device | None = None
) -> ParallelModule:
    """Plan (unless a plan is given), rewrite for this rank and return the module to train; call under torchrun.

    Weights come from the model, or, where it is on the meta device, are initialised module by module from `seed`, so that
    no rank holds the whole model. Every rank calls the module with the same global batch.
    """
    traced = _trace(model, example_inputs)
    if plan is None:
        plan = _agree(plan_graph(traced.graph, cluster, Options(pins=tuple(pins))).plan)
    program = bind(plan, traced.graph)
    device = device or (torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() and dist.get_backend() == "nccl" else torch.device("cpu"))
    built = build(program, traced, device)
    rank = connect(program.mesh, program.groups, device, seed=seed)
    rank.offload = program.residency.offload
    mesh = device_mesh(program.mesh, device)
    stored_mesh = device_mesh(program.mesh, torch.device("cpu")) if rank.offload else mesh
    module = ParallelModule(program, built.module, built.inputs, built.positions, traced, Weights(model, seed=seed), rank, mesh, stored_mesh)
    return module.train(model.training)


def _agree(plan: Plan) -> Plan:
    """Rank 0's plan on every rank, as text: ranks never act on plans of their own."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return plan
    box = [plan.to_json() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return Plan.from_json(str(box[0]))
