"""Published rows by groups, on a model so small that it is searched in a second: which plans compete, the regret, and the searched plan beside the best."""

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from autopar.forecast.runs import Row
from autopar.joint.search import GAP

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def ranking(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("rank_published")


def row(number: int, value: float, **given: str) -> Row:
    """A run of four layers on four devices that took so many seconds."""
    values = {
        "id": f"own-{number}", "source": "nobody's runs", "kind": "run", "metric": "iter_s", "value": str(value), "split_group": str(number), "gpu": "A100-80GB",
        "num_gpus": "4", "model_family": "gpt", "layers": "4", "hidden": "1024", "heads": "16", "seq": "512", "vocab": "1024", "global_batch": "4", "tp": "1",
        "pp": "1", "micro_batch": "1", "precision": "bf16", "recompute": "none", "notes": "",
    }  # fmt: skip
    return Row(values | given, {})


def test_plans_of_one_setting_compete_and_the_measured_best_is_held_against_the_predicted_one(ranking: ModuleType) -> None:
    rows = [row(0, 3.0), row(1, 2.0, tp="2"), row(2, 1.0, tp="4"), row(3, 9.0, tp="4"), row(4, 0.1, tp="2", seq="1024"), row(5, 0.1, kind="oom", pp="2")]
    (group,) = ranking.groups(rows)
    assert [p.case.row.id for p in group.plans] == ["own-0", "own-1", "own-2"], "a plan measured twice is one, other sequences are another group"
    assert [p.measured_s for p in group.plans] == [3.0, 2.0, 5.0]
    assert group.best_measured.case.plan.layout.tp == 2
    assert group.ratio == group.plans[1].predicted_s / min(p.predicted_s for p in group.plans) > 1
    fastest = min(group.plans, key=lambda p: p.predicted_s)
    assert group.lost == fastest.measured_s / 2.0 > 1
    assert not ranking.groups(rows[:2]) and not ranking.groups(rows, words="somebody")


def test_groups_of_which_too_few_plans_can_be_priced_are_named(ranking: ModuleType) -> None:
    rows = [row(n, 1.0, tp=str(2**n)) for n in range(3)]
    assert not list(ranking.left_out(rows)) and not list(ranking.left_out([*rows, row(3, 1.0, pp="2", scorable="no")]))
    (line,) = ranking.left_out([*rows[:2], row(2, 1.0, tp="4", scorable="no"), row(3, 1.0, scorable="no")])
    assert line == "left out: nobody's runs, 4 x 1024, seq 512, batch 4, 4 A100-80GB: 1 of 3 plans: not to be scored"
    (line,) = ranking.left_out([row(n, 1.0, tp=str(2**n), heads="") for n in range(3)])
    assert line.endswith("3 of 3 plans: heads not published")
    assert not list(ranking.left_out(rows[:2])) and not list(ranking.left_out([row(n, 1.0, tp=str(2**n), heads="") for n in range(3)], words="somebody"))


def test_the_searched_plan_is_no_slower_than_what_was_measured_and_is_priced_as_they_would_run_it(ranking: ModuleType) -> None:
    (group,) = ranking.groups([row(n, 1.0 + n, tp=str(2**n)) for n in range(3)])
    found = ranking.compare(group, seconds=5.0)
    assert found.ratio <= 1 + GAP and found.point.num_devices == 4
    plan = found.plan
    assert plan is not None and plan.num_devices == 4 and plan.layout.dp * plan.layout.micro_batch * plan.num_microbatches == 4
    assert found.by_them_s == pytest.approx(group.best_measured.predicted_s, rel=0.5)
    cut = group.best_measured.case.plan
    with pytest.raises(ranking.Unpriced, match="context parallelism"):
        ranking.pins_of_plan(replace(group.best_measured, case=replace(group.case, plan=replace(cut, layout=replace(cut.layout, cp=2)))))
