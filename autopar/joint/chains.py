"""Chains of passes that wait for each other, through the lists of an order: how often they go forward and back through every stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

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


@dataclass(frozen=True, eq=False)
class Walk:
    """Forwards and backwards of a step by turns of all ranks: each goes with its list, as soon as another's result is there.

    `costs`: [turn, rank], the stage of a pass, those of backwards behind those of forwards, and the last number where a rank waits. `handed`: [turn, rank], where the
    pass whose result is read is in a list of all [turn, rank] behind the start of every rank; the end of that where there is none.
    """

    costs: np.ndarray
    handed: np.ndarray


def rank_chain(order: Order, rank: int) -> Chain:
    """All that a rank does, behind the first forward of the ranks before it, and before their last backward."""
    passes = tuple([1 if s < rank else order.num_microbatches if s % order.num_ranks == rank else 0 for s in range(order.num_stages)])
    return Chain(passes, passes, 2 * rank)


def may_be_walked(order: Order) -> bool:
    return 2 * order.num_microbatches * order.num_stages <= MOST_PASSES


@lru_cache(maxsize=64)
def walk(order: Order) -> Walk:
    """Of lists of forwards and backwards."""
    lists, stages, number = make_order(order.schedule, order.num_ranks, order.num_microbatches, order.virtual).ranks, order.num_stages, order.num_microbatches
    costs = np.arange(2 * stages).repeat(number)  # passes by stage, and then by microbatch
    there = np.arange(len(costs)) + np.where(costs < stages, -number, number)
    handed = np.where((costs == 0) | (costs == 2 * stages - 1), -1, there)
    left = [[(a.stage if a.kind is Kind.F else stages + a.stage) * number + (a.microbatch or 0) for a in actions] for actions in lists]
    turns = _turns(left, handed.tolist())
    ranks, shape = costs % stages % order.num_ranks, (turns.max() + 1, order.num_ranks)
    found = Walk(np.full(shape, 2 * stages), np.full(shape, (shape[0] + 1) * shape[1]))
    found.costs[turns[:-1], ranks] = costs
    read = handed >= 0
    found.handed[turns[:-1][read], ranks[read]] = (turns[handed[read]] + 1) * order.num_ranks + ranks[handed[read]]
    return found


def _turns(lists: Sequence[Sequence[int]], handed: Sequence[int]) -> np.ndarray:
    """Of every pass, by its number and that of the one whose result it reads; -1 behind all."""
    turns: list[int | None] = [*[None] * len(handed), -1]
    left, last, going = [iter(passes) for passes in lists], [-1] * len(lists), True
    following = [next(passes, None) for passes in left]
    while going:
        going = False
        for rank, passes in enumerate(left):
            one, own = following[rank], last[rank]
            while one is not None and (behind := turns[handed[one]]) is not None:
                own = (behind if behind > own else own) + 1
                turns[one], one, going = own, next(passes, None), True
            following[rank], last[rank] = one, own
    return np.array(turns, int)


def longest_chain(order: Order, blocks: Sequence[float], dearer: int | None = None) -> Chain:
    """Where stages have so many equal blocks, whose messages and backwards take `MESSAGE` and `BACK` of a forward; the backwards of one rank may be `DEARER`."""
    return _longest(order, blocks, [dearer])[0]


def chains_by_rank(order: Order, blocks: Sequence[float]) -> list[Chain]:
    """The longest ones where one rank after the other is dearer."""
    return _longest(order, blocks, range(order.num_ranks))


def _longest(order: Order, blocks: Sequence[float], dearer: Sequence[int | None]) -> list[Chain]:
    """With one rank dearer after the other, all at once."""
    walked, ranks = walk(order), np.arange(order.num_stages) % order.num_ranks
    backs = [BACK * np.where(ranks == rank, DEARER, 1.0) * blocks for rank in dearer]
    taken = np.array([[*blocks, *back, 0.0] for back in backs]).T[walked.costs]  # [turn, rank, which is dearer]
    every = np.zeros((walked.handed.size + order.num_ranks + 1, len(dearer)))
    every[-1] = -np.inf
    ends, ready = every[:-1].reshape(-1, *taken.shape[1:]), np.empty_like(taken)
    before, message = ends[0], np.full(taken.shape[1:], MESSAGE)
    for handed, arrived, cost, end in zip(walked.handed, ready, taken, ends[1:], strict=True):
        every.take(handed, 0, arrived, "clip")
        np.add(arrived, message, out=arrived)
        np.maximum(arrived, before, out=end)
        np.add(end, cost, out=end)
        before = end
    waited = np.where(ready > ends[:-1], np.arange(len(taken), dtype=np.int32)[:, None, None], np.int32(-1))
    np.maximum.accumulate(waited, axis=0, out=waited)
    return [_followed(order, walked, waited[..., n], int(before[:, n].argmax())) for n in range(len(dearer))]


def _followed(order: Order, walked: Walk, waited: np.ndarray, rank: int) -> Chain:
    """Back from the end of a rank. `waited`: [turn, rank], the last turn until then at which a rank began when a message arrived."""
    turn, found, messages = len(waited) - 1, list[np.ndarray](), 0
    while (first := int(waited[turn, rank])) >= 0:
        found.append(walked.costs[first : turn + 1, rank])
        turn, rank = divmod(int(walked.handed[first, rank]) - order.num_ranks, order.num_ranks)
        messages += 1
    counts = np.bincount(np.concatenate([*found, walked.costs[: turn + 1, rank]]), minlength=2 * order.num_stages).tolist()
    return Chain(tuple(counts[: order.num_stages]), tuple(counts[order.num_stages : 2 * order.num_stages]), messages)
