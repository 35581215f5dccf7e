"""Redistribution against three oracles: whole tensors, an exhaustive search written here, and a greedy recipe.

On a mesh of three axes a tensor of three dimensions has 34 maps with at most one axis per dimension, so 1,122 ordered pairs.
"""

import heapq
import itertools
import random
from collections.abc import Callable, Iterator

import pytest
import torch

from autopar.core.graph import TensorMeta
from autopar.core.layout import I, Layout, P, Placement, R, S
from autopar.core.mesh import Mesh
from autopar.core.moves import COLLECTIVES, Step, legal_step, moved_bytes, step_input_bytes
from autopar.core.redistribute import Redistribution, layout_space
from autopar.program import Route
from tests.harness import check_route, mesh_of

RANK = 3
SHAPE = (24, 24, 24)
SMALL = (12, 12, 12)
"""Shape of the tensors that are really moved; the one above also fits three nested cuts of 2, 3 and 4."""

CUTS = ((0, 1), (1, 1), (2, 1))
ITEM_BYTES = 8
MESHES = (mesh_of(2, 2, 2), mesh_of(2, 3, 4), mesh_of(4, 3, 2))
TIE = 1e-4
"""Bytes that every step costs on top: of routes with equal bytes the one with fewest steps is taken."""

TensorMap = tuple[int, ...]
"""For every dimension the axis that cuts it, or -1."""


def tensor_maps() -> list[TensorMap]:
    """All ways to cut each of three dimensions by at most one of three axes, every axis used at most once."""
    maps = itertools.product((-1, 0, 1, 2), repeat=RANK)
    return [m for m in maps if len({a for a in m if a >= 0}) == sum(a >= 0 for a in m)]


PAIRS = [(a, b) for a in tensor_maps() for b in tensor_maps() if a != b]


def layout_of(m: TensorMap, rest: tuple[Placement, ...] = (I, I, I)) -> Layout:
    """The layout of a map; axes that cut nothing are as in `rest`."""
    return tuple(S(m.index(a)) if a in m else rest[a] for a in range(3))


def redistribution(mesh: Mesh, *, grad: bool, shape: tuple[int, ...] = SHAPE) -> Redistribution:
    space = layout_space(shape, mesh, CUTS, grad=grad)

    def price(primitive: str, axis: int, local_bytes: float) -> float:
        return moved_bytes(primitive, mesh.sizes[axis], local_bytes) + TIE

    return Redistribution(shape, ITEM_BYTES, mesh, space, grad, price)


def route_of(red: Redistribution, src: Layout, dst: Layout) -> Route:
    route = [src]
    for step in red.path(src, dst):
        route.append(step.apply(route[-1]))
    return tuple(route)


def route_bytes(route: Route, mesh: Mesh, *, grad: bool) -> float:
    """Bytes a rank receives along a route, from the primitives' names."""
    total, local = 0.0, ITEM_BYTES * 24.0**3 / _parts(route[0], mesh)
    for here, there in itertools.pairwise(route):
        axis = next(a for a in range(3) if here[a] != there[a])
        step, n = Step(axis, here[axis], there[axis]), mesh.sizes[axis]
        total += moved_bytes(step.forward, n, local)
        if grad:
            total += moved_bytes(step.backward, n, step_input_bytes(step.backward, step, mesh, local, backward=True))
        local = ITEM_BYTES * 24.0**3 / _parts(there, mesh)
    return total


def _parts(layout: Layout, mesh: Mesh) -> int:
    parts = 1
    for size, p in zip(mesh.sizes, layout):
        parts *= size if p.kind == "S" else 1
    return parts


# --- an exhaustive search that shares no code with the package -------------------------------------------------------

State = tuple[str, ...]
"""Per axis 'I', 'R', 'P' or the digit of the dimension that it cuts."""

