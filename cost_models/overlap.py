"""Computation and communication side by side, from what waits for what: a chain of pieces of work and the collectives around each.

Two lanes, each does one thing at a time, in order of issue. The collective `before` a piece is issued when the piece `ahead` of it starts (buffers
are what limits it) and must end before the piece starts; the collective `after` a piece is issued when the piece ends. FSDP's forward is gathers
before blocks, its backward gathers before and reduce-scatters after; data parallelism is sums after blocks.
"""

from collections.abc import Sequence


def overlapped_seconds(pieces_s: Sequence[float], before_s: Sequence[float] = (), after_s: Sequence[float] = (), *, ahead: int = 1) -> float:
    """Seconds until the last piece and the last collective have ended; empty `before_s` or `after_s`: none."""
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
        clock = start + seconds
        if after[i]:
            lane = max(lane, clock) + after[i]
    return max(clock, lane)
