"""What a rank really allocates while it trains: torch's own allocator reports, read from the profiler.

The CPU allocator tells the profiler of every block it hands out and takes back, workspaces inside operators included. Blocks that a thread
of the communication backend gives back are not reported; they are known to be free when their address is handed out again, so a step may
read too high, never too low. Which blocks those are changes from step to step, while the blocks handed out do not: after each of them the
smallest of several steps counts. A step that frees nothing that was there before it has the peak: what was there, plus the largest sum.
"""

import gc
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import autopar
from autopar.models.load import load_model
from autopar.runtime.launch import Worker, launch

STEPS = 5

Case = tuple[str, str, dict[str, Any]]
"""(model, plan as text, further arguments of `load_model`)."""


def held_bytes() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    tensors = (t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu")
    storages = (t.untyped_storage() for t in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def allocations_during(run: Callable[[], Any]) -> list[tuple[int, int]]:
    """For every block handed out while `run` runs: its bytes, and the bytes of all that are out then, beside those there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    blocks: dict[int, int] = {}
    total, found = 0, []
    for event in sorted(events, key=lambda e: e["ts"]):
        address, num_bytes = event["args"]["Addr"], event["args"]["Bytes"]
        total -= blocks.pop(address, 0)
        if num_bytes > 0:
            blocks[address] = num_bytes
            total += num_bytes
            found.append((num_bytes, total))
    return found


def peak_of(steps: Sequence[Sequence[tuple[int, int]]]) -> int:
    """The most bytes out at a time, from what several steps that do the same have reported."""
    if len({tuple(num_bytes for num_bytes, _ in step) for step in steps}) == 1:
        return max(min(total for _, total in same) for same in zip(*steps))
    return min(max(total for _, total in step) for step in steps)


def peak_of_a_step(name: str, plan: autopar.Plan, given: dict[str, Any]) -> int:
    """Peak bytes of this rank in a step with AdamW that is like every later one."""
    loaded = load_model(name, device="cpu", **given)
    model = autopar.parallelize(loaded.module, autopar.Cluster.local(plan.mesh.num_ranks), loaded.kwargs, plan=plan)
    batch = {k: v.clone() for k, v in loaded.kwargs.items()}
    del loaded
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        model.train_step(batch)
        optimizer.step()

    step()
    held, steps = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        held.append(held_bytes())
        steps.append(allocations_during(step))
    return min(held) + peak_of(steps)


def _rank(worker: Worker, cases: Sequence[Case]) -> None:
    torch.set_num_threads(1)
    for n, (name, plan, given) in enumerate(cases):
        idle = held_bytes()
        worker.send((n, worker.rank, peak_of_a_step(name, autopar.Plan.from_json(plan), given) - idle))


def measured_bytes(cases: Sequence[Case], num_ranks: int) -> list[list[int]]:
    """For every case the peak of every rank."""
    found: dict[tuple[int, int], int] = {}
    launch(_rank, num_ranks, list(cases), on_message=lambda message: found.update({message[:2]: message[2]}))
    return [[found[n, rank] for rank in range(num_ranks)] for n in range(len(cases))]
