"""The simulator against hand-made timelines, published bubbles and laws; nothing here computes a bubble by formula first."""

import itertools
import json
import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.core.schedule import Action, Edge, Kind, Schedule, chain
from autopar.core.timeline import Timeline
from autopar.cost_models.outline import Outline
from autopar.cost_models.pipeline import EdgeCost, PipelineCost, StageCost, received_bytes
from autopar.cost_models.stopwatch import Stopwatch
from autopar.cost_models.timeline import simulate
from autopar.errors import ScheduleError, UsageError
from autopar.schedules.check import check
from autopar.schedules.held import held_counts
from autopar.schedules.lower import add_updates, make_schedule

PUBLISHED = {
    (4, 4): 0.429, (4, 8): 0.273, (4, 16): 0.158, (4, 32): 0.086, (4, 64): 0.045, (4, 100): 0.029,
    (8, 16): 0.304, (16, 32): 0.319, (32, 64): 0.326, (8, 32): 0.179, (16, 64): 0.190,
}  # fmt: skip
"""(stages, microbatches) -> idle share of the total for GPipe, to three digits (Huang et al. 2019; lecture tables)."""


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("shape", PUBLISHED, ids=str)
def test_published_bubbles(name: str, shape: tuple[int, int]) -> None:
    schedule = make_schedule(name, *shape)
    cost = PipelineCost.uniform(shape[0])
    timeline = simulate(schedule, cost)
    assert f"{timeline.bubble_fraction:.3f}" == f"{PUBLISHED[shape]:.3f}"
    assert timeline.bubble_fraction == pytest.approx(Fraction(shape[0] - 1, shape[1] + shape[0] - 1), abs=1e-12)
    assert timeline.bubble_ratio == pytest.approx(Fraction(shape[0] - 1, shape[1]), abs=1e-12)


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 1), (3, 2), (4, 8), (6, 12)])
@pytest.mark.parametrize(("forward_s", "input_s", "weight_s"), [(1.0, 1.0, 1.0), (0.5, 0.75, 0.25)])
def test_idle_time_of_each_schedule(ranks: int, microbatches: int, forward_s: float, input_s: float, weight_s: float) -> None:
    """Step time minus computed time of a rank. Naive, GPipe, 1F1B; interleaved by v = 3; ZB-H1 with I not shorter than W."""
    whole = forward_s + input_s + weight_s

    def idle(name: str, virtual: int = 1) -> float:
        cost = PipelineCost.uniform(ranks * virtual, forward_s=forward_s / virtual, input_gradient_s=input_s / virtual, weight_gradient_s=weight_s / virtual)
        return simulate(make_schedule(name, ranks, microbatches, virtual), cost).step_time_s - microbatches * whole

    assert idle("naive") == pytest.approx((ranks - 1) * microbatches * whole)
    assert idle("gpipe") == pytest.approx((ranks - 1) * whole)
    assert idle("1f1b") == pytest.approx((ranks - 1) * whole)
    if microbatches % ranks == 0:
        assert idle("interleaved", 3) == pytest.approx((ranks - 1) * whole / 3)
    if microbatches >= ranks and forward_s == input_s == weight_s:
        assert idle("zero-bubble") == pytest.approx((ranks - 1) * (forward_s + input_s - weight_s))
    assert idle("zero-bubble") <= idle("1f1b") + 1e-12


