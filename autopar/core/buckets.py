"""How parameters and gradients are put together to travel: runs of about the size of a bucket."""

from collections.abc import Callable, Sequence

BUCKET_BYTES = 25 << 20
"""Large enough that latency does not count, small enough that most of a backward can hide it (the size DDP uses)."""

MIN_BUCKET_BYTES = 1 << 20
"""Smaller ones would be all latency."""

MIN_BUCKETS = 2
"""Gradients that would fill fewer buckets are cut into about this many, so that a small model hides its reduction too."""

IN_FLIGHT = 2
"""Buckets that are gathered or reduce-scattered at a time: the memory of the oldest is wanted back before one more is packed."""


def bucket_limit(total_bytes: int) -> int:
    """The size at which a bucket is full, where its like have `total_bytes` together."""
    return min(BUCKET_BYTES, max(MIN_BUCKET_BYTES, total_bytes // MIN_BUCKETS))


def chunks(members: Sequence[int], size: Callable[[int], int]) -> list[list[int]]:
    """Runs of about the size of a bucket, in order."""
    limit = bucket_limit(sum(size(v) for v in members))
    found: list[list[int]] = [[]]
    filled = 0
    for v in members:
        if found[-1] and filled + size(v) > limit:
            found.append([])
            filled = 0
        found[-1].append(v)
        filled += size(v)
    return found
