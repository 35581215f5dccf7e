"""Cutting and joining local tensors along one digit of one dimension."""

from collections.abc import Sequence

import torch


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
