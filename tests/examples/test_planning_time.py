"""The example that shows how planning grows, on the fewest devices and layers."""

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_it_prints_its_lines_and_draws_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("planning_time")
    monkeypatch.setattr(example, "AT_LAYERS", 4)
    monkeypatch.setattr(example, "AT_DEVICES", 2)
    example.main("1,2", "3,4", "1,2", tmp_path / "plot.svg")
    shown = capsys.readouterr().out
    assert "for every doubling of the devices" in shown and "layers to the power" in shown
    assert "for every kind of block" in shown and "kinds to the power" in shown
    assert (tmp_path / "plot.svg").read_text().count("<polyline") == 4


def test_lines_go_through_their_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("planning_time")
    slope, start, share = example.line([1.0, 2.0, 4.0], [5.0, 7.0, 11.0])
    assert (slope, start, share) == pytest.approx((2.0, 3.0, 1.0))
