"""From the order of computation to full lists: transfers, tied gradients, gathers, reductions, optimizer steps.

Why the lists cannot deadlock. `clock` gives every computation a start and an end. A transfer becomes one event at the
moment its value is ready, and events are put in one global order: by time, transfers before computations, then by number.
Every rank's list is the part of this order that concerns it. The first event that has not happened yet is therefore at the
front of the list of each rank it concerns, and what it reads was written by an earlier event: it can happen, even where a
send waits for its receiver. The messages between two ranks come in the same order on both for the same reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from autopar.core.schedule import COMPUTE, Action, Edge, Kind, Schedule, chain, check_shape, microbatches_of
from autopar.errors import ScheduleError, UsageError
from autopar.schedules.flow import Flow, Value
from autopar.schedules.orders import Order, make_order

NOMINAL: Mapping[Kind, float] = {Kind.F: 1.0, Kind.B: 2.0, Kind.I: 1.0, Kind.W: 1.0}
"""Relative durations that place the transfers: a backward is two products for each of the forward's."""


def make_schedule(
    name: str, num_ranks: int, num_microbatches: int, virtual_stages: int = 1, *, edges: Sequence[Edge] | None = None, tied: Sequence[Sequence[int]] = ()
) -> Schedule:
    """The schedule called `name` (see `orders.py`) with its transfers; `edges` default to a chain of stages."""
    return lower(make_order(name, num_ranks, num_microbatches, virtual_stages), edges, tied)


def lower(order: Order, edges: Sequence[Edge] | None = None, tied: Sequence[Sequence[int]] = ()) -> Schedule:
    """The order with a transfer per edge, microbatch and direction, and a TIE per group of stages that share weights.

    Raises ScheduleError where the order waits for itself.
    """
    edges = chain(len(order.placement)) if edges is None else tuple(edges)
    groups = tuple(tuple(group) for group in tied) if order.training else ()
    check_shape(order.num_microbatches, order.placement, len(order.ranks), edges, groups)
    flow = Flow(order.num_microbatches, order.placement, edges, groups, order.shares)
    ends, lists = clock(order, flow)

    def time_of(value: Value) -> float:
        if value not in ends:
            raise ScheduleError(order.name, order.placement[value.stage], None, f"{value} is never computed")
        return ends[value]

    events: list[tuple[tuple[float, ...], tuple[Action, ...]]] = []
    for edge in edges:
        if order.placement[edge.source] == order.placement[edge.target]:
            continue
        for m in range(order.num_microbatches):
            sends = [Action(Kind.SEND_F, edge.source, m, edge.target)]
            if order.training and edge.has_gradient:
                sends.append(Action(Kind.SEND_B, edge.target, m, edge.source))
            for send in sends:
                time = time_of(flow.reads(send)[0])
                events.append(((time, 0, m, send.stage, send.partner.stage), (send, send.partner)))
    for group in groups:
        first = {order.placement[stage]: stage for stage in reversed(group)}
        time = max(time_of(Value("weight gradient", stage, m)) for stage in group for m in microbatches_of(stage, order.num_microbatches, order.shares))
        events.append(((time, 0, order.num_microbatches, group[0], 0), tuple(Action(Kind.TIE, stage, None, group[0]) for stage in first.values())))
    placed: list[list[tuple[tuple[float, ...], Action]]] = [[((start, 1), action) for start, action in actions] for actions in lists]
    for key, actions in events:
        for action in actions:
            placed[order.placement[action.stage]].append((key, action))
    ranks = tuple(tuple(action for _, action in sorted(items, key=lambda item: item[0])) for items in placed)
    return Schedule(order.name, order.num_microbatches, order.placement, edges, ranks, groups, order.training, order.shares)


def clock(order: Order, flow: Flow) -> tuple[dict[Value, float], list[list[tuple[float, Action]]]]:
    """(when each value is ready, per rank its actions with their starts) at nominal durations and free transfers."""
    ends: dict[Value, float] = {}
    lists: list[list[tuple[float, Action]]] = [[] for _ in order.ranks]
    free = [0.0] * len(order.ranks)
    waiting: dict[Value, list[int]] = {}
    ready = list(range(len(order.ranks)))
    while ready:
        rank = ready.pop()
        for action in order.ranks[rank][len(lists[rank]) :]:
            if action.kind not in COMPUTE:
                raise ScheduleError(order.name, rank, str(action), "an order holds computations only; what is sent is added to it")
            missing = next((value for value in flow.reads(action) if value not in ends), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            start = max([free[rank], *(ends[value] for value in flow.reads(action))])
            free[rank] = start + NOMINAL[action.kind]
            lists[rank].append((start, action))
            for value in flow.writes(action):
                ends[value] = free[rank]
                ready.extend(waiting.pop(value, ()))
    for missing, ranks in waiting.items():
        action = order.ranks[ranks[0]][len(lists[ranks[0]])]
        raise ScheduleError(order.name, ranks[0], str(action), f"waits for {missing}, which is never computed or only after it")
    return ends, lists


def add_updates(schedule: Schedule, *, replicas: int = 1, zero_stage: int = 0, step: bool = True) -> Schedule:
    """The schedule with what keeps `replicas` copies of the pipeline equal, and with a STEP per stage.

    `zero_stage` 0: gradients are reduced once, after the last of the stage. 1: parameters are gathered once per step as
    well, of all stages of a rank from its beginning on, in the order of first use. 2: gradients are reduced per microbatch, so that
    no rank holds them whole. 3: parameters are gathered for each use.
    """
    if zero_stage not in range(4) or replicas < 1:
        raise UsageError(f"ZeRO stage {zero_stage} over {replicas} replicas; stages are 0 to 3, replicas at least 1")
    if not schedule.training or any(a.kind in (Kind.STEP, Kind.REDUCE, Kind.GATHER) for actions in schedule.ranks for a in actions):
        raise UsageError(f"schedule {schedule.name} is {'has its updates' if schedule.training else 'for inference'}; give one that trains and has no updates yet")
    ranks = tuple(_with_updates(actions, zero_stage if replicas > 1 else None, step) for actions in schedule.ranks)
    return replace(schedule, ranks=ranks)


def _with_updates(actions: Sequence[Action], zero_stage: int | None, step: bool) -> tuple[Action, ...]:
    """One rank's list with its updates; `zero_stage` None where there is one replica only."""
    last_use = {action.stage: i for i, action in enumerate(actions) if action.kind in COMPUTE}  # in the order of first use
    result = [Action(Kind.GATHER, stage) for stage in last_use if zero_stage in (1, 2)]
    due: list[Action] = []  # reductions wait behind the gradients that are sent: the rank before needs those first
    for i, action in enumerate(actions):
        stage, computes = action.stage, action.kind in COMPUTE
        if computes or action.kind is Kind.TIE:
            result += due
            due = []
        if computes and zero_stage == 3:
            result.append(Action(Kind.GATHER, stage))
        result.append(action)
        if computes and (zero_stage == 3 or (zero_stage in (1, 2) and i == last_use[stage])):
            result.append(Action(Kind.FREE, stage))
        if zero_stage in (2, 3) and action.kind in (Kind.B, Kind.W):
            due.append(Action(Kind.REDUCE, stage, action.microbatch))
        if zero_stage in (0, 1) and computes and i == last_use[stage]:
            due.append(Action(Kind.REDUCE, stage))
    return (*result, *due, *(Action(Kind.STEP, stage) for stage in sorted(last_use) if step))