@settings(max_examples=150)
@given(st.data())
def test_a_stopwatch_shows_the_time_of_the_simulation(data: st.DataObject) -> None:
    name, ranks = data.draw(st.sampled_from(["naive", "gpipe", "1f1b", "interleaved", "zero-bubble"])), data.draw(st.integers(1, 4))
    virtual = data.draw(st.integers(1, 3)) if name in ("gpipe", "interleaved") else 1
    number = ranks * data.draw(st.integers(1, 3)) if virtual > 1 else data.draw(st.integers(1, 7))
    stages = ranks * virtual
    tied = ((0, stages - 1),) if stages > 1 and data.draw(st.booleans()) else ()
    schedule = add_updates(make_schedule(name, ranks, number, virtual, tied=tied), replicas=2, zero_stage=data.draw(st.integers(0, 3)))
    seconds = st.floats(0.0, 4.0)
    costs = tuple(
        StageCost(forward_s=data.draw(seconds), input_gradient_s=data.draw(seconds), weight_gradient_s=data.draw(seconds), gather_s=data.draw(seconds), reduce_s=data.draw(seconds), step_s=data.draw(seconds))
        for _ in range(stages)
    )  # fmt: skip
    edges = tuple(EdgeCost(activation_s=data.draw(seconds), gradient_s=data.draw(seconds)) for _ in range(stages - 1))
    cost = PipelineCost(costs, edges, (data.draw(seconds),) if tied else ())
    exact = simulate(schedule, cost).step_time_s
    assert Stopwatch(schedule).step_s(cost) == exact
    enough = exact * data.draw(st.sampled_from([0.2, 0.9, 1 - 1e-7, 1.0, 1 + 1e-7, 1.1]))
    assert Stopwatch(schedule).step_s(cost, enough) in ([exact, math.inf] if enough <= exact else [exact])


@pytest.mark.parametrize(("name", "virtual"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2)])
def test_a_stopwatch_stops_where_a_step_is_clearly_too_slow(name: str, virtual: int) -> None:
    """Full ranks, so that what is left to be done tells it: nothing is late but for the bubble."""
    schedule, cost = make_schedule(name, 4, 32, virtual), PipelineCost.uniform(4 * virtual)
    exact = simulate(schedule, cost).step_time_s
    assert Stopwatch(schedule).step_s(cost, 0.95 * exact) == math.inf


@pytest.mark.parametrize(("name", "virtual"), [("naive", 1), ("gpipe", 1), ("gpipe", 2), ("1f1b", 1), ("zero-bubble", 1), ("interleaved", 2), ("interleaved", 3)])
def test_most_held_counts_are_what_the_simulation_holds(name: str, virtual: int) -> None:
    """Also of more rounds than are looked at."""
    for ranks, rounds in itertools.product((1, 2, 3, 5), (1, 2, 5)):
        timeline = simulate(make_schedule(name, ranks, ranks * rounds, virtual), PipelineCost.uniform(ranks * virtual))
        most = [max(map(sum, of_rank)) for of_rank in held_counts(name, ranks, ranks * rounds, virtual)]
        assert most == [timeline.peak_in_flight(rank) for rank in range(ranks)], (ranks, rounds)


def test_microbatches_in_flight() -> None:
    def peaks(name: str, ranks: int, microbatches: int) -> list[int]:
        timeline = simulate(make_schedule(name, ranks, microbatches), PipelineCost.uniform(ranks))
        return [timeline.peak_in_flight(rank) for rank in range(ranks)]

    for ranks, microbatches in itertools.product(range(1, 7), range(1, 11)):
        assert peaks("naive", ranks, microbatches) == [1] * ranks
        assert peaks("gpipe", ranks, microbatches) == [microbatches] * ranks
        assert peaks("1f1b", ranks, microbatches) == [min(ranks - i, microbatches) for i in range(ranks)]
        assert max(peaks("zero-bubble", ranks, microbatches)) <= min(ranks, microbatches)


def test_interleaved_holds_no_more_than_megatrons_bound() -> None:
    """Warm-up of rank 0 plus one: 2 (n-1) + (v-1) n + 1 chunks, each 1/v of a rank's layers."""
    for ranks, virtual in itertools.product(range(2, 6), range(2, 4)):
        schedule = make_schedule("interleaved", ranks, 3 * ranks, virtual)
        assert simulate(schedule, PipelineCost.uniform(ranks * virtual)).peak_in_flight(0) == 2 * (ranks - 1) + (virtual - 1) * ranks + 1


def spans(timeline: Timeline, lane: str) -> list[tuple[str, float, float]]:
    return [(str(s.action), s.start_s, s.end_s) for s in timeline.spans if s.lane == lane]


