"""Shortest redistribution between any two layouts of one tensor, forward and backward priced together."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autopar.core.layout import I, Layout, P, R, S, local_shape
from autopar.core.mesh import Mesh
from autopar.core.moves import Step, legal_step, step_input_bytes
from autopar.errors import LayoutError

StepPrice = Callable[[str, int, float], float]
"""(primitive, mesh axis, local input bytes) -> seconds."""


def layout_space(shape: Sequence[int], mesh: Mesh, cuts: Sequence[tuple[int, int]], *, grad: bool, partial: bool = True) -> tuple[Layout, ...]:
    """All layouts of a tensor whose cuts are among `cuts` = (dim, outer) and divide. Without gradient R is I."""
    states = [I] + ([R] if grad else []) + ([P] if partial else []) + [S(dim, outer) for dim, outer in cuts]
    per_axis = [states if axis.size > 1 else [I] for axis in mesh.axes]
    return tuple(layout for layout in itertools.product(*per_axis) if _fits(shape, layout, mesh))


def _fits(shape: Sequence[int], layout: Layout, mesh: Mesh) -> bool:
    digits: dict[tuple[int, int], int] = {}
    for axis, p in zip(mesh.axes, layout):
        if p.kind == "S":
            digits[p.dim, p.outer] = digits.get((p.dim, p.outer), 1) * axis.size
    for dim in {dim for dim, _ in digits}:
        position = 1
        for outer, parts in sorted((o, k) for (d, o), k in digits.items() if d == dim):
            if outer % position or shape[dim] % (outer * parts):
                return False
            position = outer * parts
    return True


@dataclass(frozen=True)
class Redistribution:
    """All-pairs shortest paths between the layouts of one tensor. `seconds[i, j]` includes the backward if `grad`."""

    shape: tuple[int, ...]
    item_bytes: int
    mesh: Mesh
    layouts: tuple[Layout, ...]
    grad: bool
    price: StepPrice

    @cached_property
    def index(self) -> dict[Layout, int]:
        return {layout: i for i, layout in enumerate(self.layouts)}

    @cached_property
    def _local_bytes(self) -> list[float]:
        sizes = (local_shape(self.shape, layout, self.mesh) for layout in self.layouts)
        return [float(np.prod(size, dtype=np.float64)) * self.item_bytes for size in sizes]

    @cached_property
    def _solved(self) -> tuple[np.ndarray, np.ndarray]:
        """Floyd-Warshall over single-axis steps: distances and the first hop of every path."""
        n = len(self.layouts)
        dist = np.full((n, n), np.inf)
        hop = np.full((n, n), -1, dtype=np.int32)
        np.fill_diagonal(dist, 0.0)
        for i, j, step in self._steps():
            dist[i, j] = self._step_seconds(step, self._local_bytes[i])
            hop[i, j] = j
        for k in range(n):
            through = dist[:, k, None] + dist[None, k, :]
            better = through < dist * (1 - 1e-12)
            dist = np.where(better, through, dist)
            hop = np.where(better, hop[:, k, None], hop)
        return dist, hop

    def _steps(self) -> list[tuple[int, int, Step]]:
        states = [sorted({layout[a] for layout in self.layouts}) for a in range(len(self.mesh.axes))]
        found = []
        for i, layout in enumerate(self.layouts):
            for axis, options in enumerate(states):
                for dst in options:
                    step = Step(axis, layout[axis], dst)
                    j = self.index.get(step.apply(layout), -1)
                    if j >= 0 and legal_step(layout, step):
                        found.append((i, j, step))
        return found

    def _step_seconds(self, step: Step, src_bytes: float) -> float:
        seconds = self.price(step.forward, step.axis, src_bytes)
        if self.grad:
            back = step_input_bytes(step.backward, step, self.mesh, src_bytes, backward=True)
            seconds += self.price(step.backward, step.axis, back)
        return seconds

    @property
    def seconds(self) -> np.ndarray:
        return self._solved[0]

    def path(self, src: Layout, dst: Layout) -> tuple[Step, ...]:
        """Cheapest steps from one layout to another; raises LayoutError where there is none."""
        i, j = self.index[src], self.index[dst]
        hops = self._solved[1]
        steps: list[Step] = []
        while i != j:
            k = int(hops[i, j])
            if k < 0:
                raise LayoutError(f"no way from layout {src} to {dst}")
            here, there = self.layouts[i], self.layouts[k]
            axis = next(a for a in range(len(here)) if here[a] != there[a])
            steps.append(Step(axis, here[axis], there[axis]))
            i = k
        return tuple(steps)
