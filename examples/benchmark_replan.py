"""What it takes to plan again: the same model after one answer changed, a sweep over machines, and the front of time against memory.

    python examples/benchmark_replan.py [--only replan] [--no-whole]

All plans of a part but the front are made in one process, as a service or `autopar whatif` makes them; the first is cold, but for imports and the model. Plans made
again, and the front, have a budget (`AGAIN_S`, `FRONT_S`); beside each is what the whole search takes and finds, for the front of a request of its own, which has the
fastest plan of those that hold no more. CPU seconds beside those of the clock are of that process and of those that it forks. What a front takes is that of all its plans.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from autopar.core.change import changed
from autopar.core.cluster import Cluster
from autopar.core.plan import Plan
from autopar.models.load import load_model
from autopar.planner.plan import Planned
from autopar.request import Request

SEQ = 8192
SWEEP = 20
LARGE = ("llama-3.1-70b", 128, 1024)
"""Model, nodes and samples of a batch."""
SMALL = ("llama-3.1-8b", 1, 64)
FRONT = ("llama-3.1-70b", 8, 256)
AGAIN_S, FRONT_S = 1.0, 10.0
"""Budgets of a plan that is made again, and of a front."""


@dataclass(frozen=True)
class Timed:
    wall_s: float
    cpu_s: float
    plan: Plan | None

    def figures(self) -> tuple[str, ...]:
        found = ("none fits", "", "") if self.plan is None else (
            f"{self.plan.predicted.step_time_s:.3f} s", f"{self.plan.predicted.memory.high_bytes / 2**30:.1f} GiB", f"{self.plan.proof.gap:.2%}"
        )  # fmt: skip
        took = (f"{self.wall_s:.2f} s", f"{self.cpu_s:.2f} s") if self.wall_s else ("", "")
        return *took, *found


Row = tuple[str, Timed, Timed | None]
"""What is asked, the answer, and that of the whole search."""


def request_of(model: str, batch: int) -> Request:
    loaded = load_model(model, batch=batch, seq=SEQ, device="meta", dtype="bfloat16")
    return Request(loaded.module, loaded.kwargs)


def timed(make: Callable[[], Planned | None]) -> Timed:
    wall, cpu = time.perf_counter(), cpu_s()
    found = make()
    return Timed(time.perf_counter() - wall, cpu_s() - cpu, found.plan if found else None)


def cpu_s() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def planned(request: Request, cluster: Cluster, max_memory: float = 0.9, **budget: float) -> Planned:
    return request.planned(cluster, joint=True, max_memory=max_memory, **budget)


def replanned(whole: bool) -> Iterator[Row]:
    """70B on 1,024 GPUs, and what may change."""
    model, nodes, batch = LARGE
    cluster, request = Cluster.preset("h100-sxm", nodes), request_of(model, batch)

    def again(name: str, request: Request, cluster: Cluster, share: float = 0.9) -> Row:
        quick = timed(lambda: planned(request, cluster, share, budget_s=AGAIN_S))
        return name, quick, timed(lambda: planned(request, cluster, share)) if whole else None

    yield "cold", timed(lambda: planned(request, cluster)), None
    yield again("the same", request, cluster)
    yield again("bandwidth between nodes x 1.1", request, changed(cluster, ["inter_node.bandwidth*=1.1"]))
    yield again("bandwidth between nodes x 2", request, changed(cluster, ["inter_node.bandwidth*=2"]))
    yield again("memory 85 %", request, cluster, 0.85)
    yield again("memory 70 %", request, cluster, 0.7)
    yield again("twice the batch", request.with_batch(2 * batch), cluster)
    yield again("half the nodes", request, changed(cluster, [f"num_nodes={nodes // 2}"]))


def swept(whole: bool) -> Iterator[Row]:
    """8B on 8 GPUs over the bandwidth of its links."""
    model, nodes, batch = SMALL
    cluster, request = Cluster.preset("h100-sxm", nodes), request_of(model, batch)
    for n in range(SWEEP):
        factor = f"{0.25 * 16 ** (n / (SWEEP - 1)):.4g}"
        yield f"bandwidth x {factor}", timed(lambda factor=factor: planned(request, changed(cluster, [f"intra_node.bandwidth*={factor}"]))), None


def front(whole: bool) -> Iterator[Row]:
    """70B on 64 GPUs from the fastest plan to the leanest."""
    model, nodes, batch = FRONT
    cluster = Cluster.preset("h100-sxm", nodes)

    def plans(**budget: float) -> list[Timed]:
        request = request_of(model, batch)
        wall, cpu = time.perf_counter(), cpu_s()
        found = request.front(cluster, joint=True, **budget)
        return [Timed(time.perf_counter() - wall, cpu_s() - cpu, found[0]), *(Timed(0.0, 0.0, plan) for plan in found[1:])]

    slow = plans() if whole else []
    for n, row in enumerate(plans(budget_s=FRONT_S)):
        as_lean = [other for other in slow if other.plan.predicted.memory.high_bytes <= row.plan.predicted.memory.high_bytes]
        yield "holds less" if n else "fastest", row, next(iter(as_lean), None)


PARTS: dict[str, Callable[[bool], Iterator[Row]]] = {"replan": replanned, "sweep": swept, "front": front}


def main(
    only: Annotated[str | None, typer.Option(help=f"One of {', '.join(PARTS)}.")] = None,
    whole: Annotated[bool, typer.Option(help="Search without a budget too: minutes.")] = True,
) -> None:
    """Print a table of each part."""
    page = Console(width=240)
    for name, rows in PARTS.items():
        if only not in (None, name):
            continue
        answers = ("wall", "cpu", "step", "memory", "gap")
        table, wall, cpu = Table(name, *answers, *(f"whole {what}" for what in answers), "plan", box=None), 0.0, 0.0
        for what, quick, beside in rows(whole):
            wall, cpu = wall + quick.wall_s, cpu + quick.cpu_s
            table.add_row(what, *quick.figures(), *(beside.figures() if beside else [""] * len(answers)), quick.plan.summary() if quick.plan else "")
        table.add_row("in all", f"{wall:.1f} s", f"{cpu:.1f} s")
        page.print(table)


if __name__ == "__main__":
    typer.run(main)
