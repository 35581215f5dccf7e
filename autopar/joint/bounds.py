"""What no pipeline beats: how much of a step's work each rank can do in a given time within its memory, and when that is all of it.

Let a rank do the share x of the model, with shardings and modes as it likes: c seconds, b bytes if it did all of it. Then x c <= T and x b <= L. For any
price p of a byte, with g(p) the least of c + p b over all that could be chosen,

    x g(p) <= x c + p x b <= T + p L,     so     x <= (T + p L) / g(p)

and the shares of all ranks sum to one. The least T for which they can is a bound on the step (linear programming duality, one price per rank). A rank
also waits: for the ranks before it to forward the first microbatch, and at the end for them to take the last gradient back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.planner.blocks import Order

PRECISION = 1e-6
"""Of the bound, relative."""


@dataclass(frozen=True, slots=True)
class Line:
    """At most (T + `relief_s`) / `whole_s` of the model can be done in T seconds of one rank."""

    whole_s: float
    relief_s: float = 0.0

    def share(self, seconds: float) -> float:
        return (seconds + self.relief_s) / self.whole_s if self.whole_s < float("inf") else 0.0


def least_step_s(order: Order, lines: Sequence[Sequence[Line]], pass_s: float) -> float:
    """No step in this order is shorter. `lines`: by rank; `pass_s`: no microbatch takes all stages together less."""
    high = max(line.whole_s for of_rank in lines for line in of_rank if line.whole_s < float("inf")) + pass_s
    if _shares(order, lines, pass_s, high * order.num_ranks) < 1.0:
        return float("inf")
    low, high = 0.0, high * order.num_ranks
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _shares(order, lines, pass_s, middle) < 1.0 else (low, middle)
    return low


def _shares(order: Order, lines: Sequence[Sequence[Line]], pass_s: float, step_s: float) -> float:
    """How much of the model all ranks can do. What a rank does of the first stage costs those behind it as much waiting as a microbatch's work on it;
    that is less than it gains where there are more microbatches than ranks, so ranks may take all they can, the first ones first."""
    total = 0.0
    waits = order.virtual == 1 and order.num_microbatches >= order.num_ranks
    for of_rank in lines:
        left = step_s - (total * pass_s if waits else 0.0)
        total += max(0.0, min(line.share(left) for line in of_rank))
    return total
