"""Shortest redistribution between any two layouts of one tensor, forward and backward priced together."""

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from autopar.core.layout import I, Layout, P, R, S
from autopar.core.mesh import Mesh
from autopar.core.moves import COLLECTIVES, Step, legal_step, step_input_bytes
from autopar.errors import LayoutError

StepPrice = Callable[[str, int, float], float]
"""(primitive, mesh axis, local input bytes) -> seconds."""

RELATIVE_TIE = 1e-12
"""Routes whose seconds differ by less than this share are equally good: the difference is rounding."""

TARGETS_AT_ONCE = 96
"""Columns of the table of distances that are worked on together: with 500 layouts 400 kB, which stays in a second-level cache."""


def layout_space(shape: Sequence[int], mesh: Mesh, cuts: Sequence[tuple[int, int]], *, grad: bool, partial: bool = True) -> tuple[Layout, ...]:
    """All layouts of a tensor whose cuts are among `cuts` = (dim, outer) and divide. Without gradient R is I."""
    sizes = mesh.sizes
    together = sorted({math.prod(some) for n in range(1, len(sizes) + 1) for some in itertools.combinations(sizes, n)})
    dividing = frozenset([(dim, outer * parts) for dim, outer in cuts for parts in together if shape[dim] % (outer * parts) == 0])
    return _layout_space(sizes, tuple(cuts), grad, partial, dividing)


@lru_cache(maxsize=1024)
def _layout_space(sizes: tuple[int, ...], cuts: tuple[tuple[int, int], ...], grad: bool, partial: bool, dividing: Set[tuple[int, int]]) -> tuple[Layout, ...]:
    """`dividing`: (dim, number) of every number of parts that axes may cut a dimension into and that divides it."""
    states = [I] + ([R] if grad else []) + ([P] if partial else []) + [S(dim, outer) for dim, outer in cuts]
    per_axis = [states if size > 1 else [I] for size in sizes]
    return tuple(layout for layout in itertools.product(*per_axis) if _fits(layout, sizes, dividing))


def _fits(layout: Layout, sizes: Sequence[int], dividing: Set[tuple[int, int]]) -> bool:
    digits: dict[tuple[int, int], int] = {}
    for size, p in zip(sizes, layout):
        if p.kind == "S":
            digits[p.dim, p.outer] = digits.get((p.dim, p.outer), 1) * size
    for dim in {dim for dim, _ in digits}:
        position = 1
        for outer, parts in sorted((o, k) for (d, o), k in digits.items() if d == dim):
            if outer % position or (dim, outer * parts) not in dividing:
                return False
            position = outer * parts
    return True


