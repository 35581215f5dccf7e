"""Every schedule we make passes the checker and computes right gradients; every broken one is refused or proved harmless."""

import itertools
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.core.schedule import Action, Edge, Kind, Schedule, chain, parse_actions
from autopar.errors import ScheduleError, UsageError
from autopar.schedules.check import check
from autopar.schedules.lower import add_updates, lower, make_schedule
from autopar.schedules.orders import ORDERS, Order
from tests.schedules.arithmetic import WrongError, judge


def exists(name: str, ranks: int, microbatches: int, virtual: int) -> bool:
    if virtual == 1 or name in ("naive", "gpipe", "forward"):
        return True
    return name != "1f1b" and microbatches % ranks == 0


@st.composite
def schedules(draw: st.DrawFn, max_ranks: int = 6, max_microbatches: int = 10) -> Schedule:
    """Any schedule of any shape: skip connections, masks, tied weights, replicas, ZeRO stages."""
    name = draw(st.sampled_from(sorted(ORDERS)))
    ranks = draw(st.integers(1, max_ranks))
    virtual = draw(st.integers(1, 3))
    microbatches = draw(st.integers(1, max_microbatches).filter(lambda m: exists(name, ranks, m, virtual)) if exists(name, ranks, ranks, virtual) else st.none())
    if microbatches is None:
        virtual, microbatches = 1, draw(st.integers(1, max_microbatches))
    stages = ranks * virtual
    skips = draw(st.lists(st.tuples(st.integers(0, stages - 1), st.integers(0, stages - 1), st.booleans()), max_size=3, unique_by=lambda e: e[:2]))
    edges = (*chain(stages), *(Edge(a, b, gradient) for a, b, gradient in skips if a + 1 < b))
    tied = [(0, stages - 1)] if stages > 1 and draw(st.booleans()) else []
    schedule = make_schedule(name, ranks, microbatches, virtual, edges=edges, tied=tied)
    if schedule.training and draw(st.booleans()):
        schedule = add_updates(schedule, replicas=draw(st.integers(1, 2)), zero_stage=draw(st.integers(0, 3)), step=draw(st.booleans()))
    return schedule


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_every_shape_is_accepted(name: str) -> None:
    made = 0
    for ranks, microbatches, virtual in itertools.product(range(1, 7), range(1, 11), range(1, 4)):
        if exists(name, ranks, microbatches, virtual):
            schedule = make_schedule(name, ranks, microbatches, virtual)
            check(schedule, "blocking")
            check(schedule, "buffered")
            made += 1
        else:
            with pytest.raises(UsageError, match="virtual stages"):
                make_schedule(name, ranks, microbatches, virtual)
    assert made >= 60


@settings(max_examples=60, deadline=None)
@given(schedules(), st.booleans(), st.integers(0, 99))
def test_gradients_are_right_in_any_interleaving(schedule: Schedule, blocking: bool, seed: int) -> None:
    check(schedule)
    judge(schedule, blocking=blocking, seed=seed)


@settings(max_examples=20, deadline=None)
@given(schedules())
def test_text_is_read_back(schedule: Schedule) -> None:
    text = schedule.to_json()
    assert Schedule.from_json(text) == schedule
    assert Schedule.from_json(text).to_json() == text


def mutated(schedule: Schedule, random: Random) -> Schedule:
    """One thing is wrong: an action dropped, doubled, moved, swapped or changed."""
    lists = [list(actions) for actions in schedule.ranks]
    rank = random.choice([r for r, actions in enumerate(lists) if actions])
    actions = lists[rank]
    i, j = random.randrange(len(actions)), random.randrange(len(actions))
    match random.randrange(6):
        case 0:
            del actions[i]
        case 1:
            actions.insert(j, actions[i])
        case 2:
            actions[i], actions[j] = actions[j], actions[i]
        case 3:
            k = min(i + 1, len(actions) - 1)
            actions[i], actions[k] = actions[k], actions[i]
        case 4:
            random.choice(lists).insert(0, actions.pop(i))
        case _:
            old = actions[i]
            actions[i] = replace(old, stage=random.randrange(schedule.num_stages)) if old.microbatch is None else replace(old, microbatch=random.randrange(schedule.num_microbatches))
    return replace(schedule, ranks=tuple(map(tuple, lists)))


@settings(max_examples=400, deadline=None)
@given(schedules(max_ranks=4, max_microbatches=5), st.integers(0, 1 << 30), st.sampled_from(["blocking", "buffered"]))
def test_mutants_are_refused_or_harmless(schedule: Schedule, seed: int, semantics: str) -> None:
    mutant = mutated(schedule, Random(seed))
    try:
        check(mutant, semantics)
    except ScheduleError as error:
        assert mutant.ranks != schedule.ranks, f"the original was refused: {error}"
        assert str(error).startswith(f"schedule {schedule.name}, rank ")
    else:
        for interleaving in range(3):
            judge(mutant, blocking=semantics == "blocking", seed=interleaving)


