"""The front of time against memory: its parts, each searched for by itself."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random

import pytest

from autopar.core.residency import Precision
from autopar.errors import InfeasibleError
from autopar.joint.front import LEANER, MORE_POINTS, Part, front_of, parted, state_bytes
from autopar.models.load import load_model
from autopar.request import Request


@dataclass
class Memory:
    high_bytes: float


@dataclass
class Figures:
    step_time_s: float
    memory: Memory


@dataclass
class Planned:
    """What the front looks at of a plan."""

    predicted: Figures


def plan(step_s: float, held: float) -> Planned:
    return Planned(Figures(step_s, Memory(held)))


@dataclass
class Machine:
    """Plans hold what they may, down to `least` bytes."""

    least: float
    asked: list[tuple[float, int | None]] = field(default_factory=list)

    def planned(self, limit: float, points: int | None) -> Planned:
        self.asked.append((limit, points))
        if limit < self.least:
            raise InfeasibleError("too little memory")
        return plan(1 / limit, limit)


def test_a_part_goes_from_limit_to_limit() -> None:
    whole, upper, lower = Machine(30.0), Machine(30.0), Machine(30.0)
    every = Part(100.0).plans(whole.planned)
    assert all(b.predicted.memory.high_bytes == LEANER * a.predicted.memory.high_bytes for a, b in pairwise(every))
    assert whole.asked[-1][0] < 30.0 <= whole.asked[-2][0] and {points for _, points in whole.asked} == {None}
    assert len(Part(100.0, 60.0).plans(upper.planned)) == len(upper.asked) and upper.asked[-1][0] > 60.0 >= LEANER * upper.asked[-1][0]
    assert len(Part(60.0, budget_s=600.0).plans(lower.planned)) == len(lower.asked) - 1 and {points for _, points in lower.asked[1:]} == {MORE_POINTS}


def test_a_part_ends_with_the_first_plan_that_takes_too_long() -> None:
    found = Part(100.0, within_s=1 / 80).plans(Machine(30.0).planned)
    assert found[-1].predicted.step_time_s > 1 / 80 >= found[-2].predicted.step_time_s


def test_parts_meet_between_the_limit_and_what_all_plans_hold() -> None:
    (begin, middle), (again, end) = parted(100.0, 25.0)
    assert (begin, end) == (100.0, 0.0) and middle == again and 25.0 < middle < 100.0
    assert parted(100.0, 99.0) == parted(100.0, 120.0) == parted(100.0, 0.0) == [(100.0, 0.0)]


@pytest.mark.parametrize("seed", range(20))
def test_the_front_has_no_plan_that_another_beats(seed: int) -> None:
    random = Random(seed)
    plans = [plan(random.randint(1, 30), random.randint(1, 100)) for _ in range(40)]
    front = front_of(plans)
    assert all(a.predicted.step_time_s < b.predicted.step_time_s and b.predicted.memory.high_bytes <= LEANER * a.predicted.memory.high_bytes for a, b in pairwise(front))
    assert front[0].predicted.step_time_s == min(p.predicted.step_time_s for p in plans)
    for p in plans:
        assert any(q.predicted.step_time_s <= p.predicted.step_time_s and q.predicted.memory.high_bytes <= p.predicted.memory.high_bytes / LEANER for q in front)


def test_state_is_that_of_adam() -> None:
    loaded = load_model("gpt2-tiny", batch=8, device="meta", dtype="bfloat16", overrides={"n_layer": 4})
    graph = Request(loaded.module, loaded.kwargs).family.graph(2)
    precision = Precision(master="float32")
    assert state_bytes(graph, precision, offload=False) == 16 * graph.num_params
    assert state_bytes(graph, precision, offload=True) == 4 * graph.num_params
    assert state_bytes(graph, replace(precision, master=None), offload=False) == 8 * graph.num_params
