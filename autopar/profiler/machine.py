"""Timing on real ranks, all of them at the same time, as in a training step.

Computations are measured in processor time. Other programs on the machine make a clock run on while a process waits for its turn; its processor time they
change little.

What ranks do together is measured by the clock, until the last one is done: threads that wake each other leave cores idle in between (4 ranks on 2 cores,
all-reduces of 1 KB to 256 KB: a third of the time). A collective is timed between computations and these are subtracted: ranks that take turns on their
cores come to it one after the other, with cold caches on both sides, and that costs more than the message. All such differences take turns in many short
rounds, in another order each time: over seconds the same call varies by half, and what makes a machine slower for a while then does so for all of them.
"""

import ctypes
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

import autopar.api
from autopar.core.again import KEPT
from autopar.core.cluster import Cluster
from autopar.core.mesh import Mesh
from autopar.models.load import LoadedModel, load_model
from autopar.profiler.calls import in_turns
from autopar.profiler.samples import SAMPLES, forward_of
from autopar.profiler.tasks import TOGETHER, Task
from autopar.runtime.distributed import GroupExchange
from autopar.runtime.launch import Worker
from autopar.runtime.rank import Rank
from autopar.runtime.tape import Tape, product

BATCHES = 5
"""Timed runs of a computation, of which the lower quartile counts: what disturbs only adds."""

ROUNDS = 30
"""Turns of what ranks do together, of which the mean of the middle half counts: what disturbs adds or takes away, and ranks fall into step in one way
or another, for which a median would jump between."""

SELDOM = 3
"""A call that takes longer than a turn should has its turn in every so-manieth round: it varies less."""

RUN_S = 0.04
"""Processor seconds of a run of a computation, at least of one call."""

TURN_S = 0.02
"""Seconds of such a turn. Groups that go on for long fall out of step with each other, and one computes while the other talks, which no step comes to
(4 ranks on 2 cores, an all-reduce of pairs: 2.4 ms in runs of 7 calls, 1.0 ms in runs of 50)."""

MAX_CALLS = 200

BETWEEN = 256
"""Rows, columns and depth of the matrix product between collectives: as long as an operator of a small model, a third of a millisecond on a core."""

STREAMED_BYTES = 64 << 20
"""More than the caches of a processor hold."""

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""

FEW = 2
"""Microbatches of the step that one of more is compared with."""

Call = Callable[[], object]


def measure(worker: Worker, tasks: Sequence[Task]) -> None:
    """On every rank: time the tasks; rank 0 sends (task, seconds of a call, mean over ranks)."""
    groups: dict[int, GroupExchange] = {}
    _keep_memory()
    found = _agreed(in_turns([task for task in tasks if forward_of(task).op in SAMPLES]))
    found |= _in_rounds({task: _comparison(task, groups) for task in tasks if task.op in TOGETHER})
    for task in tasks:
        seconds = found[task] if task in found else processor_seconds(_call(task))
        if worker.rank == 0:
            worker.send((task, seconds))


def _agreed(seconds: dict[Task, float]) -> dict[Task, float]:
    return dict(zip(seconds, _means_over_ranks(list(seconds.values()))))


def _keep_memory() -> None:
    """What is freed is what is allocated next, where the C library can be told: to fetch its pages from the system anew takes as long as what is measured."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(MMAP_THRESHOLD, 2**30)


def processor_seconds(call: Call) -> float:
    calls, _ = _num_calls(partial(_processor_s, call), RUN_S)
    return _mean_over_ranks(sorted(_processor_s(call, calls) for _ in range(BATCHES))[BATCHES // 4])


class Comparison(NamedTuple):
    """A call beside one without what is to be measured."""

    with_it: Call
    without: Call


def _in_rounds(compared: dict[Task, Comparison]) -> dict[Task, float]:
    """Seconds by the clock that each call takes beyond the one beside it."""
    runs = {task: _num_calls(partial(_clock_s, both.with_it), TURN_S) for task, both in compared.items()}
    added: dict[Task, list[float]] = {task: [] for task in compared}
    draw = random.Random(0)  # the same on all ranks
    for n in range(ROUNDS):
        for task in draw.sample(list(compared), len(compared)):
            calls, is_long = runs[task]
            if n % SELDOM == 0 or not is_long:
                both = compared[task]
                added[task].append(_clock_s(both.with_it, calls) - _clock_s(both.without, calls))
    return {task: max(_middle(_means_over_ranks(turns)), 1e-6) for task, turns in added.items()}


def _middle(values: Sequence[float]) -> float:
    """The mean of the middle half."""
    quarter = len(values) // 4
    return statistics.fmean(sorted(values)[quarter : len(values) - quarter])


def _num_calls(run: Callable[[int], float], seconds: float) -> tuple[int, bool]:
    """Calls that take so long together, the same on every rank, and whether one takes longer than that."""
    run(2)
    once_s = _mean_over_ranks(run(1))
    return min(MAX_CALLS, max(1, int(seconds / once_s))), once_s > seconds


def _processor_s(call: Call, calls: int) -> float:
    dist.barrier()
    start = time.process_time()
    for _ in range(calls):
        call()
    return max((time.process_time() - start) / calls, 1e-9)


def _clock_s(call: Call, calls: int) -> float:
    """Until all ranks are done."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    dist.barrier()
    return (time.perf_counter() - start) / calls


def _mean_over_ranks(value: float) -> float:
    (mean,) = _means_over_ranks([value])
    return mean