FORWARD_BACKWARD: dict[tuple[str, str], Callable[[float, int], tuple[float, float]]] = {
    ("S", "I"): lambda b, n: ((n - 1) * b, 0),
    ("S", "R"): lambda b, n: ((n - 1) * b, (n - 1) * b),
    ("S", "S"): lambda b, n: ((n - 1) / n * b, (n - 1) / n * b),
    ("S", "P"): lambda b, n: (0, 0),
    ("I", "S"): lambda b, n: (0, (n - 1) / n * b),
    ("I", "R"): lambda b, n: (0, 2 * (n - 1) / n * b),
    ("I", "P"): lambda b, n: (0, 0),
    ("R", "S"): lambda b, n: (0, 0),
    ("R", "I"): lambda b, n: (0, 0),
    ("R", "P"): lambda b, n: (0, 0),
    ("P", "I"): lambda b, n: (2 * (n - 1) / n * b, 0),
    ("P", "R"): lambda b, n: (2 * (n - 1) / n * b, 2 * (n - 1) / n * b),
    ("P", "S"): lambda b, n: ((n - 1) / n * b, (n - 1) / n * b),
}
"""Bytes a rank receives when one axis of size n changes, from b local bytes: (forward, backward)."""


def neighbours(state: State, sizes: tuple[int, ...], *, grad: bool) -> Iterator[tuple[State, float]]:
    whole = ITEM_BYTES * 24.0**3
    for s, n in zip(state, sizes):
        whole /= n if s.isdigit() else 1
    for axis, here in enumerate(state):
        for there in ("I", "R", "P", "0", "1", "2") if grad else ("I", "P", "0", "1", "2"):
            inner = state[axis + 1 :]
            if here == there or (here.isdigit() and here in inner) or (there.isdigit() and there in inner):
                continue  # axes on one dimension nest in mesh order: only the innermost moves alone
            kinds = tuple("S" if s.isdigit() else s for s in (here, there))
            forward, backward = FORWARD_BACKWARD[kinds](whole, sizes[axis])
            yield (*state[:axis], there, *inner), forward + (backward if grad else 0)


def fewest_bytes(start: State, sizes: tuple[int, ...], *, grad: bool) -> dict[State, float]:
    """Dijkstra from one state to all."""
    best: dict[State, float] = {}
    queue = [(0.0, start)]
    while queue:
        cost, state = heapq.heappop(queue)
        if state in best:
            continue
        best[state] = cost
        for there, extra in neighbours(state, sizes, grad=grad):
            if there not in best:
                heapq.heappush(queue, (cost + extra, there))
    return best


def state_of(layout: Layout) -> State:
    return tuple(str(p.dim) if p.kind == "S" else p.kind for p in layout)


# --- the greedy recipe -----------------------------------------------------------------------------------------------


def greedy_bytes(src: TensorMap, dst: TensorMap, sizes: tuple[int, ...]) -> float:
    """Slice what is free, else move an axis between dimensions, else gather what the target does not use; a cycle gathers."""
    here, total, local = list(src), 0.0, ITEM_BYTES * 24.0**3
    for axis in src:
        local /= sizes[axis] if axis >= 0 else 1

    def gather(d: int) -> None:
        nonlocal total, local
        n = sizes[here[d]]
        total, local = total + (n - 1) * local, local * n
        here[d] = -1

    while here != list(dst):
        moved = False
        for d in [d for d in range(RANK) if here[d] == -1 and dst[d] >= 0]:
            axis = dst[d]
            if axis not in here:
                local /= sizes[axis]
            else:
                here[here.index(axis)] = -1
                total += (sizes[axis] - 1) / sizes[axis] * local
            here[d], moved = axis, True
        for d in [d for d in range(RANK) if here[d] >= 0 and here[d] not in dst]:
            gather(d)
            moved = True
        if not moved:
            gather(next(d for d in range(RANK) if here[d] != dst[d]))
    return total


# --- tests -----------------------------------------------------------------------------------------------------------


