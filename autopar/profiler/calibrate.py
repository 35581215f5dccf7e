"""The cluster file of this machine: what its processes are measured to do, as the numbers that the cost models compute with.

    1. ceilings    matrix products of every dtype, elementwise passes: the peaks, the memory bandwidth, what an exponential takes
    2. blocks      forward and backward of small transformers, with these passes: which share of the ceilings operators reach, and what a call costs
    3. runtime     the optimizer's step; microbatches of a block, beside the block: what a forward or backward costs beside its operators
    4. talk        every collective over sizes and group sizes: its start, its hop, its rate

Every count that a price is fitted to comes from the cost models themselves, asked with a price of one: there is no second formula. All ranks measure
at once; a process alone on its core is faster by the crowding of the cluster, processes per core, which is also what processor seconds are multiplied
with. What this leaves out: memory bandwidth that is free while others wait, and time in which a collective keeps no core busy.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from autopar.core.cluster import Cluster, Device, Host, Link, sources
from autopar.core.device import MEASURED_COLLECTIVES, Measured
from autopar.core.mesh import Mesh
from autopar.cost_models.collectives import collective_seconds
from autopar.cost_models.memory import adam
from autopar.errors import UsageError
from autopar.planner.plan import plan_graph
from autopar.planner.states import Pricing
from autopar.planner.work import compute_seconds
from autopar.profiler import fit
from autopar.profiler.tasks import Cache, Task
from autopar.profiler.tasks import Measured as Seconds
from autopar.program import Program

MATMULS = ((64, 64, 64), (128, 256, 256), (256, 256, 1024), (512, 512, 512), (1024, 1024, 1024))
DTYPES = ("float32", "float64", "bfloat16", "float16")
PASSES = (1 << 14, 1 << 16, 1 << 18, 1 << 20)
FUNCTIONS = (1 << 16, 1 << 18)
BLOCKS = ((1, 8, 64, 8), (1, 64, 64, 8), (4, 64, 128, 8), (1, 64, 256, 8), (2, 64, 256, 8), (4, 64, 256, 8), (8, 64, 256, 8), (1, 128, 512, 8), (4, 128, 512, 4))
"""(batch, sequence, width, layers). As deep as models are: two layers, over and over, stay in the caches, where an operator takes half as long."""

SMALL = (1, 4, 32, 4)
"""The block whose microbatches are counted: next to nothing to compute."""

UPDATE = (48, 1 << 16)
WATCHED = 64
SIZES = (1 << 10, 1 << 17, 1 << 20, 1 << 22, 1 << 23)
MICRO_BATCHES = (4, 16)
FREE = 1e30
"""A rate at which nothing takes time."""


@dataclass(frozen=True)
class Calibration:
    """A cluster with the measurements it was fitted to, and how well each fit explains them."""

    cluster: Cluster
    seconds: Seconds
    fits: tuple[tuple[str, fit.Fit], ...]


Progress = Callable[[Task, int, int], None]
"""(what was measured, how many of them are, how many there will be)"""


def _quiet(task: Task, done: int, total: int) -> None:
    """The default progress: none."""


def calibrate(num_processes: int, *, cache: Cache | None = None, progress: Progress = _quiet) -> Calibration:
    """Measure `num_processes` processes of this machine, all computing at once, and fit a cluster to them: a minute or two.

    What `cache` has is not measured again. Raises UsageError where there are more processes than a machine can start.
    """
    from autopar.profiler.machine import measure  # here: who only fits need not load torch
    from autopar.runtime.launch import launch

    base = Cluster.local(num_processes)
    tasks = tasks_for(num_processes)
    known = cache.read() if cache is not None else {}
    found: dict[Task, float] = {task: known[task.key] for task in tasks if task.key in known}
    missing = [task for task in tasks if task not in found]

    def arrived(message: tuple[Task, float]) -> None:
        found[message[0]] = message[1]
        progress(message[0], len(found), len(tasks))

    if missing:
        launch(measure, num_processes, missing, on_message=arrived)
        if cache is not None:
            cache.add((task, found[task]) for task in missing)
    return fitted(base, found)


def tasks_for(num_processes: int) -> tuple[Task, ...]:
    """All that is measured, the quick things first."""
    found = [Task("matmul", shape, dtype) for dtype in DTYPES for shape in (MATMULS if dtype == "float32" else MATMULS[1:4])]
    found += [Task("stream", (elements,)) for elements in PASSES]
    found += [Task("function", (elements,)) for elements in FUNCTIONS]
    found += [Task("block", shape) for shape in BLOCKS]
    found += [Task("update", UPDATE), Task("watched", (WATCHED,))]
    found += [Task(primitive, (n, size)) for primitive in MEASURED_COLLECTIVES for n in _group_sizes(num_processes) for size in SIZES]
    return (*found, Task("block", SMALL), *(Task("accumulate", (number, *SMALL)) for number in MICRO_BATCHES))


def _group_sizes(num_processes: int) -> tuple[int, ...]:
    return tuple(n for n in dict.fromkeys((2, num_processes)) if n > 1 and num_processes % n == 0)


def fitted(base: Cluster, seconds: Seconds) -> Calibration:
    """The cluster that explains these measurements best; `base` says how many processes there are, on how many cores."""
    fits: list[tuple[str, fit.Fit]] = []
    wall = {task: value * base.crowding for task, value in seconds.items()}  # of a process among all the others
    device = _device(base, wall, fits)
    link = _link(replace(base, device=device), wall, fits)
    cluster = replace(base, device=device, intra_node=link, inter_node=link)
    return Calibration(replace(cluster, host=_host(cluster, wall)), seconds, tuple(fits))


def _digits(value: float) -> float:
    """Four digits: what a measurement has."""
    return float(f"{value:.4g}")


def _of(seconds: Seconds, op: str, dtype: str | None = None) -> list[tuple[Task, float]]:
    return [(task, value) for task, value in seconds.items() if task.op == op and dtype in (None, task.dtype)]


# --- the device ------------------------------------------------------------------------------------------------------


def _device(base: Cluster, seconds: Seconds, fits: list[tuple[str, fit.Fit]]) -> Device:
    peaks = {}
    for dtype in dict.fromkeys(task.dtype for task, _ in _of(seconds, "matmul")):
        rows = _of(seconds, "matmul", dtype)
        found = fit.linear([(1.0, 2.0 * task.shape[0] * task.shape[1] * task.shape[2]) for task, _ in rows], [value for _, value in rows])
        fits.append((f"matmul {dtype}", found))
        peaks[dtype] = 1.0 / found.prices[1]
    rows = _of(seconds, "stream")
    passes = fit.linear([(1.0, 8.0 * task.shape[0]) for task, _ in rows], [value for _, value in rows])
    fits.append(("elementwise", passes))
    blocks, functions = _of(seconds, "block"), _of(seconds, "function")
    programs = [_program(task) for task, _ in blocks]
    streams = [(0.0, 0.0, 8.0 * task.shape[0], float(task.op == "function") * task.shape[0]) for task, _ in (*rows, *functions)]
    start = (passes.prices[0], 1.0 / peaks["float32"], passes.prices[1], passes.prices[1])
    measured = [value for _, value in blocks] + [value - passes.prices[0] for _, value in (*rows, *functions)]
    reached = fit.in_turn(lambda prices: [*(_counts(program, prices) for program in programs), *streams], measured, start)
    fits.append(("blocks", reached))
    call_s, flop_s, byte_s, function_s = reached.prices
    bandwidth, peak = 1.0 / passes.prices[1], peaks["float32"]
    how = f"measured: {base.devices_per_node} processes at once on {base.host.cores:g} cores"
    return Device(
        name=f"process of {base.name}, {base.host.cores:g} cores",
        memory_bytes=base.device.memory_bytes,
        memory_bytes_per_s=_digits(bandwidth),
        peak_flops_per_s=tuple((dtype, _digits(rate)) for dtype, rate in peaks.items()),
        matmul_efficiency=_digits(min(1.0, 1.0 / (flop_s * peak))) if flop_s else 1.0,
        memory_efficiency=_digits(min(1.0, 1.0 / (byte_s * bandwidth))) if byte_s else 1.0,
        kernel_launch_s=_digits(call_s),
        function_s=_digits(function_s),
        loads_ahead=False,
        source=sources(
            f"{how}; forward and backward of transformer blocks, {reached}",
            memory="measured: physical memory by processes",
            peak=f"{how}; matrix products, {dict(fits)['matmul float32']} in float32",
            memory_bandwidth=f"{how}; elementwise passes, {passes}",
        ),
    )


@lru_cache(maxsize=64)
def _program(task: Task) -> Program:
    """The program of a block on one device."""
    from autopar.profiler.machine import load_block
    from autopar.trace.capture import trace

    loaded = load_block(task, device="meta")
    return plan_graph(trace(loaded.module, (), loaded.kwargs).graph, Cluster.local(1)).program


def _counts(program: Program, prices: tuple[float, ...]) -> tuple[float, float, float, float]:
    """(calls, flops, bytes, functions) that the cost model prices of a block, each operator under the ceiling that these prices put it under."""
    _, flop_s, byte_s, _ = prices
    more = 1.001

    def at(calls: float, flops: float, num_bytes: float, functions: float = 0.0) -> float:
        device = Device(
            name="a ruler", memory_bytes=1, memory_bytes_per_s=1.0 / max(num_bytes, 1.0 / FREE), peak_flops_per_s=(("float32", 1.0 / max(flops, 1.0 / FREE)),),
            kernel_launch_s=calls, function_s=functions, loads_ahead=False,
        )  # fmt: skip
        return compute_seconds(program, Pricing(replace(Cluster.local(1), device=device), program.mesh))

    here = at(0.0, flop_s, byte_s)
    flops = (at(0.0, flop_s * more, byte_s) - here) / (flop_s * (more - 1)) if flop_s else 0.0
    num_bytes = (at(0.0, flop_s, byte_s * more) - here) / (byte_s * (more - 1)) if byte_s else 0.0
    return at(1.0, 0.0, 0.0), flops, num_bytes, at(0.0, 0.0, 0.0, 1.0)


# --- links -----------------------------------------------------------------------------------------------------------


def _link(base: Cluster, seconds: Seconds, fits: list[tuple[str, fit.Fit]]) -> Link:
    found = []
    for primitive in MEASURED_COLLECTIVES:
        rows = _of(seconds, primitive)
        if rows:
            counts = [_hops(base, primitive, *task.shape) for task, _ in rows]
            talk = fit.linear(counts, [max(value - base.device.kernel_launch_s, value / 10) for _, value in rows])
            fits.append((primitive, talk))
            start_s, hop_s, byte_s = talk.prices
            found.append(Measured(primitive, _digits(start_s), _digits(hop_s), _digits(1.0 / max(byte_s, 1e-12))))
    if not found:
        return base.intra_node
    send = next(own for own in found if own.primitive == "send")
    how = f"measured: {base.devices_per_node} processes at once over gloo; "
    text = "; ".join(f"{name}: {talk}" for name, talk in fits if name in MEASURED_COLLECTIVES)
    return Link(
        name="gloo over loopback", latency_s=_digits(send.start_s + send.latency_s), bandwidth_bytes_per_s=send.bandwidth_bytes_per_s, source=sources(how + text),
        collectives=tuple(found),
    )  # fmt: skip


def _hops(base: Cluster, primitive: str, size: int, num_bytes: int) -> tuple[float, float, float]:
    """(starts, hops, bytes) that the cost model prices of a collective in groups of `size`."""

    def at(latency_s: float, rate: float) -> float:
        link = Link(name="a ruler", latency_s=latency_s, bandwidth_bytes_per_s=rate)
        ruler = replace(base, device=replace(base.device, kernel_launch_s=0.0), intra_node=link, inter_node=link)
        return float(collective_seconds(ruler, Mesh.of(outer=base.num_devices // size, inner=size), primitive, (1,), float(num_bytes)))

    return 1.0, at(1.0, FREE), at(0.0, 1.0)


# --- the runtime -----------------------------------------------------------------------------------------------------


def _host(cluster: Cluster, seconds: Seconds) -> Host:
    (task, update_s), *_ = _of(seconds, "update")
    policy = adam("float32")
    elements = task.shape[0] * task.shape[1]
    return Host(
        cores=cluster.host.cores,
        action_s=_digits(_action_s(seconds)),
        watch_s=_digits(sum(watched_s / watched.shape[0] for watched, watched_s in _of(seconds, "watched"))),
        update_bytes_per_s=_digits(elements * (2 * policy.parameter_bytes + policy.gradient_bytes + 2 * policy.optimizer_bytes) / update_s),
        source=sources(
            "measured: processors that this process may use",
            action="measured: microbatches with next to nothing to compute, less their operators",
            watch="measured: small products under selective recomputation",
            update_bandwidth="measured: AdamW(fused=True)",
        ),
    )


def _action_s(seconds: Seconds) -> float:
    """Of what each further microbatch of a small block takes, half of the part that is no operator of it: for a forward and a backward."""
    (few, few_s), (many, many_s) = sorted(_of(seconds, "accumulate"), key=lambda row: row[0].shape)
    return max(0.0, (many_s - few_s) / (many.shape[0] - few.shape[0]) - seconds[Task("block", SMALL)]) / 2


def write(calibration: Calibration, path: Path) -> None:
    """The cluster as a file that `--cluster` takes."""
    try:
        path.write_text(calibration.cluster.to_toml(), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out {path}: cannot be written ({error.strerror}); choose another path") from error
