"""A solver that hangs, eats memory, dies or lies is caught; the plan is then the best from before, says so, and nothing of the solver is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from autopar.core.problem import Edge, Node, SearchProblem
from autopar.errors import InfeasibleError
from autopar.search import ilp
from autopar.search.ilp import solve_ilp
from autopar.search.process import SolverFailed, SolverProcess, solvers
from autopar.search.solve import solve

PLAIN = "import sys\nfrom autopar.search import child\nfrom autopar.search.process import *\nimport numpy as np\nMEMORY = 3_000_000_000\n"
SERVE = "\nchild.main(MEMORY)"
NOTHING = "while True:\n    receive(sys.stdin.buffer)\n    "
"""Reads questions; the rest of the line answers."""

LAST_STATES = """
def last_states(q):
    one = q["rows"][: q["num_x"]]
    last = np.flatnonzero(np.diff(one, append=-1))
    return {"status": "optimal", "x": np.isin(np.arange(len(one)), last).astype(float), "value": q["cost"][last].sum()}
"""
"""Every node in its last state, which is the cheapest and heaviest, at the right price."""

SPOILED = LAST_STATES + "true = dict(child.SOLVERS)\nfor name in true:\n    child.SOLVERS[name] = lambda q, name=name: spoil(true[name](q), name, q)\n"
"""Every answer of the real solvers goes through `spoil`."""


def knapsack(seed: int = 0, nodes: int = 9) -> SearchProblem:
    """Independent choices under a limit: the LP is fractional, and a price of memory leaves a gap."""
    rng = np.random.default_rng(seed)
    costs = [np.sort(rng.random(3))[::-1] for _ in range(nodes)]
    held = [np.sort(rng.integers(1, 1000, 3)).astype(float) for _ in range(nodes)]
    limit = sum(float(h[1]) for h in held) * 0.9
    return SearchProblem(tuple(Node(f"n{i}", c, h) for i, (c, h) in enumerate(zip(costs, held))), (Edge(0, 1, np.zeros((3, 3))),), limit)


def running(code: str) -> SolverProcess:
    return SolverProcess((sys.executable, "-c", PLAIN + code))


LIES = {
    "over the limit": ("last_states(q)", "over the limit"),
    "better than it is": ("a | {'value': a['value'] / 2, 'bound': a['value'] / 2} if name == 'cp-sat' else a", "claims"),
    "a bound too high": ("a | {'bound': a['value'] * 2} if name == 'cp-sat' else a", "above a plan"),
    "the LP's bound too high": ("a | {'value': a['value'] * 2} if name == 'lp' else a", "above a plan"),
    "optimal without proof": ("a | {'status': 'optimal', 'bound': a['value'] / 2} if name == 'cp-sat' else a", "calls a plan"),
    "infeasible": ("{'status': 'infeasible'}", "but there is one"),
    "no status": ("a | {'status': 'fine'}", "without sense"),
    "no numbers": ("a | {'x': a['x'] * np.nan}", "a point that is none"),
    "another shape": ("a | {'x': a['x'][1:]}", "a point that is none"),
    "words for numbers": ("a | {'value': 'much'}", "without sense"),
    "half an answer": ("{'status': a['status']}", "without sense"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_caught(lie: str) -> None:
    answer, words = LIES[lie]
    problem, process = knapsack(), running(f"def spoil(a, name, q):\n    return {answer}\n{SPOILED}{SERVE}")
    before, honest = solve(problem, use_ilp="never"), solve(problem, use_ilp="always")
    assert honest.proof == "exact" and before.proof == "bound", "the integer program has something to do here"
    with solvers(process):
        plan = solve(problem, use_ilp="always")
        assert (plan.choices, plan.cost_s, plan.bound_s) == (before.choices, before.cost_s, before.bound_s)
        assert plan.proof == "budget" and plan.solver.startswith(f"{before.solver}; ") and words in plan.solver
        with pytest.raises(SolverFailed):
            solve_ilp(problem)


@pytest.mark.parametrize(
    "code,words",
    [
        (NOTHING + "sys.stdout.buffer.write(b'x' * 5); sys.exit(7)", "ended without an answer (code 7)"),
        (NOTHING + "sys.stdout.buffer.write((9).to_bytes(8, 'little') + b'no archive'); sys.stdout.flush()", "cannot be read"),
        (NOTHING + "sys.stdout.buffer.write(b'\\xff' * 64); sys.stdout.flush()", "cannot be read"),
        ("import os\n" + NOTHING + "os.abort()", f"code -{int(signal.SIGABRT)}"),
        ("raise SystemExit(1)", "ended without an answer (code 1)"),
        ("MEMORY = 500_000_000\nchild.SOLVERS['lp'] = lambda q: [bytearray(10**8) for _ in range(1000)]" + SERVE, "more memory than it may take"),
    ],
    ids=["half a frame", "garbage", "endless garbage", "abort", "never there", "memory"],
)
def test_a_solver_that_dies_is_caught(code: str, words: str) -> None:
    problem = knapsack()
    with solvers(running(code)):
        plan = solve(problem, use_ilp="always")
    assert plan.proof == "budget" and words in plan.solver and problem.fits(plan.memory_bytes)
    assert plan.choices == solve(problem, use_ilp="never").choices


def test_a_program_that_cannot_be_started() -> None:
    with solvers(SolverProcess(("/no/such/program",))):
        assert "ended without an answer" in solve(knapsack(), use_ilp="always").solver


@pytest.mark.parametrize("code", ["import time\ntime.sleep(1000)", "child.SOLVERS['lp'] = lambda q: __import__('time').sleep(1000)" + SERVE], ids=["deaf", "hung"])
def test_a_solver_that_sleeps_for_ever_is_killed(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ilp, "START_S", 1.0)
    process, start = running(code), time.monotonic()
    with solvers(process):
        plan = solve(knapsack(), use_ilp="always", time_limit_s=0.1)
        assert plan.proof == "budget" and "was ended after 1 s" in plan.solver
        solve(knapsack(1), use_ilp="always", time_limit_s=0.1)
    assert time.monotonic() - start < 1.9, "it was waited for once"


def test_a_solver_that_died_is_followed_by_another() -> None:
    with solvers(SolverProcess()) as process:
        first = solve_ilp(knapsack())
        process._process.kill()
        process._process.wait()
        assert solve_ilp(knapsack()) == first
        number = process._process.pid
    assert not Path(f"/proc/{number}").exists(), "killed and reaped"


def test_infeasible_is_what_elimination_says_too(random_problem) -> None:
    tight = SearchProblem((Node("n", np.ones(2), np.array([3.0, 4.0])),), (), 2.0)
    with pytest.raises(InfeasibleError, match="1 bytes"):
        solve_ilp(tight)


INTERRUPTED = """
import sys, threading, time, os, signal
from tests.search.test_untrusted import *
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts behind its back ignores it
process = running("child.SOLVERS['lp'] = lambda q: __import__('time').sleep(1000)" + SERVE)
def interrupt():
    while process._process is None:
        time.sleep(0.01)
    time.sleep(0.3)
    print(process._process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
try:
    with solvers(process):
        solve(knapsack(), use_ilp="always")
except KeyboardInterrupt:
    print("interrupted", process._process, flush=True)
    try:
        print(os.waitpid(-1, os.WNOHANG))
    except ChildProcessError:
        print("childless")
"""


def test_ctrl_c_ends_the_solver_and_leaves_no_zombie() -> None:
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=root, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(root)})
    number, *rest = out.stdout.split()
    assert rest == ["interrupted", "None", "childless"] and not out.stderr, out.stderr
    assert not Path(f"/proc/{number}").exists()


def test_a_solver_ends_when_nobody_is_left_to_ask() -> None:
    """A parent that is killed outright cannot kill it: a solver that waits sees the end of its questions."""
    code = "import os, numpy as np\nfrom tests.search.test_untrusted import *\np = SolverProcess()\nsolve_ilp_in = solvers(p)\nsolve_ilp_in.__enter__()\nsolve_ilp(knapsack())\nprint(p._process.pid, flush=True)\nos.kill(os.getpid(), 9)"
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(root)})
    number, deadline = int(out.stdout), time.monotonic() + 5
    while time.monotonic() < deadline and Path(f"/proc/{number}/cmdline").exists() and Path(f"/proc/{number}/cmdline").read_bytes():
        time.sleep(0.05)  # a zombie, where nobody reaps orphans, has no command line any more
    assert not Path(f"/proc/{number}/cmdline").exists() or not Path(f"/proc/{number}/cmdline").read_bytes()
