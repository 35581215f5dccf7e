"""The memory examples print the numbers they promise: the same ratios at a small size."""

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Protocol

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
EQUAL = 1e-5


class Load(Protocol):
    def __call__(self, name: str) -> ModuleType: ...


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """A script of the examples as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.mark.gloo
def test_zero_memory(load: Load) -> None:
    """Bytes a parameter as the dtypes say; traffic 2, 2, 2, 3 times X(N-1)/N, and the same little for the loss beside it."""
    example = load("zero_memory")
    settings = example.Settings(width=128, depth=4, steps=2)
    n = settings.processes
    rows = example.run(settings)
    assert [row.state_bytes / row.parameters for row in rows] == pytest.approx([16, 8 + 8 / n, 4 + 12 / n, 16 / n], rel=0.02)
    beside = [row.traffic - expected for row, expected in zip(rows, example.TRAFFIC, strict=True)]
    assert beside == pytest.approx([beside[0]] * 4)
    assert 0 < beside[0] < 0.1
    assert all(row.as_predicted and row.difference < EQUAL for row in rows)

    n = 2
    mixed = example.run(replace(settings, dtype="bfloat16", processes=n))
    assert [row.state_bytes / row.parameters for row in mixed] == pytest.approx([16, 4 + 12 / n, 2 + 14 / n, 14 / n], rel=0.02)
    assert all(row.as_predicted and row.difference < 1e-2 for row in mixed)


def test_zero_fractions(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    example = load("zero_memory")
    example.show_limits()
    example.show_large()
    lines = capsys.readouterr().out.splitlines()
    limits = [line.split()[-1] for line in lines if "ZeRO-" in line]
    assert limits == ["1/2", "1/4", "1/N", "1/4", "1/8", "1/N"]
    quarter = next(line.split() for line in lines if "bfloat16   ZeRO-1" in line)
    assert quarter[2:6] == ["0.4375", "0.3438", "0.2734", "0.2617"]
    assert lines[-1].count("120.0 / 31.4 / 16.6 / 1.9") == 2


@pytest.mark.gloo
def test_zero_offload(load: Load) -> None:
    example = load("zero_offload")
    settings = example.Settings(width=128, depth=4, steps=2, processes=2)
    for row in example.run(settings):
        device, down, up = example.expected_bytes(row.stage, row.parameters, settings.processes)
        assert row.device_bytes == pytest.approx(device, rel=0.02)
        assert (row.down_bytes, row.up_bytes) == (down, up)
        assert row.as_predicted
        assert row.difference < EQUAL
    assert all(ours == pytest.approx(published, abs=0.005) for _, published, ours in example.efficiencies())


@pytest.mark.gloo
def test_recompute(load: Load) -> None:
    example = load("recompute")
    none, selective, full = example.run(example.Settings(blocks=3, hidden=64, heads=4, seq=32, vocab=64, steps=1))
    assert full.kept_bytes <= (1 - example.LEAST_SAVING) * none.kept_bytes
    assert full.kept_bytes < selective.kept_bytes < none.kept_bytes
    for row in (none, selective, full):
        assert row.flops - none.flops == row.recomputed_flops
        assert row.difference < EQUAL
    assert 0 < selective.recomputed_flops < full.recomputed_flops
