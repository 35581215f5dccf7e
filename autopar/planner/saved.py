"""What the backward keeps of values: which, and how many bytes by the layouts that they are produced and used in."""

from collections.abc import Sequence

import numpy as np

from autopar.core.graph import OpGraph, TensorMeta
from autopar.core.layout import Layout
from autopar.core.mesh import Mesh
from autopar.core.rule import OpRule
from autopar.program import without_r


def moved_bytes(meta: TensorMeta, src: Sequence[Layout], dst: Sequence[Layout], mesh: Mesh, *, instead: bool = False) -> np.ndarray:
    """Bytes of the copy that the backward keeps: none where the value lies as it was produced. Where the copy is kept `instead` of that, only
    what it has more of; so much was received, and is kept even of a block that is computed again, which repeats no collective."""
    known: dict[Layout, int] = {}
    here, there = (np.array([known.setdefault(without_r(x), len(known)) for x in layouts]) for layouts in (src, dst))
    before, size = (np.array([_local_bytes(meta, x, mesh) for x in layouts]) for layouts in (src, dst))
    return np.where(here[:, None] == there, 0.0, (size - instead * before[:, None]).clip(min=0.0))


def _local_bytes(meta: TensorMeta, layout: Layout, mesh: Mesh) -> float:
    parts = 1
    for axis, p in zip(mesh.axes, layout):
        parts *= axis.size if p.kind == "S" else 1
    return meta.num_bytes / parts


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
    return frozenset(found.difference(graph.params))


def _saved_by(graph: OpGraph, rule: OpRule, i: int) -> list[int]:
    """Operands and results that the backward of an operator reads."""
    op = graph.ops[i]
    if not (rule.saved_operands or rule.saved_results) or graph.differentiated.isdisjoint(op.results):
        return []
    live = wanting(graph, i)
    return [v for k, v in enumerate(op.operands) if rule.keeps_operand(k, live)] + [op.results[j] for j in rule.saved_results]
