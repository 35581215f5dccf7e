"""Bounds of pipelines whose ranks have several stages: against simulated steps of the same lists, and against how blocks are cut."""

from dataclasses import replace
from itertools import product
from random import Random
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest

from autopar.core.schedule import Edge, Kind
from autopar.cost_models.pipeline import EdgeCost, PipelineCost, StageCost
from autopar.cost_models.timeline import simulate
from autopar.joint.bounds import Parts
from autopar.joint.chains import BACK, DEARER, MESSAGE, chains_by_rank, longest_chain
from autopar.joint.deep import even_depths
from autopar.joint.even import Held, even_cuts
from autopar.joint.within import Within, corners
from autopar.planner.blocks import Order
from autopar.schedules.lower import make_schedule
from autopar.schedules.orders import make_order

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
    # no tighter: the lists are walked for other costs of forwards and backwards
    assert free < 0.8 * step < bound <= step * (1 + 1e-9)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_chains_are_chains_of_the_lists_and_the_longest_is_the_step(order: Order) -> None:
    """With what a backward and a message take where they are looked for; but one message goes at a time."""
    random = Random(5)
    for _ in range(3):
        blocks = [random.randint(1, 3) for _ in range(order.num_stages)]
        for dearer in (None, 0, order.num_ranks - 1):
            backs = [BACK * (DEARER if s % order.num_ranks == dearer else 1.0) for s in range(order.num_stages)]
            chain = longest_chain(order, blocks, dearer)
            taken = sum(n * (f + b * back) for n, f, b, back in zip(blocks, chain.forwards, chain.backwards, backs, strict=True)) + MESSAGE * chain.messages
            step = simulated_s(order, blocks, [1.0] * order.num_stages, backs, 0.0, 0.0, MESSAGE)
            assert 0.998 * step < taken <= step * (1 + 1e-9)


@pytest.mark.parametrize("order", [*ORDERS, Order("interleaved", 4, 32, 2), Order("interleaved", 5, 5, 3), Order("interleaved", 8, 8, 1), Order("1f1b", 6, 13)], ids=str)
def test_no_path_through_the_lists_is_longer_than_a_chain(order: Order) -> None:
    random = Random(9)
    for blocks in ([2.0] * order.num_stages, [float(random.randint(1, 4)) for _ in range(order.num_stages)]):
        for dearer, chain in zip((None, *range(order.num_ranks)), (longest_chain(order, blocks), *chains_by_rank(order, blocks)), strict=True):
            backs = [BACK * (DEARER if s % order.num_ranks == dearer else 1.0) for s in range(order.num_stages)]
            graph = nx.DiGraph()
            for actions in make_order(order.schedule, order.num_ranks, order.num_microbatches, order.virtual).ranks:
                for before, action in zip(("begin", *actions), actions):
                    taken = blocks[action.stage] * (1.0 if action.kind is Kind.F else backs[action.stage])
                    graph.add_edge(before, action, weight=taken)
                    source = replace(action, stage=action.stage + (-1 if action.kind is Kind.F else 1))
                    if 0 <= source.stage < order.num_stages:
                        graph.add_edge(source, action, weight=taken + MESSAGE)
            taken = sum(n * (f + b * back) for n, f, b, back in zip(blocks, chain.forwards, chain.backwards, backs, strict=True)) + MESSAGE * chain.messages
            assert taken == pytest.approx(nx.dag_longest_path_length(graph), rel=1e-12)


def test_corners_lie_on_all_lines_that_matter() -> None:
    """Of modes that take 1, 2 and 4 seconds and hold 10, 4 and 1 bytes, by what they cost at some prices."""
    modes = ((1.0, 10.0), (2.0, 4.0), (4.0, 1.0))
    lines = [(price, min(seconds + price * held for seconds, held in modes)) for price in (0.0, 0.1, 1 / 6, 0.3, 2 / 3, 50.0)]
    found = corners(lines, 1.0)
    for seconds, held in modes:
        assert any(found_s == pytest.approx(seconds - 1.0) and at == pytest.approx(held) for found_s, at in found)
    for price, least in lines:
        assert min(1.0 + seconds + price * held for seconds, held in found) == pytest.approx(least)


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_of_blocks_that_fits_is_below_what_shares_and_prices_say(seed: int) -> None:
    """Two ranks of two stages with a block each in one of three modes, and three chains; the best of all choices is not far above."""
    random = np.random.default_rng(seed)
    chains_s, weights = random.uniform(5, 6, (1, 3)), random.uniform(0, 1, (3, 2, 2))
    fronts = np.stack([np.sort(random.uniform(0, 2, (2, 2, 3))), -np.sort(-random.uniform(0, 4, (2, 2, 3)))], axis=-1)
    fronts[..., 0, 0] = 0.0
    fronts = np.array([[_lower_hull(front) for front in of_rank] for of_rank in fronts])
    room = fronts[..., -1, 1].sum(axis=1) + random.uniform(0.2, 2.0, 2)
    bound, of_all = Within(chains_s, np.ones((1, 2, 2)), weights, fronts, room).highest(0)
    best = np.inf
    for choice in product(range(3), repeat=4):
        taken = np.take_along_axis(fronts, np.array(choice).reshape(2, 2, 1, 1), axis=2)[:, :, 0]
        if (taken[..., 1].sum(axis=1) <= room).all():
            best = min(best, (chains_s[0] + np.tensordot(weights, taken[..., 0], axes=2)).max())
    assert chains_s.max() - 1e-9 <= bound <= best + 1e-9
    assert of_all[0] == pytest.approx(bound)


def _lower_hull(front: np.ndarray) -> np.ndarray:
    """The middle corner moved to below the line between the others."""
    (_, most), (seconds, held), (last_s, least) = front
    return np.array([(0.0, most), (seconds, min(held, most + (least - most) * seconds / last_s)), (last_s, least)])
