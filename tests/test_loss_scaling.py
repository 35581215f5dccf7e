"""float16 with torch's own GradScaler: where the gradients of one rank overflow, every rank leaves out the step and lowers the scale."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import autopar
from autopar.runtime.launch import Worker, launch

STEPS = 6
FIRST_SCALE = 2.0**15
"""The largest that a float16 loss can be scaled by."""
WIDTH, BATCH = 8, 8


class LastRowsLarge(nn.Module):
    """inputs [b, 8] -> a loss whose gradient is large in the last output rows only: those that the last rank stores."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("weights", torch.tensor([0.01] * (WIDTH - 2) + [8.0] * 2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (self.linear(inputs) * self.weights).sum() / inputs.shape[0]


@dataclass(frozen=True)
class Seen:
    """Of one rank: the scale after every step, whether its own gradients were finite, and the whole weight at the end."""

    scales: tuple[float, ...]
    finite: tuple[bool, ...]
    weight: list[list[float]]


def make() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return LastRowsLarge().half(), {"inputs": torch.rand(BATCH, WIDTH).half() + 0.5}


def train(worker: Worker, pins: tuple[str, ...], micro_batches: int) -> None:
    model, batch = make()
    module = autopar.parallelize(model, autopar.Cluster.local(worker.num_ranks), batch, pins=pins, micro_batches=micro_batches)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=1000)
    scales, finite = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        module.train_step(batch, scaler=scaler)
        finite.append(all(bool(p.grad.to_local().isfinite().all()) for p in module.parameters()))
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    weight = module.get_parameter("linear.weight").detach().full_tensor()
    worker.send((worker.rank, Seen(tuple(scales), tuple(finite), weight.tolist())))


def one_process() -> tuple[tuple[float, ...], torch.Tensor]:
    """The same in plain PyTorch, with a float32 copy of the weight."""
    model, batch = make()
    kept = nn.Parameter(model.linear.weight.detach().float())
    optimizer = torch.optim.SGD([kept], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=1000)
    scales = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(torch.func.functional_call(model, {"linear.weight": kept.half()}, kwargs=batch)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return tuple(scales), kept.detach()


@pytest.mark.gloo
@pytest.mark.parametrize("pins,micro_batches", [(("dp=2", "zero=2"), 1), (("dp=2", "zero=3"), 2), (("tp=2",), 1)], ids=str)
def test_one_rank_overflows(pins: tuple[str, ...], micro_batches: int) -> None:
    scales, weight = one_process()
    assert scales[0] < FIRST_SCALE
    assert scales[-1] == scales[-2], "the last steps are taken"
    seen: dict[int, Seen] = {}
    launch(train, 2, pins, micro_batches, on_message=lambda message: seen.update([message]), preload=("autopar.api",))
    assert [seen[rank].finite[0] for rank in (0, 1)] == [True, False]
    for rank in (0, 1):
        assert seen[rank].scales == scales
        assert torch.allclose(torch.tensor(seen[rank].weight), weight, rtol=1e-2)
