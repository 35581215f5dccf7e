"""A network cut in two: what crosses the cut, predicted and counted, and that training is the same as in one piece.

    python examples/model_in_two_parts.py

10-20 | 20-10-2, batch 64, SGD 0.01, 5 steps. The cut carries 64 x 20 activations forward and as many gradients back: 2 x 64 x 20 x 4 bytes.
The schedule is the naive one: one batch, and one of the two parts always idle.
"""

import copy
from dataclasses import dataclass

import torch
from lockstep import Lockstep
from torch import nn
from torch.nn import functional as F

from autopar.cost_models.pipeline import EdgeCost, PipelineCost, received_bytes
from autopar.cost_models.timeline import simulate
from autopar.schedules.check import check
from autopar.schedules.lower import make_schedule

BATCH, CUT, STEPS = 64, 20, 5


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    one_piece: list[float]
    predicted_bytes: int
    counted_bytes: int
    idle: float
    worst_difference: float


def train(dtype: torch.dtype = torch.float32) -> Outcome:
    torch.manual_seed(0)
    first, second = nn.Sequential(nn.Linear(10, CUT), nn.ReLU()), nn.Sequential(nn.Linear(CUT, 10), nn.ReLU(), nn.Linear(10, 2))
    parts = [first.to(dtype), second.to(dtype)]
    whole = copy.deepcopy(nn.Sequential(*parts))
    x, labels = torch.randn(BATCH, 10, dtype=dtype), torch.randint(0, 2, (BATCH,))

    schedule = make_schedule("naive", 2, 1)
    check(schedule)
    size = BATCH * CUT * dtype.itemsize
    cost = PipelineCost(PipelineCost.uniform(2).stages, (EdgeCost(activation_bytes=size, gradient_bytes=size),))
    pipeline = Lockstep([parts], schedule)
    here = torch.optim.SGD([p for part in parts for p in part.parameters()], lr=0.01)
    there = torch.optim.SGD(whole.parameters(), lr=0.01)
    losses, one_piece = [], []
    for _ in range(STEPS):
        here.zero_grad()
        losses.append(pipeline.step([[x]], lambda y, replica, m: F.cross_entropy(y, labels)))
        here.step()
        there.zero_grad()
        loss = F.cross_entropy(whole(x), labels)
        loss.backward()
        one_piece.append(loss.item())
        there.step()
    worst = max(float((p - q).detach().abs().max()) for p, q in zip((p for part in parts for p in part.parameters()), whole.parameters(), strict=True))
    counted = sum(pipeline.received_bytes.values()) // STEPS
    return Outcome(losses, one_piece, sum(received_bytes(schedule, cost)), counted, simulate(schedule, cost).bubble_fraction, worst)


def main() -> None:
    outcome = train()
    for step, (loss, same) in enumerate(zip(outcome.losses, outcome.one_piece, strict=True), start=1):
        print(f"step {step}: loss {loss:.4f} in two parts, {same:.4f} in one")
    print(f"crossing the cut per step: {outcome.predicted_bytes} bytes predicted, {outcome.counted_bytes} counted")
    print(f"largest difference of a parameter after {STEPS} steps: {outcome.worst_difference:.1e}")
    print(f"idle share of the two devices: {outcome.idle:.2f}")


if __name__ == "__main__":
    main()
