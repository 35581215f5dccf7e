"""What plans of a sharding take by the linear model of memory, however much a rank may hold: a few operations of a few numbers for each limit."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autopar.joint.at_point import PointSearch
from autopar.planner.blocks import Order

UNEVEN = 2
"""Times the blocks that a rank has where all have the same, one has at most."""


@dataclass(frozen=True, eq=False)
class Reach:
    """Of a sharding in an order. `block_s`, `prices`: [rank, line], see `bounds.Line`; `ends_s`, `taken_bytes`: [rank], beside its blocks, of the step and of a limit;
    `numbers`: of blocks that a rank may have, of `depth` in all; `once`: times what ranks do, until all are at work and when some are through."""

    block_s: np.ndarray
    prices: np.ndarray
    ends_s: np.ndarray
    taken_bytes: np.ndarray
    numbers: np.ndarray
    depth: int
    once: float

    @classmethod
    def of(cls, search: PointSearch, choices: tuple[int, ...], order: Order) -> "Reach":
        whole, depth, ranks = search.tables.side("whole"), search.joint.run.depth, order.num_ranks
        parts, figures = whole.parts_of(choices), whole.figures(choices)
        by_rank = [figures.lines(flight, 0.0, figures) for flight in order.in_flight]
        longest = max(map(len, by_rank))
        lines = [[*of_rank, *of_rank[:1] * (longest - len(of_rank))] for of_rank in by_rank]
        ends_s = np.zeros(ranks)
        ends_s[0] += parts.first
        ends_s[-1] += parts.last
        return cls(
            block_s=np.array([[line.block_s for line in of_rank] for of_rank in lines]), prices=np.array([[line.price for line in of_rank] for of_rank in lines]),
            ends_s=ends_s, taken_bytes=-np.array(search.rooms(order, 0.0, search.tables.end_bytes(whole))),
            numbers=np.arange(1, min(depth, UNEVEN * math.ceil(depth / ranks)) + 1) if order.virtual == 1 < ranks else np.array([depth / ranks]),
            depth=depth, once=(ranks - 1) / (order.num_microbatches * order.virtual),
        )  # fmt: skip

    def step_s(self, limit_bytes: float) -> float:
        """With the blocks on the ranks so that the one that takes longest takes least, where they may have different numbers."""
        relief = self.prices * (limit_bytes - self.taken_bytes)[:, None]
        by_number = (self.numbers[:, None] * self.block_s[:, None, :] - relief[:, None, :]).max(axis=2) + self.ends_s[:, None]
        if len(self.numbers) == 1:
            return float(by_number.max() + self.once * by_number.mean())
        last = self.depth - 1  # every block goes where it is done soonest
        return float(np.partition(by_number, last, axis=None)[last]) * (1 + self.once)

    def price(self, limit_bytes: float) -> float:
        """Of a byte of the rank with the least room, where all have as many blocks; 0 where it has enough."""
        rank = int(self.taken_bytes.argmax())
        by_line = self.depth / len(self.block_s) * self.block_s[rank] - self.prices[rank] * (limit_bytes - self.taken_bytes[rank])
        return float(self.prices[rank, by_line.argmax()])

    @cached_property
    def free_s(self) -> float:
        """With any memory."""
        return float((self.depth / len(self.block_s) * self.block_s[:, 0] + self.ends_s).max()) * (1 + self.once)
