"""How long planning takes and how much memory it needs, measured beside AutoParallel's published figures and our targets.

    python examples/benchmark_planning.py [--runs 3] [--json]

Every run of a row is a process of its own, and the rows take turns (A B C A B C), so that a busy machine disturbs all of
them alike. Shown are medians over the runs; `32 / 4` is the median of the ratios within a turn. Nothing is allocated:
models live on the meta device, and `peak GB` is the whole process with torch and transformers loaded.

`search s` is with the device's own memory, which 32 layers exceed and 4 do not. To compare depths, the same search runs
twice more: with memory slack, and with 0.7 of what the slack plan takes.
"""

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

ROWS = ("llama-3-8b x32", "llama-3-8b x4", "gpt2 x12", "llama-3-8b x32 on (4,4,4)")
NO_LIMIT = 1e6
"""A share of the device's memory that no plan reaches: the search then never prices memory."""

BINDING = 0.7
"""The share of the bytes of the plan without a limit that the binding search may use."""

PUBLISHED = {"plan s": 30 + 88 + 80, "emit s": 108, "peak GB": 4.4}
"""AutoParallel on Llama-3-8B: trace 30 s, problem 88 s, solver 80 s; 108 s to apply; 4.4 GB (its own report)."""

TARGETS = {"plan s": 40.0, "emit s": 20.0, "peak GB": 2.0}
MAX_RATIO = 1.5
GPT2_SEARCH_S = 10.0


@dataclass(frozen=True)
class Timing:
    """One run of one row, in seconds and GB (1e9 bytes). `slack_s`, `binding_s`: the search without a memory limit and with one that binds."""

    trace_s: float
    search_s: float
    emit_s: float
    peak_gb: float
    slack_s: float
    binding_s: float
    solver: str
    gap: float

    @property
    def plan_s(self) -> float:
        return self.trace_s + self.search_s


def measure(row: str) -> Timing:
    """Plan and emit one row in this process."""
    import autopar
    from autopar.core.mesh import Mesh
    from autopar.models.load import load_model
    from autopar.planner.plan import plan_graph
    from autopar.planner.search import Options
    from autopar.rewrite.build import build
    from autopar.trace.capture import trace

    logging.disable(logging.WARNING)
    name, _, size = row.partition(" x")
    layers, _, given = size.partition(" on ")
    if name == "gpt2":
        cluster, mesh = autopar.Cluster.local(8), Mesh.of(a=2, b=4)
        loaded = load_model("gpt2", batch=8, seq=512, overrides={"n_layer": int(layers)})
    else:
        cluster, mesh = autopar.Cluster.parse("h100-sxm:8"), Mesh.of(a=4, b=4, c=4) if given else Mesh.of(a=8, b=8)
        loaded = load_model("llama-3.1-8b", batch=16, seq=8192, dtype="bfloat16", overrides={"num_hidden_layers": int(layers)})
    start = time.perf_counter()
    traced = trace(loaded.module, (), loaded.kwargs)
    after_trace = time.perf_counter()
    planned = plan_graph(traced.graph, cluster, Options(mesh=mesh))
    after_search = time.perf_counter()
    build(planned.program, traced)
    after_emit = time.perf_counter()
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    before_slack = time.perf_counter()
    slack = plan_graph(traced.graph, cluster, Options(mesh=mesh, memory_share=NO_LIMIT))
    after_slack = time.perf_counter()
    share = BINDING * slack.plan.predicted.peak_memory_bytes / cluster.device.memory_bytes
    plan_graph(traced.graph, cluster, Options(mesh=mesh, memory_share=share))
    after_binding = time.perf_counter()
    proof = planned.plan.proof
    return Timing(
        trace_s=after_trace - start,
        search_s=after_search - after_trace,
        emit_s=after_emit - after_search,
        peak_gb=peak_gb,
        slack_s=after_slack - before_slack,
        binding_s=after_binding - after_slack,
        solver=proof.solver,
        gap=proof.gap,
    )


def run_apart(row: str) -> Timing:
    """`measure` in a fresh process."""
    done = subprocess.run([sys.executable, __file__, "--row", row], check=True, capture_output=True, text=True)
    return Timing(**json.loads(done.stdout.splitlines()[-1]))


def median_of(timings: list[Timing]) -> Timing:
    last = timings[-1]
    numbers = {k: statistics.median(getattr(t, k) for t in timings) for k, v in asdict(last).items() if isinstance(v, float)}
    return Timing(**numbers, solver=last.solver)


def summarise(found: dict[str, list[Timing]]) -> dict:
    """Medians of all rows, ratios of 32 to 4 layers, and which targets are met."""
    medians = {row: median_of(timings) for row, timings in found.items()}
    pairs = list(zip(found[ROWS[0]], found[ROWS[1]], strict=True))
    slack = statistics.median(a.slack_s / b.slack_s for a, b in pairs)
    binding = statistics.median(a.binding_s / b.binding_s for a, b in pairs)
    llama, gpt2 = medians[ROWS[0]], medians[ROWS[2]]
    met = {
        f"trace + search <= {TARGETS['plan s']:g} s": llama.plan_s <= TARGETS["plan s"],
        f"emit <= {TARGETS['emit s']:g} s": llama.emit_s <= TARGETS["emit s"],
        f"peak <= {TARGETS['peak GB']:g} GB": llama.peak_gb <= TARGETS["peak GB"],
        f"search 32 / 4 with memory slack <= {MAX_RATIO}": slack <= MAX_RATIO,
        f"search 32 / 4 with memory binding <= {MAX_RATIO}": binding <= MAX_RATIO,
        f"gpt2 search <= {GPT2_SEARCH_S:g} s": gpt2.search_s <= GPT2_SEARCH_S,
    }
    rows = {row: asdict(t) | {"plan_s": t.plan_s} for row, t in medians.items()}
    return {"rows": rows, "published": PUBLISHED, "slack_32_over_4": slack, "binding_32_over_4": binding, "met": met}


def show(summary: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Planning, medians")
    for column in ("", "trace s", "search s", "plan s", "emit s", "peak GB", "slack s", "binding s", "gap", "solver"):
        table.add_column(column, justify="left" if column in ("", "solver") else "right")
    for row, t in summary["rows"].items():
        seconds = [f"{t[k]:.2f}" for k in ("trace_s", "search_s", "plan_s", "emit_s", "peak_gb", "slack_s", "binding_s")]
        table.add_row(row, *seconds, f"{t['gap']:.2%}", t["solver"])
    p = summary["published"]
    table.add_row("AutoParallel x32 (published)", "30", "88 + 80", str(p["plan s"]), str(p["emit s"]), str(p["peak GB"]), "", "", "", "")
    console = Console(width=150)
    console.print(table)
    console.print(f"search 32 / 4 layers: {summary['slack_32_over_4']:.2f}x with memory slack, {summary['binding_32_over_4']:.2f}x with memory binding")
    for text, met in summary["met"].items():
        console.print(f"{'met   ' if met else 'MISSED'}  {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(asdict(measure(given.row))))
        return
    found: dict[str, list[Timing]] = {row: [] for row in ROWS}
    for _ in range(given.runs):
        for row in ROWS:
            found[row].append(run_apart(row))
    summary = summarise(found)
    print(json.dumps(summary, indent=1)) if given.json else show(summary)


if __name__ == "__main__":
    main()
