"""The best plan on one mesh that fits: the search's linear model of memory proposes, the liveness of the program decides."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

from autopar.core.cluster import Cluster
from autopar.core.graph import OpGraph
from autopar.core.memory import MemoryUse
from autopar.core.mesh import Mesh
from autopar.core.problem import Assignment, SearchProblem
from autopar.core.residency import Precision
from autopar.core.rule import OpRule
from autopar.errors import InfeasibleError
from autopar.planner.decode import decode
from autopar.planner.keeping import Keeping, gathering_again, recomputed_early
from autopar.planner.liveness import Engine, memory_use
from autopar.planner.pins import Pins
from autopar.planner.problem import Ports, ProblemBuilder
from autopar.planner.roles import Constraints, batch_factors
from autopar.planner.rulebook import rules_of
from autopar.planner.states import Pricing
from autopar.planner.work import gathering_again_s
from autopar.program import Program
from autopar.search.lagrange import leanest
from autopar.search.solve import solve

MEMORY_SHARE = 0.9
"""Share of a device's memory that a plan may use; the rest is left to the allocator and the runtime."""

ROUNDS = 6
"""How often the linear limit is corrected; the time limit is shared among them."""

CLOSE = 0.02
"""Linear limits nearer to each other than this are not told apart."""


@dataclass(frozen=True)
class Options:
    """What the user asks for beside model and cluster. `tokens` per step is for the report only; the graph is that of one of
    `micro_batches`, of which a pipeline may choose another number where they are free; `offload`: optimizer state lives on the host; `pipelines`: they are
    looked at even where no pin asks for one and a plan without fits; `joint`: deep models are searched by `autopar/joint`, None: on several nodes, and on one where memory is short. `time_limit_s`: of the search of
    one mesh, or of the joint search behind its first plan. `budget_s`: of a joint search from its beginning; `budget_points`: so many points it
    plans at most, beside those that it planned before with another limit of memory, and it bounds none at a cost. `row`: of a joint search on one of a row of
    machines, plans of others (`Planned.like`), which it begins with; its bound goes no further than to show that the best of all is near enough.
    `descends`: the plans before were asked for within more memory, and it goes on from there with so many more points."""

    pins: Sequence[str] = ()
    mesh: Mesh | None = None
    memory_share: float = MEMORY_SHARE
    time_limit_s: float = 30.0
    tokens: int = 0
    micro_batches: int = 1
    precision: Precision = Precision()
    offload: bool = False
    free_micro_batches: bool = False
    pipelines: bool = False
    joint: bool | None = None
    budget_s: float = math.inf
    budget_points: int | None = None
    row: tuple[Hashable, ...] | None = None
    descends: bool = False

    @property
    def has_budget(self) -> bool:
        return self.budget_s < math.inf or self.budget_points is not None


@dataclass(frozen=True)
class Candidate:
    """A plan on one mesh, and what it was chosen from. `again_s`: of a step, for what it gathers again, which the search did not see."""

    program: Program
    assignment: Assignment
    problem: SearchProblem
    ports: Ports
    engine: Engine
    again_s: float = field(default=0.0, kw_only=True)

    @property
    def step_s(self) -> float:
        return self.assignment.cost_s + self.again_s

    @cached_property
    def memory(self) -> MemoryUse:
        return memory_use(self.program, self.engine)

    @property
    def pressing_bytes(self) -> float:
        """What is held against the limit of a device."""
        return self.memory.high_bytes


class DoesNotFit(InfeasibleError):
    """No plan on a mesh fits; `leanest` is the one that comes nearest."""

    def __init__(self, leanest: Candidate, limit_bytes: float) -> None:
        super().__init__(f"no plan fits {limit_bytes:.0f} bytes")
        self.leanest, self.limit_bytes = leanest, limit_bytes


