"""The order of plans: Kendall's tau by hand, the most that it can be, and what the report says of it."""

import io
import math

import pytest
from rich.console import Console

from autopar.forecast.price import Priced, Result
from autopar.forecast.ranking import kendall, ranking
from autopar.forecast.report import print_tables
from autopar.forecast.score import score


def result(name: str, predicted: float, measured: float, source: str = "s") -> Result:
    return Result(id=name, source=source, group=name, machine=("gpu", "one"), setting=source, predicted_s=predicted, measured_s=measured,
                  memory_bytes=1, device_bytes=100, recompute="none", usable_bytes=90)  # fmt: skip


def test_kendall_by_hand() -> None:
    assert kendall([(1, 1), (2, 2), (3, 3)]) == 1.0
    assert kendall([(1, 3), (2, 2), (3, 1)]) == -1.0
    assert kendall([(1, 1), (2, 3), (3, 2)]) == pytest.approx(1 / 3)
    assert kendall([(1, 1), (1, 2)]) is None


def test_no_forecast_orders_runs_of_two_plans_that_overlap() -> None:
    """Plan a took 1, 2 and 9 s, plan b 3 and 4 s, plan c 8 s: of 11 pairs of different plans a before b loses 2 of 6, a before c 1 of 3. The forecast
    has c first, which costs it the 4 that are right the other way round."""
    times = {"a": (2.0, (1.0, 2.0, 9.0)), "b": (3.0, (3.0, 4.0)), "c": (1.0, (8.0,))}
    rows = [result(f"{plan}{n}", predicted, measured) for plan, (predicted, runs) in times.items() for n, measured in enumerate(runs)]
    found = ranking(rows)
    assert found is not None and found.ceiling == pytest.approx((2 + 1 + 2) / 11)
    assert found.kendall == pytest.approx((4 + 1 - 2 - 2 - 2) / 11) and found.misplaced[0] == ("c0", 4 / 6)
    assert found.repeats == pytest.approx(math.log(3))
    assert ranking(rows[:3]) is None and ranking([result(str(n), 1.0, n + 1.0) for n in range(4)]) is None


def test_the_report_says_what_keeps_the_order_from_being_right() -> None:
    wrong = [result(f"r{n}", 9.0 - n, 1.0 + n, source="shuffled") for n in range(4)]
    right = [result(f"q{n}", 1.0 + n, 1.0 + n, source="sorted") for n in range(4)]
    priced, console = Priced((*wrong, *right), ()), Console(width=200, record=True, file=io.StringIO())
    print_tables(priced, score(priced), console)
    order = console.export_text().split("order of plans below 0.75")[1]
    assert "shuffled" in order and "-1.00" in order and "1.00" in order and "r0 50%" in order and "sorted" not in order
