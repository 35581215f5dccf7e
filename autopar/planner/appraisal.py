"""What a plan costs, term by term: priced from the program that it stands for, not from what a search once said of it."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autopar.core.graph import OpGraph
from autopar.core.memory import MemoryUse
from autopar.core.mixed import Machines, MixedCluster
from autopar.core.moves import COLLECTIVES
from autopar.core.plan import Plan
from autopar.planner.along import along, groups_of
from autopar.planner.bind import bind
from autopar.planner.blocks import Order
from autopar.planner.liveness import Engine, memory_use
from autopar.planner.staging import Staged
from autopar.planner.states import Pricing
from autopar.planner.work import PHASES, gathering_again_s, pieces
from autopar.program import Program, route_steps
from autopar.stages import cut_into_stages

COMPUTE, AGAIN, COPIES, PARAMETERS, WAITING = "operators", "computed again", "copies", "parameters and gradients", "waiting for other stages"
UPDATE, STARTING, LEFT_FREE = "optimizer", "starting passes", "cores that waiting stages leave free"
SUMS = "sums over copies"

PER_MICROBATCH = PHASES.index("gather_s")
"""Phases before this one are of a microbatch, the others of a step."""


@dataclass(frozen=True)
class Appraisal:
    """Seconds of a training step by term (of a pipeline: on its busiest rank), their sum, and the fullest moment of the fullest rank."""

    terms: Mapping[str, float]
    step_s: float
    memory: MemoryUse
    communicated_bytes: int


def appraise(plan: Plan, graph: OpGraph, machines: Machines) -> Appraisal:
    """Price a plan; `graph` is that of one of its microbatches. Raises PlanMismatchError where they do not belong together. Of several groups a plan
    lies on those that it names, or is priced on all as if they were as slow as the slowest."""
    program = bind(plan, graph)
    places = plan.pipeline.places if plan.pipeline is not None else ()
    groups = groups_of(machines, places)
    cluster = (machines.group(plan.cluster) or machines.slowest) if isinstance(machines, MixedCluster) else machines
    if plan.pipeline is None:
        pricing = Pricing(cluster, program.mesh)
        terms = _terms(program, pricing)
        return Appraisal(terms, sum(terms.values()), memory_use(program, Engine.of(cluster)), program.ledger.total_bytes)
    pipeline = plan.pipeline
    order = Order(pipeline.schedule, pipeline.num_ranks, plan.residency.micro_batches, pipeline.virtual_stages, pipeline.shares)
    pricing = along(machines, groups, program.mesh) if isinstance(machines, MixedCluster) and groups else Pricing(cluster, program.mesh, (pipeline.num_ranks, pipeline.position))
    staged = Staged(cut_into_stages(program, pipeline), order, pricing, Engine.of(cluster))
    return _of_stages(staged)


def _of_stages(staged: Staged) -> Appraisal:
    timeline, placement = staged.timeline, staged.stages.placement
    busiest = max(range(timeline.num_ranks), key=timeline.busy_s)
    terms: defaultdict[str, float] = defaultdict(float)
    for stage in staged.stages.stages:
        if placement[stage.number] == busiest:
            for name, seconds in _terms(stage.program, staged.pricing.on(busiest)).items():
                terms[name] += seconds
    if staged.order.shares:
        terms[SUMS] = sum(staged.ties_s)
    waiting = timeline.step_time_s - sum(terms.values())
    terms[WAITING if waiting >= 0 else LEFT_FREE] = waiting  # the terms are those of a rank whose cores all the others want too
    return Appraisal(dict(terms), timeline.step_time_s, staged.worst_memory, staged.communicated_bytes)


def _terms(program: Program, pricing: Pricing) -> dict[str, float]:
    """Seconds of a step of one program."""
    once = program.in_modes({})
    found: defaultdict[str, float] = defaultdict(float)
    for name, seconds in _named(once, pricing):
        found[name] += seconds
    for axis, seconds in gathering_again_s(program, pricing).items():
        found[_moving("all_gather", axis, program)] += seconds
    found[AGAIN] = _computing(program, pricing) - found[COMPUTE]
    found[STARTING] = 2 * program.residency.micro_batches * pricing.cluster.host.action_s
    return {name: seconds for name, seconds in found.items() if seconds or name == COMPUTE}


def _computing(program: Program, pricing: Pricing) -> float:
    return sum(seconds for name, seconds in _named(program, pricing) if name == COMPUTE)


def _named(program: Program, pricing: Pricing) -> Iterator[tuple[str, float]]:
    """(term, seconds a step) of every piece."""
    times, seen = program.residency.micro_batches, set()
    for piece in pieces(program, pricing):
        if piece.key in seen:
            continue
        seen.add(piece.key)
        there, back, once = piece.seconds[0], sum(piece.seconds[1:PER_MICROBATCH]), sum(piece.seconds[PER_MICROBATCH:-1])
        assert isinstance(piece.key, tuple)
        if piece.key[0] == "move":
            step = route_steps(piece.key[2])[-1]
            yield _moving(step.forward, step.axis, program), times * there
            yield _moving(step.backward, step.axis, program), times * back
        else:
            yield COMPUTE if piece.key[0] == "op" else PARAMETERS, times * (there + back) + once
            yield UPDATE, piece.seconds[-1]


def _moving(primitive: str, axis: int, program: Program) -> str:
    """A collective by its name and axis; what stays on a device is a copy."""
    return f"{primitive.replace('_', '-')} over {program.mesh.names[axis]}" if primitive in COLLECTIVES else COPIES
