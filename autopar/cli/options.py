"""The options that commands share, with the checks that typer does not make."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from autopar.core.cluster import Cluster
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
ClusterName = Annotated[str, typer.Option("--cluster", "-c", help="local:4, h100-sxm:16 (16 nodes), h100-sxm:16x4 or a .toml file.")]
Batch = Annotated[int | None, typer.Option("--batch", min=1, max=LARGEST_COUNT, help="Global batch. [default: 8, or one per device if more]")]
Seq = Annotated[int | None, typer.Option("--seq", min=1, max=LARGEST_COUNT, help="Sequence length. [default: the model's own]")]
PinTexts = Annotated[list[str] | None, typer.Option("--pin", help="dp=2, tp=4 or '*.mlp.*=tp:o'; may be repeated.")]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="A plan written by `autopar plan -o`, instead of a new one.")]
Steps = Annotated[int, typer.Option("--steps", min=1, max=1_000_000, help="Optimizer steps.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of weights, data and random operators.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", callback=_note_debug, is_eager=True, help="Show the traceback of an error.")]


def checked_pins(texts: Sequence[str] | None, cluster: Cluster) -> tuple[str, ...]:
    """The pins, refused before any model is built if they make no sense or do not multiply to the cluster."""
    pins = tuple(texts or ())
    forced_mesh(parse_pins(pins), cluster)
    return pins


def global_batch(batch: int | None, cluster: Cluster) -> int:
    """The batch asked for, or the smallest one of at least 8 samples that all devices share evenly."""
    devices = cluster.num_devices
    return batch or devices * math.ceil(SMALLEST_DEFAULT_BATCH / devices)


def read_plan(path: Path, cluster: Cluster, pins: Sequence[str]) -> Plan:
    """The plan of a file, if it is one for as many devices as the cluster has."""
    if pins:
        raise UsageError(f"--pin {pins[0]} and --plan {path}: a plan is complete; leave one of them out")
    plan = Plan.load(path)
    if plan.mesh.num_ranks != cluster.num_devices:
        raise PlanMismatchError(
            f"{path}: made for {plan.mesh.num_ranks} devices ({plan.mesh}), {cluster.name} has {cluster.num_devices}; "
            "give the cluster it was made for, or plan again"
        )
    return plan


def checked_share(name: str, value: float, largest: float) -> float:
    """A positive finite number up to `largest`; NaN passes typer's own limits."""
    if not math.isfinite(value) or not 0 < value <= largest:
        raise UsageError(f"{name} is {value:g}; give a number above 0 and up to {largest:g}")
    return value
