"""The ranking of plans, on a model so small that its times say nothing: what is measured, counted and printed."""

import json
from collections.abc import Callable
from types import ModuleType

import pytest

import autopar
from autopar.runtime.launch import launch


@pytest.fixture
def ranking(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("rank_plans")


@pytest.mark.gloo
def test_plans_of_one_model_train_alike_and_are_ranked(ranking: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    study = ranking.Study("transformer-tiny", 4, 8)
    cluster = autopar.Cluster.local(2)
    plans = ranking.plans_of(study, cluster, [(1, ("dp=2",)), (1, ("dp=2", "zero=3")), (2, ("pp=2", "schedule=gpipe"))], searched=False)
    samples: list[object] = []
    launch(ranking.measure, 2, study, plans, 2, on_message=samples.append)
    assert len(samples) == 2 * len(plans)
    found = ranking.summary(plans, samples, cluster, study, 2)
    assert json.loads(json.dumps(found)) == found
    assert [row["name"] for row in found["rows"]] == sorted(plans, key=lambda name: next(r["measured_s"] for r in found["rows"] if r["name"] == name))
    assert {row["name"]: row["predicted_s"] for row in found["rows"]} == {name: plan.predicted.step_time_s for name, plan in plans.items()}
    losses = [row["loss"] for row in found["rows"]]
    assert max(losses) == pytest.approx(min(losses), rel=1e-4), "the same training, whatever the plan"
    assert -1 <= found["kendall_tau"] <= 1 <= found["searched_over_fastest"]
    ranking.show(found)
    assert all(plan.summary() in capsys.readouterr().out for plan in list(plans.values())[:1])


def test_kendall_tau(ranking: ModuleType) -> None:
    """Against values counted by hand: pairs in order less pairs out of order; ties (tau-b)."""
    tau = ranking.kendall_tau
    assert tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1.0
    assert tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0
    assert tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / (2 * 3) ** 0.5)
    assert tau([1, 1], [1, 2]) == 0.0


def test_the_time_of_a_plan_is_that_of_its_calm_steps(ranking: ModuleType) -> None:
    cluster, study = autopar.Cluster.local(1), ranking.Study("mlp-tiny", 4, 8)
    plans = ranking.plans_of(study, cluster, [(1, ("dp=1",))], searched=False)
    (name,) = plans
    samples = [ranking.Sample(name, wall, 1.0, others, 0.5) for wall, others in ((1.0, 0.0), (1.2, 0.1), (9.0, 8.0), (1.1, 0.0), (7.0, 5.0))]
    (row,) = ranking.rows_of(plans, samples)
    assert row.measured_s == 1.1
