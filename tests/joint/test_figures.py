"""What the linear model says of a sharding is no more than what the walk through its program finds: the bounds of the search rest on it."""

import numpy as np
import pytest

from autopar.core.cluster import Cluster
from autopar.core.residency import Precision
from autopar.core.unroll import Run
from autopar.forecast.transformer import Dims
from autopar.joint.at_point import PointSearch
from autopar.joint.figures import Block, Figures
from autopar.joint.search import JointSearch
from autopar.joint.space import Point
from autopar.planner.search import Options
from tests.joint.models import GPT, LLAMA, joint_search
from tests.joint.rows import PATH, Row

POINTS = (Point(2, 2, 4, 16, 2), Point(1, 4, 4, 4, 8), Point(2, 8, 1, 4, 8), Point(4, 2, 2, 32, 1))
ROUNDING = 1e-9
SHARE = {LLAMA: 0.25, GPT: 0.06}
"""Of a device's memory, so that it binds."""


@pytest.mark.parametrize("recompute", ["", "recompute=none", "recompute=full+gather"])
@pytest.mark.parametrize("point", POINTS, ids=str)
@pytest.mark.parametrize("dims", [LLAMA, GPT], ids=["llama", "gpt"])
def test_no_block_holds_less_than_its_figures_say_or_is_faster(dims: Dims, point: Point, recompute: str) -> None:
    joint = joint_search(dims, Cluster.preset("a100-sxm", 2), 32, (recompute,) if recompute else (), memory_share=SHARE[dims])
    search = PointSearch(joint, point)
    search.fitting_s()
    for choices in search.tables.chosen(search.first()):
        figures, sharding = search.tables.whole.figures(choices), search.tables.sharding(choices)
        for kinds in sharding.modes:
            found = figures.blocks[kinds.mode]
            once_s = sum(kinds.seconds[1][3:])
            assert found.seconds <= (point.num_microbatches * kinds.block_s + once_s) * (1 + ROUNDING)
            assert found.kept_bytes <= kinds.kept_inside * (1 + ROUNDING), kinds.mode


@pytest.mark.parametrize("dims", [LLAMA, GPT], ids=["llama", "gpt"])
def test_sums_over_ranks_are_kept_whatever_a_block_computes_again(dims: Dims) -> None:
    """No collective is repeated but gathers: of a product whose addends are on several ranks full recomputation keeps what selective does, and of others nothing."""
    search = PointSearch(joint_search(dims, Cluster.preset("a100-sxm", 2), 32), POINTS[0])
    (problem, ports), graph = search.tables.built, search.tables.task.graph
    selective, full = (search.keeping.recompute.index(mode) for mode in ("selective", "full"))
    modes, summed = set(ports.block_node.values()), 0
    contractions = {node: ports.states[node] for i, node in ports.op_node.items() if graph.ops[i].kind == "aten.linear.default"}
    for edge in problem.edges:
        if edge.u in modes and edge.v in contractions and edge.memory_bytes is not None:
            are_addends = np.array(["P" in [p.kind for p in layout] for layout in contractions[edge.v].result_layouts[0]])
            assert (edge.memory_bytes[full] == edge.memory_bytes[selective] * are_addends).all()
            summed += bool(edge.memory_bytes[full].any())
    assert summed


@pytest.mark.parametrize("zero", range(4))
def test_of_a_single_microbatch_no_more_state_counts_than_is_there_without_gradients(zero: int) -> None:
    """Most is kept when the forward ends; gradients are made behind it."""
    joint = joint_search(GPT, Cluster.preset("a100-sxm", 2), 32, (f"zero={zero}",), memory_share=SHARE[GPT])
    for point in (Point(1, 4, 4, 1, 32), Point(2, 8, 1, 1, 32)):
        search = PointSearch(joint, point)
        search.fitting_s()
        for choices in search.tables.chosen(search.first()):
            there = search.tables.sharding(choices).cut.states[1]
            for block in search.tables.whole.figures(choices).blocks.values():
                assert 0 < block.state_bytes <= (there.parameters + there.optimizer) * (1 + ROUNDING)


@pytest.mark.parametrize("negated", [False, True], ids=["read", "unread"])
def test_what_the_next_block_does_not_read_is_kept_only_where_blocks_begin_again(negated: bool) -> None:
    row, options = Row(256, 256, 128, negated=negated), Options(precision=Precision(master="float32"), free_micro_batches=True)
    joint = JointSearch(row.graphs(3), Run(PATH, 0, 6), 16, Cluster.preset("a100-sxm", 1), options)
    search = PointSearch(joint, Point(2, 2, 2, 4, 4))
    search.fitting_s()
    for choices in search.tables.chosen(search.first()):
        figures = search.tables.whole.figures(choices)
        for kinds in search.tables.sharding(choices).modes:
            # of six blocks there are five between two
            assert 5 / 6 * (1 - ROUNDING) <= figures.blocks[kinds.mode].kept_bytes / kinds.kept_inside <= 1 + ROUNDING, kinds.mode


def test_a_rank_between_two_modes_takes_a_mixture_of_both() -> None:
    """Of three modes none of which is worse than a mixture of the others, by what fits a rank for each block."""
    modes = {"none": Block(1.0, 2.0, 10.0), "selective": Block(1.1, 2.0, 4.0), "full": Block(2.0, 2.0, 0.0)}
    for room, seconds in ((12.0, 1.0), (9.0, 1.05), (6.0, 1.1), (4.0, 1.55), (2.0, 2.0)):
        lines = Figures(modes).lines(1.0, room, Figures(modes))
        assert max(line.block_s - line.relief_s for line in lines) == pytest.approx(seconds), room
        free, *held = 1.0, *Figures(modes).held([1], room, Figures(modes))
        assert max(free, *(at.block_s[1] - at.price * room for at in held)) == pytest.approx(seconds), room


@pytest.mark.parametrize("share", [0.05, 0.06, 0.1])
def test_no_plan_of_ranks_with_several_stages_is_faster_than_its_sharding_may_be(share: float) -> None:
    """The first stages of a rank hold more microbatches than the others, and it is their blocks that are computed again."""
    joint = joint_search(LLAMA, Cluster.preset("a100-sxm", 2), 32, ("schedule=interleaved",), memory_share=share)
    search = PointSearch(joint, Point(2, 2, 4, 16, 2))
    least_s, planned = search.fitting_s(), 0
    for asked in search.first():
        made = search.plan(joint.limit_bytes, asking=lambda asked=asked: [asked])
        if made is not None:
            (choices,) = search.tables.chosen([asked])
            planned += any(depth.heavy for depth in made.deep.depths)
            assert max(least_s, search.least_s(choices, joint.limit_bytes)) <= made.step_s * (1 + ROUNDING)
    assert planned
