"""The pipeline examples print the numbers they promise: at full size where that is quick, at a small size where it is not."""

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Protocol

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


class Load(Protocol):
    def __call__(self, name: str) -> ModuleType: ...


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """A script of the examples as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def test_bubbles(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    bubbles = load("pipeline_bubbles")
    bubbles.main(shapes=((4, 8), (8, 16), (8, 32)))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[0].isdigit() and len(line.split()) == 10]
    assert len(rows) == 3
    for ranks, microbatches, published, naive, gpipe, one_f_one_b, interleaved, zero_bubble, held_gpipe, held_1f1b in rows:
        assert gpipe == one_f_one_b == published
        assert float(naive) == pytest.approx((int(ranks) - 1) / int(ranks), abs=5e-4)
        assert float(zero_bubble) < float(interleaved) < float(gpipe)
        assert (held_gpipe, held_1f1b) == (microbatches, ranks)


def test_groups(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    load("process_groups").main()
    text = capsys.readouterr().out
    assert text == (
        "pp2 x dp2 x tp4: 16 ranks\n"
        "  tp  {0,1,2,3} {4,5,6,7} {8,9,10,11} {12,13,14,15}\n"
        "  dp  {0,4} {1,5} {2,6} {3,7} {8,12} {9,13} {10,14} {11,15}\n"
        "  pp  {0,8} {1,9} {2,10} {3,11} {4,12} {5,13} {6,14} {7,15}\n"
        "pp2 x edp2 x ep4 x etp1: 16 ranks\n"
        "  etp {0} {1} {2} {3} {4} {5} {6} {7} {8} {9} {10} {11} {12} {13} {14} {15}\n"
        "  ep  {0,1,2,3} {4,5,6,7} {8,9,10,11} {12,13,14,15}\n"
        "  edp {0,4} {1,5} {2,6} {3,7} {8,12} {9,13} {10,14} {11,15}\n"
        "  pp  {0,8} {1,9} {2,10} {3,11} {4,12} {5,13} {6,14} {7,15}\n"
    )


def test_model_in_two_parts(load: Load) -> None:
    example = load("model_in_two_parts")
    outcome = example.train()
    assert outcome.losses == outcome.one_piece
    assert outcome.worst_difference == 0.0
    assert outcome.losses[0] == pytest.approx(0.69, abs=0.01)
    assert outcome.losses == sorted(outcome.losses, reverse=True)
    assert outcome.predicted_bytes == outcome.counted_bytes == 2 * 64 * 20 * 4
    assert outcome.idle == 0.5


def test_hybrid(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    example = load("hybrid_dp_pp")
    outcome = example.train()
    assert outcome.output_shape == (32, 10)
    assert outcome.worst_gradient < 1e-12
    assert outcome.worst_parameter < 1e-12
    assert outcome.replicas_differ == 0.0
    assert outcome.losses[-1] < outcome.losses[0]
    example.main()
    assert capsys.readouterr().out.startswith("stage 0 on ranks {0, 1}\nstage 1 on ranks {2, 3}\n")


def test_schedules(load: Load) -> None:
    example = load("pipeline_schedules")
    settings = example.Settings(widths=(20, 32, 48, 32, 16, 10), batch=64)
    rows = {row.name: row for row in example.compare(settings)}
    assert {name: f"{row.idle:.3f}" for name, row in rows.items()} == {"naive": "0.750", "gpipe": "0.086", "1f1b": "0.086", "interleaved": "0.045", "zero-bubble": "0.030"}
    assert {name: row.in_flight for name, row in rows.items()} == {
        "naive": (1, 1, 1, 1), "gpipe": (32, 32, 32, 32), "1f1b": (4, 3, 2, 1), "interleaved": (11, 9, 7, 5), "zero-bubble": (4, 4, 4, 4),
    }  # fmt: skip
    assert all(row.error < 1e-12 for row in rows.values())
    assert all(row.own_idle > row.idle for name, row in rows.items() if name != "naive"), "uneven stages leave more idle"
    losses = example.train(replace(settings, microbatches=4, epochs=200))
    assert losses[0] == pytest.approx(2.303, abs=0.1)
    assert losses[-1] < 1.0


def test_rank_placement(load: Load) -> None:
    """Large activations: tensor parallelism inside the node, by far. Small ones: the gradients decide, and the price says so."""
    example = load("rank_placement")
    inside, across = ("dp", "tp"), ("tp", "dp")

    def ratio(seq: int) -> float:
        outcome = example.compare(example.two_nodes(), layers=2, seq=seq)
        assert outcome.moved_bytes["tp"] > outcome.moved_bytes["dp"]
        assert outcome.seconds[across]["tp"] > 2 * outcome.seconds[inside]["tp"]
        return sum(outcome.seconds[across].values()) / sum(outcome.seconds[inside].values())

    assert ratio(512) > 1.5
    assert ratio(32) < 1.0
