"""The plan of what the joint search found: its decisions on the whole graph, priced and walked there as every plan is."""

from dataclasses import dataclass

from autopar.core.cluster import Cluster
from autopar.core.graph import OpGraph
from autopar.core.memory import MemoryUse
from autopar.core.mesh import Mesh, MeshAxis
from autopar.core.pipeline import Pipeline
from autopar.core.plan import Plan, Proof
from autopar.joint.deep import Deep
from autopar.joint.search import Joint
from autopar.joint.unroll import modes_of, unrolled
from autopar.planner.bind import decisions
from autopar.planner.liveness import Engine
from autopar.planner.meshes import role_names
from autopar.planner.roles import batch_factors
from autopar.planner.staging import Staged, pipeline_prediction
from autopar.program import Program
from autopar.stages import cut_into_stages


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
    kinds, order = deep.light, deep.order
    modes = modes_of(deep.depths, *(k.program.residency.recompute.get(k.run.blocks[1], "none") for k in (deep.light, deep.heavy)))
    program = unrolled(kinds.program, graph, kinds.run, modes)
    prefix, first_op = kinds.run.blocks[0].rpartition(".")[0], {}
    for segment in graph.segments:
        if segment.block.rpartition(".")[0] == prefix:
            first_op.setdefault(segment.block, graph.ops[segment.ops.start].name)
    starts, number = [], 0
    for depth in deep.depths[:-1]:
        number += depth.blocks
        starts.append(list(first_op.values())[number])
    pipeline = Pipeline(order.num_ranks, tuple(starts), order.schedule, kinds.pricing.pp[1])
    return Whole(program, Staged(cut_into_stages(program, pipeline if order.num_ranks > 1 else None), order, kinds.pricing, Engine.of(kinds.pricing.cluster)))


def joint_plan(joint: Joint, graph: OpGraph, cluster: Cluster, tokens: int = 0) -> Plan:
    """The fastest plan found."""
    whole = on_whole_graph(joint.best.deep, graph)
    program = whole.program
    names = role_names(program, batch_factors(graph, program.rules))
    mesh = Mesh(tuple(MeshAxis(name, axis.size) for name, axis in zip(names, program.mesh.axes)))
    step = whole.step_s
    status = f"{'exact' if joint.gap <= 1e-9 else 'bound'} over {joint.num_points} points, of which {joint.looked[1]} were sharded and {joint.looked[3]} planned"
    return Plan(
        graph_digest=graph.digest, model=graph.name, cluster=cluster.name, mesh=mesh, **decisions(program, mesh),
        predicted=pipeline_prediction(cluster, whole.staged, tokens), proof=Proof(step, min(step, joint.bound_s), max(0.0, step - joint.bound_s) / step, "joint", status),
        pipeline=whole.staged.stages.pipeline if joint.best.point.num_ranks > 1 else None,
        notes=tuple(f"no rule for {kind}: computed replicated" for kind in program.ops_without_rule),
    )  # fmt: skip
