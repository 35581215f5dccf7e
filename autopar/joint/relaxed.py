"""The folded problem in parts, at prices of memory: what no plan of a point pays less for."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np

from autopar.core.problem import Edge, SearchProblem
from autopar.errors import InfeasibleError
from autopar.joint.bounds import Line, Parts, counted
from autopar.joint.even import Held
from autopar.joint.figures import Block, Figures
from autopar.joint.fold import Folded
from autopar.planner.saved import Gathers
from autopar.search.elimination import Minimum, Prepared, prepare
from autopar.search.lagrange import Dual, dual
from autopar.search.simplify import BYTES, SECONDS, Price
from autopar.search.solve import solve
from autopar.search.terms import Terms

TOLERANCE = 5e-5
"""Of the seconds of the blocks: how much more a bound at another price could be."""

CHORDS = (0, 1, 3, 8, 20, 64, 256)
"""Microbatches in flight between which what bytes cost a block is taken from chords. Any will do for a bound; more make it tighter, and each takes an elimination
per price."""

AROUND = (0.5, 1.0, 2.0)
"""Times the price that goes with what a rank holds in the mean: what bytes cost blocks that are on the longest chains more or less often than others."""

LEAN = 1e4
"""A price of all bytes, in the seconds of the fastest plan, at which hardly anything but bytes counts."""


@dataclass
class Relaxed:
    """Of a run of `depth` blocks on `num_ranks`; `params`, `modes`: nodes of the folded problem, those of modes with the names of their states. A cache, not
    a value.

    `leaner`: the form of the problem in which blocks gather again what all-gathers bring, where they may do that and keep it.
    """

    folded: Folded
    params: frozenset[int]
    depth: int
    num_ranks: int
    modes: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    leaner: "Relaxed | None" = None

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

    def figures(self, choices: tuple[int, ...]) -> Figures:
        """Of one sharding, whatever modes its blocks are in."""
        if choices not in self._figures:
            self._figures[choices] = self._figures_of(choices)
        return self._figures[choices]

    @cached_property
    def _figures(self) -> dict[tuple[int, ...], Figures]:
        return {}

    def _figures_of(self, choices: tuple[int, ...]) -> Figures:
        found: dict[str, Block] = {}
        for form in (self,) if self.leaner is None else (self, self.leaner):
            nodes, terms = form._terms[0]
            for k, mode in enumerate(next(iter(form.modes.values()), ("none",))):
                states = np.array([k if node in form.modes else choices[node] for node in nodes])
                seconds, held = terms.of_plan(states)
                state = math.fsum(form.folded.problem.nodes[n].memory_bytes[s] for n, s in zip(nodes, states) if n in form.params)
                found[mode] = Block(seconds / self.depth, state / self.depth, max(0.0, held - state) / self.depth)
        return Figures(found)

    @cached_property
    def _terms(self) -> tuple[tuple[tuple[int, ...], Terms], ...]:
        """The nodes of every side, and what they cost."""
        return tuple((self.folded.nodes_of(side), Terms(self.folded.part(side))) for side in range(3))

    def line(self, flight: float, limit_bytes: float) -> Line:
        """What a rank of so much memory with so many microbatches in flight can do of the step, by the price of a byte. A few fewer in flight make it a
        bound for all near."""
        known = _power(flight, 2)
        lines = self.lines(limit_bytes)
        if known not in lines:
            total = self.num_ranks * limit_bytes
            try:
                found = self._dual(known, total)
            except InfeasibleError:
                price = self._lean(limit_bytes)  # other ranks may have more blocks than this one
                lines[known] = Line(self._block_s(known, price), price * limit_bytes, price)
            else:
                price = found.multiplier
                lines[known] = Line((found.bound_s + price * total) / self.depth, price * limit_bytes, price)
        return lines[known]

    def held(self, flights: Collection[int], mean: float, limit_bytes: float) -> list[Held]:
        """What bytes cost a block with so many microbatches in flight, at prices around that which goes with this mean of them; and at one at which bytes
        alone count, as no plan holds less than every table's least."""
        found = self.line(mean, limit_bytes).price
        if not found:
            return []
        near = [Held(found * factor, {flight: self._between(flight, partial(self._block_s, price=found * factor)) for flight in flights}) for factor in AROUND]
        lean = self._lean(limit_bytes)
        return [*near, Held(lean, {flight: self.parts.block + lean * self._between(flight, self._least_bytes) for flight in flights})]

    def _lean(self, limit_bytes: float) -> float:
        return LEAN * self._cheapest.value / max(self.num_ranks * limit_bytes, 1.0)

    def _between(self, flight: int, least: Callable[[int], float]) -> float:
        """At least what a block takes, its bytes included: that is a concave function of the microbatches in flight, so it is above its chords."""
        low = max(at for at in CHORDS if at <= flight)
        high = min((at for at in CHORDS if at > flight), default=2 * flight)
        share = (flight - low) / (high - low)
        return (1 - share) * least(low) + (share * least(high) if share else 0.0)

    def _least_bytes(self, flight: float) -> float:
        """A block holds no less."""
        return min(form._in_flight(flight).terms.least_bytes for form in ((self,) if self.leaner is None else (self, self.leaner))) / self.depth

    def _block_s(self, flight: float, price: float) -> float:
        """The least seconds of a block, its bytes included."""
        key = flight, price
        if key not in self._blocks_s:
            forms = (self,) if self.leaner is None else (self, self.leaner)
            self._blocks_s[key] = min(form._in_flight(flight).minimise(Price(1.0, price)).bound for form in forms) / self.depth
        return self._blocks_s[key]

    @cached_property
    def _blocks_s(self) -> dict[tuple[float, float], float]:
        return {}

    def lines(self, limit_bytes: float) -> dict[float, Line]:
        """Those that were asked for, by microbatches in flight."""
        return self._lines.setdefault(limit_bytes, {})

    @cached_property
    def _lines(self) -> dict[float, dict[float, Line]]:
        return {}

    def _dual(self, flight: float, total_bytes: float) -> Dual:
        """Of the blocks within a limit for all ranks; what does not depend on the limit is kept."""
        within = self._within(flight, total_bytes)
        leaner = None if self.leaner is None else self.leaner._within(flight, total_bytes)
        problem, met = within.shrunk.problem, self._met.setdefault(total_bytes, {})
        if not met and not problem.fits(within.terms.of_plan(self._cheapest.choices)[1]):
            high = Price(1.0, LEAN * self._cheapest.value / max(total_bytes, 1.0))
            met[leaner is not None, (leaner or within).minimise(high).choices] = None
        found = dual(problem, prepared=within, cheapest=self._cheapest, leaner=leaner, met=met, tolerance=TOLERANCE)
        met.update(dict.fromkeys((point.leaner, point.choices) for point in (found.over, found.within) if point is not None))
        return found

    def _within(self, flight: float, limit_bytes: float) -> Prepared:
        """The blocks with so many microbatches in flight, and a limit."""
        prepared = self._in_flight(flight)
        return replace(prepared, shrunk=replace(prepared.shrunk, problem=replace(prepared.shrunk.problem, memory_limit_bytes=limit_bytes)))

    def _in_flight(self, flight: float) -> Prepared:
        if flight not in self._prepared:
            params = {n for n, node in enumerate(self.folded.nodes_of(0)) if node in self.params}
            self._prepared[flight] = self._block.with_bytes(self._block.shrunk.problem.in_flight(counted(flight), params))
        return self._prepared[flight]

    @cached_property
    def _prepared(self) -> dict[float, Prepared]:
        return {}

    @cached_property
    def _met(self) -> dict[float, dict[tuple[bool, tuple[int, ...]], None]]:
        """By limit, plans of the blocks between which the best prices were found, and whether of the leaner form; other numbers of microbatches have theirs near
        them."""
        return {}

    @cached_property
    def _flights(self) -> dict[float, Folded]:
        return {}

    def in_flight(self, times: float) -> Folded:
        """The folded problem with the activations of so many microbatches of all stages."""
        if times not in self._flights:
            self._flights[times] = replace(self.folded, problem=self.folded.problem.in_flight(times, self.params))
        return self._flights[times]


