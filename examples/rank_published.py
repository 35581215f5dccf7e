"""Published runs of one model on one cluster under many plans: is the best of them known before it is run, and does the search find one as good?

    python examples/rank_published.py [runs.csv] [--only "Aleph Alpha"] [--seconds 3]

A *group* is what the forecast prices alike but for the plan: model, cluster, batch, precision, software; of one source, with three plans measured or more.
Without a file it is the rows that this project's costs are calibrated on. For every group:

    best measured   the plan that was fastest, as the forecast (`python -m autopar.cost_models.validate`) prices it,
    best predicted  the plan of the group that is fastest by that, and the first over the second, at most 1.1 is the aim
    lost            what was measured of the plan that is predicted best, over what was measured of the best: the price of believing the forecast

and, by the search's costs, which are those of this project's own runtime, not of the software that was measured:

    searched        the joint search's plan, within the memory that the software leaves to a plan
    forced          the best measured plan, everything pinned that was published, and the first over the second: no more than 1 is the aim
    run by them     the searched degrees, microbatch and stage of ZeRO run by that software, as the forecast prices it, over "best measured"

What cannot be searched or forced is named below the table, with the reason, and so are groups of as many published plans of which too few can be priced.
"""

import sys
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from autopar.core.cluster import Cluster
from autopar.core.graph import OpGraph
from autopar.core.unroll import Run
from autopar.errors import AutoparError, InfeasibleError
from autopar.forecast.cases import RECOMPUTE, Case, case_of
from autopar.forecast.forced import Layout3D, pins_of
from autopar.forecast.price import Result, price
from autopar.forecast.runs import OWN_ROWS, Row, Unpriced, read_rows
from autopar.forecast.step import StepPlan
from autopar.forecast.transformer import Dims, transformer_graph
from autopar.joint.at_point import Found
from autopar.joint.search import JointSearch
from autopar.joint.space import Point
from autopar.planner.meshes import role_names
from autopar.planner.pins import Pins
from autopar.planner.roles import batch_factors
from autopar.planner.search import Options

FEWEST = 3
NEAR = 1.10
LIFTED = 100.0
"""Share of a device's memory that holds any plan: what was measured did fit."""

VOCABULARY = 1024
"""Vocabularies are padded to multiples of it, so that all degrees divide them."""

SETTING = ("source", "layers", "hidden", "seq", "global_batch", "num_gpus", "gpu", "precision", "heads", "experts")
PLAN = ("dp", "tp", "pp", "vpp", "cp", "ep", "sp", "zero_stage", "micro_batch", "recompute")
"""Columns of a row: what plans of a group have in common, and what makes a plan."""

FREE = Pins()


@dataclass(frozen=True)
class Priced:
    """A measured plan: its seconds as measured, the forecast of it, and the case with that one plan."""

    case: Case
    measured_s: float
    result: Result

    @property
    def predicted_s(self) -> float:
        return self.result.predicted_s


@dataclass(frozen=True)
class Group:
    """Plans of one setting, and where they come from."""

    source: str
    plans: tuple[Priced, ...]

    @property
    def case(self) -> Case:
        return self.plans[0].case

    @property
    def name(self) -> str:
        dims, case = self.case.dims, self.case
        return f"{dims.layers} x {dims.hidden}, seq {dims.seq}, batch {samples_of(case)}, {num_devices(case)} {case.row.text('gpu')}"

    @cached_property
    def best_measured(self) -> Priced:
        return min(self.plans, key=lambda p: p.measured_s)

    @property
    def best_predicted_s(self) -> float:
        return min(p.predicted_s for p in self.plans)

    @property
    def ratio(self) -> float:
        return self.best_measured.predicted_s / self.best_predicted_s

    @property
    def lost(self) -> float:
        """What running the plan that is predicted best costs, as measured: over the best of the group."""
        return min(self.plans, key=lambda p: p.predicted_s).measured_s / self.best_measured.measured_s


def num_devices(case: Case) -> int:
    return case.plan.num_devices


def samples_of(case: Case) -> int:
    return case.tokens // case.dims.seq


# --- groups ----------------------------------------------------------------------------------------------------------------


