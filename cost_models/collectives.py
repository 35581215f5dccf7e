"""Seconds of a collective on a mesh: latency per hop plus bytes over the narrowest tier, cheapest algorithm.

Setting. Ranks sit row-major on nodes (rank r on node r // devices_per_node). All groups of a set of mesh axes run the
same collective at the same time, and every rank is in exactly one group. A group of n ranks lies on k nodes, with at
most `most` and at least `fewest` of its ranks on one of them. A = intra-node tier, B = inter-node tier, both with
bandwidth per device and direction.

Network cards. A device owns one card, so a group can leave a node through the cards of its own members there, as many
rings in parallel as it has members. No card serves two groups, because no rank is in two: groups do not contend, and
the width of a group's crossing is `fewest` * B. A strided group with one rank per node gets 1 * B, a group that fills
its nodes gets devices_per_node * B, and the bytes through each card come out the same.

Ring. Every edge carries all pieces but one. With k > 1 each of the `most` parallel rings stays inside a node on
most - 1 of its `most` edges, so a device's own link carries that share of the bytes while its card carries the rest.

Formulas below are for all-gather of L bytes per rank; reduce-scatter of L is the mirror image, an all-gather of L/n;
all-reduce of L is both. A link may have numbers of its own for a collective (`Link.collectives`): the formula stays. What they leave out is
listed in README.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from autopar.core import moves
from autopar.core.cluster import Cluster
from autopar.core.mesh import Mesh
from autopar.errors import UsageError

PRIMITIVES = (*moves.COLLECTIVES, "broadcast", "send")
TREE_SHARE = 0.92
"""Share of the ring's bandwidth that a tree reaches; source: NCCL's tuning table."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where a group lies: its size, the number of nodes, and the most and fewest members on one of these nodes."""

    size: int
    num_nodes: int
    most: int
    fewest: int

    @property
    def is_grid(self) -> bool:
        """Several nodes with the same number, above one, of members on each: what a two-level algorithm needs."""
        return self.num_nodes > 1 and self.most == self.fewest > 1


def moved_bytes(primitive: str, group_size: int, local_bytes: Any) -> Any:
    """Bytes a rank receives when its input has `local_bytes`; broadcast and send: at the receiving rank."""
    _check_primitive(primitive)
    if primitive in ("broadcast", "send"):
        return local_bytes * (group_size > 1)
    return moves.moved_bytes(primitive, group_size, local_bytes)


def collective_seconds(cluster: Cluster, mesh: Mesh, primitive: str, axes: tuple[int, ...], local_bytes: Any) -> Any:
    """Seconds until the slowest group of mesh axes `axes` has finished; `local_bytes`: input bytes of one rank.

    A float for a number, an array for an array. A group of one costs 0. `send` is one hop to the next rank of the
    group, priced at the slowest such hop.
    """
    _check_primitive(primitive)
    sizes = np.asarray(local_bytes, dtype=float)
    if not np.all(sizes >= 0):
        raise UsageError(f"{primitive} of negative or undefined bytes; give numbers of at least 0")
    seconds = np.zeros(sizes.shape)
    for span in group_spans(cluster, mesh, axes):
        seconds = np.maximum(seconds, np.minimum.reduce(list(algorithm_seconds(cluster, span, primitive, sizes).values())))
    return seconds if sizes.shape else float(seconds)


def group_spans(cluster: Cluster, mesh: Mesh, axes: tuple[int, ...]) -> tuple[Span, ...]:
    """The distinct spans of the groups of `axes`; one where node and mesh boundaries agree."""
    if mesh.num_ranks > cluster.num_devices:
        raise UsageError(
            f"mesh {mesh} has {mesh.num_ranks} ranks, cluster {cluster.name!r} has {cluster.num_devices} devices; shrink the mesh or add nodes"
        )
    if len(set(axes)) != len(axes) or not all(0 <= axis < len(mesh.axes) for axis in axes):
        raise UsageError(f"axes {axes} of mesh {mesh}; give different numbers from 0 to {len(mesh.axes) - 1}")
    return _spans(cluster.devices_per_node, mesh.sizes, tuple(sorted(axes)))


