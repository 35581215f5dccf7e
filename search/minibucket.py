"""Where exact elimination would need too large a table: a lower bound, and a plan that no exact re-solve of a part improves.

References: Dechter and Rish 2003 (mini-buckets); the descent is large-neighbourhood search over cutsets.
"""

import math
from collections.abc import Sequence

import numpy as np

from autopar.errors import InfeasibleError
from autopar.search.bucket import CostGraph, Entry, key_of, run_steps
from autopar.search.order import Order, Step
from autopar.search.tables import TableStore

RELATIVE_GAIN = 1e-12  # a smaller gain is rounding, and taking it could go round in circles
MAX_ROUNDS = 60


def bounded_minimum(store: TableStore, graph: CostGraph, order: Order, max_table_entries: int) -> tuple[tuple[int, ...], float]:
    """(good choices, lower bound) where exact elimination would need too large a table."""
    choices, bound = mini_bucket(store, graph, order, max_table_entries)
    if not math.isfinite(bound):
        raise InfeasibleError("every combination of states contains a forbidden pair; allow more states or pairs")
    if not math.isfinite(graph.value(choices)):
        # first find any legal plan: least number of forbidden pairs instead of least cost
        counting = CostGraph(
            tuple(np.zeros(size) for size in graph.sizes),
            tuple((u, v, np.isinf(table).astype(np.float64)) for u, v, table in graph.pairs),
            graph.classes,
        )
        choices = descend(counting, choices, max_table_entries)
        if counting.value(choices) > 0:
            raise InfeasibleError(
                f"no plan without a forbidden pair was found with tables of at most {max_table_entries} entries; raise max_table_entries"
            )
    return descend(graph, choices, max_table_entries), bound


def mini_bucket(store: TableStore, graph: CostGraph, order: Order, max_table_entries: int) -> tuple[tuple[int, ...], float]:
    """(decoded choices, lower bound): tables that meet in a node are minimised in groups small enough, each on its own.

    A sum of minima is at most the minimum of the sum, so the total is a lower bound. Choices are decoded from all the
    tables of a node together; they can be far from optimal, and can even contain a forbidden pair.
    """
    tables_at: list[list[Entry]] = [[(store.add(table), (i,))] for i, table in enumerate(graph.unary)]
    first = {step.node: position for position, step in enumerate(order.steps)}
    for u, v, table in graph.pairs:
        tables_at[min(u, v, key=first.__getitem__)].append((store.add(table), (u, v)))
    sizes = graph.sizes
    constants: list[float] = []
    for step in order.steps:
        for group in _groups(tables_at[step.node], step.node, sizes, max_table_entries):
            around = sorted({n for _, scope in group for n in scope} - {step.node})
            number, lowest = store.eliminate(key_of(group, step.node, around))
            constants.append(lowest)
            if around:
                tables_at[min(around, key=first.__getitem__)].append((number, tuple(around)))
    choices = [0] * len(sizes)
    for step in reversed(order.steps):
        group = tables_at[step.node]
        around = sorted({n for _, scope in group for n in scope} - {step.node})
        choices[step.node] = store.best_state(key_of(group, step.node, around), tuple(choices[n] for n in around))
    return tuple(choices), math.fsum(constants)


def _groups(
    entries: Sequence[Entry], node: int, sizes: Sequence[int], max_table_entries: int
) -> list[list[Entry]]:
    """First fit, widest table first; every group leaves a table of at most `max_table_entries` (or holds a single table)."""
    groups: list[tuple[set[int], list[Entry]]] = []
    for entry in sorted(entries, key=lambda e: -len(e[1])):
        for scope, members in groups:
            union = scope | set(entry[1])
            if math.prod([sizes[n] for n in union if n != node]) <= max_table_entries:
                scope.update(union)
                members.append(entry)
                break
        else:
            groups.append((set(entry[1]), [entry]))
    return [members for _, members in groups]


def descend(graph: CostGraph, choices: tuple[int, ...], max_table_entries: int) -> tuple[int, ...]:
    """Choices that no exact re-solve of a part improves, starting from `choices`.

    Each round fixes as few nodes as it takes to bring the rest below the table limit and solves the rest exactly; the
    nodes fixed least often so far come first. Ends when every node has been free since the last gain.
    """
    best = graph.value(choices)
    reluctance = [0] * len(choices)
    waiting = set(range(len(choices)))
    for _ in range(MAX_ROUNDS):
        order = graph.order(max_table_entries, reluctance)
        for node in order.fixed:
            reluctance[node] += 1
        free = [step.node for step in order.steps]
        found = _solve_free(graph, choices, order, sorted(free))
        value = graph.value(found)
        waiting.difference_update(free)
        if value < best - RELATIVE_GAIN * abs(best) or (math.isinf(best) and math.isfinite(value)):
            best, choices = value, found
            waiting = set(order.fixed)
        if not waiting:
            break
    return choices


def _solve_free(graph: CostGraph, choices: tuple[int, ...], order: Order, free: list[int]) -> tuple[int, ...]:
    """The best choices of the free nodes with all others left as they are."""
    place = {node: i for i, node in enumerate(free)}
    unary = [graph.unary[node] for node in free]
    pairs = []
    for u, v, table in graph.pairs:
        if u in place and v in place:
            pairs.append((place[u], place[v], table))
        elif u in place:
            unary[place[u]] = unary[place[u]] + table[:, choices[v]]
        elif v in place:
            unary[place[v]] = unary[place[v]] + table[choices[u]]
    steps = [Step(place[s.node], tuple(place[n] for n in s.neighbours)) for s in order.steps]
    found, value = run_steps(TableStore(), CostGraph(tuple(unary), tuple(pairs), (0,) * len(free)), steps)
    if not math.isfinite(value):
        return choices
    result = list(choices)
    for node, choice in zip(free, found, strict=True):
        result[node] = choice
    return tuple(result)