def groups(rows: Sequence[Row], words: str = "") -> list[Group]:
    """Groups whose source has these words, priced."""
    by_setting: dict[Hashable, dict[Hashable, list[Case]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        case = measured(row) if words.lower() in row.source.lower() else None
        if case is not None:
            by_setting[setting(case)][case.plans, case.recompute].append(case)
    wanted = [plans for plans in by_setting.values() if len(plans) >= FEWEST]
    found = []
    for plans in track(wanted, "forecasts", console=Console(stderr=True)):
        priced = [one for cases in plans.values() if (one := _priced(cases)) is not None]
        if len(priced) >= FEWEST:
            found.append(Group(priced[0].case.row.source, tuple(priced)))
    return sorted(found, key=lambda g: (g.source, g.name))


def measured(row: Row) -> Case | None:
    """The case of a row whose step was measured and may be scored."""
    return None if why_not(row) else case_of(row)


def why_not(row: Row) -> str:
    """Why a row does not compete, empty where it does; mixtures of experts are left out, as their forecasts are."""
    if row.text("kind") != "run" or row.text("scorable") == "no":
        return "not to be scored"
    try:
        case = case_of(row)
    except AutoparError as error:
        return str(error)
    return "mixture of experts" if case.dims.experts is not None else "" if case.measured_s is not None else "no step time"


def left_out(rows: Sequence[Row], words: str = "") -> Iterator[str]:
    """Groups by what is published of them, with plans enough of which too few compete, and why."""
    plans: dict[tuple[str, ...], dict[tuple[str, ...], str]] = defaultdict(dict)
    for row in rows:
        if row.text("kind") == "run" and words.lower() in row.source.lower():
            of_setting, plan = plans[tuple(row.text(name) for name in SETTING)], tuple(row.text(name) for name in PLAN)
            of_setting[plan] = of_setting.get(plan, "missing") and why_not(row)
    for (source, layers, hidden, seq, batch, number, gpu, *_), reasons in sorted(plans.items()):
        missing = [why for why in reasons.values() if why]
        if len(reasons) >= FEWEST > len(reasons) - len(missing):
            yield f"left out: {source}, {layers} x {hidden}, seq {seq}, batch {batch}, {number} {gpu}: {len(missing)} of {len(reasons)} plans: {', '.join(sorted(set(missing)))}"


def setting(case: Case) -> Hashable:
    """All that plans of a group have in common."""
    repaired = "do not compare with rows dated before" in case.row.notes
    return case.row.source, case.dims, case.cluster, num_devices(case), samples_of(case), case.kernels, case.precision, case.dtype, repaired


def _priced(cases: Sequence[Case]) -> Priced | None:
    """One plan, by the median of its measurements; where a source prints less than a plan, the plan that its forecast is of."""
    case = cases[0]
    try:
        tried = [(price(alone), alone) for alone in (replace(case, plan=plan, others=()) for plan in case.plans)]
    except Unpriced:
        return None
    result, alone = min(tried, key=lambda pair: (not pair[0].fits, pair[0].predicted_s))
    return Priced(alone, median(c.measured_s or 0.0 for c in cases), result)


# --- search ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """By the search's costs the step of its plan and of the best measured one; by the forecast that of the searched one as their software runs it. What was found holds all tables of its search, so a few words of it are kept alone."""

    point: Point
    virtual: int
    plan: StepPlan | None
    searched_s: float
    forced_s: float
    by_them_s: float | None

    @property
    def ratio(self) -> float:
        return self.searched_s / self.forced_s


def compare(group: Group, seconds: float) -> Comparison:
    """Raises AutoparError where the model, the cluster or the best measured plan is outside of what is searched."""
    best = group.best_measured
    forced_s = search_of(group.case, pins_of_plan(best), LIFTED, seconds).search().best.step_s
    usable = best.result.usable_bytes / best.case.cluster.device.memory_bytes
    found = search_of(group.case, FREE, usable, seconds).search().best
    plan = as_plan(found)
    by_them = price(replace(best.case, plan=with_software(plan, best.case), recompute=RECOMPUTE)) if plan is not None else None
    return Comparison(
        point=found.point, virtual=found.deep.order.virtual, plan=plan, searched_s=found.step_s, forced_s=forced_s,
        by_them_s=by_them.predicted_s if by_them and by_them.fits else None,
    )  # fmt: skip


def search_of(case: Case, pins: Pins, memory_share: float, seconds: float) -> JointSearch:
    """The joint search for a case's model, devices and batch."""
    dims = replace(case.dims, vocab=-(-case.dims.vocab // VOCABULARY) * VOCABULARY)
    options = Options(precision=case.precision, free_micro_batches=True, time_limit_s=seconds, memory_share=memory_share)
    return JointSearch(partial(short_graph, dims, case.dtype), Run("blocks", 0, dims.layers), samples_of(case), filled(case), options, pins)


def short_graph(dims: Dims, dtype: str, samples: int) -> OpGraph:
    return transformer_graph(dims.with_layers(3), samples, dtype)


def filled(case: Case) -> Cluster:
    """The cluster of exactly as many devices as were used."""
    number, each = num_devices(case), case.cluster.devices_per_node
    if number > each and number % each:
        raise Unpriced(f"{number} devices do not fill nodes of {each}")
    return replace(case.cluster, num_nodes=max(1, number // each), devices_per_node=min(number, each))


def pins_of_plan(plan: Priced) -> Pins:
    """All decisions of a measured plan."""
    given, layout = plan.case.plan, plan.case.plan.layout
    if layout.cp > 1:
        raise Unpriced(f"cp={layout.cp}: context parallelism is not searched")
    if given.num_microbatches % given.pp and given.vpp > 1:
        raise Unpriced(f"{given.num_microbatches} microbatches in an interleaved pipeline of {given.pp}")
    mode = plan.result.recompute
    again = f"{mode}+gather" if mode != "none" and layout.sp and plan.case.kernels.repeats_collectives else mode
    degrees = (("dp", layout.dp), ("tp", layout.tp))
    named = tuple(pins_of(layout))
    return Pins(degrees, named, zero=layout.zero, micro_batch=layout.micro_batch, recompute=again, pp=given.pp, virtual=given.vpp)


def as_plan(found: Found) -> StepPlan | None:
    """The degrees of a found plan as Megatron's words have them; None where an axis is used in another way."""
    program, point = found.deep.light.program, found.point
    names = role_names(program, batch_factors(program.graph, program.rules))
    dp = tp = 1
    for name, size in zip(names, program.mesh.sizes, strict=True):
        dp, tp = (dp * size, tp) if name.startswith("dp") else (dp, tp * size)
    if "idle" in names or point.samples % dp:
        return None
    zero = max((z.stage for z in program.residency.zero.values()), default=0)
    layout = Layout3D(dp=dp, tp=tp, zero=zero if dp > 1 else 0, micro_batch=point.samples // dp)
    return StepPlan(layout=layout, pp=point.num_ranks, vpp=found.deep.order.virtual, num_microbatches=point.num_microbatches)


def with_software(plan: StepPlan, case: Case) -> StepPlan:
    """The plan as the software of a case runs it."""
    tp = plan.layout.tp
    sp = tp > 1 and (case.software.sequence_parallel or case.plan.layout.sp)
    return replace(plan, layout=replace(plan.layout, sp=sp, whole_loss=case.software.whole_loss))


# --- the table -------------------------------------------------------------------------------------------------------------


def main(
    runs: Annotated[Path | None, typer.Argument(help="A CSV file of published runs; without one, the rows of this project.")] = None,
    only: Annotated[str, typer.Option(help="Words of the source.")] = "",
    seconds: Annotated[float, typer.Option(help="For every search, from its first plan on; 0: forecasts only.")] = 3.0,
) -> None:
    """Print the table and what it comes to."""
    rows = read_rows(runs or OWN_ROWS)
    found = groups(rows, only)
    compared: dict[int, Comparison] = {}
    refused: list[str] = []
    for n, group in enumerate(track(found, "searches", console=Console(stderr=True))) if seconds else ():
        try:
            compared[n] = compare(group, seconds)
        except AutoparError as error:
            refused.append(f"{group.source}, {group.name}: {'no plan fits; ' if isinstance(error, InfeasibleError) else ''}{error}")
    console = Console(width=None if sys.stdout.isatty() else 230)
    console.print(table_of(found, compared))
    for line in (*refused, *left_out(rows, only), *summary(found, compared)):
        console.print(line, highlight=False, soft_wrap=True)


def table_of(found: Sequence[Group], compared: dict[int, Comparison]) -> Table:
    table = Table("source", "group", "plans", "best measured", "best predicted", "ratio", "lost", "searched plan", "searched", "forced", "ratio", "run by them", box=None)
    for n, group in enumerate(found):
        made = compared.get(n)
        cells = ("", "-", "-", "-", "-") if made is None else (
            f"{made.point}, v{made.virtual}", f"{made.searched_s:.4g} s", f"{made.forced_s:.4g} s", f"{made.ratio:.3f}",
            f"{made.by_them_s / group.best_measured.predicted_s:.3f}" if made.by_them_s else "-",
        )  # fmt: skip
        table.add_row(
            group.source[:28], group.name, str(len(group.plans)), f"{group.best_measured.predicted_s:.4g} s", f"{group.best_predicted_s:.4g} s",
            f"{group.ratio:.3f}", f"{group.lost - 1:.1%}", *cells,
        )  # fmt: skip
    return table


def summary(found: Sequence[Group], compared: dict[int, Comparison]) -> Iterator[str]:
    yield f"best measured plan within {NEAR - 1:.0%} of the best predicted: {sum(g.ratio <= NEAR for g in found)} of {len(found)} groups"
    yield f"the plan that is predicted best was measured within {NEAR - 1:.0%} of the best: {sum(g.lost <= NEAR for g in found)} of {len(found)} groups"
    if compared:
        them = [(c.by_them_s, found[n].best_measured.predicted_s) for n, c in compared.items() if c.by_them_s is not None]
        yield f"searched plan no slower than the best measured one, by the search's costs: {sum(c.ratio <= 1 for c in compared.values())} of {len(compared)} groups"
        yield f"... and as their software would run it, by the forecast: {sum(a <= b for a, b in them)} of {len(them)} that it can run"


if __name__ == "__main__":
    typer.run(main)
