"""Every plan of a small model, on one so small that its times say nothing: what is counted, measured and printed."""

import json
from collections.abc import Callable
from types import ModuleType

import pytest

import autopar
from autopar.runtime.launch import launch
from autopar.trace.capture import trace


@pytest.fixture
def enumerating(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("enumerate_plans")


@pytest.mark.gloo
def test_all_plans_run_in_heats(enumerating: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    study, cluster = enumerating.mlp(8), autopar.Cluster.local(2)
    loaded = study.load("meta")
    graphs = {1: trace(loaded.module, (), loaded.kwargs).graph}
    every = list(enumerating.every_plan(graphs, cluster, 2))
    words = 5 * 5  # what either product does on an axis: its rows, either dimension of its weight, or whole with one or the other gradient
    assert len(every) == words * 2 * (4 + 4 + 4 + 2)  # with or without recomputation, by stages of ZeRO: in one stage, and in two under three schedules, of which one takes but two
    plans = list({enumerating.identity(plan): plan for plan in every}.values())
    picked = autopar.plan(loaded.module, cluster, loaded.kwargs, pipelines=True)
    assert enumerating.identity(picked) in map(enumerating.identity, plans)

    some, heats = [*plans[::40], plans[-1], picked], (enumerating.Heat(float("inf"), 100, 3, 1), enumerating.Heat(float("inf"), 2, 4, 2, together=True))
    found: list = []
    launch(enumerating.measure, 2, study, some, len(some) - 1, heats, on_message=found.append)
    assert [sum(t.heat == n for t in found) for n in range(2)] in ([len(some), 2], [len(some), 3]), "the two fastest, and the picked one"
    assert all(len(t.steps_s) == heats[t.heat].turns - 1 for t in found)
    result = enumerating.summary(some, len(some) - 1, found, cluster, study)
    assert json.loads(json.dumps(result)) == result
    assert -1 <= result["kendall_of_all"] <= 1 <= result["searched_over_fastest"]
    enumerating.show(result)
    assert "(searched)" in capsys.readouterr().out
