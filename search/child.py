"""HiGHS and CP-SAT, in a process of their own (`python -m autopar.search.child MEMORY_BYTES`): arrays in, arrays out, nothing is checked here.

Imported by nobody: OR-Tools takes 0.3 s to load and 70 MB, and only where there is something to solve.
"""

import os
import resource
import signal
import sys
from datetime import timedelta
from typing import Any, BinaryIO

import numpy as np
from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt
from ortools.sat.python import cp_model

from autopar.search.process import OUT_OF_MEMORY, Arrays, receive, send

LP_STATUS = {
    mathopt.TerminationReason.OPTIMAL: "optimal",
    mathopt.TerminationReason.INFEASIBLE: "infeasible",
    mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED: "infeasible",
}
CPSAT_STATUS = {cp_model.OPTIMAL: "optimal", cp_model.FEASIBLE: "feasible", cp_model.INFEASIBLE: "infeasible"}


def solve_lp(q: Arrays) -> dict[str, Any]:
    """Minimise cost * v over lower <= A v <= upper, 0 <= v <= most, by HiGHS. Entries of A are sorted by row and column."""
    proto = model_pb2.ModelProto()
    num_columns = len(q["cost"])
    variables, objective, matrix = proto.variables, proto.objective.linear_coefficients, proto.linear_constraint_matrix
    variables.ids.extend(range(num_columns))
    variables.lower_bounds.extend([0.0] * num_columns)
    variables.upper_bounds.extend(q["most"].tolist())
    variables.integers.extend([False] * num_columns)
    priced = np.flatnonzero(q["cost"])
    objective.ids.extend(priced.tolist())
    objective.values.extend(q["cost"][priced].tolist())
    proto.linear_constraints.ids.extend(range(len(q["upper"])))
    proto.linear_constraints.lower_bounds.extend(q["lower"].tolist())
    proto.linear_constraints.upper_bounds.extend(q["upper"].tolist())
    matrix.row_ids.extend(q["rows"].tolist())
    matrix.column_ids.extend(q["columns"].tolist())
    matrix.coefficients.extend(q["values"].tolist())
    limit = mathopt.SolveParameters(time_limit=timedelta(seconds=float(q["time_limit_s"])))
    result = mathopt.solve(mathopt.Model.from_model_proto(proto), mathopt.SolverType.HIGHS, params=limit)
    status = LP_STATUS.get(result.termination.reason, "unknown")
    if status != "optimal":
        return {"status": status}
    values = np.zeros(num_columns)
    for variable, value in result.variable_values().items():
        values[variable.id] = value
    return {"status": status, "value": result.objective_value(), "x": values[: int(q["num_x"])]}


def solve_cpsat(q: Arrays) -> dict[str, Any]:
    """Minimise cost * v over the rows and, where there is one, held * v <= room, v in {0, 1}, by CP-SAT: one worker, a fixed seed, its deterministic clock."""
    program, columns = _program(q)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.linearization_level = 2
    solver.parameters.max_deterministic_time = float(q["deterministic_limit"])
    solver.parameters.max_time_in_seconds = float(q["time_limit_s"])
    solver.parameters.relative_gap_limit = float(q["relative_gap"])
    status = CPSAT_STATUS.get(solver.solve(program), "unknown")
    if status not in ("optimal", "feasible"):
        return {"status": status}
    x = np.array([solver.value(column) for column in columns[: int(q["num_x"])]], dtype=float)
    return {"status": status, "value": solver.objective_value, "bound": solver.best_objective_bound, "x": x}


def _program(q: Arrays) -> tuple[cp_model.CpModel, list[cp_model.IntVar | None]]:
    """The integer program and its variables by column, None where a pair is left out."""
    program, num_x = cp_model.CpModel(), int(q["num_x"])
    columns: list[cp_model.IntVar | None] = [program.new_int_var(0, int(keep), "") for keep in q["useful"][:num_x]]
    columns += [program.new_bool_var("") if keep else None for keep in q["useful"][num_x:].tolist()]
    order = np.argsort(q["rows"], kind="stable")
    cuts = np.flatnonzero(np.diff(q["rows"][order])) + 1
    for entries in np.split(order, cuts):  # sum of y - x = 0 says: exactly one of the y and of "not x" holds
        members = [(columns[j], sign) for j, sign in zip(q["columns"][entries].tolist(), q["values"][entries].tolist(), strict=True)]
        program.add_exactly_one([column if sign > 0 else ~column for column, sign in members if column is not None])
    present = [j for j, column in enumerate(columns) if column is not None]
    variables = [columns[j] for j in present]
    program.minimize(cp_model.LinearExpr.weighted_sum(variables, q["cost"][present].tolist()))
    if "room" in q:
        program.add(cp_model.LinearExpr.weighted_sum(variables, q["held"][present].tolist()) <= int(q["room"]))
    if "point" in q:
        for column, value in zip(columns, q["point"].tolist(), strict=True):
            if column is not None:
                program.add_hint(column, value)
    return program, columns


SOLVERS = {"lp": solve_lp, "cp-sat": solve_cpsat}


def serve(questions: BinaryIO, answers: BinaryIO) -> None:
    """Answer until nothing more is asked. A question whose time is over ends the process from within too, should nobody be left to kill it."""
    while True:
        try:
            question = receive(questions)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, float(question["kill_s"]))
        answer = SOLVERS[str(question["solver"])](question)
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(answers, answer)


def main(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the solvers print is no answer
    try:
        serve(sys.stdin.buffer, answers)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except BrokenPipeError:
        os._exit(0)  # nobody waits for the answer


if __name__ == "__main__":
    main(int(sys.argv[1]))
