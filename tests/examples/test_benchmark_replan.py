"""The example of plans that are made again, on a small model and few devices."""

from collections.abc import Callable
from types import ModuleType

import pytest

from autopar.models.load import load_model
from autopar.request import Request


def small(model: str, batch: int) -> Request:
    loaded = load_model("gpt2-tiny", batch=batch, device="meta", overrides={"n_layer": 4})
    return Request(loaded.module, loaded.kwargs)


def test_it_prints_a_row_for_every_question(example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    replan = example("benchmark_replan")
    monkeypatch.setattr(replan, "request_of", small)
    for name, nodes, batch in (("LARGE", 2, 4), ("SMALL", 1, 2), ("FRONT", 1, 2)):
        monkeypatch.setattr(replan, name, ("gpt2-tiny", nodes, batch))
    monkeypatch.setattr(replan, "planned", lambda request, cluster, share=0.9, **budget: request.planned(cluster, joint=True, max_memory=share, pins=("pp=4", "zero=0"), **budget))
    monkeypatch.setattr(replan, "SWEEP", 2)
    monkeypatch.setattr("autopar.joint.front.LEANER", 0.4)
    replan.main(None, True)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("cold", "the same", "bandwidth between nodes", "memory 70 %", "twice the batch", "half the nodes"))
    assert "bandwidth x 4" in shown and "fastest" in shown and "holds less" in shown and shown.count("in all") == 3
