"""Timing on real ranks, all of them at the same time, as in a training step.

What is measured is processor time: of all threads of a process, those that talk included. Other programs on the machine make a clock run on while a
process waits for its turn; its processor time they change little. On a CPU nearly all of a collective is processor time too.

A collective is timed between computations and these are subtracted: ranks that take turns on their cores come to it one after the other, with cold
caches on both sides, and that costs more than the message (4 ranks on 2 cores, an all-reduce of 1 KB: twice what it takes back to back).
"""

import ctypes
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

import autopar.api
from autopar.core.again import KEPT
from autopar.core.cluster import Cluster
from autopar.core.device import MEASURED_COLLECTIVES
from autopar.core.mesh import Mesh
from autopar.models.load import LoadedModel, load_model
from autopar.profiler.calls import in_turns
from autopar.profiler.samples import SAMPLES, forward_of
from autopar.profiler.tasks import Task
from autopar.runtime.distributed import GroupExchange
from autopar.runtime.launch import Worker
from autopar.runtime.rank import Rank
from autopar.runtime.tape import Tape, product

BATCHES = 5
"""Timed runs of a task, of which the lower quartile counts: what disturbs only adds."""

RUN_S = 0.04
"""Processor seconds of such a run, at least of one call."""

MAX_CALLS = 200

BETWEEN = 512
"""Rows, columns and depth of the matrix product between collectives: a few milliseconds."""

STREAMED_BYTES = 64 << 20
"""More than the caches of a processor hold."""

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""

Call = Callable[[], object]


def measure(worker: Worker, tasks: Sequence[Task]) -> None:
    """On every rank: time the tasks; rank 0 sends (task, processor seconds of a call, mean over ranks)."""
    groups: dict[int, GroupExchange] = {}
    between = _call(Task("matmul", (BETWEEN,) * 3), groups)
    _keep_memory()
    single = [task for task in tasks if forward_of(task).op in SAMPLES]
    together = {task: _mean_over_ranks(seconds) for task, seconds in in_turns(single).items()}
    for task in tasks:
        if task in together:
            seconds = together[task]
        else:
            call = _call(task, groups)
            seconds = _added_seconds(between, call) if task.op in MEASURED_COLLECTIVES else processor_seconds(call)
        if worker.rank == 0:
            worker.send((task, seconds))


def _keep_memory() -> None:
    """What is freed is what is allocated next, where the C library can be told: to fetch its pages from the system anew takes as long as what is measured."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(MMAP_THRESHOLD, 2**30)


def processor_seconds(call: Call) -> float:
    calls = _num_calls(call)
    return _mean_over_ranks(sorted(_run(call, calls) for _ in range(BATCHES))[BATCHES // 4])


def _added_seconds(between: Call, call: Call) -> float:
    """What a call adds to computations that it comes between: the median of runs with it less the runs without, side by side."""

    def both() -> None:
        between()
        call()

    calls = _num_calls(both)
    added = sorted(_mean_over_ranks(_run(both, calls)) - _mean_over_ranks(_run(between, calls)) for _ in range(BATCHES))
    return max(added[BATCHES // 2], 1e-6)


def _num_calls(call: Call) -> int:
    """Calls that make a run, the same on every rank."""
    for _ in range(2):
        call()
    return min(MAX_CALLS, max(1, int(RUN_S / _mean_over_ranks(_run(call, 1)))))


def _run(call: Call, calls: int) -> float:
    dist.barrier()
    start = time.process_time()
    for _ in range(calls):
        call()
    return max((time.process_time() - start) / calls, 1e-9)


def _mean_over_ranks(value: float) -> float:
    """The same on every rank, so that all make the same number of calls."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def _call(task: Task, groups: dict[int, GroupExchange]) -> Call:
    """What is timed for a task."""
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
        case "block":  # (batch, sequence, width, layers)
            return _block(load_block(task, device="cpu"))
        case "accumulate":  # (microbatches, batch, sequence, width, layers)
            return _accumulate(*task.shape)
    size, num_bytes = task.shape  # a collective: (ranks of a group, input bytes of a rank)
    return _collective(task.op, _group(size, groups), torch.zeros(num_bytes // 4))


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
    """A step of so many microbatches, each rank on its own samples."""
    ranks = dist.get_world_size()
    loaded = load_block(Task("block", (micro_batches * batch * ranks, *shape)), device="cpu")
    module = autopar.api.parallelize(loaded.module, Cluster.local(ranks), loaded.kwargs, pins=(f"dp={ranks}",), micro_batches=micro_batches)

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
    """Every rank sends to the next and receives from the one before."""
    me = dist.get_rank(exchange.group)
    sent = dist.isend(x, group=exchange.group, group_dst=(me + 1) % exchange.size)
    received = dist.irecv(y, group=exchange.group, group_src=(me - 1) % exchange.size)
    for work in (sent, received):
        if work is not None:
            work.wait()
