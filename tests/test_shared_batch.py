"""Copies of a model that share out the microbatches of a step unevenly: the same training, on a simulated mesh and on real processes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.core.pipeline import SHARED, Pipeline
from autopar.core.plan import Plan
from autopar.core.schedule import Schedule
from autopar.errors import FileFormatError, ScheduleError, UsageError
from autopar.models.load import LoadedModel, load_model
from autopar.planner.bind import bind
from autopar.planner.plan import plan_graph
from autopar.planner.search import Options
from autopar.runtime.microbatches import split_batch
from autopar.schedules.check import check
from autopar.schedules.plan import own_schedule, schedule_of
from autopar.stages import cut_into_stages
from autopar.trace.capture import trace
from tests.cli.calling import Call


def load(name: str = "gpt2-tiny", micro_batches: int = 4, **overrides: Any) -> LoadedModel:
    return load_model(name, batch=4 * micro_batches, seq=8, device="cpu", ragged=True, overrides=overrides)


def shared(loaded: LoadedModel, shares: tuple[int, ...], *pins: str, devices: int = 2, **options: Any) -> Plan:
    """The plan for a copy, for several of them."""
    graph = trace(loaded.module, (), split_batch(loaded.kwargs, sum(shares))[0]).graph
    plan = plan_graph(graph, autopar.Cluster.local(devices), Options(pins=pins, micro_batches=sum(shares), **options)).plan
    return replace(plan, pipeline=Pipeline(len(shares), (), SHARED, 0, (), shares))


@pytest.mark.parametrize(
    "pins", [("dp=2",), ("tp=2",), ("dp=2", "zero=1"), ("dp=2", "zero=2"), ("dp=2", "zero=3", "recompute=full"), ("dp=2", "recompute=selective")], ids=str
)
@pytest.mark.parametrize("shares", [(1, 3), (2, 1, 1)], ids=str)
def test_the_same_training_on_a_simulated_mesh(shares: tuple[int, ...], pins: tuple[str, ...]) -> None:
    """Targets are ignored at random, so that microbatches count differently in the loss."""
    loaded = load()
    report = autopar.verify(loaded.module, shared(loaded, shares, *pins), loaded.kwargs, steps=3)
    assert report.equal, str(report)
    assert report.bytes_predicted == report.bytes_counted and report.num_ranks == 2 * len(shares)


def test_dropout_draws_what_one_process_draws() -> None:
    loaded = load(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    report = autopar.verify(loaded.module, shared(loaded, (1, 3), "dp=1", devices=1), loaded.kwargs, steps=2)
    assert report.equal, str(report)


@pytest.mark.gloo
def test_the_same_training_on_real_processes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    call, path = Call(capsys), tmp_path / "plan.json"
    loaded = load_model("gpt2-tiny", batch=16, seq=8, device="cpu", ragged=False)
    shared(loaded, (1, 3), "dp=2", "zero=1").save(path)
    called = call("run", "gpt2-tiny", "-c", "local:4", "--plan", path, "--batch", 16, "--seq", 8, "--steps", 3, "--json")
    assert (called.code, called.err) == (0, "")
    found = json.loads(called.out)
    assert found["layout"] == "shares(1+3) x dp2(zero1), 4 microbatches" and found["max_difference"] < 1e-5


def test_lists_are_whole_and_their_own(tmp_path: Path) -> None:
    loaded = load()
    plan = shared(loaded, (1, 3), "dp=2")
    graph = trace(loaded.module, (), split_batch(loaded.kwargs, 4)[0]).graph
    stages = cut_into_stages(bind(plan, graph), plan.pipeline)
    schedule = schedule_of(stages)
    assert [" ".join(map(str, actions)) for actions in schedule.ranks] == ["0F0 0B0 0TIE0", "1F1 1B1 1F2 1B2 1F3 1B3 1TIE0"]
    assert Schedule.from_json(schedule.to_json()) == schedule and own_schedule(schedule, stages) == schedule
    assert schedule_of(stages, "forward").ranks[1][-1].microbatch == 3
    with pytest.raises(ScheduleError, match="stage 1 runs microbatches 2 to 3"):
        check(replace(schedule, shares=(2, 2)))
    with pytest.raises(UsageError, match="at least one"):
        replace(schedule, shares=(1, 2))
    assert Plan.from_json(plan.to_json()) == plan
    data = json.loads(plan.to_json())
    data["pipeline"]["shares"] = [4]
    with pytest.raises(FileFormatError, match="every rank of schedule shared"):
        Plan.from_json(json.dumps(data))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x)).square().mean()


def test_buffers_that_microbatches_change_are_not_shared_out() -> None:
    graph = trace(Normed(), (torch.zeros(4, 4),), {}).graph
    program = plan_graph(graph, autopar.Cluster.local(1), Options(micro_batches=2)).program
    with pytest.raises(UsageError, match="norm.* is updated by every microbatch"):
        cut_into_stages(program, Pipeline(2, (), SHARED, 0, (), (1, 1)))
