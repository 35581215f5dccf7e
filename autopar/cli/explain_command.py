"""`autopar explain`: why this plan, what each decision saves, and why not another one."""

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Annotated

import typer

from autopar.cli.console import output, print_json, working
from autopar.cli.layout import LAYER_NUMBER
from autopar.cli.options import (
    Asked,
    Batch,
    ClusterName,
    Debug,
    DType,
    Joint,
    Json,
    MicroBatches,
    ModelName,
    Offload,
    PinTexts,
    Pipelines,
    Seq,
    checked_pins,
    default_dtype,
    global_batch,
)
from autopar.cli.points import Point, difference, given, pins_of, point, print_points
from autopar.cli.units import duration
from autopar.core.collector import collector_paused
from autopar.core.mixed import Machines, MixedCluster, parse_machines
from autopar.core.plan import Plan
from autopar.errors import AutoparError
from autopar.models.load import check_name

if TYPE_CHECKING:
    from rich.console import Console

    from autopar.planner.explain import Decision
    from autopar.request import Request

MAX_DECISIONS = 16
NOTHING_S = 1e-7
"""Alternatives that cost less than this more are as good."""

WhyNot = Annotated[list[str] | None, typer.Option("--why-not", help="Pins such as tp=4,pp=2, or a baseline: infeasible by how much, or slower because of what.")]
Top = Annotated[int, typer.Option("--top", min=1, max=100, help="How many other plans to show.")]


def explain(
    model: ModelName, cluster: ClusterName, batch: Batch = None, seq: Seq = None, dtype: DType = None, pin: PinTexts = None, micro_batches: MicroBatches = None,
    offload: Offload = False, pipelines: Pipelines = False, joint: Joint = None, why_not: WhyNot = None, top: Top = 3, json: Json = False, debug: Debug = False,
) -> int:  # fmt: skip
    """Say why the best plan of MODEL is the best: its terms, the best of other meshes or pipelines, what every decision saves."""
    machines = parse_machines(cluster)
    check_name(model)
    for text in why_not or ():
        pins_of(text, machines)
    asked = Asked(pins=checked_pins(pin, machines), micro_batches=micro_batches, offload=offload, pipelines=pipelines, dtype=dtype or default_dtype(machines), joint=joint)
    with collector_paused(), working("loading torch") as progress:
        from autopar.alternatives import alternatives
        from autopar.models.load import load_model
        from autopar.planner.explain import decisions_of
        from autopar.request import Request

        loaded = load_model(model, batch=global_batch(batch, machines, micro_batches), seq=seq, device="meta", dtype=asked.dtype)
        request = Request(loaded.module, loaded.kwargs)
        options = {**given(asked), "tokens": loaded.tokens_per_batch}
        planned = request.planned(machines, progress=progress, **options)
        first = Point("searched", planned.plan, request.appraised(planned.plan, machines))
        progress("pricing the alternatives of every decision")
        decisions = _alike(decisions_of(planned) if planned.candidates else alternatives(request, _used(machines, planned.plan), planned.plan, progress=progress, **options))
        others = [Point(_named(p, planned.plan), p, request.appraised(p, machines)) for p in planned.others(top)]
        asked_for = [_why_not(request, text, machines, asked) for text in why_not or ()]
    if json:
        print_json({
            "model": loaded.name, "cluster": machines.name, "plan": first.content(), "others": [p.content() for p in others], "why_not": [p.content() for p in asked_for],
            "decisions": [{"what": d.what, "count": n, "chosen": d.chosen, "alternative": d.alternative, "extra_s": None if d.extra_s == math.inf else d.extra_s} for d, n in decisions],
        })  # fmt: skip
    else:
        _print(output(), first, decisions, others, asked_for, machines)
    return 0


def _named(other: Plan, plan: Plan) -> str:
    """A plan that was not taken, by its layout, and where it lies if that is elsewhere."""
    return other.summary() if other.cluster == plan.cluster else f"{other.summary()} on {other.cluster}"


def _used(machines: Machines, plan: Plan) -> Machines:
    """Other decisions on the devices that the plan uses."""
    return machines.used_by(plan.cluster) if isinstance(machines, MixedCluster) else machines


def _why_not(request: "Request", text: str, cluster: Machines, asked: Asked) -> Point:
    try:
        return point(request, text, cluster, asked)
    except AutoparError as error:  # pins that contradict each other or fit no mesh: that is the answer
        return Point(text, None, None, str(error))


def _alike(decisions: "tuple[Decision, ...]") -> "list[tuple[Decision, int]]":
    """Layers that differ only in their number and have the same alternatives are one line, with their sum; the dearest first."""
    from autopar.planner.explain import Decision

    groups: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
    for d in decisions:
        groups[LAYER_NUMBER.sub("*", d.what), d.chosen, d.alternative].append(d.extra_s)
    found = [(Decision(*key, sum(extra) / len(extra)), len(extra)) for key, extra in groups.items()]
    return sorted(found, key=lambda item: (-item[0].extra_s, item[0].what))


def _extra(seconds: float) -> str:
    if seconds == math.inf:
        return "does not fit"
    return "nothing" if abs(seconds) < NOTHING_S else f"{'+' if seconds > 0 else '-'}{duration(abs(seconds))}"


def _print(page: "Console", first: Point, decisions: "list[tuple[Decision, int]]", others: list[Point], asked_for: list[Point], cluster: Machines) -> None:
    from rich.table import Table

    assert first.plan is not None, "an infeasible model raises"
    print_points(page, [first, *others], cluster)
    page.print()
    table = Table("DECISION", "COUNT", "CHOSEN", "BEST OTHER", "WHICH COSTS, EACH", box=None, pad_edge=False)
    for d, number in decisions[:MAX_DECISIONS]:
        table.add_row(d.what, f"x{number}", d.chosen, d.alternative, _extra(d.extra_s))
    if decisions:
        page.print(table)
    if len(decisions) > MAX_DECISIONS:
        page.print(f"... and {len(decisions) - MAX_DECISIONS} that cost less", style="dim")
    for p in asked_for:
        page.print(f"why not {p.name}: {difference(first, p) if p.plan is not None else p.refusal}")


