"""What a training step costs, beside the ways of torch to run the same step: eager, DistributedDataParallel, hand-cut TP, FSDP2
with and without resharding after the forward, DistributedDataParallel with ZeroRedundancyOptimizer.

    python examples/benchmark_step.py [--pairs 15] [--only TEXT] [--json]

A case starts N gloo processes with one thread each. Each process holds both versions, made from the same weights, and they
take turns: a step of ours, a step of theirs, with a barrier around both. Shown is the median over pairs of ours / theirs
(forward, backward, SGD step) by the clock, the same in processor time of rank 0 (which other programs on the machine disturb
less, but which does not see a rank wait), and the largest relative difference of the losses, which must vanish: both train.
Ours gets the whole batch on every rank and takes its share itself (`train_step`); DistributedDataParallel gets its slice. Both return the loss
of the whole batch on every rank: ours sums it while its backward runs, the others by an all-reduce at the end of the step.

ZeRO-1 is compared under AdamW, the same on both sides: with `fused=True`, and ("looped") with what torch does by default on a
CPU, one operator and one parameter at a time, which on parameters that are DTensors costs 0.4 ms a parameter before any arithmetic.
"""

import argparse
import copy
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import autopar
from autopar.models.load import load_model
from autopar.runtime.module import ParallelModule

LEARNING_RATE = 0.001
"""So small that rounding has not grown into the losses after some hundred steps on one batch."""

ADAM_RATE = 1e-4
MAX_LOSS_ERROR = 1e-4
WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """One row: a model, a number of processes and what ours is compared with."""

    name: str
    baseline: str
    ranks: int
    pins: tuple[str, ...]
    target: float
    spec: str
    batch: int
    seq: int
    overrides: dict[str, Any] = field(default_factory=dict)


