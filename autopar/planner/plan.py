"""How a plan is made, step by step."""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from autopar.core.cluster import Cluster
from autopar.core.graph import OpGraph
from autopar.core.mesh import Mesh, MeshAxis
from autopar.core.plan import Plan, Prediction, Proof
from autopar.core.problem import Assignment, SearchProblem
from autopar.core.residency import Precision
from autopar.core.rule import OpRule
from autopar.errors import InfeasibleError
from autopar.planner.bind import decisions
from autopar.planner.decode import decode
from autopar.planner.keeping import Keeping, recomputed_flops
from autopar.planner.meshes import candidate_meshes, forced_mesh, role_names, work_flops
from autopar.planner.problem import Ports, ProblemBuilder
from autopar.planner.pins import Pins, parse_pins
from autopar.planner.roles import Constraints, batch_factors
from autopar.planner.rulebook import rules_of
from autopar.planner.states import Pricing
from autopar.program import Program
from autopar.search.solve import solve

Progress = Callable[[str], None]
MEMORY_SHARE = 0.9
"""Share of a device's memory that a plan may use; the rest is left to the allocator and the runtime."""


@dataclass(frozen=True)
class Options:
    """What the user asks for beside model and cluster. `tokens` per step is for the report only; the graph is that of one of
    `micro_batches`; `offload`: optimizer state lives on the host."""

    pins: Sequence[str] = ()
    mesh: Mesh | None = None
    memory_share: float = MEMORY_SHARE
    time_limit_s: float = 30.0
    tokens: int = 0
    micro_batches: int = 1
    precision: Precision = Precision()
    offload: bool = False


@dataclass(frozen=True)
class Planned:
    """A plan with the program it stands for."""

    plan: Plan
    program: Program


def plan_graph(graph: OpGraph, cluster: Cluster, options: Options | None = None, progress: Progress = lambda text: None) -> Planned:
    """The best plan found over all candidate meshes, with its bound; raises InfeasibleError where none fits."""
    with _collector_paused():
        return _plan_graph(graph, cluster, options or Options(), progress)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Planning makes many small objects and no cycles; a full collection walks all of torch's objects, up to half a second each."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _plan_graph(graph: OpGraph, cluster: Cluster, options: Options, progress: Progress) -> Planned:
    pins = parse_pins(options.pins)
    rules = rules_of(graph)
    batch = batch_factors(graph, rules)
    forced = forced_mesh(pins, cluster)
    meshes = (options.mesh,) if options.mesh else (forced,) if forced else candidate_meshes(cluster)
    found: list[_Candidate] = []
    failures: list[InfeasibleError] = []
    for mesh in meshes:
        progress(f"searching mesh {mesh}")
        try:
            found.append(_search(graph, rules, batch, cluster, mesh, pins, options, strict=forced is not None and options.mesh is None))
        except InfeasibleError as error:
            failures.append(error)
    if not found:
        raise failures[0]
    best = min(found, key=lambda c: (c.assignment.cost_s, len(c.program.mesh.axes)))
    bound = min(c.assignment.bound_s for c in found)
    return _finish(graph, cluster, best, bound, batch, options, len(found))


@dataclass(frozen=True)
class _Candidate:
    program: Program
    assignment: Assignment
    problem: SearchProblem
    ports: Ports


def _search(
    graph: OpGraph, rules: Sequence[OpRule], batch: Sequence[frozenset[int]], cluster: Cluster, mesh: Mesh, pins: Pins, options: Options, *, strict: bool
) -> _Candidate:
    """The best plan on one mesh. What saves memory costs time, so it is only looked at where the plan without it does not fit."""
    pricing = Pricing(cluster, mesh)
    given = Keeping(micro_batches=options.micro_batches, precision=options.precision, offload=options.offload)
    limit = cluster.device.memory_bytes * options.memory_share

    def best(keeping: Keeping, limit_bytes: float | None) -> _Candidate:
        builder = ProblemBuilder(graph, rules, batch, pricing, Constraints(mesh, pins, strict), keeping)
        problem, ports = builder.build(limit_bytes)
        assignment = solve(problem, time_limit_s=options.time_limit_s)
        return _Candidate(decode(graph, rules, pricing, ports, assignment.choices, keeping), assignment, problem, ports)

    fastest = best(given.narrowed(pins), None)
    if fastest.assignment.memory_bytes <= limit:
        return fastest
    return best(given.everything().narrowed(pins), limit)


def _finish(graph: OpGraph, cluster: Cluster, best: _Candidate, bound_s: float, batch: Sequence[frozenset[int]], options: Options, num_meshes: int) -> Planned:
    program = best.program
    if any(name in ("a", "b") for name in program.mesh.names):
        names = role_names(program, batch)
        mesh = Mesh(tuple(MeshAxis(name, axis.size) for name, axis in zip(names, program.mesh.axes)))
        program = replace(program, mesh=mesh)
    a = best.assignment
    unknown = program.ops_without_rule
    plan = Plan(
        graph_digest=graph.digest,
        model=graph.name,
        cluster=cluster.name,
        mesh=program.mesh,
        **decisions(program, program.mesh),
        predicted=_predict(graph, cluster, best, program, options.tokens),
        proof=Proof(a.cost_s, bound_s, max(0.0, a.cost_s - bound_s) / max(a.cost_s, 1e-300), a.solver, f"{a.proof} over {num_meshes} mesh{'es' * (num_meshes > 1)}"),
        notes=tuple(f"no rule for {kind}: computed replicated" for kind in unknown),
    )
    return Planned(plan, program)


def _predict(graph: OpGraph, cluster: Cluster, best: _Candidate, program: Program, tokens: int) -> Prediction:
    choices, problem, ports = best.assignment.choices, best.problem, best.ports
    blocks = set(ports.block_node.values())
    compute = math.fsum(problem.nodes[n].cost_s[choices[n]] for n in ports.op_node.values())
    communication = math.fsum(e.cost_s[choices[e.u], choices[e.v]] for e in problem.edges)
    state = math.fsum(problem.nodes[n].memory_bytes[choices[n]] for n in ports.param_node.values())
    again = math.fsum(e.cost_s[choices[e.u], choices[e.v]] for e in problem.edges if e.u in blocks)
    compute, communication = compute + again, communication - again
    step = compute + communication
    dtype = graph.values[graph.params[0]].meta.dtype if graph.params else "float32"
    peaks = dict(cluster.device.peak_flops_per_s)
    peak = peaks.get(dtype, peaks["float32"]) * cluster.num_devices
    return Prediction(
        step_time_s=step,
        compute_s=compute,
        communication_s=communication,
        peak_memory_bytes=round(best.assignment.memory_bytes),
        state_bytes=round(state),
        activation_bytes=round(best.assignment.memory_bytes - state),
        communicated_bytes=program.ledger.total_bytes,
        recomputed_flops=recomputed_flops(program),
        tokens_per_s=tokens / step if step else 0.0,
        mfu=work_flops(graph, program) / (peak * step) if step else 0.0,
    )
