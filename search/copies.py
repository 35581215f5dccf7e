"""Copies of a block in the graph of a problem: what is inside them is put in order and eliminated once, whatever their number.

Who builds a problem may name nodes that play the same role in repeated blocks. That is a hint: two copies are taken for alike
where their nodes have the same tables, their inner edges join the same roles with the same tables, and the same roles have
edges that lead out. Nodes without such edges can go the same way in all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.core.columns import Edges


@dataclass(frozen=True, slots=True)
class Alike:
    """Copies that are alike: their nodes, role by role, and the roles whose every edge stays within a copy."""

    copies: tuple[tuple[int, ...], ...]
    inner: frozenset[int]


def alike(tables: np.ndarray, edges: Edges, copies: Sequence[Sequence[Sequence[int]]]) -> tuple[Alike, ...]:
    """Of each group of `copies` those that are alike, where there are several. `tables`: the number of each node's."""
    if not copies:
        return ()
    owner, role = np.full(len(tables), -1), np.full(len(tables), -1)
    found: list[tuple[int, ...]] = []
    for group in copies:
        nodes = np.array(group)
        owner[nodes] = np.arange(len(found), len(found) + len(nodes))[:, None]
        role[nodes] = np.arange(nodes.shape[1])
        found += [tuple(copy) for copy in group]
    u, v, table = edges.u, edges.v, edges.number
    inside = (owner[u] == owner[v]) & (owner[u] >= 0)
    leads_out = np.zeros(len(tables), dtype=bool)
    leads_out[u[~inside]] = leads_out[v[~inside]] = True
    forms = np.stack([owner[u], role[u], role[v], table], axis=1)[inside]
    forms = forms[np.lexsort(forms.T[::-1])]
    starts = np.searchsorted(forms[:, 0], np.arange(len(found) + 1))
    groups: dict[tuple[bytes, ...], list[tuple[int, ...]]] = {}
    for c, copy in enumerate(found):
        nodes = np.array(copy)
        key = tables[nodes].tobytes(), leads_out[nodes].tobytes(), forms[starts[c] : starts[c + 1], 1:].tobytes()
        groups.setdefault(key, []).append(copy)
    return tuple([Alike(tuple(g), frozenset(np.flatnonzero(~leads_out[list(g[0])]).tolist())) for g in groups.values() if len(g) > 1])
