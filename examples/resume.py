"""Training that survives being killed: it saves every few steps, and goes on from the newest checkpoint when it is started again.

    torchrun --nproc-per-node 2 --max-restarts 100 examples/resume.py FOLDER [--steps 300] [--every 5]

Kill a rank, or all, whenever you like (`kill -9`): torchrun starts the ranks anew, and the weights at the end are those of a run
that was never disturbed, bit for bit. Dropout, the data and the learning rate go on where they were.
"""

import argparse
import sys
from dataclasses import dataclass

import torch
from torch import nn

import autopar
from autopar.errors import AutoparError
from autopar.runtime.launch import Worker, launch


@dataclass(frozen=True)
class Settings:
    """What is trained, and where its checkpoints are."""

    folder: str
    steps: int = 300
    every: int = 5
    hidden: int = 32
    batch: int = 8
    pins: tuple[str, ...] = ("dp=2",)


def build(settings: Settings) -> nn.Module:
    """The same weights in every process."""
    torch.manual_seed(0)
    hidden = settings.hidden
    return nn.Sequential(nn.Linear(8, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 1), nn.Flatten(0))


class Loss(nn.Module):
    """The mean squared error of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.model(x), y)


def batch(settings: Settings, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The next global batch of an endless stream: where it stands is the generator's state."""
    x = torch.randn(settings.batch, 8, generator=generator)
    return x, x.prod(1).sin()


def train(worker: Worker, settings: Settings) -> None:
    """What one rank does. All that is not in the module or the optimizer is in `state`."""
    data = torch.Generator().manual_seed(1)
    example = batch(settings, torch.Generator())
    model = autopar.parallelize(Loss(build(settings)), autopar.Cluster.local(worker.num_ranks), example, pins=settings.pins)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    first = 0
    if state := autopar.load_checkpoint(settings.folder, model, optimizer):
        first = state["step"]
        data.set_state(state["data"])
        schedule.load_state_dict(state["schedule"])
    worker.send((first, None))
    for step in range(first + 1, settings.steps + 1):
        loss = model.train_step(batch(settings, data))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % settings.every == 0 or step == settings.steps:
            state = {"step": step, "data": data.get_state(), "schedule": schedule.state_dict()}
            autopar.save_checkpoint(settings.folder, model, optimizer, state)
            worker.send((step, float(loss)))


def show(message: tuple[int, float | None]) -> None:
    step, loss = message
    print(f"step {step:5d}  " + ("starting here" if loss is None else f"loss {loss:.6f}, saved"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the checkpoints are; created if it is not there")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--every", type=int, default=Settings.every, help="steps from one checkpoint to the next")
    given = parser.parse_args()
    settings = Settings(given.folder, given.steps, given.every)
    launch(train, 2, settings, on_message=show, preload=("autopar.api",))


if __name__ == "__main__":
    try:
        main()
    except AutoparError as error:
        sys.exit(f"resume: {error}")
