"""Optimizer state on the host: what stays on the device, and what travels between the two in a step.

    python examples/zero_offload.py [--width 2048] [--processes 4]

The network of zero_memory.py in float32. Device: all tensors that are alive between two microbatches, without the batch and without
what the optimizer holds (its parameters, their gradients, its moments), which is the host's. Per step gradients go down and
updated parameters come up; with ZeRO every rank moves its own part only. (On a machine without an accelerator both are the same
memory, but the copies are made and counted.)

The second table is the price: how much of a device's speed is left when state is fetched at every use (ZeRO-Infinity, section 4).
"""

import argparse
import warnings
from dataclasses import dataclass

import torch
from resident import alive, bytes_of, of_training, worst_difference
from torch import Tensor
from zero_memory import LEARNING_RATE, STAGES, Settings, train_alone

import autopar
from autopar.cost_models.offload import checkpoint_intensity, efficiency, optimizer_intensity, parameter_intensity
from autopar.runtime.launch import Worker, launch

DEVICE = ("4X + 4X", "4X + 4X", "4X + 4X/N", "0 + 4X/N")
"""Bytes of parameters and gradients; stage 3 gathers parameters from the hosts at each use."""

PEAK_FLOPS_PER_S = 70e12
SEQ = 1024


@dataclass(frozen=True)
class Row:
    """What one stage was measured to do, on rank 0."""

    stage: int
    parameters: int
    device_bytes: int
    host_bytes: int
    down_bytes: int
    up_bytes: int
    as_predicted: bool
    difference: float


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
    model = autopar.parallelize(settings.model(), autopar.Cluster.local(settings.processes), batches[0], plan=autopar.Plan.from_json(plan))
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
    host = bytes_of(of_training(model, optimizer))
    device = bytes_of(alive()) - bytes_of(before) - host
    moved = {primitive: num_bytes for (primitive, _, _), num_bytes in counted[0].input_bytes}
    elements = sum(p.numel() for p in model.parameters())
    return Row(stage, elements, device, host, moved["to_host"], moved["to_device"], all(ledger == model.predicted for ledger in counted), difference)


def run(settings: Settings) -> list[Row]:
    with torch.device("meta"):
        model, batch = settings.model(), settings.batches()[0]
    cluster = autopar.Cluster.local(settings.processes)
    plans = [autopar.plan(model, cluster, batch, pins=(f"dp={settings.processes}", f"zero={stage}"), offload=True).to_json() for stage in STAGES]
    rows: list[Row] = []
    launch(measure, settings.processes, settings, plans, on_message=rows.append, preload=("autopar.api",))
    return rows


def expected_bytes(stage: int, parameters: int, ranks: int) -> tuple[float, float, float]:
    """(on the device, gradients down, parameters up) in float32: four bytes an element, a rank's part of them from stage 1 on."""
    whole, part = 4 * parameters, 4 * parameters / ranks
    on_device = ((whole if stage < 3 else 0) + (whole if stage < 2 else part), part if stage else whole)
    return on_device[0], on_device[1], on_device[1] * (2 if stage == 3 else 1)


def show_runs(settings: Settings) -> None:
    n = settings.processes
    print(f"{settings.depth} x (Linear({settings.width}, {settings.width}) + ReLU), Adam on the host, float32, batch {settings.batch}, N = {n}; GiB")
    print("stage  on the device: formula  measured  on the host  gradients down  formula  parameters up  formula  = predicted  difference to one process")
    for row in run(settings):
        device, down, up = (b / 2**30 for b in expected_bytes(row.stage, row.parameters, n))
        print(
            f"{row.stage:5}  {DEVICE[row.stage]:<12}{device:10.3f}  {row.device_bytes / 2**30:8.3f}  {row.host_bytes / 2**30:11.3f}  {row.down_bytes / 2**30:14.3f}  {down:7.3f}"
            f"  {row.up_bytes / 2**30:13.3f}  {up:7.3f}  {'yes' if row.as_predicted else 'NO':>11}  {row.difference:.1e}"
        )


def efficiencies() -> list[tuple[str, float, float]]:
    """(what is fetched, published efficiency, ours) at 70 TFLOP/s and sequences of 1024."""
    return [
        ("parameters and gradients, batch 1, 70 GB/s", 0.506, efficiency(parameter_intensity(SEQ, 1), 70e9, PEAK_FLOPS_PER_S)),
        ("optimizer state, batch 2, 1.5 TB/s", 0.916, efficiency(optimizer_intensity(SEQ, 2), 1.5e12, PEAK_FLOPS_PER_S)),
        ("activation checkpoints, hidden 2048, 2 GB/s", 0.58, efficiency(checkpoint_intensity(2048), 2e9, PEAK_FLOPS_PER_S)),
    ]


def main(settings: Settings) -> None:
    show_runs(settings)
    print("\nefficiency when fetched at every use           published   ours")
    for what, published, ours in efficiencies():
        print(f"  {what:<44}{100 * published:8.3g} %{100 * ours:8.1f} %")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("width", "depth", "batch", "processes", "steps"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings(), name), metavar="N")
    main(Settings(**vars(parser.parse_args())))
