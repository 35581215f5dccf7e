"""Exact minimum of a problem, or of seconds + price * bytes, by eliminating one operator after the other.

The work is exponential only in the width of the graph, which is 2 to 3 for traced models. `prepare` does once what no price
changes: one object per table (`simplify.canonical`), an order (`order.find_order`), and which tables meet where
(`bucket.write_recipe`); `Prepared.minimise` computes the eliminations under one price (`bucket.follow`, memoised in `tables`).
Where the order would need a table beyond `max_table_entries`, useless states are dropped (`simplify.shrink`), and if that does
not help `minibucket` gives a lower bound and a good plan instead of an optimum.

References: Bertele and Brioschi 1972 (nonserial dynamic programming); Dechter 1999 (bucket elimination).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from autopar.core.columns import first_seen
from autopar.core.problem import Assignment, SearchProblem
from autopar.errors import InfeasibleError, UsageError
from autopar.search.bucket import CostGraph, Forward, Recipe, begin, follow, write_recipe
from autopar.search.copies import alike
from autopar.search.minibucket import bounded_minimum
from autopar.search.order import Order, find_order_of_copies
from autopar.search.simplify import BYTES, SECONDS, Price, PriceList, Shrunk, canonical, holds, node_classes, shrink, whole
from autopar.search.tables import Eliminated, TableStore
from autopar.search.terms import Terms

MAX_TABLE_ENTRIES = 2_000_000  # of float64; a step of 200 states that leaves such a table takes half a second
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
    return assignment(problem, best, multiplier_s_per_byte)


def assignment(problem: SearchProblem, best: Minimum, multiplier_s_per_byte: float = 0.0) -> Assignment:
    """The minimum under a price of memory as a plan with its bound; the multiplier is 0 where there is no limit."""
    cost_s, memory_bytes = Terms(problem).of_plan(best.choices)
    room = problem.limit_bytes - problem.base_memory_bytes if multiplier_s_per_byte else 0.0
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
    """A problem put in order once, to be minimised under several prices.

    Choices are in the states of `shrunk.problem`; `shrunk.restore` translates. `priced` holds the seconds and bytes of each
    distinct table, in the numbering of `recipe` (None: the tables would be too large); `unary`: which that of a node is. `free`: those that no price of a byte
    changes, and `begun` what is eliminated of them alone. Nodes `apart` have kept all states, and a table of their own: they may be minimised with fewer.
    `dtype`: in which eliminations compute; float32 takes less time, and its bounds are less by what it may have rounded.
    """

    shrunk: Shrunk
    terms: Terms
    classes: tuple[int, ...]
    order: Order
    priced: tuple[tuple[np.ndarray, np.ndarray | None], ...]
    recipe: Recipe | None
    free: tuple[np.ndarray | None, ...]
    begun: TableStore
    unary: tuple[int, ...]
    apart: frozenset[int]
    max_table_entries: int
    dtype: type[np.floating] = np.float64

    def store(self, price: Price) -> TableStore:
        """For minima at one price, which may share it."""
        return self.begun.copy() if price.second == 1 else TableStore()

    def minimise(self, price: Price, store: TableStore | None = None, allowed: Mapping[int, np.ndarray] = MappingProxyType({})) -> Minimum:
        """As the function of the same name, but for the numbering of states. `allowed`: by node, whether each of its states may be taken."""
        store = store or self.store(price)
        if self.recipe is None:
            choices, bound = bounded_minimum(store, self.graph(price, allowed), self.order, self.max_table_entries)
        else:
            forward = follow(store, self.recipe, self.tables(price, allowed))
            if not math.isfinite(forward.value):
                raise InfeasibleError("every combination of states contains a forbidden pair; allow more states or pairs")
            choices, bound = forward.choices(store), self._bound(forward)
        value = price.of_plan(*self.terms.of_plan(choices), self.shrunk.problem.base_memory_bytes)
        return Minimum(
            choices=choices,
            value=value,
            bound=min(bound, value),
            num_steps=self.order.num_steps,
            num_distinct=store.num_eliminations,
        )

    def _bound(self, forward: Forward) -> float:
        """No less than what `forward` found to be the least, but for what rounding can have made of it: no term is below 0, so none of its sums is more than the
        least, and each is rounded to half of `eps`, as are the tables that go in."""
        return math.inf if self.dtype is np.float64 else forward.value * (1 - forward.recipe.num_terms * float(np.finfo(self.dtype).eps))

    def with_bytes(self, problem: SearchProblem) -> "Prepared":
        """For the problem in the states of `shrunk` with other bytes, and another limit, of what holds any."""
        numbers = _numbered(problem, self.apart)
        if not numbers.numbers_like(_numbered(self.shrunk.problem, self.apart)):
            shrunk = replace(self.shrunk, problem=problem)
            return prepare(problem, (SECONDS, BYTES), max_table_entries=self.max_table_entries, shrunk=shrunk, apart=self.apart, dtype=self.dtype)
        return replace(self, shrunk=replace(self.shrunk, problem=problem), terms=Terms(problem), priced=numbers.tables)

    def tables(self, price: Price, allowed: Mapping[int, np.ndarray] = MappingProxyType({})) -> list[np.ndarray]:
        """The distinct tables under one price."""
        prices = PriceList(price)
        free = self.free if price.second == 1 else (None,) * len(self.priced)
        found = [prices.of_tables(*tables).astype(self.dtype, copy=False) if known is None else known for tables, known in zip(self.priced, free, strict=True)]
        for node, states in allowed.items():
            found[self.unary[node]] = np.where(states, found[self.unary[node]], np.inf)
        return found

    def graph(self, price: Price, allowed: Mapping[int, np.ndarray] = MappingProxyType({})) -> CostGraph:
        """All tables under one price, at their nodes and edges."""
        tables, edges = self.tables(price, allowed), self.shrunk.problem.edge_columns
        unary = tuple([tables[number] for number in self.unary])
        prices = PriceList(price)
        at_edges = [prices.of_tables(*found) for found in edges.tables]
        pairs = tuple([(u, v, at_edges[number]) for u, v, number in zip(edges.u.tolist(), edges.v.tolist(), edges.number.tolist())])
        return CostGraph(unary, pairs, self.classes)


def prepare(
    problem: SearchProblem, prices: tuple[Price, ...], *, max_table_entries: int = MAX_TABLE_ENTRIES, shrunk: Shrunk | None = None,
    apart: frozenset[int] = frozenset(), shared: Eliminated | None = None, dtype: type[np.floating] = np.float64,
) -> Prepared:  # fmt: skip
    """Choose the order and write the recipe; minima under every price that is a mix of `prices` stay what they are, whatever states nodes `apart` may take.

    `shrunk` may be handed in where states were dropped already; `shared`: eliminations without a price, of problems that have tables in common.
    """
    part = shrunk or whole(canonical(problem))
    nodes, edges = part.problem.node_columns, part.problem.edge_columns
    numbers = _numbered(part.problem, apart)
    classes, sizes = tuple(node_classes(part.problem)), nodes.sizes.tolist()
    order = find_order_of_copies(sizes, edges, classes, alike(numbers.unary, edges, problem.copies))
    fits = order.max_table_entries <= max_table_entries
    if not fits and shrunk is None:
        dropped = shrink(part.problem, prices, apart)
        return prepare(problem, prices, max_table_entries=max_table_entries, shrunk=dropped, apart=apart, shared=shared, dtype=dtype)
    left = np.ones(len(nodes), dtype=bool)
    left[order.copied] = False
    pairs = np.stack([edges.u, edges.v, numbers.across], axis=1)[left[edges.u] & left[edges.v]]
    recipe = write_recipe(numbers.unary.tolist(), pairs.tolist(), order, len(numbers.tables)) if fits else None
    free = tuple([None if holds(memory_bytes) else cost_s.astype(dtype, copy=False) for cost_s, memory_bytes in numbers.tables])
    begun = begin(recipe, free, shared) if recipe is not None and SECONDS in prices else TableStore()
    return Prepared(
        shrunk=part, terms=Terms(part.problem), classes=classes, order=order, priced=numbers.tables, recipe=recipe, free=free, begun=begun,
        unary=tuple(numbers.unary.tolist()), apart=apart, max_table_entries=max_table_entries, dtype=dtype,
    )  # fmt: skip


class Numbered(NamedTuple):
    """The distinct tables of a problem, and which of them every node and every edge has."""

    unary: np.ndarray
    across: np.ndarray
    tables: tuple[tuple[np.ndarray, np.ndarray | None], ...]

    def numbers_like(self, other: "Numbered") -> bool:
        return np.array_equal(self.unary, other.unary) and np.array_equal(self.across, other.across)


def _numbered(problem: SearchProblem, apart: frozenset[int]) -> Numbered:
    """Nodes `apart` share their table with no other."""
    nodes, edges = problem.node_columns, problem.edge_columns
    own = nodes.number.copy()
    own[sorted(apart)] = len(nodes.tables) + np.arange(len(apart))
    (unary, of_node), (across, of_edge) = first_seen(own), first_seen(edges.number)
    tables = [*[nodes.tables[nodes.number[n]] for n in of_node], *[edges.tables[edges.number[n]] for n in of_edge]]
    return Numbered(unary, across + len(of_node), tuple(tables))
