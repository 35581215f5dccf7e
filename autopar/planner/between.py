"""What moving a value costs between lists of layouts: those of the states of two nodes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np

from autopar.core.graph import TensorMeta
from autopar.core.layout import Layout, Placement
from autopar.core.redistribute import Redistribution
from autopar.planner.saved import Gathers, counted_bytes
from autopar.planner.states import Pricing

Ends = tuple[np.ndarray, np.ndarray]
"""Where layouts of both ends are in the tables of a redistribution."""


@dataclass
class Between:
    """Lists are known by their objects, which are kept: nodes and problems share them. A cache, not a value: one per `Pricing`."""

    pricing: Pricing
    _placements: dict[int, tuple[Sequence[Layout], frozenset[Placement]]] = field(default_factory=dict)
    _places: dict[tuple[int, int], tuple[Redistribution, Sequence[Layout], list[int]]] = field(default_factory=dict)

    def seconds(self, meta: TensorMeta, src: Sequence[Layout], dst: Sequence[Layout]) -> np.ndarray:
        red, ends = self._routes(meta, src, dst)
        return red.seconds[ends]

    def gathers(self, meta: TensorMeta, src: Sequence[Layout], dst: Sequence[Layout], held: np.ndarray, times: int, *, instead: bool) -> Gathers:
        """Of `times` microbatches, where moves keep the bytes `held`, `instead` of what they are given."""
        before = counted_bytes(meta, src, self.pricing.mesh, addends=True)[:, None] if instead else 0.0
        return Gathers(held, partial(_gathered_again, *self._routes(meta, src, dst), times, held, before))

    def _routes(self, meta: TensorMeta, src: Sequence[Layout], dst: Sequence[Layout]) -> tuple[Redistribution, Ends]:
        red = self.pricing.routes(meta, self._placements_of(src) | self._placements_of(dst), grad=meta.requires_grad)
        return red, np.ix_(self._places_in(red, src), self._places_in(red, dst))

    def _placements_of(self, layouts: Sequence[Layout]) -> frozenset[Placement]:
        if id(layouts) not in self._placements:
            self._placements[id(layouts)] = layouts, frozenset(chain.from_iterable(layouts))
        return self._placements[id(layouts)][1]

    def _places_in(self, red: Redistribution, layouts: Sequence[Layout]) -> list[int]:
        key = id(red.index), id(layouts)
        if key not in self._places:
            self._places[key] = red, layouts, [red.index[x] for x in layouts]
        return self._places[key][2]


def _gathered_again(red: Redistribution, ends: Ends, times: int, held: np.ndarray, before: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """See `Gathers`; without what is kept `before` the moves."""
    again_s, again_bytes = (table[ends] for table in red.again)
    return times * again_s, np.minimum(held, (again_bytes - before).clip(min=0.0))
