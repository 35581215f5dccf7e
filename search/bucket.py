"""A graph of cost tables, and its exact minimum along a given order of nodes.

Node x with neighbours N meets in the tables that mention x; minimising their sum over the states of x leaves one table
over N (for |N| = 1 a fold into the neighbour, for |N| = 2 MindSpore's operator elimination, beyond that bucket
elimination along a tree decomposition). Going back, every node takes its best state given its neighbours' states.

What meets where does not depend on the numbers in the tables. `write_recipe` finds it out once, and equal blocks share
their eliminations in it; `follow` computes the eliminations for the tables of one price.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.search.order import Order, Step, find_order
from autopar.search.tables import Key, TableStore

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


@dataclass(frozen=True, slots=True)
class Recipe:
    """The eliminations along an order: `eliminations[kinds[i]]` is that of step i, as the tables that meet in it.

    Roles are 0 for the node that goes and 1, 2, ... for its neighbours. Tables are numbered: first the `num_tables` given
    ones, then the results of the eliminations in their order.
    """

    steps: tuple[Step, ...]
    kinds: tuple[int, ...]
    eliminations: tuple[tuple[Input, ...], ...]
    num_tables: int


def write_recipe(unary: Sequence[int], pairs: Sequence[tuple[int, int, int]], order: Order) -> Recipe:
    """The recipe for table `unary[i]` at node i and the tables of `pairs` (u, v, table), all of whose nodes are among the steps.

    Steps that repeat those of another copy meet the same tables: they are not looked at.
    """
    steps = order.steps
    num_tables = max([*unary, *[table for _, _, table in pairs]], default=-1) + 1
    first = {step.node: position for position, step in enumerate(steps)}
    repeated = {start + length: (start, length, times) for start, length, times in order.repeats}
    copied = bytearray(len(steps))
    for start, length, times in order.repeats:
        copied[start + length : start + length * (1 + times)] = b"\1" * (length * times)
    buckets: list[list[Entry]] = [[] if copy else [(unary[step.node], (step.node,))] for step, copy in zip(steps, copied)]
    for u, v, table in pairs:  # a table waits for the first of its nodes
        position = min(first[u], first[v])
        if not copied[position]:
            buckets[position].append((table, (u, v)))
    known: dict[tuple[Input, ...], int] = {}
    kinds: list[int] = []

    def send(kind: int, around: tuple[int, ...]) -> None:
        if around:
            position = min([first[other] for other in around]) if len(around) > 1 else first[around[0]]
            if not copied[position]:
                buckets[position].append((num_tables + kind, around))

    for position, (step, bucket) in enumerate(zip(steps, buckets)):
        if position in repeated:
            start, length, times = repeated[position]
            kinds += kinds[start:position] * times
            for n in range(position, position + length * times):
                send(kinds[n], steps[n].neighbours)
        if not copied[position]:
            kinds.append(known.setdefault(key_of(bucket, step.node, step.neighbours), len(known)))
            send(kinds[-1], step.neighbours)
    return Recipe(steps, tuple(kinds), tuple(known), num_tables)


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
        choices = [0] * len(self.recipe.steps)
        known: dict[tuple[int, ...], int] = {}
        for step, kind in zip(reversed(self.recipe.steps), reversed(self.recipe.kinds), strict=True):
            around = [choices[other] for other in step.neighbours]
            place = (kind, *around)
            state = known.get(place)
            if state is None:
                state = known[place] = store.best_state(self.keys[kind], tuple(around))
            choices[step.node] = state
        return tuple(choices)


def begin(recipe: Recipe, tables: Sequence[np.ndarray | None]) -> TableStore:
    """A store with the eliminations of a recipe in which only tables meet that are known."""
    store = TableStore()
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
    forward = follow(store, write_recipe(unary, pairs, Order(tuple(steps), (), 0)), tables)
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
