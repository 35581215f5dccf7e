"""The way of a value from the layout in which it is made to one in which it is used, and the moves along it."""

from dataclasses import dataclass

from autopar.core.layout import I, Layout, R
from autopar.core.moves import Step

Route = tuple[Layout, ...]
"""The layouts a value goes through, first to last; one entry where nothing moves."""


def without_r(layout: Layout) -> Layout:
    """For a tensor without gradient R and I are the same; I is the canonical one."""
    return tuple(I if p == R else p for p in layout)


def route_steps(route: Route) -> tuple[Step, ...]:
    """Steps between neighbouring layouts of a route (each changes one axis)."""
    found = []
    for here, there in zip(route, route[1:]):
        axis = next(a for a in range(len(here)) if here[a] != there[a])
        found.append(Step(axis, here[axis], there[axis]))
    return tuple(found)


@dataclass(frozen=True)
class Move:
    """One step of one value: the unit of communication. `src` is the layout before it; `live`: a gradient comes back; `again`: recomputation repeats it."""

    value: int
    src: Layout
    step: Step
    live: bool
    again: bool = False
