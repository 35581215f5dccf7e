"""The same problem as an integer program, for OR-Tools: a second opinion, and the closer of gaps.

Variables   x[i, s] in {0, 1}      node i is in state s
            y[e, s, t] >= 0        edge e = (i, j) is in states (s, t); only for pairs that are not forbidden

Minimise    sum cost_s[i, s] x[i, s] + sum cost_s[e, s, t] y[e, s, t]                                     (`assemble`)
Subject to  sum over s of x[i, s] = 1                                for every node                        (rows "one")
            sum over t of y[e, s, t] = x[i, s],  sum over s of y[e, s, t] = x[j, t]                        (rows "marginal")
            sum memory_bytes[i, s] x[i, s] + sum memory_bytes[e, s, t] y[e, s, t] <= limit - base          (row "memory")

The marginals as equalities make the relaxation the local polytope: exact on trees, and on sharding problems without a
binding memory row nearly always integral. So `solve_ilp` solves the LP first (HiGHS, built from numpy arrays), and
only if its optimum is fractional the integer program (CP-SAT, `linearization_level=2`: at its default level it does
not get anywhere on this model). CP-SAT counts in integers: seconds are rounded down to a grid of 2^-40 of the known
optimum's scale, so its bound stays a bound; bytes are rounded up, so its plans fit.

No solver is believed. They run in a process of their own (`process.py`), under a limit of seconds and bytes; the plan is read off, priced with `evaluate`
and compared with what the solver says; a bound above a plan that is known, or a word that does not go with the numbers, is a failure like an answer that
never comes (`SolverFailed`), and so is "infeasible" where elimination finds a plan.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from autopar.core.problem import Assignment, SearchProblem, evaluate
from autopar.errors import UsageError
from autopar.search.lagrange import leanest
from autopar.search.process import Arrays, SolverFailed, SolverProcess, solvers
from autopar.search.simplify import canonical

INTEGRAL = 1e-6  # an x this close to 0 or 1 is; HiGHS keeps rows to 1e-7
AGREEMENT = 1e-6  # relative difference between a solver's value and ours that its tolerances explain
LP_TOLERANCE = 1e-7  # relative accuracy of HiGHS' optimum: taken off where it serves as a bound
EXACT_GAP = 1e-9  # a relative gap below this is rounding to the grid
COARSE = 1e-2  # a plan this far below the scale of a solve was priced too roughly
LP_SCALE = 1e4  # the known optimum in units of HiGHS' objective
GRID_UNITS = 2.0**40  # the known optimum in units of CP-SAT's objective
MAX_SUM = 2.0**59  # of all integer coefficients of a row, below the overflow of 64 bits
START_S, COLUMN_S = 10.0, 2e-4  # what a solver may take beside its time limit, to start and to build a model, before it is killed
DETERMINISTIC_SHARE = 1 / 3  # of the time limit: a unit of deterministic time took up to 3 s here, so the wall clock rarely decides


@dataclass(frozen=True, slots=True, eq=False)
class LinearModel:
    """Columns first the x of node 0, 1, ..., then the y of edge 0, 1, ...; `offsets[i]` is the first x of node i.

    Every entry of the equality rows is (row, column, sign); rows below `num_nodes` equal 1, the others 0.
    """

    offsets: np.ndarray
    pairs: np.ndarray  # [num_y, 2] columns of the two x that a y belongs to
    cost_s: np.ndarray
    memory_bytes: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    signs: np.ndarray
    num_rows: int

    @property
    def num_nodes(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_x(self) -> int:
        return int(self.offsets[-1])

    def states(self, x: np.ndarray) -> tuple[int, ...]:
        """The state of each node whose x is largest."""
        return tuple(int(x[a:b].argmax()) for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True))


def assemble(problem: SearchProblem) -> LinearModel:
    """The arrays of the model; the problem is canonical."""
    offsets = np.cumsum([0] + [node.num_states for node in problem.nodes])
    num_x = int(offsets[-1])
    costs, memories, pairs = [node.cost_s for node in problem.nodes], [node.memory_bytes for node in problem.nodes], []
    rows = [np.repeat(np.arange(len(problem.nodes)), np.diff(offsets))]
    columns, signs = [np.arange(num_x)], [np.ones(num_x)]
    next_row, next_column = len(problem.nodes), num_x
    for edge in problem.edges:
        s, t = np.nonzero(np.isfinite(edge.cost_s))
        y = next_column + np.arange(len(s))
        costs.append(edge.cost_s[s, t])
        memories.append(np.zeros(len(s)) if edge.memory_bytes is None else edge.memory_bytes[s, t])
        pairs.append(np.stack([offsets[edge.u] + s, offsets[edge.v] + t], axis=1))
        for node, state in ((edge.u, s), (edge.v, t)):
            k = problem.nodes[node].num_states
            rows += [next_row + state, next_row + np.arange(k)]
            columns += [y, offsets[node] + np.arange(k)]
            signs += [np.ones(len(y)), -np.ones(k)]
            next_row += k
        next_column += len(s)
    return LinearModel(
        offsets=offsets,
        pairs=np.concatenate(pairs) if pairs else np.zeros((0, 2), dtype=int),
        cost_s=np.concatenate(costs) if costs else np.zeros(0),
        memory_bytes=np.concatenate(memories) if memories else np.zeros(0),
        rows=np.concatenate(rows),
        columns=np.concatenate(columns),
        signs=np.concatenate(signs),
        num_rows=next_row,
    )


def solve_ilp(
    problem: SearchProblem,
    *,
    warm_start: Sequence[int] | None = None,
    time_limit_s: float = 30.0,
    lower_bound_s: float = 0.0,
    relative_gap: float = 0.0,
) -> Assignment:
    """The best plan within the memory limit, found by LP or, where that is fractional, by CP-SAT.

    `warm_start` is a plan within the limit, `lower_bound_s` a bound that is known already, `relative_gap` the gap at
    which to stop. At the time limit the best plan so far comes back with proof "budget". CP-SAT counts
    deterministic time, so that the result is the same on a somewhat slower machine; the wall clock is the last resort.
    Raises SolverFailed where a solver does not answer, or with what cannot be.
    """
    merged = canonical(problem)
    if not merged.nodes:
        return _assignment(problem, (), 0.0, "lp", "exact")
    model = assemble(merged)
    known = _known_plan(problem, warm_start) or _cheapest_states(problem)
    with solvers() as process:
        while True:
            plan = _Solve(process, model, problem, known, time_limit_s).plan(lower_bound_s, relative_gap)
            if plan.cost_s >= COARSE * _reference_s(model, known) or plan.cost_s <= sys.float_info.min:
                return plan
            known = plan  # far below the scale that solver tolerances referred to: once more, at its own scale


def _reference_s(model: LinearModel, known: Assignment | None) -> float:
    """The scale of the cost of a plan: that of the known one, or what no plan's nodes exceed."""
    ceiling_s = float(model.cost_s.max()) * model.num_nodes
    return min(known.cost_s, ceiling_s) if known else ceiling_s


