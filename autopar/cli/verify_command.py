"""`autopar verify`: is the training that a plan makes the same training? Computed on simulated ranks, in this process."""

from typing import TYPE_CHECKING, Annotated

import typer

from autopar.cli.console import output, print_json, working
from autopar.cli.options import (
    Asked,
    Batch,
    ClusterName,
    Debug,
    Json,
    MicroBatches,
    ModelName,
    Offload,
    PinTexts,
    Pipelines,
    PlanFile,
    Seed,
    Seq,
    Steps,
    asked_for,
    checked_pins,
    global_batch,
    read_plan,
)
from autopar.cli.units import count, size
from autopar.core.cluster import Cluster
from autopar.core.mixed import parse_machines
from autopar.core.plan import Plan
from autopar.errors import PlanMismatchError, UsageError, VerificationError
from autopar.models.load import check_name

if TYPE_CHECKING:
    from autopar.verification import VerifyReport

BYTES_PER_ELEMENT = 8 * 4
"""Weights, gradients and the two moments of Adam in float64."""

MEMORY_SHARE = 0.6
DTYPES = ("float64", "float32", "bfloat16")

Precision = Annotated[
    str | None, typer.Option("--dtype", help="What both runs compute in: float64, float32 or bfloat16. [default: bfloat16 for a plan of that, else float64]")
]


def verify(
    model: ModelName, cluster: ClusterName, plan: PlanFile = None, pin: PinTexts = None, micro_batches: MicroBatches = None, offload: Offload = False, pipelines: Pipelines = False,
    batch: Batch = None, seq: Seq = None, dtype: Precision = None, steps: Steps = 10, seed: Seed = 0, json: Json = False, debug: Debug = False,
) -> int:  # fmt: skip
    """Train MODEL both ways, parallel and in one process, and compare loss, every gradient and every parameter. Exit 5 if they differ."""
    machines = parse_machines(cluster)
    check_name(model)
    if dtype not in (None, *DTYPES):
        raise UsageError(f"--dtype {dtype}: the comparison is made in {', '.join(DTYPES)}")
    asked = Asked(pins=checked_pins(pin, machines), micro_batches=micro_batches, offload=offload, pipelines=pipelines)
    given = None if plan is None else read_plan(plan, machines, asked)
    narrow = asked_for(given, "bfloat16" if dtype == "bfloat16" else None, "float32")
    with working("loading torch") as progress:
        from autopar.api import verify as compare
        from autopar.cli.searching import search
        from autopar.models.load import load_model

        samples = global_batch(batch, machines, given.residency.micro_batches if given else micro_batches)
        shapes = load_model(model, batch=samples, seq=seq)
        _check_size(model, sum(p.numel() for p in shapes.module.parameters()), machines.num_devices)
        loaded = load_model(model, batch=samples, seq=seq, device="cpu", dtype=narrow, seed=seed)
        found = given or search(loaded, machines, asked, progress=progress)[0].plan
        try:
            report = compare(loaded.module, found, loaded.kwargs, steps=steps, dtype=dtype or ("bfloat16" if narrow == "bfloat16" else "float64"), progress=progress)
        except PlanMismatchError as error:
            raise PlanMismatchError(f"{error}; for verify a plan is made with --dtype float32 or bfloat16") from error
    if json:
        print_json({"model": model, "cluster": machines.name, "layout": found.summary(), **report.to_dict()})
    else:
        _print_report(report, found, model)
    return 0 if report.equal else VerificationError.exit_code


def too_large(elements: int, num_ranks: int) -> str:
    """Why a model of so many parameters is not verified on this machine; empty if it is."""
    from autopar.verification import MAX_ELEMENTS

    if elements > MAX_ELEMENTS:
        return f"the limit is {count(MAX_ELEMENTS)}"
    needed = elements * BYTES_PER_ELEMENT * (num_ranks + 1)
    present = Cluster.local(1).device.memory_bytes
    return f"{num_ranks} ranks and one process need up to {size(needed)}, this machine has {size(present)}" if needed > MEMORY_SHARE * present else ""


def _check_size(model: str, elements: int, num_ranks: int) -> None:
    reason = too_large(elements, num_ranks)
    if reason:
        raise UsageError(
            f"{model} has {count(elements)} parameters, too many to compute here ({reason}); verify a -tiny preset or a config.json with fewer layers"
        )


def _print_report(report: "VerifyReport", plan: Plan, model: str) -> None:
    from rich.table import Table

    page = output()
    verdict = "equal" if report.equal else "NOT EQUAL"
    steps = f"{report.steps} step{'s' * (report.steps > 1)}"
    page.print(f"{verdict}: {model} as {plan.summary()} on {report.num_ranks} simulated ranks and in one process, {report.dtype}, {steps}", style="bold")
    page.print()
    table = Table("COMPARED", "LARGEST RELATIVE ERROR", box=None, pad_edge=False)
    table.add_row("loss and outputs", f"{report.loss_rel_err:.1e}")
    table.add_row("gradients", f"{report.grad_rel_err_max:.1e}" + (f"  in {report.worst_parameter}" if report.worst_parameter else ""))
    table.add_row("gradient norm", f"{report.grad_norm_rel_err:.1e}")
    table.add_row("parameters", f"{report.param_rel_err_max:.1e}")
    page.print(table)
    page.print(f"bytes into collectives per step and rank: {report.bytes_predicted} predicted, {report.bytes_counted} counted")
    for kind in report.ops_without_rule:
        page.print(f"note: no rule for {kind}, computed on every rank")
    for failure in report.failures:
        page.print(f"failed: {failure}")