TWO = PipelineCost(
    (
        StageCost(forward_s=2, input_gradient_s=2, weight_gradient_s=1, activation_bytes=100, weight_activation_bytes=40, state_bytes=1000, step_s=1, reduce_s=4),
        StageCost(forward_s=1, input_gradient_s=1, weight_gradient_s=1, activation_bytes=10, weight_activation_bytes=4, state_bytes=2000, step_s=1, reduce_s=1),
    ),
    (EdgeCost(activation_s=0.5, gradient_s=0.25, activation_bytes=8, gradient_bytes=6),),
)


def test_two_ranks_by_hand() -> None:
    schedule = add_updates(make_schedule("1f1b", 2, 2), replicas=2)
    check(schedule)
    timeline = simulate(schedule, TWO)
    assert spans(timeline, "compute") == [
        ("0F0", 0, 2), ("0F1", 2, 4), ("1F0", 2.5, 3.5), ("1B0", 3.5, 5.5), ("1F1", 5.5, 6.5), ("0B0", 5.75, 8.75), ("1B1", 6.5, 8.5), ("0B1", 8.75, 11.75), ("1STEP", 9.5, 10.5), ("0STEP", 15.75, 16.75),
    ]  # fmt: skip
    assert spans(timeline, "send") == [("0SEND_F0>1", 2, 2.5), ("0SEND_F1>1", 4, 4.5), ("1SEND_B0>0", 5.5, 5.75), ("1SEND_B1>0", 8.5, 8.75)]
    assert spans(timeline, "collective") == [("1REDUCE", 8.5, 9.5), ("0REDUCE", 11.75, 15.75)]
    assert timeline.step_time_s == 16.75
    assert (timeline.busy_s(0), timeline.busy_s(1), timeline.busy_s(0, "collective")) == (11, 7, 4)
    assert timeline.bubble_fraction == pytest.approx(1 - 18 / 33.5)
    assert timeline.bubble_ratio == pytest.approx(33.5 / 18 - 1)


def test_two_ranks_by_hand_without_overlap() -> None:
    timeline = simulate(make_schedule("1f1b", 2, 2), TWO, "blocking")
    assert spans(timeline, "compute") == [("0F0", 0, 2), ("1F0", 2.5, 3.5), ("0F1", 2.5, 4.5), ("1B0", 5, 7), ("1F1", 7.25, 8.25), ("0B0", 7.25, 10.25), ("1B1", 8.25, 10.25), ("0B1", 10.5, 13.5)]
    assert spans(timeline, "send") == [("0SEND_F0>1", 2, 2.5), ("0SEND_F1>1", 4.5, 5), ("1SEND_B0>0", 7, 7.25), ("1SEND_B1>0", 10.25, 10.5)]


def test_held_bytes_by_hand() -> None:
    """Rank 0: state, activations of F0 and F1, a message out; then gradients in. With B split a part stays until W."""
    timeline = simulate(make_schedule("1f1b", 2, 2), TWO)
    held = [(level.time_s, level.held_bytes) for level in timeline.levels if level.rank == 0]
    assert held == [(0, 1100), (2, 1208), (2.5, 1200), (4, 1208), (4.5, 1200), (5.5, 1206), (8.5, 1212), (8.75, 1106), (11.75, 1000)]
    split = simulate(make_schedule("zero-bubble", 1, 1), PipelineCost((TWO.stages[0],)))
    assert [(level.time_s, level.held_bytes, level.in_flight) for level in split.levels] == [(0, 1100, 1), (4, 1040, 1), (5, 1000, 0)]


GATHERING = PipelineCost(
    tuple(StageCost(forward_s=2, input_gradient_s=1, weight_gradient_s=1, gather_s=3, arriving_bytes=10 * (s + 1), activation_bytes=s + 1) for s in range(4))
)


