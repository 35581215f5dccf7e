"""How a plan is made, step by step."""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from autopar.core.cluster import Cluster
from autopar.core.graph import OpGraph
from autopar.core.mesh import Mesh, MeshAxis
from autopar.core.plan import Plan, Prediction, Proof
from autopar.planner.advice import Retrace, infeasible
from autopar.planner.bind import decisions
from autopar.planner.keeping import recomputed_flops
from autopar.planner.meshes import candidate_meshes, forced_mesh, role_names, work_flops
from autopar.planner.pins import parse_pins
from autopar.planner.roles import batch_factors
from autopar.planner.rulebook import rules_of
from autopar.planner.search import Candidate, DoesNotFit, MeshSearch, Options
from autopar.program import Program
from autopar.search.terms import Terms

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Planned:
    """A plan with the program it stands for."""

    plan: Plan
    program: Program


def plan_graph(
    graph: OpGraph, cluster: Cluster, options: Options | None = None, progress: Progress = lambda text: None, retrace: Retrace = lambda micro_batches: None
) -> Planned:
    """The best plan found over all candidate meshes, with its bound; raises InfeasibleError where none fits, with what would help.

    `retrace` makes the graph of a smaller microbatch, to know whether that helps.
    """
    with _collector_paused():
        return _plan_graph(graph, cluster, options or Options(), progress, retrace)


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


def _plan_graph(graph: OpGraph, cluster: Cluster, options: Options, progress: Progress, retrace: Retrace) -> Planned:
    pins = parse_pins(options.pins)
    rules = rules_of(graph)
    batch = batch_factors(graph, rules)
    forced = forced_mesh(pins, cluster)
    meshes = (options.mesh,) if options.mesh else (forced,) if forced else candidate_meshes(cluster)
    found: list[Candidate] = []
    failures: list[tuple[MeshSearch, DoesNotFit]] = []
    for mesh in meshes:
        progress(f"searching mesh {mesh}")
        search = MeshSearch(graph, rules, batch, cluster, mesh, pins, options, strict=forced is not None and options.mesh is None)
        try:
            found.append(search.best())
        except DoesNotFit as error:
            failures.append((search, error))
    if not found:
        raise infeasible(failures, retrace)
    best = min(found, key=lambda c: (c.assignment.cost_s, len(c.program.mesh.axes)))
    bound = min(c.assignment.bound_s for c in found)
    return _finish(graph, cluster, best, bound, batch, options, len(found))


def _finish(graph: OpGraph, cluster: Cluster, best: Candidate, bound_s: float, batch: Sequence[frozenset[int]], options: Options, num_meshes: int) -> Planned:
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
        proof=Proof(a.cost_s, bound_s, max(0.0, a.cost_s - bound_s) / max(a.cost_s, 1e-300), a.solver, _status(best, num_meshes)),
        notes=tuple(f"no rule for {kind}: computed replicated" for kind in unknown),
    )
    return Planned(plan, program)


def _status(best: Candidate, num_meshes: int) -> str:
    """Where memory binds, plans compete within a linear limit."""
    binding = ", within a linear memory limit" if best.problem.memory_limit_bytes is not None else ""
    return f"{best.assignment.proof} over {num_meshes} mesh{'es' * (num_meshes > 1)}{binding}"


def _predict(graph: OpGraph, cluster: Cluster, best: Candidate, program: Program, tokens: int) -> Prediction:
    choices, problem, ports = best.assignment.choices, best.problem, best.ports
    blocks = tuple(ports.block_node.values())
    states, terms = np.asarray(choices, dtype=int), Terms(problem)
    of_edges = terms.of_edges(states[terms.u], states[terms.v])[0]
    compute = math.fsum(terms.of_nodes(states)[0][list(ports.op_node.values())].tolist())
    communication = math.fsum(of_edges.tolist())
    again = math.fsum(of_edges[np.isin(terms.u, blocks)].tolist())
    compute, communication = compute + again, communication - again
    step = compute + communication
    dtype = graph.values[graph.params[0]].meta.dtype if graph.params else "float32"
    peaks = dict(cluster.device.peak_flops_per_s)
    peak = peaks.get(dtype, peaks["float32"]) * cluster.num_devices
    return Prediction(
        step_time_s=step,
        compute_s=compute,
        communication_s=communication,
        peak_memory_bytes=best.memory.high_bytes,
        memory=best.memory,
        communicated_bytes=program.ledger.total_bytes,
        recomputed_flops=recomputed_flops(program),
        tokens_per_s=tokens / step if step else 0.0,
        mfu=work_flops(graph, program) / (peak * step) if step else 0.0,
    )
