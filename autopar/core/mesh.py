"""A logical mesh of ranks: named axes, outermost first (the last axis varies fastest over ranks)."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from autopar.errors import LayoutError


@dataclass(frozen=True, slots=True)
class MeshAxis:
    """One axis of a mesh: a name unique in the mesh and the number of ranks along it."""

    name: str
    size: int


@dataclass(frozen=True)
class Mesh:
    """Ranks 0..num_ranks-1 laid out row-major over `axes`."""

    axes: tuple[MeshAxis, ...]

    def __post_init__(self) -> None:
        names = [axis.name for axis in self.axes]
        if len(set(names)) != len(names):
            raise LayoutError(f"mesh axes {names} repeat a name; give every axis its own")
        for axis in self.axes:
            if axis.size < 1:
                raise LayoutError(f"mesh axis {axis.name!r} has size {axis.size}; sizes start at 1")

    @classmethod
    def of(cls, **sizes: int) -> "Mesh":
        """Mesh.of(dp=2, tp=4): dp outermost."""
        return cls(tuple(MeshAxis(name, size) for name, size in sizes.items()))

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(axis.name for axis in self.axes)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @cached_property
    def num_ranks(self) -> int:
        return math.prod(self.sizes)

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Distance in rank numbers between neighbours along each axis."""
        return tuple(math.prod(self.sizes[i + 1 :]) for i in range(len(self.axes)))

    def coordinates(self, rank: int) -> tuple[int, ...]:
        return tuple(rank // stride % size for stride, size in zip(self.strides, self.sizes))

    def group(self, rank: int, axes: Iterable[int]) -> tuple[int, ...]:
        """The ranks that agree with `rank` on every axis not in `axes`, in mesh order."""
        free = set(axes)
        own = self.coordinates(rank)
        spans = [range(size) if i in free else (own[i],) for i, size in enumerate(self.sizes)]
        return tuple(sum(c * s for c, s in zip(point, self.strides)) for point in itertools.product(*spans))

    def groups(self, axes: Iterable[int]) -> tuple[tuple[int, ...], ...]:
        """All groups of `axes`, ordered by their first rank."""
        chosen = tuple(axes)
        return tuple(sorted({self.group(rank, chosen) for rank in range(self.num_ranks)}))

    def __str__(self) -> str:
        return " x ".join(f"{axis.name}{axis.size}" for axis in self.axes) or "1"
