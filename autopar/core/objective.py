"""What a plan is to be best at: time, memory, devices or cost; and whether it must use the whole cluster."""

import math
from dataclasses import dataclass

from autopar.errors import UsageError

OBJECTIVES = ("time", "memory", "devices", "cost")


@dataclass(frozen=True)
class Objective:
    """`best`: "time", the fastest step; "memory", the fewest bytes on the fullest device; "devices", the fewest of them; "cost", the fewest
    device-seconds a step. No step takes longer than `within_s`. `fewer_devices`: parts of the cluster are looked at too, as they always are for
    devices and cost; for memory never, more devices hold less each."""

    best: str = "time"
    within_s: float = math.inf
    fewer_devices: bool = False

    def __post_init__(self) -> None:
        if self.best not in OBJECTIVES:
            raise UsageError(f"objective {self.best!r}; choose from {', '.join(OBJECTIVES)}")
        if not self.within_s > 0:
            raise UsageError(f"a step within {self.within_s:g} s; give a time above 0")
        if self.fewer_devices and self.best == "memory":
            raise UsageError("objective memory with fewer devices: each of fewer devices holds more; leave one of them out")

    def __str__(self) -> str:
        return f"objective {self.best}" + (f" within {self.within_s:g} s" if self.within_s < math.inf else "")
