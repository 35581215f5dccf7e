"""What the joint search says of a plan is what the whole graph says; it finds the best of all points, and its bound is under every plan."""

from dataclasses import replace
from itertools import combinations, combinations_with_replacement, pairwise, product
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest

from autopar.core.cluster import Cluster
from autopar.core.kernel_rate import KernelRate
from autopar.core.residency import RECOMPUTE
from autopar.core.unroll import Run
from autopar.errors import InfeasibleError
from autopar.joint.at_point import PointSearch
from autopar.joint.bounds import Line, Parts, least_step_s
from autopar.joint.deep import Deep, Sharding, even_depths
from autopar.joint.even import even_cuts
from autopar.joint.kinds import Depth
from autopar.joint.known import Known
from autopar.joint.plan import on_whole_graph, planned_jointly
from autopar.joint.search import JointSearch
from autopar.joint.space import Ideal, Point, points
from autopar.planner.bind import bind
from autopar.planner.blocks import Order
from autopar.planner.held import UPDATE
from autopar.planner.liveness import Engine
from autopar.planner.plan import Planned
from autopar.planner.states import Pricing
from autopar.planner.work import Pieces, total_seconds
from tests.joint.models import GPT, LLAMA, graphs, joint_search, programs

A100 = Cluster.preset("a100-sxm", nodes=1)
POINTS = {
    "whole": (Point(1, 4, 2, 2, 8), Order("1f1b", 1, 2), 0),
    "pipeline": (Point(2, 2, 2, 4, 4), Order("1f1b", 2, 4), 1),
    "interleaved": (Point(2, 4, 1, 4, 4), Order("interleaved", 2, 4, 2), 2),
    "long": (Point(4, 2, 1, 16, 2), Order("1f1b", 4, 16), 3),
}


@pytest.mark.parametrize("modes", [("none", "full"), ("none+gather", "full"), ("selective", "full"), ("selective+gather", "full+gather")], ids="-".join)
@pytest.mark.parametrize("case", POINTS)
@pytest.mark.parametrize("dims", [LLAMA, GPT], ids=["llama", "gpt"])
def test_stages_from_three_blocks_are_those_of_the_whole_graph(dims, case: str, modes: tuple[str, str]) -> None:
    point, order, zero = POINTS[case]
    joint = joint_search(dims, A100, point.num_microbatches * point.samples, (f"zero={zero}",))
    search = PointSearch(joint, point)
    search.ideal_s(Ideal(A100, joint.run, joint.task))
    program = next(programs(search))
    sharding = {kinds.mode: kinds for kinds in Sharding.of(program, search.pricing, joint.run, Engine.of(A100), modes).modes}
    light, heavy = (sharding[mode] for mode in modes)
    depths = tuple(Depth(d.blocks, s % (d.blocks + 1)) for s, d in enumerate(even_depths(light, order.num_stages)))
    deep = Deep(light, heavy, order, depths)
    whole = on_whole_graph(deep, graphs(dims, dims.layers)(point.samples))
    for ours, its in zip(deep.costs, whole.staged.costs, strict=True):
        assert (ours.forward_s, ours.input_gradient_s, ours.weight_gradient_s) == pytest.approx((its.forward_s, its.input_gradient_s, its.weight_gradient_s), rel=1e-9)
        assert (ours.gather_s, ours.reduce_s) == pytest.approx((its.gather_s, its.reduce_s), rel=0.05)  # buckets of another total
        assert ours.activation_bytes == pytest.approx(its.activation_bytes, rel=0.01)
    assert deep.step_s == pytest.approx(whole.step_s, rel=0.01)
    assert deep.memory.high_bytes == pytest.approx(whole.memory.high_bytes, rel=0.06)  # likewise, in small models


@pytest.mark.parametrize("case", ["whole", "interleaved"])
def test_gradients_that_the_optimizer_finds_are_seen_of_all_blocks(case: str) -> None:
    """In float32, of a model in bfloat16 with next to no activations."""
    dims, (point, order, _) = replace(LLAMA, seq=64), POINTS[case]
    joint = joint_search(dims, A100, point.num_microbatches * point.samples, ("zero=1",))
    search = PointSearch(joint, point)
    search.ideal_s(Ideal(A100, joint.run, joint.task))
    sharding = Sharding.of(next(programs(search)), search.pricing, joint.run, Engine.of(A100), ("full",))
    deep = sharding.leanest(order)
    whole = on_whole_graph(deep, graphs(dims, dims.layers)(point.samples)).memory
    assert deep.memory.moment == whole.moment == UPDATE
    assert deep.memory.high_bytes == pytest.approx(whole.high_bytes, rel=1e-3)