def test_the_checker_refuses_no_harmless_swap() -> None:
    """Every swap of neighbours that still computes the right gradients is accepted: the checker is not just strict."""
    schedule = add_updates(make_schedule("zero-bubble", 3, 4, tied=[(0, 2)]), replicas=2)
    harmless = 0
    for rank, actions in enumerate(schedule.ranks):
        for i in range(len(actions) - 1):
            swapped = (*actions[:i], actions[i + 1], actions[i], *actions[i + 2 :])
            mutant = replace(schedule, ranks=(*schedule.ranks[:rank], swapped, *schedule.ranks[rank + 1 :]))
            try:
                judge(mutant, blocking=True)
            except WrongError:
                continue
            harmless += 1
            check(mutant, "blocking")
    assert harmless > 20


def lists(*ranks: str) -> tuple[tuple[Action, ...], ...]:
    return tuple(parse_actions(line) for line in ranks)


GOOD = "0F0 0SEND_F0>1 0F1 0SEND_F1>1 0RECV_B0<1 0B0 0RECV_B1<1 0B1", "1RECV_F0<0 1F0 1RECV_F1<0 1B0 1SEND_B0>0 1F1 1B1 1SEND_B1>0"
TWO = Schedule("own", 2, (0, 1), chain(2), lists(*GOOD))

FAULTS = [
    (0, "0B1", "", 0, "0B1", "is missing"),
    (0, "0B1", "0B1 0B1", 0, "0B1", "is there 2 times"),
    (0, "0SEND_F1>1 ", "", 0, "0SEND_F1>1", "is missing"),
    (0, "0F1 0SEND_F1>1", "0SEND_F1>1 0F1", 0, "0SEND_F1>1", "comes before the rank has the output of stage 0 for microbatch 1"),
    (0, "0RECV_B0<1 0B0", "0B0 0RECV_B0<1", 0, "0B0", "comes before the rank has the input gradient of stage 1 for microbatch 0"),
    (1, "1F0", "0F0", 1, "0F0", "stage 0 sits on rank 0"),
    (1, "1F0", "7F0", 1, "7F0", "there are 2 stages"),
    (1, "1F0", "1F2", 1, "1F2", "there are 2 microbatches"),
    (1, "1SEND_B0>0", "1SEND_F0>0", 1, "1SEND_F0>0", "no edge joins stages 1 and 0 this way"),
    (1, "1B0", "1I0", 1, "1W0", "is missing"),
    (1, "1B0", "1B0 1W0", 1, "1W0", "is part of 1B0"),
    (1, "1RECV_F0<0 1F0 1RECV_F1<0", "1RECV_F1<0 1RECV_F0<0 1F0", 1, "1RECV_F1<0", "receives where rank 0 sends 0SEND_F0>1"),
    (0, "0RECV_B0<1 0B0", "0RECV_B0<1 0B0 0STEP", 1, "1STEP", "is missing, other stages have one"),
    (0, "0F0", "0FREE 0F0", 0, "0FREE", "are not gathered"),
    (0, "0F0", "0GATHER 0F0", 0, "0GATHER", "never freed"),
    (0, "0F0", "0GATHER 0F0 0FREE", 0, "0F1", "other uses of it gather them"),
    (0, "0B1", "0B1 0REDUCE1", 0, "0REDUCE", "once, or once for every microbatch"),
    (0, "0B1", "0B1 0TIE0", 0, "0TIE0", "shares no weight"),
    (0, "0RECV_B1<1 0B1", "0RECV_B1<1 0REDUCE 0B1", 0, "0REDUCE", "comes before the rank has the weight gradient of stage 0 for microbatch 1"),
]


@pytest.mark.parametrize(("at", "old", "new", "rank", "action", "reason"), FAULTS)
def test_errors_name_rank_action_and_reason(at: int, old: str, new: str, rank: int, action: str, reason: str) -> None:
    check(TWO)
    text = [line.replace(old, new) if i == at else line for i, line in enumerate(GOOD)]
    assert text != list(GOOD)
    with pytest.raises(ScheduleError) as caught:
        check(replace(TWO, ranks=lists(*text)))
    assert (caught.value.rank, caught.value.action) == (rank, action)
    assert reason in caught.value.reason


