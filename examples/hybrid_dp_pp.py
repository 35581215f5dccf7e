"""Two pipelines of two stages side by side: where the ranks sit, and that ten steps equal those of one process.

    python examples/hybrid_dp_pp.py

A 100-200-200-10 network on 4 devices, dp2 x pp2, batch 32, Adam. Stage 0 is on ranks 0 and 1, stage 1 on ranks 2 and 3. Each
replica trains on half of the batch in 4 microbatches; a gradient is the sum over both, of shares of one global mean. All in float64.
"""

import copy
from dataclasses import dataclass

import torch
from lockstep import Lockstep
from torch import nn
from torch.nn import functional as F

from autopar.core.mesh import Mesh
from autopar.schedules.check import check
from autopar.schedules.lower import add_updates, make_schedule

MESH = Mesh.of(pp=2, dp=2)
BATCH, MICROBATCHES, STEPS = 32, 4, 10


@dataclass(frozen=True)
class Outcome:
    output_shape: tuple[int, ...]
    losses: list[float]
    worst_gradient: float
    worst_parameter: float
    replicas_differ: float


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def train() -> Outcome:
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(100, 200), nn.ReLU()), nn.Sequential(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))]
    replicas = [[copy.deepcopy(stage).double() for stage in stages] for _ in range(2)]
    whole = nn.Sequential(*(copy.deepcopy(stage).double() for stage in stages))
    x, labels = torch.randn(BATCH, 100, dtype=torch.float64), torch.randint(0, 10, (BATCH,))
    xs = [half.chunk(MICROBATCHES) for half in x.chunk(2)]
    ys = [half.chunk(MICROBATCHES) for half in labels.chunk(2)]

    schedule = add_updates(make_schedule("1f1b", 2, MICROBATCHES), replicas=2, step=False)
    check(schedule)
    pipeline = Lockstep(replicas, schedule)
    params = [[p for stage in stages for p in stage.parameters()] for stages in replicas]
    optimizers = [torch.optim.Adam(own, lr=1e-3) for own in params]
    reference = torch.optim.Adam(whole.parameters(), lr=1e-3)
    losses, worst_gradient = [], 0.0
    for _ in range(STEPS):
        for optimizer in (*optimizers, reference):
            optimizer.zero_grad()
        losses.append(pipeline.step(xs, lambda y, replica, m: F.cross_entropy(y, ys[replica][m], reduction="sum") / BATCH))
        F.cross_entropy(whole(x), labels).backward()
        for own in params:
            worst_gradient = max(worst_gradient, *(relative(p.grad, q.grad) for p, q in zip(own, whole.parameters(), strict=True)))
        for optimizer in (*optimizers, reference):
            optimizer.step()
    worst_parameter = max(relative(p, q) for own in params for p, q in zip(own, whole.parameters(), strict=True))
    differ = max(float((p - q).detach().abs().max()) for p, q in zip(*params, strict=True))
    output = torch.cat([replicas[r][1](replicas[r][0](half)) for r, half in enumerate(x.chunk(2))])
    return Outcome(tuple(output.shape), losses, worst_gradient, worst_parameter, differ)


def main() -> None:
    for stage, ranks in enumerate(MESH.groups((MESH.names.index("dp"),))):
        print(f"stage {stage} on ranks {set(ranks)}")
    outcome = train()
    print(f"output {outcome.output_shape}; loss {outcome.losses[0]:.4f} -> {outcome.losses[-1]:.4f} in {STEPS} steps")
    print(f"against one process: gradients within {outcome.worst_gradient:.1e}, parameters within {outcome.worst_parameter:.1e}")


if __name__ == "__main__":
    main()
