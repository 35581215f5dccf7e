"""The classic schedules, as the order in which each rank computes; `lower.py` adds what is sent.

    naive          one microbatch at a time through all stages and back
    gpipe          all forwards, then all backwards (Huang et al. 2019); with virtual stages breadth first (Lamy-Poirier 2023)
    1f1b           each rank starts as many forwards as there are ranks after it, then alternates (PipeDream-Flush; Narayanan et al. 2021)
    interleaved    1F1B over virtual stages, a rank's chunks taking turns in rounds of `num_ranks` microbatches (same source, 2.2)
    zero-bubble    1F1B with the backward split: weight gradients wait and fill the drain (ZB-H1; Qi et al. 2023)
    forward        inference
    shared         no pipeline: copies of the model, each with its share of the microbatches

Stage s of a pipeline with virtual stages sits on rank s mod num_ranks.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from autopar.core.pipeline import SHARED
from autopar.core.schedule import Action, Kind, microbatches_of
from autopar.errors import UsageError


@dataclass(frozen=True)
class Order:
    """Forwards and backwards of each rank in order: all that a schedule has to decide. `placement`: stage -> rank."""

    name: str
    num_microbatches: int
    placement: tuple[int, ...]
    ranks: tuple[tuple[Action, ...], ...]
    training: bool = True
    shares: tuple[int, ...] = ()


def share_order(shares: Sequence[int], *, training: bool = True) -> Order:
    """Copies of one model on a rank each, which run their shares of the microbatches one after the other."""
    kinds = (Kind.F, Kind.B) if training else (Kind.F,)
    ranks = tuple(tuple(Action(kind, r, m) for m in microbatches_of(r, sum(shares), shares) for kind in kinds) for r in range(len(shares)))
    return Order(SHARED, sum(shares), tuple(range(len(shares))), ranks, training, tuple(shares))


def make_order(name: str, num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Order:
    """The order called `name`, with `virtual_stages` stages per rank; UsageError where it does not exist."""
    if name not in ORDERS:
        raise UsageError(f"unknown schedule {name[:40]!r}; known are {', '.join(ORDERS)}")
    for what, value in (("ranks", num_ranks), ("microbatches", num_microbatches), ("virtual stages", virtual_stages)):
        if value < 1:
            raise UsageError(f"schedule {name}: {value} {what}; give at least 1")
    if virtual_stages > 1 and name == "1f1b":
        raise UsageError(f"schedule 1f1b has one stage per rank, not {virtual_stages}; its form for virtual stages is interleaved")
    placement = tuple(s % num_ranks for s in range(num_ranks * virtual_stages))
    ranks = tuple(tuple(ORDERS[name](rank, num_ranks, num_microbatches, virtual_stages)) for rank in range(num_ranks))
    return Order(name, num_microbatches, placement, ranks, training=name != "forward")


def _naive(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int) -> Iterable[Action]:
    for m in range(num_microbatches):
        for chunk in range(virtual_stages):
            yield Action(Kind.F, chunk * num_ranks + rank, m)
        for chunk in reversed(range(virtual_stages)):
            yield Action(Kind.B, chunk * num_ranks + rank, m)


def _forward(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int) -> Iterable[Action]:
    for chunk in range(virtual_stages):
        for m in range(num_microbatches):
            yield Action(Kind.F, chunk * num_ranks + rank, m)


def _gpipe(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int) -> Iterable[Action]:
    yield from _forward(rank, num_ranks, num_microbatches, virtual_stages)
    for chunk in reversed(range(virtual_stages)):
        for m in range(num_microbatches):
            yield Action(Kind.B, chunk * num_ranks + rank, m)


def _one_forward_one_backward(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int) -> Iterable[Action]:
    """Warm-up of `ahead` forwards, then forward and backward in turns, then the backwards that are left."""
    n, rounds = num_ranks, num_ranks * virtual_stages
    if virtual_stages > 1 and num_microbatches % n:
        raise UsageError(
            f"schedule with {virtual_stages} virtual stages: {num_microbatches} microbatches are not a multiple of {n} ranks; "
            f"take {num_microbatches // n * n or n} or {(num_microbatches // n + 1) * n} microbatches, or one stage per rank"
        )
    total = num_microbatches * virtual_stages
    ahead = n - 1 - rank if virtual_stages == 1 else 2 * (n - 1 - rank) + (virtual_stages - 1) * n

    def turn(kind: Kind, k: int) -> Action:
        if virtual_stages == 1:
            return Action(kind, rank, k)
        chunk = k % rounds // n
        chunk = chunk if kind is Kind.F else virtual_stages - 1 - chunk
        return Action(kind, chunk * n + rank, k // rounds * n + k % n)

    for k in range(total + ahead):
        if k < total:
            yield turn(Kind.F, k)
        if k >= ahead:
            yield turn(Kind.B, k - ahead)


def _zero_bubble(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int) -> Iterable[Action]:
    """Rank r lags r weight gradients behind: as much memory as rank 0 of 1F1B, and work to fill the wait for gradients."""
    waiting: deque[Action] = deque()
    for action in _one_forward_one_backward(rank, num_ranks, num_microbatches, virtual_stages):
        if action.kind is Kind.F:
            yield action
            continue
        yield Action(Kind.I, action.stage, action.microbatch)
        waiting.append(Action(Kind.W, action.stage, action.microbatch))
        if len(waiting) > rank:
            yield waiting.popleft()
    yield from waiting


ORDERS: dict[str, Callable[[int, int, int, int], Iterable[Action]]] = {
    "naive": _naive,
    "gpipe": _gpipe,
    "1f1b": _one_forward_one_backward,
    "interleaved": _one_forward_one_backward,
    "zero-bubble": _zero_bubble,
    "forward": _forward,
}
