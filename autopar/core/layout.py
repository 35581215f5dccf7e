"""How a tensor lies over a mesh: one placement per mesh axis.

Four placements, the SPMD type system of a differentiable program (the R/I/V/P of `spmd_types`):

=============  =======================================  ===========================
value          what a rank holds                        what its *gradient* is
=============  =======================================  ===========================
``S(d)``       its slice of dimension d                 the same slice (``S(d)``)
``R``          the whole value                          a partial sum (``P``)
``I``          the whole value                          the whole gradient (``I``)
``P``          one addend of the value                  the whole gradient (``R``)
=============  =======================================  ===========================

``R`` is how an operator sees an operand that lacks a factor it cuts; ``I`` is how replicated computation
sees it. For a tensor that carries no gradient the two are the same.

``S(d, outer=k)`` views dimension d as (k, n/k) and cuts the second part: how a fused QKV projection is cut by
heads. Axes on the same (dim, outer) nest in mesh order.

A fifth, ``U(d)``, only says how a parameter is *stored* where no even cut fits: dimension d in pieces of ceil(n / ranks),
the last ones shorter or empty (`torch.chunk`, and what DTensor means by Shard). No operator computes on it.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from autopar.core.mesh import Mesh
from autopar.errors import LayoutError


class Placement(NamedTuple):
    """The state of a tensor on one mesh axis. Use `S(dim)`, `R`, `I` and `P` rather than the constructor."""

    kind: str
    dim: int = -1
    outer: int = 1

    def __str__(self) -> str:
        if self.kind not in "SU":
            return self.kind
        return f"{self.kind}{self.dim}" if self.outer == 1 else f"S{self.dim}/{self.outer}"

    __repr__ = __str__


def S(dim: int, outer: int = 1) -> Placement:  # noqa: N802, E743 - the field's own letters
    """Cut along `dim` (viewed as (outer, n/outer), the second part is cut)."""
    return Placement("S", dim, outer)


def U(dim: int) -> Placement:  # noqa: N802 - like S
    """Stored in pieces of ceil(n / ranks) along `dim`."""
    return Placement("U", dim)


R = Placement("R")
I = Placement("I")  # noqa: E741
P = Placement("P")

Layout = tuple[Placement, ...]


def parse_placement(text: str) -> Placement:
    """Inverse of `str(placement)`; raises LayoutError for anything else."""
    if text in ("R", "I", "P"):
        return Placement(text)
    match = re.fullmatch(r"S(\d{1,6})(?:/([1-9]\d{0,8}))?", text, re.ASCII)
    if match:
        return S(int(match[1]), int(match[2] or 1))
    raise LayoutError(f"placement {text!r} is not one of S<dim>, S<dim>/<outer>, R, I, P")


def format_layout(layout: Layout, mesh: Mesh) -> str:
    """`dp=S0,tp=R`."""
    return ",".join(f"{axis.name}={placement}" for axis, placement in zip(mesh.axes, layout))


def local_shape(shape: Sequence[int], layout: Layout, mesh: Mesh) -> tuple[int, ...]:
    """Shape of one rank's part (the largest where pieces are uneven); raises LayoutError where an even cut does not divide."""
    local = list(shape)
    for axis, placement in zip(mesh.axes, layout):
        if placement.kind == "U":
            local[placement.dim] = -(-local[placement.dim] // axis.size)
        if placement.kind != "S":
            continue
        size = local[placement.dim]
        if size % axis.size:
            raise LayoutError(f"dimension {placement.dim} of shape {tuple(shape)} leaves {size}, which axis {axis.name}={axis.size} does not divide")
        local[placement.dim] = size // axis.size
    return tuple(local)


def cut_of_dim(layout: Layout, mesh: Mesh, dim: int) -> int:
    """In how many parts a dimension is cut."""
    return math.prod(axis.size for axis, p in zip(mesh.axes, layout) if p.kind == "S" and p.dim == dim)


def local_outer(layout: Layout, mesh: Mesh, axis: int) -> int:
    """How many blocks the cut digit of `layout[axis]` repeats over *inside one rank's part* of its dimension.

    Cuts of the same dimension with a smaller `outer` have already shortened the part in front of the digit.
    """
    placement = layout[axis]
    shorter = math.prod(
        mesh.axes[i].size
        for i, other in enumerate(layout)
        if i != axis and other.kind == "S" and other.dim == placement.dim and other.outer < placement.outer
    )
    if placement.outer % shorter:
        raise LayoutError(f"cuts of dimension {placement.dim} in {format_layout(layout, mesh)} do not nest")
    return placement.outer // shorter


def shard_index(layout: Layout, mesh: Mesh, coordinates: Sequence[int], shape: Sequence[int]) -> tuple[list[int], ...]:
    """For every dimension, the global indices that the rank at `coordinates` holds, in local order.

    The definition that everything else is tested against.
    """
    indices = [list(range(n)) for n in shape]
    for dim in range(len(shape)):
        cuts = [(p.outer, i) for i, p in enumerate(layout) if p.kind == "S" and p.dim == dim]
        for outer, i in sorted(cuts):
            blocks = local_outer(layout, mesh, i)
            row = len(indices[dim]) // blocks
            part, rest = divmod(row, mesh.axes[i].size)
            if rest:
                raise LayoutError(f"axis {mesh.axes[i].name} does not divide dimension {dim} of {tuple(shape)}")
            first = coordinates[i] * part
            indices[dim] = [indices[dim][b * row + first + k] for b in range(blocks) for k in range(part)]
    for i, p in enumerate(layout):
        if p.kind == "U":
            part = -(-len(indices[p.dim]) // mesh.axes[i].size)
            indices[p.dim] = indices[p.dim][coordinates[i] * part : (coordinates[i] + 1) * part]
    return tuple(indices)