def _means_over_ranks(values: Sequence[float]) -> list[float]:
    """The same on every rank, so that all make the same number of calls."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def _call(task: Task) -> Call:
    """The computation that is timed for a task."""
    dtype = getattr(torch, task.dtype)
    match task.op:
        case "matmul":  # (rows, inner, columns)
            m, k, n = task.shape
            return partial(torch.mm, torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype))
        case "stream":  # (elements,)
            return _passes(*task.shape, dtype)
        case "update":  # (parameters, elements of each)
            return _update(*task.shape)
        case "watched":  # (operators,)
            return partial(_watched, torch.zeros(2, 2, requires_grad=True), *task.shape)
    return _block(load_block(task, device="cpu"))  # (batch, sequence, width, layers)


def _comparison(task: Task, groups: dict[int, GroupExchange]) -> Comparison:
    """What ranks do together, and the same without what the task is about."""
    if task.op == "microbatches":  # (further microbatches, batch, sequence, width, layers)
        further, *shape = task.shape
        block, few, many = _block(load_block(Task("block", tuple(shape)), device="cpu")), _accumulate(FEW, *shape), _accumulate(FEW + further, *shape)
        return Comparison(many, _in_a_row(few, *(block,) * further))
    size, num_bytes = task.shape  # a collective: (ranks of a group, input bytes of a rank)
    between = _call(Task("matmul", (BETWEEN,) * 3))
    return Comparison(_in_a_row(between, _collective(task.op, _group(size, groups), torch.zeros(num_bytes // 4))), between)


def _in_a_row(*calls: Call) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def _passes(elements: int, dtype: torch.dtype) -> Call:
    """One pass over tensors that take turns, so that each comes from memory as the activations of a model do, and not from a cache."""
    count = max(1, STREAMED_BYTES // (2 * elements * dtype.itemsize))
    turns = itertools.cycle([(torch.randn(elements, dtype=dtype), torch.ones(elements, dtype=dtype)) for _ in range(count)])

    def run() -> None:
        x, y = next(turns)
        torch.neg(x, out=y)

    return run


def _watched(x: torch.Tensor, operators: int) -> None:
    """Products that take no time, whose results are kept: half of them made, half of them had again."""
    rank, kept = Rank(Mesh.of(dp=1), 0, x.device), product(torch.mm, KEPT)
    rank.tape = Tape(rank.stream)
    for again in (False, True):
        rank.replaying = again
        for _ in range(operators // 2):
            kept(rank, x, x)


def load_block(task: Task, device: str) -> LoadedModel:
    batch, seq, hidden, layers = task.shape
    overrides = {"hidden": hidden, "layers": layers, "heads": max(1, hidden // 64), "vocab": 4 * hidden, "positions": seq}
    return load_model("transformer", batch=batch, seq=seq, device=device, overrides=overrides)


def _block(loaded: LoadedModel) -> Call:
    """Forward and backward of a small transformer, on its own."""

    def run() -> None:
        loss = loaded.module(**loaded.kwargs)
        loss.backward()
        loaded.module.zero_grad()

    return run


def _update(num_parameters: int, elements: int) -> Call:
    """A step of AdamW on parameters as a parallel module has them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parameters = [torch.nn.Parameter(DTensor.from_local(torch.randn(elements), mesh, [Replicate()], run_check=False)) for _ in range(num_parameters)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    return torch.optim.AdamW(parameters, fused=True).step


def _accumulate(micro_batches: int, batch: int, *shape: int) -> Call:
    """A step of so many microbatches, every rank on all samples: nothing is sent."""
    ranks = dist.get_world_size()
    loaded = load_block(Task("block", (micro_batches * batch, *shape)), device="cpu")
    module = autopar.api.parallelize(loaded.module, Cluster.local(ranks), loaded.kwargs, pins=(f"dp={ranks}", "*=dp:I"), micro_batches=micro_batches)

    def run() -> None:
        module.train_step(loaded.kwargs)
        module.zero_grad()

    return run


def _group(size: int, groups: dict[int, GroupExchange]) -> GroupExchange:
    """Groups of neighbours, all ranks in one."""
    if size not in groups:
        ranks = dist.get_world_size()
        made = [dist.group.WORLD if size == ranks else dist.new_group(list(range(first, first + size))) for first in range(0, ranks, size)]
        groups[size] = GroupExchange(made[dist.get_rank() // size], size, gloo=True)
    return groups[size]


def _collective(primitive: str, exchange: GroupExchange, x: torch.Tensor) -> Call:
    pieces = list(x.chunk(exchange.size))
    match primitive:
        case "all_reduce":
            return partial(exchange.all_reduce, x, "sum")
        case "all_gather":
            return partial(exchange.all_gather, x)
        case "reduce_scatter":
            return partial(exchange.reduce_scatter, pieces)
        case "all_to_all":
            return partial(exchange.all_to_all, pieces)
    return partial(_pass_on, exchange, x, torch.empty_like(x))


def _pass_on(exchange: GroupExchange, x: torch.Tensor, y: torch.Tensor) -> None:
    """Every rank sends to the next and receives from the one before, one thing after the other, as stages of a pipeline do; every other rank sends first."""
    me, size = dist.get_rank(exchange.group), exchange.size
    received = dist.irecv(y, group=exchange.group, group_src=(me - 1) % size)
    assert received is not None
    if me % 2:
        received.wait()
    sent = dist.isend(x, group=exchange.group, group_dst=(me + 1) % size)
    assert sent is not None
    sent.wait()
    if me % 2 == 0:
        received.wait()
