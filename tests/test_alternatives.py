"""The decisions of a joint plan: what it is said to do it does, and an alternative costs what the plan with it pinned costs."""

import math

import pytest

from autopar.alternatives import alternatives, choices
from autopar.core.cluster import Cluster
from autopar.core.plan import Plan
from autopar.errors import InfeasibleError
from autopar.models.load import load_model
from autopar.planner.plan import Planned
from autopar.request import Request

CLUSTER = Cluster.preset("a100-sxm", nodes=2, devices_per_node=2)


@pytest.fixture(scope="module")
def asked() -> Request:
    loaded = load_model("gpt2-tiny", batch=32, device="meta", dtype="bfloat16", overrides={"n_layer": 4, "n_embd": 256})
    return Request(loaded.module, loaded.kwargs)


@pytest.fixture(scope="module")
def plan(asked: Request) -> Plan:
    return asked.planned(CLUSTER, pins=("pp=2",)).plan


def test_what_a_plan_is_said_to_do_it_does(asked: Request, plan: Plan) -> None:
    """With all its decisions pinned the search finds nothing else."""
    pins = [choice.chosen for choice in choices(plan, asked.batch_size) if "+" not in choice.chosen]
    assert {"pp=2", "virtual=1"} <= set(pins)
    again = asked.planned(CLUSTER, pins=pins).plan
    assert again.predicted.step_time_s == pytest.approx(plan.predicted.step_time_s, rel=1e-9)


def test_an_alternative_costs_what_pinning_it_costs(asked: Request, plan: Plan) -> None:
    found = alternatives(asked, CLUSTER, plan, pins=("pp=2",))
    names = [d.what for d in found]
    assert "pp" not in names and {"tp", "zero", "recompute"} <= set(names)
    for d in found:
        assert d.alternative != d.chosen
        if d.extra_s < math.inf:
            other = asked.planned(CLUSTER, pins=("pp=2", *d.alternative.split(","))).plan
            assert other.predicted.step_time_s - plan.predicted.step_time_s == pytest.approx(d.extra_s, rel=1e-9, abs=1e-15)


class Crowded(Request):
    """Nothing fits but what was found."""

    def planned(self, cluster: Cluster, **given: object) -> Planned:
        raise InfeasibleError("no plan fits")


def test_where_nothing_else_fits_it_says_so(asked: Request, plan: Plan) -> None:
    found = alternatives(Crowded(asked.model, asked.example_inputs), CLUSTER, plan)
    assert {d.what for d in found} == {choice.what for choice in choices(plan, asked.batch_size)}
    assert all(d.extra_s == math.inf and d.alternative == "none that fits" for d in found)