def test_operators_that_are_priced_once_cost_what_each_does_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In all modes of recomputation."""
    for dims in (LLAMA, GPT):
        search = PointSearch(joint_search(dims, A100, 16), Point(2, 2, 2, 4, 4))
        search.fitting_s()
        made = [program.in_modes({f"blocks.{n}": mode for n in range(3)}) for program in programs(search) for mode in RECOMPUTE]
        once = [total_seconds(program, search.pricing).tolist() for program in made]
        assert len(set(map(tuple, once))) > len(RECOMPUTE)
        with monkeypatch.context() as patched:
            patched.setattr(Pricing, "kept", lambda self, key, make: make())
            assert [total_seconds(program, search.pricing).tolist() for program in made] == once


def test_blocks_in_any_modes_take_what_all_their_pieces_take() -> None:
    """What is added up by segments, and kept for programs in other modes, is the sum over pieces that was not."""
    random = Random(0)
    for dims in (LLAMA, GPT):
        search = PointSearch(joint_search(dims, A100, 16), Point(2, 2, 2, 4, 4))
        search.fitting_s()
        for program in programs(search):
            plain = Pieces(program, search.pricing)
            for _ in range(8):
                mixed = program.in_modes({f"blocks.{n}": random.choice(RECOMPUTE) for n in range(3)})
                alone = {piece.key: piece.seconds for piece in Pieces(mixed, search.pricing).all()}
                assert plain.in_modes(mixed).total_seconds() == pytest.approx(np.sum(list(alone.values()), axis=0), rel=1e-12)


def test_least_steps_are_under_all_cuts_of_random_stages() -> None:
    """Of stages that cost nothing but their blocks, simulated in every cut."""
    joint = joint_search(LLAMA, A100, 16)
    random = Random(1)
    for ranks, number in product((1, 2, 3), (1, 2, 3, 6)):
        order = Order("1f1b", ranks, number)
        search = PointSearch(joint, Point(ranks, 8 // ranks if ranks != 3 else 2, 1, number, 4))
        search.ideal_s(Ideal(A100, joint.run, joint.task))
        light = Sharding.of(next(programs(search)), search.pricing, joint.run, Engine(), ("none",)).modes[0]
        seconds = [sum(kind[:3]) for kind in light.seconds]
        ends = Parts(seconds[1], seconds[0] - seconds[1], seconds[2] - seconds[1])
        bound = least_step_s(order, LLAMA.layers, [[Line(number * ends.block)]] * ranks, ends.times(number), ends)
        cuts = [c for c in product(range(1, LLAMA.layers), repeat=ranks) if sum(c) == LLAMA.layers] or [(LLAMA.layers,)]
        steps = [Deep(light, light, order, tuple(map(Depth, cut))).step_s for cut in random.sample(cuts, min(len(cuts), 8))]
        assert bound <= min(steps) * (1 + 1e-6)
        even = Deep(light, light, order, even_depths(light, ranks)).step_s
        assert number < ranks or bound > 0.7 * even


@pytest.mark.parametrize("virtual", [1, 2])
@pytest.mark.parametrize("zero", [0, 1])
def test_no_cut_beats_the_bound_where_sums_of_gradients_hide(virtual: int, zero: int) -> None:
    """With short sequences the sums take as long as the passes, and a rank of two stages sums those of one while it computes the other."""
    short = replace(LLAMA, seq=128, layers=8)
    for point in (Point(2, 4, 1, 2, 4, ("dp", "tp")), Point(2, 4, 1, 8, 4, ("dp", "tp")), Point(4, 2, 1, 4, 2, ("dp", "tp"))):
        pins = (f"virtual={virtual}", f"zero={zero}", f"dp={point.outer}")
        joint = joint_search(short, A100, point.num_microbatches * point.samples, pins)
        search = PointSearch(joint, point)
        search.ideal_s(Ideal(A100, joint.run, joint.task))
        (order,) = search.orders
        light = Sharding.of(next(programs(search)), search.pricing, joint.run, Engine(), ("none",)).modes[0]
        cuts = combinations(range(1, short.layers), order.num_stages - 1)
        depths = [[b - a for a, b in pairwise((0, *cut, short.layers))] for cut in cuts] if virtual == 1 else even_cuts(order, short.layers).blocks.astype(int).tolist()
        steps = [Deep(light, light, order, tuple(map(Depth, each))).step_s for each in Random(2).sample(depths, min(len(depths), 24))]
        bound = search.fastest_s()
        assert 0.4 * min(steps) < bound <= min(steps) * (1 + 1e-6), point


def test_shardings_for_blocks_that_are_computed_again_are_tried() -> None:
    """Where memory binds, other shardings are planned than those that are fastest."""
    joint = joint_search(LLAMA, A100, 16, memory_share=0.04)
    search = PointSearch(joint, Point(2, 2, 2, 4, 4))
    search.ideal_s(Ideal(A100, joint.run, joint.task))
    free = {tuple(program.strategies) for program in programs(search)}
    assert search.fitting_s() > search.fastest_s()
    assert len({tuple(program.strategies) for program in programs(search)} - free) > 1


@pytest.mark.parametrize("mode", ["none+gather", "full", "selective+gather", "full+gather"])
def test_a_pinned_mode_is_taken_whether_or_not_a_sharding_gathers(mode: str) -> None:
    joint = joint_search(LLAMA, A100, 16, (f"recompute={mode}",))
    for point in (Point(1, 8, 1, 1, 16), Point(1, 1, 8, 4, 4)):
        search = PointSearch(joint, point)
        search.ideal_s(Ideal(A100, joint.run, joint.task))
        for program in programs(search):
            assert [kinds.mode for kinds in Sharding.of(program, search.pricing, joint.run, Engine.of(A100), search.keeping.programs).modes] == [mode]


def everything(joint: JointSearch) -> list[tuple[Point, float]]:
    """The best plan of every point, none left out."""
    found, ideal = [], Ideal(joint.cluster, joint.run, joint.task)
    for point in points(joint.cluster, joint.batch, joint.run.depth, joint.pins):
        search = PointSearch(joint, point)
        search.ideal_s(ideal)
        search.fastest_s()
        if search.fitting_s() < float("inf") and (made := search.plan(joint.limit_bytes)) is not None:
            found.append((point, made.step_s))
    return found


KERNELS = (
    KernelRate("product", 1e-6, 1.2, 3.0, 1.6), KernelRate("causal_attention", 4e-6, 0.9, 0.0, 0.7), KernelRate("pointwise", 1e-6, 0.0, 2.0), KernelRate("gather", 2e-6, 0.1),
    KernelRate("normalisation", 2e-6, 0.0, 1.5, 0.5), KernelRate("loss", 3e-6, 0.0, 4.0, 0.2),
)  # fmt: skip
"""Faster than the general numbers of the device, with backwards of less work than by the formulas."""


@pytest.mark.parametrize(("share", "kernels"), [(0.9, ()), (0.25, ()), (0.9, KERNELS)], ids=["slack", "binding", "measured kernels"])
def test_the_best_of_all_points_is_found_and_the_bound_is_under_all(share: float, kernels: tuple[KernelRate, ...]) -> None:
    cluster = replace(A100, devices_per_node=2, device=replace(A100.device, kernels=kernels))
    joint = joint_search(LLAMA, cluster, 2, memory_share=share, gap=0.0)
    result, every = joint.search(), everything(joint)
    best = min(step for _, step in every)
    assert result.best.step_s == pytest.approx(best, rel=1e-9)
    assert result.bound_s <= best * (1 + 1e-9) and result.gap < 0.3
    assert len(every) <= result.num_points
    assert result.best.memory.high_bytes <= joint.limit_bytes


def unpruned(search: PointSearch, shardings: list[Sharding], limit_bytes: float) -> float:
    """The fastest of all shardings, orders and pairs of modes, with as few blocks in the heavier mode as fit on every rank: all are tried, nothing is left out."""
    steps = [float("inf")]
    for sharding, order in product(shardings, search.orders):
        depths = even_depths(sharding.light, order.num_stages)
        for (light, heavy), late in product(combinations_with_replacement(sharding.modes, 2), {False, order.virtual > 1}):
            deep, changed = Deep(light, heavy, order, depths, late), {}
            for rank in range(order.num_ranks):
                ways = (deep.with_heavy(rank, n) for n in range(search.joint.run.depth + 1))
                changed |= next((way for way in ways if deep.rank_memory(rank, way).high_bytes <= limit_bytes), {})
            if len(changed) == order.num_stages:
                steps.append(replace(deep, depths=tuple(changed[s] for s in range(order.num_stages))).step_s)
    return min(steps)


@pytest.mark.parametrize(
    ("dims", "point", "shares"), [(LLAMA, Point(2, 4, 1, 4, 4), (0.8, 0.5)), (GPT, Point(1, 4, 2, 2, 8), (0.3, 0.25))], ids=["pipeline", "whole"]
)
def test_what_is_left_out_of_a_point_is_no_faster(dims, point: Point, shares: tuple[float, float]) -> None:
    """At limits that bind more and more."""
    joint = joint_search(dims, A100, point.num_microbatches * point.samples)
    search = PointSearch(joint, point)
    search.ideal_s(Ideal(A100, joint.run, joint.task))
    search.fitting_s()
    shardings = [Sharding.of(p, search.pricing, joint.run, Engine.of(A100), search.keeping.programs) for p in programs(search)]
    roomy = search.plan(float("inf"))
    assert roomy is not None
    steps = [roomy.step_s]
    for share in shares:
        limit = share * roomy.memory.high_bytes
        found = search.plan(limit)
        assert found is not None and found.step_s == unpruned(search, shardings, limit) and found.memory.high_bytes <= limit
        steps.append(found.step_s)
    assert steps[0] <= steps[1] < steps[2]
    assert search.plan(limit, steps[2]) is None
    assert search.plan(limit, steps[2] * 1.01).step_s == steps[2]


def test_no_rank_holds_less_than_what_is_known_without_its_backward() -> None:
    joint = joint_search(LLAMA, A100, 16)
    for point, order in ((Point(1, 4, 2, 1, 16), Order("1f1b", 1, 1)), (Point(2, 4, 1, 4, 4), Order("interleaved", 2, 4, 2))):
        search = PointSearch(joint, point)
        search.ideal_s(Ideal(A100, joint.run, joint.task))
        for program in programs(search):
            sharding = Sharding.of(program, search.pricing, joint.run, Engine.of(A100), ("none", "selective", "full+gather", "full"))
            for (light, heavy), late in product(combinations(sharding.modes, 2), (False, True)):
                deep = Deep(light, heavy, order, even_depths(light, order.num_stages), late)
                for rank in range(order.num_ranks):
                    for number, least in enumerate(deep.least_bytes(rank)):
                        assert 0 < least <= deep.rank_memory(rank, deep.with_heavy(rank, number)).high_bytes


@pytest.mark.parametrize("cluster", [A100, Cluster.local(8)], ids=["gpu", "cpu"])
@pytest.mark.parametrize("dims", [LLAMA, GPT], ids=["llama", "gpt"])
def test_what_a_rank_holds_is_known_for_all_numbers_of_heavier_blocks_at_once(dims, cluster: Cluster) -> None:
    """And for all numbers of blocks: the same bytes as one by one."""
    draw = Random(0)
    for point, order, zero in POINTS.values():
        joint = joint_search(dims, cluster, point.num_microbatches * point.samples, (f"zero={zero}",))
        search = PointSearch(joint, point)
        search.ideal_s(Ideal(cluster, joint.run, joint.task))
        sharding = Sharding.of(draw.choice([*programs(search)]), search.pricing, joint.run, Engine.of(cluster), ("none", "selective", "full+gather", "full"))
        for light, heavy in combinations_with_replacement(sharding.modes, 2):
            ends = sorted(draw.sample(range(1, joint.run.depth), order.num_stages - 1))
            depths = tuple(Depth(b - a) for a, b in pairwise((0, *ends, joint.run.depth)))
            deep = Deep(light, heavy, draw.choice([order, replace(order, num_microbatches=draw.randint(1, 8) * order.num_ranks)]), depths, draw.random() < 0.5)
            for rank in range(order.num_ranks):
                by_heavy = [deep.rank_memory(rank, deep.with_heavy(rank, n)).high_bytes for n in range(len(deep.least_bytes(rank)))]
                assert np.maximum(deep.high_bytes(rank, heavy=False), deep.high_bytes(rank, heavy=True)).tolist() == by_heavy
                if order.virtual == 1 < order.num_ranks:
                    for number, (least, most) in enumerate(zip(deep.least_by_blocks(rank), deep.high_by_blocks(rank), strict=True), start=1):
                        changed = replace(deep, depths=(*depths[:rank], Depth(number), *depths[rank + 1 :]))
                        assert most == changed.rank_memory(rank).high_bytes and least == changed.least_bytes(rank)[0] <= most


def test_blocks_are_as_even_as_room_allows() -> None:
    """One by one to the stage that is fastest with it; of equals to the last."""
    draw = Random(1)
    for _ in range(200):
        stages = draw.randint(2, 6)
        depth, seconds = stages + draw.randint(0, 20), [[draw.choice([0.1, 0.2, 0.3, draw.random()])] * 3 for _ in range(3)]
        most = draw.choice([[], [1 + draw.randint(0, depth - stages) for _ in range(stages)]])
        most = most if not most or sum(most) >= depth else []
        first, block, last = (sum(s) for s in seconds)
        beside = [first - block, *[0.0] * (stages - 2), last - block]
        blocks = [1] * stages
        while sum(blocks) < depth:
            free = [s for s in range(stages) if not most or blocks[s] < most[s]]
            blocks[min(free, key=lambda s: (round((blocks[s] + 1) * block + beside[s], 12), -s))] += 1
        kinds = SimpleNamespace(seconds=seconds, cut=SimpleNamespace(run=Run("blocks", 0, depth)))
        assert even_depths(kinds, stages, most) == tuple(map(Depth, blocks))


def test_plans_bind_to_the_whole_graph_alike_every_time() -> None:
    def planned() -> Planned:
        return planned_jointly(joint_search(GPT, A100, 16, ("pp=2", "dp=2")), graphs(GPT, GPT.layers))

    first = planned()
    plan, graph = first.plan, first.program.graph
    assert bind(plan, graph).strategies == first.program.strategies
    assert plan.pipeline is not None and plan.num_ranks == 8 and plan.mesh.names == ("dp", "tp") and plan.mesh.sizes == (2, 2)
    assert plan.proof.bound <= plan.predicted.step_time_s == pytest.approx(plan.proof.objective)
    assert plan.predicted.memory.high_bytes <= 0.9 * A100.device.memory_bytes
    assert planned().plan.to_json() == plan.to_json()


@pytest.mark.parametrize("case", POINTS)
def test_what_is_before_and_behind_the_blocks_holds_no_less_than_bounds_count(case: str) -> None:
    """Beside all blocks of a rank that has both, or of the first and the last: whether blocks hold most when they are computed again, or a loss over many words."""
    point, order, zero = POINTS[case]
    search = PointSearch(joint_search(replace(LLAMA, vocab=128_000), A100, point.num_microbatches * point.samples, (f"zero={zero}",)), point)
    search.fitting_s()
    whole = search.tables.side("whole")
    first, last = search.tables.end_bytes(whole)
    assert first > 0 and last > 1.3 * whole.end_bytes[1] > 0  # the loss works in more than it keeps
    for choices in search.tables.chosen(search.first()):
        sharding, figures = search.tables.sharding(choices), whole.figures(choices)
        kept = Deep(sharding.light, sharding.light, order, sharding.even(order.num_stages))
        assert "cross_entropy" in kept.rank_memory(order.num_ranks - 1).moment
        for deep in (kept, sharding.leanest(order)):
            beside = [figures.beside_bytes(deep, rank) for rank in range(order.num_ranks)]
            assert beside[0] >= first + (last if order.num_ranks == 1 else 0.0) and beside[-1] >= last


def test_what_does_not_fit_says_so() -> None:
    with pytest.raises(InfeasibleError, match="none of"):
        joint_search(LLAMA, replace(A100, devices_per_node=2), 2, memory_share=0.01).search()


@pytest.mark.parametrize("point", [Point(2, 4, 2, 16, 2), Point(4, 2, 2, 16, 2), Point(1, 4, 4, 4, 8)], ids=str)
@pytest.mark.parametrize("share", [0.05, 0.2])
def test_larger_microbatches_of_a_mesh_bound_the_smaller(point: Point, share: float) -> None:
    """Their tables are enough to tell that a point need not be looked at."""
    joint = joint_search(LLAMA, Cluster.preset("a100-sxm", 2), 32, memory_share=share)
    search, larger = (PointSearch(joint, p) for p in (point, replace(point, num_microbatches=point.num_microbatches // 2, samples=2 * point.samples)))
    search.larger = (larger,)
    for one in (search, larger):
        one.ideal_s(Ideal(joint.cluster, joint.run, joint.task))
    assert search.floor_s() == 0.0  # nothing was looked at
    larger.fastest_s()
    fastest = PointSearch(replace(joint, known=Known()), point).fastest_s()
    assert 0.5 * fastest < search.floor_s() <= fastest
    larger.rough_s()
    fitting = PointSearch(replace(joint, known=Known()), point).fitting_s()
    assert 0.5 * min(fitting, 1e9) < search.floor_s() <= fitting
    assert search.rough_s() <= fitting
