"""A graph of cost tables, and its exact minimum along a given order of nodes.

Node x with neighbours N meets in the tables that mention x; minimising their sum over the states of x leaves one table
over N (for |N| = 1 a fold into the neighbour, for |N| = 2 MindSpore's operator elimination, beyond that bucket
elimination along a tree decomposition). Going back, every node takes its best state given its neighbours' states.

What meets where does not depend on the numbers in the tables. `write_recipe` finds it out once, and equal blocks share
their eliminations in it; `follow` computes the eliminations for the tables of one price.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autopar.search.order import Order, Step, find_order
from autopar.search.tables import Eliminated, Key, TableStore

Entry = tuple[int, tuple[int, ...]]  # table number, nodes of its axes


@dataclass(frozen=True, slots=True)
class CostGraph:
    """What is minimised: `unary[i]` of shape [k_i] and `pairs` (u, v, table [k_u, k_v]), at most one per pair of nodes."""

    unary: tuple[np.ndarray, ...]
    pairs: tuple[tuple[int, int, np.ndarray], ...]
    classes: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(table.shape[0] for table in self.unary)

    def value(self, choices: Sequence[int]) -> float:
        """The sum at the chosen states."""
        at_nodes = (table[choice] for table, choice in zip(self.unary, choices, strict=True))
        at_pairs = (table[choices[u], choices[v]] for u, v, table in self.pairs)
        return math.fsum([*at_nodes, *at_pairs])

    def order(self, limit_entries: float = math.inf, reluctance: Sequence[int] | None = None) -> Order:
        pairs = [(u, v) for u, v, _ in self.pairs]
        return find_order(self.sizes, pairs, self.classes, limit_entries=limit_entries, reluctance=reluctance)


Input = tuple[int, tuple[int, ...]]  # number of a table, roles of its axes


@dataclass(frozen=True)
class Recipe:
    """The eliminations along an order: `eliminations[k]` as the tables that meet in it, with k = `kinds_of_copy[r][n]` for step n of repeat r in all
    of its copies, `kinds_of_rest[n]` for step n of the rest.

    Roles are 0 for the node that goes and 1, 2, ... for its neighbours. Tables are numbered: first the `num_tables` given
    ones, then the results of the eliminations in their order.
    """

    order: Order
    kinds_of_copy: tuple[tuple[int, ...], ...]
    kinds_of_rest: tuple[int, ...]
    eliminations: tuple[tuple[Input, ...], ...]
    num_tables: int

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.order.steps

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """That of every step."""
        copied = [kind for run, kinds in zip(self.order.repeats, self.kinds_of_copy, strict=True) for kind in kinds * len(run.copies)]
        return (*copied, *self.kinds_of_rest)

    @cached_property
    def num_terms(self) -> int:
        """Tables that meet in all steps, and what comes of each."""
        return sum(len(self.eliminations[kind]) + 1 for kind in self.kinds)


def write_recipe(unary: Sequence[int], pairs: Iterable[tuple[int, int, int]], order: Order, num_tables: int) -> Recipe:
    """The recipe for table `unary[i]` at node i and the tables of `pairs` (u, v, table), all of whose nodes are among the steps.

    Steps that repeat those of another copy meet the same tables: they are not looked at, and pairs that are used up in them are left out.
    """
    return _Writer(unary, pairs, order, num_tables).write()


class _Writer:
    """Goes through the steps in their order. `place`: when a node goes, but for those that go in further copies; `bucket`: what waits for it."""

    def __init__(self, unary: Sequence[int], pairs: Iterable[tuple[int, int, int]], order: Order, num_tables: int) -> None:
        self.order, self.num_tables = order, num_tables
        self.known: dict[tuple[Input, ...], int] = {}
        going = [step.node for run in order.repeats for step in run.of(run.copies[0])] + [step.node for step in order.rest]
        self.place = {node: place for place, node in enumerate(going)}
        self.bucket: dict[int, list[Entry]] = {node: [(unary[node], (node,))] for node in going}
        for u, v, table in pairs:  # a table waits for the first of its nodes
            self.bucket[u if self.place[u] < self.place[v] else v].append((table, (u, v)))

    def write(self) -> Recipe:
        of_copies = []
        for run in self.order.repeats:
            gone = {role for role, _ in run.steps}
            of_copies.append(tuple([self._meet(step) for step in run.of(run.copies[0])]))
            leaving = [(around, kind) for (_, around), kind in zip(run.steps, of_copies[-1]) if around and gone.isdisjoint(around)]
            for copy in run.copies[1:]:
                for around, kind in leaving:
                    self._send(kind, tuple([copy[r] for r in around]))
        rest = tuple([self._meet(step) for step in self.order.rest])
        return Recipe(self.order, tuple(of_copies), rest, tuple(self.known), self.num_tables)

    def _meet(self, step: Step) -> int:
        """The kind of a step, whose table goes on."""
        kind = self.known.setdefault(key_of(self.bucket[step.node], step.node, step.neighbours), len(self.known))
        if step.neighbours:
            self._send(kind, step.neighbours)
        return kind

    def _send(self, kind: int, around: tuple[int, ...]) -> None:
        first = min(around, key=self.place.__getitem__) if len(around) > 1 else around[0]
        self.bucket[first].append((self.num_tables + kind, around))


@dataclass(frozen=True, slots=True)
class Forward:
    """What following a recipe left behind, per elimination: its key, the number of its table, and the minimum taken off it."""

    recipe: Recipe
    keys: tuple[Key, ...]
    tables: tuple[int, ...]
    constants: tuple[float, ...]

    @property
    def value(self) -> float:
        """The optimum: the sum of the constants of all steps, inf if nothing is allowed."""
        return math.fsum([self.constants[kind] for kind in self.recipe.kinds])

    def choices(self, store: TableStore) -> tuple[int, ...]:
        """The optimal choices, the lowest states of equals; the optimum is finite."""
        recipe = self.recipe
        choices = [0] * recipe.order.num_steps
        for step, kind in zip(reversed(recipe.order.rest), reversed(recipe.kinds_of_rest), strict=True):
            choices[step.node] = store.best_state(self.keys[kind], tuple([choices[other] for other in step.neighbours]))
        for run, kinds in zip(recipe.order.repeats, recipe.kinds_of_copy, strict=True):
            gone = [role for role, _ in run.steps]
            border = sorted({r for _, around in run.steps for r in around}.difference(gone))
            known: dict[tuple[int, ...], list[int]] = {}
            for copy in run.copies:
                states = tuple([choices[copy[r]] for r in border])
                if states not in known:
                    here = dict(zip(border, states))
                    for (role, around), kind in zip(reversed(run.steps), reversed(kinds)):
                        here[role] = store.best_state(self.keys[kind], tuple([here[r] for r in around]))
                    known[states] = [here[role] for role in gone]
                for role, state in zip(gone, known[states]):
                    choices[copy[role]] = state
        return tuple(choices)


def begin(recipe: Recipe, tables: Sequence[np.ndarray | None], shared: Eliminated | None = None) -> TableStore:
    """A store with the eliminations of a recipe in which only tables meet that are known; `shared`: with other stores."""
    store = TableStore(shared)
    numbers = [None if table is None else store.add(table) for table in tables]
    for inputs in recipe.eliminations:
        key = tuple([(number, roles) for table, roles in inputs if (number := numbers[table]) is not None])
        numbers.append(store.eliminate(tuple(sorted(key)))[0] if len(key) == len(inputs) else None)
    return store


def follow(store: TableStore, recipe: Recipe, tables: Sequence[np.ndarray]) -> Forward:
    """Do the eliminations of a recipe with these tables."""
    numbers = [store.add(table) for table in tables]
    keys, constants = [], []
    for inputs in recipe.eliminations:
        key = tuple(sorted([(numbers[table], roles) for table, roles in inputs]))
        number, lowest = store.eliminate(key)
        numbers.append(number)
        keys.append(key)
        constants.append(lowest)
    return Forward(recipe, tuple(keys), tuple(numbers[recipe.num_tables :]), tuple(constants))


def run_steps(store: TableStore, graph: CostGraph, steps: Sequence[Step]) -> tuple[tuple[int, ...], float]:
    """(optimal choices, optimal value) of a graph whose nodes are all among the steps; the value is inf if nothing is allowed."""
    tables, unary, pairs = number_tables(graph)
    forward = follow(store, write_recipe(unary, pairs, Order((), tuple(steps), (), 0), len(tables)), tables)
    value = forward.value
    return (forward.choices(store) if math.isfinite(value) else (0,) * len(unary)), value


def number_tables(graph: CostGraph) -> tuple[list[np.ndarray], list[int], list[tuple[int, int, int]]]:
    """(the distinct tables of a graph, the table of each node, (u, v, table) of each pair)."""
    tables: list[np.ndarray] = []
    known: dict[int, int] = {}

    def number(table: np.ndarray) -> int:
        found = known.setdefault(id(table), len(tables))
        if found == len(tables):
            tables.append(table)
        return found

    return tables, [number(table) for table in graph.unary], [(u, v, number(table)) for u, v, table in graph.pairs]


def key_of(entries: Sequence[Entry], node: int, around: Sequence[int]) -> Key:
    """The tables that meet in a node, with its role (0) and those of its neighbours (1, 2, ...) instead of node numbers."""
    role = dict(zip(around, range(1, len(around) + 1)))
    role[node] = 0
    return tuple(sorted([(table, tuple([role[n] for n in scope])) for table, scope in entries]))
