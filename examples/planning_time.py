"""How the time to plan grows: with the logarithm of the number of devices, linearly with the number of different blocks, and hardly with depth, since blocks
that are alike are searched once.

    python examples/planning_time.py [--devices 8,64,512] [--layers 4,16,64] [--kinds 1,2,4] [--out planning_time.svg]

A decoder of width 2048 whose graph is made without tracing, two samples a device. CPU seconds of the joint search, and of the plan on the whole graph: unrolled,
cut, priced and walked. Devices vary at one depth, layers at one number of devices. Kinds of blocks differ in the width of their MLP and take turns; the joint
search takes only rows of one kind, so these are planned mesh by mesh, on one node: with two samples a device, and with so many that memory binds.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from autopar.core.cluster import Cluster
from autopar.core.residency import Precision
from autopar.core.unroll import Run
from autopar.forecast.transformer import Dims, transformer_graph
from autopar.joint.fold import SHOWN
from autopar.joint.plan import planned_jointly
from autopar.joint.search import Joint, JointSearch
from autopar.planner.plan import plan_graph
from autopar.planner.search import Options

DECODER = Dims(
    layers=32, hidden=2048, heads=16, kv_heads=8, inner=8192, vocab=32000, seq=4096, norm="rms", activation="swiglu", positions="rotary", biases=False
)  # fmt: skip
DEVICES, LAYERS = "8,64,512,4096,16384,65536", "4,8,16,32,64,128,256"
KINDS = "1,2,4,8,16,32"
AT_LAYERS, AT_DEVICES = 32, 512
PER_NODE, SAMPLES, MANY = 8, 2, 8
NARROWER = 128  # than the one before is the MLP of each kind
BAR = 40


def cpu_s() -> float:
    """Processor seconds of this process and of the helpers of its searches, which end with them."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


@dataclass(frozen=True)
class Measured:
    """One plan: seconds of CPU of the search and of what comes after it."""

    devices: int
    layers: int
    search_s: float
    whole_s: float
    joint: Joint

    @property
    def seconds(self) -> float:
        return self.search_s + self.whole_s


class Timed(JointSearch):
    """A search that remembers what it found and how long that took."""

    def search(self) -> Joint:
        start = cpu_s()
        self.joint = super().search()
        self.search_s = cpu_s() - start
        return self.joint


