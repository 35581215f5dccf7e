"""Where to cut a program for one way to run it: the cut whose simulated step is shortest.

The formula of `search/stages.py` proposes. Where all cuts can be listed, they are simulated in the order of a lower bound until the next bound
is no less than the best step, so that no cut that was left out is faster. Where they are too many, single cuts are moved while that helps.

Lower bound of the step: a rank does the work of its stages for all microbatches one after the other; before its first forward lies a way of
forwards through the blocks it reads from, behind its last backward the way of the gradients back.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from autopar.cost_models.outline import Outline
from autopar.errors import InfeasibleError
from autopar.planner.blocks import PARAMETERS, Blocks, Order
from autopar.planner.states import Pricing

MAX_LISTED = 5000
"""Cuts that are listed; more are searched from the formula's by moving one at a time."""

MAX_SIMULATED = 200


@dataclass(frozen=True)
class Cut:
    """`cuts`: the first block of every stage but the first. `exact`: no other cut of this program under this schedule is faster."""

    cuts: tuple[int, ...]
    timeline: Outline
    exact: bool = False

    @property
    def key(self) -> tuple[float, tuple[int, ...]]:
        return self.timeline.step_time_s, self.cuts


def formula_cut(blocks: Blocks, order: Order, memory_limit_bytes: float) -> Cut:
    """The formula's proposal, timed; raises InfeasibleError where nothing fits."""
    cuts = blocks.formula_cut(order, memory_limit_bytes)
    return Cut(cuts, blocks.timeline(cuts, order))


def best_cut(blocks: Blocks, order: Order, memory_limit_bytes: float) -> Cut:
    """The fastest cut found that fits the memory of the simulated lists; raises InfeasibleError where none does."""
    listed = math.comb(blocks.num_blocks - 1, order.num_stages - 1) <= MAX_LISTED
    start = _proposal(blocks, order, memory_limit_bytes)
    return _listed(blocks, order, memory_limit_bytes, start) if listed else _moved(blocks, order, memory_limit_bytes, start)


def _proposal(blocks: Blocks, order: Order, memory_limit_bytes: float) -> Cut:
    """The formula's cut under the limit; its memory is that of 1F1B, so without a limit where that says that nothing fits."""
    try:
        return formula_cut(blocks, order, memory_limit_bytes)
    except InfeasibleError:
        return formula_cut(blocks, order, math.inf)


def fits(pricing: Pricing, timeline: Outline, memory_limit_bytes: float) -> bool:
    """Whether every rank holds no more than the limit, and what its devices have beyond that, by the simulated lists."""
    return max(timeline.peak_bytes(rank) - pricing.spare_bytes(rank) for rank in range(timeline.num_ranks)) <= memory_limit_bytes


def _listed(blocks: Blocks, order: Order, limit: float, start: Cut) -> Cut:
    best = start if fits(blocks.pricing, start.timeline, limit) else None
    every = ((bound_s(blocks, cuts, order), cuts) for cuts in combinations(range(1, blocks.num_blocks), order.num_stages - 1) if _holds(blocks, cuts))
    for n, (bound, cuts) in enumerate(sorted(every)):
        if best is not None and bound >= best.timeline.step_time_s:
            return Cut(best.cuts, best.timeline, exact=True)
        if n == MAX_SIMULATED:
            break
        found = Cut(cuts, blocks.timeline(cuts, order))
        if fits(blocks.pricing, found.timeline, limit) and (best is None or found.key < best.key):
            best = found
    else:
        if best is not None:
            return Cut(best.cuts, best.timeline, exact=True)
    if best is None:
        raise InfeasibleError(f"no cut into {order.num_stages} stages fits {limit:.0f} bytes")
    return best


def _moved(blocks: Blocks, order: Order, limit: float, start: Cut) -> Cut:
    best, better = start, True
    if not fits(blocks.pricing, start.timeline, limit):
        raise InfeasibleError(f"no cut into {order.num_stages} stages was found that fits {limit:.0f} bytes")
    while better:
        better = False
        for cuts in _neighbours(blocks, best.cuts):
            if bound_s(blocks, cuts, order) >= best.timeline.step_time_s:
                continue
            found = Cut(cuts, blocks.timeline(cuts, order))
            if found.key < best.key and fits(blocks.pricing, found.timeline, limit):
                best, better = found, True
    return best


def _neighbours(blocks: Blocks, cuts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for i in range(len(cuts)):
        for step in (-1, 1):
            moved = (*cuts[:i], cuts[i] + step, *cuts[i + 1 :])
            bounds = (0, *moved, blocks.num_blocks)
            if all(a < b for a, b in pairwise(bounds)) and _holds(blocks, moved):
                yield moved


def _holds(blocks: Blocks, cuts: Sequence[int]) -> bool:
    """Whether every stage has a parameter."""
    return all(blocks.on(0).cost(a, b)[PARAMETERS] for a, b in pairwise((0, *cuts, blocks.num_blocks)))


def bound_s(blocks: Blocks, cuts: Sequence[int], order: Order) -> float:
    """No timeline of these stages under this order ends earlier; where ranks share cores, none ends before all work is done on all of them."""
    split = order.schedule == "zero-bubble"
    ranks: list[list[tuple[int, int]]] = [[] for _ in range(order.num_ranks)]
    for s, run in enumerate(pairwise((0, *cuts, blocks.num_blocks))):
        ranks[s % order.num_ranks].append(run)
    alone = max(_rank_bound_s(blocks, rank, runs, order.num_microbatches, split=split) for rank, runs in enumerate(ranks)) / blocks.pricing.cluster.crowding
    work = order.num_microbatches * sum(sum(blocks.on(rank).cost(*run)[:3]) for rank, runs in enumerate(ranks) for run in runs)
    return max(alone, work / order.num_ranks)


def _rank_bound_s(blocks: Blocks, rank: int, runs: Sequence[tuple[int, int]], num_microbatches: int, *, split: bool) -> float:
    rows = [blocks.on(rank).cost(*run) for run in runs]
    work = num_microbatches * sum(sum(row[:3]) for row in rows)
    forward, inputs, backward = blocks.paths_s
    before = min(_way(blocks, run, forward, "readers") for run in runs)
    if split:  # weight gradients may come after the last gradient that is sent back
        sent = num_microbatches * sum(sum(row[:2]) for row in rows)
        return before + max(work, sent + min(_way(blocks, run, inputs, "answering") for run in runs))
    return before + work + min(_way(blocks, run, backward, "answering") for run in runs)


def _way(blocks: Blocks, run: tuple[int, int], longest: Sequence[float], kind: str) -> float:
    first, end = run
    found = (longest[c.maker] for c in blocks.crossings if c.maker < first and any(first <= b < end for b in getattr(c, kind)))
    return max(found, default=0.0)
