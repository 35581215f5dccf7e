"""Two lanes by hand, and what no order of things can beat."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cost_models.overlap import overlapped_seconds

seconds = st.lists(st.tuples(*(st.floats(0, 10),) * 3), min_size=1, max_size=12)


def test_a_prefetched_forward_shows_the_first_gather_alone() -> None:
    assert overlapped_seconds((3.0,) * 4, (2.0,) * 4) == pytest.approx(2 + 4 * 3)


def test_where_gathers_are_longer_they_set_the_pace() -> None:
    assert overlapped_seconds((2.0,) * 4, (3.0,) * 4) == pytest.approx(4 * 3 + 2)


def test_sums_hide_behind_the_blocks_that_follow_but_the_last() -> None:
    assert overlapped_seconds((3.0,) * 4, (), (2.0,) * 4) == pytest.approx(4 * 3 + 2)
    assert overlapped_seconds((2.0,) * 4, (), (3.0,) * 4) == pytest.approx(2 + 4 * 3)


def test_gathers_and_sums_share_the_lane() -> None:
    """Lane: gathers 0-1 and 1-2, sum 2-4, gather 4-5, sums 5-7 and 7-9; pieces 1-2, 2-3, 5-6."""
    assert overlapped_seconds((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (2.0, 2.0, 2.0)) == pytest.approx(9.0)


@given(rows=seconds, ahead=st.integers(1, 4))
def test_between_the_longer_lane_and_both_after_each_other(rows: list[tuple[float, float, float]], ahead: int) -> None:
    pieces, before, after = zip(*rows)
    found = overlapped_seconds(pieces, before, after, ahead=ahead)
    assert max(sum(pieces), sum(before) + sum(after)) - 1e-9 <= found <= sum(map(sum, rows)) + 1e-9


def test_a_collective_slows_what_computes_beside_it() -> None:
    """Half of the device for one of two seconds: the first block does half a second's work in that, and 1.5 seconds are left."""
    assert overlapped_seconds((2.0, 2.0), (0.0, 1.0), taken=0.5) == pytest.approx(2.5 + 2.0)
    assert overlapped_seconds((2.0, 2.0), (0.0, 1.0)) == pytest.approx(4.0)