@lru_cache(maxsize=1024)
def _spans(devices_per_node: int, sizes: tuple[int, ...], axes: tuple[int, ...]) -> tuple[Span, ...]:
    size = math.prod(sizes[axis] for axis in axes)
    if size == 1:
        return (Span(1, 1, 1, 1),)
    nodes = (np.arange(math.prod(sizes)) // devices_per_node).reshape(sizes)
    kept = [axis for axis in range(len(sizes)) if axis not in axes]
    rows = nodes.transpose(kept + list(axes)).reshape(-1, size)  # one group a row, nodes ascending in it
    found = set()
    for crossings in np.unique(np.diff(rows, axis=1) != 0, axis=0):
        counts = np.diff(np.concatenate(([0], np.flatnonzero(crossings) + 1, [size])))
        found.add(Span(size, len(counts), int(counts.max()), int(counts.min())))
    return tuple(sorted(found, key=lambda span: (span.num_nodes, span.most, span.fewest)))


def algorithm_seconds(cluster: Cluster, span: Span, primitive: str, local_bytes: Any) -> Mapping[str, Any]:
    """Seconds of every algorithm that fits the span, by name; the cheapest is what `collective_seconds` takes."""
    _check_primitive(primitive)
    if span.size == 1:
        return {"nothing to do": local_bytes * 0.0}
    link = cluster.inter_node if span.num_nodes > 1 else cluster.intra_node
    return _algorithms(_as_seen_by(cluster, primitive), span, primitive, local_bytes, cluster.device.kernel_launch_s + link.start_s(primitive))


@lru_cache(maxsize=64)
def _as_seen_by(cluster: Cluster, primitive: str) -> Cluster:
    """The cluster with the numbers that its links have for one collective."""
    return replace(cluster, intra_node=cluster.intra_node.of(primitive), inter_node=cluster.inter_node.of(primitive))


def _algorithms(cluster: Cluster, span: Span, primitive: str, local_bytes: Any, launch: float) -> Mapping[str, Any]:
    if primitive == "all_gather":
        steps = _gather_seconds(cluster, span, local_bytes)
        return {name: seconds + (2 if name == "two-level" else 1) * launch for name, seconds in steps.items()}
    if primitive == "reduce_scatter":
        return _algorithms(cluster, span, "all_gather", local_bytes / span.size, launch)
    if primitive == "all_reduce":
        steps = _gather_seconds(cluster, span, local_bytes / span.size)
        both = {name: 2 * seconds + (3 if name == "two-level" else 1) * launch for name, seconds in steps.items()}
        return both | ({"tree": _tree_seconds(cluster, span, local_bytes) + launch} if span.num_nodes > 1 else {})
    if primitive == "all_to_all":
        steps = _exchange_seconds(cluster, span, local_bytes)
        return {name: seconds + (2 if name == "two-level" else 1) * launch for name, seconds in steps.items()}
    if primitive == "broadcast":
        return {"ring": _ring_latency(cluster, span) + _crossing_seconds(cluster, span, local_bytes, local_bytes) + launch}
    link = cluster.inter_node if span.num_nodes > 1 else cluster.intra_node
    return {"direct": link.seconds(local_bytes) + launch}


def _gather_seconds(cluster: Cluster, span: Span, local_bytes: Any) -> dict[str, Any]:
    """All-gather without launches.

    ring: hops + max((n-1) L / (fewest B), (n-1) L (most-1)/most / A), or (n-1) L / A inside one node.
    two-level, m per node: over the nodes (k-1) (latency_B + L / B), then in the node (m-1) (latency_A + k L / A).
    """
    edge_bytes = (span.size - 1) * local_bytes
    inside = edge_bytes * (span.most - 1) / span.most if span.num_nodes > 1 else edge_bytes
    found = {"ring": _ring_latency(cluster, span) + _crossing_seconds(cluster, span, edge_bytes, inside)}
    if span.is_grid:
        across = (span.num_nodes - 1) * cluster.inter_node.seconds(local_bytes)
        found["two-level"] = across + (span.most - 1) * cluster.intra_node.seconds(span.num_nodes * local_bytes)
    return found


def _tree_seconds(cluster: Cluster, span: Span, local_bytes: Any) -> Any:
    """All-reduce up and down a double binary tree over the nodes with a chain in each: logarithmic latency, 2 L bytes."""
    depth = math.ceil(math.log2(span.num_nodes))
    latency = 2 * ((span.most - 1) * cluster.intra_node.latency_s + depth * cluster.inter_node.latency_s)
    return latency + _crossing_seconds(cluster, span, 2 * local_bytes, 2 * local_bytes * (span.most - 1) / span.most) / TREE_SHARE


def _exchange_seconds(cluster: Cluster, span: Span, local_bytes: Any) -> dict[str, Any]:
    """All-to-all: every rank keeps L/n and sends L/n to each other one.

    direct: one message per peer; the two tiers work side by side. two-level: in the node by the position of the
    target, then across nodes among equal positions: k-1 messages of L/k instead of n-m of L/n.
    """
    intra, inter = cluster.intra_node, cluster.inter_node
    near, far = span.most - 1, span.size - span.fewest
    share = local_bytes / span.size
    transfer = np.maximum(near * share / intra.rate_bytes_per_s, far * share / inter.rate_bytes_per_s)
    found = {"direct": near * intra.latency_s + far * inter.latency_s + transfer}
    if span.is_grid:
        in_node = (span.most - 1) * intra.seconds(local_bytes / span.most)
        found["two-level"] = in_node + (span.num_nodes - 1) * inter.seconds(local_bytes / span.num_nodes)
    return found


def _ring_latency(cluster: Cluster, span: Span) -> float:
    """The n-1 hops of the piece that travels farthest: it crosses every node boundary of the ring if it can."""
    crossings = min(span.num_nodes, span.size - 1) if span.num_nodes > 1 else 0
    return crossings * cluster.inter_node.latency_s + (span.size - 1 - crossings) * cluster.intra_node.latency_s


def _crossing_seconds(cluster: Cluster, span: Span, across_bytes: Any, inside_bytes: Any) -> Any:
    """Both tiers at once: `across_bytes` through the narrowest node boundary, `inside_bytes` through a device's own link."""
    inside = inside_bytes / cluster.intra_node.rate_bytes_per_s
    if span.num_nodes == 1:
        return inside
    return np.maximum(across_bytes / (span.fewest * cluster.inter_node.rate_bytes_per_s), inside)


def _check_primitive(primitive: str) -> None:
    if primitive not in PRIMITIVES:
        raise UsageError(f"collective {primitive!r} has no price; use one of {', '.join(PRIMITIVES)}")
