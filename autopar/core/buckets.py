"""How parameters and gradients are put together to travel: runs of about the size of a bucket."""

from collections.abc import Callable, Sequence

BUCKET_BYTES = 25 << 20
"""Large enough that latency does not count, small enough that most of a backward can hide it (the size DDP uses)."""

MIN_BUCKET_BYTES = 1 << 20
"""Smaller ones would be all latency."""

MIN_BUCKETS = 2
"""Gradients that would fill fewer buckets are cut into about this many, so that a small model hides its reduction too."""

ALONE = 0.25
"""The part of a bucket from which on a tensor that is gathered too travels alone: what it saves is the copy to its neighbours' side and back."""

ALONE_BYTES = 4 << 20
"""From this size on a gradient is summed where it lies: the copy, and fresh memory for it, cost more than one more message. Over gloo
(`examples/benchmark_step.py --only DDP`) 1 MiB was slower, 2 MiB alike within noise."""

IN_FLIGHT = 2
"""Buckets that are gathered or reduce-scattered at a time: the memory of the oldest is wanted back before one more is packed."""


def bucket_limit(total_bytes: int) -> int:
    """The size at which a bucket is full, where its like have `total_bytes` together."""
    return min(BUCKET_BYTES, max(MIN_BUCKET_BYTES, total_bytes // MIN_BUCKETS))


def chunks(members: Sequence[int], size: Callable[[int], int], *, gathered: bool = False) -> list[list[int]]:
    """Runs of about the size of a bucket, in order; large members are runs of their own, sooner where they are `gathered` too."""
    limit = bucket_limit(sum(size(v) for v in members))
    large = max(MIN_BUCKET_BYTES, ALONE * limit) if gathered else ALONE_BYTES
    found: list[list[int]] = []
    run: list[int] = []
    filled = 0
    for v in members:
        if size(v) >= large:
            found.append([v])
            continue
        if not run or filled + size(v) > limit:
            run, filled = [], 0
            found.append(run)
        run.append(v)
        filled += size(v)
    return found
