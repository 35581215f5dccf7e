"""The front of time against memory: the fastest plan of all the memory, then the fastest that holds so much less than the one before it, until none does.

The plans from one limit of memory to another are a part of it. Each part is searched for by itself, from nothing: so parts may be found in processes of their own, and
the front is the same without.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from autopar.core.graph import OpGraph
from autopar.core.plan import Plan
from autopar.core.residency import Precision
from autopar.cost_models.memory import adam
from autopar.errors import InfeasibleError

LEANER = 0.97
"""A plan of the front holds at most so much of what the one before it holds."""

PARTED = 0.55
"""So much of the way down, by ratio, is the first part: plans of the leanest are the hardest to find."""

FIRST_POINTS, MORE_POINTS = 6, 2
"""Points that are explored under a budget beside one of each number of ranks for the first plan of a part, and beside all of those for each of the others."""


@dataclass(frozen=True)
class Part:
    """The plans within `begin_bytes` of a device that are for more than `end_bytes`. `budget_s`: for looking at other points than those of the plans before.
    `within_s`: of a step; the first plan that takes longer is the last."""

    begin_bytes: float
    end_bytes: float = 0.0
    budget_s: float = math.inf
    within_s: float = math.inf

    def plans(self, planned: Callable[[float, int | None], Plan]) -> list[Plan]:
        """`planned`: the best plan within a limit, by so many points where there is a budget. Raises InfeasibleError where none fits."""
        limit, over, found = self.begin_bytes, time.perf_counter() + self.budget_s, list[Plan]()
        while limit > self.end_bytes and not (found and found[-1].predicted.step_time_s > self.within_s):
            points = FIRST_POINTS if not found else MORE_POINTS if time.perf_counter() < over else 0
            try:
                found.append(planned(limit, points if self.budget_s < math.inf else None))
            except InfeasibleError:
                break
            limit = LEANER * found[-1].predicted.memory.high_bytes
        return found


def parted(limit_bytes: float, state_bytes: float) -> list[tuple[float, float]]:
    """Where parts of the front begin and end: between the limit and what no plan is under."""
    middle = limit_bytes ** (1 - PARTED) * state_bytes**PARTED
    return [(limit_bytes, middle), (middle, 0.0)] if 0 < middle < LEANER * limit_bytes else [(limit_bytes, 0.0)]


def state_bytes(graph: OpGraph, precision: Precision, *, offload: bool) -> float:
    """Of all devices together, with every parameter held once."""
    found = 0.0
    for v in graph.params:
        meta = graph.values[v].meta
        policy = adam(meta.dtype, master=precision.master)
        trained = policy.gradient_bytes + (0 if offload else policy.optimizer_bytes) if v in graph.differentiated else 0
        found += meta.numel * (policy.parameter_bytes + trained)
    return found


def front_of(plans: Iterable[Plan]) -> Sequence[Plan]:
    """Those than which no other is faster and holds no more, the fastest first, each of them so much leaner than the one before."""
    leanest: list[Plan] = []
    for plan in sorted(plans, key=_held_bytes):  # of those that hold as much, the first found is the faster
        if not leanest or plan.predicted.step_time_s < leanest[-1].predicted.step_time_s:
            leanest.append(plan)
    front: list[Plan] = []
    for plan in reversed(leanest):
        if not front or _held_bytes(plan) <= LEANER * _held_bytes(front[-1]):
            front.append(plan)
    return front


def _held_bytes(plan: Plan) -> int:
    return plan.predicted.memory.high_bytes