@dataclass(frozen=True)
class MeshSearch:
    """All plans of a graph on one mesh. `strict`: the pins fix what every axis does."""

    graph: OpGraph
    rules: Sequence[OpRule]
    batch: Sequence[frozenset[int]]
    cluster: Cluster
    mesh: Mesh
    pins: Pins
    options: Options
    strict: bool

    @cached_property
    def pricing(self) -> Pricing:
        return Pricing(self.cluster, self.mesh)

    @cached_property
    def _problems(self) -> dict[Keeping, tuple[SearchProblem, Ports]]:
        return {}

    @property
    def num_parts(self) -> int:
        """On how many ranks what the linear model of memory sums lies in parts."""
        return 1

    @property
    def limit_bytes(self) -> float:
        return self.cluster.device.memory_bytes * self.options.memory_share

    @property
    def given(self) -> Keeping:
        return Keeping(micro_batches=self.options.micro_batches, precision=self.options.precision, offload=self.options.offload)

    def best(self) -> Candidate:
        """What saves memory costs time, so it is only looked at where the plan without it does not fit. Raises DoesNotFit."""
        fastest = self._solved(self.given.narrowed(self.pins), None)
        return fastest if fastest.pressing_bytes <= self.limit_bytes else self._within(fastest)

    def _within(self, fastest: Candidate) -> Candidate:
        """The linear limit that lets plans fill the real one: moved by what the last plan's liveness was off it, or where that leads out of
        what is left to look at, or has fallen short twice, to its middle."""
        limit, found = self.limit_bytes, self.leanest()
        low, high = found.assignment.memory_bytes, fastest.assignment.memory_bytes
        if found.pressing_bytes > limit:
            raise DoesNotFit(found, limit)
        last, too_much = fastest, 0
        for _ in range(ROUNDS):
            linear = last.assignment.memory_bytes + self.num_parts * (limit - last.pressing_bytes)
            moved = low < linear < high and last is not found and too_much < 2
            last = self._solved(self.keeping, linear if moved else (low + high) / 2)
            too_much = too_much + 1 if last.pressing_bytes > limit else 0
            if too_much:
                high = last.assignment.memory_bytes
                leaner = self.gathering_again(last)
                if leaner is not None and leaner.pressing_bytes <= limit:
                    found = min(found, leaner, key=lambda c: c.step_s)
            else:
                low = max(low, last.assignment.memory_bytes)
                found = min(found, last, key=lambda c: c.step_s)
            if high - low < CLOSE * low:
                break
        return found

    @property
    def keeping(self) -> Keeping:
        """All that may be done about memory."""
        return self.given.everything().narrowed(self.pins)

    def leanest(self) -> Candidate:
        """The fastest of the plans that the linear model takes for those of about least memory: the very least may move whole tensors to
        save a few bytes of state."""
        problem, _ = self.problem(self.keeping)
        found = self._solved(self.keeping, leanest(problem).memory_bytes * (1 + CLOSE))
        return found if found.pressing_bytes <= self.limit_bytes else self.gathering_again(found) or found

    def gathering_again(self, found: Candidate) -> Candidate | None:
        """A plan that keeps no results of all-gathers where this one computes again; None where that is nothing, or not allowed."""
        program = gathering_again(found.program) if self.keeping.gathers_again else None
        return replace(found, program=program, again_s=self._again_s(program)) if program is not None else None

    def _again_s(self, program: Program) -> float:
        return sum(gathering_again_s(program, self.pricing).values())

    def _solved(self, keeping: Keeping, linear_limit_bytes: float | None) -> Candidate:
        whole, ports = self.problem(keeping)
        problem = whole if linear_limit_bytes is None else replace(whole, memory_limit_bytes=linear_limit_bytes)
        return self._candidate(keeping, problem, ports, self._solve(problem))

    def _solve(self, problem: SearchProblem) -> Assignment:
        found = solve(problem, time_limit_s=self.options.time_limit_s / (ROUNDS if problem.memory_limit_bytes is not None else 1))
        started_s = 2 * self.options.micro_batches * self.cluster.host.action_s  # the same for every choice, so no part of the tables
        return replace(found, cost_s=found.cost_s + started_s, bound_s=found.bound_s + started_s)

    def problem(self, keeping: Keeping) -> tuple[SearchProblem, Ports]:
        """What is searched, without a memory limit, and what its nodes stand for; built once for all limits."""
        if keeping not in self._problems:
            constraints = Constraints(self.mesh, self.pins, self.strict)
            self._problems[keeping] = ProblemBuilder(self.graph, self.rules, self.batch, self.pricing, constraints, keeping).build(None)
        return self._problems[keeping]

    def _candidate(self, keeping: Keeping, problem: SearchProblem, ports: Ports, assignment: Assignment) -> Candidate:
        program = recomputed_early(decode(self.graph, self.rules, self.pricing, ports, assignment.choices, keeping))
        return Candidate(program, assignment, problem, ports, Engine.of(self.cluster), again_s=self._again_s(program))

    def with_micro_batches(self, graph: OpGraph, number: int) -> Self:
        """The same with this graph of one of so many microbatches."""
        rules = rules_of(graph)
        return replace(self, graph=graph, rules=rules, batch=batch_factors(graph, rules), options=replace(self.options, micro_batches=number))

    def with_more_nodes(self, factor: int) -> "MeshSearch":
        """The same on a cluster of `factor` times as many nodes, the outermost axis longer."""
        first, *rest = self.mesh.axes
        cluster = replace(self.cluster, num_nodes=self.cluster.num_nodes * factor)
        return replace(self, cluster=cluster, mesh=Mesh((replace(first, size=first.size * factor), *rest)))