def test_there_are_1122_pairs() -> None:
    assert len(tensor_maps()) == 34 and len(PAIRS) == 1122


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_bytes_equal_the_exhaustive_optimum(mesh: Mesh, grad: bool) -> None:
    red = redistribution(mesh, grad=grad)
    for m in tensor_maps():
        best = fewest_bytes(state_of(layout_of(m)), mesh.sizes, grad=grad)
        for target in tensor_maps():
            route = route_of(red, layout_of(m), layout_of(target))
            assert route_bytes(route, mesh, grad=grad) == pytest.approx(best[state_of(route[-1])], rel=1e-12), (m, target, route)


def test_bytes_between_all_layouts_of_two_axes_are_optimal() -> None:
    """With R and P at both ends."""
    mesh = mesh_of(2, 3, 1)
    red = redistribution(mesh, grad=True)
    for src in red.layouts:
        best = fewest_bytes(state_of(src), mesh.sizes, grad=True)
        for dst in red.layouts:
            route = route_of(red, src, dst)
            assert route_bytes(route, mesh, grad=True) == pytest.approx(best[state_of(dst)], rel=1e-12), (src, dst, route)


@pytest.mark.parametrize(("sizes", "better"), [((2, 2, 2), 144), ((2, 4, 8), 488), ((2, 3, 4), 144)], ids=str)
def test_never_more_bytes_than_greedy(sizes: tuple[int, ...], better: int) -> None:
    """`better`: how many pairs must be cheaper than greedy, from a search over one axis per dimension."""
    mesh = mesh_of(*sizes)
    red = redistribution(mesh, grad=False)
    won = 0
    for a, b in PAIRS:
        found, greedy = route_bytes(route_of(red, layout_of(a), layout_of(b)), mesh, grad=False), greedy_bytes(a, b, sizes)
        assert found <= greedy * (1 + 1e-12), (a, b)
        won += found < greedy * (1 - 1e-9)
    assert won >= better, won


@pytest.mark.parametrize("mesh", MESHES[:2], ids=str)
def test_every_pair_keeps_value_and_gradient(mesh: Mesh) -> None:
    """All 1,122 pairs, the axes that cut nothing drawn from I, R and P at both ends."""
    red, meta = redistribution(mesh, grad=True, shape=SMALL), TensorMeta(SMALL, "float64", True)
    gen, rng = torch.Generator().manual_seed(0), random.Random(0)
    for a, b in PAIRS:
        src = layout_of(a, tuple(rng.choices((I, R, P), (4, 1, 1), k=3)))
        dst = layout_of(b, tuple(rng.choices((I, R, P), (4, 1, 1), k=3)))
        outcome = check_route(route_of(red, src, dst), meta, mesh, gen)
        assert outcome.equal, (src, dst, outcome)


def test_without_gradient_values_and_bytes_agree() -> None:
    mesh, meta = mesh_of(2, 3, 4), TensorMeta(SMALL, "float64", False)
    red, gen = redistribution(mesh, grad=False, shape=SMALL), torch.Generator().manual_seed(1)
    for a, b in random.Random(1).sample(PAIRS, 200):
        outcome = check_route(route_of(red, layout_of(a), layout_of(b)), meta, mesh, gen)
        assert outcome.equal, (a, b, outcome)


def steps_of(mesh: Mesh, shape: tuple[int, ...], cuts: list[tuple[int, int]]) -> Iterator[Route]:
    """Every legal single step between layouts of a tensor."""
    space = layout_space(shape, mesh, cuts, grad=True)
    known = set(space)
    for layout in space:
        for axis, states in enumerate(zip(*space)):
            for dst in sorted(set(states)):
                step = Step(axis, layout[axis], dst)
                there = step.apply(layout)
                if there in known and legal_step(layout, step):
                    yield layout, there


@pytest.mark.parametrize("sizes", [(2,), (3,), (4,), (2, 2), (2, 3), (3, 2)], ids=str)
def test_every_legal_step_with_strided_cuts(sizes: tuple[int, ...]) -> None:
    """Cuts behind 2, 3 or 6 outer blocks, nested with plain ones: each step keeps value and gradient, and counts its bytes."""
    mesh, gen = mesh_of(*sizes), torch.Generator().manual_seed(2)
    shape, cuts = (72, 24), [(0, 1), (0, 2), (0, 3), (0, 6), (1, 1), (1, 2)]
    count = 0
    for route in steps_of(mesh, shape, cuts):
        outcome = check_route(route, TensorMeta(shape, "float64", True), mesh, gen)
        assert outcome.equal, (route, outcome)
        count += 1
    assert count >= 50


