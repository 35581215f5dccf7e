"""Which elements of a whole tensor a rank holds: for every dimension, runs of neighbouring global indices.

A part is the product of its dimensions' runs, in ascending order, so that the local tensor is what the runs select from
the whole. A cut like a fused QKV projection's is several runs of one dimension.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from autopar.core.layout import Layout, shard_index
from autopar.core.mesh import Mesh


class Run(NamedTuple):
    """`length` neighbouring global indices from `start` on."""

    start: int
    length: int


Runs = tuple[Run, ...]
Part = tuple[Runs, ...]
"""The runs of every dimension; `()` is the one element of a tensor without dimensions."""

Slices = tuple[slice, ...]


@lru_cache(maxsize=4096)
def stored_part(layout: Layout, mesh: Mesh, coordinates: tuple[int, ...], shape: tuple[int, ...]) -> Part:
    """The part that the rank at `coordinates` holds of a tensor stored in `layout`. The only place that knows how storage is cut."""
    return tuple(runs_of(indices) for indices in shard_index(layout, mesh, coordinates, shape))


def runs_of(indices: Sequence[int]) -> Runs:
    """Ascending indices as runs."""
    starts = [n for n, i in enumerate(indices) if n == 0 or indices[n - 1] != i - 1]
    return tuple(Run(indices[a], b - a) for a, b in itertools.pairwise([*starts, len(indices)]))


def whole(shape: Sequence[int]) -> Part:
    """Everything."""
    return tuple((Run(0, n),) if n else () for n in shape)


def part_shape(part: Part) -> tuple[int, ...]:
    """Shape of the local tensor."""
    return tuple(sum(run.length for run in runs) for runs in part)


def num_elements(part: Part) -> int:
    return math.prod(part_shape(part))


def fits(part: Part, shape: Sequence[int]) -> bool:
    """Whether the runs are ascending, not empty and within a tensor of this shape."""
    return len(part) == len(shape) and all(_runs_fit(runs, n) for runs, n in zip(part, shape))


def _runs_fit(runs: Runs, size: int) -> bool:
    end = 0
    for start, length in runs:
        if start < end or length < 1:
            return False
        end = start + length
    return end <= size


def overlaps(held: Part, wanted: Part) -> Iterator[tuple[Slices, Slices]]:
    """What two parts of one tensor share: (slices of the held local tensor, slices of the wanted one), box by box."""
    for box in itertools.product(*(list(_shared(a, b)) for a, b in zip(held, wanted, strict=True))):
        yield tuple(source for source, _ in box), tuple(target for _, target in box)


def _shared(held: Runs, wanted: Runs) -> Iterator[tuple[slice, slice]]:
    """The same of one dimension: a merge of two ascending lists."""
    i = j = at_held = at_wanted = 0  # run numbers, and where the runs begin locally
    while i < len(held) and j < len(wanted):
        a, b = held[i], wanted[j]
        first, end = max(a.start, b.start), min(a.start + a.length, b.start + b.length)
        if first < end:
            source, target = at_held + first - a.start, at_wanted + first - b.start
            yield slice(source, source + end - first), slice(target, target + end - first)
        if a.start + a.length <= b.start + b.length:
            at_held, i = at_held + a.length, i + 1
        else:
            at_wanted, j = at_wanted + b.length, j + 1
