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
    """

    def __init__(
        self, rank: Rank, axes: str, parts: Parts, positions: Sequence[int], leaves: Sequence[torch.Tensor], flat: torch.Tensor | None, dtype: torch.dtype, scatter: Scatter
    ) -> None:
        self.rank, self.axes, self.parts, self.positions, self.leaves = rank, axes, parts, tuple(positions), list(leaves)
        self.flat, self.dtype, self.scatter = flat, dtype, scatter
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
                self._again = self.fetch()
        return self._again

    @property
    def gathered_again(self) -> bool:
        return self._again is not None

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

    def fetch(self) -> list[torch.Tensor]:
        """The whole weights."""
        self.start()
        assert self._pending is not None
        rows, work = self._pending
        self._pending = None
        work.wait()
        return self.parts.unpack(rows)

    def forget(self) -> None:
        """Drop what was fetched ahead and never used: the parameters may have changed since."""
        if self._pending is not None:
            self._pending[1].wait()
        self._pending = self._again = None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unit: ShardedUnit, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.unit = unit
        ctx.set_materialize_grads(False)
        unit.drop()
        return tuple(unit.fetch())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[None, ...]:
        unit = ctx.unit
        unit.drop()
        unit.scatter([torch.zeros(cut.shape, dtype=unit.dtype, device=unit.rank.device) if g is None else g for cut, g in zip(unit.parts.cuts, grads)])
        return (None,) * (len(grads) + 1)


class Units:
    """All that is gathered for one segment. `before` and `after`: the segments next to it that gather something, whose weights are
    fetched while this one computes."""

    def __init__(self, units: Sequence[ShardedUnit]) -> None:
        self.units = tuple(units)
        self.before: Units | None = None
        self.after: Units | None = None

    def gather(self, args: Sequence[Any]) -> tuple[list[Any], list[torch.Tensor]]:
        given, weights = list(args), []
        for unit in self.units:
            given, more = unit.gather(given)
            weights += more
        self._fetch_ahead(self.before if self.units[0].rank.replaying else self.after)
        return given, weights

    def again(self) -> list[torch.Tensor]:
        """Gathers when it is first asked in a backward; then the same until the gradients are complete."""
        first = not any(unit.gathered_again for unit in self.units)
        found = [w for unit in self.units for w in unit.again()]
        if not first:
            return found
        self._fetch_ahead(self.before)
        for unit in self.after.units if self.after is not None else ():
            if not unit.trains:  # no gradient says when the weights of a frozen segment are done with
                unit.drop()
        return found

    @staticmethod
    def _fetch_ahead(neighbour: "Units | None") -> None:
        for unit in neighbour.units if neighbour is not None else ():
            unit.start()

    def forget(self) -> None:
        for unit in self.units:
            unit.forget()


def link(units: Sequence[Units]) -> None:
    """Tell every segment its neighbours in program order."""
    for first, second in zip(units, units[1:]):
        first.after, second.before = second, first
