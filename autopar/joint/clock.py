"""What a search may still do: the seconds that it was given, and the points that it may plan."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

FADING = 0.9
"""How much of what a kind of work took counts the next time, where that takes less."""

LONGER = 1.5
"""Times what others of its kind took lately, a work may take: of plans of likely shardings on 1,024 GPUs one took 0.26 s, the next 0.54
(`examples/benchmark_replan.py --only replan`)."""

UNKNOWN_S = 0.4
"""For a kind of work that was not done yet."""

FINISHED = "a plan on the whole graph"
"""What is left to do behind a search."""


@dataclass
class Clock:
    """`end_s`: of `time.perf_counter`. `took_s`: each kind of work lately, by its name, in this search and those before it: what would end too late is not
    begun."""

    end_s: float = math.inf
    took_s: dict[str, float] = field(default_factory=dict)

    def allows(self, work: str) -> bool:
        return self.end_s == math.inf or time.perf_counter() + LONGER * self.took_s.get(work, UNKNOWN_S) < self.end_s

    def ends_in(self, seconds: float) -> None:
        """At the latest."""
        self.end_s = min(self.end_s, time.perf_counter() + seconds)

    @contextmanager
    def timed(self, work: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.took_s[work] = max(time.perf_counter() - start, FADING * self.took_s.get(work, 0.0))