def test_sends_that_cross_deadlock_only_when_they_wait() -> None:
    """The classic: both sides of a boundary send first. Buffered messages pass, a rendezvous does not."""
    crossing = replace(
        TWO,
        ranks=lists(
            "0F0 0SEND_F0>1 0F1 0SEND_F1>1 0RECV_B0<1 0B0 0RECV_B1<1 0B1",
            "1RECV_F0<0 1F0 1B0 1SEND_B0>0 1RECV_F1<0 1F1 1B1 1SEND_B1>0",
        ),
    )
    check(crossing, "buffered")
    judge(crossing, blocking=False)
    with pytest.raises(WrongError):
        judge(crossing, blocking=True)
    with pytest.raises(ScheduleError, match=r"deadlock with blocking messages: rank 0 at 0SEND_F1>1 waits for rank 1, rank 1 at 1SEND_B0>0 waits for rank 0"):
        check(crossing, "blocking")


def test_an_order_that_waits_for_itself_is_refused() -> None:
    order = Order("mine", 1, (0, 0), lists("1F0 0F0 1B0 0B0"))
    with pytest.raises(ScheduleError, match=r"rank 0, 1F0: waits for the output of stage 0 for microbatch 0"):
        lower(order)
    with pytest.raises(ScheduleError, match=r"the output of stage 0 for microbatch 0 is never computed"):
        lower(Order("mine", 1, (0, 1), lists("", "")))


def test_a_schedule_of_ones_own() -> None:
    """A V: the last stage on the first rank, so that nothing is sent between stages 1 and 2, which share rank 1."""
    order = Order("v", 2, (0, 1, 1, 0), lists("0F0 0F1 3F0 3B0 3F1 3B1 0B0 0B1", "1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1"))
    schedule = lower(order)
    check(schedule)
    judge(schedule, blocking=True)
    assert {(a.stage, a.peer) for actions in schedule.ranks for a in actions if a.kind is Kind.SEND_F} == {(0, 1), (2, 3)}


def test_what_crosses_several_cuts_is_sent_once_to_each_reader() -> None:
    """An encoder's output goes to every decoder stage, and its gradient comes back from each."""
    edges = (*chain(4), Edge(1, 3), Edge(0, 3, has_gradient=False))
    schedule = make_schedule("1f1b", 4, 3, edges=edges)
    check(schedule)
    judge(schedule, blocking=True)
    sends = [str(a) for actions in schedule.ranks for a in actions if a.kind in (Kind.SEND_F, Kind.SEND_B) and a.microbatch == 0]
    assert sorted(sends) == ["0SEND_F0>1", "0SEND_F0>3", "1SEND_B0>0", "1SEND_F0>2", "1SEND_F0>3", "2SEND_B0>1", "2SEND_F0>3", "3SEND_B0>1", "3SEND_B0>2"]


@pytest.mark.parametrize("zero_stage", range(4))
def test_updates(zero_stage: int) -> None:
    schedule = add_updates(make_schedule("zero-bubble", 2, 3), replicas=4, zero_stage=zero_stage)
    check(schedule)
    count = {kind: sum(a.kind is kind for a in schedule.ranks[0]) for kind in Kind}
    assert count[Kind.STEP] == 1
    assert count[Kind.REDUCE] == (3 if zero_stage >= 2 else 1)
    assert count[Kind.GATHER] == count[Kind.FREE] == (0, 1, 1, 9)[zero_stage]
    with pytest.raises(UsageError, match="has its updates"):
        add_updates(schedule)
    with pytest.raises(UsageError, match="for inference"):
        add_updates(make_schedule("forward", 2, 3))


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_what_is_gathered_once_a_step_is_gathered_from_its_beginning_on(zero_stage: int) -> None:
    """In the order of first use, which need not be that of the stages."""
    branches = Order("branches", 2, (0, 0, 0), lists("1F0 0F0 2F0 1F1 0F1 2F1 2B0 2B1 1B0 1B1 0B0 0B1"))
    for made in (lower(branches, (Edge(0, 2), Edge(1, 2))), make_schedule("interleaved", 2, 4, 3)):
        schedule = add_updates(made, replicas=2, zero_stage=zero_stage)
        check(schedule)
        for rank, actions in enumerate(schedule.ranks):
            first = schedule.by_first_use(rank)
            assert [(a.kind, a.stage) for a in actions[: len(first)]] == [(Kind.GATHER, stage) for stage in first]
    assert add_updates(lower(branches, (Edge(0, 2), Edge(1, 2))), replicas=2, zero_stage=1).by_first_use(0) == (1, 0, 2)


def test_interleaved_places_chunks_in_turns() -> None:
    """16 layers, 4 ranks, 2 virtual stages: 8 chunks of 2 layers, rank i holds chunks i and i + 4."""
    schedule = make_schedule("interleaved", 4, 8, 2)
    assert [schedule.stages_of(rank) for rank in range(4)] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    with pytest.raises(UsageError, match=r"6 microbatches are not a multiple of 4 ranks; take 4 or 8"):
        make_schedule("interleaved", 4, 6, 2)
