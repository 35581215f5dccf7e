"""Do predictions rank plans as the clock does? Many plans of one model on real processes, predicted from a calibrated cluster and measured.

    autopar calibrate --processes 4 --out machine.toml
    python examples/rank_plans.py --cluster machine.toml [--rounds 12] [--only TEXT] [--json]

All plans are built side by side in the same processes and take turns: a round is one training step of each (forward, backward, AdamW), with a
barrier around it. What other programs on the machine take meanwhile is seen too: the time of a plan is the median of the half of its steps that
they disturbed least. Shown are the plans from the fastest on, what the cluster file predicts of each, Kendall's rank correlation of both
columns, and the place of the plan that the search picks when nothing is pinned.
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist

import autopar
from autopar.api import assemble
from autopar.core.plan import Plan
from autopar.models.load import LoadedModel, load_model
from autopar.planner.plan import plan_graph
from autopar.planner.search import Options
from autopar.runtime.launch import Worker, launch
from autopar.runtime.microbatches import split_batch
from autopar.trace.capture import Traced, trace

LEARNING_RATE = 1e-4
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
"""For the C library of the ranks: what one plan frees is the next one's. A job that runs one plan comes to that by itself; with many taking
turns every step would fetch its pages from the system anew, which took as long as the step."""
WARM_UP = 2
SEARCHED = "searched"


@dataclass(frozen=True)
class Study:
    """A model and its batch."""

    spec: str
    batch: int
    seq: int
    overrides: dict[str, Any] = field(default_factory=dict)

    def load(self, device: str) -> LoadedModel:
        return load_model(self.spec, batch=self.batch, seq=self.seq, device=device, overrides=self.overrides)


GPT2 = Study(
    "gpt2", 16, 64,
    {"n_embd": 256, "n_layer": 8, "n_head": 4, "n_positions": 64, "vocab_size": 2048, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
)  # fmt: skip

PINNED: tuple[tuple[int, tuple[str, ...]], ...] = (
    (1, ("dp=4",)),
    (2, ("dp=4",)),
    (4, ("dp=4",)),
    (1, ("dp=4", "zero=1")),
    (1, ("dp=4", "zero=2")),
    (1, ("dp=4", "zero=3")),
    (4, ("dp=4", "zero=1")),
    (4, ("dp=4", "zero=2")),
    (4, ("dp=4", "zero=3")),
    (1, ("dp=4", "recompute=full")),
    (1, ("dp=4", "recompute=selective")),
    (1, ("dp=4", "zero=3", "recompute=full")),
    (1, ("tp=4",)),
    (4, ("tp=4",)),
    (1, ("tp=4", "recompute=full")),
    (1, ("dp=2", "tp=2")),
    (4, ("dp=2", "tp=2")),
    (1, ("dp=2", "tp=2", "zero=1")),
    (1, ("dp=2", "tp=2", "zero=3")),
    (4, ("pp=2", "dp=2", "schedule=gpipe")),
    (2, ("pp=2", "dp=2", "schedule=1f1b")),
    (4, ("pp=2", "dp=2", "schedule=1f1b")),
    (8, ("pp=2", "dp=2", "schedule=1f1b")),
    (4, ("pp=2", "dp=2", "schedule=1f1b", "zero=1")),
    (4, ("pp=2", "dp=2", "schedule=interleaved", "virtual=2")),
    (4, ("pp=2", "dp=2", "schedule=zero-bubble")),
    (4, ("pp=2", "tp=2", "schedule=1f1b")),
    (4, ("pp=4", "schedule=naive")),
    (4, ("pp=4", "schedule=gpipe")),
    (2, ("pp=4", "schedule=1f1b")),
    (4, ("pp=4", "schedule=1f1b")),
    (16, ("pp=4", "schedule=1f1b")),
    (4, ("pp=4", "schedule=interleaved", "virtual=2")),
    (4, ("pp=4", "schedule=zero-bubble")),
    (8, ("pp=4", "schedule=zero-bubble")),
)
"""(microbatches, pins)."""


def name_of(micro_batches: int, pins: Sequence[str]) -> str:
    return ", ".join((*pins, f"{micro_batches} microbatch{'es' * (micro_batches > 1)}"))


def plans_of(study: Study, cluster: autopar.Cluster, pinned: Sequence[tuple[int, tuple[str, ...]]], *, searched: bool = True) -> dict[str, Plan]:
    """The pinned plans by name, and the one that the search picks of all."""
    loaded = study.load("meta")
    graphs = {m: trace(loaded.module, (), split_batch(loaded.kwargs, m)[0]).graph for m in {m for m, _ in pinned}}
    found = {name_of(m, pins): plan_graph(graphs[m], cluster, Options(pins=pins, micro_batches=m)).plan for m, pins in pinned}
    return found | ({SEARCHED: autopar.plan(loaded.module, cluster, loaded.kwargs, pipelines=True)} if searched else {})


def stepper(plan: Plan, traced: Traced, loaded: LoadedModel) -> Callable[[], torch.Tensor]:
    """A whole training step as one call. Gradients go before others step: many plans share the memory."""
    module = assemble(plan, traced, loaded.module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> torch.Tensor:
        loss = module.train_step(loaded.kwargs)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


@dataclass(frozen=True)
class Sample:
    """One step: wall seconds until all ranks were done, processor seconds of all ranks and of everybody else meanwhile, loss."""

    name: str
    wall_s: float
    processor_s: float
    others_s: float
    loss: float


def busy_s() -> float:
    """Processor seconds of everything on this machine since it started; 0 where the system does not say (it is Linux that does)."""
    try:
        with open("/proc/stat", encoding="ascii") as lines:
            user, nice, system, _, _, irq, softirq, steal = map(int, next(lines).split()[1:9])
    except OSError:
        return 0.0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def timed(name: str, step: Callable[[], torch.Tensor]) -> Sample:
    dist.barrier()
    start, mine, everybody = time.perf_counter(), time.process_time(), busy_s()
    loss = float(step())
    used = torch.tensor(time.process_time() - mine, dtype=torch.float64)
    dist.barrier()
    wall, busy = time.perf_counter() - start, busy_s() - everybody
    dist.all_reduce(used)
    return Sample(name, wall, float(used), max(0.0, busy - float(used)), loss)


def measure(worker: Worker, study: Study, plans: dict[str, Plan], rounds: int) -> None:
    """One rank; rank 0 sends a sample of every step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same weights and the same batch on every rank
    loaded = study.load("cpu")
    traces: dict[int, Traced] = {}
    steps = {}
    for name, plan in plans.items():
        number = plan.residency.micro_batches
        if number not in traces:
            traces[number] = trace(loaded.module, (), split_batch(loaded.kwargs, number)[0])
        steps[name] = stepper(plan, traces[number], loaded)
    gc.collect()
    gc.freeze()  # what the other plans hold is not to be looked through in every step
    for n in range(WARM_UP + rounds):
        for name, step in steps.items():
            found = timed(name, step)
            if n >= WARM_UP and worker.rank == 0:
                worker.send(found)


