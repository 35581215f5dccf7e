"""Redistribution steps: what changes one mesh axis of a layout costs, and its adjoint.

A step changes the placement of one axis. Its forward primitive and its backward primitive are adjoint to each
other under the gradient rule of `layout.py` (the gradient of S is S, of R is P, of I is I, of P is R).
"""

from collections.abc import Sequence
from typing import NamedTuple

from autopar.core.layout import Layout, Placement
from autopar.core.mesh import Mesh

TRANSFERS = ("to_host", "to_device")
"""Copies between a rank's device and its host."""

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")

PRIMITIVES: dict[tuple[str, str], tuple[str, str]] = {
    ("S", "I"): ("all_gather", "slice"),
    ("S", "R"): ("all_gather", "reduce_scatter"),
    ("S", "S"): ("all_to_all", "all_to_all"),
    ("S", "P"): ("embed", "slice"),
    ("I", "S"): ("slice", "all_gather"),
    ("I", "R"): ("identity", "all_reduce"),
    ("I", "P"): ("mask", "identity"),
    ("R", "S"): ("slice", "embed"),
    ("R", "I"): ("identity", "mask"),
    ("R", "P"): ("mask", "mask"),
    ("P", "I"): ("all_reduce", "identity"),
    ("P", "R"): ("all_reduce", "all_reduce"),
    ("P", "S"): ("reduce_scatter", "all_gather"),
}
"""(from, to) -> (forward primitive, backward primitive).

slice: keep the own part; embed: the own part in zeros; mask: the value on the first rank of the group, zeros elsewhere.
"""


class Step(NamedTuple):
    """One axis of a layout changes from `src` to `dst`."""

    axis: int
    src: Placement
    dst: Placement

    @property
    def forward(self) -> str:
        return PRIMITIVES[self.src.kind, self.dst.kind][0]

    @property
    def backward(self) -> str:
        return PRIMITIVES[self.src.kind, self.dst.kind][1]

    def apply(self, layout: Layout) -> Layout:
        return (*layout[: self.axis], self.dst, *layout[self.axis + 1 :])


def is_innermost(layout: Layout, axis: int) -> bool:
    """Whether the cut of `axis` is the last of those that nest in the same digit: only that one moves alone."""
    placement = layout[axis]
    return placement.kind != "S" or not any(other == placement for other in layout[axis + 1 :])


def legal_step(layout: Layout, step: Step) -> bool:
    """Whether one primitive does this step without touching another axis."""
    if step.src == step.dst or (step.src.kind, step.dst.kind) not in PRIMITIVES:
        return False
    if step.src.kind == step.dst.kind == "S" and step.src.dim == step.dst.dim:
        return False
    return is_innermost(layout, step.axis) and is_innermost(step.apply(layout), step.axis)


def moved_bytes(primitive: str, group_size: int, local_bytes: float) -> float:
    """Bytes one rank receives, for a primitive whose input on a rank has `local_bytes` (ring or pairwise algorithms)."""
    n = group_size
    if primitive in TRANSFERS or primitive == "receive":  # a "send" is received elsewhere
        return local_bytes
    if n <= 1:
        return 0.0
    if primitive == "all_reduce":
        return 2 * (n - 1) / n * local_bytes
    if primitive == "all_gather":
        return (n - 1) * local_bytes
    if primitive in ("reduce_scatter", "all_to_all"):
        return (n - 1) / n * local_bytes
    return 0.0


def step_input_bytes(primitive: str, step: Step, mesh: Mesh, src_bytes: float, *, backward: bool) -> float:
    """Local input bytes of a step's primitive, given the local bytes of the value before the (forward) step."""
    if not backward:
        return src_bytes
    n = mesh.axes[step.axis].size
    if step.src.kind == "S" and step.dst.kind != "S":
        return src_bytes * n
    if step.dst.kind == "S" and step.src.kind != "S":
        return src_bytes / n
    return src_bytes


def apply_steps(layout: Layout, steps: Sequence[Step]) -> Layout:
    for step in steps:
        layout = step.apply(layout)
    return layout