def test_parameters_of_later_stages_are_gathered_behind_the_computations_of_the_first() -> None:
    """Rank 0 waits for those of stage 0, rank 1 for a message beside them; those of stages 2 and 3 come meanwhile, and what they come in is there until then."""
    schedule = add_updates(make_schedule("interleaved", 2, 2, 2), replicas=2, zero_stage=1, step=False)
    check(schedule)
    timeline = simulate(schedule, GATHERING)
    assert spans(timeline, "collective")[:4] == [("0GATHER", 0, 3), ("1GATHER", 0, 3), ("2GATHER", 3, 6), ("3GATHER", 3, 6)]
    assert spans(timeline, "compute")[:6] == [("0F0", 3, 5), ("0F1", 5, 7), ("1F0", 5, 7), ("2F0", 7, 9), ("1F1", 7, 9), ("2F1", 9, 11)]
    held = {rank: [(level.time_s, level.held_bytes) for level in timeline.levels if level.rank == rank] for rank in range(2)}
    assert held[0][:4] == [(0, 40), (3, 30 + 1), (5, 30 + 2), (7, 2 + 3)]
    assert held[1][:3] == [(0, 60), (5, 40 + 2), (7, 40 + 4)]


def test_gathers_of_processes_that_share_cores_hide_behind_nothing() -> None:
    """Two ranks on one core: all work is done one after the other, gathers too."""
    schedule = add_updates(make_schedule("interleaved", 2, 2, 2), replicas=2, zero_stage=1, step=False)
    timeline = simulate(schedule, GATHERING, at_once=1.0)
    assert timeline.step_time_s == pytest.approx(4 * 3 + 4 * 2 * (2 + 2))
    assert spans(timeline, "collective")[:4] == [("0GATHER", 0, 6), ("1GATHER", 0, 6), ("2GATHER", 6, 12), ("3GATHER", 6, 12)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Schedule, PipelineCost]:
    name = draw(st.sampled_from(["naive", "gpipe", "1f1b", "zero-bubble", "interleaved", "forward"]))
    ranks = draw(st.integers(1, 4))
    virtual = 2 if name == "interleaved" else 1
    microbatches = ranks * draw(st.integers(1, 2)) if virtual == 2 else draw(st.integers(1, 6))
    stages = ranks * virtual
    edges = (*chain(stages), *([Edge(0, stages - 1)] if stages > 2 and draw(st.booleans()) else []))
    tied = sorted(draw(st.sets(st.integers(0, stages - 1), min_size=2))) if stages > 1 else []
    schedule = make_schedule(name, ranks, microbatches, virtual, edges=edges, tied=[tied] if tied else [])
    if schedule.training:
        schedule = add_updates(schedule, replicas=2, zero_stage=draw(st.integers(0, 3)))
    seconds = st.integers(0, 8).map(lambda n: n / 4)
    size = st.integers(0, 100)

    def stage() -> StageCost:
        whole = draw(size)
        return StageCost(
            forward_s=draw(seconds), input_gradient_s=draw(seconds), weight_gradient_s=draw(seconds), activation_bytes=whole, weight_activation_bytes=draw(st.integers(0, whole)),
            state_bytes=draw(size), arriving_bytes=draw(size), gathered_bytes=draw(size), gather_s=draw(seconds), reduce_s=draw(seconds), step_s=draw(seconds),
        )  # fmt: skip

    def edge() -> EdgeCost:
        return EdgeCost(activation_s=draw(seconds), gradient_s=draw(seconds), activation_bytes=draw(size), gradient_bytes=draw(size))

    cost = PipelineCost(tuple(stage() for _ in range(stages)), tuple(edge() for _ in edges), tuple(draw(seconds) for _ in schedule.tied))
    return schedule, cost


def in_flight(timeline: Timeline, stage: int) -> int:
    """What ends at a moment is gone before what begins then."""
    here = [span for span in timeline.spans if span.action.stage == stage]
    begun = [(span.start_s, 1) for span in here if span.action.kind is Kind.F]
    return max(itertools.accumulate(change for _, change in sorted([*begun, *((span.end_s, -1) for span in here if span.action.kind in (Kind.B, Kind.W))])))


