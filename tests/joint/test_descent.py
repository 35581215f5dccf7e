"""Plans within less and less memory: what shardings promise, and that plans fit, are as good as those of whole searches, and the same each time."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from autopar.core.cluster import Cluster
from autopar.errors import InfeasibleError
from autopar.joint.at_point import PointSearch
from autopar.joint.descent import Candidate, Explored
from autopar.joint.front import FIRST_POINTS, MORE_POINTS
from autopar.joint.known import Known
from autopar.joint.plan import planned_jointly
from autopar.joint.reach import Reach
from autopar.joint.search import JointSearch
from autopar.joint.space import points
from autopar.planner.plan import Planned
from tests.joint.models import GPT, LLAMA, graphs, joint_search

A100 = Cluster.preset("a100-sxm", nodes=2, devices_per_node=4)
DIMS = {"llama": (LLAMA, 0.3), "gpt": (GPT, 0.2)}


def drawn(seed: int, *, uneven: bool) -> Reach:
    random = np.random.default_rng(seed)
    ranks, lines, depth = int(random.integers(1, 4)), int(random.integers(1, 4)), int(random.integers(3, 7))
    prices = np.sort(random.uniform(0.1, 2.0, (ranks, lines)), axis=1)
    prices[:, 0] = 0.0
    block_s = 1.0 + prices * random.uniform(0.5, 1.5, (ranks, 1))
    numbers = np.arange(1, depth + 1) if uneven and ranks > 1 else np.array([depth / ranks])
    return Reach(block_s, prices, random.uniform(0, 1, ranks), random.uniform(0, 1, ranks), numbers, depth, float(random.uniform(0, 0.5)))


@pytest.mark.parametrize("seed", range(40))
def test_a_reach_is_that_of_the_best_numbers_of_blocks(seed: int) -> None:
    reach = drawn(seed, uneven=True)
    limits = np.linspace(-1.0, 12.0, 8)

    def rank_s(rank: int, blocks: float, limit: float) -> float:
        room = limit - reach.taken_bytes[rank]
        return max(blocks * s - p * room for s, p in zip(reach.block_s[rank], reach.prices[rank])) + reach.ends_s[rank]

    for limit in limits:
        ranks = range(len(reach.block_s))
        split = [n for n in product(reach.numbers, repeat=len(ranks)) if sum(n) == pytest.approx(reach.depth)]
        if len(reach.numbers) > 1:  # a rank that holds more than it has room for may do without blocks, which no plan does
            split = [n for n in product(range(reach.depth + 1), repeat=len(ranks)) if sum(n) == reach.depth]
            least = min(max(rank_s(r, n[r], limit) for r in ranks if n[r]) for n in split) * (1 + reach.once)
        else:
            each = [rank_s(r, reach.numbers[0], limit) for r in ranks]
            least = max(each) + reach.once * sum(each) / len(each)
        assert reach.step_s(limit) == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize(("seed", "uneven"), product(range(20), (True, False)))
def test_more_memory_takes_no_longer(seed: int, uneven: bool) -> None:  # noqa: FBT001
    reach = drawn(seed, uneven=uneven)
    found = [reach.step_s(limit) for limit in np.linspace(-2.0, 50.0, 30)]
    assert found == sorted(found, reverse=True)
    assert 0.5 < found[-1] / reach.free_s < 2 and reach.price(50.0) == 0.0


@pytest.mark.parametrize("name", DIMS)
def test_what_is_learned_of_a_plan_is_what_its_sharding_promises(name: str) -> None:
    dims, share = DIMS[name]
    search = joint_search(dims, A100, 16, memory_share=share)
    limit = search.limit_bytes
    explored = found(search, limit)
    looked_at = [c for c in explored.candidates.values() if c.looked_at == limit and c.ratio is not None]
    assert looked_at
    learned = 0
    for candidate in looked_at:
        made = explored.search.planned(explored.search.tables.sharding(candidate.choices), limit)
        if made is not None:
            promised_s = explored.promised_s(candidate, limit)
            assert 0.7 * made.step_s < promised_s <= made.step_s * (1 + 1e-9)  # of one that was no better only that is known
            learned += promised_s == pytest.approx(made.step_s, rel=1e-9)
    assert learned


@pytest.mark.parametrize("name", DIMS)
def test_what_was_found_of_a_sharding_is_taken_for_true_of_the_most_alike_ones(name: str) -> None:
    dims, share = DIMS[name]
    search = joint_search(dims, A100, 16, memory_share=share)
    explored = found(search, search.limit_bytes)
    explored.ask_nearer(search.limit_bytes / 3)  # others, when some are known
    planned = [c for c in explored.candidates.values() if c.unseen_bytes is not None]
    others = [c for c in explored.candidates.values() if c.unseen_bytes is None]
    assert planned and others and all(c.known is c for c in planned)
    for candidate in others:
        far = {id(c): np.abs(c.held_bytes - candidate.held_bytes).sum() for c in planned}
        assert far[id(candidate.known)] == min(far.values())


@pytest.mark.parametrize("name", DIMS)
def test_no_two_shardings_of_a_point_cost_all_the_same(name: str) -> None:
    dims, share = DIMS[name]
    search = joint_search(dims, A100, 16, memory_share=share)
    explored = found(search, search.limit_bytes)
    whole = explored.search.tables.side("whole")
    figures = [(whole.parts_of(choices), *whole.figures(choices).blocks.items()) for choices in explored.candidates]
    assert len(figures) > 2 and len(set(figures)) == len(figures)


def found(search: JointSearch, limit: float) -> Explored:
    """One point of which all that promise to be better than the best were planned."""
    point = next(p for p in points(search.cluster, search.batch, search.run.depth, search.pins) if (p.num_ranks, p.outer, p.inner, p.samples) == (2, 1, 4, 1))
    explored = Explored(PointSearch(search, point))
    explored.ask(limit)
    explored.ask_nearer(limit)
    best = float("inf")

    def key(candidate: Candidate) -> float:
        return explored.promised_s(candidate, limit)

    while (left := [c for c in explored.candidates.values() if c.looked_at > limit and key(c) < best]):
        made = explored.planned(min(left, key=key), limit, best)
        best = made.step_s if made is not None else best
    return explored


def descended(name: str, shares: Sequence[float]) -> Iterator[tuple[float, Planned]]:
    dims, _ = DIMS[name]
    known, most = Known(), FIRST_POINTS
    for share in shares:
        search = joint_search(dims, A100, 16, memory_share=share, known=known)
        search = replace(search, options=replace(search.options, budget_points=most, descends=True))
        yield share, planned_jointly(search, graphs(dims, dims.layers))
        most = MORE_POINTS


@pytest.mark.parametrize("name", DIMS)
def test_plans_of_a_descent_fit_and_are_nearly_as_good_as_those_of_whole_searches(name: str) -> None:
    dims, share = DIMS[name]
    for limit, planned in descended(name, [share, 0.85 * share, 0.7 * share]):
        plan = planned.plan
        whole = planned_jointly(joint_search(dims, A100, 16, memory_share=limit), graphs(dims, dims.layers)).plan
        assert plan.predicted.memory.high_bytes <= limit * A100.device.memory_bytes
        assert whole.proof.bound <= plan.predicted.step_time_s <= 1.05 * whole.predicted.step_time_s
        assert plan.proof.bound <= whole.predicted.step_time_s


def test_a_descent_is_the_same_each_time() -> None:
    shares = [0.3, 0.25, 0.2]
    assert [planned.plan.to_json() for _, planned in descended("llama", shares)] == [planned.plan.to_json() for _, planned in descended("llama", shares)]


def test_a_descent_that_begins_again_is_the_same() -> None:
    shares = [0.3, 0.2, 0.3, 0.2]
    first, leaner, again, leaner_again = (planned.plan.predicted for _, planned in descended("llama", shares))
    assert (again.step_time_s, leaner_again.step_time_s) == (first.step_time_s, leaner.step_time_s)
    assert again.memory.high_bytes > leaner_again.memory.high_bytes


def test_a_descent_keeps_to_what_is_pinned() -> None:
    known = Known()
    for pins, ranks in (((), (1, 2, 4)), (("pp=4",), (4,))):
        search = joint_search(LLAMA, A100, 16, pins, memory_share=0.3, known=known)
        planned = planned_jointly(replace(search, options=replace(search.options, budget_points=FIRST_POINTS, descends=True)), graphs(LLAMA, LLAMA.layers))
        assert (planned.plan.pipeline.num_ranks if planned.plan.pipeline is not None else 1) in ranks


def test_a_descent_ends_where_nothing_fits() -> None:
    walked = descended("llama", [0.3, 0.001])
    next(walked)
    with pytest.raises(InfeasibleError, match="points that were explored fits"):
        next(walked)
