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

import numpy as np

from autopar.core.problem import Assignment, Edge, Node, SearchProblem, evaluate
from autopar.errors import InfeasibleError, UsageError
from autopar.search.bucket import CostGraph, Recipe, begin, follow, write_recipe
from autopar.search.copies import alike
from autopar.search.minibucket import bounded_minimum
from autopar.search.order import Order, find_order
from autopar.search.simplify import BYTES, SECONDS, Price, PriceList, Shrunk, canonical, costs_alone, node_classes, shrink, whole
from autopar.search.tables import TableStore
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
    cost_s, memory_bytes = evaluate(problem, best.choices)
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

    Choices are in the states of `shrunk.problem`; `shrunk.restore` translates. `priced` holds one node or edge for each
    distinct table, in the numbering of `recipe` (None: the tables would be too large); `unary`: that of every node. `begun`: what is eliminated whatever
    the price of a byte. Nodes `apart` have kept all states, and a table of their own: they may be minimised with fewer.
    """

    shrunk: Shrunk
    terms: Terms
    classes: tuple[int, ...]
    order: Order
    priced: tuple[Node | Edge, ...]
    recipe: Recipe | None
    begun: TableStore
    unary: tuple[int, ...]
    apart: frozenset[int]
    max_table_entries: int

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
            choices, bound = forward.choices(store), math.inf
        value = price.of_plan(*self.terms.of_plan(choices), self.shrunk.problem.base_memory_bytes)
        return Minimum(
            choices=choices,
            value=value,
            bound=min(bound, value),
            num_steps=len(self.order.steps),
            num_distinct=store.num_eliminations,
        )

    def with_bytes(self, problem: SearchProblem) -> "Prepared":
        """For the problem in the states of `shrunk` with other bytes, and another limit, of what holds any."""
        *numbers, priced = _numbered(problem, self.apart)
        if numbers != list(_numbered(self.shrunk.problem, self.apart)[:2]):
            shrunk = replace(self.shrunk, problem=problem)
            return prepare(problem, (SECONDS, BYTES), max_table_entries=self.max_table_entries, shrunk=shrunk, apart=self.apart)
        return replace(self, shrunk=replace(self.shrunk, problem=problem), terms=Terms(problem), priced=priced)

    def tables(self, price: Price, allowed: Mapping[int, np.ndarray] = MappingProxyType({})) -> list[np.ndarray]:
        """The distinct tables under one price."""
        prices = PriceList(price)
        found = [prices.of(item) for item in self.priced]
        for node, states in allowed.items():
            found[self.unary[node]] = np.where(states, found[self.unary[node]], np.inf)
        return found

    def graph(self, price: Price, allowed: Mapping[int, np.ndarray] = MappingProxyType({})) -> CostGraph:
        """All tables under one price, at their nodes and edges."""
        prices, tables = PriceList(price), self.tables(price, allowed)
        unary = tuple(tables[number] for number in self.unary)
        pairs = tuple((edge.u, edge.v, prices.of(edge)) for edge in self.shrunk.problem.edges)
        return CostGraph(unary, pairs, self.classes)


def prepare(
    problem: SearchProblem, prices: tuple[Price, ...], *, max_table_entries: int = MAX_TABLE_ENTRIES, shrunk: Shrunk | None = None,
    apart: frozenset[int] = frozenset(),
) -> Prepared:  # fmt: skip
    """Choose the order and write the recipe; minima under every price that is a mix of `prices` stay what they are, whatever states nodes `apart` may take.

    `shrunk` may be handed in where states were dropped already.
    """
    part = shrunk or whole(canonical(problem))
    nodes, edges = part.problem.nodes, part.problem.edges
    unary, across, priced = _numbered(part.problem, apart)
    pairs = [(edge.u, edge.v, number) for edge, number in zip(edges, across)]
    classes = tuple(node_classes(part.problem))
    copies = alike(unary, pairs, problem.copies)
    order = find_order([node.num_states for node in nodes], [(u, v) for u, v, _ in pairs], classes, copies=copies)
    fits = order.max_table_entries <= max_table_entries
    if not fits and shrunk is None:
        return prepare(problem, prices, max_table_entries=max_table_entries, shrunk=shrink(part.problem, prices, apart), apart=apart)
    recipe = write_recipe(unary, pairs, order) if fits else None
    begun = begin(recipe, [item.cost_s if costs_alone(item) else None for item in priced]) if recipe is not None and SECONDS in prices else TableStore()
    return Prepared(
        shrunk=part, terms=Terms(part.problem), classes=classes, order=order, priced=priced, recipe=recipe, begun=begun,
        unary=tuple(unary), apart=apart, max_table_entries=max_table_entries,
    )  # fmt: skip


def _numbered(problem: SearchProblem, apart: frozenset[int]) -> tuple[list[int], list[int], tuple[Node | Edge, ...]]:
    """The number of the tables of every node, of every edge, and an item that has them."""
    known: dict[tuple[int, int, int], int] = {}
    unary = [known.setdefault((id(node.cost_s), id(node.memory_bytes), n if n in apart else -1), len(known)) for n, node in enumerate(problem.nodes)]
    across = [known.setdefault((id(edge.cost_s), id(edge.memory_bytes), -1), len(known)) for edge in problem.edges]
    first = dict(zip((*reversed(across), *reversed(unary)), (*reversed(problem.edges), *reversed(problem.nodes))))
    return unary, across, tuple([first[number] for number in range(len(known))])
