"""`autopar whatif`: the plan again on a changed machine, on a row of them, or with less and less memory."""

import math
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autopar.cli.console import output, print_json, working
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
from autopar.cli.points import Point, given, print_points
from autopar.cli.searching import checked_budget
from autopar.cli.units import duration, size
from autopar.core.change import changed
from autopar.core.collector import collector_paused
from autopar.core.forked import Say, Told, found_of_row, most_processes
from autopar.core.mixed import Machines, parse_machines
from autopar.core.units import shown
from autopar.errors import InfeasibleError, UsageError
from autopar.models.load import check_name

if TYPE_CHECKING:
    from rich.console import Console

    from autopar.request import Request

MAX_POINTS = 200
FEW = 3
"""Machines that are planned for one after the other: the search has helpers of its own."""

SAME = "as it is"

ROUNDING = 1e-9
"""Of the seconds of a step."""

Changes = Annotated[list[str] | None, typer.Option("--set", help="inter_node.bandwidth*=2, device.memory=40GB, num_nodes=4; may be repeated, all together are one machine.")]
Sweep = Annotated[str | None, typer.Option("--sweep", help="inter_node.bandwidth*=0.25..4:9: factors from 0.25 to 4 in 9 equal ratios, a plan for each.")]
Budget = Annotated[float | None, typer.Option("--budget", help="Seconds that the joint search may take for each plan, likely ones first, with the gap that is proven of them; of a front, for looking beyond the points of the plan before: it goes on to its end without. [default: to a gap of 1 %, at most 30 behind a first plan]")]
Front = Annotated[bool, typer.Option("--front", help="The fastest plan, then the fastest that holds less, and so on to the leanest.")]


def whatif(
    model: ModelName, cluster: ClusterName, changes: Changes = None, sweep: Sweep = None, front: Front = False, batch: Batch = None, seq: Seq = None, dtype: DType = None,
    pin: PinTexts = None, micro_batches: MicroBatches = None, offload: Offload = False, pipelines: Pipelines = False, joint: Joint = None, budget: Budget = None, json: Json = False, debug: Debug = False,
) -> int:  # fmt: skip
    """Plan MODEL again where the machine has other numbers or a plan may hold less: what changes, and where the best plan becomes another one."""
    machines = parse_machines(cluster)
    check_name(model)
    if not (changes or sweep or front):
        raise UsageError("whatif needs a change: --set inter_node.bandwidth*=2, --sweep inter_node.bandwidth*=0.25..4:9, or --front")
    if sweep and front:
        raise UsageError("--sweep and --front are two tables; leave one of them out")
    base = changed(machines, changes or ())
    texts = _swept(sweep) if sweep else []
    clusters = {text: changed(base, [text]) for text in texts} if sweep else {SAME: machines, ", ".join(changes or ()): base}
    asked = Asked(pins=checked_pins(pin, machines), micro_batches=micro_batches, offload=offload, pipelines=pipelines, dtype=dtype or default_dtype(machines), joint=joint)
    limits = checked_budget(budget)
    with collector_paused(), working("loading torch") as progress:
        from autopar.models.load import load_model
        from autopar.request import Request

        largest = max(clusters.values(), key=lambda c: c.num_devices)
        loaded = load_model(model, batch=global_batch(batch, largest, micro_batches), seq=seq, device="meta", dtype=asked.dtype)
        request = Request(loaded.module, loaded.kwargs)
        points, options = [], {**given(asked), "tokens": loaded.tokens_per_batch, **limits}
        if not front:
            points = _on_each(request, clusters, options, progress, appraised=json or not sweep)
        for plan in request.front(base, progress=progress, **options)[:MAX_POINTS] if front else ():
            points.append(Point(size(plan.predicted.memory.high_bytes), plan, request.appraised(plan, base) if json else None))
    if json:
        print_json({"model": loaded.name, "cluster": machines.name, "plans": [p.content() for p in points]})
    elif sweep or front:
        _print_rows(output(), points, "HOLDS AT MOST" if front else "CHANGE")
    else:
        print_points(output(), points, machines)
    return 0


