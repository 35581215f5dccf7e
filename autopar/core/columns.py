"""The nodes and edges of a search problem, and how they lie in memory: as columns of numbers. What a deep model repeats is then the number of a
table, not an object more; `Node` and `Edge` objects are made where somebody asks for them.
"""

import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from autopar.errors import UsageError

T = TypeVar("T", "Nodes", "Edges")


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One decision: seconds and bytes of each of its k states, both of shape [k], finite, not negative."""

    name: str
    cost_s: np.ndarray
    memory_bytes: np.ndarray

    @property
    def num_states(self) -> int:
        return len(self.cost_s)


@dataclass(frozen=True, slots=True, eq=False)
class Edge:
    """Seconds of each pair of states of nodes u and v, shape [k_u, k_v]; `inf` forbids the pair.

    `memory_bytes` has the same shape and is finite; None stands for zero bytes everywhere.
    """

    u: int
    v: int
    cost_s: np.ndarray
    memory_bytes: np.ndarray | None = None


class Numbering:
    """Tables of seconds and bytes by number: those that share their arrays have one, in the order in which they first appear."""

    def __init__(self) -> None:
        self.tables: list[tuple[np.ndarray, Any]] = []
        self._known: dict[tuple[int, int], int] = {}

    def of(self, cost_s: np.ndarray, memory_bytes: np.ndarray | None) -> int:
        number = self._known.setdefault((id(cost_s), id(memory_bytes)), len(self.tables))
        if number == len(self.tables):
            self.tables.append((cost_s, memory_bytes))
        return number


@dataclass(frozen=True, eq=False)
class Nodes(Sequence[Node]):
    """`number[i]`: which of the `tables` (seconds, bytes) node i has. No two of them are the same two arrays."""

    names: Sequence[str]
    number: np.ndarray
    tables: Sequence[tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, nodes: Sequence[Node]) -> "Nodes":
        if isinstance(nodes, cls):
            return nodes
        found = Numbering()
        made = cls([n.name for n in nodes], np.array([found.of(n.cost_s, n.memory_bytes) for n in nodes], dtype=int), found.tables)
        vars(made)["rows"] = tuple(nodes)
        return made

    @cached_property
    def sizes(self) -> np.ndarray:
        """How many states each node has."""
        return np.array([len(cost_s) if cost_s.ndim else 0 for cost_s, _ in self.tables], dtype=int)[self.number]

    @cached_property
    def rows(self) -> tuple[Node, ...]:
        return tuple([Node(name, *self.tables[number]) for name, number in zip(self.names, self.number.tolist(), strict=True)])

    @cached_property
    def faults(self) -> tuple[tuple[int, str], ...]:
        """(number of a table, why it is none of seconds or of bytes). Arrays are shared by many layers, and looked at once."""
        found = []
        for number, (cost_s, memory_bytes) in enumerate(self.tables):
            if cost_s.ndim != 1 or not len(cost_s):
                found.append((number, f"cost_s has shape {cost_s.shape}; it needs one axis with at least one state"))
            elif memory_bytes.shape != cost_s.shape:
                found.append((number, f"memory_bytes has shape {memory_bytes.shape}, cost_s has {cost_s.shape}"))
            else:
                found += [(number, text) for text in (_fault("cost_s", cost_s), _fault("memory_bytes", memory_bytes)) if text]
        return tuple(found)

    def check(self) -> None:
        """Raises UsageError where a table has a fault."""
        for number, fault in self.faults:
            raise UsageError(f"node {self.names[int((self.number == number).argmax())]!r}: {fault}")

    def with_bytes(self, times: float, but: Set[int]) -> "Nodes":
        """With so many times the bytes, `but` of some nodes."""
        kept = np.isin(np.arange(len(self)), sorted(but))
        number, first = first_seen(2 * self.number + kept)
        more = _Scaled(times)
        tables = [(cost_s, held if kept[n] else more(held)) for n in first.tolist() for cost_s, held in (self.tables[self.number[n]],)]
        return without_faults(Nodes(self.names, number, tables), self.faults)

    def __len__(self) -> int:
        return len(self.number)

    def __getitem__(self, which: Any) -> Any:
        return self.rows[which]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.rows)


@dataclass(frozen=True, eq=False)
class Edges(Sequence[Edge]):
    """Edge i joins nodes `u[i]` and `v[i]`; `number[i]`: which of the `tables` (seconds, bytes) it has. No two of them are the same two arrays."""

    u: np.ndarray
    v: np.ndarray
    number: np.ndarray
    tables: Sequence[tuple[np.ndarray, np.ndarray | None]]

    @classmethod
    def of(cls, edges: Sequence[Edge]) -> "Edges":
        if isinstance(edges, cls):
            return edges
        found = Numbering()
        columns = np.array([(e.u, e.v, found.of(e.cost_s, e.memory_bytes)) for e in edges], dtype=int).reshape(-1, 3)
        made = cls(*columns.T, found.tables)
        vars(made)["rows"] = tuple(edges)
        return made

    @cached_property
    def rows(self) -> tuple[Edge, ...]:
        return tuple([Edge(u, v, *self.tables[number]) for u, v, number in zip(self.u.tolist(), self.v.tolist(), self.number.tolist(), strict=True)])

    @cached_property
    def faults(self) -> tuple[tuple[int, str], ...]:
        """(number of a table, why it is none of seconds or of bytes)."""
        found = []
        for number, (cost_s, memory_bytes) in enumerate(self.tables):
            texts = _fault("cost_s", cost_s, inf_allowed=True), None if memory_bytes is None else _fault("memory_bytes", memory_bytes)
            found += [(number, text) for text in texts if text]
        return tuple(found)

    def check(self, nodes: Nodes) -> None:
        """Raises UsageError where an edge does not fit these nodes or a table has a fault."""
        if vars(self).get("checked") is nodes:
            return
        u, v, names = self.u, self.v, nodes.names
        for n in np.flatnonzero((u == v) | (np.minimum(u, v) < 0) | (np.maximum(u, v) >= len(nodes))).tolist():
            raise UsageError(f"edge ({u[n]}, {v[n]}) does not join two different nodes of 0..{len(nodes) - 1}")
        for n in np.flatnonzero((self._shapes[self.number] != np.stack([nodes.sizes[u], nodes.sizes[v]], axis=1)).any(axis=1)).tolist():
            shape = int(nodes.sizes[u[n]]), int(nodes.sizes[v[n]])
            for label, table in zip(("cost_s", "memory_bytes"), self.tables[self.number[n]], strict=True):
                if table is not None and table.shape != shape:
                    raise UsageError(f"edge {names[u[n]]!r} -> {names[v[n]]!r}: {label} has shape {table.shape}, its nodes have {shape} states")
        for number, fault in self.faults:
            n = int((self.number == number).argmax())
            raise UsageError(f"edge {names[u[n]]!r} -> {names[v[n]]!r}: {fault}")
        vars(self)["checked"] = nodes

    @cached_property
    def _shapes(self) -> np.ndarray:
        """Of the tables, [tables, 2]; -1 where seconds and bytes have none in common, or no two axes."""
        shapes = [cost_s.shape if held is None or held.shape == cost_s.shape else () for cost_s, held in self.tables]
        return np.array([shape if len(shape) == 2 else (-1, -1) for shape in shapes], dtype=int).reshape(-1, 2)

    def with_bytes(self, times: float) -> "Edges":
        """With so many times the bytes."""
        more = _Scaled(times)
        tables = [(cost_s, None if held is None else more(held)) for cost_s, held in self.tables]
        return without_faults(Edges(self.u, self.v, self.number, tables), self.faults)

    def __len__(self) -> int:
        return len(self.number)

    def __getitem__(self, which: Any) -> Any:
        return self.rows[which]

    def __iter__(self) -> Iterator[Edge]:
        return iter(self.rows)


class _Scaled:
    """Arrays times a number, each once."""

    def __init__(self, times: float) -> None:
        self._times, self._made = times, dict[int, np.ndarray]()

    def __call__(self, array: np.ndarray) -> np.ndarray:
        if id(array) not in self._made:
            self._made[id(array)] = self._times * array
        return self._made[id(array)]


def without_faults(columns: T, faults: tuple[tuple[int, str], ...]) -> T:
    """Of tables that are parts, sums or multiples of such as have no `faults`: they have none either, and are not looked at again."""
    if not faults:
        vars(columns)["faults"] = ()
    return columns


def _fault(label: str, table: np.ndarray, *, inf_allowed: bool = False) -> str | None:
    """What is wrong with the numbers of a table."""
    if table.dtype.kind not in "fiu":
        return f"{label} has dtype {table.dtype}; it needs real numbers"
    lowest, highest = table.min(initial=0.0), table.max(initial=0.0)  # both are nan where any entry is
    if not lowest >= 0:
        return f"{label} holds {lowest}; entries are numbers >= 0"
    if highest == math.inf and not inf_allowed:
        return f"{label} holds inf; leave an illegal state out instead (only edge costs may be inf)"
    return None


def first_seen(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the same numbers called 0, 1, ... as they first appear, where they do)."""
    _, first, own = np.unique(numbers, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), dtype=int)
    rank[order] = np.arange(len(order))
    return rank[own], first[order]
