"""Forced plans: the traffic of the textbooks, blocks counted instead of built, pipelines run on instead of to their end."""

from dataclasses import replace

import pytest

from autopar.core.cluster import Cluster
from autopar.core.graph import Op
from autopar.core.mesh import Mesh
from autopar.core.schedule import Edge
from autopar.cost_models.kernels import Kernels
from autopar.cost_models.pipeline import EdgeCost, StageCost
from autopar.errors import UsageError
from autopar.forecast.forced import Forced, Layout3D
from autopar.forecast.step import EVENNESS, STEADY_ROUNDS, Step, StepPlan, with_host
from autopar.forecast.transformer import Dims, Experts
from autopar.planner.blocks import Order, timed
from autopar.planner.liveness import memory_use
from autopar.planner.work import pass_seconds

DIMS = Dims(layers=6, hidden=1024, heads=16, kv_heads=16, inner=4096, vocab=8192, seq=512, positions="none")
LLAMA = replace(DIMS, norm="rms", activation="swiglu", positions="rotary", biases=False, kv_heads=8)
A100 = Cluster.preset("a100-sxm", 2)


def made(forced: Forced) -> list[tuple[int, Op]]:
    return [(v, op) for op in forced.graph.ops for v in op.results]


def of_ledger(forced: Forced, axis: str) -> dict[str, int]:
    return {primitive: size for (primitive, name, _), size in forced.program.ledger.input_bytes if name == axis}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dims", [DIMS, LLAMA], ids=["gpt", "llama"])
def test_tensor_parallelism_sends_what_megatron_does(dims: Dims, batch: int) -> None:
    """Per block two sums forward and two backward of [b, s, h], and those of the embedding and of the head; with sequence parallelism the
    same as half of them gathered, half scattered, and sums of the gradients of the norms."""
    forced = Forced(dims, Layout3D(tp=4, micro_batch=batch), A100)
    one = batch * dims.seq * dims.hidden * 2
    rows = 3 * batch * dims.seq * 2  # the loss: three numbers a token
    assert of_ledger(forced, "tp") == {"all_reduce": 4 * dims.layers * one + 2 * one + rows}
    assert {op.name: p.dim for v, op in made(forced) for p in forced.program.produced[v] if p.kind == "S" and p.dim > 2} == {}
    cut = of_ledger(Forced(dims, Layout3D(tp=4, micro_batch=batch, sp=True), A100), "tp")
    gains = (2 * dims.layers + 1) * (2 if dims.norm == "layer" else 1) * dims.hidden * 2
    assert cut["all_reduce"] == rows + gains and cut["reduce_scatter"] == (4 * dims.layers + 2) * one
    assert cut["all_gather"] == (4 * dims.layers + 2) * one // 4


@pytest.mark.parametrize("layout", [Layout3D(micro_batch=16), Layout3D(dp=2, tp=2, sp=True, zero=1, micro_batch=16), Layout3D(dp=4, zero=3, recompute="full", micro_batch=64)], ids=str)
def test_blocks_counted_are_blocks_built(layout: Layout3D) -> None:
    """Six blocks from the price of three, in seconds and bytes, where activations are most of them: the optimizer is taken to be fused."""
    step, built = Step(LLAMA, StepPlan(layout=layout), A100), Forced(LLAMA, layout, A100)
    (cost,) = step.costs
    seconds = pass_seconds(built.program, built.pricing)
    bare = replace(LLAMA, layers=3)
    three = Step(bare, StepPlan(layout=layout), A100).costs[0]
    six = [sum(s[k] for s in step.kinds.seconds) + 3 * step.kinds.seconds[1][k] for k in range(3)]
    assert six == pytest.approx(list(seconds), rel=1e-6)
    assert cost.forward_s > three.forward_s and cost.step_s > 1.5 * three.step_s
    whole = memory_use(built.program).expected_bytes
    if layout.recompute == "none":
        assert step.memory.expected_bytes == pytest.approx(whole, rel=0.03)
    else:  # a stage keeps what it was handed until it has been differentiated, a block that is computed again does not
        assert whole <= step.memory.expected_bytes <= 1.12 * whole


@pytest.mark.parametrize(("ranks", "virtual"), [(4, 1), (8, 1), (4, 3)])
def test_a_pipeline_is_steady_after_its_first_round(ranks: int, virtual: int) -> None:
    n = ranks * virtual
    stages = tuple(
        StageCost(forward_s=1 + (s == n - 1) / 2 + s / 100, input_gradient_s=1 + (s == 0) / 3, weight_gradient_s=1, gather_s=0.1, reduce_s=0.2) for s in range(n)
    )

    def seconds(times: int) -> float:
        order = Order("interleaved" if virtual > 1 else "1f1b", ranks, times, virtual)
        edges = tuple(Edge(s, s + 1) for s in range(n - 1))
        return timed(order, Cluster.preset("h100-sxm"), stages, edges, (EdgeCost(activation_s=0.05, gradient_s=0.05),) * (n - 1), (), ()).step_time_s

    first, second = seconds(STEADY_ROUNDS * ranks), seconds((STEADY_ROUNDS + 1) * ranks)
    assert first + (6 - STEADY_ROUNDS) * (second - first) == pytest.approx(seconds(6 * ranks), rel=1e-9)


