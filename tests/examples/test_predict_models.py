"""Predictions of operators and steps beside the clock, on a model so small that its times say nothing: what is measured, counted and printed."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

import autopar
from autopar.trace.capture import trace


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    return importlib.import_module("predict_models")


def test_every_distinct_operator_is_a_point(models: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    cluster, loaded = autopar.Cluster.local(1), models.Study("mlp-tiny", 4, 1).load("cpu")
    traced = trace(loaded.module, (), loaded.kwargs)
    with torch.enable_grad():
        points = models.operators(traced, loaded, cluster, 2)
    products = {(op.kind, tuple(traced.graph.values[v].meta.shape for v in (*op.operands, *op.results))) for op in traced.graph.ops if "linear" in op.kind}
    assert sum("linear" in point.name for point in points) == len(products) > 0
    assert all(point.predicted_s > 0 and point.measured_s > 0 for point in points)
    whole = models.Point(loaded.name, "step", 2e-3, 1e-3)
    found = models.summary([(points, whole), (points, models.Point("other", "step", 3e-3, 2e-3))], cluster)
    assert found["steps"] == {"points": 2, "kendall_tau": 1.0, "spearman": 1.0, "median_error": 0.75}
    models.show(found)
    assert "2 steps: Kendall's tau 1.000" in capsys.readouterr().out


def test_spearman(models: ModuleType) -> None:
    """By hand: 1 - 6 sum d^2 / (n (n^2 - 1)) without ties; ties share their mean rank."""
    assert models.spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert models.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.75**0.5)
