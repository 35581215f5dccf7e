"""What a step of a pipeline costs, beside torch.distributed.pipelining with the same cuts, the same microbatches and the same schedule.

    python examples/benchmark_pipeline.py [--pairs 15] [--only TEXT] [--json]

A case starts N gloo processes with one thread each. Each holds both versions, made from the same weights, and they take turns: a
step of ours, a step of theirs (forwards, backwards, SGD step), with a barrier around both. Shown is the median over pairs of
ours / theirs by the clock, the same in processor time summed over the ranks, and the largest relative difference of the losses.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import pipelining

import autopar
from autopar.core.graph import block_of
from autopar.core.pipeline import Pipeline
from autopar.core.plan import Plan
from autopar.models.load import LoadedModel, load_model
from autopar.planner.plan import plan_graph
from autopar.planner.search import Options
from autopar.runtime.launch import Worker, launch
from autopar.runtime.microbatches import split_batch
from autopar.trace.capture import trace

LEARNING_RATE = 0.05
MAX_LOSS_ERROR = 1e-4
WARM_UP = 3
THEIRS = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
    "zero-bubble": pipelining.ScheduleInterleavedZeroBubble,
}


@dataclass(frozen=True)
class Case:
    """A row: `layers` blocks of a transformer of width `hidden`, in equal stages."""

    schedule: str
    ranks: int
    virtual_stages: int
    micro_batches: int
    hidden: int
    layers: int
    rows: int = 2
    seq: int = 128

    def load(self) -> LoadedModel:
        overrides = {"hidden": self.hidden, "layers": self.layers, "heads": self.hidden // 64, "vocab": 4096, "positions": 256}
        return load_model("transformer", batch=self.rows * self.micro_batches, seq=self.seq, device="cpu", overrides=overrides)

    @property
    def cuts(self) -> list[int]:
        """The first block of every stage but the first."""
        stages = self.ranks * self.virtual_stages
        return [self.layers * s // stages for s in range(1, stages)]

    def plan(self, loaded: LoadedModel) -> Plan:
        graph = trace(loaded.module, (), split_batch(loaded.kwargs, self.micro_batches)[0]).graph
        plan = plan_graph(graph, autopar.Cluster.local(1), Options(micro_batches=self.micro_batches)).plan
        starts = tuple(next(op.name for op in graph.ops if block_of(op.module_path).endswith(f"blocks.{k}")) for k in self.cuts)
        return replace(plan, pipeline=Pipeline(self.ranks, starts, self.schedule))


CASES = (
    Case("gpipe", 2, 1, 4, 512, 4),
    Case("1f1b", 2, 1, 4, 512, 4),
    Case("1f1b", 2, 1, 8, 256, 4),
    Case("1f1b", 4, 1, 8, 256, 4),
    Case("interleaved", 2, 2, 4, 256, 4),
    Case("zero-bubble", 2, 1, 4, 512, 4),
)


class Part(nn.Module):
    """Some of a transformer's blocks, with the embedding before the first and the head behind the last."""

    def __init__(self, model: Any, first: int, end: int) -> None:
        super().__init__()
        self.token, self.position = (model.token, model.position) if first == 0 else (None, None)
        self.blocks = nn.ModuleList(model.blocks[first:end])
        self.norm, self.head = (model.norm, model.head) if end == len(model.blocks) else (None, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.token is not None and self.position is not None:
            x = self.token(x) + self.position(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) if self.head is not None and self.norm is not None else x


def their_step(case: Case, model: Any, batch: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    bounds, rank = [0, *case.cuts, case.layers], dist.get_rank()
    numbers = range(rank, len(bounds) - 1, case.ranks)
    parts = [Part(model, bounds[s], bounds[s + 1]) for s in numbers]
    stages = [pipelining.PipelineStage(part, s, len(bounds) - 1, torch.device("cpu")) for s, part in zip(numbers, parts)]
    single = case.schedule in ("gpipe", "1f1b")
    schedule: Any = THEIRS[case.schedule](stages[0] if single else stages, case.micro_batches, loss_fn=lambda y, labels: F.cross_entropy(y.flatten(0, 1), labels.flatten()))
    optimizer = torch.optim.SGD([p for part in parts for p in part.parameters()], lr=LEARNING_RATE)
    last = rank == case.ranks - 1

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        args = (batch["inputs"],) if rank == 0 else ()
        schedule.step(*args, **({"target": batch["labels"], "losses": losses} if last else {}))
        optimizer.step()
        total = torch.stack([x.detach() for x in losses]).mean() if last else torch.zeros(())
        dist.all_reduce(total)  # ours returns the loss on every rank too
        return total

    return step


def our_step(model: Any, batch: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model.train_step(batch)
        optimizer.step()
        return loss

    return step


def timed(step: Callable[[], torch.Tensor]) -> tuple[float, float, torch.Tensor]:
    """Wall seconds until all ranks are done, processor seconds of all, loss."""
    dist.barrier()
    start, busy = time.perf_counter(), time.process_time()
    loss = step()
    used = torch.tensor(time.process_time() - busy, dtype=torch.float64)
    dist.barrier()
    wall = time.perf_counter() - start
    dist.all_reduce(used)
    return wall, float(used), loss


def worker(worker: Worker, case: Case, pairs: int) -> None:
    """One rank; rank 0 sends the row."""
    torch.set_num_threads(1)
    loaded = case.load()
    plan = case.plan(loaded)
    ours = our_step(autopar.parallelize(copy.deepcopy(loaded.module), autopar.Cluster.local(case.ranks), loaded.kwargs, plan=plan), loaded.kwargs)
    theirs = their_step(case, loaded.module, loaded.kwargs)
    ratios, busy, times, error = [], [], [], 0.0
    for n in range(WARM_UP + pairs):
        found = {step: timed(step) for step in ((ours, theirs) if n % 2 else (theirs, ours))}
        (a, a_busy, our_loss), (b, b_busy, their_loss) = found[ours], found[theirs]
        error = max(error, abs(float(our_loss) - float(their_loss)) / abs(float(their_loss)))
        if n >= WARM_UP:
            ratios.append(a / b)
            busy.append(a_busy / b_busy)
            times.append((a, b))
    if not error <= MAX_LOSS_ERROR:
        raise SystemExit(f"{case}: losses differ by {error:.1e}")
    quarter = statistics.quantiles(ratios, n=4)
    row = asdict(case) | {
        "ratio": statistics.median(ratios), "busy_ratio": statistics.median(busy), "low": quarter[0], "high": quarter[2], "loss_error": error,
        "ours_ms": 1e3 * statistics.median(a for a, _ in times), "theirs_ms": 1e3 * statistics.median(b for _, b in times),
    }  # fmt: skip
    if worker.rank == 0:
        worker.send(row)


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Pipeline step, ours / torch.distributed.pipelining, median over pairs")
    for column in ("schedule", "ranks", "stages", "microbatches", "model", "ratio", "quartiles", "", "processor ratio", "loss error", "ours ms", "theirs ms"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for r in rows:
        table.add_row(r["schedule"], str(r["ranks"]), str(r["ranks"] * r["virtual_stages"]), str(r["micro_batches"]), f"{r['hidden']} x{r['layers']}", f"{r['ratio']:.3f}",
                      f"{r['low']:.3f} - {r['high']:.3f}", "met" if r["ratio"] <= 1.0 else "missed", f"{r['busy_ratio']:.3f}", f"{r['loss_error']:.0e}",
                      f"{r['ours_ms']:.1f}", f"{r['theirs_ms']:.1f}")  # fmt: skip
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--only", default="", help="run the cases whose schedule, ranks or microbatches (such as '1f1b 4 8') contain this")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if given.only in f"{case.schedule} {case.ranks} {case.micro_batches}":
            launch(worker, case.ranks, case, given.pairs, on_message=rows.append)
    print(json.dumps(rows, indent=1)) if given.json else show(rows)


if __name__ == "__main__":
    main()
