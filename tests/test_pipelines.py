"""Pipelines cut anywhere, under every schedule, with unequal token counts and tied embeddings: the same gradients, the predicted bytes."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from autopar.core.pipeline import Pipeline
from autopar.core.schedule import Kind, Schedule
from autopar.errors import PlanMismatchError, ScheduleError, UsageError
from autopar.planner.bind import bind
from autopar.runtime.simulated_pipeline import SimulatedPipeline, SimulatedPost
from autopar.runtime.stage_run import StageRun
from autopar.schedules.check import check
from autopar.schedules.plan import own_schedule
from autopar.stages import cut_into_stages
from tests.pipelines import Work, cut, outcome, simulated

TOLERANCE = 1e-9
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble", "naive")
MATRIX = list(itertools.product(SCHEDULES, (2, 3, 4), range(1, 9)))
SPREAD = MATRIX[::7]


def case(schedule: str, num_ranks: int, micro_batches: int, model: str = "gpt2-tiny") -> None:
    work = Work.of(model, micro_batches)
    virtual = 2 if schedule == "interleaved" else 1
    if virtual == 2 and micro_batches % num_ranks:
        pytest.skip("interleaved takes a multiple of the pipeline's ranks")
    mesh = simulated(work, cut(work.plan(), work.traced.graph, num_ranks, schedule, virtual, seed=micro_batches))
    found = outcome(work, mesh)
    assert found.loss < TOLERANCE and found.gradient < TOLERANCE and found.as_predicted, found
    check_in_flight(mesh, schedule, micro_batches)


def check_in_flight(mesh: SimulatedPipeline, schedule: str, micro_batches: int) -> None:
    """Most microbatches at once on each rank: GPipe all, 1F1B what the pipeline is deep from there on, ZB-H1 no more than its depth."""
    ranks = mesh.schedule.num_ranks
    for walk in mesh.walks:
        most = {"gpipe": micro_batches, "1f1b": min(ranks - walk.rank, micro_batches), "naive": 1}.get(schedule)
        if most is not None:
            assert walk.peak_in_flight == most
        elif schedule == "zero-bubble":
            assert walk.peak_in_flight <= min(ranks, micro_batches)


@pytest.mark.parametrize("schedule,num_ranks,micro_batches", MATRIX)
def test_every_schedule(schedule: str, num_ranks: int, micro_batches: int, long: bool) -> None:
    if not long and (schedule, num_ranks, micro_batches) not in SPREAD:
        pytest.skip("with --long")
    case(schedule, num_ranks, micro_batches)


def test_the_tied_embedding_is_shared_and_its_gradient_summed() -> None:
    work = Work.of("gpt2-tiny", 4)
    mesh = simulated(work, cut(work.plan(), work.traced.graph, 2, "1f1b", 1, seed=3))
    (v, held), *others = mesh.stages.shared.items()
    assert held == (0, 1) and not others and "wte" in work.traced.graph.values[v].source[0]
    assert any(action.kind is Kind.TIE for actions in mesh.schedule.ranks for action in actions)
    assert outcome(work, mesh).gradient < TOLERANCE
    grads = [module.gradients()[0][module.program.graph.params.index(v)] for module in mesh.modules]
    assert torch.equal(grads[0], grads[1])


HYBRIDS = {
    "dp2 x pp2": ("gpt2-tiny", "1f1b", 2, ("dp=2",), 2, {}),
    "tp2 x pp2, split backward": ("llama-tiny", "zero-bubble", 2, ("tp=2",), 2, {}),
    "dp2 x tp2 x pp2, ZeRO-1": ("gpt2-tiny", "1f1b", 2, ("dp=2", "tp=2", "zero=1"), 4, {}),
    "dp2 x tp2 x pp2": ("llama-tiny", "gpipe", 2, ("dp=2", "tp=2"), 4, {}),
    "ZeRO-2, interleaved": ("gpt2-tiny", "interleaved", 2, ("dp=2", "zero=2"), 2, {}),
    "ZeRO-3, recomputed": ("llama-tiny", "1f1b", 2, ("dp=2", "zero=3", "recompute=full"), 2, {}),
    "ZeRO-3": ("gpt2-tiny", "1f1b", 3, ("dp=2", "zero=3", "recompute=selective"), 2, {}),
    "ZeRO-1, split backward, recomputed": ("gpt2-tiny", "zero-bubble", 3, ("dp=2", "zero=1", "recompute=full"), 2, {}),
    "offload": ("gpt2-tiny", "1f1b", 2, ("dp=2", "zero=1"), 2, {"offload": True}),
    "encoder and decoder": ("t5-tiny", "1f1b", 2, ("dp=1",), 1, {}),
}


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("seed", range(4))
def test_hybrids(name: str, seed: int, long: bool) -> None:
    """Every place of a cut is a different program; a few by default."""
    if not long and seed:
        pytest.skip("with --long")
    model, schedule, ranks, pins, devices, options = HYBRIDS[name]
    work = Work.of(model, 2 * ranks if schedule == "interleaved" else 2, rows=4)
    plan = cut(work.plan(pins, devices, **options), work.traced.graph, ranks, schedule, 2 if schedule == "interleaved" else 1, seed)
    found = outcome(work, simulated(work, plan))
    assert found.loss < TOLERANCE and found.gradient < TOLERANCE and found.as_predicted, (found, plan.pipeline)


Wrong = Callable[[pytest.MonkeyPatch], None]


def tie_forgotten(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(SimulatedPost, "sum_shared", lambda self, rank, first: True)


def last_answer_only(mp: pytest.MonkeyPatch) -> None:
    """A value that several stages read gets the gradient of the last of them."""
    mp.setattr(StageRun, "answer", lambda self, m, columns: self._of(m).answers.update(columns))


def weights_never_done(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(StageRun, "backward_weights", StageRun.release)


def answers_of_the_first_microbatch(mp: pytest.MonkeyPatch) -> None:
    right = StageRun.answer
    mp.setattr(StageRun, "answer", lambda self, m, columns: right(self, m, {v: [x if m == 0 else torch.zeros_like(x) for x in c] for v, c in columns.items()}))


def microbatches_count_alike(mp: pytest.MonkeyPatch) -> None:
    mp.setattr("tests.pipelines.loss_weights", lambda traced, pieces: [1 / len(pieces)] * len(pieces))


MISTAKES: tuple[tuple[Wrong, str, str, int], ...] = (
    (tie_forgotten, "gpt2-tiny", "1f1b", 2),
    (last_answer_only, "t5-tiny", "1f1b", 4),
    (weights_never_done, "llama-tiny", "zero-bubble", 2),
    (answers_of_the_first_microbatch, "llama-tiny", "gpipe", 2),
    (microbatches_count_alike, "llama-tiny", "1f1b", 2),
)


@pytest.mark.parametrize("wrong,model,schedule,ranks", MISTAKES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_mistakes_are_seen(wrong: Wrong, model: str, schedule: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train, and its loss would look plausible."""
    work = Work.of(model, 2)
    plan = cut(work.plan(), work.traced.graph, ranks, schedule, 1, seed=3)  # of T5, a cut with a value that two later stages read
    assert outcome(work, simulated(work, plan)).gradient < TOLERANCE
    wrong(monkeypatch)
    assert outcome(work, simulated(work, plan)).gradient > 1e-3