def _known_plan(problem: SearchProblem, warm_start: Sequence[int] | None) -> Assignment | None:
    if warm_start is None:
        return None
    plan = _assignment(problem, tuple(warm_start), 0.0, "warm start", "budget")
    if not (math.isfinite(plan.cost_s) and problem.fits(plan.memory_bytes)):
        raise UsageError(f"the warm start costs {plan.cost_s} s and holds {plan.memory_bytes:.0f} bytes: it is not a plan within the limit")
    return plan


def _cheapest_states(problem: SearchProblem) -> Assignment | None:
    """Every node in its cheapest state, if that is a plan: nothing that costs more needs a column."""
    plan = _assignment(problem, tuple(int(node.cost_s.argmin()) for node in problem.nodes), 0.0, "cheapest states", "budget")
    return plan if math.isfinite(plan.cost_s) and problem.fits(plan.memory_bytes) else None


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """What a solver says: a status, and with "optimal" and "feasible" the x of a point, its value and a lower bound, in seconds."""

    status: str
    x: np.ndarray
    value_s: float
    bound_s: float

    @classmethod
    def read(cls, answer: Arrays, num_x: int, per_second: float) -> "Claim":
        """Raises SolverFailed where it is no such thing."""
        try:
            status = str(answer["status"])
            if status in ("infeasible", "unknown"):
                return cls(status, np.zeros(num_x), math.inf, 0.0)
            if status not in ("optimal", "feasible"):
                raise ValueError(f"status {status!r}")
            x, value_s = np.asarray(answer["x"], dtype=float), float(answer["value"]) / per_second
            claim = cls(status, x, value_s, float(answer.get("bound", answer["value"])) / per_second)
        except (KeyError, TypeError, ValueError) as error:
            raise SolverFailed(f"the solver gave an answer without sense: {error}") from error
        if x.shape != (num_x,) or not np.isfinite([*x, value_s, claim.bound_s]).all():
            raise SolverFailed("the solver gave a point that is none")
        return claim