def measured(devices: int, layers: int) -> Measured:
    dims, cluster = DECODER.with_layers(layers), Cluster.preset("h100-sxm", max(1, devices // PER_NODE), min(devices, PER_NODE))
    options = Options(precision=Precision(master="float32"), free_micro_batches=True)
    search = Timed(lambda n: transformer_graph(dims.with_layers(SHOWN), n), Run("blocks", 0, layers), SAMPLES * devices, cluster, options)
    start = cpu_s()
    planned_jointly(search, lambda n: transformer_graph(dims, n))
    return Measured(devices, layers, search.search_s, cpu_s() - start - search.search_s, search.joint)


@dataclass(frozen=True)
class OfKinds:
    """Plans of a model of so many kinds of blocks: CPU seconds for few samples a device and for many, and whether memory binds for those."""

    kinds: int
    few_s: float
    many_s: float
    binds: bool


def of_kinds(kinds: int) -> OfKinds:
    dims, cluster = DECODER.with_layers(AT_LAYERS), Cluster.preset("h100-sxm", 1, PER_NODE)
    inners = [dims.inner - NARROWER * n for n in range(kinds)]

    def planned(samples: int) -> tuple[float, str]:
        graph, start = transformer_graph(dims, samples * PER_NODE, inners=inners), cpu_s()
        status = plan_graph(graph, cluster, Options(precision=Precision(master="float32"))).plan.proof.status
        return cpu_s() - start, status

    (few_s, _), (many_s, status) = planned(SAMPLES), planned(MANY)
    return OfKinds(kinds, few_s, many_s, "linear memory limit" in status)


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """Least squares: (slope, value at 0, share of the variance that it explains)."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / spread if spread else 0.0
    total = sum((y - mean_y) ** 2 for y in ys)
    rest = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(xs, ys))
    return slope, mean_y - slope * mean_x, 1 - rest / total if total else 1.0


def print_rows(page: Console, rows: Sequence[Measured]) -> None:
    table = Table("devices", "layers", "points", "sharded", "planned", "search", "whole graph", "in all", "gap", "", box=None)
    most = max(row.seconds for row in rows)
    for row in rows:
        _, sharded, *_, planned = row.joint.looked
        table.add_row(
            f"{row.devices:,}", str(row.layers), str(row.joint.num_points), str(sharded), str(planned), f"{row.search_s:.2f} s", f"{row.whole_s:.2f} s", f"{row.seconds:.2f} s",
            f"{row.joint.gap:.2%}", "#" * max(1, round(BAR * row.seconds / most)),
        )  # fmt: skip
    page.print(table)


def print_kinds(page: Console, rows: Sequence[OfKinds]) -> None:
    columns = {f"{SAMPLES} samples a device": [row.few_s for row in rows], f"{MANY} samples a device": [row.many_s for row in rows]}
    table = Table("kinds of blocks", *columns, "memory binds", "", box=None)
    most = max(row.many_s for row in rows)
    for row in rows:
        table.add_row(str(row.kinds), f"{row.few_s:.2f} s", f"{row.many_s:.2f} s", "yes" if row.binds else "no", "#" * max(1, round(BAR * row.many_s / most)))
    page.print(table)
    kinds = [row.kinds for row in rows]
    for name, taken in columns.items():
        each, none, share = line(kinds, taken)
        power, _, _ = line([math.log2(n) for n in kinds], [math.log2(s) for s in taken])
        page.print(f"{name}: {each:+.3f} s for every kind of block, from {none:.2f} s ({share:.0%} of the variance); seconds grow with kinds to the power {power:.2f}")


def svg(rows: dict[str, list[tuple[float, float]]]) -> str:
    """A plot for each part: seconds over powers of two."""
    width, height, edge, parts = 420, 260, 45, []
    for n, (title, points) in enumerate(rows.items()):
        left, most = n * width, max(y for _, y in points)
        low, high = math.log2(points[0][0]), math.log2(points[-1][0])
        places = [(left + edge + (math.log2(x) - low) / max(high - low, 1) * (width - 2 * edge), height - edge - y / most * (height - 2 * edge), x, y) for x, y in points]
        parts.append(f'<text x="{left + edge}" y="20">CPU seconds to plan over {title}</text>')
        parts.append(f'<polyline fill="none" stroke="black" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/><text x="{x - 12:.1f}" y="{y - 8:.1f}">{s:.1f}</text><text x="{x - 12:.1f}" y="{height - 20}">{a:,.0f}</text>' for x, y, a, s in places]
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * len(rows)}" height="{height}" font-family="sans-serif" font-size="11">\n{body}\n</svg>\n'


def main(
    devices: Annotated[str, typer.Option(help=f"Numbers of devices, of {AT_LAYERS} layers.")] = DEVICES,
    layers: Annotated[str, typer.Option(help=f"Numbers of layers, on {AT_DEVICES} devices.")] = LAYERS,
    kinds: Annotated[str, typer.Option(help=f"Numbers of different blocks among {AT_LAYERS} layers, on {PER_NODE} devices.")] = KINDS,
    out: Annotated[Path | None, typer.Option(help="Write the plot to this SVG file.")] = None,
) -> None:
    """Print the tables, with a line through each."""
    page = Console(width=180)
    over_devices = [measured(int(n), AT_LAYERS) for n in devices.split(",")]
    print_rows(page, over_devices)
    slope, at_one, share = line([math.log2(row.devices) for row in over_devices], [row.seconds for row in over_devices])
    page.print(f"{slope:+.2f} s for every doubling of the devices, from {at_one:.2f} s (that line explains {share:.0%} of the variance)\n")
    over_layers = [measured(AT_DEVICES, int(n)) for n in layers.split(",")]
    print_rows(page, over_layers)
    power, _, share = line([math.log2(row.layers) for row in over_layers], [math.log2(row.seconds) for row in over_layers])
    page.print(f"seconds grow with layers to the power {power:.2f} ({share:.0%} of the variance), all of them one block\n")
    over_kinds = [of_kinds(int(n)) for n in kinds.split(",")]
    print_kinds(page, over_kinds)
    if out is not None:
        lines = {"devices": [(r.devices, r.seconds) for r in over_devices], "layers": [(r.layers, r.seconds) for r in over_layers]}
        out.write_text(svg(lines | {"kinds of blocks": [(r.kinds, r.few_s) for r in over_kinds], f"kinds, {MANY} samples a device": [(r.kinds, r.many_s) for r in over_kinds]}))


if __name__ == "__main__":
    typer.run(main)
