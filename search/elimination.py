"""Exact minimum of a problem, or of seconds + price * bytes, by eliminating one operator after the other.

The work is exponential only in the width of the graph, which is 2 to 3 for traced models. `prepare` and `minimise` run
the whole path: one object per table (`simplify.canonical`), useless states out (`simplify.shrink`), an order
(`order.find_order`), the eliminations (`bucket`, memoised in `tables`). Where the order would need a table beyond
`max_table_entries`, `minibucket` gives a lower bound and a good plan instead of an optimum.

References: Bertele and Brioschi 1972 (nonserial dynamic programming); Dechter 1999 (bucket elimination).
"""

import math
from dataclasses import dataclass, replace

from autopar.core.problem import Assignment, SearchProblem, evaluate
from autopar.errors import InfeasibleError, UsageError
from autopar.search.bucket import CostGraph, run_steps
from autopar.search.minibucket import bounded_minimum
from autopar.search.order import Order, find_order
from autopar.search.simplify import SECONDS, Price, PriceList, Shrunk, canonical, node_classes, shrink
from autopar.search.tables import TableStore

MAX_TABLE_ENTRIES = 30_000_000  # 240 MB of float64
TOLERANCE = 1e-9  # a relative gap below this is rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Minimum:
    """Choices, their value, and a bound that no choices go below (equal to the value when elimination was exact).

    Of `num_steps` eliminated nodes, `num_distinct` needed a table that had not been computed before.
    """

    choices: tuple[int, ...]
    value: float
    bound: float
    num_steps: int
    num_distinct: int

    @property
    def exact(self) -> bool:
        return self.value - self.bound <= TOLERANCE * abs(self.value)


def eliminate(
    problem: SearchProblem, *, multiplier_s_per_byte: float = 0.0, max_table_entries: int = MAX_TABLE_ENTRIES
) -> Assignment:
    """The plan of least seconds + multiplier * bytes, whatever its memory.

    `bound_s` bounds the seconds of every plan within the memory limit from below (without a multiplier: of every plan
    at all). With a multiplier the problem needs a limit, which the bound refers to.
    """
    limit = problem.memory_limit_bytes
    if multiplier_s_per_byte and limit is None:
        raise UsageError("a price of memory needs a memory limit that the bound can refer to")
    best = minimise(problem, Price(1.0, multiplier_s_per_byte), max_table_entries=max_table_entries)
    cost_s, memory_bytes = evaluate(problem, best.choices)
    room = limit - problem.base_memory_bytes if limit is not None and multiplier_s_per_byte else 0.0
    bound_s = best.bound - multiplier_s_per_byte * room
    if best.exact and not multiplier_s_per_byte:
        bound_s = cost_s
    return Assignment(
        choices=best.choices,
        cost_s=cost_s,
        memory_bytes=memory_bytes,
        bound_s=min(bound_s, cost_s) if problem.fits(memory_bytes) else bound_s,
        solver="elimination" if best.exact else "mini-bucket",
        multiplier_s_per_byte=multiplier_s_per_byte,
        proof="exact" if best.exact and cost_s - bound_s <= TOLERANCE * cost_s else "bound",
    )


def minimise(problem: SearchProblem, price: Price = SECONDS, *, max_table_entries: int = MAX_TABLE_ENTRIES) -> Minimum:
    """Least price.second * seconds + price.byte * bytes over all plans, base memory left out; the limit plays no part.

    Raises InfeasibleError where every plan contains a forbidden pair.
    """
    prepared = prepare(problem, (price,), max_table_entries=max_table_entries)
    lowest = prepared.minimise(price)
    return replace(lowest, choices=prepared.shrunk.restore(lowest.choices))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A problem made small and put in order once, to be minimised under several prices."""

    shrunk: Shrunk
    classes: tuple[int, ...]
    order: Order
    max_table_entries: int

    def minimise(self, price: Price) -> Minimum:
        """As the function of the same name; choices are in the states that are left (`shrunk.restore` translates)."""
        graph = self.graph(price)
        store = TableStore()
        if self.order.max_table_entries <= self.max_table_entries:
            choices, value = run_steps(store, graph, self.order.steps)
            if not math.isfinite(value):
                raise InfeasibleError("every combination of states contains a forbidden pair; allow more states or pairs")
            value = bound = graph.value(choices)
        else:
            choices, bound = bounded_minimum(store, graph, self.order, self.max_table_entries)
            value = graph.value(choices)
        return Minimum(
            choices=choices,
            value=value,
            bound=min(bound, value),
            num_steps=len(self.order.steps),
            num_distinct=store.num_eliminations,
        )

    def graph(self, price: Price) -> CostGraph:
        """The tables under one price, over the states that are left."""
        prices = PriceList(price)
        unary = tuple(prices.of(node) for node in self.shrunk.problem.nodes)
        pairs = tuple((edge.u, edge.v, prices.of(edge)) for edge in self.shrunk.problem.edges)
        return CostGraph(unary, pairs, self.classes)


def prepare(problem: SearchProblem, prices: tuple[Price, ...], *, max_table_entries: int = MAX_TABLE_ENTRIES) -> Prepared:
    """Drop the states that are useless under every price that is a mix of `prices`, and choose the order."""
    shrunk = shrink(canonical(problem), prices)
    sizes = [node.num_states for node in shrunk.problem.nodes]
    pairs = [(edge.u, edge.v) for edge in shrunk.problem.edges]
    classes = tuple(node_classes(shrunk.problem))
    return Prepared(shrunk=shrunk, classes=classes, order=find_order(sizes, pairs, classes), max_table_entries=max_table_entries)