@settings(max_examples=400, deadline=None)
@given(cases(), st.sampled_from([1.0, 0.1, math.pi]))
def test_an_outline_says_what_the_timeline_does_to_the_last_bit(case: tuple[Schedule, PipelineCost], scale: float) -> None:
    """Seconds that are quarters meet at the same moments; scaled, most are rounded."""
    schedule, cost = case
    seconds = ("forward_s", "input_gradient_s", "weight_gradient_s", "gather_s", "reduce_s", "step_s")
    scaled = tuple(replace(stage, **{name: scale * getattr(stage, name) for name in seconds}) for stage in cost.stages)
    cost = replace(cost, stages=scaled)
    timeline, ranks, stages = simulate(schedule, cost), range(schedule.num_ranks), range(schedule.num_stages)
    found = Stopwatch(schedule).outline(cost)
    assert found == Outline.of(timeline, schedule.num_stages)
    assert (found.step_time_s, found.num_ranks, found.bubble_fraction) == (timeline.step_time_s, timeline.num_ranks, timeline.bubble_fraction)
    assert [found.busy_s(rank) for rank in ranks] == [timeline.busy_s(rank) for rank in ranks]
    assert [found.peak_bytes(rank) for rank in ranks] == [timeline.peak_bytes(rank) for rank in ranks]
    assert list(found.in_flight) == [in_flight(timeline, stage) for stage in stages]


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from(["buffered", "blocking"]))
def test_laws_of_every_timeline(case: tuple[Schedule, PipelineCost], semantics: str) -> None:
    schedule, cost = case
    timeline = simulate(schedule, cost, semantics)
    for rank in range(schedule.num_ranks):
        for lane in ("compute", "send", "receive", "collective"):
            own = [s for s in timeline.spans if s.rank == rank and s.lane == lane]
            assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(own)), "a lane does two things at once"
        computed = [s.action for s in timeline.spans if s.rank == rank and s.lane == "compute"]
        listed = [a for a in schedule.ranks[rank] if a.kind in (Kind.F, Kind.B, Kind.I, Kind.W, Kind.STEP)]
        assert sorted(computed, key=str) == sorted(listed, key=str)
        last = [level for level in timeline.levels if level.rank == rank][-1]
        assert (last.held_bytes, last.in_flight) == (sum(cost.stages[s].state_bytes for s in schedule.stages_of(rank)), 0), "something is never released"
        assert all(level.held_bytes >= last.held_bytes and level.in_flight >= 0 for level in timeline.levels if level.rank == rank)
    ends = {s.action: s.end_s for s in timeline.spans}
    starts = {s.action: s.start_s for s in timeline.spans if s.lane == "compute"}
    for action, start in starts.items():
        for edge in schedule.edges:
            if action.kind is Kind.F and edge.target == action.stage:
                assert ends[Action(Kind.F, edge.source, action.microbatch)] <= start
                assert ends.get(Action(Kind.RECV_F, action.stage, action.microbatch, edge.source), 0) <= start
            if action.kind in (Kind.B, Kind.I) and edge.source == action.stage:
                assert ends[Action(action.kind, edge.target, action.microbatch)] <= start
                assert ends.get(Action(Kind.RECV_B, action.stage, action.microbatch, edge.target), 0) <= start
    busiest = max(timeline.busy_s(rank) for rank in range(schedule.num_ranks))
    assert busiest <= timeline.step_time_s


@settings(max_examples=50, deadline=None)
@given(cases())
def test_overlap_never_costs_time_where_lanes_do_not_conflict(case: tuple[Schedule, PipelineCost]) -> None:
    """With one message at a time per pair of ranks (a chain without skips), running ahead can only help."""
    schedule, cost = case
    if len(schedule.edges) != schedule.num_stages - 1 or schedule.num_stages != schedule.num_ranks:
        return
    assert simulate(schedule, cost, "buffered").step_time_s <= simulate(schedule, cost, "blocking").step_time_s + 1e-9


