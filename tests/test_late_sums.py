"""The loss of a training step is summed over ranks while the backward runs."""

import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import autopar
from autopar.models.load import load_model
from autopar.planner.plan import plan_graph
from autopar.planner.search import Options
from autopar.rewrite.build import build
from autopar.runtime.launch import Worker, launch
from autopar.runtime.module import ParallelModule
from autopar.runtime.moves import MOVES, late_all_reduce__identity
from autopar.trace.capture import trace

PATIENCE_S = 30.0
DELAY_S = 0.1


def loaded_model(worker: Worker) -> tuple[ParallelModule, dict, torch.nn.Module]:
    torch.set_num_threads(1)
    loaded = load_model("mlp-tiny", batch=8, device="cpu", dtype="float64")
    return autopar.parallelize(loaded.module, autopar.Cluster.local(2), loaded.kwargs, pins=["dp=2"]), loaded.kwargs, loaded.module


def one_after_the_other(worker: Worker, path: str) -> None:
    """The backward of the second rank begins when the first is in its own: its forward has not waited for the second's."""
    model, batch, plain = loaded_model(worker)
    done, end = Path(path), time.monotonic() + PATIENCE_S

    def hook(module: torch.nn.Module, args: tuple) -> None:
        while not done.exists():
            assert time.monotonic() < end, "the forward of one rank waits for that of the other"
            time.sleep(0.01)

    if worker.rank == 1:
        model.register_forward_pre_hook(hook)
    else:
        model.register_forward_hook(lambda *_: done.touch())
    assert model.train_step(batch).item() == pytest.approx(plain(**batch).item(), rel=1e-12)
    plain(**batch).backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad.full_tensor(), p.grad)


@pytest.mark.gloo
def test_a_training_step_does_not_wait_for_the_sum_of_its_loss(tmp_path: Path) -> None:
    launch(one_after_the_other, 2, str(tmp_path / "done"))


def read_at_once(worker: Worker) -> None:
    model, batch, plain = loaded_model(worker)
    for read in (torch.tensor, lambda x: torch.zeros((), dtype=x.dtype).add_(torch.ones_like(x), alpha=x.detach()), torch.Tensor.item):
        time.sleep(DELAY_S * worker.rank)
        assert float(read(model(**batch))) == pytest.approx(plain(**batch).item(), rel=1e-12)
        time.sleep(DELAY_S * worker.rank)
        assert float(read(model.evaluate(batch))) == pytest.approx(plain(**batch).item(), rel=1e-12)


@pytest.mark.gloo
def test_the_loss_of_a_call_is_there_when_it_returns() -> None:
    launch(read_at_once, 2)


def scaled(worker: Worker) -> None:
    model, batch, plain = loaded_model(worker)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    loss = model.train_step(batch, scaler=scaler)
    expected = plain(**batch)
    (8.0 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad.full_tensor(), p.grad)


@pytest.mark.gloo
def test_a_scaler_scales_what_is_differentiated() -> None:
    launch(scaled, 2)


class Noting(nn.Module):
    """Its loss may be noted in a buffer as well."""

    def __init__(self, *, notes: bool) -> None:
        super().__init__()
        self.notes = notes
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss = self.linear(x).square().sum()
        if self.notes:
            self.seen.copy_(loss.detach())
        return loss


@pytest.mark.parametrize("notes", [False, True])
def test_only_what_nothing_else_reads_is_summed_late(notes: bool) -> None:
    """A buffer takes over its new value before the backward."""
    traced = trace(Noting(notes=notes), (torch.randn(4, 4),))
    program = plan_graph(traced.graph, autopar.Cluster.local(2), Options(pins=("dp=2",))).program
    called = {node.target for module in build(program, traced).module.modules() if isinstance(module, GraphModule) for node in module.graph.nodes}
    assert (late_all_reduce__identity in called, MOVES["all_reduce", "identity"] in called) == (not notes, notes)

