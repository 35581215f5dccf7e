"""The plan of what the joint search found: its decisions on the whole graph, priced and walked there as every plan is."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from autopar.core.cluster import Cluster
from autopar.core.collector import collector_paused
from autopar.core.family import Family
from autopar.core.graph import OpGraph
from autopar.core.memory import MemoryUse
from autopar.core.mesh import Mesh, MeshAxis
from autopar.core.pipeline import Pipeline
from autopar.core.plan import Plan, Proof
from autopar.core.units import size
from autopar.errors import InfeasibleError, NoFamilyError
from autopar.joint.at_point import Found
from autopar.joint.clock import FINISHED, Clock
from autopar.joint.cut import Cut
from autopar.joint.deep import Deep
from autopar.joint.fold import SHOWN, shown
from autopar.joint.known import Known
from autopar.joint.likely import Likely
from autopar.joint.search import Joint, JointSearch
from autopar.joint.space import SCHEDULES
from autopar.joint.unroll import modes_of, recomputed, unrolled
from autopar.planner.bind import decisions
from autopar.planner.blocks import Order
from autopar.planner.meshes import role_names
from autopar.planner.pins import Pins
from autopar.planner.plan import Planned
from autopar.planner.roles import batch_factors
from autopar.planner.search import Options
from autopar.planner.staging import Staged, pipeline_prediction
from autopar.program import Program
from autopar.stages import cut_into_stages

LEAST = 0.7
"""Of the memory: a plan that three blocks see so much emptier than the whole graph does is given up."""


@dataclass(frozen=True)
class Whole:
    """A found plan on the whole graph."""

    program: Program
    staged: Staged

    @property
    def step_s(self) -> float:
        return self.staged.timeline.step_time_s

    @property
    def memory(self) -> MemoryUse:
        return self.staged.worst_memory


def on_whole_graph(deep: Deep, graph: OpGraph) -> Whole:
    """`graph`: of one microbatch with all blocks."""
    cut, blocks = deep.light.cut, tuple([depth.blocks for depth in deep.depths])
    question = id(graph), deep.order, blocks
    if (plain := cut.wholes.get(question)) is None:
        plain = _plain(cut, graph, deep.order, blocks)
        cut.wholes.clear()  # plans that follow on each other often differ in modes alone
        cut.wholes[question] = plain  # which holds the graph, so that its id stays its own
    staged = plain.in_modes(recomputed(deep.light.program, cut.run, modes_of(deep.depths, deep.light.mode, deep.heavy.mode)))
    return Whole(staged.stages.whole, staged)


def _plain(cut: Cut, graph: OpGraph, order: Order, blocks: Sequence[int]) -> Staged:
    """The plan of so many blocks in every stage, none of which is computed again."""
    program = unrolled(cut.program, graph, cut.run, ("none",) * cut.run.depth)
    first_op = {segment.block: graph.ops[segment.ops.start].name for segment in reversed(graph.segments)}
    pipeline = Pipeline(order.num_ranks, tuple([first_op[cut.run.block(n)] for n in accumulate(blocks[:-1])]), order.schedule, cut.pricing.pp[1])
    return Staged(cut_into_stages(program, pipeline if order.num_ranks > 1 else None), order, cut.pricing, cut.engine, cut.walked)


def check_in_space(options: Options, pins: Pins) -> None:
    """Raise NoFamilyError where what is fixed is none of the plans that are searched."""
    if options.mesh is not None:
        raise NoFamilyError("a mesh is given")
    if pins.named:
        raise NoFamilyError("pins name operators")
    if pins.schedule not in (None, *SCHEDULES):
        raise NoFamilyError(f"schedule {pins.schedule} is not among {', '.join(SCHEDULES)}")


def is_row(family: Family) -> bool:
    """Whether a model is one row of blocks, and long enough."""
    return len(family.runs) == 1 and family.depth >= SHOWN


def joint_search(family: Family, batch: int, cluster: Cluster, options: Options, pins: Pins, progress: Callable[[str], None], known: Known) -> JointSearch:
    """The search over plans of `batch` samples a step; `known`: of this family. Raises NoFamilyError where the model has no single run of blocks."""
    if not is_row(family):
        raise NoFamilyError(f"{len(family.runs)} rows of blocks, and {SHOWN} or more blocks in one row are needed")
    graphs, run = partial(family.graph, depth=SHOWN), family.runs[0]
    if missing := set(shown(run)) - {segment.block for segment in graphs(2).segments}:
        raise NoFamilyError(f"no operator is in {min(missing)}")
    return JointSearch(graphs, run, batch, cluster, options, pins, known, progress)


@collector_paused()
def planned_jointly(search: JointSearch, graph: Callable[[int], OpGraph], tokens: int = 0) -> Planned:
    """The fastest plan found that fits on the whole graph too; `graph`: of so many samples, with all blocks. Raises InfeasibleError.

    Three blocks tell the memory of the whole to a few percent; where it is more, the plan's point is planned again within less. A question that was asked
    before, and whose search ended before its budget did, has its answer again, under a budget that of the search without.
    """
    answers, question, clock = search.known.answers, (search.question, tokens), Clock(took_s=search.known.took_s)
    if (known := answers.get((search.free_question, tokens)) or answers.get(question)) is not None:
        return known
    joint = search.search()
    left, seen = list(joint.found), set[Hashable]()
    while left:
        found = min(left, key=lambda f: f.step_s)
        left.remove(found)
        if (same := _same(found, search.options.has_budget)) in seen:
            continue
        seen.add(same)
        with clock.timed(FINISHED):
            whole = on_whole_graph(found.deep, graph(found.point.samples))
            plan = _plan(joint, found, whole, search.cluster, tokens) if whole.memory.high_bytes <= search.limit_bytes else None
        if plan is not None:
            planned = Planned(plan, whole.program, others=partial(_others, joint, found, graph, search), like=Likely.of(found))
            if joint.in_time:
                answers.put(question, planned)
            return planned
        less = min(0.99, search.limit_bytes / whole.memory.high_bytes) * found.limit_bytes
        search.known.shares[found.point] = found.memory.high_bytes / whole.memory.high_bytes
        left += _again(found, less, search.options) if less > LEAST * search.limit_bytes else []
    raise InfeasibleError(
        f"every plan found for {whole.program.graph.name} holds more than {size(search.limit_bytes)} of a device's memory, the last "
        f"{size(whole.memory.high_bytes)}; pin zero=3 or recompute=full+gather, or use more nodes"
    )


def _same(found: Found, hurried: bool) -> Hashable:  # noqa: FBT001
    """Equal of plans of which one need not be looked at: it is the same on the whole graph, and if nothing is hurried, for which each is planned again within
    what it was made for, all that follows from it is."""
    deep = found.deep
    return found.point, id(found.sharding), deep.light.mode, deep.heavy.mode, deep.order, deep.depths, deep.late, None if hurried else found.limit_bytes


def _again(found: Found, limit_bytes: float, options: Options) -> list[Found]:
    """Plans of the same point within less."""
    search = found.search
    if not options.has_budget:
        made = (search.plan(limit_bytes),)
    else:
        like = search.planned(found.sharding, limit_bytes)
        made = like, None if options.descends else search.plan(limit_bytes, like.step_s if like is not None else math.inf, search.likely)
    return [again for again in made if again is not None]


def _others(joint: Joint, taken: Found, graph: Callable[[int], OpGraph], search: JointSearch, number: int) -> tuple[Plan, ...]:
    """The best plans that the search found at other points on its way."""
    plans: list[Plan] = []
    for found in sorted(joint.found, key=lambda f: f.step_s):
        if found.point != taken.point and len(plans) < number:
            whole = on_whole_graph(found.deep, graph(found.point.samples))
            if whole.memory.high_bytes <= search.limit_bytes:
                plans.append(_plan(joint, found, whole, search.cluster, 0))
    return tuple(plans)


def _plan(joint: Joint, found: Found, whole: Whole, cluster: Cluster, tokens: int) -> Plan:
    program = whole.program
    names = program.mesh.names
    if "dp" not in names and "tp" not in names:
        names = role_names(program, batch_factors(program.graph, program.rules))
    mesh = Mesh(tuple(MeshAxis(name, axis.size) for name, axis in zip(names, program.mesh.axes)))
    step = whole.step_s
    status = (
        f"{'' if joint.in_time else 'budget, '}joint search of {joint.num_points} points (pipeline x mesh x microbatches), {joint.looked[-1]} planned; "
        "the bound holds for plans whose blocks are sharded alike and recomputed in two modes at most"
    )
    return Plan(
        graph_digest=program.graph.digest, model=program.graph.name, cluster=cluster.name, mesh=mesh, **decisions(program, mesh),
        predicted=pipeline_prediction(cluster, whole.staged, tokens), pipeline=whole.staged.stages.pipeline if found.point.num_ranks > 1 else None,
        proof=Proof(step, min(step, joint.bound_s), max(0.0, step - joint.bound_s) / step, "elimination + price of memory", status),
        notes=tuple(f"no rule for {kind}: computed replicated" for kind in program.ops_without_rule),
    )  # fmt: skip