def gpt2(hidden: int, layers: int) -> dict[str, Any]:
    return {"n_embd": hidden, "n_layer": layers, "n_head": hidden // 64, "vocab_size": 4096, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def plain(hidden: int, layers: int) -> dict[str, Any]:
    return {"hidden": hidden, "layers": layers, "heads": hidden // 64, "vocab": 4096, "positions": 256}


CASES = (
    Case("gpt2 256 x2, seq 128", "eager", 1, (), 1.02, "gpt2", 4, 128, gpt2(256, 2)),
    Case("gpt2 768 x4, seq 256", "eager", 1, (), 1.02, "gpt2", 2, 256, gpt2(768, 4)),
    Case("transformer 512 x4, seq 128", "eager", 1, (), 1.02, "transformer", 4, 128, plain(512, 4)),
    Case("gpt2 256 x4, seq 128", "DDP", 2, ("dp=2",), 1.0, "gpt2", 8, 128, gpt2(256, 4)),
    Case("transformer 512 x4, seq 128", "DDP", 2, ("dp=2",), 1.0, "transformer", 8, 128, plain(512, 4)),
    Case("gpt2 256 x2, seq 128", "DDP", 4, ("dp=4",), 1.0, "gpt2", 8, 128, gpt2(256, 2)),
    Case("transformer 512 x4, seq 128", "TP", 2, ("tp=2",), 1.0, "transformer", 4, 128, plain(512, 4)),
    Case("transformer 256 x2, seq 128", "TP", 4, ("tp=4",), 1.0, "transformer", 4, 128, plain(256, 2)),
    Case("transformer 512 x4, seq 128", "FSDP2", 2, ("dp=2", "zero=3"), 1.0, "transformer", 8, 128, plain(512, 4)),
    Case("transformer 256 x4, seq 128", "FSDP2", 4, ("dp=4", "zero=3"), 1.0, "transformer", 8, 128, plain(256, 4)),
    Case("transformer 512 x4, seq 128", "FSDP2 kept", 2, ("dp=2", "zero=2"), 1.0, "transformer", 8, 128, plain(512, 4)),
    Case("transformer 256 x4, seq 128", "FSDP2 kept", 4, ("dp=4", "zero=2"), 1.0, "transformer", 8, 128, plain(256, 4)),
    Case("transformer 1024 x2, seq 128", "ZeRO-1", 2, ("dp=2", "zero=1"), 1.0, "transformer", 8, 128, plain(1024, 2)),
    Case("transformer 256 x4, seq 128", "ZeRO-1", 4, ("dp=4", "zero=1"), 1.0, "transformer", 8, 128, plain(256, 4)),
    Case("transformer 1024 x2, seq 128", "ZeRO-1 looped", 2, ("dp=2", "zero=1"), 1.0, "transformer", 8, 128, plain(1024, 2)),
    Case("transformer 256 x4, seq 128", "ZeRO-1 looped", 4, ("dp=4", "zero=1"), 1.0, "transformer", 8, 128, plain(256, 4)),
)
BATCH_PER_RANK = ("DDP", "FSDP2", "FSDP2 kept", "ZeRO-1", "ZeRO-1 looped")
"""Baselines that give every rank its slice of the batch."""


def loss_of(out: Any) -> torch.Tensor:
    return out.loss if hasattr(out, "loss") else out


def their_module(case: Case, module: nn.Module) -> nn.Module:
    """The same model in torch's own way."""
    if case.baseline == "DDP" or case.baseline.startswith("ZeRO-1"):
        return DistributedDataParallel(module)
    if case.baseline.startswith("FSDP2"):
        mesh = init_device_mesh("cpu", (case.ranks,))
        for block in module.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=case.baseline == "FSDP2")
        return fully_shard(module, mesh=mesh, reshard_after_forward=case.baseline == "FSDP2")
    if case.baseline == "TP":
        mesh = init_device_mesh("cpu", (case.ranks,))
        cut = {name: ColwiseParallel() for name in ("q", "k", "v", "up")} | {name: RowwiseParallel() for name in ("o", "down")}
        for block in module.blocks:
            parallelize_module(block, mesh, cut)
            block.heads //= case.ranks
        parallelize_module(module, mesh, {"token": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel(output_layouts=Replicate())})
    return module


def optimizer_of(case: Case, module: nn.Module, *, ours: bool) -> torch.optim.Optimizer:
    """SGD, so that the step shows; AdamW where the sharding of its state is what is compared."""
    if not case.baseline.startswith("ZeRO-1"):
        return torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    settings = {"lr": ADAM_RATE, "fused": case.baseline == "ZeRO-1"}
    if ours:
        return torch.optim.AdamW(module.parameters(), **settings)
    return ZeroRedundancyOptimizer(module.parameters(), optimizer_class=torch.optim.AdamW, **settings)


def trained(module: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Forward and backward, each in its own words; the loss."""
    if isinstance(module, ParallelModule):
        return module.train_step(batch)
    loss = loss_of(module(**batch))
    loss.backward()
    return loss.detach()


def stepper(module: nn.Module, batch: dict[str, Any], optimizer: torch.optim.Optimizer, *, mean: bool = False) -> Callable[[], torch.Tensor]:
    """A whole training step as one call. `mean`: the loss is that of this rank's slice, and the mean over ranks is wanted."""

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = trained(module, batch)
        optimizer.step()
        if mean:
            dist.all_reduce(loss, dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
            loss = loss if dist.get_backend() == "nccl" else loss / dist.get_world_size()
        return loss

    return step


def slice_of(batch: dict[str, Any], case: Case) -> dict[str, Any]:
    """What a rank of the baseline is given."""
    if case.baseline not in BATCH_PER_RANK:
        return batch
    return {k: v.chunk(case.ranks)[dist.get_rank()] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def timed(step: Callable[[], torch.Tensor]) -> tuple[float, float, torch.Tensor]:
    """Wall seconds until all ranks are done, processor seconds of this rank, loss."""
    dist.barrier()
    start, busy = time.perf_counter(), time.process_time()
    loss = step()
    busy = time.process_time() - busy
    dist.barrier()
    return time.perf_counter() - start, busy, loss


def run_case(case: Case, pairs: int) -> dict[str, Any]:
    """On every rank: alternate both versions; returns the row (the same on all ranks but for noise)."""
    loaded = load_model(case.spec, batch=case.batch, seq=case.seq, device="cpu", overrides=case.overrides)
    cluster = autopar.Cluster.local(case.ranks)
    ours = autopar.parallelize(copy.deepcopy(loaded.module), cluster, loaded.kwargs, pins=case.pins)
    our_step = stepper(ours, loaded.kwargs, optimizer_of(case, ours, ours=True))
    theirs = their_module(case, loaded.module)
    their_step = stepper(theirs, slice_of(loaded.kwargs, case), optimizer_of(case, theirs, ours=False), mean=case.baseline in BATCH_PER_RANK)
    ratios, busy, times, error = [], [], [], 0.0
    for n in range(WARM_UP + pairs):
        if n % 2:  # who goes first alternates too
            b, b_busy, their_loss = timed(their_step)
            a, a_busy, our_loss = timed(our_step)
        else:
            a, a_busy, our_loss = timed(our_step)
            b, b_busy, their_loss = timed(their_step)
        want = float(their_loss)
        error = max(error, abs(float(our_loss) - want) / abs(want))
        if n >= WARM_UP:
            ratios.append(a / b)
            busy.append(a_busy / b_busy)
            times.append((a, b))
    if not error <= MAX_LOSS_ERROR:
        raise SystemExit(f"{case.name} against {case.baseline}: losses differ by {error:.1e}")
    quarter = statistics.quantiles(ratios, n=4)
    return asdict(case) | {
        "ratio": statistics.median(ratios), "busy_ratio": statistics.median(busy), "low": quarter[0], "high": quarter[2], "loss_error": error,
        "ours_ms": 1e3 * statistics.median(a for a, _ in times), "theirs_ms": 1e3 * statistics.median(b for _, b in times),
    }  # fmt: skip


def worker(number: int, pairs: int) -> None:
    """One rank, as started by `launch`; rank 0 prints the row."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    row = run_case(CASES[number], pairs)
    if dist.get_rank() == 0:
        print(json.dumps(row), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def launch(number: int, pairs: int) -> dict[str, Any]:
    """Run one case in processes of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = CASES[number].ranks
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--pairs", str(pairs), "--worker", str(number)]
    started = [
        subprocess.Popen(command, env=os.environ | common | {"RANK": str(r)}, stdout=subprocess.PIPE, stderr=None if r == 0 else subprocess.DEVNULL, text=True)
        for r in range(ranks)
    ]
    text = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{CASES[number].name} failed")
    return json.loads(text[0].splitlines()[-1])


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Training step, ours / theirs, median over pairs")
    for column in ("model", "ranks", "against", "ratio", "quartiles", "target", "", "processor ratio", "loss error", "ours ms", "theirs ms"):
        table.add_column(column, justify="left" if column in ("model", "against") else "right")
    for r in rows:
        verdict = "met" if r["ratio"] <= r["target"] else "missed"
        table.add_row(r["name"], str(r["ranks"]), r["baseline"], f"{r['ratio']:.3f}", f"{r['low']:.3f} - {r['high']:.3f}", f"{r['target']:.2f}", verdict,
                      f"{r['busy_ratio']:.3f}", f"{r['loss_error']:.0e}", f"{r['ours_ms']:.1f}", f"{r['theirs_ms']:.1f}")  # fmt: skip
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--only", default="", help="run the cases whose model or baseline contains this")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        worker(given.worker, given.pairs)
        return
    rows = [launch(i, given.pairs) for i, case in enumerate(CASES) if given.only in f"{case.name} {case.baseline} {case.ranks}"]
    print(json.dumps(rows, indent=1)) if given.json else show(rows)


if __name__ == "__main__":
    main()
