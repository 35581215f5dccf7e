"""The options that commands share, with the checks that typer does not make."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from autopar.core.mixed import Machines
from autopar.core.parts import part_of
from autopar.core.plan import Plan
from autopar.errors import PlanMismatchError, UsageError
from autopar.planner.meshes import forced_mesh
from autopar.planner.pins import parse_pins

LARGEST_COUNT = 10**9
SMALLEST_DEFAULT_BATCH = 8


@dataclass
class Session:
    """What outlives the parsing of one command line."""

    debug: bool = False


def _note_debug(context: typer.Context, wanted: bool) -> bool:
    if wanted:
        context.find_root().ensure_object(Session).debug = True
    return wanted


ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A preset (see `autopar models`), a folder with config.json, or package.module:function.")
]
ClusterName = Annotated[str, typer.Option("--cluster", "-c", help="local:4, h100-sxm:16 (16 nodes), h100-sxm:16x4, a100-sxm:2+h100-sxm:2 (groups) or a .toml file.")]
Batch = Annotated[int | None, typer.Option("--batch", min=1, max=LARGEST_COUNT, help="Global batch. [default: 8, or one per device if more]")]
Seq = Annotated[int | None, typer.Option("--seq", min=1, max=LARGEST_COUNT, help="Sequence length. [default: the model's own]")]
PinTexts = Annotated[
    list[str] | None, typer.Option("--pin", help="dp=2, tp=4, pp=2, schedule=1f1b, virtual=2, zero=3, recompute=full, micro_batch=2 or '*.mlp.*=tp:o'; may be repeated.")
]
DType = Annotated[str | None, typer.Option("--dtype", help="Of weights and computation. [default: float32 on local:N, else bfloat16]")]
MicroBatches = Annotated[
    int | None, typer.Option("--micro-batches", min=1, max=LARGEST_COUNT, help="Passes that make one step; they share the batch. [default: 1, or what suits a pipeline]")
]
Joint = Annotated[bool | None, typer.Option("--joint/--no-joint", help="Search pipelines, meshes, microbatches, sharding, ZeRO and recomputation together. [default: where a deep model is planned for several nodes, or for one on which memory is short]")]
Pipelines = Annotated[bool, typer.Option("--pipelines", help="Look at pipelines too; without it only where a pin asks for one or nothing else fits.")]
Offload = Annotated[bool, typer.Option("--offload", help="Keep the optimizer's state on the host.")]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="A plan written by `autopar plan -o`, instead of a new one.")]
Steps = Annotated[int, typer.Option("--steps", min=1, max=1_000_000, help="Optimizer steps.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of weights, data and random operators.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", callback=_note_debug, is_eager=True, help="Show the traceback of an error.")]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line fixes of a plan; `dtype` None: the command's default; `joint` None: as suits model and cluster."""

    pins: tuple[str, ...] = ()
    micro_batches: int | None = None
    offload: bool = False
    pipelines: bool = False
    dtype: str | None = None
    joint: bool | None = None

    def options(self) -> list[str]:
        """As they are typed; the dtype is no decision of the plan."""
        pins = [f"--pin {text!r}" if "*" in text else f"--pin {text}" for text in self.pins]
        return [*pins, *([f"--micro-batches {self.micro_batches}"] if self.micro_batches else []), *(["--offload"] if self.offload else []), *(["--pipelines"] if self.pipelines else [])]


def asked_for(plan: Plan | None, dtype: str | None, default: str) -> str:
    """The dtype of weights and computation: that of a plan, else as asked."""
    if plan is None:
        return dtype or default
    found = "bfloat16" if plan.residency.precision.master == "float32" else default
    if dtype is not None and dtype != found:
        raise UsageError(f"--dtype {dtype}: the plan is for {found}; leave the option out, or plan again")
    return found


def default_dtype(cluster: Machines) -> str:
    """What people train in: 16 bits on accelerators, 32 in processes of this machine."""
    return "float32" if cluster.name.startswith("local:") else "bfloat16"


def checked_pins(texts: Sequence[str] | None, cluster: Machines) -> tuple[str, ...]:
    """The pins, refused before any model is built if they make no sense or do not multiply to the cluster."""
    pins = tuple(texts or ())
    forced_mesh(parse_pins(pins), cluster)
    return pins


def global_batch(batch: int | None, cluster: Machines, micro_batches: int | None = None) -> int:
    """The batch asked for, or the smallest one of at least 8 samples that all devices share evenly in every microbatch."""
    shares = cluster.num_devices * (micro_batches or 1)
    return batch or shares * math.ceil(SMALLEST_DEFAULT_BATCH / shares)


def read_plan(path: Path, cluster: Machines, asked: Asked) -> Plan:
    """The plan of a file, if it is one for as many devices as the cluster has, or a part of it."""
    for option in asked.options():
        raise UsageError(f"{option} and --plan {path}: a plan is complete; leave one of them out")
    plan = Plan.load(path)
    if part_of(cluster, plan.num_ranks) is None:
        raise PlanMismatchError(
            f"{path}: made for {plan.num_ranks} devices ({plan.mesh}), {cluster.name} has {cluster.num_devices}; "
            "give the cluster it was made for, or plan again"
        )
    return plan


def checked_share(name: str, value: float, largest: float) -> float:
    """A positive finite number up to `largest`; NaN passes typer's own limits."""
    if not math.isfinite(value) or not 0 < value <= largest:
        raise UsageError(f"{name} is {value:g}; give a number above 0 and up to {largest:g}")
    return value
