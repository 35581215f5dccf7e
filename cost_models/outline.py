"""What a search asks of a step of a pipeline beside its trace: when it ends, how long each rank computes, and what is held when most is.

A `Timeline` has all of this, and says of every action when it was done. To say only how much there is of it, it is enough to know when computations and
transfers start: how long they take and what they hold is known of a schedule's lists before a run. A test holds the two against each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.core.schedule import COMPUTE, RECEIVES, SENDS, Action, Kind, Schedule
from autopar.core.timeline import Timeline
from autopar.cost_models.pipeline import PipelineCost, Prices

FIGURES = "state_bytes", "activation_bytes", "weight_activation_bytes", "arriving_bytes", "gathered_bytes"
"""Of a stage, what a rank may hold."""

STATE, ACTIVATIONS, PUT_OFF, ARRIVING, GATHERED = range(len(FIGURES))


@dataclass(frozen=True)
class Outline:
    """Of one step. `computed_s` and `peaks`: by rank; `in_flight`: by stage, the most microbatches between the begin of their forward and the end of their backward."""

    step_time_s: float
    computed_s: tuple[float, ...]
    peaks: tuple[int, ...]
    in_flight: tuple[int, ...]

    @classmethod
    def of(cls, timeline: Timeline, num_stages: int) -> "Outline":
        changes: list[list[tuple[float, int]]] = [[] for _ in range(num_stages)]
        for span in timeline.spans:
            if span.action.kind is Kind.F:
                changes[span.action.stage].append((span.start_s, 1))
            elif span.action.kind in (Kind.B, Kind.W):
                changes[span.action.stage].append((span.end_s, -1))
        in_flight = tuple(_most(np.array([time for time, _ in of_stage]), np.array([change for _, change in of_stage])) for of_stage in changes)
        ranks = range(timeline.num_ranks)
        return cls(timeline.step_time_s, tuple(map(timeline.busy_s, ranks)), tuple(map(timeline.peak_bytes, ranks)), in_flight)

    @property
    def num_ranks(self) -> int:
        return len(self.computed_s)

    def busy_s(self, rank: int) -> float:
        return self.computed_s[rank]

    def peak_bytes(self, rank: int) -> int:
        return self.peaks[rank]

    @property
    def bubble_fraction(self) -> float:
        """See `Timeline.bubble_fraction`."""
        total = self.num_ranks * self.step_time_s
        return (total - sum(self.computed_s)) / total if total else 0.0


def _most(times_s: np.ndarray, changes: np.ndarray) -> int:
    """Of what changes over time; what comes and goes at one moment is netted."""
    if not len(times_s):
        return 0
    order = np.argsort(times_s, kind="stable")
    at, totals = times_s[order], changes[order].cumsum()
    return int(totals[np.append(at[1:] != at[:-1], True)].max())


@dataclass(frozen=True)
class _Changes:
    """What is held by somebody: when it changes, by number of a moment; by which size, and whether it comes (1) or goes (-1)."""

    moments: np.ndarray
    sizes: np.ndarray
    signs: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int]]) -> "_Changes":
        return cls(*np.array(rows, dtype=np.int64).reshape(-1, 3).T)


class Outlining:
    """What of one schedule's outlines does not depend on costs. Moments: the beginning of the step, when each thing starts, when it ends; things are numbered rank
    by rank, as in `Stopwatch`'s runs."""

    def __init__(self, schedule: Schedule, duration_of: Callable[[Action], int]) -> None:
        self.schedule = schedule
        timed = [[action for action in actions if action.kind in COMPUTE or action.kind in SENDS or action.kind is Kind.STEP] for actions in schedule.ranks]
        self._durations = np.array([duration_of(action) for actions in timed for action in actions], dtype=np.int64)
        self._number = number = len(self._durations)
        self._edges = {(edge.source, edge.target): n for n, edge in enumerate(schedule.edges)}
        self._reads: dict[tuple[bool, int, int | None], list[Action]] = {}
        for receive in (action for actions in schedule.ranks for action in actions if action.kind in RECEIVES):
            self._reads.setdefault((receive.kind is Kind.RECV_F, receive.stage, receive.microbatch), []).append(receive)
        self._held: list[list[tuple[int, int, int]]] = [[] for _ in schedule.ranks]
        self._flying: list[list[tuple[int, int, int]]] = [[] for _ in schedule.placement]
        for stage, rank in enumerate(schedule.placement):
            self._held[rank].append((0, self._size(stage, STATE), 1))
        first, self._computing = 0, list[np.ndarray]()
        for rank, actions in enumerate(timed):
            self._computing.append(np.array([n for n, action in enumerate(actions, first) if action.kind not in SENDS], dtype=np.int64))
            self._follow(rank, first)
            first += len(actions)
        assert first == number, "every thing has a number"
        self._by_rank, self._by_stage = [_Changes.of(rows) for rows in self._held], [_Changes.of(rows) for rows in self._flying]

    @staticmethod
    def _size(stage: int, figure: int) -> int:
        return stage * len(FIGURES) + figure

    def _message_size(self, transfer: Action) -> int:
        """See `Prices.message`."""
        forward = transfer.kind in (Kind.SEND_F, Kind.RECV_F)
        ends = (transfer.stage, transfer.peer) if transfer.kind in (Kind.SEND_F, Kind.RECV_B) else (transfer.peer, transfer.stage)
        return len(self.schedule.placement) * len(FIGURES) + 2 * self._edges[ends] + (not forward)

    def _follow(self, rank: int, number: int) -> None:
        """What one rank holds, and what a message of its that is sent makes others hold; `number`: of the first thing it does. What is no computation is there at the end
        of the one before it."""
        held, now, arriving = self._held[rank], 0, set[int]()
        for action in self.schedule.ranks[rank]:
            start, end = 1 + number, 1 + self._number + number
            if action.kind is Kind.GATHER:
                arriving.add(action.stage)
                held += [(now, self._size(action.stage, ARRIVING), 1), (now, self._size(action.stage, GATHERED), 1)]
            elif action.kind is Kind.FREE:
                held.append((now, self._size(action.stage, GATHERED), -1))
            elif action.kind in SENDS:
                size = self._message_size(action)
                held += [(now, size, 1), (end, size, -1)]
                self._held[self.schedule.placement[action.partner.stage]].append((start, size, 1))
                number += 1
            elif action.kind in COMPUTE or action.kind is Kind.STEP:
                if action.stage in arriving:
                    arriving.remove(action.stage)
                    held.append((start, self._size(action.stage, ARRIVING), -1))
                if action.kind in COMPUTE:
                    self._compute(action, start, end)
                now, number = end, number + 1

    def _compute(self, action: Action, start: int, end: int) -> None:
        kind, stage = action.kind, action.stage
        held, flying = self._held[self.schedule.placement[stage]], self._flying[stage]
        kept, put_off = self._size(stage, ACTIVATIONS), self._size(stage, PUT_OFF)
        if kind is Kind.F:
            held += [(start, kept, 1)] if self.schedule.training else [(start, kept, 1), (end, kept, -1)]
            flying.append((start, 0, 1))
        elif kind is Kind.I:
            held += [(end, kept, -1), (end, put_off, 1)]
        else:
            held.append((end, kept if kind is Kind.B else put_off, -1))
            flying.append((end, 0, -1))
        if kind is not Kind.W:
            held += [(end, self._message_size(receive), -1) for receive in self._reads.get((kind is Kind.F, stage, action.microbatch), ())]

    def outline(self, cost: PipelineCost, step_s: float, begun: Sequence[Sequence[float]], seconds: Sequence[float]) -> Outline:
        """`begun`: when each thing starts, by rank; `seconds`: by number of a duration."""
        starts = np.array([start for of_rank in begun for start in of_rank])
        ends = starts + np.array(seconds)[self._durations]
        moments = np.concatenate(([0.0], starts, ends))
        edges = Prices(self.schedule, cost).edges
        sizes = [getattr(stage, figure) for stage in cost.stages for figure in FIGURES] + [size for edge in edges for size in (edge.activation_bytes, edge.gradient_bytes)]
        held = np.array(sizes, dtype=np.int64)
        return Outline(
            step_s,
            tuple([sum((ends[of_rank] - starts[of_rank]).tolist()) for of_rank in self._computing]),
            tuple([_most(moments[rank.moments], held[rank.sizes] * rank.signs) for rank in self._by_rank]),
            tuple([_most(moments[stage.moments], stage.signs) for stage in self._by_stage]),
        )
