"""Bounds of pipelines whose ranks have several stages: against simulated steps of the same lists, and against how blocks are cut."""

from itertools import product
from random import Random
from types import SimpleNamespace

import pytest

from autopar.core.schedule import Edge
from autopar.cost_models.pipeline import EdgeCost, PipelineCost, StageCost
from autopar.cost_models.timeline import simulate
from autopar.joint.bounds import Parts
from autopar.joint.deep import even_depths
from autopar.joint.even import Held, even_cuts
from autopar.planner.blocks import Order
from autopar.schedules.lower import make_schedule

ORDERS = [Order("interleaved", ranks, number, virtual) for ranks, virtual, number in ((2, 2, 2), (2, 2, 8), (3, 2, 6), (2, 4, 4), (4, 2, 4), (4, 4, 16))]


def simulated_s(order: Order, blocks: list[int], forward: list[float], backward: list[float], first: float, last: float, message: float) -> float:
    """`forward`, `backward`: of a block of each stage."""
    end = order.num_stages - 1
    beside = [first * (s == 0) + last * (s == end) for s in range(order.num_stages)]
    costs = tuple([StageCost(forward_s=n * f + more / 3, input_gradient_s=n * b + more * 2 / 3, weight_gradient_s=0.0) for n, f, b, more in zip(blocks, forward, backward, beside)])
    edges = tuple([Edge(s, s + 1) for s in range(end)])
    schedule = make_schedule(order.schedule, order.num_ranks, order.num_microbatches, order.virtual, edges=edges)
    cost = PipelineCost(costs, (EdgeCost(activation_s=message, gradient_s=message),) * end, ())
    return simulate(schedule, cost).step_time_s


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_no_even_cut_is_faster_than_its_bound(order: Order) -> None:
    random = Random(3)
    for depth in (order.num_stages, order.num_stages + 1, 3 * order.num_stages - 1):
        forward, backward, message = random.uniform(0.1, 1), random.uniform(0.1, 2), random.choice([0.0, 0.05, 0.5])
        first, last = random.choice([0.0, 0.3]), random.choice([0.0, 0.8, 2.5]) * (forward + backward)
        kinds = SimpleNamespace(seconds=[[forward + backward + more, 0, 0] for more in (first, 0.0, last)], cut=SimpleNamespace(run=SimpleNamespace(depth=depth)))
        blocks = [d.blocks for d in even_depths(kinds, order.num_stages)]
        step = simulated_s(order, blocks, [forward] * order.num_stages, [backward] * order.num_stages, first, last, message)
        parts = Parts(forward + backward, first, last).times(order.num_microbatches)
        bound = even_cuts(order, depth).least_step_s(parts, message)
        # no tighter: what a forward takes of a block is unknown to the bound, and the longest chains are those of other costs
        assert 0.75 * step < bound <= step * (1 + 1e-9), (depth, blocks)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_way_of_even_depths_is_looked_at(order: Order) -> None:
    for depth, first, last in product((order.num_stages, 2 * order.num_stages + 1, 23), (0.0, 0.7, 1.0, 3.2), (0.0, 0.4, 1.0, 2.0, 9.1)):
        if depth < order.num_stages:
            continue
        kinds = SimpleNamespace(seconds=[[1.0 + more, 0, 0] for more in (first, 0.0, last)], cut=SimpleNamespace(run=SimpleNamespace(depth=depth)))
        cuts = even_cuts(order, depth)
        found = cuts.blocks.tolist().index([float(d.blocks) for d in even_depths(kinds, order.num_stages)])
        assert cuts.first[found] <= first and cuts.last[found] <= last


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_what_memory_costs_a_rank_is_in_the_bound_and_no_more(order: Order) -> None:
    """Blocks of one second that hold a byte, or two for none; a rank has room for half of its bytes."""
    depth, number = 2 * order.num_stages, order.num_microbatches
    cuts = even_cuts(order, depth)
    room = min(sum(2 * flight for flight in by_stage) for by_stage in order.in_flight_by_stage) / 2
    held = [Held(price, {f: min(number * 1.0 + price * f, number * 2.0) for by_stage in order.in_flight_by_stage for f in by_stage}) for price in (0.25, 0.5, 1.0, 2.0)]
    parts = Parts(number * 1.0)
    bound, free = cuts.least_step_s(parts, 0.0, held, [room] * order.num_ranks), cuts.least_step_s(parts, 0.0)
    # as few blocks of the fullest stages of every rank compute again as fit
    backward = [0.7 * 1.0] * order.num_stages
    for rank, by_stage in enumerate(order.in_flight_by_stage):
        left = sum(2 * flight for flight in by_stage) - room
        for k in sorted(range(order.virtual), key=lambda k: -by_stage[k]):
            heavy = min(2.0, max(0.0, left / by_stage[k]))
            left -= heavy * by_stage[k]
            backward[rank + k * order.num_ranks] += heavy / 2
    step = simulated_s(order, [2] * order.num_stages, [0.3] * order.num_stages, backward, 0.0, 0.0, 0.0)
    assert free < bound <= step * (1 + 1e-9)
