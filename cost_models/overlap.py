"""Computation and communication side by side, from what waits for what: a chain of pieces of work and the collectives around each.

Two lanes, each does one thing at a time, in order of issue. The collective `before` a piece is issued when the piece `ahead` of it starts (buffers
are what limits it) and must end before the piece starts; the collective `after` a piece is issued when the piece ends. FSDP's forward is gathers
before blocks, its backward gathers before and reduce-scatters after; data parallelism is sums after blocks.

A collective occupies some of the device's multiprocessors while it runs, and what computes beside it has the others.
"""

from collections.abc import Sequence


COLLECTIVE_MULTIPROCESSORS = 16
"""Source: assumed, as many channels as NCCL opens on nodes with eight cards (NCCL, search of the topology); each occupies a multiprocessor."""


def occupied(num_multiprocessors: int) -> float:
    """The share of a device that a collective takes; 0 where its structure is unknown."""
    return min(0.5, COLLECTIVE_MULTIPROCESSORS / num_multiprocessors) if num_multiprocessors else 0.0


def overlapped_seconds(
    pieces_s: Sequence[float], before_s: Sequence[float] = (), after_s: Sequence[float] = (), *, ahead: int = 1, taken: float = 0.0
) -> float:
    """Seconds until the last piece and the last collective have ended; empty `before_s` or `after_s`: none. `taken`: the share of the device that
    a collective occupies."""
    n = len(pieces_s)
    before, after = before_s or (0.0,) * n, after_s or (0.0,) * n
    there, lane, clock = [], 0.0, 0.0
    for seconds in before[:ahead]:
        lane += seconds
        there.append(lane)
    for i, seconds in enumerate(pieces_s):
        start = max(clock, there[i])
        if i + ahead < n:
            lane = max(lane, start) + before[i + ahead]
            there.append(lane)
        shared = min(max(0.0, lane - start), seconds / (1 - taken))  # while the other lane is busy
        clock = start + shared + seconds - shared * (1 - taken)
        if after[i]:
            lane = max(lane, clock) + after[i]
    return max(clock, lane)
