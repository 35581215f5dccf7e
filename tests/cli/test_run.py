"""`autopar run`: real processes, real losses, beside one process of plain PyTorch."""

import json
from pathlib import Path

import pytest
import torch

from autopar.cli.training import Job, difference, draws_random_numbers, token_input
from autopar.models.load import load_model
from tests.cli.calling import Call, assert_refused

TEXT = b"To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. " * 20


@pytest.mark.gloo
def test_text_on_four_processes(call: Call, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT)
    called = call("run", "transformer-tiny", "-c", "local:4", "--pin", "dp=2", "--pin", "tp=2", "--steps", 4, "--text", text, "--lr", 3e-3, "--json")
    assert (called.code, called.err) == (0, "")
    found = json.loads(called.out)
    assert found["schema_version"] == 1 and found["layout"] == "dp2 x tp2"
    assert len(found["losses"]) == len(found["one_process"]) == 4
    assert found["losses"][-1] < found["losses"][0] - 0.1
    assert found["max_difference"] < 1e-5


@pytest.mark.gloo
def test_bfloat16_with_everything_that_saves_memory(call: Call) -> None:
    """float32 copies are updated, on the host; beside one process of plain PyTorch that does the same."""
    pins = ("--pin", "dp=2", "--pin", "zero=3", "--pin", "recompute=selective")
    called = call("run", "gpt2-tiny", "-c", "local:2", *pins, "--micro-batches", 2, "--offload", "--dtype", "bfloat16", "--steps", 2, "--json")
    assert (called.code, called.err) == (0, "")
    found = json.loads(called.out)
    assert found["layout"] == "dp2(zero3), recompute 2 selective, 2 microbatches, optimizer state on the host"
    assert 0 < found["max_difference"] < 1e-2


@pytest.mark.gloo
def test_page_of_a_model_with_dropout(call: Call) -> None:
    called = call("run", "alexnet-tiny", "-c", "local:2", "--pin", "dp=2", "--steps", 2)
    assert (called.code, called.err) == (0, "")
    lines = called.out.splitlines()
    assert lines[0].startswith("alexnet-tiny as dp2 on 2 processes, batch 8 of random numbers")
    assert "dropout is off" in lines[1] and lines[-1].endswith("the same training")
    assert [line.split()[0] for line in lines[3:5]] == ["1", "2"]


@pytest.mark.gloo
def test_plan_file_without_comparison(call: Call, plan_file: Path) -> None:
    called = call("run", "mlp-tiny", "-c", "local:4", "--plan", plan_file, "--steps", 2, "--no-compare", "--json")
    assert (called.code, called.err) == (0, "")
    found = json.loads(called.out)
    assert len(found["losses"]) == 2 and found["one_process"] is None and found["max_difference"] is None


def test_torchrun_is_one_launcher_too_many(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(call("run", "gpt2-tiny", "-c", "local:2"), 2, ("without torchrun",))


def job(model: str, text: bytes | None = TEXT) -> Job:
    return Job(model=model, cluster="local:2", plan="", batch=4, seq=16, steps=3, lr=1e-3, seed=1, train=True, text=text)


@pytest.mark.parametrize("model,name", [("gpt2-tiny", "input_ids"), ("transformer-tiny", "inputs"), ("bert-tiny", "input_ids")])
def test_batches_are_stretches_of_the_text(model: str, name: str) -> None:
    given = job(model)
    loaded = given.load()
    assert token_input(loaded) == name
    batches = list(given.batches(loaded))
    assert len(batches) == 3 and not torch.equal(batches[0][name], batches[1][name])
    for again, batch in zip(given.batches(loaded), batches, strict=True):
        ids, labels = batch[name], batch["labels"]
        assert torch.equal(again[name], ids) and ids.shape == labels.shape == (4, 16)
        assert torch.equal(labels[:, :-1], ids[:, 1:]) if name == "inputs" else torch.equal(labels, ids)
        loss = loaded.module(**batch)
        assert torch.isfinite(loss if isinstance(loss, torch.Tensor) else loss.loss)


def test_vocabulary_of_bytes_is_not_folded() -> None:
    given = job("llama-tiny", bytes(range(256)) * 10)
    loaded = load_model("llama-tiny", batch=4, seq=16, overrides={"vocab_size": 300}, device="cpu")
    assert {int(i) for batch in given.batches(loaded) for i in batch["input_ids"].flatten()} - set(range(100))


@pytest.mark.parametrize("model,expected", [("gpt2", True), ("gpt2-tiny", False), ("t5-base", True), ("alexnet-tiny", True), ("llama-tiny", False)])
def test_dice_are_seen(model: str, expected: bool) -> None:
    assert draws_random_numbers(load_model(model, batch=2, seq=8).module) is expected


def test_difference() -> None:
    nan, inf = float("nan"), float("inf")
    assert difference(1.0, 1.0) == 0 and difference(1.1, 1.0) == pytest.approx(0.1)
    assert difference(nan, nan) == 0 and difference(nan, 1.0) == inf and difference(1.0, nan) == inf
