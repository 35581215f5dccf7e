"""What searches of one model found out, for the next one: on the same machine with other memory, on another machine, for another batch.

Tables hold for every limit of memory. Bounds hold elsewhere, if less tightly: every collective of a mesh is a monotone function, homogeneous of degree one, of
the latencies, the seconds per byte and the launch that it is made of. So where all of these are at least r times (r <= 1) what they were, and operators take what
they took, a plan of o seconds of operators and c of communication, which took f = o + c, takes at least

    o + r c  =  r f + (1 - r) o

where o is no less than what its operators take at least (`PointTables.operators`). The seconds of n microbatches and of what is once a step are n p + q; those
of n' are at least n'/n of that where n' < n, and at least (n' - n) p more where n' > n. With a price of memory r (f + p m) + (1 - r) o <= f' + (r p) m: a line
at price p stands for one at r p.

Plans and bounds are those of a search that knows nothing: points are planned in the order of bounds of their own, and what is known only tells that one need not be
computed yet.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from autopar.core.cluster import Cluster
from autopar.core.device import Link
from autopar.joint.asked import Asked
from autopar.joint.bounds import Line, Parts
from autopar.joint.deep import Sharding
from autopar.joint.even import Held
from autopar.joint.space import Point

LARGEST = 192
"""Points whose tables are kept."""

ANSWERS = 4
"""Questions whose answers are kept."""

PROVED = 4
"""Searches whose bounds are kept, for each mesh and size of microbatches, and limits of memory for each point."""

BOUNDED = 4096
"""Points whose bounds at limits of memory are kept."""

LINES = 6
"""Prices of memory that are looked at for one rank."""

SAFE = 1 - 6e-4
"""Bounds from elsewhere are taken for so much less, so that none is above that which the search itself would find: twice the `at_point.TOLERANCE` of those."""

T = TypeVar("T")


@dataclass(frozen=True)
class Tried:
    """What became of a point that was planned: how long a step takes, within which limit, by how many stages a rank and which sharding, and what questions found that.
    No sharding: a step takes no less, or hardly."""

    point: Point
    step_s: float
    limit_bytes: float
    virtual: int = 1
    sharding: Sharding | None = None
    asked: tuple[Asked, ...] = ()


@dataclass(frozen=True)
class Flat:
    """What a rank does of a step at a price of a byte with so many microbatches in flight: the seconds of a block, its bytes included."""

    flight: float
    price: float
    block_s: float


@dataclass(frozen=True)
class Told:
    """Of a point: no plan within a limit takes less; and see `Proved`."""

    limit_bytes: float
    least_s: float
    parts: Mapping[str, Parts]
    lines: Mapping[str, tuple[Flat, ...]]


@dataclass(frozen=True)
class Proved:
    """Of a point on a cluster: the least seconds of a step's parts, and under prices of memory, by side (`bounds.sides`); and of its operators alone."""

    cluster: Cluster
    point: Point
    operators: Parts
    parts: Mapping[str, Parts]
    lines: Mapping[str, tuple[Flat, ...]]


@dataclass(frozen=True)
class Floors:
    """Under what a point's plans cost, by side."""

    parts: Mapping[str, Parts]
    flats: Mapping[str, tuple[Flat, ...]]

    def of_part(self, share: float) -> "Floors":
        """Of microbatches that are so many times as large. They take no less for each sample: kernels and messages are the dearer the smaller they are."""
        return replace(self, flats={side: tuple([replace(flat, flight=flat.flight / share) for flat in flats]) for side, flats in self.flats.items()})

    def lines(self, side: str, flight: float, limit_bytes: float) -> list[Line]:
        """For a rank with so many microbatches in flight: those of fewer hold for it too."""
        return [Line(flat.block_s, flat.price * limit_bytes, flat.price) for flat in self._near(side, flight)]

    def held(self, side: str, flights: Sequence[int], free_s: float) -> list[Held]:
        """The same by stage; blocks take `free_s` at least."""
        return [Held(flat.price, {flight: flat.block_s if flat.flight <= flight else free_s for flight in flights}) for flat in self._near(side, max(flights))]

    def _near(self, side: str, flight: float) -> list[Flat]:
        return sorted((flat for flat in self.flats.get(side, ()) if flat.flight <= flight * (1 + 1e-9)), key=lambda flat: -flat.flight)[:LINES]


