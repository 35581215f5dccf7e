"""How many equal pieces of work each of several machines does, so that all are done soonest: exact.

    minimise    max_r (once_r + n_r * time_r)
    subject to  sum_r n_r = number,  n_r >= 1

One piece after the other goes to the machine that would be done with it first. Whatever another division gives a machine beyond that, the last of these pieces
ends there no sooner than the last piece ends here; so no division ends sooner. tests/search/test_shares.py counts all of them.
"""

import heapq
from collections.abc import Sequence

from autopar.errors import UsageError


def share_out(times_s: Sequence[float], once_s: Sequence[float], number: int) -> tuple[int, ...]:
    """Pieces by machine; `times_s`: of a piece on each, `once_s`: what each takes beside all its pieces. Of equals the first machine gets more."""
    if not times_s or number < len(times_s) or not all(0 <= x < float("inf") for x in (*times_s, *once_s)):
        raise UsageError(f"{number} pieces for {len(times_s)} machines; give at least one piece for each, and finite seconds")
    shares = [1] * len(times_s)
    ends = [(once + 2 * time, r) for r, (time, once) in enumerate(zip(times_s, once_s, strict=True))]
    heapq.heapify(ends)
    for _ in range(number - len(shares)):
        end, r = ends[0]
        shares[r] += 1
        heapq.heapreplace(ends, (end + times_s[r], r))
    return tuple(shares)
