"""ZeRO's table, measured: what every stage keeps on a rank and what it communicates, on real processes.

    python examples/zero_memory.py [--width 2048] [--processes 4]

8 x (Linear + ReLU), Adam, batch 32, data parallel. X is the number of parameters, N that of ranks.

memory    All tensors that are alive between two microbatches of a step, batch left out: the moment at which a stage holds what
          it is defined by. (Without accumulation, gradients of stage 1 leave as early as those of stage 2.)
traffic   Elements received by a rank in a step without accumulation: counted by the runtime, and what the plan predicts.
equal     Largest relative difference of losses and parameters to plain PyTorch in one process, after all steps.

The bytes expected follow from the dtypes alone. In float32 Adam keeps 4 + 4 + 8 bytes a parameter, so ZeRO-1 and 2 can save half and
three quarters; only mixed precision, 2 + 2 + 12, has the famous quarter and eighth, and both are limits of many ranks.
(Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, figure 1 and section 5.)
"""

import argparse
import warnings
from dataclasses import asdict, dataclass, replace

import torch
from resident import alive, bytes_of, worst_difference
from torch import Tensor, nn
from torch.nn import functional as F

import autopar
from autopar.core.graph import DTYPE_BYTES
from autopar.cost_models.memory import StatePolicy, adam, zero_state_bytes
from autopar.runtime.launch import Worker, launch

STAGES = (0, 1, 2, 3)
FORMULAS = {"float32": ("16X", "8X + 8X/N", "4X + 12X/N", "16X/N"), "bfloat16": ("16X", "4X + 12X/N", "2X + 14X/N", "16X/N")}
TRAFFIC = (2, 2, 2, 3)
"""In X (N-1)/N elements: reduce-scatter and all-gather of everything, which stage 3 needs in forward and backward."""

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Settings:
    width: int = 2048
    depth: int = 8
    batch: int = 32
    processes: int = 4
    steps: int = 3
    dtype: str = "float32"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return Regression(self.width, self.depth).to(getattr(torch, self.dtype))

    def batches(self) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        shape = (self.steps, 2, self.batch, self.width)
        return [{"inputs": x, "targets": y} for x, y in torch.randn(shape, generator=generator).to(getattr(torch, self.dtype))]


@dataclass(frozen=True)
class Row:
    """What one stage was measured to do, on rank 0. `traffic` in units of X (N-1)/N elements."""

    stage: int
    parameters: int
    state_bytes: int
    traffic: float
    as_predicted: bool
    difference: float


