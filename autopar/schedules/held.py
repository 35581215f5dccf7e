"""How many microbatches a rank holds of each of its stages at once."""

from functools import lru_cache

from autopar.core.schedule import Kind
from autopar.schedules.orders import make_order

ROUNDS = 2
"""Rounds of as many microbatches as there are ranks, after which a schedule that alternates holds no more than it did."""


@lru_cache(maxsize=1024)
def held_counts(name: str, num_ranks: int, num_microbatches: int, virtual: int = 1) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Per rank, after every action that changes it, a number for each of its stages; what comes again is left out.

    Where virtual stages want a number that the ranks divide, it is rounded up, and what is held cut off at the number given.
    """
    number = num_microbatches if name in ("gpipe", "naive", "forward") else min(num_microbatches, ROUNDS * num_ranks)
    usable = -(-number // num_ranks) * num_ranks if virtual > 1 else number
    found = []
    for actions in make_order(name, num_ranks, usable, virtual).ranks:
        held, rows = [0] * virtual, set()
        for action in actions:
            held[action.stage // num_ranks] += {Kind.F: 1, Kind.B: -1, Kind.W: -1}.get(action.kind, 0)
            rows.add(tuple(min(n, number) for n in held))
        found.append(tuple(sorted(rows)))
    return tuple(found)


@lru_cache(maxsize=1024)
def most_held(name: str, num_ranks: int, num_microbatches: int, virtual: int = 1) -> tuple[tuple[int, ...], ...]:
    """Per rank, a number for each of its stages, when it holds most of all together."""
    return tuple([max(of_rank, key=sum) for of_rank in held_counts(name, num_ranks, num_microbatches, virtual)])
