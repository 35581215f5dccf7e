"""Which axis belongs inside a node: one plan, priced with its ranks placed both ways round.

    python examples/rank_placement.py

A transformer (vocabulary 1024, hidden 512, 8 layers, batch 16) on 2 nodes of 4 H100s, NVLink inside a node and 10 GB/s per GPU between
nodes. The plan is made for dp2 x tp4; then the same collectives are priced with tp inside the nodes and with tp across them.
Sequences of 512: tensor parallelism moves most of the bytes; across the nodes its collectives take nine times as long, and all of them
together twice as long. Sequences of 32: hardly more bytes than the gradients, and since a tp group of 4 over 2 nodes has two
network cards per node where a dp group of 2 has one, "tp inside" is then the slower placement. So placements are priced, not ruled.
The weights live on the meta device: nothing is computed.
"""

from collections import Counter
from dataclasses import dataclass, replace

import torch

import autopar
from autopar.core.mesh import Mesh, MeshAxis
from autopar.core.moves import COLLECTIVES, step_input_bytes
from autopar.cost_models.collectives import collective_seconds
from autopar.models.own import Transformer
from autopar.planner.plan import plan_graph
from autopar.planner.search import Options
from autopar.program import Program
from autopar.trace.capture import trace


def two_nodes(inter_bytes_per_s: float = 10e9) -> autopar.Cluster:
    cluster = autopar.Cluster.preset("h100-sxm", nodes=2, devices_per_node=4)
    return replace(cluster, inter_node=replace(cluster.inter_node, bandwidth_bytes_per_s=inter_bytes_per_s))


def communication_s(program: Program, cluster: autopar.Cluster, outermost_first: tuple[str, ...]) -> dict[str, float]:
    """Seconds of a step's collectives by mesh axis (or axes, `dp+tp`), when ranks count along the last of these axes."""
    sizes = dict(zip(program.mesh.names, program.mesh.sizes, strict=True))
    placed = Mesh(tuple(MeshAxis(name, sizes[name]) for name in outermost_first))
    seconds: Counter[str] = Counter()

    def add(primitive: str, axes: tuple[int, ...], local_bytes: float) -> None:
        names = [program.mesh.names[axis] for axis in axes]
        if primitive in COLLECTIVES and axes:
            seconds["+".join(names)] += collective_seconds(cluster, placed, primitive, tuple(placed.names.index(name) for name in names), local_bytes)

    for move in program.moves:
        local = program.local_bytes(move.value, move.src)
        add(move.step.forward, (move.step.axis,), local)
        if move.live:
            add(move.step.backward, (move.step.axis,), step_input_bytes(move.step.backward, move.step, program.mesh, local, backward=True))
    for value, axes in program.deferred.items():
        add("all_reduce", axes, program.local_bytes(value, program.storage[value]))
    return dict(seconds)


@dataclass(frozen=True)
class Outcome:
    """Bytes a rank receives per axis, and seconds per axis for each order of the axes."""

    moved_bytes: dict[str, float]
    seconds: dict[tuple[str, ...], dict[str, float]]


def compare(cluster: autopar.Cluster, *, layers: int = 8, batch: int = 16, seq: int = 32) -> Outcome:
    with torch.device("meta"):
        model = Transformer(vocab=1024, positions=1024, hidden=512, layers=layers, heads=8, inner=1024)
        tokens = torch.zeros(batch, seq, dtype=torch.long)
        traced = trace(model, (), {"inputs": tokens, "labels": tokens})
    program = plan_graph(traced.graph, cluster, Options(pins=("dp=2", "tp=4"))).program
    moved: Counter[str] = Counter()
    for key, value in program.ledger.moved.items():
        moved[key.split()[1]] += value
    return Outcome(dict(moved), {order: communication_s(program, cluster, order) for order in (("dp", "tp"), ("tp", "dp"))})


def main(sequences: tuple[int, ...] = (512, 32), layers: int = 8) -> None:
    cluster = two_nodes()
    print(cluster)
    for seq in sequences:
        outcome = compare(cluster, layers=layers, seq=seq)
        moved = ", ".join(f"{axis} {value / 1e6:.1f} MB" for axis, value in outcome.moved_bytes.items())
        print(f"sequences of {seq}: a rank receives {moved} per step")
        for order, seconds in outcome.seconds.items():
            parts = ", ".join(f"{axis} {1e3 * s:.2f} ms" for axis, s in seconds.items())
            print(f"  {order[-1]} inside the nodes: {1e3 * sum(seconds.values()):.2f} ms of communication ({parts})")


if __name__ == "__main__":
    main()
