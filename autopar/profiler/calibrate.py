"""The cluster file of this machine: what its processes are measured to do, as the numbers that the cost models compute with.

    1. ceilings    matrix products of every dtype, elementwise passes: the peaks and the memory bandwidth
    2. kernels     single calls of every kind of kernel, in turns: what a call takes and which share of the ceilings it reaches, what an exponential takes
    3. blocks      forward and backward of small transformers: with the kernels known, what is left to backwards, and to what lies between operators
    4. runtime     the optimizer's step; microbatches of a block, beside the block: what a forward or backward costs beside its operators
    5. talk        every collective over sizes and group sizes, messages one way at a time: its start, its hop, its rate

Every count that a price is fitted to comes from the cost models themselves, asked with a price of one: there is no second formula. All ranks measure
at once; a process alone on its core is faster by the crowding of the cluster, processes per core, which is also what processor seconds are multiplied
with. What this leaves out: memory bandwidth that is free while others wait, and that others may compute while a collective leaves cores idle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from autopar.core.cluster import Cluster, Device, Host, Link, sources
from autopar.core.device import MEASURED_COLLECTIVES, Measured
from autopar.core.kernel_rate import KERNEL_KINDS, KernelRate
from autopar.core.mesh import Mesh
from autopar.cost_models.collectives import collective_seconds
from autopar.cost_models.memory import adam
from autopar.errors import UsageError
from autopar.planner.plan import plan_graph
from autopar.planner.states import Pricing
from autopar.planner.work import compute_seconds, pieces
from autopar.profiler import fit
from autopar.profiler.samples import SAMPLES, backward_of
from autopar.profiler.samples import tasks as sample_tasks
from autopar.profiler.tasks import TOGETHER, Cache, Task
from autopar.profiler.tasks import Measured as Seconds
from autopar.program import Program

MATMULS = ((64, 64, 64), (128, 256, 256), (256, 256, 1024), (512, 512, 512), (1024, 1024, 1024))
DTYPES = ("float32", "float64", "bfloat16", "float16")
PASSES = (1 << 14, 1 << 16, 1 << 18, 1 << 20)
BLOCKS = ((1, 4, 32, 4), (1, 8, 64, 8), (1, 64, 64, 8), (4, 64, 128, 8), (1, 64, 256, 8), (2, 64, 256, 8), (4, 64, 256, 8), (8, 64, 256, 8), (1, 128, 512, 8), (4, 128, 512, 4))
"""(batch, sequence, width, layers). As deep as models are: two layers, over and over, stay in the caches, where an operator takes half as long."""

SMALL = (1, 4, 32, 1)
"""The block whose microbatches are counted: next to nothing to compute."""

UPDATE = (48, 1 << 16)
WATCHED = 64
SIZES = (1 << 10, 1 << 17, 1 << 20, 1 << 22, 1 << 23)
FURTHER = 8
"""Microbatches that are counted, beyond a few."""

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
    found += sample_tasks()
    found += [Task("block", shape) for shape in BLOCKS]
    found += [Task("update", UPDATE), Task("watched", (WATCHED,))]
    found += [Task(primitive, (n, size)) for primitive in MEASURED_COLLECTIVES for n in _group_sizes(num_processes) for size in SIZES]
    return (*found, Task("microbatches", (FURTHER, *SMALL)))


def _group_sizes(num_processes: int) -> tuple[int, ...]:
    return tuple(n for n in dict.fromkeys((2, num_processes)) if n > 1 and num_processes % n == 0)


def fitted(base: Cluster, seconds: Seconds) -> Calibration:
    """The cluster that explains these measurements best; `base` says how many processes there are, on how many cores."""
    fits: list[tuple[str, fit.Fit]] = []
    wall = {task: value * _by_clock(task, base.crowding) for task, value in seconds.items()}
    device = _device(base, wall, fits)
    link = _link(replace(base, device=device), wall, fits)
    cluster = replace(base, device=device, intra_node=link, inter_node=link)
    return Calibration(replace(cluster, host=_host(cluster, wall)), seconds, tuple(fits))


def _by_clock(task: Task, crowding: float) -> float:
    """What to multiply seconds of a task with, to have those that pass for a process among all the others."""
    if task.op not in TOGETHER:
        return crowding
    return min(1.0, crowding / 2) if task.op == "send" else 1.0  # there and back one after the other: half of the ranks leave their cores to the rest


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
        peaks[dtype] = _digits(1.0 / found.prices[1])
    rows = _of(seconds, "stream")
    passes = fit.linear([(1.0, 8.0 * task.shape[0]) for task, _ in rows], [value for _, value in rows])
    fits.append(("elementwise", passes))
    how = f"measured: {base.devices_per_node} processes at once on {base.host.cores:g} cores"
    ceilings = Device(
        name=f"process of {base.name}, {base.host.cores:g} cores", memory_bytes=base.device.memory_bytes, memory_bytes_per_s=_digits(1.0 / passes.prices[1]),
        peak_flops_per_s=tuple(peaks.items()), loads_ahead=False,
    )  # fmt: skip
    with_kernels = _with_kernels(ceilings, seconds, fits)
    device, reached = _with_blocks(with_kernels, _of(seconds, "block"))
    fits.append(("blocks", reached))
    return replace(
        device,
        source=sources(
            f"{how}; forward and backward of transformer blocks, {reached}",
            memory="measured: physical memory by processes",
            peak=f"{how}; matrix products, {dict(fits)['matmul float32']} in float32",
            memory_bandwidth=f"{how}; elementwise passes, {passes}",
            kernels=f"{how}; single calls in turns, R^2 of " + ", ".join(f"{rate.kind} {dict(fits)[rate.kind].r2:.3f}" for rate in device.kernels),
        ),
    )


def _with_kernels(device: Device, seconds: Seconds, fits: list[tuple[str, fit.Fit]]) -> Device:
    """With the rates of every kind of kernel, and what an exponential takes."""
    counts = _sample_counts(tuple(task for task in seconds if task.op in SAMPLES))
    rates, function_s = [], 0.0
    for kind in dict.fromkeys(sample.kind for sample in SAMPLES.values()):
        rows = [(counts[task], seconds[task], task) for task in counts if SAMPLES[task.op].kind == kind]
        found = fit.linear([count for count, _, _ in rows], [value for _, value, _ in rows])
        fits.append((kind, found))
        call_s, flop_s, byte_s, exponential_s = found.prices
        function_s += exponential_s
        busy = [sum(n * price for n, price in zip(count[1:], found.prices[1:])) for count, _, _ in rows]
        pairs = [(forward_s, seconds[backward_of(task)]) for forward_s, (_, _, task) in zip(busy, rows) if backward_of(task) in seconds]
        times = fit.linear([(1.0, b) for b, _ in pairs], [s for _, s in pairs]).prices[1] if pairs else 0.0
        rates.append(KernelRate(kind, _digits(call_s), _share(flop_s, device.peak("float32")), _share(byte_s, device.memory_bytes_per_s), _digits(times)))
    product = next(rate for rate in rates if rate.kind == "product")
    return replace(device, kernels=tuple(rates), function_s=_digits(function_s), matmul_efficiency=min(1.0, product.compute or 1.0))


def _share(price_s: float, ceiling: float) -> float:
    """Of a ceiling, from the price of one; 0 where it costs nothing."""
    return _digits(1.0 / (price_s * ceiling)) if price_s else 0.0


def _with_blocks(device: Device, blocks: Sequence[tuple[Task, float]]) -> tuple[Device, fit.Fit]:
    """With what whole blocks say beside their single kernels: what a call takes in a backward, with the views there and back, and what that of a product."""
    programs = [_program(task) for task, _ in blocks]

    def at(prices: tuple[float, ...]) -> Device:
        call_s, products = prices
        kernels = tuple(replace(rate, backward=products) if rate.kind == "product" else rate for rate in device.kernels)
        return replace(device, kernel_launch_s=call_s, kernels=kernels)

    def price(prices: tuple[float, ...]) -> list[float]:
        cluster = replace(Cluster.local(1), device=at(prices))
        return [compute_seconds(program, Pricing(cluster, program.mesh)) for program in programs]

    product = next(rate for rate in device.kernels if rate.kind == "product")
    found = fit.in_turn(price, [value for _, value in blocks], (product.call_s, product.backward))
    return at(tuple(_digits(value) for value in found.prices)), found


@lru_cache(maxsize=64)
def _program(task: Task) -> Program:
    """The program of a block on one device."""
    from autopar.profiler.machine import load_block
    from autopar.trace.capture import trace

    loaded = load_block(task, device="meta")
    return plan_graph(trace(loaded.module, (), loaded.kwargs).graph, Cluster.local(1)).program


@lru_cache(maxsize=8)
def _row(tasks: tuple[Task, ...]) -> tuple[Program, tuple[int, ...]]:
    """The program of all these calls, and which of them each of its operators belongs to."""
    from autopar.profiler.calls import Row
    from autopar.trace.capture import trace

    program = plan_graph(trace(Row(tasks, "meta"), (), {}).graph, Cluster.local(1)).program
    graph, call = program.graph, dict[int, int]()
    for v, value in enumerate(graph.values):  # a parameter says by its name whose it is; what is computed, by its operands
        call[v] = int(value.source[0].split(".")[1]) if value.role == "param" else call[graph.ops[graph.producer[v][0]].operands[0]]
    return program, tuple(call[op.results[0]] for op in graph.ops)


def sample_seconds(tasks: tuple[Task, ...], device: Device) -> dict[Task, tuple[float, float]]:
    """What the cost model prices of the forward and the backward of each of these single calls."""
    program, call = _row(tasks)
    found = [(0.0, 0.0)] * len(tasks)
    for piece in pieces(program, Pricing(replace(Cluster.local(1), device=device), program.mesh)):
        if isinstance(piece.key, tuple) and piece.key[0] == "op":
            there, back = found[call[piece.op]]
            found[call[piece.op]] = there + piece.seconds[0], back + sum(piece.seconds[1:])
    return dict(zip(tasks, found))


def _sample_counts(tasks: tuple[Task, ...]) -> dict[Task, tuple[float, ...]]:
    """(calls, flops, bytes, functions) of the forward of each sample, of those that it depends on, as the cost model counts them."""
    ruler = Device(name="a ruler", memory_bytes=1, memory_bytes_per_s=1.0, peak_flops_per_s=(("float32", 1.0),))

    def priced(device: Device, **rate: float) -> list[float]:
        rates = tuple(KernelRate(kind, **rate) for kind in KERNEL_KINDS)
        return [there for there, _ in sample_seconds(tasks, replace(device, kernels=rates)).values()]

    counts = {"flops": priced(ruler, compute=1.0), "bytes": priced(ruler, memory=1.0), "functions": priced(replace(ruler, function_s=1.0))}
    return {task: (1.0, *(of[n] if name in SAMPLES[task.op].by else 0.0 for name, of in counts.items())) for n, task in enumerate(tasks)}


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
    """Of what each further microbatch of a small block takes beside the block, half: for a forward and a backward."""
    ((task, added_s),) = _of(seconds, "microbatches")
    return added_s / task.shape[0] / 2


def write(calibration: Calibration, path: Path) -> None:
    """The cluster as a file that `--cluster` takes."""
    try:
        path.write_text(calibration.cluster.to_toml(), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out {path}: cannot be written ({error.strerror}); choose another path") from error