@dataclass(frozen=True, slots=True, eq=False)
class _Solve:
    """One attempt, at the scale of the plan that is known."""

    process: SolverProcess
    model: LinearModel
    problem: SearchProblem
    known: Assignment | None
    time_limit_s: float

    def plan(self, lower_bound_s: float, relative_gap: float) -> Assignment:
        """The LP and, if that settles nothing, CP-SAT."""
        relaxed = self._relaxed()
        if relaxed is not None:
            agrees = True
            if np.minimum(np.abs(relaxed.x), np.abs(1 - relaxed.x)).max() < INTEGRAL:
                plan = _assignment(self.problem, self.model.states(relaxed.x), relaxed.value_s, "lp", "exact")
                agrees = _disagreement(self.problem, plan, relaxed.value_s, 0.0) is None
                if agrees:
                    return plan
            if agrees:
                lower_bound_s = max(lower_bound_s, relaxed.value_s - LP_TOLERANCE * _reference_s(self.model, self.known))
        return self._closed(max(lower_bound_s, 0.0), relative_gap)

    def _relaxed(self) -> Claim | None:
        """The LP optimum by HiGHS; None where there is no answer in time, or no point where a plan is known."""
        scale = LP_SCALE / _positive(_reference_s(self.model, self.known))  # HiGHS' tolerances are absolute
        claim = self._asked("lp", _lp_arrays(self.model, self.problem, scale, self.known), scale)
        if claim.status == "infeasible" and self.known is None:
            self._no_plan("the linear relaxation has no point within the memory limit")
        if claim.status != "optimal":
            return None
        self._check_bound(claim.bound_s, self.known, 0.0)
        return claim

    def _closed(self, lower_bound_s: float, relative_gap: float) -> Assignment:
        """The best plan by CP-SAT."""
        grid = _Grid.of(self.model, self.problem, self.known)
        question = _cpsat_arrays(self.model, grid, self.known)
        question |= {"relative_gap": relative_gap, "deterministic_limit": DETERMINISTIC_SHARE * self.time_limit_s}
        claim = self._asked("cp-sat", question, grid.per_second)
        if claim.status == "infeasible":
            self._no_plan("CP-SAT finds no combination of states within the memory limit")
        found = [self.known] if self.known else []
        if claim.status in ("optimal", "feasible"):
            rounding_s = self.model.num_rows / grid.per_second
            plan = _assignment(self.problem, self.model.states(claim.x), claim.value_s, "cp-sat", "exact")
            complaint = _disagreement(self.problem, plan, claim.value_s, rounding_s)
            if complaint is not None:
                raise SolverFailed(f"CP-SAT {complaint}")
            found.append(plan)
            best = min(found, key=lambda plan: plan.cost_s)
            self._check_bound(max(lower_bound_s, claim.bound_s), best, rounding_s)
            if claim.status == "optimal" and not best.cost_s - claim.bound_s <= (relative_gap + AGREEMENT) * best.cost_s + rounding_s:
                raise SolverFailed(f"CP-SAT calls a plan of {best.cost_s!r} s optimal with a bound of {claim.bound_s!r} s")
            lower_bound_s = max(lower_bound_s, claim.bound_s)
        if not found:
            raise SolverFailed(f"no plan was found in {self.time_limit_s} s; raise the limit or give a warm start")
        best = min(found, key=lambda plan: plan.cost_s)
        gap = max(0.0, best.cost_s - lower_bound_s) / max(best.cost_s, sys.float_info.min)
        proof = "exact" if gap <= EXACT_GAP else "bound" if claim.status == "optimal" else "budget"
        return _assignment(self.problem, best.choices, lower_bound_s, "cp-sat", proof)

    def _asked(self, solver: str, question: dict[str, Any], per_second: float) -> Claim:
        kill_s = self.time_limit_s + START_S + COLUMN_S * len(self.model.cost_s)
        question |= {"solver": solver, "num_x": self.model.num_x, "time_limit_s": self.time_limit_s, "kill_s": kill_s}
        return Claim.read(self.process.ask(question, kill_s), self.model.num_x, per_second)

    def _check_bound(self, bound_s: float, plan: Assignment | None, rounding_s: float) -> None:
        if plan is not None and not bound_s <= plan.cost_s * (1 + AGREEMENT) + rounding_s:
            raise SolverFailed(f"the solver gave a bound of {bound_s!r} s, above a plan of {plan.cost_s!r} s")

    def _no_plan(self, words: str) -> NoReturn:
        """Somebody else is asked: raises InfeasibleError where elimination finds no plan either, with the bytes that are missing."""
        plan = self.known or leanest(self.problem)
        raise SolverFailed(f"{words}, but there is one of {plan.cost_s!r} s")


