"""Stages that are alike but for names are looked at once: what is said of each is what it costs and holds by itself."""

from dataclasses import replace

import pytest

from autopar.core.cluster import Cluster
from autopar.core.graph import Op, Operand, OpGraph, TensorMeta, Value
from autopar.core.zero import Zero
from autopar.joint.at_point import PointSearch
from autopar.joint.deep import Deep, Sharding
from autopar.joint.kinds import Depth
from autopar.joint.plan import on_whole_graph
from autopar.joint.space import Ideal, Point
from autopar.joint.unroll import modes_of, unrolled
from autopar.planner.blocks import Order
from autopar.planner.held import state_of
from autopar.planner.liveness import Engine, Liveness, fullest
from autopar.planner.staging import Staged, pipeline_prediction
from autopar.planner.work import total_seconds
from autopar.stages import cut_into_stages
from tests.joint.models import LLAMA, graphs, joint_search, programs

A100 = Cluster.preset("a100-sxm", nodes=1)
DIMS = LLAMA.with_layers(16)


def staged() -> Staged:
    """Eight stages of two blocks on four ranks, of which the third and fifth compute one block again."""
    joint = joint_search(DIMS, A100, 16, ("zero=1",))
    search = PointSearch(joint, Point(4, 2, 1, 8, 2))
    search.ideal_s(Ideal(A100, joint.run, joint.task))
    light, heavy = Sharding.of(next(programs(search)), search.pricing, joint.run, Engine.of(A100), ("none", "full")).modes
    depths = tuple(Depth(2, int(s in (2, 4))) for s in range(8))
    return on_whole_graph(Deep(light, heavy, Order("interleaved", 4, 8, 2), depths), graphs(DIMS, DIMS.layers)(2)).staged


def test_stages_that_are_alike_are_what_each_is_by_itself() -> None:
    found = staged()
    kinds = list(map(id, found.stages.alike))
    assert [kinds.index(kind) for kind in kinds] == [0, 1, 2, 1, 2, 1, 1, 7]
    for stage, kind, cost, moments, state in zip(found.stages.stages, found.stages.alike, found.costs, found._moments, [walked.state for walked in found._walked], strict=True):
        program, walk = stage.program, Liveness.of(stage.program)
        assert moments == walk.moments(found.engine)
        assert fullest(moments, state) == fullest(walk.moments(found.engine), state_of(program))
        forward, inputs, weights, gather, reduce, update = total_seconds(program, found.pricing).tolist()
        assert (cost.forward_s, cost.input_gradient_s, cost.weight_gradient_s) == (forward, inputs, weights)
        assert (cost.gather_s, cost.reduce_s, cost.step_s) == (gather, reduce, update)
        assert cost.activation_bytes == sum(walk.kept_by_segment())
        assert kind.ledger == program.ledger


@pytest.mark.parametrize(("zero", "virtual"), [(1, 1), (1, 2), (3, 2)])
def test_plans_of_one_sharding_are_what_each_is_by_itself(zero: int, virtual: int) -> None:
    """Whatever was asked before: other modes of the same cut, another cut, and what was asked already."""
    joint = joint_search(DIMS, A100, 16, (f"zero={zero}",))
    search = PointSearch(joint, Point(4, 2, 1, 8, 2))
    search.ideal_s(Ideal(A100, joint.run, joint.task))
    sharding = Sharding.of(next(programs(search)), search.pricing, joint.run, Engine.of(A100), ("none", "selective", "full+gather", "full"))
    order, each = Order("interleaved" if virtual > 1 else "1f1b", 4, 8, virtual), 4 // virtual
    graph, modes = graphs(DIMS, DIMS.layers)(2), sharding.modes
    even = [Depth(each, heavy) for heavy in (0, 1, 0, each) * virtual]
    uneven = [Depth(each - 1, 1), *even[1:-1], Depth(each + 1)]
    heavier = [depth._replace(heavy=1) for depth in even]
    plans = [(modes[0], modes[-1], even), (modes[0], modes[1], even), (modes[0], modes[-1], heavier), (modes[1], modes[-1], uneven), (modes[0], modes[-1], even)]
    for light, heavy, depths in plans:
        deep = Deep(light, heavy, order, tuple(depths))
        whole = on_whole_graph(deep, graph)
        assert whole.program == unrolled(light.program, graph, joint.run, modes_of(depths, light.mode, heavy.mode))
        alone = Staged(cut_into_stages(whole.program, whole.staged.stages.pipeline), order, search.pricing, Engine.of(A100))
        assert whole.staged.costs == alone.costs
        assert pipeline_prediction(A100, whole.staged, 1) == pipeline_prediction(A100, alone, 1)
        assert whole.staged.memory == alone.memory


def test_stages_that_differ_in_any_decision_have_other_forms() -> None:
    """A change of one thing in a stage."""
    stage = staged().stages.stages[3].program
    graph, v = stage.graph, stage.graph.params[0]
    place, route = next(item for item in stage.routes.items() if graph.ops[item[0][0]].operands[item[0][1]] in graph.differentiated)
    block = graph.segments[0].block
    changed = [
        replace(stage, strategies=(*stage.strategies[1:], ())),
        replace(stage, storage={**stage.storage, v: ()}),
        replace(stage, deferred={**stage.deferred, v: (5,)}),
        replace(stage, produced=tuple(() if w == v else layout for w, layout in enumerate(stage.produced))),
        replace(stage, relay={**stage.relay, v: ((),)}),
        replace(stage, routes={**stage.routes, place: (*route, ())}),
        replace(stage, output_routes=((),) * len(stage.output_routes)),
        replace(stage, num_handed=0),
        replace(stage, residency=replace(stage.residency, zero={**stage.residency.zero, v: Zero(3, (0,))})),
        replace(stage, residency=replace(stage.residency, recompute={block: "full"})),
        replace(stage, residency=replace(stage.residency, micro_batches=3)),
        replace(stage, residency=replace(stage.residency, offload=True)),
        replace(stage, graph=graph.part(range(len(graph.ops)), graph.values, graph.outputs, graph.updates, ())),
    ]
    forms = [program.form() for program in (stage, *changed)]
    assert [forms.index(form) for form in forms] == list(range(len(forms)))


def test_random_operators_are_one_call_whatever_their_site() -> None:
    meta = TensorMeta((4,), "float32")
    values = tuple(Value(f"x{n}", meta, "op" if n else "input") for n in range(4))

    def dropout(n: int, p: float) -> Op:
        return Op(f"dropout_{n}", "autopar.dropout.default", (n,), (n + 1,), (("input", Operand(0)), ("p", p), ("site", n)))

    graph = OpGraph(values, (dropout(0, 0.1), dropout(1, 0.1), dropout(2, 0.2)), (3,))
    assert graph.calls == (0, 0, 1)
    assert graph.digest != replace(graph, ops=(*graph.ops[:2], replace(graph.ops[2], args=(*graph.ops[2].args[:2], ("site", 7))))).digest
