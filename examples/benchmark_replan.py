"""What it takes to plan again: the same model after one answer changed, a sweep over machines, and the front of time against memory.

    python examples/benchmark_replan.py [--only replan]

All plans of a part are made in one process, as a service makes them; `autopar whatif --sweep` shares a row out over several. The first is cold, but for imports
and the model. CPU seconds beside those of the clock are of that process and of the helpers that a large search forks.
"""

import os
import time
from collections.abc import Callable, Iterator
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
Row = tuple[str, float, float, Plan | None]


def request_of(model: str, batch: int) -> Request:
    loaded = load_model(model, batch=batch, seq=SEQ, device="meta", dtype="bfloat16")
    return Request(loaded.module, loaded.kwargs)


def timed(name: str, make: Callable[[], Planned | None]) -> Row:
    wall, cpu = time.perf_counter(), cpu_s()
    found = make()
    return name, time.perf_counter() - wall, cpu_s() - cpu, found.plan if found else None


def cpu_s() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def planned(request: Request, cluster: Cluster, max_memory: float = 0.9) -> Planned:
    return request.planned(cluster, joint=True, max_memory=max_memory)


def replanned() -> Iterator[Row]:
    """70B on 1,024 GPUs, and what may change."""
    model, nodes, batch = LARGE
    cluster, request = Cluster.preset("h100-sxm", nodes), request_of(model, batch)
    yield timed("cold", lambda: planned(request, cluster))
    yield timed("the same", lambda: planned(request, cluster))
    yield timed("bandwidth between nodes x 1.1", lambda: planned(request, changed(cluster, ["inter_node.bandwidth*=1.1"])))
    yield timed("bandwidth between nodes x 2", lambda: planned(request, changed(cluster, ["inter_node.bandwidth*=2"])))
    yield timed("memory 85 %", lambda: planned(request, cluster, 0.85))
    yield timed("memory 70 %", lambda: planned(request, cluster, 0.7))
    yield timed("twice the batch", lambda: planned(request.with_batch(2 * batch), cluster))
    yield timed("half the nodes", lambda: planned(request, changed(cluster, [f"num_nodes={nodes // 2}"])))


def swept() -> Iterator[Row]:
    """8B on 8 GPUs over the bandwidth of its links."""
    model, nodes, batch = SMALL
    cluster, request = Cluster.preset("h100-sxm", nodes), request_of(model, batch)
    for n in range(SWEEP):
        factor = f"{0.25 * 16 ** (n / (SWEEP - 1)):.4g}"
        yield timed(f"bandwidth x {factor}", lambda factor=factor: planned(request, changed(cluster, [f"intra_node.bandwidth*={factor}"])))


def front() -> Iterator[Row]:
    """70B on 64 GPUs from the fastest plan to the leanest. A plan is known to be on the front when the one behind it is."""
    model, nodes, batch = FRONT
    cluster, request = Cluster.preset("h100-sxm", nodes), request_of(model, batch)
    plans = request.front(cluster, joint=True)
    row = timed("fastest", lambda: next(plans, None))
    while row[3] is not None:
        yield row
        row = timed("holds less", lambda: next(plans, None))


PARTS: dict[str, Callable[[], Iterator[Row]]] = {"replan": replanned, "sweep": swept, "front": front}


def main(only: Annotated[str | None, typer.Option(help=f"One of {', '.join(PARTS)}.")] = None) -> None:
    """Print a table of each part."""
    page = Console(width=200)
    for name, rows in PARTS.items():
        if only not in (None, name):
            continue
        table, wall, cpu = Table(name, "wall", "cpu", "step", "memory", "gap", "plan", box=None), 0.0, 0.0
        for what, wall_s, cpu_s, plan in rows():
            wall, cpu = wall + wall_s, cpu + cpu_s
            figures = ("none fits",) if plan is None else (
                f"{plan.predicted.step_time_s:.3f} s", f"{plan.predicted.memory.high_bytes / 2**30:.1f} GiB", f"{plan.proof.gap:.2%}", plan.summary()
            )  # fmt: skip
            table.add_row(what, f"{wall_s:.2f} s", f"{cpu_s:.2f} s", *figures)
        table.add_row("in all", f"{wall:.1f} s", f"{cpu:.1f} s")
        page.print(table)


if __name__ == "__main__":
    typer.run(main)
