"""Is the chosen plan the fastest there is? Every plan of a small model on four processes, built and run, not only those that the search visits.

    autopar calibrate --processes 4 --out machine.toml
    python examples/enumerate_plans.py --cluster machine.toml [--micro-batches 1,2,4] [--width 768] [--json]

A plan: the mesh of a stage (one axis or two) and the pipeline over it with its schedule, the number of microbatches, what every product does on every
axis (any factor cut, or whole with a whole or a partial gradient), the stage of ZeRO, recomputation or none. What lies between products follows them
as the planner finds best; two axes over the same links are alike, so of two plans that differ in their names one is run. The plan that is picked with
nothing pinned is measured among them.

Thousands of plans cannot take turns for long, so they run in heats: all of them a few steps, the fastest of each heat more in the next, those of the last
two side by side, in another order every time. A plan leaves when its best turn is well behind the median of the leading one; most have near twins here, in
other stages of ZeRO, so that bad luck in a few steps takes out no kind of plan. The picked one is measured as all others are, but stays to the end, so
that its place is known. Two cores take twelve minutes for one number of microbatches.
"""

import argparse
import gc
import json
import os
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from rank_plans import KEEP_MEMORY, Study, stepper
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

import autopar
from autopar.core.graph import OpGraph
from autopar.core.mesh import Mesh, MeshAxis
from autopar.core.plan import Plan
from autopar.forecast.ranking import kendall
from autopar.planner.plan import plan_graph
from autopar.planner.rulebook import rules_of
from autopar.planner.search import Options
from autopar.runtime.launch import Worker, launch
from autopar.runtime.microbatches import split_batch
from autopar.trace.capture import Traced, trace

Step = Callable[[], torch.Tensor]
SCHEDULES = ("gpipe", "1f1b", "zero-bubble")
RECOMPUTE = ("none", "full")


@dataclass(frozen=True)
class Heat:
    """Plans within `margin` of the leader, at most `most`, take `turns` of so many `steps` in a row; the first turn fills caches and is not counted.
    `together`: they are built side by side and take their turns in random order, or else one plan after the other is built and run."""

    margin: float
    most: int
    turns: int
    steps: int
    together: bool = False


COLLECTED = 8
"""Modules hold themselves in cycles: after so many of them their memory is called in."""

HEATS = (Heat(float("inf"), 1_000_000, 3, 1), Heat(2.0, 1000, 3, 2), Heat(1.6, 150, 4, 4), Heat(1.5, 24, 21, 4, True), Heat(1.25, 8, 151, 4, True))


def mlp(width: int) -> Study:
    """Two products with a ReLU between them, and a loss."""
    return Study("mlp", 64, 1, {"width": width, "depth": 1, "classes": width})


