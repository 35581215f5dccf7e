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

No solver is believed: the plan is read off, priced with `evaluate` and compared with what the solver says.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt
from ortools.sat.python import cp_model

from autopar.core.problem import Assignment, SearchProblem, evaluate
from autopar.errors import AutoparError, InfeasibleError, UsageError
from autopar.search.simplify import canonical

INTEGRAL = 1e-6  # an x this close to 0 or 1 is; HiGHS keeps rows to 1e-7
AGREEMENT = 1e-6  # relative difference between a solver's value and ours that its tolerances explain
LP_TOLERANCE = 1e-7  # relative accuracy of HiGHS' optimum: taken off where it serves as a bound
EXACT_GAP = 1e-9  # a relative gap below this is rounding to the grid
COARSE = 1e-2  # a plan this far below the scale of a solve was priced too roughly
LP_SCALE = 1e4  # the known optimum in units of HiGHS' objective
GRID_UNITS = 2.0**40  # the known optimum in units of CP-SAT's objective
MAX_SUM = 2.0**59  # of all integer coefficients of a row, below the overflow of 64 bits
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
    """
    merged = canonical(problem)
    if not merged.nodes:
        return _assignment(problem, (), 0.0, "lp", "exact")
    model = assemble(merged)
    known = _known_plan(problem, warm_start) or _cheapest_states(problem)
    while True:
        plan = _attempt(model, problem, known, lower_bound_s, relative_gap, time_limit_s)
        if plan.cost_s >= COARSE * _reference_s(model, known) or plan.cost_s <= sys.float_info.min:
            return plan
        known = plan  # far below the scale that solver tolerances referred to: once more, at its own scale


def _attempt(
    model: LinearModel, problem: SearchProblem, known: Assignment | None, lower_bound_s: float, relative_gap: float, time_limit_s: float
) -> Assignment:
    """The LP and, if that settles nothing, CP-SAT, at the scale of the known plan."""
    relaxed = _solve_lp(model, problem, known, time_limit_s)
    if relaxed is not None:
        if np.minimum(relaxed.x, 1 - relaxed.x).max() < INTEGRAL:
            plan = _assignment(problem, model.states(relaxed.x), relaxed.value, "lp", "exact")
            if _disagreement(problem, plan, relaxed.value, 0.0) is None:
                return plan
        lower_bound_s = max(lower_bound_s, relaxed.value - LP_TOLERANCE * _reference_s(model, known))
    return _solve_cpsat(model, problem, known, max(lower_bound_s, 0.0), relative_gap, time_limit_s)


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
class Relaxed:
    """An optimal point of the LP: the x part, and its value in seconds."""

    x: np.ndarray
    value: float


def _solve_lp(model: LinearModel, problem: SearchProblem, known: Assignment | None, time_limit_s: float) -> Relaxed | None:
    """The LP optimum by HiGHS; None where there is no answer in time, or one that a known plan contradicts."""
    cutoff_s = known.cost_s if known else math.inf
    scale = LP_SCALE / _positive(_reference_s(model, known))  # HiGHS' tolerances are absolute
    lp = mathopt.Model.from_model_proto(_lp_proto(model, problem, scale, cutoff_s))
    limit = mathopt.SolveParameters(time_limit=timedelta(seconds=time_limit_s))
    result = mathopt.solve(lp, mathopt.SolverType.HIGHS, params=limit)
    reason = result.termination.reason
    if not known and reason in (mathopt.TerminationReason.INFEASIBLE, mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED):
        raise InfeasibleError("no plan fits: even the linear relaxation has no point within the memory limit")
    if reason != mathopt.TerminationReason.OPTIMAL:
        return None
    values = np.zeros(len(model.cost_s))
    for variable, value in result.variable_values().items():
        values[variable.id] = value
    return Relaxed(values[: model.num_x], result.objective_value() / scale)


def _lp_proto(model: LinearModel, problem: SearchProblem, scale: float, cutoff_s: float) -> model_pb2.ModelProto:
    proto = model_pb2.ModelProto()
    num_columns = len(model.cost_s)
    variables, objective = proto.variables, proto.objective.linear_coefficients
    variables.ids.extend(range(num_columns))
    variables.lower_bounds.extend([0.0] * num_columns)
    variables.upper_bounds.extend(np.where(_useful(model, cutoff_s), math.inf, 0.0).tolist())
    variables.integers.extend([False] * num_columns)
    priced = np.flatnonzero((model.cost_s > 0) & _useful(model, cutoff_s))
    objective.ids.extend(priced.tolist())
    objective.values.extend((model.cost_s[priced] * scale).tolist())
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
    proto.linear_constraints.ids.extend(range(len(upper)))
    proto.linear_constraints.lower_bounds.extend(lower.tolist())
    proto.linear_constraints.upper_bounds.extend(upper.tolist())
    order = np.lexsort((columns, rows))
    matrix = proto.linear_constraint_matrix
    matrix.row_ids.extend(rows[order].tolist())
    matrix.column_ids.extend(columns[order].tolist())
    matrix.coefficients.extend(values[order].tolist())
    return proto


def _solve_cpsat(
    model: LinearModel, problem: SearchProblem, known: Assignment | None, lower_bound_s: float, relative_gap: float, time_limit_s: float
) -> Assignment:
    grid = _Grid.of(model, problem, known)
    program, columns = _cpsat_program(model, grid, known)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.linearization_level = 2
    solver.parameters.max_deterministic_time = DETERMINISTIC_SHARE * time_limit_s
    solver.parameters.max_time_in_seconds = time_limit_s
    solver.parameters.relative_gap_limit = relative_gap
    status = solver.solve(program)
    if status == cp_model.INFEASIBLE:
        if known:
            raise AutoparError(f"CP-SAT calls a problem infeasible that has a plan of {known.cost_s} s within the limit")
        raise InfeasibleError("no plan fits: CP-SAT proved that no combination of states is within the memory limit")
    if status == cp_model.MODEL_INVALID:
        raise AutoparError(f"CP-SAT refuses the model: {program.validate()}")
    found = [known] if known else []
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        lower_bound_s = max(lower_bound_s, solver.best_objective_bound / grid.per_second)
        x = np.array([solver.value(column) for column in columns[: model.num_x] if column is not None])
        claimed_s, rounding_s = solver.objective_value / grid.per_second, model.num_rows / grid.per_second
        plan = _assignment(problem, model.states(x), claimed_s, "cp-sat", "exact")
        complaint = _disagreement(problem, plan, claimed_s, rounding_s)
        if complaint is not None:
            raise AutoparError(f"CP-SAT {complaint}")
        found.append(plan)
    if not found:
        raise AutoparError(f"no plan was found in {time_limit_s} s; raise the limit or give a warm start")
    best = min(found, key=lambda plan: plan.cost_s)
    gap = max(0.0, best.cost_s - lower_bound_s) / max(best.cost_s, sys.float_info.min)
    proof = "exact" if gap <= EXACT_GAP else "bound" if status == cp_model.OPTIMAL else "budget"
    return _assignment(problem, best.choices, lower_bound_s, "cp-sat", proof)


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


def _cpsat_program(
    model: LinearModel, grid: _Grid, known: Assignment | None
) -> tuple[cp_model.CpModel, list[cp_model.IntVar | None]]:
    """The integer program and its variables by column, None where the column is left out."""
    program = cp_model.CpModel()
    useful = _useful(model, grid.cutoff_s)
    columns: list[cp_model.IntVar | None] = [program.new_int_var(0, int(useful[j]), "") for j in range(model.num_x)]
    columns += [program.new_bool_var("") if keep else None for keep in useful[model.num_x :].tolist()]
    order = np.argsort(model.rows, kind="stable")
    cuts = np.flatnonzero(np.diff(model.rows[order])) + 1
    for entries in np.split(order, cuts):  # sum of y - x = 0 says: exactly one of the y and of "not x" holds
        members = [(columns[j], sign) for j, sign in zip(model.columns[entries].tolist(), model.signs[entries].tolist(), strict=True)]
        program.add_exactly_one([column if sign > 0 else ~column for column, sign in members if column is not None])
    present = [j for j, column in enumerate(columns) if column is not None]
    variables = [columns[j] for j in present]
    costs = np.floor(model.cost_s[present] * grid.per_second).astype(np.int64).tolist()
    program.minimize(cp_model.LinearExpr.weighted_sum(variables, costs))
    if grid.room_units is not None:
        # rounded down, so that the bound holds for every plan within the limit; plans are checked with `evaluate`
        held = np.floor(model.memory_bytes[present] * grid.per_byte).astype(np.int64).tolist()
        program.add(cp_model.LinearExpr.weighted_sum(variables, held) <= grid.room_units)
    if known:
        chosen = np.zeros(model.num_x, dtype=bool)
        chosen[model.offsets[:-1] + known.choices] = True
        point = np.concatenate([chosen, chosen[model.pairs].all(axis=1)]).tolist()
        for column, value in zip(columns, point, strict=True):
            if column is not None:
                program.add_hint(column, value)
    return program, columns


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
