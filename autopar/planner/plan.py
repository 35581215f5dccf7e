"""How a plan is made, step by step."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.core.cluster import Cluster
from autopar.core.collector import collector_paused
from autopar.core.graph import OpGraph
from autopar.core.mesh import Mesh, MeshAxis
from autopar.core.mixed import Machines
from autopar.core.plan import Plan, Prediction, Proof
from autopar.planner.advice import Retrace, infeasible
from autopar.planner.bind import decisions
from autopar.planner.keeping import recomputed_flops
from autopar.planner.lengths import Pipelines, Task
from autopar.planner.meshes import candidate_meshes, flops_share, forced_mesh, role_names
from autopar.planner.pins import Pins, parse_pins
from autopar.planner.pipelines import StagedCandidate
from autopar.planner.roles import batch_factors
from autopar.planner.rulebook import rules_of
from autopar.planner.search import Candidate, DoesNotFit, MeshSearch, Options
from autopar.planner.staging import pipeline_prediction
from autopar.planner.states import Pricing
from autopar.planner.work import total_seconds
from autopar.program import Program
from autopar.search.process import solvers
from autopar.search.terms import Terms

Progress = Callable[[str], None]


UNPRICED_GAIN = 1.05
"""Where the machine's file does not say what the runtime takes for an action (`Host.action_s`), a pipeline, which has the most of them, is taken if it is so
many times faster."""


@dataclass(frozen=True)
class Planned:
    """A plan with the program it stands for, and what it was chosen from: the best of each mesh and pipeline, the fastest first, where these were searched
    one by one. `others`: the best so many plans that were not taken; `like`: what a joint search on another machine may begin with."""

    plan: Plan
    program: Program
    candidates: tuple[Candidate, ...] = ()
    others: Callable[[int], tuple[Plan, ...]] = lambda number: ()
    like: Hashable = None


def plan_graph(
    graph: OpGraph, cluster: Cluster, options: Options | None = None, progress: Progress = lambda text: None, retrace: Retrace = lambda micro_batches: None
) -> Planned:
    """The best plan found over all candidate meshes, with its bound; raises InfeasibleError where none fits, with what would help.

    `retrace` makes the graph of a smaller microbatch, to know whether that helps.
    """
    with collector_paused(), solvers():
        return _plan_graph(graph, cluster, options or Options(), progress, retrace)


def _plan_graph(graph: OpGraph, cluster: Cluster, options: Options, progress: Progress, retrace: Retrace) -> Planned:
    pins = parse_pins(options.pins)
    rules = rules_of(graph)
    batch = batch_factors(graph, rules)
    forced = forced_mesh(pins, cluster)
    meshes = () if pins.wants_pipeline else (options.mesh,) if options.mesh else (forced,) if forced else candidate_meshes(cluster.num_devices)
    found: list[Candidate] = []
    failures: list[tuple[MeshSearch, DoesNotFit]] = []
    for mesh in meshes:
        progress(f"searching mesh {mesh}")
        search = MeshSearch(graph, rules, batch, cluster, mesh, pins, options, strict=forced is not None and options.mesh is None)
        try:
            found.append(search.best())
        except DoesNotFit as error:
            failures.append((search, error))
    best = next(iter(_by_time(found)), None)
    bound = min((c.assignment.bound_s for c in found), default=math.inf)
    gain = 1.0 if cluster.host.action_s else UNPRICED_GAIN
    below_s = best.step_s / gain if best is not None else math.inf
    pipelines = Pipelines(Task(graph, rules, batch, options), cluster, pins, retrace, below_s, progress)
    piped = pipelines.best() if may_be_pipelined(pins, options, cluster, fits=best is not None) else None
    if piped is not None and piped.step_s < below_s:
        status = _pipeline_status(piped, pipelines.num_tried, len(found))
        return _among((piped, *_by_time(found)), cluster, finished(cluster, piped, min(bound, pipelines.bound_s), batch, status, options.tokens))
    if best is None:
        raise infeasible([*failures, *pipelines.failures], retrace)
    planned = finished(cluster, best, bound, batch, _status(best, len(found), pipelines.num_tried, gain), options.tokens)
    return _among(_by_time(found), cluster, planned)


def _among(candidates: tuple[Candidate, ...], cluster: Cluster, planned: Planned) -> Planned:
    return replace(planned, candidates=candidates, others=lambda number: tuple(plan_of(c, cluster) for c in candidates[1 : 1 + number]))


def _by_time(found: Sequence[Candidate]) -> tuple[Candidate, ...]:
    return tuple(sorted(found, key=lambda c: (c.step_s, len(c.program.mesh.axes))))


def may_be_pipelined(pins: Pins, options: Options, cluster: Cluster, *, fits: bool) -> bool:
    """Where it is asked for, or nothing else fits. Where degrees or the mesh are given, only if a pipeline is too. One microbatch in a
    pipeline is no faster than the devices of one stage, which the meshes include, unless ranks that wait leave their cores to the others."""
    if pins.wants_pipeline:
        return True
    if pins.pp == 1 or pins.mesh_axes or options.mesh is not None:
        return False
    return not fits or (options.pipelines and (options.free_micro_batches or options.micro_batches > 1 or cluster.crowding > 1))


def plan_of(candidate: Candidate, cluster: Cluster, tokens: int = 0) -> Plan:
    """A candidate that was not taken, as a plan of its own."""
    graph = candidate.program.graph
    batch = batch_factors(graph, rules_of(graph))
    return finished(cluster, candidate, candidate.assignment.bound_s, batch, "the best of its mesh", tokens).plan


def finished(cluster: Machines, best: Candidate, bound_s: float, batch: Sequence[frozenset[int]], status: str, tokens: int) -> Planned:
    program, graph = best.program, best.program.graph
    if any(name in ("a", "b") for name in program.mesh.names):
        names = role_names(program, batch)
        mesh = Mesh(tuple(MeshAxis(name, axis.size) for name, axis in zip(names, program.mesh.axes)))
        program = replace(program, mesh=mesh)
    unknown = program.ops_without_rule
    plan = Plan(
        graph_digest=graph.digest,
        model=graph.name,
        cluster=cluster.name,
        mesh=program.mesh,
        **decisions(program, program.mesh),
        predicted=pipeline_prediction(cluster, best.staged, tokens) if isinstance(best, StagedCandidate) else _predict(cluster, best, tokens),
        proof=Proof(best.step_s, bound_s, max(0.0, best.step_s - bound_s) / max(best.step_s, 1e-300), best.assignment.solver, status),
        pipeline=best.staged.stages.pipeline if isinstance(best, StagedCandidate) else None,
        notes=tuple(f"no rule for {kind}: computed replicated" for kind in unknown),
    )
    return Planned(plan, program)


def _status(best: Candidate, num_meshes: int, num_pipelines: int, gain: float) -> str:
    """Where memory binds, plans compete within a linear limit. Pipelines that were tried are no part of the bound."""
    binding = ", within a linear memory limit" if best.problem.memory_limit_bytes is not None else ""
    by = f" by {gain - 1:.0%}" if gain > 1 else ""
    tried = f", and none of {num_pipelines} pipelines tried is faster{by}" if num_pipelines else ""
    return f"{best.assignment.proof} over {num_meshes} mesh{'es' * (num_meshes > 1)}{binding}{tried}"


def _pipeline_status(best: StagedCandidate, num_pipelines: int, num_meshes: int) -> str:
    budget = "budget, " if best.assignment.proof == "budget" else ""
    meshes = f" and {num_meshes} mesh{'es' * (num_meshes > 1)}" if num_meshes else ""
    cut = "its cut is the best of this sharding and schedule" if best.exact else "its cut the best found"
    return f"{budget}the fastest of {num_pipelines} pipelines{meshes} tried, {cut}; the bound is the least compute of any of these"


def _predict(cluster: Cluster, best: Candidate, tokens: int) -> Prediction:
    choices, problem, ports = best.assignment.choices, best.problem, best.ports
    blocks = tuple(ports.block_node.values())
    states, terms = np.asarray(choices, dtype=int), Terms(problem)
    of_edges = terms.of_edges(states[terms.u], states[terms.v])[0]
    compute = math.fsum(terms.of_nodes(states)[0][list(ports.op_node.values())].tolist())
    communication = math.fsum(of_edges.tolist())
    again = math.fsum(of_edges[np.isin(terms.u, blocks)].tolist())
    update = total_seconds(best.program, Pricing(cluster, best.program.mesh))[-1] if cluster.host.update_bytes_per_s else 0.0
    step = best.step_s
    compute, communication = compute + again + update, communication - again - update + best.again_s
    compute += step - compute - communication  # what the runtime takes to start passes
    return Prediction(
        step_time_s=step,
        compute_s=compute,
        communication_s=communication,
        peak_memory_bytes=best.memory.high_bytes,
        memory=best.memory,
        communicated_bytes=best.program.ledger.total_bytes,
        recomputed_flops=recomputed_flops(best.program),
        tokens_per_s=tokens / step if step else 0.0,
        mfu=flops_share(cluster, best.program, step),
    )
