"""The way from a problem to a plan: exact where memory is slack, priced where it binds, closed by CP-SAT where a gap is left."""

import math
from dataclasses import replace
from typing import Literal

import numpy as np

from autopar.core.problem import Assignment, SearchProblem, evaluate
from autopar.errors import UsageError
from autopar.search.elimination import MAX_TABLE_ENTRIES, TOLERANCE, Prepared, assignment, prepare
from autopar.search.fixing import restrict
from autopar.search.ilp import solve_ilp
from autopar.search.lagrange import leanest, price_memory
from autopar.search.process import SolverFailed, solvers
from autopar.search.simplify import BYTES, SECONDS, Shrunk, canonical, shrink

GAP_TARGET = 1e-2  # the cost model is off by percents: a smaller gap is not worth a solver's seconds
MAX_COLUMNS = 60_000  # states plus pairs of states: up to here CP-SAT closed gaps within its time limit

FINE_GAP = 1e-4  # what is aimed at, for a short while, where the integer program is small
FEW_COLUMNS = 2_000  # up to here CP-SAT often takes less than a second

SHARES = (0.25, 0.75)  # of the time limit: a better plan found in the first leaves fewer states for the second
FINE_SHARE = 0.05

Ilp = Literal["auto", "always", "never"]


def solve(
    problem: SearchProblem, *, time_limit_s: float = 30.0, use_ilp: Ilp = "auto", max_table_entries: int = MAX_TABLE_ENTRIES
) -> Assignment:
    """The best plan within the memory limit, with a lower bound on the cost of every such plan.

    Elimination, and nothing else where its plan fits. Otherwise the memory limit becomes a price (`price_memory`);
    a gap above GAP_TARGET is closed by the integer program on the states that can still matter, if those are not too
    many, a smaller one if they are few ("always": however many, and whatever the gap; "never": not at all).
    `time_limit_s` is for that last step. Where its solver fails, what was found before it is the plan, its proof is "budget", and `solver` says why.
    Raises InfeasibleError, saying by how much, where no plan fits.
    """
    if use_ilp not in ("auto", "always", "never"):
        raise UsageError(f"use_ilp is {use_ilp!r}; it is auto, always or never")
    prepared = prepare(problem, (SECONDS, BYTES), max_table_entries=max_table_entries)
    if not problem.fits(prepared.terms.least_bytes):
        leanest(problem, max_table_entries)  # raises, and says how much is missing
    cheapest = prepared.minimise(SECONDS)
    plan = assignment(problem, replace(cheapest, choices=prepared.shrunk.restore(cheapest.choices)))
    target = 0.0 if use_ilp == "always" else FINE_GAP
    if problem.fits(plan.memory_bytes):
        if use_ilp == "never" or plan.gap <= max(target, TOLERANCE):
            return plan
        rest = shrink(canonical(problem), (SECONDS,))
        if num_columns(rest.problem) > _max_columns(plan, use_ilp):
            return plan
        try:
            return _closed(problem, plan, rest, time_limit_s, target)
        except SolverFailed as failure:
            return _unclosed(plan, failure)
    plan = price_memory(problem, prepared=prepared, cheapest=cheapest, max_table_entries=max_table_entries)
    if use_ilp == "never":
        return plan
    with solvers():
        return _closed_in_shares(problem, prepared, plan, time_limit_s, use_ilp, target)


def _closed_in_shares(problem: SearchProblem, prepared: Prepared, plan: Assignment, time_limit_s: float, use_ilp: Ilp, target: float) -> Assignment:
    priced_bound_s = plan.bound_s
    for share in SHARES:
        max_columns = _max_columns(plan, use_ilp)
        if plan.gap <= max(target, TOLERANCE) or len(problem.nodes) + len(problem.edges) > max_columns:
            break
        rest = restrict(prepared, plan.multiplier_s_per_byte, plan.cost_s - priced_bound_s) or prepared.shrunk
        if num_columns(rest.problem) > max_columns:
            break
        try:
            plan = _closed(problem, plan, rest, min(share, FINE_SHARE if max_columns == FEW_COLUMNS else 1.0) * time_limit_s, target)
        except SolverFailed as failure:
            return _unclosed(plan, failure)
        if plan.proof != "budget":
            break
    return plan


def _max_columns(plan: Assignment, use_ilp: Ilp) -> float:
    """How large an integer program is worth its seconds."""
    if use_ilp == "always":
        return math.inf
    return MAX_COLUMNS if plan.gap > GAP_TARGET else FEW_COLUMNS


def num_columns(problem: SearchProblem) -> int:
    """How many states and allowed pairs of states there are: the size of the integer program."""
    allowed = {id(edge.cost_s): int(np.isfinite(edge.cost_s).sum()) for edge in problem.edges}
    return sum(node.num_states for node in problem.nodes) + sum(allowed[id(edge.cost_s)] for edge in problem.edges)


def _closed(problem: SearchProblem, plan: Assignment, rest: Shrunk, time_limit_s: float, relative_gap: float) -> Assignment:
    """The plan improved or proven by the integer program over `rest`, which holds every plan that is better."""
    start = [min(int(np.searchsorted(states, choice)), len(states) - 1) for states, choice in zip(rest.kept, plan.choices, strict=True)]
    if rest.restore(start) != plan.choices:
        return plan  # not a plan of `rest`: then its states are not known to suffice
    found = solve_ilp(
        rest.problem,
        warm_start=start,
        time_limit_s=time_limit_s,
        lower_bound_s=plan.bound_s,
        relative_gap=relative_gap,
    )
    choices, cost_s, memory_bytes = plan.choices, plan.cost_s, plan.memory_bytes
    better = rest.restore(found.choices)
    better_cost_s, better_memory_bytes = evaluate(problem, better)
    if better_cost_s < cost_s and problem.fits(better_memory_bytes):
        choices, cost_s, memory_bytes = better, better_cost_s, better_memory_bytes
    # plans outside `rest` cost at least as much as the plan it was made with
    bound_s = min(max(plan.bound_s, min(found.bound_s, plan.cost_s)), cost_s)
    gap = (cost_s - bound_s) / cost_s if cost_s else 0.0
    return Assignment(
        choices=choices,
        cost_s=cost_s,
        memory_bytes=memory_bytes,
        bound_s=bound_s,
        solver=_joined(plan.solver, found.solver),
        multiplier_s_per_byte=plan.multiplier_s_per_byte,
        proof="exact" if gap <= TOLERANCE else "bound" if gap <= relative_gap else found.proof,
    )


def _unclosed(plan: Assignment, failure: SolverFailed) -> Assignment:
    return replace(plan, proof="budget", solver=f"{plan.solver}; {failure}")


def _joined(first: str, then: str) -> str:
    return first if first.endswith(then) else f"{first} + {then}"
