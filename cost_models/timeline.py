"""How long a step of a pipeline takes and what each rank holds: the schedule's own lists, run against a clock.

Lanes. A rank computes one thing at a time, sends one message, receives one, and takes part in one collective; the four go on side
by side. A rank walks its list. A computation starts when the one before it has ended and what it reads is there. A send is
ready when the computation before it in the list has ended, and starts once the sender's send lane and the receiver's receive lane
are free; messages that want the same lane go in the order in which they became ready. A collective is ready like a send;
computations wait for the GATHER of their stage, steps for the REDUCE and TIE.

"buffered" is the overlapped runtime: receives are posted early enough, and only the computation that needs a message waits for it.
"blocking" is the runtime without overlap: a message or a collective stops the lists of all ranks it concerns.

Held bytes of a rank: the state of its stages; what a microbatch needs of a stage from its forward to the end of its backward (with a
split backward, a part of it to the end of W); messages from where they are ready at the sender to their end, and at
the receiver from the start of the transfer to the end of the computation that reads them; gathered parameters, and beside them what they arrive in.

Ranks that are processes on fewer cores slow each other down while they compute (`at_once`), and one that waits leaves its core to the others:
the step ends no sooner than the lists allow, nor than all the work is done on all the cores. Gathers are work of the cores then.

What is left out: messages and collectives do not slow each other down, nor computations; replicas finish together.
"""

import heapq
import math
from collections import defaultdict
from typing import Literal, NamedTuple

from autopar.core.schedule import COMPUTE, RECEIVES, SENDS, Action, Kind, Schedule
from autopar.core.timeline import Level, Span, Timeline
from autopar.cost_models.pipeline import PipelineCost, Prices
from autopar.errors import ScheduleError

Semantics = Literal["buffered", "blocking"]


def simulate(schedule: Schedule, cost: PipelineCost, semantics: Semantics = "buffered", *, at_once: float = math.inf) -> Timeline:
    """The timeline of one step. Raises ScheduleError where a rank waits for ever; `schedules.check` says why.

    `at_once`: ranks that compute at full speed side by side, where they share cores; the prices are those of a rank that has its own.
    """
    shared = semantics == "buffered" and at_once < schedule.num_ranks
    simulation = _Shared(schedule, cost, at_once) if shared else (_Blocking if semantics == "blocking" else _Buffered)(schedule, cost)
    simulation.run()
    simulation.spans.sort(key=lambda span: (span.start_s, span.end_s, span.rank))
    return Timeline(schedule.name, schedule.num_ranks, tuple(simulation.spans), simulation.held.levels())


class _Held:
    """What the ranks hold, as changes over time."""

    def __init__(self, schedule: Schedule, prices: Prices) -> None:
        self._training = schedule.training
        self._prices = prices
        self._changes: list[tuple[float, int, int, int]] = []
        self._arriving: set[int] = set()
        for stage, rank in enumerate(schedule.placement):
            self.change(0.0, rank, prices.stages[stage].state_bytes)

    def change(self, time_s: float, rank: int, num_bytes: int, in_flight: int = 0) -> None:
        self._changes.append((time_s, rank, num_bytes, in_flight))

    def gather(self, rank: int, number: int, time_s: float) -> None:
        stage = self._prices.stages[number]
        self._arriving.add(number)
        self.change(time_s, rank, stage.arriving_bytes + stage.gathered_bytes)

    def compute(self, rank: int, action: Action, start_s: float, end_s: float) -> None:
        stage = self._prices.stages[action.stage]
        if action.stage in self._arriving:
            self._arriving.remove(action.stage)
            self.change(start_s, rank, -stage.arriving_bytes)
        if action.kind is Kind.F:
            self.change(start_s, rank, stage.activation_bytes, 1)
            if not self._training:
                self.change(end_s, rank, -stage.activation_bytes, -1)
        elif action.kind is Kind.B:
            self.change(end_s, rank, -stage.activation_bytes, -1)
        elif action.kind is Kind.I:
            self.change(end_s, rank, stage.weight_activation_bytes - stage.activation_bytes)
        elif action.kind is Kind.W:
            self.change(end_s, rank, -stage.weight_activation_bytes, -1)

    def levels(self) -> tuple[Level, ...]:
        """One level per rank and moment: what is released at a moment is gone before what is taken then."""
        found: list[Level] = []
        totals: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for time_s, rank, num_bytes, in_flight in sorted(self._changes):
            before = totals[rank]
            totals[rank] = before[0] + num_bytes, before[1] + in_flight
            level = Level(rank, time_s, *totals[rank])
            if found and found[-1][:2] == level[:2]:
                found[-1] = level
            else:
                found.append(level)
        return tuple(found)


class Job(NamedTuple):
    """A computation of a rank, what it reads, and when it can start."""

    rank: int
    action: Action
    reads: tuple[Action, ...]
    start_s: float


