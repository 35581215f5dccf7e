"""The best pipeline of one length on one mesh per stage: the program of a whole microbatch, cut into stages.

All stages have meshes of one shape, and the sharding is searched for the whole graph at once: every operator is in one stage, so that every
stage has its own. Where memory binds, the linear model counts the activations of as many microbatches as are in flight on the fullest rank,
and the stages together may hold as much as all ranks have; the liveness of the built stages decides.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from autopar.core.graph import OpGraph
from autopar.core.memory import MemoryUse
from autopar.core.problem import Assignment, SearchProblem
from autopar.errors import InfeasibleError, UsageError
from autopar.planner.blocks import Blocks, Order
from autopar.planner.cuts import Cut, best_cut, formula_cut
from autopar.planner.keeping import Keeping
from autopar.planner.problem import Ports
from autopar.planner.search import Candidate, MeshSearch
from autopar.planner.staging import Staged
from autopar.planner.states import Pricing

TRIES = 4
"""How often a cut is made again under a lower limit, where its stages hold more than the table said."""


@dataclass(frozen=True)
class StagedCandidate(Candidate):
    """A sharding with its cut. `exact`: no other cut of it is faster."""

    staged: Staged
    exact: bool = False

    @property
    def step_s(self) -> float:
        return self.staged.timeline.step_time_s

    @property
    def memory(self) -> MemoryUse:  # type: ignore[override]
        return self.staged.worst_memory

    @property
    def pressing_bytes(self) -> float:
        return self.staged.pressing_bytes


@dataclass(frozen=True)
class StageSearch(MeshSearch):
    """All plans of a pipeline that runs in this order, its axis at `position` among those of the mesh of a stage."""

    order: Order
    position: int

    @cached_property
    def pricing(self) -> Pricing:
        return Pricing(self.cluster, self.mesh, (self.order.num_ranks, self.position))

    @property
    def along(self) -> Pricing:
        """What the stages cost that the sharding is cut into."""
        return self.pricing

    @property
    def num_parts(self) -> int:
        return self.order.num_ranks

    @property
    def given(self) -> Keeping:
        return self._possible(super().given)

    @property
    def keeping(self) -> Keeping:
        return self._possible(super().keeping)

    def with_micro_batches(self, graph: OpGraph, number: int) -> Self:
        return replace(super().with_micro_batches(graph, number), order=replace(self.order, num_microbatches=number))

    def _possible(self, keeping: Keeping) -> Keeping:
        """A split backward would reduce-scatter the gradients of every microbatch twice, so it goes with stages 0 and 1."""
        if self.order.schedule == "zero-bubble" and self.pins.zero in (2, 3):
            raise UsageError(f"schedule zero-bubble does not go with zero={self.pins.zero}")
        return replace(keeping, stages=tuple(s for s in keeping.stages if s < 2)) if self.order.schedule == "zero-bubble" else keeping

    def problem(self, keeping: Keeping) -> tuple[SearchProblem, Ports]:
        problem, ports = super().problem(keeping)
        return problem.in_flight(max(self.order.in_flight), frozenset(ports.param_node.values())), ports

    def sharded(self) -> Candidate:
        """The fastest sharding, memory and cuts aside: the same for all orders."""
        keeping = self.given.narrowed(self.pins)
        problem, ports = super().problem(keeping)
        return super()._candidate(keeping, problem, ports, self._solve(problem))

    def _candidate(self, keeping: Keeping, problem: SearchProblem, ports: Ports, assignment: Assignment) -> Candidate:
        return self.staged(super()._candidate(keeping, problem, ports, assignment))

    def gathering_again(self, found: Candidate) -> Candidate | None:
        made = super().gathering_again(found)
        return None if made is None else self.staged(made)

    def staged(self, found: Candidate, *, best: bool = False) -> StagedCandidate:
        """A sharding cut into stages: by the formula, or by the `best` cut found; the leanest of those tried where none fits."""
        blocks, limit = Blocks(found.program, self.along), self.limit_bytes
        leanest: StagedCandidate | None = None
        for _ in range(TRIES):
            try:
                cut = (best_cut if best else formula_cut)(blocks, self.order, limit)
            except InfeasibleError:
                break
            made = _made(found, blocks, cut, self.order)
            if leanest is None or made.pressing_bytes < leanest.pressing_bytes:
                leanest = made
            if made.pressing_bytes <= self.limit_bytes:
                return made
            limit -= made.pressing_bytes - self.limit_bytes
        return leanest or _made(found, blocks, formula_cut(blocks, self.order, float("inf")), self.order)


def _made(found: Candidate, blocks: Blocks, cut: Cut, order: Order) -> StagedCandidate:
    staged = Staged.of(blocks, cut, order, found.engine)
    return StagedCandidate(found.program, found.assignment, found.problem, found.ports, found.engine, staged, cut.exact)