class Regression(nn.Module):
    """Inputs and targets [batch, width] -> mean squared error."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(self.layers(inputs), targets)


def train_alone(settings: Settings) -> tuple[list[float], dict[str, Tensor]]:
    """Plain PyTorch: losses, and the parameters after all steps. 16-bit weights are updated through float32 copies, by hand."""
    model = settings.model()
    kept = {name: nn.Parameter(p.detach().float() if settings.dtype == "bfloat16" else p.detach().clone()) for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(kept.values(), lr=LEARNING_RATE)
    losses = []
    for batch in settings.batches():
        loss = torch.func.functional_call(model, {name: p.to(getattr(torch, settings.dtype)) for name, p in kept.items()}, kwargs=batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: p.detach() for name, p in kept.items()}


def measure(worker: Worker, settings: Settings, plans: list[str]) -> None:
    """What one rank does: train by every plan in turn. Rank 0 sends a `Row` for each."""
    warnings.simplefilter("ignore")
    expected = train_alone(settings) if worker.rank == 0 else None
    for stage, plan in zip(STAGES, plans, strict=True):
        row = train(settings, stage, plan, expected)
        if worker.rank == 0:
            worker.send(row)


def train(settings: Settings, stage: int, plan: str, expected: tuple[list[float], dict[str, Tensor]] | None) -> Row:
    batches = settings.batches()
    before = alive()
    cluster = autopar.Cluster.local(settings.processes)
    model = autopar.parallelize(settings.model(), cluster, batches[0], plan=autopar.Plan.from_json(plan))
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    losses, counted = [], []
    for batch in batches:
        optimizer.zero_grad()
        losses.append(float(model.train_step(batch)))
        counted.append(model.counted())
        optimizer.step()
    whole = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
    difference = 0.0 if expected is None else worst_difference(losses, whole, *expected)
    del whole
    optimizer.zero_grad()
    with model.no_sync():
        model.train_step(batches[0])
    state_bytes = bytes_of(alive()) - bytes_of(before)
    elements = sum(p.numel() for p in model.parameters())
    received = sum(counted[0].moved.values()) / DTYPE_BYTES[settings.dtype]
    share = elements * (settings.processes - 1) / settings.processes
    return Row(stage, elements, state_bytes, received / share, all(ledger == model.predicted for ledger in counted), difference)


def run(settings: Settings) -> list[Row]:
    """Plan once for every stage, then train by all plans on the same processes."""
    with torch.device("meta"):
        model, batch = settings.model(), settings.batches()[0]
    cluster = autopar.Cluster.local(settings.processes)
    plans = [autopar.plan(model, cluster, batch, pins=(f"dp={settings.processes}", f"zero={stage}")).to_json() for stage in STAGES]
    rows: list[Row] = []
    launch(measure, settings.processes, settings, plans, on_message=rows.append, preload=("autopar.api",))
    return rows


def show_runs(settings: Settings) -> None:
    n, policy = settings.processes, adam(settings.dtype)
    print(f"{settings.depth} x (Linear({settings.width}, {settings.width}) + ReLU), {words(policy)}, batch {settings.batch}, N = {n}")
    print("stage  memory by the formula             measured    traffic / X(N-1)/N  expected  = predicted  difference to one process")
    for row in run(settings):
        formula = zero_state_bytes(row.parameters, n, row.stage, policy)
        print(
            f"{row.stage:5}  {FORMULAS[settings.dtype][row.stage]:<12} {formula / 2**30:8.3f} GiB  {row.state_bytes / 2**30:12.3f} GiB  {row.traffic:18.3f}"
            f"  {TRAFFIC[row.stage]:8}  {'yes' if row.as_predicted else 'NO':>11}  {row.difference:.1e}"
        )


def words(policy: StatePolicy) -> str:
    return f"Adam, {policy.parameter} ({policy.parameter_bytes} + {policy.gradient_bytes} + {policy.optimizer_bytes} bytes a parameter)"


def show_limits() -> None:
    """What of all state remains: the famous fractions are limits, and depend on the dtypes."""
    print("\nshare of the state that stays   " + "".join(f"{f'N = {n}':>9}" for n in (4, 8, 32, 64)) + "    limit")
    for dtype in FORMULAS:
        policy = adam(dtype)
        for stage in STAGES[1:]:
            shares = [zero_state_bytes(1, n, stage, policy) / policy.total_bytes for n in (4, 8, 32, 64)]
            print(f"  {dtype:<10} ZeRO-{stage}             " + "".join(f"{share:9.4f}" for share in shares) + f"  {limit(stage, policy):7}")


def limit(stage: int, policy: StatePolicy) -> str:
    """The part that no number of ranks divides, as a fraction."""
    parts = (policy.parameter_bytes if stage < 3 else 0) + (policy.gradient_bytes if stage < 2 else 0)
    return f"1/{policy.total_bytes // parts}" if parts else "1/N"


def show_large() -> None:
    sizes = [zero_state_bytes(7.5e9, 64, stage, adam("bfloat16")) / 1e9 for stage in STAGES]
    print("\n7.5 B parameters, mixed precision, 64 devices: " + " / ".join(f"{size:.1f}" for size in sizes) + " GB  (published: 120.0 / 31.4 / 16.6 / 1.9)")


def main(settings: Settings) -> None:
    show_runs(settings)
    print()
    show_runs(replace(settings, dtype="bfloat16", batch=settings.processes))  # few samples: not every processor is quick in 16 bits
    print("(stage 3 keeps no 16-bit copy of its part between uses: it is made of the float32 one when it is gathered)")
    show_limits()
    show_large()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Settings()).items():
        if name != "dtype":
            parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    main(Settings(**vars(parser.parse_args())))
