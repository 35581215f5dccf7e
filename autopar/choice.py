"""The plan that is best by an objective, of the parts of the cluster that it may use."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from autopar.core.cluster import Cluster
from autopar.core.mixed import Machines, MixedCluster
from autopar.core.objective import Objective
from autopar.core.parts import parts
from autopar.core.plan import Plan
from autopar.errors import InfeasibleError, UsageError
from autopar.request import Progress, Request, quiet

UNIT = "float32"
"""Flops are counted as if all were of this dtype, which every device has: parts differ in all peaks alike."""


@dataclass(frozen=True)
class Looked:
    """A part of the cluster with its best plan, or why it has none."""

    cluster: Machines
    plan: Plan | None
    refusal: str = ""

    @property
    def step_s(self) -> float:
        return self.plan.predicted.step_time_s if self.plan is not None else math.inf

    @property
    def device_s(self) -> float:
        """Seconds of all its devices, for one step."""
        return self.cluster.num_devices * self.step_s

    def content(self) -> dict[str, Any]:
        if self.plan is None:
            return {"cluster": self.cluster.name, "devices": self.cluster.num_devices, "refusal": self.refusal}
        return {
            "cluster": self.cluster.name, "devices": self.cluster.num_devices, "layout": self.plan.summary(), "step_time_s": self.step_s,
            "peak_memory_bytes": self.plan.predicted.peak_memory_bytes, "device_s": self.device_s,
        }  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """The plan that is best, on which part of the cluster, and the parts that were looked at, in that order."""

    best: Looked
    looked: tuple[Looked, ...]

    @property
    def plan(self) -> Plan:
        assert self.best.plan is not None
        return self.best.plan

    def named(self, model: str) -> "Chosen":
        """With another name of the model in the plan."""
        return replace(self, best=replace(self.best, plan=replace(self.plan, model=model)))


def choose(request: Request, cluster: Machines, objective: Objective, *, progress: Progress = quiet, **given: Any) -> Chosen:
    """The best plan by an objective; `given`: the other keywords of `Request.planned`. Raises InfeasibleError where no plan fits in memory and time."""
    if objective.best == "memory":
        if isinstance(cluster, MixedCluster):
            raise UsageError(f"objective memory on {cluster.name}: devices of groups have memory of their own; ask for one group")
        looked = tuple(_leaner(request, cluster, objective, progress=progress, **given))
    else:
        looked = tuple(_parts(request, cluster, objective, progress=progress, **given))
    found = [part for part in looked if part.step_s <= objective.within_s and part.plan is not None]
    if not found:
        raise _refused(looked, objective)
    rank = {"time": lambda l: l.step_s, "memory": lambda l: l.plan.predicted.memory.high_bytes, "devices": lambda l: l.cluster.num_devices, "cost": lambda l: l.device_s}
    best = min(found, key=rank[objective.best])
    return Chosen(_noted(best, looked, objective, cluster), looked)


def _leaner(request: Request, cluster: Cluster, objective: Objective, **given: Any) -> Iterator[Looked]:
    """The front of time against memory as far as plans are fast enough."""
    for plan in request.front(cluster, within_s=objective.within_s, **given):
        yield Looked(cluster, plan)


def _parts(request: Request, cluster: Machines, objective: Objective, *, progress: Progress, **given: Any) -> Iterator[Looked]:
    """Plans of the parts that may be best. Of the fewest devices the smallest comes first, and the first that will do is the last."""
    alone = objective.best == "time" and not objective.fewer_devices
    offered = (cluster,) if alone else parts(cluster)
    if len(offered) > 1 and isinstance(cluster, Cluster) and cluster.num_nodes > 1 and given.get("joint") is None:
        given["joint"] = request.searches_jointly(**given)  # by one search for all, or single nodes would be searched for less
    best_s, flops = math.inf, 0.0
    for part in reversed(offered) if objective.best == "devices" else offered:
        least_s = flops / _peak(part)  # no plan computes faster than all devices at their peaks
        if least_s > objective.within_s or (objective.best == "time" and least_s >= best_s):
            continue
        if len(offered) > 1:
            progress(f"planning for {part.num_devices} of {cluster.num_devices} devices")
        found = _planned(request, part, whole=part is cluster, progress=progress, **given)
        yield found
        best_s = min(best_s, found.step_s)
        if found.plan is not None:
            flops = found.plan.predicted.mfu * found.step_s * _peak(found.cluster)
        if objective.best == "devices" and found.plan is not None and found.step_s <= objective.within_s:
            return
        if found.plan is None and part is cluster and all(group.host.cores is None for group in cluster.groups):
            return  # what fits fewer devices fits more of them, as copies; where they share memory fewer have more each


def _peak(part: Machines) -> float:
    """Flops per second of all devices of a part."""
    return sum(group.num_devices * group.device.peak(UNIT) for group in part.groups)


def _planned(request: Request, part: Machines, *, whole: bool, **given: Any) -> Looked:
    """Pins may ask for more devices than a part has."""
    try:
        plan = request.planned(part, **given).plan
        return Looked(part.used_by(plan.cluster) if isinstance(part, MixedCluster) else part, plan)
    except InfeasibleError as error:
        return Looked(part, None, str(error))
    except UsageError as error:
        if whole:
            raise
        return Looked(part, None, str(error))


def _noted(best: Looked, looked: tuple[Looked, ...], objective: Objective, cluster: Machines) -> Looked:
    """With what it was chosen from in the plan's notes."""
    if len(looked) == 1 and objective == Objective():
        return best
    used = f"{best.cluster.num_devices} of {cluster.num_devices} devices, " if objective.best != "memory" else ""
    what = "plans that hold less and less" if objective.best == "memory" else f"part{'s' * (len(looked) > 1)} of the cluster"
    assert best.plan is not None
    return replace(best, plan=replace(best.plan, notes=(*best.plan.notes, f"{objective}: {used}the best of {len(looked)} {what}")))


def _refused(looked: tuple[Looked, ...], objective: Objective) -> InfeasibleError:
    there = [part for part in looked if part.plan is not None]
    if not there:
        largest = max(looked, key=lambda part: part.cluster.num_devices)
        return InfeasibleError(largest.refusal)
    fastest = min(there, key=lambda part: part.step_s)
    return InfeasibleError(
        f"no plan makes a step within {objective.within_s:g} s: the fastest takes {fastest.step_s:.4g} s on {fastest.cluster.num_devices} devices ({fastest.cluster.name}); "
        "allow more time, or offer more or faster devices"
    )
