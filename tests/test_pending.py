"""The loss of a step is summed over ranks while the backward runs, and waited for by whoever reads it."""

import copy
import io
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import autopar
from autopar.models.load import load_model
from autopar.runtime.launch import Worker, launch
from autopar.runtime.module import ParallelModule
from autopar.runtime.pending import Pending

PATIENCE_S = 30.0
DELAY_S = 0.1


def loaded_model(worker: Worker) -> tuple[ParallelModule, dict, torch.nn.Module]:
    torch.set_num_threads(1)
    loaded = load_model("mlp-tiny", batch=8, device="cpu", dtype="float64")
    return autopar.parallelize(loaded.module, autopar.Cluster.local(2), loaded.kwargs, pins=["dp=2"]), loaded.kwargs, loaded.module


def one_after_the_other(worker: Worker, path: str) -> None:
    """The second rank begins its forward when the first has ended its own."""
    model, batch, _ = loaded_model(worker)
    done, end = Path(path), time.monotonic() + PATIENCE_S
    while worker.rank == 1 and not done.exists():
        assert time.monotonic() < end, "the forward of one rank waits for that of the other"
        time.sleep(0.01)
    loss = model(**batch)
    assert isinstance(loss, Pending)
    done.touch()
    loss.backward()
    assert loss.work is not None, "somebody read the loss"
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.gloo
def test_a_forward_does_not_wait_for_other_ranks(tmp_path: Path) -> None:
    launch(one_after_the_other, 2, str(tmp_path / "done"))


def saved(loss: torch.Tensor) -> float:
    file = io.BytesIO()
    torch.save(loss.detach(), file)
    file.seek(0)
    return torch.load(file).item()


def filled(loss: torch.Tensor) -> float:
    found = torch.zeros((), dtype=loss.dtype)
    with torch.no_grad():
        found.copy_(loss)
    return found.item()


READ: dict[str, Callable[[torch.Tensor], float]] = {
    "float": float, "item": torch.Tensor.item, "text": lambda x: float(f"{x:.17g}"), "numpy": lambda x: float(x.detach().numpy()), "data": lambda x: x.data.item(),
    "product": lambda x: (x * 2).item() / 2, "list": lambda x: x.tolist(), "copy": lambda x: copy.deepcopy(x.detach()).item(), "saved": saved, "stack": lambda x: torch.stack([x, x])[1].item(),
    "filled": filled, "operator": lambda x: torch.ops.aten.add.Tensor(x, 0.0).item(), "functional": lambda x: F.relu(x).item(),
}  # fmt: skip


def read(worker: Worker) -> None:
    model, batch, plain = loaded_model(worker)
    expected = plain(**batch).item()
    for name, reader in READ.items():
        time.sleep(DELAY_S * worker.rank)
        assert reader(model(**batch)) == pytest.approx(expected, rel=1e-12), name


@pytest.mark.gloo
def test_whoever_reads_the_number_waits_for_it() -> None:
    launch(read, 2)


def differentiated(worker: Worker) -> None:
    """Through an operator of the user's, and twice from the same loss."""
    model, batch, plain = loaded_model(worker)
    plain(**batch).backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    for differentiate, times in ((lambda x: (3 * x).backward(), 3), (lambda x: x.backward(torch.tensor(2.0, dtype=x.dtype)), 2), (lambda x: torch.autograd.backward([x]), 1)):
        model.zero_grad()
        differentiate(model(**batch))
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad.full_tensor(), times * expected[name])


@pytest.mark.gloo
def test_gradients_of_what_is_made_of_it() -> None:
    launch(differentiated, 2)