@pytest.mark.parametrize("sizes", [(2, 2), (2, 3)], ids=str)
def test_strided_layouts_reach_each_other(sizes: tuple[int, ...]) -> None:
    """A way leads from every layout to every other; a sample of whole routes keeps value, gradient and bytes."""
    mesh, gen, rng = mesh_of(*sizes), torch.Generator().manual_seed(3), random.Random(3)
    shape, cuts = (72, 24), [(0, 1), (0, 2), (0, 3), (1, 1)]
    space = layout_space(shape, mesh, cuts, grad=True)
    red = Redistribution(shape, ITEM_BYTES, mesh, space, True, lambda prim, axis, n: moved_bytes(prim, mesh.sizes[axis], n) + TIE)
    assert red.seconds.max() < float("inf")
    for _ in range(150):
        src, dst = rng.sample(space, 2)
        outcome = check_route(route_of(red, src, dst), TensorMeta(shape, "float64", True), mesh, gen)
        assert outcome.equal, (src, dst, outcome)


def test_free_steps_make_no_circles_and_the_fewest_are_taken() -> None:
    """Where steps cost nothing every route is as cheap as any other; the one with the fewest steps is taken."""
    mesh = mesh_of(2, 2, 2)
    space = layout_space(SHAPE, mesh, CUTS, grad=True)
    free = Redistribution(SHAPE, ITEM_BYTES, mesh, space, True, lambda primitive, axis, n: 0.0)
    counted = Redistribution(SHAPE, ITEM_BYTES, mesh, space, False, lambda primitive, axis, n: 1.0)
    rng = random.Random(0)
    for _ in range(300):
        src, dst = rng.choice(space), rng.choice(space)
        assert free.seconds[free.index[src], free.index[dst]] == 0
        assert len(free.path(src, dst)) == counted.seconds[counted.index[src], counted.index[dst]], (src, dst)


def test_seconds_are_those_of_the_steps_of_the_path() -> None:
    mesh = mesh_of(2, 3, 4)
    red = redistribution(mesh, grad=True)
    rng = random.Random(1)
    for _ in range(300):
        src, dst = rng.choice(red.layouts), rng.choice(red.layouts)
        route = route_of(red, src, dst)
        steps = len(red.path(src, dst))
        expected = route_bytes(route, mesh, grad=True) + 2 * TIE * steps
        assert red.seconds[red.index[src], red.index[dst]] == pytest.approx(expected, rel=1e-9, abs=1e-9), (src, dst)


def test_what_is_gathered_again_is_what_a_route_ends_in() -> None:
    """Walked back from its end: all-gathers one after the other, up to what another collective made, or the value was. Of equal routes the least counts."""
    red = redistribution(mesh_of(2, 3, 4), grad=True)
    again_s, kept = red.again
    some = 0
    for src, dst in random.Random(5).sample(list(itertools.product(red.layouts, repeat=2)), 1500):
        steps, made = red.path(src, dst), [src]
        for step in steps:
            made.append(step.apply(made[-1]))
        seconds, end = 0.0, len(steps)
        while end and steps[end - 1].forward == "all_gather":
            end -= 1
            seconds += red.price("all_gather", steps[end].axis, red.local_bytes[red.index[made[end]]])
        of_others = end and steps[end - 1].forward in COLLECTIVES
        i, j = red.index[src], red.index[dst]
        assert again_s[i, j] <= seconds * (1 + 1e-12)
        assert kept[i, j] <= (red.local_bytes[red.index[made[end]]] if of_others else 0.0)
        some += 0 < seconds <= again_s[i, j] * (1 + 1e-12)
    assert some > 100
