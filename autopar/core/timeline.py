"""What every rank did when: the one record that the simulator predicts and the runtime measures, and its trace file.

A lane of a rank is something that does one thing at a time: "compute", "send", "receive", "collective". The trace is the
JSON that chrome://tracing and ui.perfetto.dev open: a process per rank, a thread per lane, counters for what is held, arrows from
sends to receives. Format: "Trace Event Format", complete (X), counter (C), flow (s, f) and metadata (M) events, microseconds.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from autopar.core.schedule import RECEIVES, SENDS, Action

LANES = ("compute", "send", "receive", "collective")


class Span(NamedTuple):
    """One action of one rank from `start_s` to `end_s`, in seconds since the step began."""

    rank: int
    lane: str
    action: Action
    start_s: float
    end_s: float


class Level(NamedTuple):
    """How much a rank holds from `time_s` on: bytes in all, and microbatches in flight (of all its stages together)."""

    rank: int
    time_s: float
    held_bytes: int
    in_flight: int


@dataclass(frozen=True)
class Timeline:
    """One step of a pipeline. Spans of a lane are in order of time and do not overlap, nor do `levels` of a rank go back."""

    name: str
    num_ranks: int
    spans: tuple[Span, ...]
    levels: tuple[Level, ...] = ()

    @property
    def step_time_s(self) -> float:
        return max((span.end_s for span in self.spans), default=0.0)

    def busy_s(self, rank: int, lane: str = "compute") -> float:
        return sum([span.end_s - span.start_s for span in self._by_lane.get((rank, lane), ())])

    @cached_property
    def _by_lane(self) -> dict[tuple[int, str], list[Span]]:
        found: dict[tuple[int, str], list[Span]] = {}
        for span in self.spans:
            found.setdefault((span.rank, span.lane), []).append(span)
        return found

    @property
    def bubble_fraction(self) -> float:
        """Idle share of the total: of num_ranks x step time, how much no rank computed. GPipe's (S-1) / (M+S-1)."""
        total = self.num_ranks * self.step_time_s
        return (total - self._computed_s) / total if total else 0.0

    @property
    def bubble_ratio(self) -> float:
        """Idle time relative to the ideal, which is the time computed. Megatron's (S-1) / M."""
        return (self.num_ranks * self.step_time_s - self._computed_s) / self._computed_s if self._computed_s else 0.0

    @property
    def _computed_s(self) -> float:
        return sum(self.busy_s(rank) for rank in range(self.num_ranks))

    def peak_bytes(self, rank: int) -> int:
        return self._peaks.get(rank, 0)

    @cached_property
    def _peaks(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for level in self.levels:
            found[level.rank] = max(found.get(level.rank, level.held_bytes), level.held_bytes)
        return found

    def peak_in_flight(self, rank: int) -> int:
        """Most (stage, microbatch) pairs at once whose forward has begun and whose backward has not ended."""
        return max((level.in_flight for level in self.levels if level.rank == rank), default=0)

    def to_trace(self) -> str:
        """The trace file's text."""
        return json.dumps({"traceEvents": list(self._events()), "displayTimeUnit": "ms", "otherData": {"schedule": self.name}})

    def save_trace(self, path: str | Path) -> None:
        Path(path).write_text(self.to_trace() + "\n", encoding="utf-8")

    def _events(self) -> Iterator[dict[str, Any]]:
        for rank in range(self.num_ranks):
            yield {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
            for thread, lane in enumerate(LANES):
                yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": lane}}
        for span in self.spans:
            place = {"pid": span.rank, "tid": LANES.index(span.lane)}
            start, duration = span.start_s * 1e6, (span.end_s - span.start_s) * 1e6
            action = span.action
            yield {"ph": "X", "name": str(action), "cat": str(action.kind), "ts": start, "dur": duration, **place, "args": {"stage": action.stage, "microbatch": action.microbatch}}
            if action.kind in SENDS:
                yield {"ph": "s", "name": "message", "cat": "message", "id": str(action), "ts": start, **place}
            elif action.kind in RECEIVES:
                yield {"ph": "f", "bp": "e", "name": "message", "cat": "message", "id": str(action.partner), "ts": start + duration, **place}
        for level in self.levels:
            for name, value in (("held bytes", level.held_bytes), ("in flight", level.in_flight)):
                yield {"ph": "C", "name": name, "pid": level.rank, "tid": 0, "ts": level.time_s * 1e6, "args": {name: value}}
