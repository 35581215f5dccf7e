"""How tensors are put together to travel."""

from hypothesis import given
from hypothesis import strategies as st

from autopar.core.buckets import ALONE, ALONE_BYTES, BUCKET_BYTES, MIN_BUCKET_BYTES, bucket_limit, chunks

SIZES = st.lists(st.integers(1, 2 * BUCKET_BYTES) | st.integers(1, MIN_BUCKET_BYTES), max_size=40)


@given(SIZES, st.booleans())
def test_everything_travels_once_and_no_bucket_is_too_full(sizes: list[int], gathered: bool) -> None:
    found = chunks(range(len(sizes)), sizes.__getitem__, gathered=gathered)
    limit = bucket_limit(sum(sizes))
    assert sorted(v for run in found for v in run) == list(range(len(sizes)))
    for run in found:
        assert run == sorted(run)
        assert len(run) == 1 or sum(sizes[v] for v in run) <= limit
        assert len(run) == 1 or max(sizes[v] for v in run) < (max(MIN_BUCKET_BYTES, ALONE * limit) if gathered else ALONE_BYTES)


def test_large_ones_travel_alone_and_do_not_part_the_others() -> None:
    sizes = [1 << 10, 24 << 20, 1 << 10, 24 << 20, 1 << 10]
    assert chunks(range(5), sizes.__getitem__, gathered=True) == chunks(range(5), sizes.__getitem__) == [[0, 2, 4], [1], [3]]
