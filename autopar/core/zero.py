"""ZeRO: when a parameter moves between the layout it is stored in and the layout it is used in.

Stage 0: stored as used. 1: the optimizer's copy is cut over `axes`, the working copy is gathered once per step, gradients are
reduce-scattered once per step. 2: gradients are reduce-scattered as they appear, every microbatch. 3: no working copy is kept:
it is gathered where it is used, forward and backward. (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 5.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autopar.core.layout import I, Layout, S, U, local_outer, local_shape
from autopar.core.mesh import Mesh
from autopar.errors import LayoutError, UsageError


@dataclass(frozen=True, slots=True)
class Zero:
    """How one parameter is sharded between uses: `stage` 1 to 3 over mesh axes `axes` (ascending)."""

    stage: int
    axes: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.stage not in (1, 2, 3) or not self.axes or list(self.axes) != sorted(set(self.axes)):
            raise UsageError(f"ZeRO stage {self.stage} over axes {self.axes}: stages are 1 to 3, axes ascending and at least one")


def zero_layout(shape: Sequence[int], used: Layout, axes: Sequence[int], mesh: Mesh) -> Layout:
    """`used` (S and I) with the parameter also cut over `axes`; unchanged where the tensor is too small to be cut at all.

    The first dimension that the ranks divide is cut, inside the part that `used` leaves; where there is none, the longest
    uncut one in uneven pieces.
    """
    ranks = math.prod(mesh.sizes[a] for a in axes)
    if ranks == 1 or any(used[a] != I for a in axes):
        return used
    for dim in range(len(shape)):
        outer = _inside(used, mesh, dim)
        cut = tuple(S(dim, outer) if a in axes else p for a, p in enumerate(used))
        if shape[dim] % (outer * ranks) == 0 and _nests(cut, shape, mesh, axes[0]):
            return cut
    free = [d for d in range(len(shape)) if not any(p.kind == "S" and p.dim == d for p in used) and shape[d] > 1]
    if not free:
        return used
    dim = max(free, key=lambda d: (shape[d], -d))
    return tuple(U(dim) if a in axes else p for a, p in enumerate(used))


def _inside(layout: Layout, mesh: Mesh, dim: int) -> int:
    """The `outer` of a digit that lies behind all cuts of a dimension."""
    digits: dict[int, int] = {}
    for axis, p in zip(mesh.axes, layout):
        if p.kind == "S" and p.dim == dim:
            digits[p.outer] = digits.get(p.outer, 1) * axis.size
    return max((outer * size for outer, size in digits.items()), default=1)


def _nests(layout: Layout, shape: Sequence[int], mesh: Mesh, axis: int) -> bool:
    try:
        local_outer(layout, mesh, axis)
        local_shape(shape, layout, mesh)
    except LayoutError:
        return False
    return True