def test_a_list_of_ones_own() -> None:
    """Any order that the check accepts computes the same; one that gets stuck is refused before it runs."""
    work = Work.of("gpt2-tiny", 2)
    mesh = simulated(work, cut(work.plan(), work.traced.graph, 2, "1f1b", 1, seed=1))
    own = Schedule.from_json(mesh.schedule.to_json())
    reversed_sums = tuple(tuple(sorted(actions, key=lambda a: a.kind is Kind.SEND_B)) for actions in own.ranks)
    with pytest.raises(ScheduleError):
        check(Schedule("late answers", own.num_microbatches, own.placement, own.edges, reversed_sums, own.tied))
    assert own_schedule(own, mesh.stages) == mesh.schedule
    with pytest.raises(UsageError, match="microbatches 3, those of the plan are 2"):
        own_schedule(replace(own, num_microbatches=3), mesh.stages)
    assert outcome(work, SimulatedPipeline(mesh.stages, own, mesh.modules)).gradient < TOLERANCE


def test_cuts_that_cannot_be() -> None:
    work = Work.of("mlp-tiny", 1)
    plan, graph = work.plan(), work.traced.graph
    names = [op.name for op in graph.ops]
    program = bind(plan, graph)
    with pytest.raises(PlanMismatchError, match="does not have"):
        cut_into_stages(program, Pipeline(2, ("nowhere",)))
    with pytest.raises(PlanMismatchError, match="not in the order"):
        cut_into_stages(program, Pipeline(3, (names[6], names[4])))
    with pytest.raises(UsageError, match="no parameter"):
        cut_into_stages(program, Pipeline(2, (names[-1],)))
    with pytest.raises(UsageError, match="as many stages"):
        Pipeline(2, (names[4], names[6]))
    sharded = Work.of("gpt2-tiny", 2)
    with pytest.raises(UsageError, match="twice per microbatch"):
        simulated(sharded, cut(sharded.plan(("dp=2", "zero=2"), 2), sharded.traced.graph, 2, "zero-bubble", 1, 0))
    again = replace(plan, pipeline=Pipeline(2, (names[4],), "gpipe", 1))
    assert type(plan).from_json(again.to_json()) == again and again.num_ranks == 2