@dataclass(frozen=True)
class Row:
    """Seconds of a step: as predicted, by the clock, and of all ranks' processor time."""

    name: str
    layout: str
    predicted_s: float
    measured_s: float
    processor_s: float
    loss: float


def rows_of(plans: dict[str, Plan], samples: Sequence[Sample]) -> list[Row]:
    """From the fastest on."""
    rows = []
    for name, plan in plans.items():
        mine = [s for s in samples if s.name == name]
        calm = sorted(mine, key=lambda s: s.others_s / s.wall_s)[: (len(mine) + 1) // 2]
        wall, busy = (statistics.median(values) for values in ([s.wall_s for s in calm], [s.processor_s for s in calm]))
        rows.append(Row(name, plan.summary(), plan.predicted.step_time_s, wall, busy, mine[-1].loss))
    return sorted(rows, key=lambda row: row.measured_s)


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b: of all pairs, those in the same order less those in the opposite one; ties count in neither.

    Source: Kendall, "The treatment of ties in ranking problems", Biometrika 33, 1945.
    """
    pairs = [((a > b) - (a < b), (c > d) - (c < d)) for (a, c), (b, d) in combinations(list(zip(x, y, strict=True)), 2)]
    untied = [sum(p[side] != 0 for p in pairs) for side in (0, 1)]
    return sum(p * q for p, q in pairs) / (untied[0] * untied[1]) ** 0.5 if all(untied) else 0.0


def summary(plans: dict[str, Plan], samples: Sequence[Sample], cluster: autopar.Cluster, study: Study, rounds: int) -> dict[str, Any]:
    rows = rows_of(plans, samples)
    tau = kendall_tau([row.predicted_s for row in rows], [row.measured_s for row in rows])
    errors = [abs(row.predicted_s / row.measured_s - 1) for row in rows]
    picked = min(rows, key=lambda row: row.predicted_s)
    return {
        "measured_on": {"machine": cluster.device.name, "processes": cluster.num_devices, "torch": torch.__version__, "rounds": rounds,
                        "others": statistics.median(s.others_s / s.wall_s for s in samples)},
        "model": {"name": study.spec, "batch": study.batch, "seq": study.seq, **study.overrides},
        "plans": len(rows),
        "kendall_tau": tau,
        "median_error": statistics.median(errors),
        "searched_over_fastest": {row.name: row.measured_s for row in rows}.get(SEARCHED, picked.measured_s) / rows[0].measured_s,
        "rows": [vars(row) for row in rows],
    }


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    on, rows = found["measured_on"], found["rows"]
    table = Table(title=f"Training step of {found['model']['name']}, {on['processes']} gloo processes on {on['machine']}, torch {on['torch']}")
    for column in ("#", "pins", "plan", "predicted ms", "place", "measured ms", "error", "processor ms"):
        table.add_column(column, justify="left" if column in ("pins", "plan") else "right")
    places = {name: n for n, name in enumerate(sorted((r["name"] for r in rows), key=lambda name: next(r["predicted_s"] for r in rows if r["name"] == name)), 1)}
    for n, r in enumerate(rows, 1):
        table.add_row(str(n), r["name"], r["layout"], f"{1e3 * r['predicted_s']:.1f}", str(places[r["name"]]), f"{1e3 * r['measured_s']:.1f}",
                      f"{r['predicted_s'] / r['measured_s'] - 1:+.0%}", f"{1e3 * r['processor_s']:.1f}")  # fmt: skip
    page = Console(width=170)
    page.print(table)
    page.print(f"{found['plans']} plans, {on['rounds']} rounds, other programs took {on['others']:.2f} cores: Kendall's tau {found['kendall_tau']:.3f}, median error {found['median_error']:.1%}, "
               f"the searched plan takes {found['searched_over_fastest']:.3f} of the fastest")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", default="local:4", help="a file that `autopar calibrate` wrote")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", default="", help="measure the plans whose name (such as 'dp=4, zero=1, 4 microbatches') contains this")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    os.environ.update(KEEP_MEMORY)
    cluster = autopar.Cluster.parse(given.cluster)
    pinned = [(m, pins) for m, pins in PINNED if given.only in name_of(m, pins)]
    plans = plans_of(GPT2, cluster, pinned, searched=not given.only)
    samples: list[Sample] = []
    launch(measure, cluster.num_devices, GPT2, plans, given.rounds, on_message=samples.append)
    found = summary(plans, samples, cluster, GPT2, given.rounds)
    print(json.dumps(found, indent=1)) if given.json else show(found)


if __name__ == "__main__":
    main()
