"""One network under five schedules: the same gradients, different idle time and memory; and what training it gives.

    python examples/pipeline_schedules.py

100-1024-2048-1024-512-10 on 4 ranks, batch 256 in 32 microbatches. Every schedule's list is run by real stages and its gradients are
compared with those of one process (float64). Idle time comes from the simulator: with equal stages, and with this network's
stages weighed by their weights, cut where the search says. Then 50 epochs of Adam on labels that can be learned.
"""

import copy
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from lockstep import Lockstep
from torch import nn
from torch.nn import functional as F

from autopar.core.schedule import Schedule
from autopar.cost_models.pipeline import PipelineCost, StageCost
from autopar.cost_models.timeline import simulate
from autopar.schedules.check import check
from autopar.schedules.lower import make_schedule
from autopar.search.stages import StageOption, cut_into_stages

RANKS = 4
SCHEDULES = (("naive", 1), ("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1))


@dataclass(frozen=True)
class Settings:
    widths: tuple[int, ...] = (100, 1024, 2048, 1024, 512, 10)
    batch: int = 256
    microbatches: int = 32
    epochs: int = 50


@dataclass(frozen=True)
class Row:
    """One schedule: idle share with equal and with this network's stages, microbatches in flight per rank, gradient error."""

    name: str
    idle: float
    own_idle: float
    in_flight: tuple[int, ...]
    error: float


def blocks_of(settings: Settings) -> tuple[list[nn.Module], list[float]]:
    """Linear layers and activations, one module each, and the seconds of a forward per microbatch, up to a factor."""
    modules: list[nn.Module] = []
    cost: list[float] = []
    for i, (n, k) in enumerate(pairwise(settings.widths)):
        modules.append(nn.Linear(n, k, dtype=torch.float64))
        cost.append(n * k / 1e6)
        if i < len(settings.widths) - 2:
            modules.append(nn.ReLU())
            cost.append(k / 1e6)
    return modules, cost


def cut(modules: list[nn.Module], cost: list[float], num_stages: int, microbatches: int) -> tuple[list[nn.Module], list[float]]:
    """The network in balanced stages, with the cost of each."""
    sums = [0.0, *accumulate(cost)]
    plan = cut_into_stages(
        [0.0] * (len(cost) - 1), lambda first, end: [StageOption(num_devices=1, time_s=sums[end] - sums[first])],
        num_microbatches=microbatches, num_devices=num_stages, num_stages=num_stages,
    )  # fmt: skip
    bounds = list(pairwise((*plan.starts, len(cost))))
    return [nn.Sequential(*modules[a:b]) for a, b in bounds], [sums[b] - sums[a] for a, b in bounds]


def compare(settings: Settings) -> list[Row]:
    torch.manual_seed(0)
    modules, cost = blocks_of(settings)
    x = torch.randn(settings.batch, settings.widths[0], dtype=torch.float64)
    labels = torch.randint(0, settings.widths[-1], (settings.batch,))
    whole = nn.Sequential(*copy.deepcopy(modules))
    F.cross_entropy(whole(x), labels).backward()
    rows = []
    for name, virtual in SCHEDULES:
        schedule = make_schedule(name, RANKS, settings.microbatches, virtual)
        check(schedule)
        stages, seconds = cut(copy.deepcopy(modules), cost, schedule.num_stages, settings.microbatches)
        pipeline = Lockstep([stages], schedule)
        train_step(pipeline, x, labels)
        pairs = zip((p for stage in stages for p in stage.parameters()), whole.parameters(), strict=True)
        error = max(float((p.grad - q.grad).norm() / q.grad.norm()) for p, q in pairs)
        own = PipelineCost(tuple(StageCost(forward_s=s, input_gradient_s=s, weight_gradient_s=s) for s in seconds))
        in_flight = tuple(pipeline.peak_in_flight[0, rank] for rank in range(RANKS))
        rows.append(Row(name, idle(schedule, PipelineCost.uniform(schedule.num_stages)), idle(schedule, own), in_flight, error))
    return rows


def idle(schedule: Schedule, cost: PipelineCost) -> float:
    return simulate(schedule, cost).bubble_fraction


def train_step(pipeline: Lockstep, x: torch.Tensor, labels: torch.Tensor) -> float:
    """Adds gradients of the mean over the whole batch, whatever the sizes of the microbatches."""
    count = pipeline.schedule.num_microbatches
    targets = labels.chunk(count)
    return pipeline.step([x.chunk(count)], lambda y, replica, m: F.cross_entropy(y, targets[m], reduction="sum") / len(labels))


def train(settings: Settings) -> list[float]:
    """Losses under 1F1B; the label of a row is the largest of its first entries."""
    torch.manual_seed(0)
    modules, cost = blocks_of(settings)
    stages, _ = cut(modules, cost, RANKS, settings.microbatches)
    stages = [stage.float() for stage in stages]
    x = torch.randn(settings.batch, settings.widths[0])
    labels = x[:, : settings.widths[-1]].argmax(dim=1)
    pipeline = Lockstep([stages], make_schedule("1f1b", RANKS, settings.microbatches))
    optimizer = torch.optim.Adam([p for stage in stages for p in stage.parameters()], lr=1e-3)
    losses = []
    for _ in range(settings.epochs):
        optimizer.zero_grad()
        losses.append(train_step(pipeline, x, labels))
        optimizer.step()
    return losses


def main(settings: Settings | None = None) -> None:
    settings = settings or Settings()
    print("schedule      idle  idle (own stages)  most in flight per rank  gradient error")
    for row in compare(settings):
        print(f"{row.name:12} {row.idle:5.3f}  {row.own_idle:17.3f}  {row.in_flight!s:>23}  {row.error:14.1e}")
    losses = train(settings)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {settings.epochs} epochs")


if __name__ == "__main__":
    main()
