"""What the backward keeps of values: which, and how many bytes by the layouts that they are produced and used in."""

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from autopar.core.again import RESHAPES
from autopar.core.graph import OpGraph, TensorMeta
from autopar.core.layout import Layout
from autopar.core.mesh import Mesh
from autopar.core.rule import OpRule
from autopar.program import without_r

VIEWS = (*RESHAPES, "aten.transpose", "aten.permute", "aten.t.")
"""Operators whose results lie in the memory of what they read, but for reshapes of what does not lie in order."""


@dataclass(frozen=True, eq=False)
class Gathers:
    """Of an edge in its two forms: bytes that its moves keep at least where nothing is gathered again, and where what all-gathers bring is not kept, what `find` does."""

    kept_bytes: np.ndarray
    find: Callable[[], tuple[np.ndarray, np.ndarray]]

    @cached_property
    def again(self) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of gathering again, and the bytes that are kept then."""
        return self.find()


def moved_bytes(meta: TensorMeta, src: Sequence[Layout], dst: Sequence[Layout], mesh: Mesh, *, instead: bool = False, addends: bool = False) -> np.ndarray:
    """Bytes of the copy that the backward keeps: none where the value lies as it was produced. Where the copy is kept `instead` of that, only
    what it has more of (of `addends`, more than the rank's part of their sum); so much was received, and is kept even of a block that is computed again,
    which repeats no collective."""
    before, size = counted_bytes(meta, src, mesh, addends=addends), counted_bytes(meta, dst, mesh)
    return np.where(_same(tuple(src), tuple(dst)), 0.0, (size - instead * before[:, None]).clip(min=0.0))


@lru_cache(maxsize=1 << 12)
def _same(src: tuple[Layout, ...], dst: tuple[Layout, ...]) -> np.ndarray:
    """Whether a value lies alike in two layouts."""
    known: dict[Layout, int] = {}
    here, there = (np.array([known.setdefault(without_r(x), len(known)) for x in layouts]) for layouts in (src, dst))
    return here[:, None] == there


def counted_bytes(meta: TensorMeta, layouts: Sequence[Layout], mesh: Mesh, *, addends: bool = False) -> np.ndarray:
    """Local bytes by layout; of `addends` those of a part of their sum."""
    return meta.num_bytes / _parts(tuple(layouts), mesh.sizes, "SP" if addends else "S")


@lru_cache(maxsize=1 << 12)
def _parts(layouts: tuple[Layout, ...], sizes: tuple[int, ...], cut: str) -> np.ndarray:
    """In how many parts each cuts a value."""
    return np.array([math.prod([size for size, p in zip(sizes, layout) if p.kind in cut]) for layout in layouts])


def wanting(graph: OpGraph, i: int) -> list[int]:
    """The operands of an operator that have gradients."""
    return [k for k, v in enumerate(graph.ops[i].operands) if v in graph.differentiated]


def saved_values(graph: OpGraph, rules: Sequence[OpRule]) -> frozenset[int]:
    """Values that the backward keeps: operands that a differentiated op saves, and results it saves itself."""
    live = graph.differentiated
    found: set[int] = set()
    known: dict[tuple, list[int]] = {}
    for segment, wiring in zip(graph.segments, graph.wirings, strict=True):
        values = wiring.values
        key = (wiring.form, tuple([v in live for v in values]))
        if key not in known:
            local = {v: n for n, v in enumerate(values)}
            known[key] = [local[v] for i in segment.ops for v in _saved_by(graph, rules[i], i)]
        found.update([values[n] for n in known[key]])
    return frozenset(v for v in found.difference(graph.params) if not _seen(graph, v, found))


def _seen(graph: OpGraph, v: int, saved: Set[int]) -> bool:
    """Whether a value is a view of one that is saved."""
    while v in graph.producer and graph.ops[graph.producer[v][0]].kind.startswith(VIEWS):
        v = graph.ops[graph.producer[v][0]].operands[0]
        if v in saved:
            return True
    return False


def _saved_by(graph: OpGraph, rule: OpRule, i: int) -> list[int]:
    """Operands and results that the backward of an operator reads."""
    op = graph.ops[i]
    if not (rule.saved_operands or rule.saved_results) or graph.differentiated.isdisjoint(op.results):
        return []
    live = wanting(graph, i)
    return [v for k, v in enumerate(op.operands) if rule.keeps_operand(k, live)] + [op.results[j] for j in rule.saved_results]
