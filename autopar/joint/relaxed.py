"""The folded problem in parts, at prices of memory: what no plan of a point pays less for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import permutations

import numpy as np

from autopar.core.problem import SearchProblem
from autopar.errors import InfeasibleError
from autopar.joint.bounds import Line, Parts
from autopar.joint.fold import Folded
from autopar.search.elimination import Minimum, Prepared, prepare
from autopar.search.lagrange import Dual, dual
from autopar.search.simplify import BYTES, SECONDS, Price
from autopar.search.solve import solve
from autopar.search.terms import Terms

TOLERANCE = 5e-5
"""Of the seconds of the blocks: how much more a bound at another price could be."""

LEAN = 1e4
"""A price of all bytes, in the seconds of the fastest plan, at which hardly anything but bytes counts."""


@dataclass
class Relaxed:
    """Of a run of `depth` blocks on `num_ranks`; `params`: nodes of the folded problem. A cache, not a value."""

    folded: Folded
    params: frozenset[int]
    depth: int
    num_ranks: int

    @cached_property
    def parts(self) -> Parts:
        """Seconds of a block, and of what is before and behind the run, each at its least."""
        block, first, last = self._cheapest.bound, *(solve(self.folded.part(side), use_ilp="never").bound_s for side in (1, 2))
        return Parts(block / self.depth, first, last)

    @cached_property
    def _block(self) -> Prepared:
        """All blocks alone, with the activations of one microbatch."""
        return prepare(self.folded.part(0), (SECONDS, BYTES))

    @cached_property
    def _cheapest(self) -> Minimum:
        return self._block.minimise(SECONDS)

    def parts_of(self, choices: Sequence[int]) -> Parts:
        """The same of one sharding."""
        block, first, last = (terms.of_plan([choices[n] for n in nodes])[0] for nodes, terms in self._terms)
        return Parts(block / self.depth, first, last)

    @cached_property
    def _terms(self) -> tuple[tuple[tuple[int, ...], Terms], ...]:
        """The nodes of every side, and what they cost."""
        return tuple((self.folded.nodes_of(side), Terms(self.folded.part(side))) for side in range(3))

    def line_of(self, plans: Sequence[tuple[int, ...]], flight: float, limit_bytes: float) -> Line:
        """The same as `line` where every block is as in one of these plans."""
        total = self.num_ranks * limit_bytes
        found = [(cost_s, once + (flight - 1) * more) for cost_s, once, more in map(self._figures_of, plans)]
        if min(held for _, held in found) > total:
            return Line(math.inf)
        crossings = [(c - d) / (h - g) for (c, g), (d, h) in permutations(found, 2) if h > g and c > d]
        bound_s, price = max((min(c + p * (held - total) for c, held in found), p) for p in (0.0, *crossings))
        return Line((bound_s + price * total) / self.depth, price * limit_bytes, price)

    def _figures_of(self, plan: tuple[int, ...]) -> tuple[float, float, float]:
        """Seconds of all blocks, their bytes with one microbatch in flight, and what every other adds."""
        if plan not in self._figures:
            nodes, terms = self._terms[0]
            states = [plan[n] for n in nodes]
            (cost_s, once), (_, twice) = terms.of_plan(states), self._twice.of_plan(states)
            self._figures[plan] = cost_s, once, twice - once
        return self._figures[plan]

    @cached_property
    def _figures(self) -> dict[tuple[int, ...], tuple[float, float, float]]:
        return {}

    @cached_property
    def _twice(self) -> Terms:
        """As the first of `_terms`, with two microbatches in flight."""
        return Terms(self.in_flight(2.0).part(0))

    def line(self, flight: float, limit_bytes: float) -> Line:
        """What a rank of so much memory with so many microbatches in flight can do of the step, by the price of a byte. A few fewer in flight make it a
        bound for all near."""
        known = 2.0 ** (math.floor(2 * math.log2(flight)) / 2)
        lines = self.lines(limit_bytes)
        if known not in lines:
            total = self.num_ranks * limit_bytes
            try:
                found = self._dual(known, total)
            except InfeasibleError:
                lines[known] = Line(math.inf)
            else:
                price = found.multiplier
                lines[known] = Line((found.bound_s + price * total) / self.depth, price * limit_bytes, price)
        return lines[known]

    def lines(self, limit_bytes: float) -> dict[float, Line]:
        """Those that were asked for, by microbatches in flight."""
        return self._lines.setdefault(limit_bytes, {})

    @cached_property
    def _lines(self) -> dict[float, dict[float, Line]]:
        return {}

    def _dual(self, flight: float, total_bytes: float) -> Dual:
        """Of the blocks within a limit for all ranks; what does not depend on the limit is kept."""
        if flight not in self._prepared:
            params = {n for n, node in enumerate(self.folded.nodes_of(0)) if node in self.params}
            self._prepared[flight] = self._block.with_bytes(self._block.shrunk.problem.in_flight(flight, params))
        prepared = self._prepared[flight]
        problem = replace(prepared.shrunk.problem, memory_limit_bytes=total_bytes)
        within = replace(prepared, shrunk=replace(prepared.shrunk, problem=problem))
        met = self._met.setdefault(total_bytes, {})
        if not met and not problem.fits(prepared.terms.of_plan(self._cheapest.choices)[1]):
            met[within.minimise(Price(1.0, LEAN * self._cheapest.value / max(total_bytes, 1.0))).choices] = None
        found = dual(problem, prepared=within, cheapest=self._cheapest, met=met, tolerance=TOLERANCE)
        met.update(dict.fromkeys(point.choices for point in (found.over, found.within) if point is not None))
        return found

    @cached_property
    def _prepared(self) -> dict[float, Prepared]:
        return {}

    @cached_property
    def _met(self) -> dict[float, dict[tuple[int, ...], None]]:
        """By limit, plans of the blocks between which the best prices were found; other numbers of microbatches have theirs near them."""
        return {}

    @cached_property
    def _flights(self) -> dict[float, Folded]:
        return {}

    def in_flight(self, times: float) -> Folded:
        """The folded problem with the activations of so many microbatches of all stages."""
        if times not in self._flights:
            self._flights[times] = replace(self.folded, problem=self.folded.problem.in_flight(times, self.params))
        return self._flights[times]


def passes_alone(problem: SearchProblem, once_s: Mapping[int, np.ndarray]) -> SearchProblem:
    """A problem without the seconds that its edges cost `once_s` a step."""
    less = {id(once): (problem.edges[e].cost_s - once).clip(min=0.0) for e, once in once_s.items()}
    return replace(problem, edges=tuple(replace(e, cost_s=less[id(once_s[n])]) if n in once_s else e for n, e in enumerate(problem.edges)))