def shapes(num_devices: int, blocks: int) -> Iterator[tuple[Mesh, tuple[tuple[str, ...], ...]]]:
    """Meshes of a stage, with the pins of every pipeline over it."""
    for ranks in (d for d in range(1, blocks + 1) if num_devices % d == 0):
        pipelines = tuple((f"pp={ranks}", f"schedule={name}") for name in SCHEDULES) if ranks > 1 else ((),)
        n = num_devices // ranks
        for inner in (d for d in range(1, n + 1) if n % d == 0 and (d <= n // d)):
            yield Mesh(tuple(MeshAxis(name, size) for name, size in (("a", n // inner), ("b", inner)) if size > 1) or (MeshAxis("a", 1),)), pipelines


def named(graph: OpGraph, mesh: Mesh) -> Iterator[tuple[str, ...]]:
    """Pins that say what every product does on every axis."""
    products = [(op.name, (*rule.factors, "I", "R")) for op, rule in zip(graph.ops, rules_of(graph)) if rule.cost == "contract"]
    alike = len(set(mesh.sizes)) < len(mesh.sizes)
    for words in product(*(product(offered, repeat=len(mesh.axes)) for _, offered in products)):
        if not alike or words <= tuple(word[::-1] for word in words):
            yield tuple(f"{name}={axis.name}:{word}" for (name, _), chosen in zip(products, words) for axis, word in zip(mesh.axes, chosen))


def every_plan(graphs: dict[int, OpGraph], cluster: autopar.Cluster, blocks: int) -> Iterator[Plan]:
    for number, graph in graphs.items():
        for mesh, pipelines in shapes(cluster.num_devices, blocks):
            for words, pipeline, zero, mode in product(named(graph, mesh), pipelines, range(4), RECOMPUTE):
                if zero > 1 and "schedule=zero-bubble" in pipeline:
                    continue  # refused: each half of a split backward would scatter
                pins = (*words, *pipeline, f"zero={zero}", f"recompute={mode}")
                yield plan_graph(graph, cluster, Options(pins=pins, mesh=mesh, micro_batches=number)).plan


def identity(plan: Plan) -> str:
    """What a plan does, without what is said of it."""
    data = json.loads(plan.to_json())
    return json.dumps({key: value for key, value in data.items() if key not in ("predicted", "proof", "notes", "mesh")} | {"sizes": plan.mesh.sizes})


# --- on the ranks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """Wall seconds a step of a plan's turns, until all ranks were done; `of`: plans in the heat, `peak_bytes`: the most that rank 0 ever held."""

    plan: int
    heat: int
    of: int
    steps_s: tuple[float, ...]
    peak_bytes: int


@dataclass
class Runner:
    """One rank of all plans."""

    study: Study
    plans: Sequence[Plan]
    traces: dict[int, Traced] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)  # the same weights and the same batch on every rank
        self.loaded = self.study.load("cpu")

    def stepper(self, n: int) -> Step:
        plan = self.plans[n]
        number = plan.residency.micro_batches
        if number not in self.traces:
            self.traces[number] = trace(self.loaded.module, (), split_batch(self.loaded.kwargs, number)[0])
        return stepper(plan, self.traces[number], self.loaded)

    def run(self, chosen: Sequence[int], heat: Heat) -> Iterator[tuple[float, ...]]:
        """What the turns of every plan took, in the order given."""
        if heat.together:
            yield from self._together(chosen, heat)
            return
        for k, n in enumerate(chosen):
            step = self.stepper(n)
            yield tuple(timed(step, heat.steps) for _ in range(heat.turns))[1:]
            del step
            if k % COLLECTED == 0:
                gc.collect()

    def _together(self, chosen: Sequence[int], heat: Heat) -> list[tuple[float, ...]]:
        steps = [self.stepper(n) for n in chosen]
        gc.collect()
        draw = random.Random(len(chosen))  # the same on all ranks
        found: list[list[float]] = [[] for _ in steps]
        for _ in range(heat.turns):
            for k in draw.sample(range(len(steps)), len(steps)):
                found[k].append(timed(steps[k], heat.steps))
        return [tuple(times[1:]) for times in found]


def timed(step: Step, steps: int) -> float:
    """Seconds of one of so many steps in a row."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    dist.barrier()
    return (time.perf_counter() - start) / steps


def measure(worker: Worker, study: Study, plans: list[Plan], searched: int, heats: Sequence[Heat]) -> None:
    """One rank; rank 0 sends what every plan took. All ranks go by the times of rank 0."""
    runner, left = Runner(study, plans), list(range(len(plans)))
    gc.freeze()  # what stays is not to be looked through again and again
    for number, heat in enumerate(heats):
        best: list[float] = []
        leader = float("inf")
        for n, times in zip(left, runner.run(left, heat), strict=True):
            best.append(min(times))
            leader = min(leader, statistics.median(times))
            if worker.rank == 0:
                worker.send(Timed(n, number, len(left), times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
        if number + 1 < len(heats):
            following = heats[number + 1]
            shared = torch.tensor([*best, leader], dtype=torch.float64)
            dist.broadcast(shared, 0)
            *seconds, leader = shared.tolist()
            order = sorted(range(len(left)), key=seconds.__getitem__)
            kept = {left[k] for k in order[: following.most] if seconds[k] <= following.margin * leader} | {searched}
            left = sorted(kept)


# --- the report ---------------------------------------------------------------------------------------------------------


def summary(plans: Sequence[Plan], searched: int, found: Sequence[Timed], cluster: autopar.Cluster, study: Study) -> dict[str, Any]:
    last = max(t.heat for t in found)
    heats = [[t for t in found if t.heat == n] for n in range(last + 1)]
    everyone = [{"predicted_s": plans[t.plan].predicted.step_time_s, "measured_s": statistics.median(t.steps_s)} for t in heats[0]]
    rows = sorted(({"plan": plans[t.plan].summary(), "ops": dict(plans[t.plan].ops), "searched": t.plan == searched, "predicted_s": plans[t.plan].predicted.step_time_s,
                    "measured_s": statistics.median(t.steps_s), "least_s": min(t.steps_s), "spread": spread(t.steps_s)} for t in heats[last]), key=lambda row: row["measured_s"])  # fmt: skip
    mine = next(row for row in rows if row["searched"])
    return {
        "measured_on": {"machine": cluster.device.name, "processes": cluster.num_devices, "torch": torch.__version__},
        "model": {"name": study.spec, "batch": study.batch, **study.overrides},
        "plans": len(plans),
        "heats": [len(heat) for heat in heats],
        "slowest_s": max(min(t.steps_s) for t in found),
        "least_predicted_over_searched": min(p.predicted.step_time_s for p in plans) / mine["predicted_s"],
        "kendall_of_all": kendall([(row["predicted_s"], row["measured_s"]) for row in everyone]),
        "error_of_all": statistics.median(abs(row["predicted_s"] / row["measured_s"] - 1) for row in everyone),
        "peak_bytes": {f"after {n + 1} plans": heats[0][n].peak_bytes for n in (len(heats[0]) // 10, len(heats[0]) // 2, len(heats[0]) - 1)},
        "place": rows.index(mine) + 1,
        "searched_over_fastest": mine["measured_s"] / rows[0]["measured_s"],
        "rows": rows,
        "all": [{"plan": plans[t.plan].summary(), "ops": dict(plans[t.plan].ops), **row, "least_s": min(t.steps_s)} for t, row in zip(heats[0], everyone)],
    }


def spread(values: Sequence[float]) -> float:
    """Half of them lie in a band of this width around the median, as a share of it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def show(found: dict[str, Any]) -> None:
    from rich.table import Table

    on = found["measured_on"]
    table = Table(title=f"Training step of {found['model']['name']}, {on['processes']} gloo processes on {on['machine']}, torch {on['torch']}: the fastest of {found['plans']} plans")
    for column in ("#", "plan", "products", "predicted ms", "median ms", "spread", "least ms"):
        table.add_column(column, justify="left" if column in ("plan", "products") else "right")
    for n, row in enumerate(found["rows"], 1):
        products = "; ".join(word for name, word in row["ops"].items() if "linear" in name)
        times = [f"{1e3 * row[key]:.2f}" for key in ("predicted_s", "measured_s", "least_s")]
        table.add_row(str(n), row["plan"] + (" (searched)" if row["searched"] else ""), products, *times[:2], f"{row['spread']:.0%}", times[2])
    page = Console(width=170)
    page.print(table)
    page.print(f"{found['plans']} plans, {' > '.join(map(str, found['heats']))} in the heats, the slowest {1e3 * found['slowest_s']:.0f} ms. The searched plan is number {found['place']} and takes "
               f"{found['searched_over_fastest']:.3f} of the fastest; no plan is predicted under {found['least_predicted_over_searched']:.3f} of it. Of all plans Kendall's tau is "
               f"{found['kendall_of_all']:.3f}, the median error {found['error_of_all']:.0%}. Rank 0 held at most "
               + ", ".join(f"{size / 1e6:.0f} MB {when}" for when, size in found["peak_bytes"].items()))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", default="local:4", help="a file that `autopar calibrate` wrote")
    parser.add_argument("--micro-batches", default="1")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--limit", type=int, default=1_000_000, help="the first so many plans only, to try it out")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    os.environ.update(KEEP_MEMORY)
    cluster = autopar.Cluster.parse(given.cluster)
    study = mlp(given.width)
    loaded = study.load("meta")
    graphs = {n: trace(loaded.module, (), split_batch(loaded.kwargs, n)[0]).graph for n in map(int, given.micro_batches.split(","))}
    picked = autopar.plan(loaded.module, cluster, loaded.kwargs, pipelines=True)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        planning = progress.add_task("planning", total=None)
        plans: dict[str, Plan] = {}
        for plan in every_plan(graphs, cluster, study.overrides["depth"] + 1):
            plans.setdefault(identity(plan), plan)
            progress.update(planning, advance=1, description=f"{len(plans)} plans")
            if len(plans) >= given.limit:
                break
        plans.setdefault(identity(picked), picked)
        searched = list(plans).index(identity(picked))
        progress.update(planning, total=len(plans), completed=len(plans))
        running = progress.add_task("heat 1", total=len(plans))
        found: list[Timed] = []

        def arrived(timed: Timed) -> None:
            if found and timed.heat > found[-1].heat:
                progress.reset(running, total=timed.of, description=f"heat {timed.heat + 1}")
            found.append(timed)
            progress.update(running, advance=1)

        launch(measure, cluster.num_devices, study, list(plans.values()), searched, HEATS, on_message=arrived)
    result = summary(list(plans.values()), searched, found, cluster, study)
    print(json.dumps(result, indent=1)) if given.json else show(result)


if __name__ == "__main__":
    main()