@dataclass
class Recent:
    """At most so many values; what was used least lately goes first."""

    most: int
    _values: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict)

    def get(self, key: Hashable) -> Any:
        """None where it is not kept."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def items(self) -> list[tuple[Any, Any]]:
        """What was put last comes last."""
        return list(self._values.items())

    def put(self, key: Hashable, value: object) -> None:
        self._values[key] = value
        while len(self._values) > self.most:
            self._values.popitem(last=False)


@dataclass
class Known:
    """Of one model and one way to train it. It grows to its limits and no further. `answers`: to whole questions, by all that they depend on."""

    answers: Recent = field(default_factory=lambda: Recent(ANSWERS))
    ideal: Recent = field(default_factory=lambda: Recent(ANSWERS))
    """See `Ideal`: of all points of a question."""
    took_s: dict[str, float] = field(default_factory=dict)
    """See `Clock`."""
    shares: dict[Point, float] = field(default_factory=dict)
    """What three blocks saw of the bytes of plans that then did not fit: so much of a limit is what the next plan of that point is made for in a hurry."""
    _kept: Recent = field(default_factory=lambda: Recent(LARGEST))
    _tried: Recent = field(default_factory=lambda: Recent(ANSWERS))
    _proved: dict[Hashable, list[Proved]] = field(default_factory=dict)
    _bounds: Recent = field(default_factory=lambda: Recent(BOUNDED))
    """By point with all that its bounds depend on: some of them, by limit of memory."""

    def kept(self, key: Hashable, make: Callable[[], T]) -> T:
        found = self._kept.get(key)
        if found is None:
            found = make()
            self._kept.put(key, found)
        return found

    def add_tried(self, about: Hashable, question: Hashable, found: Iterable[Tried]) -> None:
        """Of a `question` on what it is `about`, whatever the limit of memory; what follows on a point takes the place of what was there."""
        several = self._tried.get((about, question)) or {}
        several.update((tried.point, tried) for tried in found)
        self._tried.put((about, question), several)

    def tried(self, about: Hashable, question: Hashable) -> tuple[list[Tried], bool]:
        """Of the question, or else of the one before it; the fastest first. Whether it is of the question."""
        several = [found for (what, asked), found in self._tried.items() if what == about and asked == question]
        lately = several or [found for (what, _), found in self._tried.items() if what == about]
        return sorted(lately[-1].values(), key=lambda tried: tried.step_s) if lately else [], bool(several)

    def add(self, about: Hashable, proved: Proved) -> None:
        """`about`: what else the bounds depend on."""
        found = self._proved.setdefault((about, _place(proved.point, proved.cluster)), [])
        found[:] = [p for p in found if (p.cluster, p.point) != (proved.cluster, proved.point)][-PROVED + 1 :] + [proved]

    def add_bound(self, about: Hashable, limit_bytes: float, least_s: float) -> None:
        """No plan within a limit takes less. What was known of the limits before is kept too."""
        known = self._bounds.get(about) or {}
        others = [item for item in known.items() if item[0] != limit_bytes][-PROVED + 1 :]
        self._bounds.put(about, {**dict(others), limit_bytes: max(least_s, known.get(limit_bytes, 0.0))})

    def bound(self, about: Hashable, limit_bytes: float) -> float:
        """What is known of plans within a limit from this one and larger ones."""
        return SAFE * max((least for limit, least in (self._bounds.get(about) or {}).items() if limit >= limit_bytes), default=0.0)

    def floors(self, about: Hashable, point: Point, cluster: Cluster, ideal: Parts) -> Floors | None:
        """What is known of a point; `ideal`: its operators take no less of a step. None where nothing is."""
        parts: dict[str, Parts] = {}
        flats: dict[str, tuple[Flat, ...]] = {}
        for proved in self._proved.get((about, _place(point, cluster)), ()):
            ratio = least_ratio(proved.cluster, cluster)
            fewer, more = _fewer(proved.point, point, cluster)
            if not ratio or fewer is None:
                continue
            operators = proved.operators.times(point.num_microbatches / proved.point.num_microbatches)
            for side, old in proved.parts.items():
                least = _mapped(lambda f, o: ratio * fewer * f + (1 - ratio) * o, old, operators)
                if side == "passes" or "passes" in proved.parts:
                    least = _mapped(lambda f, p: f + ratio * more * p, least, proved.parts["passes"])
                parts[side] = _mapped(max, parts.get(side, ideal), least.times(SAFE))
            factor = ratio * fewer
            for side, lines in proved.lines.items():
                flats[side] = flats.get(side, ()) + tuple(Flat(n.flight, n.price * factor, SAFE * (n.block_s * factor + (1 - ratio) * operators.block)) for n in lines)
        return Floors(parts, flats) if parts else None


def without_memory(cluster: Cluster) -> Cluster:
    """What tables depend on."""
    return replace(cluster, name="", device=replace(cluster.device, memory_bytes=1))


def least_ratio(before: Cluster, after: Cluster) -> float:
    """What share of its seconds every collective still takes at least, up to 1; 0 where more than the numbers of links, nodes and memory has changed."""
    links = [(before.intra_node, after.intra_node), (before.inter_node, after.inter_node)]
    same = replace(without_memory(after), num_nodes=before.num_nodes, intra_node=before.intra_node, inter_node=before.inter_node)
    if same != without_memory(before) or not all(_alike(old, new) for old, new in links):
        return 0.0
    latencies = [new.latency_s / old.latency_s for old, new in links if old.latency_s]
    return min(1.0, *latencies, *(old.bandwidth_bytes_per_s / new.bandwidth_bytes_per_s for old, new in links))


def binds(one: Cluster, other: Cluster) -> bool:
    """Whether more of what is known of one machine holds on the other than the other way round: it has faster links, or more memory."""
    there, back = least_ratio(one, other), least_ratio(other, one)
    return there > back or (there == back and one.device.memory_bytes > other.device.memory_bytes)


def _alike(old: Link, new: Link) -> bool:
    """Whether two links differ in latency and bandwidth alone."""
    return old == replace(new, latency_s=old.latency_s, bandwidth_bytes_per_s=old.bandwidth_bytes_per_s, source=old.source)


def _place(point: Point, cluster: Cluster) -> Hashable:
    """What a mesh's groups span depends on the ranks of the pipeline where its stages do not begin and end with nodes or parts of them."""
    size, node = point.mesh.num_ranks, cluster.devices_per_node
    return point.outer, point.inner, point.names, point.samples, None if size % node == 0 or node % size == 0 else point.num_ranks


def _fewer(proved: Point, point: Point, cluster: Cluster) -> tuple[float | None, float]:
    """The share of a step that is left with fewer microbatches, and how many times the passes of a step come on top with more. A calibrated optimizer adds
    gradients up from the second microbatch on, which is no such sum."""
    ratio = point.num_microbatches / proved.num_microbatches
    if ratio != 1.0 and cluster.host.update_bytes_per_s:
        return None, 0.0
    return min(1.0, ratio), max(0.0, ratio - 1.0)


def _mapped(make: Callable[[float, float], float], one: Parts, other: Parts) -> Parts:
    return Parts(make(one.block, other.block), make(one.first, other.first), make(one.last, other.last))