def test_more_costs_more_and_less_less() -> None:
    plan = StepPlan(layout=Layout3D(dp=2, tp=2, micro_batch=2), pp=2, num_microbatches=8)
    base = Step(DIMS, plan, A100)
    assert 0 < base.step_s < Step(DIMS, replace(plan, num_microbatches=16), A100).step_s < 2 * base.step_s
    full = Step(DIMS, replace(plan, layout=replace(plan.layout, recompute="full")), A100)
    assert full.step_s > 1.15 * base.step_s and full.memory.activations < base.memory.activations
    sharded = Step(DIMS, replace(plan, layout=replace(plan.layout, zero=1)), A100)
    assert sharded.memory.optimizer < 0.6 * base.memory.optimizer
    assert Step(DIMS, plan, A100, kernels=Kernels(fused=True)).step_s < base.step_s < Step(DIMS, plan, A100, kernels=Kernels(host_s=1e-3)).step_s


def test_prefetched_gathers_hide_and_never_add() -> None:
    plan = StepPlan(layout=Layout3D(dp=16, zero=3, micro_batch=4))
    alone, beside = (Step(LLAMA, plan, A100, overlap=overlap).step_s for overlap in (False, True))
    assert beside < alone


def test_plans_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="stages"):
        Step(DIMS, StepPlan(layout=Layout3D(), pp=4, vpp=4), A100)
    with pytest.raises(UsageError, match="devices"):
        Step(DIMS, StepPlan(layout=Layout3D(dp=32)), A100)
    with pytest.raises(UsageError, match="does not divide"):
        Forced(LLAMA, Layout3D(tp=16), A100)


def test_the_mesh_leaves_out_axes_of_one() -> None:
    assert isinstance(Layout3D(tp=4).mesh, Mesh) and Layout3D(tp=4).mesh.names == ("tp",) and Layout3D(dp=2, tp=4).mesh.sizes == (2, 4)


def test_context_parallelism_gathers_keys_and_values_and_nothing_else() -> None:
    """Per block keys and values of the other parts of the sequence, once each; their gradients are scattered on the way back."""
    layout = Layout3D(dp=2, cp=4, zero=1)
    forced = Forced(LLAMA, layout, A100)
    keys = LLAMA.kv_heads * LLAMA.head_dim * LLAMA.seq // 4 * 2
    assert of_ledger(forced, "cp")["all_gather"] == 2 * LLAMA.layers * keys
    assert of_ledger(forced, "cp")["reduce_scatter"] == 2 * LLAMA.layers * 4 * keys
    assert layout.mesh.names == ("dp", "cp")
    alone, cut = (Step(LLAMA, StepPlan(layout=lay), A100) for lay in (Layout3D(dp=2), Layout3D(dp=2, cp=4)))
    assert cut.step_s < alone.step_s and cut.kinds.kept_bytes[1] < 0.4 * alone.kinds.kept_bytes[1]
    with pytest.raises(UsageError, match="several in a microbatch"):
        Forced(LLAMA, Layout3D(cp=2, micro_batch=2), A100)
    with pytest.raises(UsageError, match="written out"):
        Forced(replace(LLAMA, fused_attention=False), Layout3D(cp=2), A100).program  # noqa: B018


MIXTURE = replace(LLAMA, experts=Experts(count=16, chosen=2, inner=512, shared=256))


def test_experts_are_sent_their_tokens_and_keep_their_parameters() -> None:
    """Per block one exchange of chosen x tokens to the experts and one back, in either direction; experts are stored cut, and summed over the ranks
    that hold the same ones."""
    forced = Forced(MIXTURE, Layout3D(dp=8, ep=4, zero=1), A100)
    slots = 2 * MIXTURE.seq * MIXTURE.hidden * 2
    assert of_ledger(forced, "ep")["all_to_all"] == 4 * MIXTURE.layers * slots
    assert "all_to_all" not in of_ledger(forced, "dp")
    sizes = {forced.graph.values[v].name: forced.program.local_bytes(v, forced.program.storage[v]) for v in forced.graph.params}
    assert sizes["blocks.0.experts.up.weight"] == 16 // 4 * MIXTURE.hidden * 512 * 2
    assert sizes["blocks.0.q.weight"] == MIXTURE.hidden**2 * 2