def _power(flight: float, steps: int) -> float:
    """The next power of two that is no more, or one of so many `steps` between two of them."""
    return 2.0 ** (math.floor(steps * math.log2(flight)) / steps) if flight >= 1 else 0.0


def passes_alone(problem: SearchProblem, once_s: Mapping[int, np.ndarray]) -> SearchProblem:
    """A problem without the seconds that its edges cost `once_s` a step."""
    known: dict[tuple[int, int], np.ndarray] = {}

    def less(edge: Edge, once: np.ndarray) -> Edge:
        key = id(edge.cost_s), id(once)
        if key not in known:
            known[key] = (edge.cost_s - once).clip(min=0.0)
        return replace(edge, cost_s=known[key])

    return replace(problem, edges=tuple(less(e, once_s[n]) if n in once_s else e for n, e in enumerate(problem.edges)))


def with_gathers(problem: SearchProblem, gathers: Mapping[int, Gathers], *, again: bool) -> SearchProblem:
    """A problem in which what all-gathers bring is kept, or not kept but gathered again for the backward."""
    known: dict[tuple[int, int], np.ndarray] = {}

    def formed(edge: Edge, found: Gathers) -> Edge:
        if not again:
            return replace(edge, memory_bytes=found.kept_bytes)
        key = id(edge.cost_s), id(found)
        if key not in known:
            known[key] = edge.cost_s + found.again_s
        return replace(edge, cost_s=known[key], memory_bytes=found.again_bytes)

    return replace(problem, edges=tuple(formed(e, gathers[n]) if n in gathers else e for n, e in enumerate(problem.edges)))
