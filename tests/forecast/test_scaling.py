"""The training-time formula, the laws of Amdahl and Gustafson, and forecasts that stay below them."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from autopar.core.cluster import Cluster
from autopar.cost_models.scaling import TrainingTime, amdahl, gustafson
from autopar.errors import UsageError
from autopar.forecast.scaling import fastest, scaling
from autopar.forecast.transformer import Dims

DIMS = Dims(layers=4, hidden=256, heads=4, kv_heads=4, inner=1024, vocab=1024, seq=128)
COUNTS = [2**k for k in range(11)]


def test_four_factors_make_the_time_and_each_moves_only_itself() -> None:
    time = TrainingTime(work_flops=3.14e23, device_flops_per_s=34.5e12, num_devices=512, efficiency=0.8)
    assert time.seconds == pytest.approx(3.14e23 / (34.5e12 * 512 * 0.8), rel=1e-12)
    assert replace(time, num_devices=1024).seconds == pytest.approx(time.seconds / 2, rel=1e-12)
    assert replace(time, work_flops=6.28e23).rate_flops_per_s == time.rate_flops_per_s
    with pytest.raises(UsageError, match="share"):
        replace(time, efficiency=1.1)


def test_the_laws_by_hand() -> None:
    assert amdahl(0.1, 10) == pytest.approx(1 / 0.19) and gustafson(0.1, 10) == pytest.approx(9.1)
    assert amdahl(0.3, 1) == gustafson(0.3, 1) == 1.0
    assert amdahl(0.0, 64) == gustafson(0.0, 64) == 64
    with pytest.raises(UsageError, match="serial share"):
        amdahl(1.5, 4)


def test_no_forecast_is_above_either_law() -> None:
    """One to 1024 devices: at one the speed-ups are 1, and every further device helps a little less."""
    points = scaling(DIMS, Cluster.preset("a100-sxm", 128), COUNTS, 1024)
    assert points[0].strong_speed_up == points[0].weak_speed_up == pytest.approx(1.0)
    assert all(p.strong_speed_up <= p.amdahl * (1 + 1e-9) and p.weak_speed_up <= p.gustafson * (1 + 1e-9) for p in points)
    assert [p.efficiency for p in points] == sorted((p.efficiency for p in points), reverse=True)
    assert points[-1].amdahl < 1024 and points[-1].efficiency < 0.8


def test_fewer_devices_are_faster_over_a_slow_link() -> None:
    base = Cluster.preset("a100-sxm", 8)
    slow = replace(base, inter_node=replace(base.inter_node, bandwidth_bytes_per_s=1e7))
    assert fastest(scaling(DIMS, slow, [1, 8, 64], 64)).num_devices == 8


def test_gpt_3_on_8_and_512_devices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """36 years and nearly 7 months, both within 5 % from the one rate that is printed; the plan's own efficiency is no assumption."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    example = importlib.import_module("training_time")
    eight, many = (TrainingTime(work_flops=example.WORK_FLOPS, device_flops_per_s=example.RATE, num_devices=n, efficiency=1.0).seconds for n in (8, 512))
    assert eight / example.YEAR_S == pytest.approx(36, rel=0.05) and many / example.MONTH_S == pytest.approx(7, rel=0.05)
    example.main()
    printed = capsys.readouterr().out
    assert "34.5 TFLOP/s" in printed and "parallel efficiency 0." in printed and "Amdahl" in printed
