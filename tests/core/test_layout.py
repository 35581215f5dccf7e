"""Layouts: which indices a rank holds, how cuts nest, and the text forms."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.core.layout import (
    I,
    Layout,
    P,
    Placement,
    R,
    S,
    cut_of_dim,
    format_layout,
    local_outer,
    local_shape,
    parse_placement,
    shard_index,
)
from autopar.core.mesh import Mesh
from autopar.core.redistribute import layout_space
from autopar.core.rule import nest
from autopar.errors import LayoutError
from tests.harness import mesh_of

MESHES = [mesh_of(2), mesh_of(3), mesh_of(2, 3), mesh_of(3, 2), mesh_of(2, 2, 2), mesh_of(2, 1, 4)]
SHAPE = (48, 12)
CUTS = [(0, 1), (0, 2), (0, 4), (0, 6), (1, 1), (1, 3)]


def held(layout: Layout, mesh: Mesh, shape: tuple[int, ...] = SHAPE) -> list[tuple[list[int], ...]]:
    return [shard_index(layout, mesh, mesh.coordinates(r), shape) for r in range(mesh.num_ranks)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_ranks_hold_every_element_equally_often(mesh: Mesh) -> None:
    """Every element is held by as many ranks as the axes that do not cut allow, in pieces of `local_shape`."""
    for layout in layout_space(SHAPE, mesh, CUTS, grad=True):
        pieces = held(layout, mesh)
        counts = [[0] * SHAPE[1] for _ in range(SHAPE[0])]
        for rows, columns in pieces:
            assert (len(rows), len(columns)) == local_shape(SHAPE, layout, mesh)
            for i, j in itertools.product(rows, columns):
                counts[i][j] += 1
        copies = math.prod(size for size, p in zip(mesh.sizes, layout) if p.kind != "S")
        assert {n for row in counts for n in row} == {copies}
        assert cut_of_dim(layout, mesh, 0) * len(pieces[0][0]) == SHAPE[0]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_nesting_renames_but_moves_nothing(mesh: Mesh) -> None:
    """The canonical form of a layout holds the same indices on every rank, and is its own canonical form."""
    for layout in layout_space(SHAPE, mesh, CUTS, grad=True):
        assert held(nest(layout, mesh), mesh) == held(layout, mesh)
        assert nest(nest(layout, mesh), mesh) == nest(layout, mesh)


def test_blocks_of_one_axis() -> None:
    mesh = mesh_of(2)
    assert held((S(0),), mesh, (8,)) == [([0, 1, 2, 3],), ([4, 5, 6, 7],)]
    assert held((S(0, 2),), mesh, (8,)) == [([0, 1, 4, 5],), ([2, 3, 6, 7],)]
    assert held((S(0, 4),), mesh, (8,)) == [([0, 2, 4, 6],), ([1, 3, 5, 7],)]
    assert held((R,), mesh, (2,)) == held((I,), mesh, (2,)) == held((P,), mesh, (2,)) == [([0, 1],)] * 2


def test_two_axes_on_one_dimension_nest_in_mesh_order() -> None:
    assert [i for (i,) in held((S(0), S(0)), mesh_of(2, 3), (6,))] == [[0], [1], [2], [3], [4], [5]]
    assert [i for (i,) in held((S(0, 2), S(0)), mesh_of(2, 2), (8,))] == [[0, 1], [4, 5], [2, 3], [6, 7]]


def test_digit_of_a_fused_projection() -> None:
    """Three projections of 4 heads of 2: an axis of size 2 takes 2 heads of each."""
    rows = [i for (i,) in held((S(0, 3),), mesh_of(2), (24,))]
    assert rows[0] == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]
    assert sorted(rows[0] + rows[1]) == list(range(24))


def test_local_outer_counts_blocks_inside_the_part() -> None:
    mesh = mesh_of(2, 2)
    assert local_outer((S(0), S(0, 4)), mesh, 1) == 2
    assert local_outer((S(0, 4), S(0)), mesh, 0) == 2
    assert local_outer((S(0), S(0)), mesh, 1) == 1
    with pytest.raises(LayoutError, match="do not nest"):
        local_outer((S(0), S(0, 3)), mesh, 1)


def test_a_cut_that_does_not_divide_is_named() -> None:
    with pytest.raises(LayoutError, match="axis a=3"):
        local_shape((4, 4), (S(1),), mesh_of(3))
    with pytest.raises(LayoutError, match="axis a"):
        shard_index((S(0),), mesh_of(3), (0,), (4,))


placements = st.one_of(st.sampled_from([I, R, P]), st.builds(S, st.integers(0, 99), st.integers(1, 4096)))


@settings(deadline=None)
@given(placements)
def test_placements_survive_text(placement: Placement) -> None:
    assert parse_placement(str(placement)) == placement


@settings(deadline=None)
@given(st.text(max_size=20))
def test_other_text_is_refused(text: str) -> None:
    """Anything is either refused by name or means exactly one placement."""
    try:
        placement = parse_placement(text)
    except LayoutError as error:
        assert repr(text) in str(error)
    else:
        assert placement.kind in "SIRP" and parse_placement(str(placement)) == placement


@pytest.mark.parametrize(
    "text", ["", "S", "X", "S0/0", "S0/00", "S-1", "S\u00b2", "S\u0663", "S1/\u00b2", "S1/2/3", "RR", "s0", "S 0", "S0/", "S" + "9" * 40]
)
def test_near_misses_are_refused(text: str) -> None:
    with pytest.raises(LayoutError, match="is not one of"):
        parse_placement(text)


def test_layouts_print_with_axis_names() -> None:
    assert format_layout((S(1, 3), P), Mesh.of(dp=2, tp=4)) == "dp=S1/3,tp=P"
