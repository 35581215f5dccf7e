"""How long planning takes and how much memory it needs, measured beside AutoParallel's published figures and our targets.

    python examples/benchmark_planning.py [--runs 3] [--json]

Every run of a row is a process of its own, and the rows take turns (A B C A B C), so that a busy machine disturbs all of
them alike. Shown are medians over the runs; `32 / 4` is the median of the ratios within a turn. Nothing is allocated:
models live on the meta device, and `peak RSS` is the whole process with torch and transformers loaded.
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

ROWS = ("llama-3-8b x32", "llama-3-8b x4", "gpt2 x12")
NO_LIMIT = 1e6
"""A share of the device's memory that no plan reaches: the search then never prices memory."""

PUBLISHED = {"plan s": 30 + 88 + 80, "emit s": 108, "peak GB": 4.4}
"""AutoParallel on Llama-3-8B: trace 30 s, problem 88 s, solver 80 s; 108 s to apply; 4.4 GB (its own report)."""

TARGETS = {"plan s": 40.0, "emit s": 20.0, "peak GB": 2.0}
MAX_RATIO = 1.5
GPT2_SEARCH_S = 10.0


@dataclass(frozen=True)
class Timing:
    """One run of one row, in seconds and GB (1e9 bytes). `free_s`: the same search with no memory limit, emitting aside."""

    trace_s: float
    search_s: float
    emit_s: float
    peak_gb: float
    free_s: float
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
    from autopar.planner.plan import Options, plan_graph
    from autopar.rewrite.build import build
    from autopar.trace.capture import trace

    logging.disable(logging.WARNING)
    name, layers = row.rsplit(" x", 1)
    if name == "gpt2":
        cluster, mesh = autopar.Cluster.local(8), Mesh.of(a=2, b=4)
        loaded = load_model("gpt2", batch=8, seq=512, overrides={"n_layer": int(layers)})
    else:
        cluster, mesh = autopar.Cluster.parse("h100-sxm:8"), Mesh.of(a=8, b=8)
        loaded = load_model("llama-3.1-8b", batch=16, seq=8192, dtype="bfloat16", overrides={"num_hidden_layers": int(layers)})
    start = time.perf_counter()
    traced = trace(loaded.module, (), loaded.kwargs)
    after_trace = time.perf_counter()
    planned = plan_graph(traced.graph, cluster, Options(mesh=mesh))
    after_search = time.perf_counter()
    build(planned.program, traced)
    after_emit = time.perf_counter()
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    before_free = time.perf_counter()
    plan_graph(traced.graph, cluster, Options(mesh=mesh, memory_share=NO_LIMIT))
    free_s = time.perf_counter() - before_free
    proof = planned.plan.proof
    return Timing(after_trace - start, after_search - after_trace, after_emit - after_search, peak_gb, free_s, proof.solver, proof.gap)


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
    ratio = statistics.median(a.search_s / b.search_s for a, b in pairs)
    free_ratio = statistics.median(a.free_s / b.free_s for a, b in pairs)
    llama, gpt2 = medians[ROWS[0]], medians[ROWS[2]]
    met = {
        f"trace + search <= {TARGETS['plan s']:g} s": llama.plan_s <= TARGETS["plan s"],
        f"emit <= {TARGETS['emit s']:g} s": llama.emit_s <= TARGETS["emit s"],
        f"peak <= {TARGETS['peak GB']:g} GB": llama.peak_gb <= TARGETS["peak GB"],
        f"search 32 / 4 <= {MAX_RATIO}": ratio <= MAX_RATIO,
        f"search 32 / 4 without memory limit <= {MAX_RATIO}": free_ratio <= MAX_RATIO,
        f"gpt2 search <= {GPT2_SEARCH_S:g} s": gpt2.search_s <= GPT2_SEARCH_S,
    }
    rows = {row: asdict(t) | {"plan_s": t.plan_s} for row, t in medians.items()}
    return {"rows": rows, "published": PUBLISHED, "search_32_over_4": ratio, "free_search_32_over_4": free_ratio, "met": met}


def show(summary: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Planning, medians")
    for column in ("", "trace s", "search s", "plan s", "emit s", "peak GB", "search s, no memory limit", "gap", "solver"):
        table.add_column(column, justify="left" if column in ("", "solver") else "right")
    for row, t in summary["rows"].items():
        seconds = [f"{t[k]:.2f}" for k in ("trace_s", "search_s", "plan_s", "emit_s", "peak_gb", "free_s")]
        table.add_row(row, *seconds, f"{t['gap']:.2%}", t["solver"])
    p = summary["published"]
    table.add_row("AutoParallel x32 (published)", "30", "88 + 80", str(p["plan s"]), str(p["emit s"]), str(p["peak GB"]), "", "", "")
    console = Console(width=150)
    console.print(table)
    console.print(f"search 32 / 4 layers: {summary['search_32_over_4']:.2f}x; without memory limit {summary['free_search_32_over_4']:.2f}x")
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
