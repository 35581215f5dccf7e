"""What was found on one of a row of machines, for the others: what each search begins with."""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from autopar.joint.at_point import Found, PointSearch
from autopar.joint.space import Point


@dataclass(frozen=True)
class Likely:
    """A plan that may be good on other machines too: a point, what its sharding chooses of the folded problem, and the stages of a rank."""

    point: Point
    choices: tuple[int, ...] | None
    virtual: int

    @classmethod
    def of(cls, found: Found) -> "Likely":
        return cls(found.point, found.search.tables.choices(found.sharding), found.deep.order.virtual)

    def planned(self, search: PointSearch, limit_bytes: float, below_s: float) -> Found | None:
        """On the machine of a search of its point: problems that differ in links alone have the same nodes and states."""
        sizes, choices = search.tables.sizes, self.choices
        if choices is None or len(sizes) != len(choices) or any(choice >= size for choice, size in zip(choices, sizes, strict=True)):
            return None
        return search.planned(search.tables.sharding(choices), limit_bytes, below_s, self.virtual)


def planned_like(row: Iterable[Hashable], searches: Sequence[PointSearch], limit_bytes: float) -> list[Found]:
    """What was found on other machines of a row, on this one, each faster than the one before; at last the best plan here of the point of the best of them."""
    by_point, found, best_s = {search.point: search for search in searches}, list[Found](), math.inf
    for likely in row:
        if isinstance(likely, Likely) and likely.point in by_point:
            made = likely.planned(by_point[likely.point], limit_bytes, best_s)
            found += [made] if made is not None else []
            best_s = found[-1].step_s if found else math.inf
    if found:
        search = found[-1].search
        search.fitting_s()  # at whose prices shardings are looked for
        made = search.plan(limit_bytes, best_s)
        found += [made] if made is not None else []
    return found
