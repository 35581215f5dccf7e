"""How long a step of a pipeline takes: the lists of `timeline.py` run many times with other costs.

A search asks for the step time of one schedule under hundreds of costs. The lists are turned once into numbers (which duration, which message is waited
for), and a run is the event loop of the overlapped runtime over these. The result is that of `timeline.simulate` to the last bit; a test holds the two
against each other. Who asks for more has an `outline`, which the moments tell at which things began. Who only asks whether a step takes less than so many seconds hears that it does not as soon as a rank is so late that it cannot.
"""

import math
from collections import Counter, defaultdict
from functools import cached_property
from heapq import heappop, heappush, heappushpop

from autopar.core.schedule import COMPUTE, RECEIVES, SENDS, Action, Kind, Schedule
from autopar.cost_models.outline import Outline, Outlining
from autopar.cost_models.pipeline import PipelineCost, Prices
from autopar.errors import ScheduleError

_COMPUTE, _ENDING, _STEP, _SEND, _GATHER, _REDUCE, _TIE = range(7)
"""Ending: what a rank computes when it has nothing more to send. The first three take the rank's time."""

_Item = tuple[int, int, int, int, tuple[int, ...]]
"""(what, duration, stage, other rank, what is waited for, or what arrives)."""

ROUNDED = 1e-9
"""More than what sums of seconds lose to rounding, as a share of them."""


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
        lists = [[item for action in actions if (item := self._item(action)) is not None] for actions in schedule.ranks]
        self._last_send = [max((n for n, item in enumerate(items) if item[0] == _SEND), default=len(items)) for items in lists]
        self._lists = tuple([tuple([self._ending(item) if n > last else item for n, item in enumerate(items)]) for items, last in zip(lists, self._last_send)])
        self._reads = {slot: (rank, n) for rank, items in enumerate(lists) for n, item in enumerate(items) if item[0] == _COMPUTE for slot in item[4]}
        self._chains = [self._chain(rank, 0) for rank in range(len(lists))]

    @staticmethod
    def _ending(item: _Item) -> _Item:
        return (_ENDING, *item[1:]) if item[0] == _COMPUTE else item

    def _chain(self, rank: int, at: int) -> Counter[int]:
        """Durations, and how often each comes, that follow one after the other: what a rank computes from there to its last message, then the message and what follows
        on it where it is read. So long a step lasts from there on at least."""
        items, last = self._lists[rank], self._last_send[rank]
        last = last if last > at else len(items)
        found = Counter(item[1] for item in items[at:last] if item[0] <= _STEP)
        if last < len(items):
            found[items[last][1]] += 1
            found += self._chain(*self._reads[items[last][4][0]])
        return found

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

    def step_s(self, cost: PipelineCost, enough_s: float = math.inf) -> float:
        """Seconds of the step; inf as soon as it is known that these are no less than `enough_s`. Raises ScheduleError where a rank waits for ever."""
        return self._run(self._seconds(cost), enough_s, None)

    def outline(self, cost: PipelineCost) -> Outline:
        """Of the whole step."""
        begun: list[list[float]] = [[] for _ in self._lists]
        seconds = self._seconds(cost)
        return self._outlining.outline(cost, self._run(seconds, math.inf, begun), begun, seconds)

    @cached_property
    def _outlining(self) -> Outlining:
        return Outlining(self.schedule, self._duration)

    def _run(self, seconds: list[float], enough_s: float, begun: list[list[float]] | None) -> float:
        """`seconds`: by number of a duration; `begun`: takes, by rank and in the order of its list, when computations, optimizer steps and sends start."""
        lists, number, ranks, stages = self._lists, len(self._lists), range(len(self._lists)), len(self.schedule.placement)
        position, sends, receives, collectives, usable, updated = [0] * number, [0.0] * number, [0.0] * number, [0.0] * number, [0.0] * stages, [0.0] * stages
        left = [sum([seconds[duration] * times for duration, times in chain.items()]) for chain in self._chains]
        late_s, arrived = enough_s * (1 + ROUNDED), [-1.0] * len(self._slots)
        parked, joined = defaultdict[int, list[int]](list), defaultdict[int, list[int]](list)
        events = [(0.0, rank) for rank in ranks]
        now, rank = heappop(events)
        while True:
            items, at, end, ends = lists[rank], position[rank], len(lists[rank]), -1.0
            while at < end:
                what, duration, stage, peer, slots = items[at]
                if what <= _STEP:
                    start = usable[stage] if usable[stage] > now else now
                    if what == _STEP and updated[stage] > start:
                        start = updated[stage]
                    for slot in slots:
                        there = arrived[slot]
                        if there < 0.0:
                            parked[slot].append(rank)
                            break
                        if there > start:
                            start = there
                    else:
                        if start + left[rank] >= late_s and what == _COMPUTE:
                            return math.inf
                        if begun is not None:
                            begun[rank].append(start)
                        left[rank] -= seconds[duration]
                        ends, at = start + seconds[duration], at + 1
                    break
                at += 1
                if what == _SEND:
                    start = max(now, sends[rank], receives[peer])
                    if begun is not None:
                        begun[rank].append(start)
                    sends[rank] = receives[peer] = over = start + seconds[duration]
                elif what == _TIE:
                    (members := joined[stage]).append(rank)
                    if len(members) < self._members[stage]:
                        continue
                    over = max(now, *[collectives[r] for r in members]) + seconds[duration]
                    for r in members:
                        collectives[r] = over
                else:
                    collectives[rank] = over = max(now, collectives[rank]) + seconds[duration]
                    (usable if what == _GATHER else updated)[stage] = over
                    continue
                arrived[slots[0]] = over
                for other in parked.pop(slots[0], ()):
                    heappush(events, (now, other))
            position[rank] = at
            if ends >= 0.0:
                now, rank = heappushpop(events, (ends, rank))
            elif events:
                now, rank = heappop(events)
            else:
                break
        self._check_done(position)
        return max(now, *sends, *collectives)  # no event is before the one that was handled last

    def _check_done(self, position: list[int]) -> None:
        waits = next((rank for rank, items in enumerate(self._lists) if position[rank] < len(items)), None)
        if waits is not None:
            raise ScheduleError(self.schedule.name, waits, None, "waits for ever")
