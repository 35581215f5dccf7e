"""The memory limit as a price: a lower bound, plans that fit, and what one more byte is worth.

With a price p on every byte, L(p) = min over plans of (cost + p * memory) - p * limit is a lower bound on the cost of
every plan that fits, and elimination computes it. L is concave and piecewise linear in p, one line per plan. The best
p is found without step sizes: from one plan that is too large and one that fits, take the price at which both cost the
same, minimise, and let the new plan replace the one on its side; when no plan is below that line, p is optimal (the
line search of Handler and Zang 1980 for constrained shortest paths). No bound is above that crossing, so the search ends
where the best bound is close enough to it. Five eliminations are typical, those of price 0 and of a first guess included.

What is left is the duality gap: plans that fit come from repairing, mixing and improving the plans met on the way.
"""

from dataclasses import dataclass, replace

from autopar.core.problem import Assignment, SearchProblem, evaluate
from autopar.core.units import size
from autopar.errors import InfeasibleError
from autopar.search.elimination import MAX_TABLE_ENTRIES, TOLERANCE, Minimum, Prepared, prepare
from autopar.search.local import relink, repair, spend, splice
from autopar.search.simplify import BYTES, SECONDS, Price, canonical, shrink

MAX_SOLVES = 60
BOUND_TOLERANCE = 5e-4  # of the cost: another elimination could raise the bound by less than this


@dataclass(frozen=True, slots=True)
class Point:
    """A plan, its seconds and bytes."""

    choices: tuple[int, ...]
    cost_s: float
    memory_bytes: float

    @classmethod
    def of(cls, problem: SearchProblem, choices: tuple[int, ...]) -> "Point":
        return cls(choices, *evaluate(problem, choices))

    def at(self, multiplier: float) -> float:
        return self.cost_s + multiplier * self.memory_bytes


@dataclass(frozen=True, slots=True)
class Dual:
    """No plan that fits costs less than `bound_s`, at a price of `multiplier` seconds a byte; the plans on both sides of the limit that cost least at
    about that price, `within` None where the cheapest of all fits. Plans are in the states of `prepared`."""

    bound_s: float
    multiplier: float
    over: Point
    within: Point | None
    prepared: Prepared


def price_memory(
    problem: SearchProblem, *, max_table_entries: int = MAX_TABLE_ENTRIES, prepared: Prepared | None = None, cheapest: Minimum | None = None
) -> Assignment:
    """The best plan found within the memory limit, with the Lagrangian lower bound and the price of a byte.

    `prepared` (for the prices SECONDS and BYTES) and its minimum of seconds, `cheapest`, may be handed in where the
    caller has them. Raises InfeasibleError, with the bytes that are missing, where no plan fits.
    """
    found = _dual(problem, max_table_entries, prepared, cheapest)
    shrunk = found.prepared.shrunk
    best = found.over if found.within is None else _improved(shrunk.problem, found.over, found.within)
    return _assignment(problem, shrunk.restore(best.choices), found.bound_s, found.multiplier)


def _dual(problem: SearchProblem, max_table_entries: int, prepared: Prepared | None, cheapest: Minimum | None) -> Dual:
    """The price of memory alone; as `price_memory`, which looks for plans that fit besides."""
    prepared = prepared or prepare(problem, (SECONDS, BYTES), max_table_entries=max_table_entries)
    small = prepared.shrunk.problem  # choices below are in its states
    cheapest = cheapest or prepared.minimise(SECONDS)
    over = Point(cheapest.choices, *prepared.terms.of_plan(cheapest.choices))
    bound_s, multiplier = cheapest.bound, 0.0
    if small.fits(over.memory_bytes):
        return Dual(bound_s, multiplier, over, None, prepared)
    within = None
    price = over.cost_s / over.memory_bytes  # a first guess, likely too high: then its plan fits
    for _ in range(MAX_SOLVES):
        if price <= 0:  # the plan that fits is as cheap: it is optimal, or elimination was not exact
            break
        lowest = prepared.minimise(Price(1.0, price))
        bound_at_price_s = lowest.bound - price * (small.limit_bytes - small.base_memory_bytes)
        if bound_at_price_s > bound_s:
            bound_s, multiplier = bound_at_price_s, price
        point = Point(lowest.choices, *prepared.terms.of_plan(lowest.choices))
        if within is not None and point.at(price) >= within.at(price) * (1 - 1e-12):
            break
        if small.fits(point.memory_bytes):
            within = point
        else:
            over = point
            within = within or leanest(small, max_table_entries)
        price = _crossing(over, within)
        if over.at(price) - price * small.limit_bytes - bound_s <= BOUND_TOLERANCE * within.cost_s:
            break
    return Dual(bound_s, multiplier, over, within or leanest(small, max_table_entries), prepared)


def _crossing(over: Point, within: Point) -> float:
    """The price at which both cost the same."""
    return (within.cost_s - over.cost_s) / (over.memory_bytes - within.memory_bytes)


def leanest(problem: SearchProblem, max_table_entries: int = MAX_TABLE_ENTRIES) -> Point:
    """The plan of least memory; raises InfeasibleError, with the bytes that are missing, where even that does not fit.

    Far fewer states matter to bytes alone than to seconds, so this is cheap.
    """
    prepared = prepare(problem, (BYTES,), max_table_entries=max_table_entries, shrunk=shrink(canonical(problem), (BYTES,)))
    lowest = prepared.minimise(BYTES)
    point = Point.of(problem, prepared.shrunk.restore(lowest.choices))
    if problem.fits(point.memory_bytes):
        return point
    limit, base = problem.limit_bytes, problem.base_memory_bytes
    needed = point.memory_bytes if lowest.exact else lowest.bound + base
    if not problem.fits(needed):
        excess = needed - limit
        raise InfeasibleError(
            f"no plan fits: the least memory of any plan is {size(needed)}, {excess:.0f} bytes ({size(excess)}) "
            f"over the limit of {size(limit)}; use more devices, a smaller batch or recomputation"
        )
    found = repair(problem, point.choices)
    if found is None:
        raise InfeasibleError(
            f"no plan was found that fits {size(limit)}, though none was proven impossible: the best needs "
            f"{size(point.memory_bytes)}; raise max_table_entries"
        )
    return Point.of(problem, found)


def _improved(problem: SearchProblem, over: Point, within: Point) -> Point:
    """The cheapest plan within the limit that local search finds around two plans."""
    mixes = (
        within.choices,
        relink(problem, over.choices, within.choices),
        repair(problem, over.choices),
        splice(problem, over.choices, within.choices),
        splice(problem, within.choices, over.choices),
    )
    starts = sorted({mix for mix in mixes if mix is not None})
    points = [Point.of(problem, spend(problem, start)) for start in starts]
    return min(points, key=lambda point: (point.cost_s, point.choices))


def _assignment(problem: SearchProblem, choices: tuple[int, ...], bound_s: float, multiplier: float) -> Assignment:
    cost_s, memory_bytes = evaluate(problem, choices)
    return Assignment(
        choices=choices,
        cost_s=cost_s,
        memory_bytes=memory_bytes,
        bound_s=min(max(bound_s, 0.0), cost_s),
        solver="lagrange",
        multiplier_s_per_byte=multiplier,
        proof="exact" if cost_s - bound_s <= TOLERANCE * cost_s else "bound",
    )
