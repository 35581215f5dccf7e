"""The best plan on groups of different devices, of four kinds:

    one group alone               the other devices stay idle
    all as slow as the slowest    one plan over all devices, as if they did not differ
    a pipeline over the groups    every stage on devices of one kind, as deep as suits them (`mixed.py`)
    copies that share the batch   each on devices of one kind, with as many of the microbatches as suits them (`shared.py`)

So it is never slower than the best plan of any one group, nor than what is made of all devices by the numbers of the slowest.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from autopar.core.cluster import Cluster
from autopar.core.collector import collector_paused
from autopar.core.graph import OpGraph
from autopar.core.mixed import MixedCluster
from autopar.core.plan import Plan
from autopar.errors import AutoparError, InfeasibleError, UsageError
from autopar.planner.advice import Retrace
from autopar.planner.lengths import Task
from autopar.planner.mixed import MixedPipelines
from autopar.planner.pins import parse_pins
from autopar.planner.pipelines import StagedCandidate
from autopar.planner.plan import UNPRICED_GAIN, Planned, finished, may_be_pipelined
from autopar.planner.search import Options
from autopar.planner.shared import SharedSearch

OnOne = Callable[[Cluster], Planned]
"""The best plan on a cluster of equal devices."""

OverAll = Callable[[float], tuple[Planned | None, float]]
"""The best plan whose parts lie on several groups and whose step takes less than so many seconds, and a bound on all of these."""

Progress = Callable[[str], None]


def over_groups(graph: OpGraph, mixed: MixedCluster, options: Options, progress: Progress, retrace: Retrace) -> dict[str, OverAll]:
    """The kinds of plans whose parts lie on several groups; `graph`: of one microbatch, `retrace`: of one of another number."""
    task = Task.of(graph, options)
    over = MixedPipelines(task, mixed.slowest, parse_pins(options.pins), retrace, math.inf, progress, mixed=mixed)
    shared = SharedSearch(over)

    @collector_paused()
    def piped(below_s: float) -> tuple[Planned | None, float]:
        over.below_s = below_s
        best = over.best() if may_be_pipelined(over.pins, options, over.cluster, fits=False) else None
        cut = "the best of this sharding, schedule and order of groups" if best is not None and best.exact else "the best found"
        return made(best, over.bound_s, below_s, f"the fastest of {over.num_tried} pipelines over the groups, its cut {cut}")

    @collector_paused()
    def copied(below_s: float) -> tuple[Planned | None, float]:
        over.below_s = below_s
        best = shared.best()
        return made(best, shared.bound_s, below_s, f"the fastest of {shared.num_tried} shardings of copies over the groups, its shares the best of this one")

    def made(best: StagedCandidate | None, bound_s: float, below_s: float, status: str) -> tuple[Planned | None, float]:
        if best is None or best.step_s >= below_s:
            return None, bound_s
        planned = finished(mixed, best, bound_s, task.batch, f"{status}; the bound is the least compute of any of these", options.tokens)
        return replace(planned, candidates=(best,)), bound_s

    return {"copies that share the batch": copied, "a pipeline over the groups": piped}


@dataclass(frozen=True)
class Tried:
    """One of the kinds: its best plan, or why it has none."""

    what: str
    planned: Planned | None
    refusal: AutoparError | None = None
    none_faster: bool = False

    @property
    def step_s(self) -> float:
        return math.inf if self.planned is None else self.planned.plan.predicted.step_time_s

    def __str__(self) -> str:
        if self.planned is None:
            return f"{self.what}: {'none as asked' if isinstance(self.refusal, UsageError) else 'none faster' if self.none_faster else 'none that fits'}"
        return f"{self.what}: {self.step_s:.4g} s"


def best_on_groups(mixed: MixedCluster, on_one: OnOne, over_all: Mapping[str, OverAll]) -> Planned:
    """The fastest of all kinds. Raises InfeasibleError where no plan fits, UsageError where none does what is asked."""
    parts = [(f"{group.name} alone", group) for group in mixed.groups] + [("all as slow as the slowest", mixed.slowest)]
    tried = [_tried(what, lambda part=part: on_one(part)) for what, part in parts]
    refusal = tried[-1].refusal
    bounds = [t.planned.plan.proof.bound for t in tried if t.planned is not None]
    gain = 1.0 if parts[-1][1].host.action_s else UNPRICED_GAIN
    below_s = min(t.step_s / (gain if t.planned is not None and t.planned.plan.pipeline is None else 1.0) for t in tried)
    for what, search in over_all.items():
        try:
            planned, bound_s = search(below_s)
        except (InfeasibleError, UsageError) as error:
            tried.append(Tried(what, None, error))
            continue
        bounds.append(bound_s)
        looked_at = bound_s < math.inf
        tried.append(Tried(what, planned, None if looked_at else UsageError(f"{what} is not what is asked for"), none_faster=below_s < math.inf))
        below_s = min(below_s, tried[-1].step_s)
    best = min(tried, key=lambda t: t.step_s)
    if best.planned is None:
        raise refusal or InfeasibleError(f"no plan fits on {mixed.name}")
    others = tuple(sorted((t for t in tried if t.planned is not None and t is not best), key=lambda t: t.step_s))

    def next_best(number: int) -> tuple[Plan, ...]:
        return tuple(t.planned.plan for t in others if t.planned is not None)[:number]

    note = "; ".join(str(t) for t in tried)
    return replace(best.planned, plan=_noted(best.planned.plan, min(bounds), note), others=next_best)


def _tried(what: str, plan: Callable[[], Planned]) -> Tried:
    try:
        return Tried(what, plan())
    except (InfeasibleError, UsageError) as error:
        return Tried(what, None, error)


def _noted(plan: Plan, bound_s: float, note: str) -> Plan:
    """With what it was chosen from."""
    objective, bound_s = plan.proof.objective, min(bound_s, plan.proof.objective)
    proof = replace(plan.proof, bound=bound_s, gap=(objective - bound_s) / max(objective, 1e-300), status=f"{plan.proof.status}; the best of what the groups offer")
    return replace(plan, proof=proof, notes=(*plan.notes, f"best plans of the groups: {note}"))
