"""What was built for a plan goes when the user drops it, and not before: many plans can take turns in one process."""

import gc
import time

import pytest
import torch

import autopar
from autopar.models.load import load_model
from autopar.runtime.launch import Worker, launch

PINS: tuple[tuple[str, ...], ...] = (
    ("dp=2",),
    ("tp=2", "recompute=full"),
    ("dp=2", "zero=1"),
    ("dp=2", "zero=2", "recompute=full"),
    ("dp=2", "zero=3"),
    ("dp=2", "zero=3", "recompute=full+gather"),
    ("pp=2", "schedule=1f1b", "zero=0"),
    ("pp=2", "schedule=zero-bubble", "zero=0"),
)
PATIENCE_S = 10.0


def emitted_graphs() -> int:
    gc.collect()
    return sum(type(x) is torch.fx.Graph for x in gc.get_objects())


def emitted_graphs_settle_at(number: int) -> int:
    """How many there are; threads that communicate may hold the last ones for a moment."""
    end = time.monotonic() + PATIENCE_S
    while (found := emitted_graphs()) != number and time.monotonic() < end:
        time.sleep(0.1)
    return found


def take_turns(worker: Worker) -> None:
    torch.set_num_threads(1)
    loaded = load_model("mlp-tiny", batch=8, device="cpu")

    def train(pins: tuple[str, ...]) -> None:
        model = autopar.parallelize(loaded.module, autopar.Cluster.local(2), loaded.kwargs, pins=pins)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):
            model.train_step(loaded.kwargs)
            optimizer.step()

    train(PINS[0])  # what is made once and kept is there now
    before = emitted_graphs()
    for pins in PINS:
        train(pins)
        assert emitted_graphs_settle_at(before) == before, f"{pins}: something of a module that was dropped is still there"


@pytest.mark.gloo
def test_nothing_of_a_dropped_module_stays() -> None:
    launch(take_turns, 2)


def outlive(worker: Worker) -> None:
    torch.set_num_threads(1)
    loaded = load_model("mlp-tiny", batch=8, device="cpu", dtype="float64")
    loaded.module(**loaded.kwargs).backward()
    for pins in PINS[:5]:
        model = autopar.parallelize(loaded.module, autopar.Cluster.local(2), loaded.kwargs, pins=pins)
        parameters, loss = dict(model.named_parameters()), model(**loaded.kwargs)
        del model
        gc.collect()
        loss.backward()
        for name, p in loaded.module.named_parameters():
            torch.testing.assert_close(parameters[name].grad.full_tensor(), p.grad)


@pytest.mark.gloo
def test_a_loss_may_outlive_its_module() -> None:
    launch(outlive, 2)
