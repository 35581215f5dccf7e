"""A search that others went before plans what it would plan alone: the same plan, byte by byte, and the same bound."""

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from autopar.core.cluster import Cluster
from autopar.errors import InfeasibleError
from autopar.joint.known import Known, binds, least_ratio
from autopar.joint.plan import planned_jointly
from autopar.joint.search import Joint, JointSearch
from autopar.models.load import load_model
from autopar.planner.plan import Planned
from autopar.request import Request
from tests.joint.brute_force import drawn
from tests.joint.models import LLAMA, graphs, joint_search

A100 = Cluster.preset("a100-sxm", nodes=2, devices_per_node=4)
SEEDS, CHANGES = 12, 6


def linked(cluster: Cluster, inner: float = 1.0, outer: float = 1.0, latency: float = 1.0) -> Cluster:
    """With so many times the bandwidth inside and between nodes, and the latency between them."""
    intra, inter = cluster.intra_node, cluster.inter_node
    intra = replace(intra, bandwidth_bytes_per_s=intra.bandwidth_bytes_per_s * inner)
    return replace(cluster, intra_node=intra, inter_node=replace(inter, bandwidth_bytes_per_s=inter.bandwidth_bytes_per_s * outer, latency_s=inter.latency_s * latency))


def plan_text(cluster: Cluster, batch: int, share: float, known: Known) -> str:
    search = joint_search(LLAMA, cluster, batch, memory_share=share, known=known)
    return planned_jointly(search, graphs(LLAMA, LLAMA.layers)).plan.to_json()


def test_plans_of_changed_questions_are_those_of_new_ones() -> None:
    known = Known()
    asked = [
        (A100, 16, 0.9), (A100, 16, 0.3), (linked(A100, 2.0), 16, 0.9), (linked(A100, 1.0, 0.25), 16, 0.3), (linked(A100, 1.0, 3.0, 0.5), 32, 0.9),
        (replace(A100, num_nodes=1), 16, 0.9), (A100, 16, 0.3),
    ]  # fmt: skip
    for cluster, batch, share in asked:
        assert plan_text(cluster, batch, share, known) == plan_text(cluster, batch, share, Known()), (cluster, batch, share)


def test_a_question_asked_before_has_its_answer_again_where_it_was_searched_to_the_end() -> None:
    known = Known()

    def planned(share: float = 0.9, **limit: float) -> Planned:
        search = joint_search(LLAMA, A100, 16, ("zero=1",), share, known=known)
        return planned_jointly(replace(search, options=replace(search.options, **limit)), graphs(LLAMA, LLAMA.layers))

    first = planned()
    assert planned() is first and planned(0.5) is not first and planned(time_limit_s=60.0) is not first
    for share in (0.8, 0.7, 0.6):
        planned(share)
    assert planned() is not first and planned().plan == first.plan
    cut = planned(time_limit_s=0.0)
    assert cut.plan.proof.status.startswith("budget") and planned(time_limit_s=0.0) is not cut


def test_bounds_within_more_memory_hold_within_less() -> None:
    known = Known()
    for limit, least in ((9.0, 1.0), (7.0, 2.0), (8.0, 1.5), (7.0, 1.9)):
        known.add_bound("a point", limit, least)
    assert [known.bound("a point", limit) for limit in (9.5, 9.0, 7.5, 7.0, 1.0)] == pytest.approx([0.0, 1.0, 1.5, 2.0, 2.0], rel=1e-3)
    assert known.bound("another", 1.0) == 0.0


def test_requests_for_another_batch_share_what_is_known() -> None:
    loaded = load_model("gpt2-tiny", batch=8, device="meta", overrides={"n_layer": 4})
    request, cluster = Request(loaded.module, loaded.kwargs), Cluster.preset("h100-sxm", 1, 4)
    first = request.planned(cluster, joint=True).plan
    for batch in (16, 4):
        again = Request(loaded.module, load_model("gpt2-tiny", batch=batch, device="meta", overrides={"n_layer": 4}).kwargs)
        other = request.with_batch(batch)
        assert other.batch_size == batch and other.planned(cluster, joint=True).plan.to_json() == again.planned(cluster, joint=True).plan.to_json()
        assert other.trace_s == 0.0
    held = [plan.predicted.memory.high_bytes for plan in request.front(cluster, joint=True)[:3]]
    assert held[0] == first.predicted.memory.high_bytes and all(b <= 0.97 * a for a, b in pairwise(held))


def outcome(search: JointSearch) -> tuple | str:
    try:
        found: Joint = search.search()
    except InfeasibleError as error:
        return str(error)
    return found.bound_s, found.looked[-1], [(f.point, f.step_s, f.deep.order, f.deep.depths, f.deep.light.mode, f.deep.heavy.mode, f.memory) for f in found.found]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_changes_of_small_problems(seed: int) -> None:
    random, known, instance = Random(seed), Known(), drawn(seed)
    held = instance.search().search().best.memory.high_bytes
    for _ in range(CHANGES):
        factors = [random.choice((1.0, 0.5, 0.9, 1.1, 2.0, 8.0)) for _ in range(3)]
        nodes = random.choice((instance.cluster.num_nodes, 1, 2))
        changed = replace(instance, cluster=replace(linked(instance.cluster, *factors), num_nodes=nodes), batch=random.choice((instance.batch, 8, 16)))
        memory = int(held * random.choice((0.5, 0.9, 1.0, 2.0)))
        for gap in (0.0, 0.01):
            alone, after = replace(changed.search(memory), gap=gap), replace(changed.search(memory), gap=gap, known=known)
            assert outcome(after) == outcome(alone), changed


def test_what_is_known_saves_work() -> None:
    known = Known()
    first, same = (joint_search(LLAMA, A100, 16, known=known).search() for _ in range(2))
    again = joint_search(LLAMA, linked(A100, 1.05), 16, known=known).search()
    alone = joint_search(LLAMA, linked(A100, 1.05), 16).search()
    assert same.looked[1] < 0.5 * first.looked[1] and again.looked[1] < alone.looked[1]
    assert same.bound_s == first.bound_s and again.bound_s == alone.bound_s


def test_no_bound_is_taken_over_from_another_device() -> None:
    assert least_ratio(A100, linked(A100, 2.0, 0.5)) == 0.5
    assert least_ratio(A100, linked(A100, 0.5, 0.5, 3.0)) == 1.0
    assert least_ratio(A100, replace(A100, device=replace(A100.device, memory_bytes_per_s=1e12))) == 0.0
    assert least_ratio(A100, replace(A100, devices_per_node=8)) == 0.0


def test_machines_with_more_bind_those_with_less() -> None:
    lean = replace(A100, device=replace(A100.device, memory_bytes=A100.device.memory_bytes // 2))
    for more, less in ((linked(A100, 1.0, 2.0), A100), (A100, lean), (linked(A100, 1.0, 2.0), lean), (A100, linked(A100, 1.0, 1.0, 3.0))):
        assert binds(more, less) and not binds(less, more)
    assert not binds(A100, A100)
