"""Shares of equal pieces of work: equal to brute force."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import UsageError
from autopar.search.shares import share_out

SECONDS = st.integers(0, 40).map(lambda n: n / 8)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=4), st.integers(0, 8))
def test_equal_to_brute_force(machines: list[tuple[float, float]], more: int) -> None:
    number = len(machines) + more

    def end(shares: tuple[int, ...]) -> float:
        return max(once + n * time for n, (time, once) in zip(shares, machines, strict=True))

    found = share_out([time for time, _ in machines], [once for _, once in machines], number)
    every = (s for s in itertools.product(range(1, number + 1), repeat=len(machines)) if sum(s) == number)
    assert sum(found) == number and min(found) >= 1
    assert end(found) == pytest.approx(min(map(end, every)), rel=1e-12)


def test_a_machine_twice_as_fast_does_twice_as_much() -> None:
    assert share_out([2.0, 1.0], [0.0, 0.0], 12) == (4, 8)
    assert share_out([1.0, 1.0], [0.0, 0.0], 5) == (3, 2)
    with pytest.raises(UsageError, match="at least one piece for each"):
        share_out([1.0, 1.0], [0.0, 0.0], 1)
