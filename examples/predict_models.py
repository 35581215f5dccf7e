"""What a calibrated cluster file predicts of eight models on one process, operator by operator and of whole training steps, beside the clock.

    autopar calibrate --processes 1 --out alone.toml
    python examples/predict_models.py --cluster alone.toml [--rounds 12] [--only NAME] [--json]

Operators: the call of the forward of every one that computes something, in the order of the model; those of a model that are alike count once. Steps:
forward, backward and AdamW of the planned module. Both keep the memory that they free, as a calibration does. Shown are the rank correlations of prediction and measurement, Kendall's and Spearman's, and the
median of the relative errors.
"""

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rank_plans import KEEP_MEMORY, Study, kendall_tau, stepper

import autopar
from autopar.models.load import LoadedModel
from autopar.planner.plan import plan_graph
from autopar.planner.states import Pricing
from autopar.planner.work import pieces
from autopar.runtime.launch import Worker, launch
from autopar.runtime.rank import Stream
from autopar.runtime.reference import Reference
from autopar.trace.capture import Traced, trace

WARM_UP = 2
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
STUDIES = (
    Study("mlp", 64, 1, {"width": 512, "depth": 6}),
    Study("alexnet-tiny", 64, 1, {"dropout": 0.0}),
    Study("vit-tiny", 32, 1, {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_hidden_layers": 4}),
    Study("bert-tiny", 8, 64, {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 1024}),
    Study("gpt2", 8, 64, {"n_embd": 256, "n_layer": 6, "n_head": 4, "n_positions": 64, "vocab_size": 2048, **NO_DROPOUT}),
    Study("llama-tiny", 8, 128, {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 1024}),
    Study("t5-tiny", 8, 64, {"d_model": 256, "d_kv": 64, "d_ff": 1024, "vocab_size": 1024}),
    Study("transformer", 4, 128, {"hidden": 384, "layers": 4, "heads": 6, "vocab": 4096, "positions": 128}),
)


@dataclass(frozen=True)
class Point:
    """Seconds of an operator or a step."""

    model: str
    name: str
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        return abs(self.predicted_s / self.measured_s - 1)


class Timed(Reference):
    """Notes how long the call of every operator takes."""

    def __init__(self, traced: Traced) -> None:
        super().__init__(traced.gm, Stream(0))
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.name = ""

    def run_node(self, n: torch.fx.Node) -> Any:
        self.name = n.name
        return super().run_node(n)

    def call_function(self, target: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        start = time.perf_counter()
        result = super().call_function(target, args, kwargs)
        self.seconds[self.name].append(time.perf_counter() - start)
        return result


def quartile(seconds: Sequence[float]) -> float:
    """The lower one: what disturbs only adds."""
    return sorted(seconds)[len(seconds) // 4]


def arguments(traced: Traced, loaded: LoadedModel) -> list[torch.Tensor]:
    """What the traced graph takes: weights, buffers, constants and inputs."""
    own = dict(loaded.module.named_parameters(remove_duplicate=False)) | dict(loaded.module.named_buffers(remove_duplicate=False))
    given = iter(traced.flat_inputs((), loaded.kwargs))
    values = (value for value in traced.graph.values if value.role != "op")
    return [next(given) if v.role == "input" else traced.constants[v.source[0]] if v.role == "constant" else own[v.source[0]] for v in values]


def operators(traced: Traced, loaded: LoadedModel, cluster: autopar.Cluster, rounds: int) -> list[Point]:
    """A point for each distinct operator of a model."""
    program = plan_graph(traced.graph, cluster).program
    price = {piece.key[1]: piece.seconds[0] for piece in pieces(program, Pricing(cluster, program.mesh)) if isinstance(piece.key, tuple) and piece.key[0] == "op"}
    timed, given = Timed(traced), arguments(traced, loaded)
    for n in range(WARM_UP + rounds):
        timed.run(*given)
        if n + 1 == WARM_UP:
            timed.seconds.clear()
    graph, alike = traced.graph, defaultdict[Any, list[str]](list)
    for op in graph.ops:
        if price.get(op.name):
            alike[op.kind, tuple(graph.values[v].meta.shape for v in (*op.operands, *op.results))].append(op.name)
    node = {op.name: traced.node_of[op.results[0]] for op in graph.ops}
    return [
        Point(loaded.name, f"{kind} {'x'.join(map(str, shapes[-1]))}", price[names[0]], statistics.median(quartile(timed.seconds[node[name]]) for name in names))
        for (kind, shapes), names in alike.items()
    ]


def step(traced: Traced, loaded: LoadedModel, cluster: autopar.Cluster, rounds: int) -> Point:
    plan = plan_graph(traced.graph, cluster).plan
    run, seconds = stepper(plan, traced, loaded), []
    for _ in range(WARM_UP + rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return Point(loaded.name, "step", plan.predicted.step_time_s, quartile(seconds[WARM_UP:]))


def measure(worker: Worker, cluster: autopar.Cluster, studies: Sequence[Study], rounds: int) -> None:
    """The only rank: sends (operators, step) of every model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for study in studies:
        loaded = study.load("cpu")
        traced = trace(loaded.module, (), loaded.kwargs)
        worker.send((operators(traced, loaded, cluster, rounds), step(traced, loaded, cluster, rounds)))


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation of the ranks, of equal values their mean rank. Source: Spearman, American Journal of Psychology 15, 1904."""
    ranks = [[statistics.mean(n for n, w in enumerate(sorted(values)) if w == v) for v in values] for values in (x, y)]
    return statistics.correlation(*ranks)


def score(points: Sequence[Point]) -> dict[str, float]:
    predicted, measured = [p.predicted_s for p in points], [p.measured_s for p in points]
    return {
        "points": len(points), "kendall_tau": kendall_tau(predicted, measured), "spearman": spearman(predicted, measured),
        "median_error": statistics.median(p.error for p in points),
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "operators", "median error", "Spearman", "step predicted ms", "measured ms", "error", title=f"On {found['machine']}, torch {torch.__version__}")
    for row in found["models"]:
        table.add_row(row["model"], str(row["operators"]["points"]), f"{row['operators']['median_error']:.0%}", f"{row['operators']['spearman']:.2f}",
                      f"{1e3 * row['predicted_s']:.1f}", f"{1e3 * row['measured_s']:.1f}", f"{row['predicted_s'] / row['measured_s'] - 1:+.0%}")  # fmt: skip
    page = Console(width=140)
    page.print(table)
    for what in ("operators", "steps"):
        s = found[what]
        page.print(f"{s['points']} {what}: Kendall's tau {s['kendall_tau']:.3f}, Spearman's rho {s['spearman']:.3f}, median error {s['median_error']:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", default="local:1", help="a file that `autopar calibrate --processes 1` wrote")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    os.environ.update(KEEP_MEMORY)
    cluster = autopar.Cluster.parse(given.cluster)
    found: list[tuple[list[Point], Point]] = []
    launch(measure, 1, cluster, [s for s in STUDIES if given.only in s.spec], given.rounds, on_message=found.append)
    content = summary(found, cluster)
    print(json.dumps(content, indent=1)) if given.json else show(content)


def summary(found: Sequence[tuple[list[Point], Point]], cluster: autopar.Cluster) -> dict[str, Any]:
    return {
        "machine": cluster.device.name,
        "operators": score([p for points, _ in found for p in points]),
        "steps": score([whole for _, whole in found]),
        "models": [vars(whole) | {"operators": score(points), "points": [vars(p) for p in points]} for points, whole in found],
    }


if __name__ == "__main__":
    main()
