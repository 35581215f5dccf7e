"""ZeRO-3 on a real rank: the weights of a block are gathered in one collective before it runs, and again for its backward."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from autopar.runtime.distributed import GroupExchange
from autopar.runtime.parts import Parts
from autopar.runtime.rank import Rank

Scatter = Callable[[Sequence[torch.Tensor]], None]
"""What takes the gradients of the gathered weights."""


class ShardedUnit:
    """The parameters of one segment that are stored in parts over the same axes.

    `positions`: where they stand among the segment's arguments; `flat`: this rank's parts side by side, where they are stored so.
    `before` and `after` are the neighbours in program order, whose weights are fetched ahead of time.
    """

    def __init__(
        self, rank: Rank, axes: str, parts: Parts, positions: Sequence[int], leaves: Sequence[torch.Tensor], flat: torch.Tensor | None, dtype: torch.dtype, scatter: Scatter
    ) -> None:
        self.rank, self.axes, self.parts, self.positions, self.leaves = rank, axes, parts, tuple(positions), list(leaves)
        self.flat, self.dtype, self.scatter = flat, dtype, scatter
        self.before: ShardedUnit | None = None
        self.after: ShardedUnit | None = None
        self._pending: tuple[torch.Tensor, Any] | None = None
        self._again: list[torch.Tensor] | None = None

    def gather(self, args: Sequence[Any]) -> tuple[list[Any], list[torch.Tensor]]:
        weights = list(_Gather.apply(self, *(args[p] for p in self.positions)))
        given = list(args)
        for p, w in zip(self.positions, weights):
            given[p] = w
        return given, weights

    def again(self) -> list[torch.Tensor]:
        if self._again is None:
            with torch.no_grad():
                self._again = self.fetch(self.before)
            if self.after is not None and not self.after.trains:
                self.after.drop()
        return self._again

    @property
    def trains(self) -> bool:
        return any(leaf.requires_grad for leaf in self.leaves)

    def drop(self) -> None:
        self._again = None

    def start(self) -> None:
        """Begin to gather; `fetch` completes it."""
        if self._pending is not None:
            return
        exchange = self.rank.exchanges[self.axes]
        assert isinstance(exchange, GroupExchange)
        row = self._row()
        self.rank.count("all_gather", self.axes, row)
        self._pending = exchange.start_all_gather(row)

    def _row(self) -> torch.Tensor:
        """What this rank sends."""
        if self.flat is not None:
            return self.rank.on_device(self.flat).to(self.dtype)
        row = torch.zeros(self.parts.total, dtype=self.dtype, device=self.rank.device)
        for view, leaf in zip(self.parts.own(row), self.leaves):
            view.copy_(self.rank.on_device(leaf.detach()))
        return row

    def fetch(self, ahead: "ShardedUnit | None") -> list[torch.Tensor]:
        """The whole weights; the gather of `ahead` is under way when this returns."""
        self.start()
        assert self._pending is not None
        rows, work = self._pending
        self._pending = None
        work.wait()
        if ahead is not None:
            ahead.start()
        return self.parts.unpack(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unit: ShardedUnit, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.unit = unit
        ctx.set_materialize_grads(False)
        unit.drop()
        return tuple(unit.fetch(unit.before if unit.rank.replaying else unit.after))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[None, ...]:
        unit = ctx.unit
        unit.drop()
        unit.scatter([torch.zeros(cut.shape, dtype=unit.dtype, device=unit.rank.device) if g is None else g for cut, g in zip(unit.parts.cuts, grads)])
        return (None,) * (len(grads) + 1)


class Units:
    """All that is gathered for one segment."""

    def __init__(self, units: Sequence[ShardedUnit]) -> None:
        self.units = tuple(units)

    def gather(self, args: Sequence[Any]) -> tuple[list[Any], list[torch.Tensor]]:
        given, weights = list(args), []
        for unit in self.units:
            given, more = unit.gather(given)
            weights += more
        return given, weights

    def again(self) -> list[torch.Tensor]:
        """Gathered last first, as the backward goes; returned in the order of `gather`."""
        found = [unit.again() for unit in reversed(self.units)]
        return [w for weights in reversed(found) for w in weights]


def link(units: Sequence[Units]) -> None:
    """Tell every unit its neighbours in program order."""
    chain = [unit for group in units for unit in group.units]
    for first, second in zip(chain, chain[1:]):
        first.after, second.before = second, first