def _on_each(request: "Request", clusters: Mapping[str, Machines], options: dict[str, Any], progress: Say, *, appraised: bool) -> list[Point]:
    """Of a row of machines several at a time, where nothing is left to be traced: the plans of both ends, then the others, whose searches begin with those. What one
    search of a process knows is left to the next."""
    names, machines = list(clusters), list(clusters.values())

    def find(n: int, told: Told, say: Say) -> tuple[Point, Hashable]:
        say(f"planning with {names[n]}")
        row = {} if "budget_s" in options else {"row": tuple([like for like in dict.fromkeys(told) if like is not None])}
        return _point(request, names[n], machines[n], {**options, **row}, lambda text: say(f"{names[n]}: {text}"), appraised=appraised)

    if len(names) <= FEW or not request.trace_ahead(machines, **options):
        return [_point(request, name, cluster, options, progress, appraised=appraised)[0] for name, cluster in clusters.items()]
    found = found_of_row(find, len(names), most_processes(), progress, lambda pair: pair[1], backwards=request.knows_more(machines[-1], machines[0]))
    for n, before in (*((n, n - 1) for n in range(1, len(names))), *((n, n + 1) for n in reversed(range(len(names) - 1)))):
        if _may_be_better(request, found[before][0], found[n][0], machines[n]):
            again = find(n, (found[before][1], found[n][1]), progress)
            found[n] = min(again, found[n], key=lambda pair: pair[0].plan.predicted.step_time_s if pair[0].plan is not None else math.inf)
    return [point for point, _ in found]


def _may_be_better(request: "Request", other: Point, point: Point, cluster: Machines) -> bool:
    """Whether the plan of another machine is a different one, and faster on this one: both are near enough to what is proven, but a row reads oddly where a machine
    leaves its neighbours' plan for a slower one."""
    if other.plan is None or point.plan is None or other.plan.summary() == point.plan.summary():
        return False
    return request.appraised(other.plan, cluster).step_s < point.plan.predicted.step_time_s * (1 - ROUNDING)


def _point(request: "Request", name: str, cluster: Machines, options: dict[str, Any], progress: Say, *, appraised: bool) -> tuple[Point, Hashable]:
    """With what searches on other machines may begin with. `appraised`: term by term."""
    try:
        found = request.planned(cluster, progress=progress, **options)
    except InfeasibleError as error:
        return Point(name, None, None, str(error)), None
    return Point(name, found.plan, request.appraised(found.plan, cluster) if appraised else None), found.like


def _swept(text: str) -> list[str]:
    """The changes of a sweep, from its first factor to its last."""
    key, times, numbers = text.partition("*=")
    ends, _, count = numbers.partition(":")
    first, dots, last = ends.partition("..")
    try:
        low, high, number = float(first), float(last), int(count)
    except ValueError:
        low, high, number = 0.0, 0.0, 0
    if not (times and dots and 0 < low < math.inf and 0 < high < math.inf and 2 <= number <= MAX_POINTS):
        raise UsageError(f"--sweep {shown(text)}: write KEY*=FIRST..LAST:POINTS with factors above 0 and 2 to {MAX_POINTS} points, such as inter_node.bandwidth*=0.25..4:9")
    return [f"{key}*={low * (high / low) ** (n / (number - 1)):.4g}" for n in range(number)]


def _print_rows(page: "Console", points: list[Point], title: str) -> None:
    from rich.table import Table

    table = Table(title, "PLAN", "STEP", "MEMORY", "", box=None, pad_edge=False)
    before = None
    for p in points:
        if p.plan is None:
            table.add_row(p.name, "none fits", "", "", p.refusal.partition(";")[0])
        else:
            gap = f"gap {p.plan.proof.gap:.1%}" if p.plan.proof.status.startswith("budget") else ""
            note = ", ".join(filter(None, ("another plan" if before not in (None, p.plan.summary()) else "", gap)))
            table.add_row(p.name, p.plan.summary(), duration(p.plan.predicted.step_time_s), size(p.plan.predicted.memory.high_bytes), note)
        before = p.plan.summary() if p.plan is not None else "none fits"
    page.print(table)
