"""Plans that a command line names side by side: `searched`, a baseline, pins, or a plan file; each with what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from autopar.cli.options import Asked
from autopar.cli.units import duration, size
from autopar.core.mixed import Machines
from autopar.core.plan import Plan
from autopar.errors import InfeasibleError, UsageError
from autopar.planner.baselines import EXAMPLE, NAMED, baseline_pins
from autopar.planner.pins import parse_pins

if TYPE_CHECKING:
    from autopar.planner.appraisal import Appraisal
    from autopar.request import Request

SEARCHED = "searched"
SMALL = 0.005
"""Terms that are less than this share of the longest step in every column are summed up in one row."""


@dataclass(frozen=True)
class Point:
    """A plan under the name it was asked for by; `refusal` in place of the plan where there is none."""

    name: str
    plan: Plan | None
    appraisal: "Appraisal | None"
    refusal: str = ""

    def content(self) -> dict[str, Any]:
        if self.plan is None or self.appraisal is None:
            return {"name": self.name, "refusal": self.refusal}
        found = self.appraisal
        return {
            "name": self.name, "layout": self.plan.summary(), "step_time_s": found.step_s, "terms_s": dict(found.terms),
            "peak_memory_bytes": found.memory.high_bytes, "memory_moment": found.memory.moment, "communicated_bytes": found.communicated_bytes,
        }  # fmt: skip


def pins_of(name: str, cluster: Machines) -> tuple[str, ...]:
    """The pins of a name that is no file: none of `searched`, those of a baseline, or the text itself."""
    if name == SEARCHED:
        return ()
    pins = baseline_pins(name, cluster)
    if pins is None:
        if "=" not in name:
            raise UsageError(f"{name!r} is no plan; give {SEARCHED}, {', '.join(NAMED)}, {EXAMPLE}, pins such as tp=2,dp=2, or a file that ends in .json")
        pins = (name,)
    parse_pins(pins)
    return pins


def point(request: "Request", name: str, cluster: Machines, asked: Asked, **options: Any) -> Point:
    """The plan of a name and what it costs. What does not fit is a point too, with the reason."""
    if name.endswith(".json"):
        plan = Plan.load(Path(name))
        return Point(name, plan, request.appraised(plan, cluster))
    try:
        plan = request.planned(cluster, **given(asked, pins_of(name, cluster)), **options).plan
    except InfeasibleError as error:
        return Point(name, None, None, str(error))
    return Point(name, plan, request.appraised(plan, cluster))


def given(asked: Asked, pins: Sequence[str] = ()) -> dict[str, Any]:
    """The options of a request: those of the command line, with further pins."""
    return {"pins": (*asked.pins, *pins), "micro_batches": asked.micro_batches, "offload": asked.offload, "pipelines": asked.pipelines, "joint": asked.joint}


def print_points(page: Console, points: Sequence[Point], cluster: Machines) -> None:
    """A column for each plan: where its time goes, what it holds; then in words what separates it from the first."""
    there = [p for p in points if p.appraisal is not None]
    if there:
        page.print(_table(there))
    for p in points:
        if p.appraisal is None:
            page.print(f"{p.name}: {p.refusal}")
    if len(there) > 1:
        page.print()
    for p in there[1:]:
        page.print(f"{p.name} against {there[0].name}: {difference(there[0], p)}")


def difference(first: Point, other: Point) -> str:
    """`12 % slower (+3.1 ms): all-reduce over tp +4.0 ms, operators -0.9 ms; holds 2.1 GiB less`."""
    a, b = first.appraisal, other.appraisal
    assert a is not None and b is not None, "only plans can be compared"
    extra = b.step_s - a.step_s
    changes = {name: b.terms.get(name, 0.0) - a.terms.get(name, 0.0) for name in {**a.terms, **b.terms}}
    largest = sorted((item for item in changes.items() if abs(item[1]) > SMALL * a.step_s), key=lambda item: -abs(item[1]))
    words = ", ".join(f"{name} {_signed(seconds)}" for name, seconds in largest[:4])
    held = b.memory.high_bytes - a.memory.high_bytes
    memory = f"; holds {size(abs(held))} {'more' if held > 0 else 'less'}" if held else ""
    if abs(extra) <= SMALL * a.step_s:
        return f"as fast{f': {words}' if words else ''}{memory}"
    return f"{abs(extra) / a.step_s:.0%} {'slower' if extra > 0 else 'faster'} ({_signed(extra)}): {words}{memory}"


def _signed(seconds: float) -> str:
    return f"{'+' if seconds >= 0 else '-'}{duration(abs(seconds))}"


def _table(points: Sequence[Point]) -> Table:
    table = Table("", *(p.name for p in points), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    found = [p.appraisal for p in points if p.appraisal is not None]
    longest = max(a.step_s for a in found)
    names = list(dict.fromkeys(name for a in found for name in a.terms))
    shown = [name for name in names if any(abs(a.terms.get(name, 0.0)) > SMALL * longest for a in found)]
    table.add_row("layout", *(p.plan.summary() for p in points if p.plan is not None))
    for name in shown:
        table.add_row(name, *(duration(a.terms[name]) if a.terms.get(name) else "" for a in found))
    if len(shown) < len(names):
        rest = [sum(s for name, s in a.terms.items() if name not in shown) for a in found]
        table.add_row("all else", *(duration(seconds) if seconds > 0 else "" for seconds in rest))
    table.add_row("step", *(duration(a.step_s) for a in found), style="bold")
    table.add_row("memory", *(size(a.memory.high_bytes) for a in found))
    table.add_row("communicated", *(size(a.communicated_bytes) for a in found))
    return table
