"""Messages between the stages of a pipeline on real processes: asynchronous sends, receives posted ahead of time."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from autopar.core.pipeline import PP
from autopar.core.schedule import SENDS, Action
from autopar.runtime.distributed import Places
from autopar.runtime.rank import Rank
from autopar.runtime.stage_run import Columns
from autopar.runtime.store import Store
from autopar.stages import Stages


class ProcessPost:
    """Of one process. Messages from one rank to another come in one order, so they need no tags."""

    def __init__(self, stages: Stages, rank: Rank, places: Places, stores: Mapping[int, Store]) -> None:
        self.stages, self.rank, self.places, self.stores = stages, rank, places, stores
        self._sent: list[tuple[Any, torch.Tensor]] = []
        self._coming: dict[Action, list[tuple[int, torch.Tensor, Any]]] = {}
        self._before: dict[torch.nn.Parameter, torch.Tensor | None] = {}

    def _peer(self, action: Action) -> tuple[int, dist.ProcessGroup]:
        """(global rank of the process with this one's place on the other rank, group for that direction)."""
        assert action.peer is not None
        other = self.stages.placement[action.peer]
        upwards = (other > self.places.rank) == (action.kind in SENDS)
        return self.places.peers[other], self.places.up if upwards else self.places.down

    def send(self, action: Action, columns: Columns) -> None:
        self._sent = [(work, x) for work, x in self._sent if not work.is_completed()]
        for (x,) in columns.values():
            x = x.contiguous()
            self.rank.counter.add("send", PP, 2, x.numel() * x.element_size())
            self._sent.append((dist.isend(x, *self._peer(action)), x))

    def expect(self, action: Action) -> None:
        """Post the receive."""
        program = self.stages.stages[max(action.stage, action.peer or 0)].program
        coming = []
        for v in self.stages.message(action):
            shape, dtype = program.local_shape(v, program.produced[v]), getattr(torch, program.graph.values[v].meta.dtype)
            x = torch.empty(shape, dtype=dtype, device=self.rank.device)
            coming.append((v, x, dist.irecv(x, *self._peer(action))))
        self._coming[action] = coming

    def receive(self, action: Action) -> Columns:
        found: Columns = {}
        for v, x, work in self._coming.pop(action):
            work.wait()
            self.rank.counter.add("receive", PP, 2, x.numel() * x.element_size())
            found[v] = [x]
        return found

    def start(self) -> None:
        """Put aside what earlier steps have left in the gradients of shared weights: that is summed already."""
        for v, numbers in self.stages.shared.items():
            for p in (self.stores[s].parameters[v] for s in numbers if s in self.stores):
                self._before[p], p.grad = p.grad, None

    def flush(self) -> None:
        """Wait until all that was sent has arrived."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def sum_shared(self, rank: int, first: int) -> bool:
        for v, numbers in self.stages.shared_by(first).items():
            parameters = [self.stores[s].parameters[v] for s in numbers if s in self.stores]
            ranks = self.stages.ranks_of(numbers)
            if rank not in ranks:
                continue
            total = sum((p.grad.to_local() for p in parameters if p.grad is not None), torch.zeros_like(parameters[0].to_local()))
            assert isinstance(total, torch.Tensor)
            if len(ranks) > 1:
                self.rank.counter.add("all_reduce", PP, len(ranks), total.numel() * total.element_size())
                dist.all_reduce(total, group=self.places.shared[ranks])
            for p in parameters:
                with torch.no_grad():
                    before = self._before.pop(p)
                    p.grad = torch.zeros_like(p) if before is None else before
                    p.grad.to_local().add_(total)
        return True
