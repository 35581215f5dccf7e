"""What else a plan could have done, decision by decision, and what that costs: every alternative is searched for, with all else free.

For plans of the joint search, whose decisions are of the whole plan: ranks and stages of the pipeline, tensor parallelism, microbatches, ZeRO, recomputation.
Those of a plan of meshes are of single parameters and blocks, and priced from its tables (`planner/explain.py`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from autopar.core.mixed import Machines
from autopar.core.plan import Plan
from autopar.errors import AutoparError, InfeasibleError
from autopar.planner.explain import Decision
from autopar.planner.pins import parse_pins
from autopar.request import Progress, Request, quiet

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Choice:
    """A decision of a plan: its name among the pins, what the plan does, and the pins of its alternatives."""

    what: str
    chosen: str
    others: tuple[str, ...]


def alternatives(request: Request, cluster: Machines, plan: Plan, *, pins: Sequence[str] = (), progress: Progress = quiet, **given: Any) -> tuple[Decision, ...]:
    """Every decision that `pins` leave open, with its best alternative; infinite seconds where none of them fits."""
    step_s = plan.predicted.step_time_s
    found = []
    for choice in choices(plan, request.batch_size):
        if _is_pinned(choice.what, pins):
            continue
        priced = []
        for other in choice.others:
            progress(f"planning with {other}")
            seconds = _step_s(request, cluster, pins=(*pins, *other.split(",")), **given)
            if seconds is not None:
                priced.append((seconds - step_s, other))
        if priced:
            extra_s, other = min(priced)
            found.append(Decision(choice.what, choice.chosen, other if extra_s < math.inf else "none that fits", extra_s))
    return tuple(found)


def choices(plan: Plan, batch: int) -> Iterator[Choice]:
    """The decisions of a plan for a step of `batch` samples. Degrees are halved and doubled."""
    pipeline, kept = plan.pipeline, plan.residency
    ranks = pipeline.num_ranks if pipeline is not None else 1
    dp, tp = (math.prod(axis.size for axis in plan.mesh.axes if axis.name.startswith(name)) for name in ("dp", "tp"))
    yield Choice("pp", f"pp={ranks}", tuple(f"pp={n}" for n in _near(ranks)))
    if pipeline is not None:
        virtual = pipeline.num_stages // ranks
        yield Choice("virtual", f"virtual={virtual}", tuple(f"schedule={'interleaved' if n > 1 else '1f1b'},virtual={n}" for n in _near(virtual)))
    yield Choice("tp", f"tp={tp}", tuple(f"tp={n}" for n in _near(tp)))
    samples = batch // (kept.micro_batches * dp)
    if samples:
        yield Choice("micro_batch", f"micro_batch={samples}", tuple(f"micro_batch={n}" for n in _near(samples)))
    stages = {zero.stage for zero in kept.zero.values()} or {0}
    yield Choice("zero", "zero=" + "+".join(map(str, sorted(stages))), tuple(f"zero={n}" for n in range(4) if {n} != stages))
    modes = set(kept.recompute.values()) or {"none"}
    yield Choice("recompute", "recompute=" + "+".join(sorted(modes)), tuple(f"recompute={mode}" for mode in RECOMPUTE if {mode} != modes))


def _near(n: int) -> tuple[int, ...]:
    return (n // 2, 2 * n) if n > 1 and n % 2 == 0 else (2 * n,)


def _is_pinned(what: str, pins: Sequence[str]) -> bool:
    given = parse_pins(pins)
    return what in dict(given.degrees) or getattr(given, what, None) is not None


def _step_s(request: Request, cluster: Machines, **given: Any) -> float | None:
    """Seconds of the best plan with such pins; infinite where none fits, None where they do not go with the cluster."""
    try:
        return request.planned(cluster, **given).plan.predicted.step_time_s
    except InfeasibleError:
        return math.inf
    except AutoparError:
        return None
