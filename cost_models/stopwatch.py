"""How long a step of a pipeline takes, and nothing else: the lists of `timeline.py` run many times with other costs.

A search asks for the step time of one schedule under hundreds of costs. The lists are turned once into numbers (which duration, which message is waited
for), and a run is the event loop of the overlapped runtime over these. The result is that of `timeline.simulate` to the last bit; a test holds the two
against each other.
"""

from heapq import heapify, heappop, heappush

from autopar.core.schedule import COMPUTE, RECEIVES, SENDS, Action, Kind, Schedule
from autopar.cost_models.pipeline import PipelineCost, Prices
from autopar.errors import ScheduleError

_COMPUTE, _SEND, _GATHER, _REDUCE, _STEP, _TIE = range(6)

_Item = tuple[int, int, int, int, tuple[int, ...]]
"""(what, duration, stage, other rank, what is waited for, or what arrives)."""


class Stopwatch:
    """The lists of one schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._durations: dict[tuple, int] = {}
        self._slots: dict[Action, int] = {}
        self._priced: list[Action] = []
        needed: dict[tuple[bool, int, int | None], list[int]] = {}
        for action in (action for actions in schedule.ranks for action in actions if action.kind in RECEIVES):
            needed.setdefault((action.kind is Kind.RECV_F, action.stage, action.microbatch), []).append(self._slot(action))
        self._needed = needed
        self._members = {group[0]: len({schedule.placement[stage] for stage in group}) for group in schedule.tied}
        self._lists = tuple([tuple([item for action in actions if (item := self._item(action)) is not None]) for actions in schedule.ranks])

    def _slot(self, event: Action) -> int:
        return self._slots.setdefault(event, len(self._slots))

    def _duration(self, action: Action) -> int:
        """The number of a duration; microbatches do not differ."""
        key = action.kind, action.stage, action.peer
        if key not in self._durations:
            self._durations[key] = len(self._durations)
            self._priced.append(action)
        return self._durations[key]

    def _item(self, action: Action) -> _Item | None:
        kind, stage, schedule = action.kind, action.stage, self.schedule
        if kind in COMPUTE:
            waits = () if kind is Kind.W else tuple(self._needed.get((kind is Kind.F, stage, action.microbatch), ()))
            return _COMPUTE, self._duration(action), stage, 0, waits
        if kind in SENDS:
            return _SEND, self._duration(action), stage, schedule.placement[action.partner.stage], (self._slot(action.partner),)
        if kind is Kind.STEP:
            ties = [self._slot(Action(Kind.TIE, group[0], None, group[0])) for group in schedule.tied if stage in group]
            return _STEP, self._duration(action), stage, 0, tuple(ties)
        if kind is Kind.TIE:
            assert action.peer is not None, f"{action} has no group"
            return _TIE, self._duration(action), action.peer, 0, (self._slot(Action(Kind.TIE, action.peer, None, action.peer)),)
        if kind in (Kind.GATHER, Kind.REDUCE):
            return _GATHER if kind is Kind.GATHER else _REDUCE, self._duration(action), stage, 0, ()
        return None  # what a receive or a FREE takes shows elsewhere

    def _seconds(self, cost: PipelineCost) -> list[float]:
        """By number of a duration."""
        prices = Prices(self.schedule, cost)
        return [prices.message(a)[0] if a.kind in SENDS else prices.seconds(a) for a in self._priced]

    def step_s(self, cost: PipelineCost) -> float:
        """Seconds of the step. Raises ScheduleError where a rank waits for ever."""
        lists, seconds = self._lists, self._seconds(cost)
        ranks, stages = range(len(lists)), len(self.schedule.placement)
        position, lengths = [0 for _ in ranks], [len(items) for items in lists]
        sends, receives, collectives = [0.0 for _ in ranks], [0.0 for _ in ranks], [0.0 for _ in ranks]
        usable, updated, last = [0.0] * stages, [0.0] * stages, 0.0
        arrived: dict[int, float] = {}
        parked: dict[int, list[int]] = {}
        joined: dict[int, list[int]] = {}
        events = [(0.0, rank) for rank in ranks]
        heapify(events)
        while events:
            now, rank = heappop(events)
            items, at, end = lists[rank], position[rank], lengths[rank]
            while at < end:
                what, duration, stage, peer, slots = items[at]
                if what == _COMPUTE or what == _STEP:
                    missing = next((slot for slot in slots if slot not in arrived), None)
                    if missing is not None:
                        parked.setdefault(missing, []).append(rank)
                    else:
                        start = max(now, usable[stage], updated[stage] if what == _STEP else 0.0, *[arrived[slot] for slot in slots])
                        heappush(events, (start + seconds[duration], rank))
                        at += 1
                    break
                at += 1
                if what == _SEND:
                    start = max(now, sends[rank], receives[peer])
                    sends[rank] = receives[peer] = over = start + seconds[duration]
                elif what == _TIE:
                    members = joined.setdefault(stage, [])
                    members.append(rank)
                    if len(members) < self._members[stage]:
                        continue
                    over = max(now, *[collectives[r] for r in members]) + seconds[duration]
                    for r in members:
                        collectives[r] = over
                else:
                    over = max(now, collectives[rank]) + seconds[duration]
                    collectives[rank] = over
                    (usable if what == _GATHER else updated)[stage] = over
                    last = max(last, over)
                    continue
                last = max(last, over)
                arrived[slots[0]] = over
                for other in parked.pop(slots[0], ()):
                    heappush(events, (now, other))
            position[rank] = at
            last = max(last, now)
        for rank in ranks:
            if position[rank] < lengths[rank]:
                raise ScheduleError(self.schedule.name, rank, None, "waits for ever")
        return last
