"""Data parallelism on more and more devices, with the same batch (strong scaling) and with a batch that grows (weak), beside the laws that bound both.

Serial is what every device does whole however many there are: the optimizer's step of a model that all of them hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autopar.core.cluster import Cluster
from autopar.cost_models.scaling import amdahl, gustafson
from autopar.errors import UsageError
from autopar.forecast.forced import Layout3D
from autopar.forecast.step import Step, StepPlan
from autopar.forecast.transformer import Dims


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """On n devices: seconds of a step and speed-up over one device with the bound of either law. `efficiency`: of the fixed work."""

    num_devices: int
    strong_s: float
    strong_speed_up: float
    amdahl: float
    weak_s: float
    weak_speed_up: float
    gustafson: float

    @property
    def efficiency(self) -> float:
        return self.strong_speed_up / self.num_devices


def scaling(dims: Dims, cluster: Cluster, counts: Sequence[int], samples: int, *, dtype: str = "bfloat16", recompute: str = "none") -> tuple[Scaling, ...]:
    """A point for each of `counts` devices of the cluster, which divide the `samples` of a step; every device takes one sample at a time."""
    if not counts or any(n < 1 or samples % n for n in counts):
        raise UsageError(f"{samples} samples on {', '.join(map(str, counts))} devices: give numbers that divide them")
    layout = Layout3D(recompute=recompute)

    def step(n: int, times: int) -> Step:
        return Step(dims, StepPlan(layout=replace(layout, dp=n), num_microbatches=times), cluster, dtype=dtype)

    alone = step(1, samples)
    serial_s = sum(cost.step_s for cost in alone.costs)
    serial = serial_s / alone.step_s
    found = []
    for n in counts:
        strong, weak = step(n, samples // n).step_s, step(n, samples).step_s
        found.append(Scaling(
            num_devices=n, strong_s=strong, strong_speed_up=alone.step_s / strong, amdahl=amdahl(serial, n),
            weak_s=weak, weak_speed_up=(n * (alone.step_s - serial_s) + serial_s) / weak, gustafson=gustafson(serial, n),
        ))  # fmt: skip
    return tuple(found)


def fastest(points: Sequence[Scaling]) -> Scaling:
    """The point with the shortest step for the same work; of equal ones that with the fewest devices."""
    return min(points, key=lambda point: (point.strong_s, point.num_devices))