@pytest.mark.parametrize("inside", [False, True], ids=["experts-over-tp", "experts-cut-by-tp"])
def test_experts_beside_tensor_parallelism(inside: bool) -> None:
    layout = Layout3D(dp=2, tp=2, sp=True, ep=2, tp_of_experts=inside)
    forced = Forced(MIXTURE, layout, A100)
    v = next(v for v in forced.graph.params if forced.graph.values[v].name == "blocks.0.experts.up.weight")
    shape = forced.program.local_shape(v, forced.program.storage[v])
    assert tuple(shape) == ((8, 1024, 256) if inside else (4, 1024, 512))
    assert Step(MIXTURE, StepPlan(layout=layout), A100).step_s > 0


def test_an_embedding_and_a_head_may_be_stages_of_their_own() -> None:
    """126 layers on 16 x 8 stages; the stages at the ends cost what they have beside a block."""
    dims = replace(DIMS, layers=6)
    step = Step(dims, StepPlan(layout=Layout3D(), pp=4, vpp=2, num_microbatches=4), A100)
    assert step.depths == (0, 1, 1, 1, 1, 1, 1, 0)
    assert 0 < step.costs[0].forward_s < step.costs[1].forward_s and step.step_s > 0


def test_whole_sums_are_of_all_that_is_summed() -> None:
    """Six ranks cut some parameters and not others; a sum for every rank is of both, and takes longer than one of parts."""
    plan = StepPlan(layout=Layout3D(dp=6, zero=1, micro_batch=2), num_microbatches=2)
    parts, whole = (Step(DIMS, plan, A100, kernels=Kernels(sums_whole=there)).costs[0].reduce_s for there in (False, True))
    assert parts < whole < 2.5 * parts


def test_parts_of_a_message_cross_between_nodes_and_meet_inside() -> None:
    """Four ranks that hold the same activations send a quarter each, and gather; what is cut along the sequence already is sent as it is."""
    layout = Layout3D(tp=4, micro_batch=4)
    plan = StepPlan(layout=layout, pp=4, num_microbatches=8)
    apart = Cluster.preset("a100-sxm", 4, 4)
    whole, parts = (Step(DIMS, plan, apart, kernels=Kernels(sends_parts=flag)) for flag in (False, True))
    num_bytes, pricing = whole.kinds.message.activation_bytes, parts.forced.pricing
    assert num_bytes == layout.micro_batch * DIMS.seq * DIMS.hidden * 2 == parts.kinds.message.activation_bytes
    assert parts.kinds.message.activation_s == pytest.approx(pricing.message(num_bytes / 4) + pricing.collective("all_gather", (0,), num_bytes / 4))
    assert parts.kinds.message.activation_s < whole.kinds.message.activation_s and parts.step_s < whole.step_s
    cut = replace(plan, layout=replace(layout, sp=True))
    assert len({Step(DIMS, cut, apart, kernels=Kernels(sends_parts=flag)).step_s for flag in (False, True)}) == 1


def test_a_host_and_a_device_in_line() -> None:
    """The slower one counts, more where both are as slow; launches that block add up, those of the last of several ranks."""
    assert with_host(3.0, 0.0) == 3.0 and with_host(3.0, 3.0) == pytest.approx(3.0 * 2 ** (1 / EVENNESS))
    assert with_host(3.0, 0.03) == with_host(0.03, 3.0) == pytest.approx(3.0, rel=1e-5)
    assert with_host(3.0, 2.0, 1) == 5.0 > with_host(3.0, 2.0) > 3.0
    assert with_host(3.0, 2.0, 4) == pytest.approx(3.0 + 2.0 * (1 + 1 / 2 + 1 / 3 + 1 / 4)) and with_host(3.0, 0.0, 4) == 3.0
    plan = StepPlan(layout=Layout3D(micro_batch=8))
    free, ahead, blocking = (Step(DIMS, plan, A100, kernels=k).step_s for k in (Kernels(), Kernels(host_s=2e-5), Kernels(host_s=2e-5, launches_block=True)))
    assert free < ahead < blocking


def test_a_host_launches_what_a_loss_and_a_softmax_are_made_of() -> None:
    """A host that is slower than all else launches 19 + 6 operators more for a loss, once, and 4 more for every softmax, forward and backward."""
    dims, plan, host_s = replace(DIMS, fused_attention=False), StepPlan(layout=Layout3D()), 1e-3
    plain, loss, softmax = (
        Step(dims, plan, A100, kernels=Kernels(host_s=host_s, **more)).step_s for more in ({}, {"loss_launches": (20, 7)}, {"softmax_batches": 1000})
    )
    assert loss - plain == pytest.approx(25 * host_s, rel=1e-2)
    assert softmax - plain == pytest.approx(dims.layers * 8 * host_s, rel=1e-2)
