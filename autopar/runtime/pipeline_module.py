"""One rank's share of a model that is cut into pipeline stages."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from autopar.core.ledger import Ledger
from autopar.core.pipeline import PP
from autopar.core.schedule import Schedule
from autopar.core.timeline import Timeline
from autopar.errors import UsageError
from autopar.runtime.distributed import GroupExchange, Places
from autopar.runtime.lasting import Lasting
from autopar.runtime.microbatches import Batch, loss_weights, split_batch
from autopar.runtime.module import ParallelModule
from autopar.runtime.post import ProcessPost
from autopar.runtime.rank import Counter, Rank, Stream
from autopar.runtime.share import Share
from autopar.runtime.stage_run import Column, StageRun
from autopar.runtime.walk import Walk
from autopar.stages import Stages


@dataclass
class ShareEngine:
    """A `Share` as the engine of a stage: columns of one."""

    share: Share
    splits: bool

    @property
    def ranks(self) -> Sequence[Rank]:
        return (self.share.rank,)

    def start(self) -> None:
        self.share.begin_refresh()

    def compute(self, microbatch: int, given: Mapping[int, Column]) -> list[Column]:
        self.share.rank.stream.microbatch = microbatch
        return [[x] for x in self.share.compute({v: x for v, (x,) in given.items()})]

    def differentiate(self, tensors: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], *, last: bool) -> None:
        if not tensors:
            return
        if last:
            torch.autograd.backward(tensors, grads)
        else:
            with self.share.no_sync():
                torch.autograd.backward(tensors, grads)

    def finish(self) -> None:
        self.share.reducer.complete()


class PipelineModule(ParallelModule):
    """The stages of one rank. Parameters are DTensors over the mesh of their stage; a rank has those of its own stages only.

    What ZeRO 1 and 2 gather once a step is on its way from the beginning of the step, stage by stage in the order of first use; a stage waits for its own
    before its first forward, and the rest goes on behind computations and messages. Nothing can wait for itself: all members of a group begin the same
    gathers in the same order, before any message of the step and in groups that nothing else uses where a rank has several stages, so that a gather
    waits for earlier gathers and the last step alone.

    Clip gradients with `clip_grad_norm_` of the module: torch's own sees one stage.
    """

    def __init__(self, stages: Stages, schedule: Schedule, forward_schedule: Schedule, traced: Any, places: Places) -> None:
        super().__init__()
        self._stages, self._schedule, self._forward_schedule, self._traced, self._places = stages, schedule, forward_schedule, traced, places
        self._runs: dict[int, StageRun] = {}
        self._shares: dict[int, Share] = {}
        self.lasting = Lasting()
        self._walk: Walk | None = None
        self._epoch_s = time.time() - time.perf_counter()

    def add_stage(self, number: int, share: Share, *, splits: bool) -> None:
        """One of this rank's stages, in order."""
        self._shares[number] = share
        self._runs[number] = StageRun(self._stages.stages[number], ShareEngine(share, splits), self._stages.whole.graph.seeds)
        self._post = ProcessPost(self._stages, share.rank, self._places, {s: x.store for s, x in self._shares.items()})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UsageError("a pipeline runs whole steps: call train_step(batch), or evaluate(batch) for the loss without gradients")

    def train_step(self, batch: Batch, *, scaler: torch.amp.GradScaler | None = None) -> torch.Tensor:
        """One step by the plan's schedule; the loss comes back on every rank. Raises UsageError for a `scaler`: its verdict on a step
        would differ between stages."""
        if scaler is not None:
            raise UsageError("loss scaling is not offered with a pipeline; use bfloat16, which needs none")
        loss = self._run(batch, self._schedule, training=True)
        self.stream.step += 1
        return loss

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        return self._run(batch, self._forward_schedule, training=False)

    def _run(self, batch: Batch, schedule: Schedule, *, training: bool) -> torch.Tensor:
        pieces = split_batch(batch, self._stages.whole.residency.micro_batches)
        weights = loss_weights(self._traced, pieces)
        graph = self._stages.whole.graph
        numbers = [v for v, value in enumerate(graph.values) if value.role == "input"]
        flat = [self._traced.flat_inputs((), piece) if isinstance(piece, dict) else self._traced.flat_inputs(piece, {}) for piece in pieces]
        inputs = [dict(zip(numbers, tensors)) for tensors in flat]
        self._copy_twins()
        self.lasting.clear()
        for number in schedule.by_first_use(self._places.rank):
            self._runs[number].start(inputs, weights, {}, len(schedule.microbatches(number)))
        if training:
            self._post.start()
        walk = Walk(self._places.rank, self._stages, self._runs, self._post, schedule.ranks[self._places.rank], training)
        walk.advance()
        self._post.flush()
        self._walk = walk if training else self._walk
        return self._loss(weights)

    def _copy_twins(self) -> None:
        """A parameter of two stages of this rank is one parameter to the optimizer; the other follows."""
        first: dict[int, torch.nn.Parameter] = {}
        for share in self._shares.values():
            for v, parameter in share.store.parameters.items():
                if first.setdefault(v, parameter) is not parameter:
                    with torch.no_grad():
                        parameter.to_local().copy_(first[v].to_local())

    def _loss(self, weights: Sequence[float]) -> torch.Tensor:
        """The loss of the batch, on every rank of the pipeline."""
        seed = self._stages.whole.graph.seeds[0]
        dtype = getattr(torch, self._stages.whole.graph.values[seed].meta.dtype)
        total = torch.zeros((), dtype=dtype, device=self._places.device)
        for run in self._runs.values():
            if seed in run.stage.own_outputs:
                place = run.stage.own_outputs.index(seed)
                total = total + sum(w * run.results[m, place][0] for m, w in enumerate(weights) if (m, place) in run.results)
        exchange = self._places.exchanges[PP]
        assert isinstance(exchange, GroupExchange)
        return exchange.all_reduce(total, "sum")

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for share in self._shares.values():
            share.forget_gradients()
            for parameter in share.store.parameters.values():
                parameter.grad = None

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """As of every plan; a weight that several stages share counts once."""
        mine = [p for p in self.parameters() if p.grad is not None]
        counted = [p.grad for name, p in self.named_parameters() if p.grad is not None and name not in self.duplicates]
        like = next((p.grad.to_local() for p in mine if isinstance(p.grad, DTensor)), torch.zeros(()))  # a rank may count none, as all but one copy of a model do
        norm: Any = get_total_norm(counted, norm_type) if counted else like.new_zeros(())
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        exchange = self._places.exchanges[PP]
        assert isinstance(exchange, GroupExchange)
        infinite = norm_type == float("inf")
        total = exchange.all_reduce(norm.detach() if infinite else norm.detach() ** norm_type, "max" if infinite else "sum")
        total = total if infinite else total ** (1 / norm_type)
        clip_grads_with_norm_(mine, max_norm, total)
        return total

    @cached_property
    def duplicates(self) -> frozenset[str]:
        found: set[str] = set()
        for v, value in enumerate(self._stages.whole.graph.values):
            if value.role in ("param", "buffer"):
                ranks = self._stages.ranks_of([s.number for s in self._stages.stages if s.program.graph.values[v].role == value.role])
                found.update(value.source if self._places.rank in ranks[1:] else ())
        return frozenset(found)

    @property
    def device_mesh(self) -> DeviceMesh:
        return self._places.whole

    @property
    def stream(self) -> Stream:
        return self._places.stream

    @property
    def _counter(self) -> Counter:
        return self._places.counter

    @property
    def predicted(self) -> Ledger:
        return self._stages.ledger(self._places.rank)

    @property
    def schedule(self) -> Schedule:
        """The lists that a training step runs."""
        return self._schedule

    @property
    def peak_in_flight(self) -> int:
        """Most (stage, microbatch) pairs of the last step at once whose forward had begun and whose backward had not ended."""
        return self._walk.peak_in_flight if self._walk else 0

    def timeline(self) -> Timeline:
        """What each rank of the pipeline did when in the last step, on every rank; times since the first began. Call it on all ranks."""
        mine = [span._replace(start_s=span.start_s + self._epoch_s, end_s=span.end_s + self._epoch_s) for span in self._walk.spans] if self._walk else []
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine if self._places.stage_rank == 0 else [])
        zero = min((span.start_s for spans in found for span in spans), default=0.0)
        spans = sorted((s._replace(start_s=s.start_s - zero, end_s=s.end_s - zero) for spans in found for s in spans), key=lambda s: (s.start_s, s.end_s, s.rank))
        return Timeline(self._schedule.name, self._schedule.num_ranks, tuple(spans))

    @property
    def code(self) -> str:
        return "\n\n".join(f"# stage {number}\n{share.code}" for number, share in self._shares.items())