class _Buffered:
    """Events are (time, rank): the rank goes on with its list. They are handled in order of time, so that lanes are too."""

    def __init__(self, schedule: Schedule, cost: PipelineCost) -> None:
        self.schedule, self.prices = schedule, Prices(schedule, cost)
        self.held = _Held(schedule, self.prices)
        self.spans: list[Span] = []
        self.events = [(0.0, rank) for rank in range(schedule.num_ranks)]
        self.position = [0] * schedule.num_ranks
        self.lane_free: dict[tuple[int, str], float] = defaultdict(float)
        self.arrived: dict[Action, float] = {}
        self.usable: dict[int, float] = defaultdict(float)
        """When the parameters of a stage are gathered."""
        self.updated: dict[int, float] = defaultdict(float)
        """When the gradients of a stage are reduced and summed with those of tied weights."""
        self.parked: dict[Action, list[int]] = defaultdict(list)
        """Receives and TIEs with the ranks that wait for them."""
        self.groups = {group[0]: sorted({schedule.placement[stage] for stage in group}) for group in schedule.tied}
        self.joined: dict[int, list[tuple[int, Action]]] = defaultdict(list)
        self.needed: dict[tuple[bool, int, int | None], list[Action]] = defaultdict(list)
        """Receives by (forward?, stage, microbatch) of the computation that reads them."""
        for action in (action for actions in schedule.ranks for action in actions if action.kind in RECEIVES):
            self.needed[action.kind is Kind.RECV_F, action.stage, action.microbatch].append(action)

    def run(self) -> None:
        while (event := self.next_event()) is not None:
            time_s, rank = event
            actions = self.schedule.ranks[rank]
            while self.position[rank] < len(actions) and self.advance(time_s, rank, actions[self.position[rank]]):
                self.position[rank] += 1
        for rank, actions in enumerate(self.schedule.ranks):
            if self.position[rank] < len(actions):
                raise ScheduleError(self.schedule.name, rank, str(actions[self.position[rank]]), "waits for ever")

    def next_event(self) -> tuple[float, int] | None:
        return heapq.heappop(self.events) if self.events else None

    def resume(self, time_s: float, rank: int) -> None:
        heapq.heappush(self.events, (time_s, rank))

    def advance(self, time_s: float, rank: int, action: Action) -> bool:
        """Do the action if it can be done; whether the rank goes straight on with the next one at the same time."""
        if action.kind in COMPUTE or action.kind is Kind.STEP:
            return self.compute(time_s, rank, action)
        if action.kind in SENDS:
            self.send(time_s, rank, action)
        elif action.kind is Kind.TIE:
            self.join(time_s, rank, action)
        elif action.kind is Kind.FREE:
            self.held.change(time_s, rank, -self.prices.stages[action.stage].gathered_bytes)
        elif action.kind in (Kind.GATHER, Kind.REDUCE):
            self.collective(time_s, rank, action)
        return True

    def compute(self, time_s: float, rank: int, action: Action) -> bool:
        """A computation or optimizer step, when all it waits for is there; the rank goes on at its end."""
        start = max(time_s, self.usable[action.stage])
        receives: list[Action] = []
        if action.kind is Kind.STEP:
            start = max(start, self.updated[action.stage])
        elif action.kind is not Kind.W:
            receives = self.needed[action.kind is Kind.F, action.stage, action.microbatch]
        for event in receives if action.kind is not Kind.STEP else self.ties_before(action):
            if event not in self.arrived:
                self.parked[event].append(rank)
                return False
            start = max(start, self.arrived[event])
        self.occupy(time_s, Job(rank, action, tuple(receives), start))
        return False

    def occupy(self, time_s: float, job: "Job") -> None:
        """Let a rank compute from `job.start_s` on; now is `time_s`."""
        self.finish(job, job.start_s + self.prices.seconds(job.action))

    def finish(self, job: "Job", end: float) -> None:
        """A computation has come to its end; its rank goes on."""
        self.spans.append(Span(job.rank, "compute", job.action, job.start_s, end))
        self.held.compute(job.rank, job.action, job.start_s, end)
        for receive in job.reads:
            self.held.change(end, job.rank, -self.prices.message(receive)[1])
        self.position[job.rank] += 1
        self.resume(end, job.rank)

    def ties_before(self, action: Action) -> list[Action]:
        """Of an optimizer step."""
        return [Action(Kind.TIE, group[0], None, group[0]) for group in self.schedule.tied if action.stage in group]

    def send(self, time_s: float, rank: int, send: Action) -> None:
        receive, lane_free = send.partner, self.lane_free
        peer = self.schedule.placement[receive.stage]
        seconds, num_bytes = self.prices.message(send)
        here, there = (rank, "send"), (peer, "receive")
        start = max(time_s, lane_free[here], lane_free[there])
        self.exchange(send, receive, (rank, peer), (start, start + seconds))
        self.held.change(time_s, rank, num_bytes)
        lane_free[here] = lane_free[there] = start + seconds
        self.arrive(time_s, receive, start + seconds)

    def exchange(self, send: Action, receive: Action, ranks: tuple[int, int], times_s: tuple[float, float]) -> None:
        """Record a message from a rank to another."""
        num_bytes, (rank, peer), (start, end) = self.prices.message(send)[1], ranks, times_s
        self.spans += [Span(rank, "send", send, start, end), Span(peer, "receive", receive, start, end)]
        self.held.change(end, rank, -num_bytes)
        self.held.change(start, peer, num_bytes)

    def arrive(self, now_s: float, event: Action, time_s: float) -> None:
        self.arrived[event] = time_s
        for rank in self.parked.pop(event, ()):
            self.resume(now_s, rank)

    def join(self, time_s: float, rank: int, tie: Action) -> None:
        """The sum over a tied group begins when its last rank is there."""
        assert tie.peer is not None, f"{tie} has no group"
        members = self.joined[tie.peer]
        members.append((rank, tie))
        if len(members) < len(self.groups[tie.peer]):
            return
        start = max(time_s, *(self.lane_free[other, "collective"] for other, _ in members))
        end = start + self.prices.seconds(tie)
        for other, action in members:
            self.spans.append(Span(other, "collective", action, start, end))
            self.lane_free[other, "collective"] = end
        self.arrive(time_s, Action(Kind.TIE, tie.peer, None, tie.peer), end)

    def collective(self, time_s: float, rank: int, action: Action) -> float:
        """GATHER or REDUCE among replicas, which all come to it together; its end."""
        start = max(time_s, self.lane_free[rank, "collective"])
        end = start + self.prices.seconds(action)
        self.spans.append(Span(rank, "collective", action, start, end))
        self.lane_free[rank, "collective"] = end
        if action.kind is Kind.GATHER:
            self.usable[action.stage] = end
            self.held.gather(rank, action.stage, time_s)
        else:
            self.updated[action.stage] = end
        return end