@dataclass(frozen=True, eq=False)
class StepGraph:
    """Every legal step between `layouts`: `steps[s]` leads from layout `src[s]` to layout `dst[s]`; the steps from one layout are adjacent.

    `after[k, i]` is the k-th step from layout i, or -1. Shapes: src, dst [steps]; after [most steps from one layout, layouts].
    """

    layouts: tuple[Layout, ...]
    steps: tuple[Step, ...]
    src: np.ndarray
    dst: np.ndarray
    after: np.ndarray

    @cached_property
    def index(self) -> dict[Layout, int]:
        return {layout: i for i, layout in enumerate(self.layouts)}

    @cached_property
    def sorts(self) -> tuple[np.ndarray, np.ndarray]:
        """A number for every step, the same for those of one axis that do the same forwards, and for those that do the same backwards to the same part of a value."""
        forward, backward = dict[tuple, int](), dict[tuple, int]()
        there = [forward.setdefault((step.axis, step.forward), len(forward)) for step in self.steps]
        back = [backward.setdefault((step.axis, step.backward, step.src.kind == "S", step.dst.kind == "S"), len(backward)) for step in self.steps]
        return np.array(there, dtype=int), np.array(back, dtype=int)

    @cached_property
    def by_target(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The numbers of all steps by the layout that they lead to, and of each what it does forwards: an "all_gather", an "other" collective or neither; every
        layout that some lead to, and the first of these."""
        order = np.argsort(self.dst, kind="stable")
        forward = [self.steps[s].forward for s in order.tolist()]
        kinds = np.array([name if name == "all_gather" else "other" if name in COLLECTIVES else "local" for name in forward])
        return order, kinds, *np.unique(self.dst[order], return_index=True)


@lru_cache(maxsize=256)
def step_graph(layouts: tuple[Layout, ...]) -> StepGraph:
    """The steps among these layouts. They do not depend on sizes, so many tensors and meshes share one graph."""
    index = {layout: i for i, layout in enumerate(layouts)}
    states = [sorted({layout[a] for layout in layouts}) for a in range(len(layouts[0]))]
    found: list[list[tuple[int, Step]]] = []
    for layout in layouts:
        options = (Step(a, layout[a], dst) for a, placements in enumerate(states) for dst in placements)
        found.append([(index[there], step) for step in options if (there := step.apply(layout)) in index and legal_step(layout, step)])
    after = np.full((max(map(len, found)), len(layouts)), -1)
    first = 0
    for i, steps in enumerate(found):
        after[: len(steps), i] = np.arange(first, first + len(steps))
        first += len(steps)
    src = np.repeat(np.arange(len(layouts)), [len(steps) for steps in found])
    dst = np.array([j for steps in found for j, _ in steps], dtype=int)
    return StepGraph(layouts, tuple(step for steps in found for _, step in steps), src, dst, after)


@dataclass(frozen=True, eq=False)
class Calls:
    """What the steps of a graph call, forwards or backwards: `calls` as (a step, in how many parts its layout cuts the tensor), each with a price of its own, and of every
    step the number of its call."""

    calls: tuple[tuple[Step, int], ...]
    number: np.ndarray


@lru_cache(maxsize=1024)
def _calls(graph: StepGraph, sizes: tuple[int, ...]) -> tuple[tuple[int, ...], Calls, Calls]:
    """In how many parts every layout cuts the tensor, and the calls forwards and backwards: of steps of the same primitive, axis and local bytes one."""
    parts = np.array([math.prod([size for size, p in zip(sizes, layout) if p.kind == "S"]) for layout in graph.layouts])
    cut, found = parts[graph.src], []
    for sorts in graph.sorts:
        _, first, number = np.unique(sorts * (cut.max(initial=0) + 1) + cut, return_index=True, return_inverse=True)
        found.append(Calls(tuple([(graph.steps[s], int(cut[s])) for s in first.tolist()]), number))
    return tuple(parts.tolist()), *found


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
    def graph(self) -> StepGraph:
        return step_graph(self.layouts)

    @property
    def index(self) -> dict[Layout, int]:
        return self.graph.index

    @cached_property
    def _total_bytes(self) -> float:
        return float(math.prod(self.shape) * self.item_bytes)

    @cached_property
    def local_bytes(self) -> list[float]:
        """Of every layout."""
        parts, *_ = _calls(self.graph, self.mesh.sizes)
        return [self._total_bytes / cut for cut in parts]

    @cached_property
    def _step_seconds(self) -> np.ndarray:
        """Seconds of every step of the graph."""
        total, price, mesh = self._total_bytes, self.price, self.mesh
        _, forward, backward = _calls(self.graph, mesh.sizes)
        seconds = np.array([price(step.forward, step.axis, total / cut) for step, cut in forward.calls])[forward.number]
        if not self.grad:
            return seconds
        back = [(step, step_input_bytes(step.backward, step, mesh, total / cut, backward=True)) for step, cut in backward.calls]
        return seconds + np.array([price(step.backward, step.axis, num_bytes) for step, num_bytes in back])[backward.number]

    @cached_property
    def seconds(self) -> np.ndarray:
        """Seconds of the cheapest route from layout i to layout j, [layouts, layouts]; inf where there is none.

        Bellman and Ford's rounds, for many targets at once; the number of rounds is about that of the steps of the longest route.
        """
        n, graph = len(self.layouts), self.graph
        hops = np.where(graph.after < 0, np.inf, np.append(self._step_seconds, 0.0)[graph.after])[:, :, None]
        ends = np.append(graph.dst, 0)[graph.after]
        table = np.full((n, n), np.inf)
        np.fill_diagonal(table, 0.0)
        for first in range(0, n, TARGETS_AT_ONCE):
            best = table[:, first : first + TARGETS_AT_ONCE].copy()
            before = np.full_like(best, np.inf)
            while (best < before * (1 - RELATIVE_TIE)).any():
                before = best.copy()
                for hop, there in zip(hops, ends):
                    np.minimum(best, best[there] + hop, out=best)
            table[:, first : first + TARGETS_AT_ONCE] = best
        return table

    @cached_property
    def again(self) -> tuple[np.ndarray, np.ndarray]:
        """Where what all-gathers bring is not kept but gathered again, [layouts, layouts]: seconds of those that the route from layout i to layout j ends in,
        and the bytes that are kept for them beside layout i. A local step at the end counts for neither. Of equal routes the least of each."""
        n, graph, table = len(self.layouts), self.graph, self.seconds
        order, kinds, targets, first = graph.by_target
        src, dst = graph.src[order], graph.dst[order]
        on_best = table[:, src] + self._step_seconds[order] <= table[:, dst] * (1 + RELATIVE_TIE)
        off_best = np.where(on_best, 0.0, np.inf).T  # by step, then by source
        gathers, others = np.flatnonzero(kinds == "all_gather"), np.flatnonzero(kinds == "other")
        calls = [(graph.steps[s].axis, self.local_bytes[graph.src[s]]) for s in order[gathers].tolist()]
        prices = {call: self.price("all_gather", *call) for call in dict.fromkeys(calls)}
        forward_s = np.array([prices[call] for call in calls])
        ends, found = np.stack([off_best, off_best]), np.zeros((2, n, n))
        ends[1, others] += np.array(self.local_bytes)[dst[others], None]
        for _ in self.mesh.axes:  # one axis after the other is gathered
            before = found[:, src[gathers]]
            before[0] += forward_s[:, None]
            ends[:, gathers] = before + off_best[gathers]
            least = np.minimum.reduceat(ends, first, axis=1)
            found[:, targets] = np.where(np.isinf(least), 0.0, least)
            found[:, range(n), range(n)] = 0.0
        return found[0].T, found[1].T

    def path(self, src: Layout, dst: Layout) -> tuple[Step, ...]:
        """The steps of the cheapest route, the fewest of equals; raises LayoutError where there is none."""
        start, end = self.index[src], self.index[dst]
        left, graph = self.seconds[:, end], self.graph
        if not math.isfinite(left[start]):
            raise LayoutError(f"no way from layout {src} to {dst}")
        on_best = self._step_seconds + left[graph.dst] <= left[graph.src] * (1 + RELATIVE_TIE)
        came_by: dict[int, int] = {start: -1}
        queue = deque([start])
        while end not in came_by:
            i = queue.popleft()
            for s in graph.after[:, i].tolist():
                if s >= 0 and on_best[s] and graph.dst[s] not in came_by:
                    came_by[int(graph.dst[s])] = s
                    queue.append(int(graph.dst[s]))
        steps: list[Step] = []
        while end != start:
            s = came_by[end]
            steps.append(graph.steps[s])
            end = int(graph.src[s])
        return tuple(reversed(steps))
