"""ZeRO-3 on a real rank: the weights of a block are gathered in one collective before it runs, and again for its backward."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from autopar.runtime.distributed import GroupExchange
from autopar.runtime.parts import Parts
from autopar.runtime.rank import Rank

Scatter = Callable[[Sequence[torch.Tensor]], None]
"""What takes the gradients of a unit's gathered weights."""


class ShardedUnit:
    """The parameters of one segment that are stored in parts over the same axes.

    `positions`: where they stand among the segment's arguments; `flat`: this rank's parts side by side, where they are stored so.
    """

    def __init__(
        self, rank: Rank, axes: str, parts: Parts, positions: Sequence[int], leaves: Sequence[torch.Tensor], flat: torch.Tensor | None, dtype: torch.dtype, scatter: Scatter
    ) -> None:
        self.rank, self.axes, self.parts, self.positions, self.leaves = rank, axes, parts, tuple(positions), list(leaves)
        self.flat, self.dtype, self.scatter = flat, dtype, scatter
        self._pending: tuple[torch.Tensor, Any] | None = None

    @property
    def trains(self) -> bool:
        return any(leaf.requires_grad for leaf in self.leaves)

    def start(self) -> None:
        """Begin to gather, unless that is under way."""
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

    def wait(self) -> list[torch.Tensor]:
        """The whole weights of a gather that was started."""
        assert self._pending is not None
        rows, work = self._pending
        self._pending = None
        work.wait()
        return self.parts.unpack(rows)

    def forget(self) -> None:
        """Drop what was fetched ahead and never used: the parameters may have changed since."""
        if self._pending is not None:
            self.wait()

    def reduce(self, grads: Sequence[torch.Tensor | None]) -> None:
        """Hand on the gradients of the whole weights; one that got none counts as zeros."""
        self.scatter([torch.zeros(cut.shape, dtype=self.dtype, device=self.rank.device) if g is None else g for cut, g in zip(self.parts.cuts, grads)])


class Units:
    """All that is gathered for one segment. `before` and `after` are its neighbours in program order, fetched ahead of time."""

    def __init__(self, units: Sequence[ShardedUnit]) -> None:
        self.units = tuple(units)
        self.positions = [p for unit in units for p in unit.positions]
        self.before: Units | None = None
        self.after: Units | None = None
        self._again: list[torch.Tensor] | None = None

    @property
    def trains(self) -> bool:
        return any(unit.trains for unit in self.units)

    def gather(self, args: Sequence[Any]) -> tuple[list[Any], list[torch.Tensor]]:
        given, weights = list(args), list(_Gather.apply(self, *(args[p] for p in self.positions)))
        for p, w in zip(self.positions, weights):
            given[p] = w
        return given, weights

    def again(self, *, first: bool = False) -> list[torch.Tensor]:
        """The weights for the backward, in the order of `gather`; there until all their gradients are."""
        if first or self._again is None:
            with torch.no_grad():
                self._again = self.fetch(self.before)
            if self.after is not None and not self.after.trains:
                self.after.drop()
        return self._again

    def drop(self) -> None:
        self._again = None

    def forget(self) -> None:
        """Start anew: what an abandoned pass has left is no longer true."""
        self.drop()
        for unit in self.units:
            unit.forget()

    def start(self) -> None:
        for unit in self.units:
            unit.start()

    def fetch(self, ahead: "Units | None") -> list[torch.Tensor]:
        """The whole weights; the gather of `ahead` is under way when this returns."""
        self.start()
        if ahead is not None:
            ahead.start()
        return [w for unit in self.units for w in unit.wait()]

    def parts_of(self, values: Sequence[Any]) -> Iterator[tuple[ShardedUnit, Sequence[Any]]]:
        """Every unit with its stretch of what stands in the order of `gather`."""
        start = 0
        for unit in self.units:
            yield unit, values[start : start + len(unit.positions)]
            start += len(unit.positions)


class _Gather(torch.autograd.Function):
    """Stored parts to whole weights; its backward runs when the gradients of all are there."""

    @staticmethod
    def forward(ctx: Any, units: Units, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.units = units
        ctx.set_materialize_grads(False)
        units.drop()
        weights = units.fetch(units.before if units.units[0].rank.replaying else units.after)
        ctx.mark_non_differentiable(*(w for w, part in zip(weights, parts) if not part.requires_grad))
        return tuple(weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[None, ...]:
        ctx.units.drop()
        for unit, mine in ctx.units.parts_of(grads):
            if unit.trains:
                unit.reduce(mine)
        return (None,) * (len(grads) + 1)


def link(units: Mapping[int, Units], backward: Sequence[bool]) -> None:
    """Tell the units of every segment their neighbours; in the backward only those follow whose segment has one."""
    for first, second in pairwise(units.values()):
        first.after = second
    for first, second in pairwise(found for segment, found in units.items() if backward[segment]):
        second.before = first
