"""A calibration gives back the cluster that its measurements were made from, and remembers what it has measured."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autopar.core.cluster import Cluster, Device, Host, Link, sources
from autopar.core.device import MEASURED_COLLECTIVES, Measured
from autopar.core.kernel_rate import KernelRate
from autopar.core.mesh import Mesh
from autopar.cost_models.collectives import collective_seconds
from autopar.errors import FileFormatError
from autopar.planner.states import Pricing
from autopar.planner.work import compute_seconds
from autopar.profiler import calibrate
from autopar.profiler.machine import _middle, measure
from autopar.profiler.samples import SAMPLES, forward_of
from autopar.profiler.samples import tasks as sample_tasks
from autopar.profiler.tasks import Cache, Task
from autopar.runtime.launch import launch

RANKS = 4
WEIGHED = {sample.kind: sample for sample in SAMPLES.values()}
RATES = tuple(
    KernelRate(kind, 1e-5 * (n + 1), 0.8 / (n + 1) if "flops" in sample.by else 0.0, 0.3 + 0.1 * n if "bytes" in sample.by else 0.0, 2.0 + 0.1 * n if sample.backward else 0.0)
    for n, (kind, sample) in enumerate(WEIGHED.items())
)
"""Of every kind numbers of its own."""

FORWARD = tuple(task for task in sample_tasks() if task == forward_of(task))
TRUTH = replace(
    Cluster.local(RANKS),
    device=Device(
        name="d", memory_bytes=1 << 30, memory_bytes_per_s=8e9, peak_flops_per_s=(("float32", 40e9), ("float64", 20e9), ("bfloat16", 10e9), ("float16", 5e9)),
        matmul_efficiency=0.8, kernel_launch_s=5e-5, function_s=3e-9, loads_ahead=False, kernels=RATES,
    ),
    intra_node=Link(
        name="l", latency_s=1e-3, bandwidth_bytes_per_s=1e9,
        collectives=tuple(Measured(name, 1e-3 * n, 2e-4 * n, 1e9 / n) for n, name in enumerate(MEASURED_COLLECTIVES, 1)),
    ),
    host=Host(cores=2.0, action_s=3e-3, watch_s=6e-5, update_bytes_per_s=6e9, source=sources("assumed: a test")),
)  # fmt: skip


def seconds_of(task: Task) -> float:
    """What is measured of a task on processes that are just what `TRUTH` says: processor seconds, by the clock what ranks do together."""
    device, crowding = TRUTH.device, TRUTH.crowding
    if task.op == "matmul":
        return 2 * math.prod(task.shape) / device.peak(task.dtype) / crowding
    if task.op == "stream":
        return (1e-5 + task.shape[0] * 8 / device.memory_bytes_per_s) / crowding
    if forward_of(task).op in SAMPLES:
        return sampled(forward_of(task), backward=task != forward_of(task)) / crowding
    if task.op == "watched":
        return task.shape[0] * 6e-5 / crowding
    if task.op == "update":
        return 28 * math.prod(task.shape) / 6e9 / crowding
    if task.op == "block":
        program = calibrate._program(task)
        return compute_seconds(program, Pricing(replace(Cluster.local(1), device=device), program.mesh)) / crowding
    if task.op == "microbatches":
        return task.shape[0] * 2 * 3e-3
    size, num_bytes = task.shape
    return collective_seconds(TRUTH, Mesh.of(a=RANKS // size, b=size), task.op, (1,), float(num_bytes))


def sampled(task: Task, *, backward: bool) -> float:
    """Of a single call on a device that is just what `TRUTH` says; its backward with what starting one takes."""
    there, back = calibrate.sample_seconds(FORWARD, TRUTH.device)[task]
    return 7e-5 + back if backward else there


@pytest.fixture
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing is what a fit takes its time for."""
    monkeypatch.setattr(calibrate, "BLOCKS", ((1, 4, 32, 1), (1, 8, 64, 1), (8, 64, 64, 1), (16, 64, 256, 1)))


def test_the_cluster_of_synthetic_measurements_is_recovered(few_blocks: None, tmp_path: Path) -> None:
    found = calibrate.fitted(replace(Cluster.local(RANKS), host=Host(cores=2.0)), {task: seconds_of(task) for task in calibrate.tasks_for(RANKS)})
    cluster, device = found.cluster, found.cluster.device
    assert device.kernel_launch_s == pytest.approx(5e-5, rel=1e-3)
    assert device.peak("float32") == pytest.approx(40e9, rel=1e-3) and device.matmul_efficiency == pytest.approx(RATES[0].compute, rel=1e-2)
    assert device.memory_bytes_per_s * device.memory_efficiency == pytest.approx(8e9, rel=1e-2)
    assert device.function_s == pytest.approx(3e-9, rel=1e-2)
    for rate in RATES:
        own = device.kernel(rate.kind)
        assert own is not None and own.call_s == pytest.approx(rate.call_s, rel=1e-2), rate.kind
        assert (own.compute, own.memory, own.backward) == pytest.approx((rate.compute, rate.memory, rate.backward), rel=2e-2), rate.kind
    assert [device.peak(d) for d in ("float64", "bfloat16", "float16")] == pytest.approx([20e9, 10e9, 5e9], rel=1e-3)
    assert cluster.host.update_bytes_per_s == pytest.approx(6e9, rel=1e-3) and cluster.host.action_s == pytest.approx(3e-3, rel=2e-2)
    assert cluster.host.watch_s == pytest.approx(6e-5, rel=1e-3)
    mesh = Mesh.of(a=2, b=2)
    for primitive in MEASURED_COLLECTIVES:
        for axes, size in (((0,), 1e3), ((1,), 1e6), ((0, 1), 3e6)):
            want = collective_seconds(TRUTH, mesh, primitive, axes, size)
            assert collective_seconds(cluster, mesh, primitive, axes, size) == pytest.approx(want, rel=1e-2), (primitive, axes, size)
    assert all(fit.r2 > 0.999 for _, fit in found.fits)
    calibrate.write(found, tmp_path / "machine.toml")
    assert Cluster.load(tmp_path / "machine.toml") == cluster
    assert all(cluster.device.source_of(number).status == "measured" for number in ("memory_bandwidth", "peak", "matmul_efficiency", "kernel_launch"))


