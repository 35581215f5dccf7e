"""Cutting and joining local tensors along one digit of one dimension."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autopar.core.layout import Layout, local_outer, local_shape, shard_index
from autopar.core.mesh import Mesh


def cut(x: torch.Tensor, dim: int, outer: int, parts: int) -> list[torch.Tensor]:
    """Equal pieces of dimension `dim`, viewed as (outer, rest), along the rest."""
    if outer == 1:
        return list(x.chunk(parts, dim))
    return [piece.flatten(dim, dim + 1) for piece in x.unflatten(dim, (outer, -1)).chunk(parts, dim + 1)]


def join(pieces: Sequence[torch.Tensor], dim: int, outer: int) -> torch.Tensor:
    """Inverse of `cut`."""
    if outer == 1:
        return torch.cat(tuple(pieces), dim)
    return torch.cat([p.unflatten(dim, (outer, -1)) for p in pieces], dim + 1).flatten(dim, dim + 1)


def embed(x: torch.Tensor, dim: int, outer: int, parts: int, index: int) -> torch.Tensor:
    """The piece `x` at its place among zeros."""
    zero = torch.zeros_like(x)
    return join([x if i == index else zero for i in range(parts)], dim, outer)


@dataclass(frozen=True)
class Cut:
    """How a rank's working tensor of `shape` divides into the stored parts of the members of one group, in group order.

    Parts may be uneven or empty; `padded` elements are what each member sends.
    """

    shape: tuple[int, ...]
    dim: int
    outer: int
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int], used: Layout, stored: Layout, mesh: Mesh, rank: int, axes: Sequence[int]) -> "Cut":
        """The cut between a parameter's layout in use and in storage, over `axes`, for the group of `rank`."""
        axis = next((a for a in axes if stored[a] != used[a]), None)
        working = local_shape(shape, used, mesh)
        if axis is None:
            return cls(working, 0, 1, (working[0] if working else 1,))
        dim = stored[axis].dim
        outer = local_outer(stored, mesh, axis) if stored[axis].kind == "S" else 1
        sizes = tuple(len(shard_index(stored, mesh, mesh.coordinates(r), shape)[dim]) for r in mesh.group(rank, axes))
        return cls(working, dim, outer, sizes)

    @property
    def even(self) -> bool:
        return len(set(self.sizes)) == 1

    def part_shape(self, member: int) -> tuple[int, ...]:
        return tuple(self.sizes[member] if d == self.dim else n for d, n in enumerate(self.shape))

    def numel(self, member: int) -> int:
        return math.prod(self.part_shape(member))

    @property
    def padded(self) -> int:
        return max(self.numel(m) for m in range(len(self.sizes)))

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every member's part of a working tensor."""
        if len(self.sizes) == 1:
            return [x]
        return cut(x, self.dim, self.outer, len(self.sizes)) if self.even else list(x.split(self.sizes, self.dim))

    def join(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """The working tensor from every member's flat, padded part."""
        parts = [row[: self.numel(m)].view(self.part_shape(m)) for m, row in enumerate(rows)]
        return parts[0] if len(parts) == 1 else join(parts, self.dim, self.outer)
