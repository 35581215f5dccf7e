"""Deep models repeat their blocks: a graph with three blocks of a run is the graph with any number of them.

A *run* is a row of blocks, each fed by the one before it. Its graph is kept with the first, the second and the last block. The second
is the form of all: what it takes from the first, every block takes from the one before it, and what it takes from outside (masks, rotary
tables), all of them share. That a graph is of this kind is checked, not assumed: unrolled to the blocks that it has, it must be itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from autopar.core.graph import RANDOM_SITE, Op, OpGraph, Value, named
from autopar.errors import NoFamilyError

FIRST, SECOND, LAST = range(3)
OUTSIDE = -1


@dataclass(frozen=True, slots=True)
class Run:
    """The blocks `path.first`, ..., `path.(first + depth - 1)` of a module."""

    path: str
    first: int
    depth: int

    def block(self, k: int) -> str:
        """Module path of the k-th block."""
        return f"{self.path}.{self.first + k}"

    @property
    def blocks(self) -> tuple[str, ...]:
        """Module paths of all blocks."""
        return tuple(map(self.block, range(self.depth)))

    @property
    def kept(self) -> tuple[int, int, int]:
        """The blocks that stand for all."""
        return 0, 1, self.depth - 1


@dataclass(frozen=True)
class Unrolled:
    """A graph with the places in the original that its values and ops come from."""

    graph: OpGraph
    values: tuple[int, ...]
    ops: tuple[int, ...]


def unroll(graph: OpGraph, run: Run, blocks: Sequence[int]) -> Unrolled:
    """`graph`, which has the blocks `run.kept`, with `blocks` instead. Raises NoFamilyError where a block is not like its neighbours."""
    return _Unroller(graph, run, blocks).unrolled()


def check_run(graph: OpGraph, run: Run) -> None:
    """Raise NoFamilyError unless the three blocks in `graph` are copies of each other, joined in a chain."""
    found = unroll(graph, run, run.kept).graph
    if found != graph or found.digest != graph.digest:
        raise NoFamilyError(f"the blocks of {run.path} are not copies of each other: {_difference(found, graph)}")


def _difference(found: OpGraph, wanted: OpGraph) -> str:
    for ours, theirs in zip(found.ops, wanted.ops):
        if ours != theirs:
            return f"{theirs.kind} in {theirs.module_path} is not the call that the second block makes there"
    return "their values or their ends differ"


class _Unroller:
    def __init__(self, graph: OpGraph, run: Run, blocks: Sequence[int]) -> None:
        self.graph, self.run, self.blocks = graph, run, blocks
        self.prefixes = [run.block(k) for k in run.kept]
        self.made: list[list[int]] = [[] for _ in blocks]
        self.outside: dict[int, int] = {}
        self.values: list[Value] = []
        self.value_origins: list[int] = []

    def home_of_path(self, path: str) -> int:
        """Which of the three blocks a module path lies in."""
        if path.startswith(self.run.path):
            for home, prefix in enumerate(self.prefixes):
                if path == prefix or path.startswith(f"{prefix}."):
                    return home
        return OUTSIDE

    @cached_property
    def homes(self) -> list[int]:
        """Of every op."""
        return [self.home_of_path(op.module_path) for op in self.graph.ops]

    @cached_property
    def value_homes(self) -> list[int]:
        found = [self.home_of_path(v.source[0]) if v.role in ("param", "buffer") else OUTSIDE for v in self.graph.values]
        for op, home in zip(self.graph.ops, self.homes):
            for v in op.results:
                found[v] = home
        for value in self.graph.values:
            if len(value.source) > 1 and any(self.home_of_path(name) != OUTSIDE for name in value.source):
                raise NoFamilyError(f"parameter {' = '.join(value.source)} of {self.run.path} is shared")
        return found

    @cached_property
    def members(self) -> list[list[int]]:
        """Value ids of the three blocks."""
        found: list[list[int]] = [[], [], []]
        for v, home in enumerate(self.value_homes):
            if home != OUTSIDE:
                found[home].append(v)
        if len({len(ids) for ids in found}) > 1:
            raise NoFamilyError(f"the blocks of {self.run.path} have {' and '.join(str(len(ids)) for ids in found)} values")
        return found

    @cached_property
    def position(self) -> dict[int, int]:
        """Of a value among those of its block."""
        return {v: p for ids in self.members for p, v in enumerate(ids)}

    def groups(self, homes: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Neighbours with the same home; those of the second and last block are left out, since all blocks come where the first is."""
        for home, items in groupby(range(len(homes)), key=homes.__getitem__):
            if home in (OUTSIDE, FIRST):
                yield home, list(items)

    def unrolled(self) -> Unrolled:
        self._values()
        ops, op_origins = self._ops()
        outputs = tuple([self._from_outside(v) for v in self.graph.outputs])
        return Unrolled(OpGraph(*named(self.values, ops), outputs, self._updates(), self.graph.name), tuple(self.value_origins), tuple(op_origins))

    def _values(self) -> None:
        form = self.members[SECOND]
        for home, ids in self.groups(self.value_homes):
            if home == OUTSIDE:
                for v in ids:
                    self.outside[v] = self._add(v, self.graph.values[v])
                continue
            for k in range(len(self.blocks)):
                for v in ids:
                    origin = form[self.position[v]]
                    self.made[k].append(self._add(origin, self._renamed(self.graph.values[origin], k)))

    def _add(self, origin: int, value: Value) -> int:
        self.values.append(value)
        self.value_origins.append(origin)
        return len(self.values) - 1

    def _renamed(self, value: Value, k: int) -> Value:
        if not value.source:
            return value
        source = (self._path(value.source[0], k),)
        return replace(value, name=value.name.replace(value.source[0], source[0]), source=source)

    def _path(self, path: str, k: int) -> str:
        return self.run.block(self.blocks[k]) + path.removeprefix(self.prefixes[SECOND])

    def _ops(self) -> tuple[list[Op], list[int]]:
        ops, origins, sites = [], [], 0
        of_second = [i for i, home in enumerate(self.homes) if home == SECOND]
        numbered = 0
        for home, ids in self.groups(self.homes):
            copies: list[tuple[int, int, int | None]] = [(i, i, None) for i in ids]
            if home == FIRST:
                forms = of_second[numbered : numbered + len(ids)]
                if len(forms) < len(ids):
                    raise NoFamilyError(f"the second block of {self.run.path} has fewer operators than the first")
                numbered += len(ids)
                copies = [(i, first, k) for k in range(len(self.blocks)) for i, first in zip(forms, ids)]
            for i, first, k in copies:
                op = self.graph.ops[i]
                op = self._outer(op) if k is None else self._inner(op, self.graph.ops[first], k)
                if any(name == RANDOM_SITE for name, _ in op.args):
                    op = replace(op, args=tuple([(name, sites if name == RANDOM_SITE else value) for name, value in op.args]))
                    sites += 1
                ops.append(op)
                origins.append(i)
        return ops, origins

    def _outer(self, op: Op) -> Op:
        return replace(op, operands=tuple([self._from_outside(v) for v in op.operands]), results=tuple([self.outside[v] for v in op.results]))

    def _from_outside(self, v: int) -> int:
        home = self.value_homes[v]
        if home == OUTSIDE:
            return self.outside[v]
        if home != LAST:
            raise NoFamilyError(f"{self.graph.values[v].name} of {self.prefixes[home]} is used outside the run of blocks")
        return self.made[-1][self.position[v]]

    def _inner(self, op: Op, first: Op, k: int) -> Op:
        operands = []
        for n, v in enumerate(op.operands):
            home = self.value_homes[v]
            if home == FIRST and not k:
                if len(first.operands) <= n or self.value_homes[first.operands[n]] != OUTSIDE:
                    raise NoFamilyError(f"{first.name} and {op.name} do not take their operands from the same places")
                operands.append(self.outside[first.operands[n]])
            elif home == OUTSIDE:
                operands.append(self.outside[v])
            elif home == LAST:
                raise NoFamilyError(f"{op.name} takes a value of {self.prefixes[LAST]}")
            else:
                operands.append(self.made[k if home == SECOND else k - 1][self.position[v]])
        results = tuple([self.made[k][self.position[v]] for v in op.results])
        return replace(op, operands=tuple(operands), results=results, module_path=self._path(op.module_path, k))

    def _updates(self) -> tuple[tuple[int, int], ...]:
        found = []
        updates = self.graph.updates
        of_second = iter([(b, v) for b, v in updates if self.value_homes[b] == SECOND])
        for home, ids in self.groups([self.value_homes[b] for b, _ in updates]):
            if home == OUTSIDE:
                found += [(self.outside[updates[i][0]], self._from_outside(updates[i][1])) for i in ids]
                continue
            pairs: list[Any] = [next(of_second, None) for _ in ids]
            if None in pairs or any(self.value_homes[v] != SECOND for _, v in pairs):
                raise NoFamilyError(f"the blocks of {self.run.path} do not update the same buffers")
            found += [(self.made[k][self.position[b]], self.made[k][self.position[v]]) for k in range(len(self.blocks)) for b, v in pairs]
        return tuple(found)