def test_a_message_takes_half_of_there_and_back_where_every_rank_has_a_core(few_blocks: None) -> None:
    """Ranks that share a core leave theirs to others for that half."""
    seconds = {task: seconds_of(task) for task in calibrate.tasks_for(RANKS)}
    mesh = Mesh.of(a=2, b=2)
    for cores, share in ((2.0, 1.0), (1.0, 1.0), (RANKS, 0.5)):
        cluster = calibrate.fitted(replace(Cluster.local(RANKS), host=Host(cores=cores)), seconds).cluster
        want = share * (collective_seconds(TRUTH, mesh, "send", (1,), 1e6) - 5e-5)
        assert collective_seconds(cluster, mesh, "send", (1,), 1e6) - cluster.device.kernel_launch_s == pytest.approx(want, rel=0.03)


def test_what_is_known_is_not_measured_again(few_blocks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "deep" / "seconds.json", "this machine, 4 processes")
    tasks = calibrate.tasks_for(RANKS)
    asked: list[Task] = []

    def pretend(function: Callable[..., None], ranks: int, missing: list[Task], *, on_message: Callable[[Any], None]) -> None:
        asked.extend(missing)
        for task in missing:
            on_message((task, seconds_of(task)))

    monkeypatch.setattr("autopar.runtime.launch.launch", pretend)
    cache.add((task, seconds_of(task)) for task in tasks[:-3])
    Cache(cache.path, "another machine").add([(tasks[-1], 1.0)])
    progress: list[int] = []
    first = calibrate.calibrate(RANKS, cache=cache, progress=lambda task, done, total: progress.append(total - done))
    assert asked == list(tasks[-3:]) and progress == [2, 1, 0]
    assert calibrate.calibrate(RANKS, cache=cache) == first and len(asked) == 3
    cache.forget()
    assert cache.read() == {} and Cache(cache.path, "another machine").read() == {tasks[-1].key: 1.0}


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema_version": 2, "seconds": {"m": {"matmul": -1}}}', '{"schema_version": 2, "seconds": {"m": 3}}', "noise"])
def test_a_file_that_is_no_cache_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(FileFormatError, match="cache.json") as raised:
        Cache(tmp_path / "cache.json", "m").read()
    assert "\n" not in str(raised.value)


def test_what_an_older_version_measured_is_measured_anew(tmp_path: Path) -> None:
    (tmp_path / "cache.json").write_text('{"schema_version": 1, "seconds": {"m": {"send 2x1024 float32": 0.5}}}')
    cache = Cache(tmp_path / "cache.json", "m")
    assert cache.read() == {}
    cache.add([(Task("send", (2, 1024)), 1e-3)])
    assert cache.read() == {"send 2x1024 float32": 1e-3}


def test_what_disturbs_a_few_turns_moves_no_mean_of_the_middle_half() -> None:
    calm = [1.0, 2.0] * 10
    disturbed = calm[:-8] + [9.0] * 4 + [-9.0] * 4
    assert _middle(calm) == _middle(disturbed) == pytest.approx(1.5)
    assert _middle([3.0]) == 3.0


@pytest.mark.gloo
def test_tasks_are_timed_on_real_ranks(long: bool) -> None:
    """Every kind of them in the long form: steps of microbatches are traced on every rank."""
    kinds = [Task("matmul", (64, 64, 64)), Task("stream", (1024,)), Task("layer norm", (8, 16)), Task("layer norm backward", (8, 16)), Task("loss", (4, 8)), Task("update", (2, 64)), Task("watched", (4,)), Task("all_reduce", (2, 1024)), Task("send", (2, 1024))]
    kinds += [Task("block", (1, 8, 64, 1)), Task("microbatches", (2, 1, 8, 64, 1)), *(Task(name, (2, 1024)) for name in MEASURED_COLLECTIVES[1:4])] if long else []
    found: list[tuple[Task, float]] = []
    launch(measure, 2, kinds, on_message=found.append)
    assert [task for task, _ in found] == kinds and all(0 < seconds < 10 for _, seconds in found)
