"""Steps whose ranks exchange parameters before and after their passes, simulated in many cuts: none is faster than its bound, with memory that binds or without."""

from itertools import product
from random import Random

import pytest

from autopar.core.cluster import Cluster
from autopar.core.schedule import Edge
from autopar.cost_models.pipeline import EdgeCost, StageCost
from autopar.joint.bounds import Parts, least_step_s
from autopar.joint.even import even_cuts
from autopar.joint.figures import Block, Figures
from autopar.planner.blocks import Order, step_seconds

A100 = Cluster.preset("a100-sxm")
ORDERS = [
    *(Order("1f1b", ranks, number) for ranks, number in ((1, 3), (2, 4), (3, 4), (3, 7), (4, 9))),
    *(Order("interleaved", ranks, number, virtual) for ranks, number, virtual in ((2, 4, 2), (2, 2, 4), (4, 8, 2))),
]
DEPTH = {1: 3, 2: 9, 3: 10, 4: 9, 8: 17}


class Drawn:
    """Blocks that keep what they make, or compute it again behind their backwards; a rank has room for some that keep it."""

    def __init__(self, seed: int, order: Order) -> None:
        random, self.order = Random(seed), order
        self.forward, self.backward, self.again = random.uniform(0.1, 1), random.uniform(0.2, 2), random.uniform(0.05, 0.5)
        self.gather, self.reduce = random.choice([0.0, 0.3, 2.0]), random.choice([0.0, 0.5, 3.0])
        self.message = random.choice([0.0, 0.1, 1.0])
        self.first, self.last, self.state = random.choice([0.0, 0.3]), random.choice([0.0, 0.8]), random.choice([0.0, 1.0])
        self.room = random.uniform(0.4, 1.1) * DEPTH[order.num_stages] / order.num_ranks * (self.state + max(order.in_flight))

    def step_s(self, cut: list[int]) -> float | None:
        """Each rank computes as much again as it must, in the stages that hold most; parts of blocks too."""
        order, ranks, costs = self.order, self.order.num_ranks, {}
        for rank, flights in enumerate(order.in_flight_by_stage):
            stages = range(rank, order.num_stages, ranks)
            left = sum((self.state + flight) * cut[s] for s, flight in zip(stages, flights)) - self.room
            for s, flight in sorted(zip(stages, flights), key=lambda pair: -pair[1]):
                heavy = min(float(cut[s]), max(0.0, left / flight))
                left -= heavy * flight
                beside = self.first * (s == 0) + self.last * (s == order.num_stages - 1)
                costs[s] = StageCost(
                    forward_s=cut[s] * self.forward + beside, input_gradient_s=cut[s] * self.backward + heavy * self.again, weight_gradient_s=0.0,
                    gather_s=cut[s] * self.gather, reduce_s=cut[s] * self.reduce,
                )  # fmt: skip
            if left > 1e-9:
                return None
        edges, message = tuple(Edge(s, s + 1) for s in range(order.num_stages - 1)), EdgeCost(activation_s=self.message, gradient_s=self.message)
        return step_seconds(order, A100, tuple(costs[s] for s in range(order.num_stages)), edges, (message,) * len(edges), (), ())

    def bound_s(self) -> float:
        """As the search bounds one sharding, with margins of memory left out of what is counted."""
        order, number, depth = self.order, self.order.num_microbatches, DEPTH[self.order.num_stages]
        passes, once = number * (self.forward + self.backward), self.gather + self.reduce
        figures, whole = (
            Figures({"none": Block(seconds, self.state, 1.0), "full": Block(seconds + number * self.again, self.state, 0.0)}) for seconds in (passes, passes + once)
        )
        parts, one = Parts(passes, number * self.first, number * self.last), Parts(passes / number, self.first, self.last)
        room = self.room * 1.05  # what is counted has a margin
        if order.virtual > 1:
            held = figures.held({f for of_rank in order.in_flight_by_stage for f in of_rank}, room, whole)
            return even_cuts(order, depth).least_step_s(parts, self.message, held, [room] * order.num_ranks, whole_s=passes + once)
        if order.num_ranks == 1:
            figures, parts = whole, Parts(passes + once, parts.first, parts.last)
        return least_step_s(order, depth, [figures.lines(flight, room, whole) for flight in order.in_flight], parts, one, self.message)


def cuts_of(drawn: Drawn) -> list[list[int]]:
    """All, or the even ones of several stages a rank that such ends ask for."""
    depth, stages, block = DEPTH[drawn.order.num_stages], drawn.order.num_stages, drawn.forward + drawn.backward
    if drawn.order.virtual > 1:
        cuts = even_cuts(drawn.order, depth)
        asked = (cuts.first * block <= drawn.first) & (cuts.last * block <= drawn.last)
        return cuts.blocks[asked].astype(int).tolist()
    return [list(cut) for cut in product(range(1, depth + 1), repeat=stages) if sum(cut) == depth]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_no_cut_is_faster_than_the_bound(order: Order) -> None:
    ratios = []
    for seed in range(40):
        drawn = Drawn(seed, order)
        steps = [step for cut in cuts_of(drawn) if (step := drawn.step_s(cut)) is not None]
        bound = drawn.bound_s()
        assert bound <= min(steps, default=float("inf")) * (1 + 1e-5), seed
        ratios += [bound / min(steps)] if steps else []
    assert len(ratios) > 20 and sum(ratios) / len(ratios) > (0.95 if order.virtual == 1 else 0.85)  # and it is no trifle