def _lp_arrays(model: LinearModel, problem: SearchProblem, scale: float, known: Assignment | None) -> dict[str, Any]:
    useful = _useful(model, known.cost_s if known else math.inf)
    right = (np.arange(model.num_rows) < model.num_nodes).astype(float)
    rows, columns, values = model.rows, model.columns, model.signs
    lower, upper = right, right
    if problem.memory_limit_bytes is not None:
        unit = max(float(model.memory_bytes.max()), 1.0)  # the row in units of its largest entry
        heavy = np.flatnonzero(model.memory_bytes)
        rows = np.concatenate([rows, np.full(len(heavy), model.num_rows)])
        columns = np.concatenate([columns, heavy])
        values = np.concatenate([values, model.memory_bytes[heavy] / unit])
        lower = np.append(right, -math.inf)
        upper = np.append(right, (problem.memory_limit_bytes - problem.base_memory_bytes) / unit)
    order = np.lexsort((columns, rows))
    return {
        "cost": np.where(useful, model.cost_s * scale, 0.0),
        "most": np.where(useful, math.inf, 0.0),
        "rows": rows[order],
        "columns": columns[order],
        "values": values[order],
        "lower": lower,
        "upper": upper,
    }


@dataclass(frozen=True, slots=True)
class _Grid:
    """Seconds and bytes as integers: `per_second` and `per_byte` units, columns above `cutoff_s` are never in a better plan."""

    per_second: float
    per_byte: float
    cutoff_s: float
    room_units: int | None

    @classmethod
    def of(cls, model: LinearModel, problem: SearchProblem, known: Assignment | None) -> "_Grid":
        cutoff_s = known.cost_s if known else math.inf
        total_s = float(model.cost_s[_useful(model, cutoff_s)].sum())
        per_second = min(GRID_UNITS / _positive(_reference_s(model, known)), MAX_SUM / _positive(total_s))
        room_units, per_byte = None, 1.0
        if problem.memory_limit_bytes is not None:
            room = problem.memory_limit_bytes - problem.base_memory_bytes
            total = max(float(model.memory_bytes.sum()), 1.0)
            whole = bool((model.memory_bytes == np.floor(model.memory_bytes)).all()) and total <= MAX_SUM
            per_byte = 1.0 if whole else 2.0 ** math.floor(math.log2(MAX_SUM / total))
            room_units = math.floor(min(room, total) * per_byte)
        return cls(per_second, per_byte, cutoff_s, room_units)


def _cpsat_arrays(model: LinearModel, grid: _Grid, known: Assignment | None) -> dict[str, Any]:
    useful = _useful(model, grid.cutoff_s)
    arrays: dict[str, Any] = {"useful": useful, "rows": model.rows, "columns": model.columns, "values": model.signs}
    arrays["cost"] = _whole(np.where(useful, model.cost_s, 0.0) * grid.per_second)
    if grid.room_units is not None:
        # rounded down, so that the bound holds for every plan within the limit; plans are checked with `evaluate`
        arrays["held"], arrays["room"] = _whole(model.memory_bytes * grid.per_byte), grid.room_units
    if known:
        chosen = np.zeros(model.num_x, dtype=bool)
        chosen[model.offsets[:-1] + known.choices] = True
        arrays["point"] = np.concatenate([chosen, chosen[model.pairs].all(axis=1)])
    return arrays


def _whole(units: np.ndarray) -> np.ndarray:
    return np.floor(units).astype(np.int64)


def _useful(model: LinearModel, cutoff_s: float) -> np.ndarray:
    """Mask of the columns that can be part of a plan of at most `cutoff_s` seconds."""
    return model.cost_s <= cutoff_s * (1 + EXACT_GAP)


def _positive(value: float) -> float:
    """A divisor: 1 where there is nothing to scale by."""
    return value if value > sys.float_info.min else 1.0


def _disagreement(problem: SearchProblem, plan: Assignment, claimed_s: float, rounding_s: float) -> str | None:
    """What is wrong with a solver's plan: not worth what it claims, or over the limit."""
    if not abs(plan.cost_s - claimed_s) <= AGREEMENT * max(plan.cost_s, claimed_s) + rounding_s:
        return f"claims {claimed_s!r} s for a plan that costs {plan.cost_s!r} s"
    if not problem.fits(plan.memory_bytes):
        return f"returned a plan of {plan.memory_bytes} bytes, over the limit of {problem.memory_limit_bytes} bytes"
    return None


def _assignment(problem: SearchProblem, choices: tuple[int, ...], bound_s: float, solver: str, proof: str) -> Assignment:
    cost_s, memory_bytes = evaluate(problem, choices)
    return Assignment(
        choices=choices, cost_s=cost_s, memory_bytes=memory_bytes, bound_s=min(bound_s, cost_s), solver=solver, proof=proof
    )
