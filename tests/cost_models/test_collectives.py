"""Collectives: hand formulas at two sizes, laws that hold at any size, and the contention derived by counting bytes."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.core.cluster import Cluster, Device, Link
from autopar.core.mesh import Mesh
from autopar.cost_models.collectives import PRIMITIVES, TREE_SHARE, Span, algorithm_seconds, collective_seconds, group_spans, moved_bytes
from autopar.errors import UsageError

LAUNCH, FAST, SLOW, NEAR, FAR = 5e-6, 400e9, 40e9, 2e-6, 6e-6
DEVICE = Device(name="d", memory_bytes=1, memory_bytes_per_s=1.0, peak_flops_per_s=(("float32", 1.0),), kernel_launch_s=LAUNCH)


def cluster(nodes: int = 4, per_node: int = 8) -> Cluster:
    # the efficiencies are powers of two: the rates are exactly FAST and SLOW
    fast = Link(name="fast", latency_s=NEAR, bandwidth_bytes_per_s=2 * FAST, efficiency=0.5)
    slow = Link(name="slow", latency_s=FAR, bandwidth_bytes_per_s=4 * SLOW, efficiency=0.25)
    return Cluster(name="test", device=DEVICE, num_nodes=nodes, devices_per_node=per_node, intra_node=fast, inter_node=slow)


MESH = Mesh.of(dp=4, tp=8)
TP, DP, ALL = (1,), (0,), (0, 1)
SMALL, LARGE = 1e3, 1e9

BY_HAND = [
    # inside a node, n = 8: one ring
    ("all_gather", TP, lambda s: LAUNCH + 7 * NEAR + 7 * s / FAST),
    ("reduce_scatter", TP, lambda s: LAUNCH + 7 * NEAR + 7 / 8 * s / FAST),
    ("all_reduce", TP, lambda s: LAUNCH + 14 * NEAR + 14 / 8 * s / FAST),
    ("all_to_all", TP, lambda s: LAUNCH + 7 * NEAR + 7 / 8 * s / FAST),
    ("broadcast", TP, lambda s: LAUNCH + 7 * NEAR + s / FAST),
    ("send", TP, lambda s: LAUNCH + NEAR + s / FAST),
    # one rank per node, n = 4: every hop on the slow tier, through the rank's own card
    ("all_gather", DP, lambda s: LAUNCH + 3 * FAR + 3 * s / SLOW),
    ("reduce_scatter", DP, lambda s: LAUNCH + 3 * FAR + 3 / 4 * s / SLOW),
    ("all_to_all", DP, lambda s: LAUNCH + 3 * FAR + 3 / 4 * s / SLOW),
    ("broadcast", DP, lambda s: LAUNCH + 3 * FAR + s / SLOW),
    ("send", DP, lambda s: LAUNCH + FAR + s / SLOW),
    # all 32: a card for each of the 8 parallel rings of a node, or two levels, whichever is cheaper
    ("all_gather", ALL, lambda s: min(LAUNCH + 4 * FAR + 27 * NEAR + max(31 * s / (8 * SLOW), 31 * s * 7 / 8 / FAST), 2 * LAUNCH + 3 * (FAR + s / SLOW) + 7 * (NEAR + 4 * s / FAST))),
    ("all_to_all", ALL, lambda s: min(LAUNCH + 7 * NEAR + 24 * FAR + max(7 / 32 * s / FAST, 24 / 32 * s / SLOW), 2 * LAUNCH + 7 * (NEAR + s / 8 / FAST) + 3 * (FAR + s / 4 / SLOW))),
    ("all_reduce", DP, lambda s: min(LAUNCH + 6 * FAR + 6 / 4 * s / SLOW, LAUNCH + 4 * FAR + 2 * s / SLOW / TREE_SHARE)),
    ("broadcast", ALL, lambda s: LAUNCH + 4 * FAR + 27 * NEAR + max(s / (8 * SLOW), s / FAST)),
    ("send", ALL, lambda s: LAUNCH + FAR + s / SLOW),
]  # fmt: skip


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize(("primitive", "axes", "formula"), BY_HAND, ids=[f"{p}-{a}" for p, a, _ in BY_HAND])
def test_seconds_by_hand(primitive: str, axes: tuple[int, ...], formula, size: float) -> None:
    assert collective_seconds(cluster(), MESH, primitive, axes, size) == pytest.approx(formula(size), rel=1e-12)


def test_the_cheapest_algorithm_depends_on_the_size() -> None:
    """Two levels and the tree have fewer hops, the ring moves fewer bytes one after the other."""
    (span,) = group_spans(cluster(), MESH, ALL)
    for primitive, small in (
        ("all_gather", "two-level"),
        ("reduce_scatter", "two-level"),
        ("all_to_all", "two-level"),
        ("all_reduce", "tree"),
    ):
        times = {size: algorithm_seconds(cluster(), span, primitive, size) for size in (SMALL, 1e10)}
        assert min(times[SMALL], key=times[SMALL].get) == small
        assert min(times[1e10], key=times[1e10].get) in ("ring", "direct")
        for size, by_name in times.items():
            assert collective_seconds(cluster(), MESH, primitive, ALL, size) == min(by_name.values())


@pytest.mark.parametrize("primitive", PRIMITIVES)
@pytest.mark.parametrize("axes", [TP, DP, ALL, (1, 0)])
def test_time_grows_with_bytes_and_arrays_equal_numbers(primitive: str, axes: tuple[int, ...]) -> None:
    sizes = np.concatenate(([0.0], np.logspace(0, 11, 60)))
    times = collective_seconds(cluster(), MESH, primitive, axes, sizes)
    assert times.shape == sizes.shape and np.all(np.diff(times) >= 0) and np.all(times > 0)
    assert times[7] == collective_seconds(cluster(), MESH, primitive, axes, float(sizes[7]))
    assert np.array_equal(collective_seconds(cluster(), MESH, primitive, axes, sizes.reshape(1, -1)), times.reshape(1, -1))


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_a_group_of_one_costs_nothing(primitive: str) -> None:
    mesh = Mesh.of(dp=4, one=1, tp=8)
    assert collective_seconds(cluster(), mesh, primitive, (1,), 1e9) == 0.0
    assert collective_seconds(cluster(), mesh, primitive, (), 1e9) == 0.0
    assert collective_seconds(cluster(), mesh, primitive, (1,), np.ones(3)).tolist() == [0, 0, 0]
    assert moved_bytes(primitive, 1, 1e9) == 0
    # an axis of size one changes no other group either
    assert collective_seconds(cluster(), mesh, primitive, (1, 2), 1e6) == collective_seconds(cluster(), MESH, primitive, TP, 1e6)


@pytest.mark.parametrize("n", [2, 3, 8, 72])
def test_moved_bytes(n: int) -> None:
    size = 840.0 * n
    assert moved_bytes("all_gather", n, size) == (n - 1) * size
    assert moved_bytes("reduce_scatter", n, size) == pytest.approx((n - 1) / n * size)
    assert moved_bytes("all_to_all", n, size) == pytest.approx((n - 1) / n * size)
    assert moved_bytes("all_reduce", n, size) == pytest.approx(
        moved_bytes("reduce_scatter", n, size) + moved_bytes("all_gather", n, size / n)
    )
    assert moved_bytes("broadcast", n, size) == moved_bytes("send", n, size) == size


@pytest.mark.parametrize("axes", [TP, DP, ALL])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_an_all_reduce_costs_no_more_than_its_two_halves(axes: tuple[int, ...], size: float) -> None:
    n = np.prod([MESH.sizes[a] for a in axes])
    halves = collective_seconds(cluster(), MESH, "reduce_scatter", axes, size) + collective_seconds(
        cluster(), MESH, "all_gather", axes, size / n
    )
    whole = collective_seconds(cluster(), MESH, "all_reduce", axes, size)
    assert whole <= halves
    if axes == TP:
        assert whole == pytest.approx(halves - LAUNCH)


def test_a_group_that_spans_nodes_pays_the_slow_tier() -> None:
    for primitive in PRIMITIVES:
        same = Mesh.of(a=2, b=2)  # a: stride 2; b: stride 1
        inside = collective_seconds(cluster(2, 4), same, primitive, (0,), LARGE)
        across = collective_seconds(cluster(2, 2), same, primitive, (0,), LARGE)
        assert across / inside == pytest.approx(FAST / SLOW, rel=0.01)
        assert collective_seconds(cluster(2, 2), same, primitive, (1,), LARGE) == collective_seconds(
            cluster(2, 4), same, primitive, (1,), LARGE
        )


def test_placement_matters() -> None:
    """The axis with most bytes belongs inside the node: innermost beats outermost."""
    inner = collective_seconds(cluster(), Mesh.of(dp=4, tp=8), "all_reduce", (1,), LARGE)
    outer = collective_seconds(cluster(), Mesh.of(tp=8, dp=4), "all_reduce", (0,), LARGE)
    assert outer > 4 * inner


@pytest.mark.parametrize(
    ("mesh", "axes", "per_node", "spans"),
    [
        (Mesh.of(dp=4, tp=8), (1,), 8, {Span(8, 1, 8, 8)}),
        (Mesh.of(dp=4, tp=8), (0,), 8, {Span(4, 4, 1, 1)}),
        (Mesh.of(dp=4, tp=8), (0, 1), 8, {Span(32, 4, 8, 8)}),
        (Mesh.of(pp=2, dp=4, tp=4), (1,), 8, {Span(4, 2, 2, 2)}),
        (Mesh.of(pp=2, dp=4, tp=4), (0, 2), 8, {Span(8, 2, 4, 4)}),
        (Mesh.of(a=4, b=3), (1,), 8, {Span(3, 1, 3, 3), Span(3, 2, 2, 1)}),  # ranks 6, 7 | 8 lie on two nodes
        (Mesh.of(a=2, b=12), (1,), 8, {Span(12, 2, 8, 4)}),
    ],
)
def test_spans(mesh: Mesh, axes: tuple[int, ...], per_node: int, spans: set[Span]) -> None:
    assert set(group_spans(cluster(64, per_node), mesh, axes)) == spans


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), per_node=st.integers(1, 9), data=st.data())
def test_spans_equal_those_counted_rank_by_rank(sizes: list[int], per_node: int, data: st.DataObject) -> None:
    mesh = Mesh.of(**{f"a{i}": size for i, size in enumerate(sizes)})
    axes = tuple(data.draw(st.permutations(data.draw(st.lists(st.integers(0, len(sizes) - 1), unique=True)))))
    found = set()
    for group in mesh.groups(axes):
        members = Counter(rank // per_node for rank in group)
        found.add(Span(len(group), len(members), max(members.values()), min(members.values())))
    assert set(group_spans(cluster(1000, per_node), mesh, axes)) == found


@pytest.mark.parametrize(
    ("mesh", "axes"),
    [
        (MESH, TP),
        (MESH, DP),
        (MESH, ALL),
        (Mesh.of(pp=2, dp=4, tp=4), (1,)),
        (Mesh.of(pp=2, dp=4, tp=4), (0, 1)),
        (Mesh.of(x=2, y=2, z=8), (0, 2)),
    ],
)
def test_contention_counted_link_by_link(mesh: Mesh, axes: tuple[int, ...]) -> None:
    """All groups at once, all rings, every edge: no card or link carries more than the ring formula says."""
    per_node, size = 8, 1e6
    card, link = Counter(), Counter()
    for group in mesh.groups(axes):
        nodes = [list(members) for _, members in itertools.groupby(group, key=lambda rank: rank // per_node)]
        edge_bytes = (len(group) - 1) * size
        for ring in range(len(nodes[0])):  # ring r leaves every node through member r
            order = [rank for members in nodes for rank in (*members[ring + 1 :], *members[: ring + 1])]
            for here, there in zip(order, order[1:] + order[:1]):
                (link if here // per_node == there // per_node else card)[here] += edge_bytes / len(nodes[0])
    busiest = max(max(card.values(), default=0) / SLOW, max(link.values(), default=0) / FAST)
    (span,) = group_spans(cluster(), mesh, axes)
    latency = algorithm_seconds(cluster(), span, "all_gather", 0.0)["ring"]
    assert algorithm_seconds(cluster(), span, "all_gather", size)["ring"] - latency == pytest.approx(busiest)
    assert len(set(card.values())) <= 1  # the load is even: every device's card carries the same


def test_nvlink_rings_reach_the_published_bus_bandwidth() -> None:
    """Eight H100 with rings: 370 GB/s of bus bandwidth (NVIDIA/nccl-tests issue 212), n/(n-1) x size / time."""
    size = 8e9
    seconds = collective_seconds(Cluster.preset("h100-sxm"), Mesh.of(tp=8), "reduce_scatter", (0,), size)
    assert 7 / 8 * size / seconds == pytest.approx(370e9, rel=0.01)


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: collective_seconds(cluster(), MESH, "gather", TP, 1.0), "use one of all_reduce"),
        (lambda: moved_bytes("gather", 8, 1.0), "use one of all_reduce"),
        (lambda: algorithm_seconds(cluster(), Span(8, 1, 8, 8), "gather", 1.0), "use one of all_reduce"),
        (lambda: collective_seconds(cluster(1), MESH, "all_reduce", TP, 1.0), "32 ranks, cluster 'test' has 8 devices"),
        (lambda: collective_seconds(cluster(), MESH, "all_reduce", (2,), 1.0), "numbers from 0 to 1"),
        (lambda: collective_seconds(cluster(), MESH, "all_reduce", (-1,), 1.0), "numbers from 0 to 1"),
        (lambda: collective_seconds(cluster(), MESH, "all_reduce", (1, 1), 1.0), "different numbers"),
        (lambda: collective_seconds(cluster(), MESH, "all_reduce", TP, -1.0), "negative or undefined"),
        (lambda: collective_seconds(cluster(), MESH, "all_reduce", TP, np.array([1.0, np.nan])), "negative or undefined"),
    ],
)
def test_misuse_is_an_error(call, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        call()