def test_messages_are_counted_at_the_receiver() -> None:
    """b x s x h x dtype per boundary and microbatch each way, and twice that with two virtual stages per rank."""
    size = 4 * 128 * 64 * 2
    edge = EdgeCost(activation_bytes=size, gradient_bytes=size)

    def received(name: str, virtual: int) -> tuple[int, ...]:
        stages = 4 * virtual
        return received_bytes(make_schedule(name, 4, 8, virtual), PipelineCost(PipelineCost.uniform(stages).stages, (edge,) * (stages - 1)))

    assert received("1f1b", 1) == (8 * size, 16 * size, 16 * size, 8 * size)
    assert received("interleaved", 2) == (24 * size, 32 * size, 32 * size, 24 * size)
    assert received("forward", 1) == (0, 8 * size, 8 * size, 8 * size)


def test_trace_file(tmp_path) -> None:
    timeline = simulate(add_updates(make_schedule("zero-bubble", 2, 2), replicas=2, zero_stage=3), TWO)
    timeline.save_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    boxes = [e for e in events if e["ph"] == "X"]
    assert len(boxes) == len(timeline.spans)
    assert max(e["ts"] + e["dur"] for e in boxes) == pytest.approx(timeline.step_time_s * 1e6)
    assert {e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"} == {"rank 0", "rank 1"}
    arrows = {ph: sorted(e["id"] for e in events if e["ph"] == ph) for ph in "sf"}
    assert arrows["s"] == arrows["f"] == ["0SEND_F0>1", "0SEND_F1>1", "1SEND_B0>0", "1SEND_B1>0"]


def test_what_does_not_fit_is_refused() -> None:
    schedule = make_schedule("1f1b", 2, 2)
    with pytest.raises(UsageError, match="costs of 3 stages for schedule 1f1b with 2"):
        simulate(schedule, PipelineCost.uniform(3))
    stuck = Schedule(schedule.name, 2, (0, 1), schedule.edges, (schedule.ranks[0], schedule.ranks[1][:-1]))
    with pytest.raises(ScheduleError, match="waits for ever"):
        simulate(stuck, PipelineCost.uniform(2))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), at_once=st.floats(1.0, 4.0))
def test_ranks_that_share_cores_end_no_sooner_than_their_work_and_their_lists_allow(data: st.DataObject, at_once: float) -> None:
    name, ranks, virtual = data.draw(st.sampled_from([("gpipe", 4, 1), ("1f1b", 3, 1), ("zero-bubble", 4, 1), ("interleaved", 2, 2)]))
    seconds = st.floats(0.01, 10.0)
    cost = PipelineCost(
        tuple(
            StageCost(forward_s=data.draw(seconds), input_gradient_s=data.draw(seconds), weight_gradient_s=data.draw(seconds), gather_s=data.draw(seconds))
            for _ in range(ranks * virtual)
        )
    )
    schedule = add_updates(make_schedule(name, ranks, 4, virtual), replicas=2, zero_stage=data.draw(st.integers(0, 1)))
    own, shared = simulate(schedule, cost), simulate(schedule, cost, at_once=at_once)
    work = sum(own.busy_s(rank) + own.busy_s(rank, "collective") for rank in range(ranks))
    assert shared.step_time_s >= max(own.step_time_s, work / min(at_once, ranks)) * (1 - 1e-9)
    assert shared.step_time_s <= (own.step_time_s + work / min(at_once, ranks)) * (1 + 1e-9)
    assert [len([s for s in shared.spans if s.rank == r]) for r in range(ranks)] == [len([s for s in own.spans if s.rank == r]) for r in range(ranks)]
    alone = simulate(schedule, cost, at_once=1.0)
    assert alone.step_time_s == pytest.approx(work), "one core is never idle: somebody can always go on"
    assert simulate(schedule, cost, at_once=ranks) == own


def test_two_ranks_on_a_core_and_a_half() -> None:
    """By hand, GPipe of two stages and two microbatches, one second each and half of it for both halves of the backward: the ranks meet twice,
    two seconds of work at 3/4 of the speed take 4/3 s."""
    cost = PipelineCost.uniform(2, input_gradient_s=0.5, weight_gradient_s=0.5)
    timeline = simulate(make_schedule("gpipe", 2, 2), cost, at_once=1.5)
    assert timeline.step_time_s == pytest.approx(1 + 4 / 3 + 1 + 1 + 4 / 3 + 1)
