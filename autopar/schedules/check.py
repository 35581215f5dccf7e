"""The proof that a schedule can be run: complete, in order of dependence, its messages paired, no rank ever stuck.

`check` looks at six things, each in a function of its own, and names the rank, the action and the reason of the first fault:

1. places        every action belongs to a stage of its rank, a microbatch and an edge that exist;
2. completeness  every stage has its forward and its backward (whole, or both halves) for every microbatch, every edge its
                 transfers, every group its TIE; nothing is there twice;
3. dependence    what an action reads was written before it on the same rank;
4. parameters    computations run between GATHER and FREE where there are any; gradients are reduced, then tied, then used by a STEP;
5. messages      the sends from one rank to another are received in the same order;
6. progress      the lists run to their end. "blocking": a send and its receive happen together (rendezvous, also how
                 collectives of NCCL behave when a message is large). "buffered": a send never waits.

Whether a rank waits depends on nothing but how far each list has got, and a step that is possible stays possible until it
is taken. So one run decides for all runs (a marked graph): the lists get stuck under every timing or under none.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal, NoReturn

from autopar.core.schedule import COMPUTE, RECEIVES, SENDS, TRANSFERS, Action, Edge, Kind, Schedule
from autopar.errors import ScheduleError
from autopar.schedules.flow import Flow, Value

UPDATED = COMPUTE | {Kind.REDUCE, Kind.TIE}  # what an optimizer step must wait for
Semantics = Literal["blocking", "buffered"]


def check(schedule: Schedule, semantics: Semantics = "blocking") -> None:
    """Raise ScheduleError unless the schedule is complete, in order and free of deadlock."""
    _check_places(schedule)
    _check_completeness(schedule)
    _check_dependence(schedule)
    _check_parameters(schedule)
    _check_messages(schedule)
    _check_progress(schedule, semantics)


def _actions(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    for rank, actions in enumerate(schedule.ranks):
        for action in actions:
            yield rank, action


def _check_places(schedule: Schedule) -> None:
    edges: dict[tuple[int | None, int | None], Edge] = {(e.source, e.target): e for e in schedule.edges}
    firsts = {group[0]: group for group in schedule.tied}
    for rank, action in _actions(schedule):

        def refuse(reason: str, rank: int = rank, action: Action = action) -> NoReturn:
            raise ScheduleError(schedule.name, rank, str(action), reason)

        kind, stage, peer = action.kind, action.stage, action.peer
        if stage >= schedule.num_stages:
            refuse(f"there are {schedule.num_stages} stages")
        if schedule.placement[stage] != rank:
            refuse(f"stage {stage} sits on rank {schedule.placement[stage]}")
        if action.microbatch is not None and action.microbatch >= schedule.num_microbatches:
            refuse(f"there are {schedule.num_microbatches} microbatches")
        if action.microbatch is not None and action.microbatch not in schedule.microbatches(stage):
            refuse(f"stage {stage} runs microbatches {schedule.microbatches(stage).start} to {schedule.microbatches(stage).stop - 1}")
        if not schedule.training and kind not in (Kind.F, Kind.SEND_F, Kind.RECV_F, Kind.GATHER, Kind.FREE):
            refuse("the schedule is for inference")
        if kind is Kind.TIE and stage not in firsts.get(peer if peer is not None else -1, ()):
            refuse(f"stage {stage} shares no weight with a group of stage {peer}")
        if kind in TRANSFERS:
            forward = kind in (Kind.SEND_F, Kind.RECV_B)
            edge = edges.get((stage, peer) if forward else (peer, stage))
            if edge is None:
                refuse(f"no edge joins stages {stage} and {peer} this way")
            if kind in (Kind.SEND_B, Kind.RECV_B) and not edge.has_gradient:
                refuse(f"no gradient comes back from stage {edge.target} to stage {edge.source}")
            if schedule.placement[edge.source] == schedule.placement[edge.target]:
                refuse(f"stages {stage} and {peer} are on one rank; nothing is sent")


def _check_completeness(schedule: Schedule) -> None:
    times = Counter(action for _, action in _actions(schedule) if action.kind not in (Kind.GATHER, Kind.FREE))
    for action, count in times.items():
        if count > 1:
            raise ScheduleError(schedule.name, schedule.placement[action.stage], str(action), f"is there {count} times")
    for action in _required(schedule, times):
        if action not in times:
            raise ScheduleError(schedule.name, schedule.placement[action.stage], str(action), "is missing")
    stages = range(schedule.num_stages)
    for group in schedule.tied:
        for rank in {schedule.placement[stage] for stage in group}:
            count = sum(Action(Kind.TIE, stage, None, group[0]) in times for stage in group if schedule.placement[stage] == rank)
            if count != 1:
                raise ScheduleError(schedule.name, rank, f"TIE{group[0]}", f"is there {count} times; the rank joins the sum over stages {list(group)} once")
    has_step = [Action(Kind.STEP, stage) in times for stage in stages]
    if any(has_step) and not all(has_step):
        raise ScheduleError(schedule.name, schedule.placement[has_step.index(False)], f"{has_step.index(False)}STEP", "is missing, other stages have one")
    for stage in stages:
        whole, parts = Action(Kind.REDUCE, stage) in times, [Action(Kind.REDUCE, stage, m) in times for m in schedule.microbatches(stage)]
        if (whole and any(parts)) or (any(parts) and not all(parts)):
            raise ScheduleError(schedule.name, schedule.placement[stage], f"{stage}REDUCE", "gradients are reduced once, or once for every microbatch")


def _required(schedule: Schedule, times: Counter[Action]) -> Iterator[Action]:
    for m in range(schedule.num_microbatches):
        for stage in (s for s in range(schedule.num_stages) if m in schedule.microbatches(s)):
            yield Action(Kind.F, stage, m)
            if schedule.training:
                whole, halves = Action(Kind.B, stage, m), (Action(Kind.I, stage, m), Action(Kind.W, stage, m))
                split = [half for half in halves if half in times]
                if split and whole in times:
                    raise ScheduleError(schedule.name, schedule.placement[stage], str(split[0]), f"is part of {whole}, which is there as well")
                yield from halves if split else (whole,)
        for edge in schedule.edges:
            if schedule.placement[edge.source] != schedule.placement[edge.target]:
                send = Action(Kind.SEND_F, edge.source, m, edge.target)
                back = Action(Kind.SEND_B, edge.target, m, edge.source)
                for message in (send, back) if schedule.training and edge.has_gradient else (send,):
                    yield message
                    yield message.partner


def _check_dependence(schedule: Schedule) -> None:
    flow = Flow(schedule.num_microbatches, schedule.placement, schedule.edges, schedule.tied, schedule.shares)
    for rank, actions in enumerate(schedule.ranks):
        present: set[Value] = set()
        for action in actions:
            for value in flow.reads(action):
                if value not in present:
                    raise ScheduleError(schedule.name, rank, str(action), f"comes before the rank has {value}")
            present.update(flow.writes(action))


def _check_parameters(schedule: Schedule) -> None:
    gathers = {action.stage for _, action in _actions(schedule) if action.kind is Kind.GATHER}
    groups = {group[0]: frozenset(group) for group in schedule.tied}
    for rank, actions in enumerate(schedule.ranks):
        whole: set[int] = set()
        summed: set[int] = set()
        stepped: set[int] = set()
        for action in actions:
            stage, kind = action.stage, action.kind
            stages = groups[action.peer] if kind is Kind.TIE and action.peer is not None else frozenset({stage})
            reason = None
            if kind is Kind.GATHER and stage in whole:
                reason = f"the parameters of stage {stage} are gathered already"
            elif kind is Kind.FREE and stage not in whole:
                reason = f"the parameters of stage {stage} are not gathered"
            elif kind in COMPUTE and stage in gathers and stage not in whole:
                reason = f"the parameters of stage {stage} are not gathered; other uses of it gather them"
            elif kind in UPDATED and stages & stepped:
                reason = f"comes after the optimizer step of stage {min(stages & stepped)}"
            elif kind is Kind.REDUCE and stage in summed:
                reason = f"comes after the sum over the stages that share a weight with stage {stage}; reduce first"
            if reason is not None:
                raise ScheduleError(schedule.name, rank, str(action), reason)
            whole = whole | {stage} if kind is Kind.GATHER else whole - {stage} if kind is Kind.FREE else whole
            summed |= stages if kind is Kind.TIE else set()
            stepped |= stages if kind is Kind.STEP else set()
        if whole:
            raise ScheduleError(schedule.name, rank, f"{min(whole)}GATHER", f"the parameters of stage {min(whole)} are gathered and never freed")


def _check_messages(schedule: Schedule) -> None:
    sent: dict[tuple[int, int], list[Action]] = defaultdict(list)
    received: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, action in _actions(schedule):
        if action.kind in SENDS and action.peer is not None:
            sent[rank, schedule.placement[action.peer]].append(action)
        elif action.kind in RECEIVES and action.peer is not None:
            received[schedule.placement[action.peer], rank].append(action)
    for (source, target), sends in sent.items():
        for send, receive in zip(sends, received[source, target], strict=True):
            if send.partner != receive:
                raise ScheduleError(schedule.name, target, str(receive), f"receives where rank {source} sends {send}; messages of a pair of ranks come in one order")


def _check_progress(schedule: Schedule, semantics: Semantics) -> None:
    position = [0] * schedule.num_ranks
    sent: set[Action] = set()

    def head(rank: int) -> Action | None:
        return schedule.ranks[rank][position[rank]] if position[rank] < len(schedule.ranks[rank]) else None

    def meet(rank: int, action: Action) -> list[int] | None:
        """The ranks that advance together with this action; None where one of them is not there yet."""
        if action.kind is Kind.TIE:
            group = next(group for group in schedule.tied if group[0] == action.peer)
            ranks = sorted({schedule.placement[stage] for stage in group})
            there = [r for r in ranks if (a := head(r)) is not None and a.kind is Kind.TIE and a.peer == action.peer]
            return ranks if there == ranks else None
        if action.kind not in TRANSFERS or action.peer is None:
            return [rank]
        if semantics == "buffered":
            return [rank] if action.kind in SENDS or action.partner in sent else None
        peer = schedule.placement[action.peer]
        return [rank, peer] if head(peer) == action.partner else None

    ready = list(range(schedule.num_ranks))
    while ready:
        rank = ready.pop()
        while (action := head(rank)) is not None and (ranks := meet(rank, action)) is not None:
            if semantics == "buffered" and action.kind in SENDS and action.peer is not None:
                sent.add(action)
                ready.append(schedule.placement[action.peer])
            for other in ranks:
                position[other] += 1
            ready.extend(other for other in ranks if other != rank)
    if any(head(rank) is not None for rank in range(schedule.num_ranks)):
        _explain_deadlock(schedule, [head(rank) for rank in range(schedule.num_ranks)], semantics)


def _explain_deadlock(schedule: Schedule, heads: list[Action | None], semantics: Semantics) -> NoReturn:
    """Follow who waits for whom until a rank comes up twice."""
    chain: list[int] = [next(rank for rank, head in enumerate(heads) if head is not None)]
    while len(set(chain)) == len(chain):
        action = heads[chain[-1]]
        assert action is not None and action.peer is not None, "only messages and sums wait, and completeness gives each its partner"
        if action.kind is Kind.TIE:
            group = next(group for group in schedule.tied if group[0] == action.peer)
            late = [r for r in {schedule.placement[s] for s in group} if (a := heads[r]) is None or a.kind is not Kind.TIE or a.peer != action.peer]
            chain.append(min(late))
        else:
            chain.append(schedule.placement[action.peer])
    circle = chain[chain.index(chain[-1]) :]
    waits = ", ".join(f"rank {a} at {heads[a]} waits for rank {b}" for a, b in pairwise(circle))
    raise ScheduleError(schedule.name, circle[0], str(heads[circle[0]]), f"deadlock with {semantics} messages: {waits}")
