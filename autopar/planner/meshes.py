"""Which meshes to try for a number of devices, and how to call their axes afterwards."""

import math
from collections.abc import Sequence

from autopar.core.mesh import Mesh, MeshAxis
from autopar.core.mixed import Machines
from autopar.errors import UsageError
from autopar.planner.pins import Pins
from autopar.program import Program


def forced_mesh(pins: Pins, cluster: Machines) -> Mesh | None:
    """The mesh of a stage that pinned degrees make; the degree that is not pinned takes the devices that are left. None: any mesh."""
    given = dict(pins.mesh_axes)
    devices, ranks = cluster.num_devices, pins.pp or 1
    product = math.prod(given.values())
    if devices % (product * ranks) or (len(given) == 2 and product * ranks != devices):
        text = " x ".join(f"{k}={v}" for k, v in {**({"pp": ranks} if pins.pp else {}), **given}.items())
        raise UsageError(f"pins {text} make {product * ranks} devices, {cluster.name} has {devices}; choose degrees whose product {'is' if len(given) == 2 else 'divides'} {devices}")
    if not given:
        return None
    n = devices // ranks
    for name in ("dp", "tp"):
        given.setdefault(name, n // product)
    axes = tuple(MeshAxis(name, given[name]) for name in ("dp", "tp") if given[name] > 1)
    return Mesh(axes or (MeshAxis("dp", 1),))


def candidate_meshes(n: int) -> tuple[Mesh, ...]:
    """All meshes of one axis and of two axes with `n` ranks, outermost first."""
    one = Mesh((MeshAxis("a", n),))
    two = [Mesh((MeshAxis("a", k), MeshAxis("b", n // k))) for k in range(2, n) if n % k == 0 and n // k > 1]
    return (one, *two)


def role_names(program: Program, batch: Sequence[frozenset[int]]) -> tuple[str, ...]:
    """What people would call each axis: dp where most work is cut along the batch, tp where along other factors."""
    names: list[str] = []
    for axis in range(len(program.mesh.axes)):
        along = {"dp": 0.0, "tp": 0.0}
        for rule, strategy, factors in zip(program.rules, program.strategies, batch):
            choice = strategy[axis]
            if choice.kind == "cut" and rule.cost == "contract":
                along["dp" if choice.index in factors else "tp"] += rule.flops
        names.append("dp" if program.mesh.sizes[axis] == 1 else "idle" if not any(along.values()) else "dp" if along["dp"] >= along["tp"] else "tp")
    return tuple(name if names.count(name) == 1 else name + "abc"[names[:i].count(name)] for i, name in enumerate(names))


def flops_share(cluster: Machines, program: Program, step_s: float) -> float:
    """Model flops of a training step (contractions forward, and twice that backward), as a share of what all devices could do meanwhile (MFU)."""
    graph = program.graph
    live = graph.differentiated
    flops = sum(r.flops * (3 if any(v in live for v in op.results) else 1) for op, r in zip(graph.ops, program.rules) if r.cost == "contract")
    dtype = graph.values[graph.params[0]].meta.dtype if graph.params else "float32"
    peak = 0.0
    for group in cluster.groups:
        peaks = dict(group.device.peak_flops_per_s)
        peak += peaks.get(dtype, peaks["float32"]) * group.num_devices
    return program.residency.micro_batches * flops / (peak * step_s) if step_s else 0.0
