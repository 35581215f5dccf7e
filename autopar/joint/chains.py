"""Chains of passes that wait for each other, through the lists of an order: how often they go forward and back through every stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from autopar.core.schedule import Kind
from autopar.planner.blocks import Order
from autopar.schedules.orders import make_order

MESSAGE, BACK = 0.1, 2.0
"""Of a forward: a message and a backward, where the longest chain is looked for. It is a chain whatever they take."""

DEARER = 1.05
"""Where backwards of one rank take so many times what others do: what memory costs a rank is of that size."""

MOST_PASSES = 20_000
"""Of orders that have more, only the chains of their ranks are taken."""


@dataclass(frozen=True, slots=True)
class Chain:
    """How often it goes forward and back through every stage, and how many messages it waits for."""

    forwards: tuple[int, ...]
    backwards: tuple[int, ...]
    messages: int


class Pass(NamedTuple):
    """A forward or a backward. `own`: the one before it on its rank; `handed`: the one on another rank whose result it reads, -1 for none; `cost`: its stage,
    those of backwards behind those of forwards."""

    own: int
    handed: int
    cost: int


def rank_chain(order: Order, rank: int) -> Chain:
    """All that a rank does, behind the first forward of the ranks before it, and before their last backward."""
    passes = tuple([1 if s < rank else order.num_microbatches if s % order.num_ranks == rank else 0 for s in range(order.num_stages)])
    return Chain(passes, passes, 2 * rank)


def may_be_walked(order: Order) -> bool:
    return 2 * order.num_microbatches * order.num_stages <= MOST_PASSES


@lru_cache(maxsize=64)
def passes(order: Order) -> tuple[Pass, ...]:
    """Of a step, each behind all that it waits for."""
    lists, stages = make_order(order.schedule, order.num_ranks, order.num_microbatches, order.virtual).ranks, order.num_stages
    number: dict[tuple[bool, int, int | None], int] = {}
    found: list[Pass] = []
    last, position, going = [-1] * order.num_ranks, [0] * order.num_ranks, True
    while going:
        going = False
        for rank, actions in enumerate(lists):
            for action in actions[position[rank] :]:
                forward, stage = action.kind is Kind.F, action.stage
                nearer = stage - 1 if forward else stage + 1
                handed = number.get((forward, nearer, action.microbatch)) if 0 <= nearer < stages else -1
                if handed is None:
                    break
                number[forward, stage, action.microbatch] = len(found)
                found.append(Pass(last[rank], handed, stage if forward else stages + stage))
                last[rank], going = len(found) - 1, True
                position[rank] += 1
    return tuple(found)


def longest_chain(order: Order, blocks: Sequence[float], dearer: int | None = None) -> Chain:
    """Where stages have so many equal blocks, whose messages and backwards take `MESSAGE` and `BACK` of a forward; the backwards of one rank may be `DEARER`."""
    every, backs = passes(order), [BACK * (DEARER if s % order.num_ranks == dearer else 1.0) for s in range(order.num_stages)]
    costs = [*blocks, *(back * number for back, number in zip(backs, blocks, strict=True))]
    ends: list[float] = []
    for own, handed, cost in every:
        ready = ends[own] if own >= 0 else 0.0
        if handed >= 0 and ends[handed] + MESSAGE > ready:
            ready = ends[handed] + MESSAGE
        ends.append(ready + costs[cost])
    counts, messages, at = [0] * len(costs), 0, max(range(len(every)), key=ends.__getitem__)
    while at >= 0:
        own, handed, cost = every[at]
        waits = handed >= 0 and (own < 0 or ends[handed] + MESSAGE > ends[own])
        counts[cost] += 1
        messages += waits
        at = handed if waits else own
    return Chain(tuple(counts[: order.num_stages]), tuple(counts[order.num_stages :]), messages)


def chains_by_rank(order: Order, blocks: Sequence[float]) -> list[Chain]:
    """The longest ones where one rank after the other is dearer."""
    return [longest_chain(order, blocks, rank) for rank in range(order.num_ranks)]