class _Shared(_Buffered):
    """At most `at_once` ranks compute at full speed; more of them share it evenly, as an operating system lets them.

    `worked_s` is a clock that goes on as fast as every rank that computes: a job of w seconds that starts when it shows v ends when it shows v + w.
    """

    def __init__(self, schedule: Schedule, cost: PipelineCost, at_once: float) -> None:
        super().__init__(schedule, cost)
        self.at_once, self.time_s, self.worked_s = at_once, 0.0, 0.0
        self.jobs: list[tuple[float, int, Job]] = []

    def occupy(self, time_s: float, job: Job) -> None:
        if job.start_s > time_s:
            self.resume(job.start_s, job.rank)  # asks again when it can start
            return
        self.work_until(time_s)
        heapq.heappush(self.jobs, (self.worked_s + self.prices.seconds(job.action), job.rank, job))

    def next_event(self) -> tuple[float, int] | None:
        """A job that ends before the next event makes one."""
        if self.jobs:
            work_s, _, job = self.jobs[0]
            end = self.time_s + (work_s - self.worked_s) / self.speed
            if not self.events or end <= self.events[0][0]:
                heapq.heappop(self.jobs)
                self.time_s, self.worked_s = end, work_s
                self.finish(job, end)
        return super().next_event()

    def advance(self, time_s: float, rank: int, action: Action) -> bool:
        if action.kind is not Kind.GATHER:
            return super().advance(time_s, rank, action)
        self.held.gather(rank, action.stage, time_s)
        self.occupy(time_s, Job(rank, action, (), time_s))
        return False

    def finish(self, job: Job, end: float) -> None:
        if job.action.kind is not Kind.GATHER:
            super().finish(job, end)
            return
        self.spans.append(Span(job.rank, "collective", job.action, job.start_s, end))
        self.position[job.rank] += 1
        self.resume(end, job.rank)

    def work_until(self, time_s: float) -> None:
        self.worked_s += (time_s - self.time_s) * self.speed
        self.time_s = time_s

    @property
    def speed(self) -> float:
        return min(1.0, self.at_once / len(self.jobs)) if self.jobs else 1.0


class _Blocking(_Buffered):
    """Messages and collectives stop the lists of the ranks they concern."""

    def advance(self, time_s: float, rank: int, action: Action) -> bool:
        if action.kind in SENDS or action.kind in RECEIVES:
            return self.meet(time_s, rank, action)
        if action.kind in (Kind.GATHER, Kind.REDUCE):
            self.position[rank] += 1
            self.resume(self.collective(time_s, rank, action), rank)
            return False
        if action.kind is Kind.TIE:
            self.join(time_s, rank, action)
            tied = Action(Kind.TIE, action.peer if action.peer is not None else 0, None, action.peer)
            self.position[rank] += 1
            if tied in self.arrived:
                for other, _ in self.joined[tied.stage]:
                    self.resume(self.arrived[tied], other)
            return False
        return super().advance(time_s, rank, action)

    def meet(self, time_s: float, rank: int, action: Action) -> bool:
        """A send and its receive happen when both ranks are there, and both go on at its end."""
        peer = self.schedule.placement[action.partner.stage]
        if not self.parked.pop(action.partner, None):
            self.parked[action].append(rank)
            return False
        send, source, target = (action, rank, peer) if action.kind in SENDS else (action.partner, peer, rank)
        end = time_s + self.prices.message(send)[0]
        self.exchange(send, send.partner, (source, target), (time_s, end))
        self.held.change(time_s, source, self.prices.message(send)[1])
        self.arrived[send.partner] = end
        for other in (rank, peer):
            self.position[other] += 1
            self.resume(end, other)
        return False
