"""Gradient reduction: bucketed, overlapping the backward, and no more often than the ZeRO stage of a parameter asks for.

Stage 0 and 1 sum once per step (all-reduce, reduce-scatter), 2 and 3 reduce-scatter in every backward and keep only the sum of
their own part.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ref

import torch

from autopar.core.buckets import IN_FLIGHT
from autopar.runtime.distributed import GroupExchange
from autopar.runtime.parts import Parts
from autopar.runtime.rank import Rank

Deliver = Callable[[int, torch.Tensor], None]
"""Takes (parameter, complete gradient of this rank's stored part)."""


def make_dense(leaf: torch.Tensor) -> None:
    """Where only look-ups took part in a backward, the gradient of a tied table is rows alone (`rewrite/tied.py`)."""
    if leaf.grad is not None and leaf.grad.is_sparse:
        leaf.grad = leaf.grad.to_dense()


@dataclass(eq=False)
class Bucket:
    """Gradients that travel together: reduce-scattered over `scatter`, then summed over `rest` (axes joined by '+', '' for none).

    Of the ranks in `scatter`, `copies` have the same gradient each, which must count once. `missing`: members whose gradient has
    not arrived in this backward; `rows`: those that have; `flat`: the sum under way; `total`: what is complete.
    """

    stage: int
    members: tuple[int, ...]
    parts: Parts
    scatter: str
    rest: str
    dtype: torch.dtype
    copies: int = 1
    missing: set[int] = field(default_factory=set)
    rows: torch.Tensor | None = None
    work: Any = None
    flat: torch.Tensor | None = None
    total: torch.Tensor | None = None


def _arrived(reducer: "ref[Reducer]", v: int, leaf: torch.Tensor) -> None:
    """A gradient lies in its leaf. Who holds a graph that leads there holds the reducer too (`Share.compute`)."""
    found = reducer()
    assert found is not None, f"the gradient of parameter {v} arrives after the reducer of its module is gone"
    found.arrived(v)


class Reducer:
    """Collects gradients of leaves as the backward makes them, sums full buckets while it goes on, delivers at its end.

    `leaves` are those of stage 0 to 2 by parameter; the gradients of stage 3 come through `scatter`.
    """

    def __init__(self, buckets: Sequence[Bucket], leaves: dict[int, torch.Tensor], rank: Rank, deliver: Deliver) -> None:
        self.buckets, self.leaves, self.rank, self.deliver = list(buckets), leaves, rank, deliver
        self.enabled = True
        self.place_of = {v: (b, i) for b in self.buckets if b.stage < 3 for i, v in enumerate(b.members)}
        self._armed = False
        self._scattered: list[Bucket] = []
        for v, leaf in leaves.items():
            if leaf.requires_grad:
                # The garbage collector does not see through such a hook (torch 2.13): one that held the reducer would keep its leaves for good.
                leaf.register_post_accumulate_grad_hook(partial(_arrived, ref(self), v))

    def scatter(self, bucket: Bucket, grads: Sequence[torch.Tensor]) -> None:
        """Complete local gradients of a ZeRO-3 bucket."""
        self._arm()
        for i, grad in enumerate(grads):
            self._put(bucket, i, grad)
        self._launch(bucket)

    def _arm(self) -> None:
        if self._armed:
            return
        self._armed = True
        # Private but stable since torch 1.x: DDP and FSDP end their backward with the same callback (torch 2.13).
        torch.autograd.Variable._execution_engine.queue_callback(self._end)
        for bucket in self.buckets:
            bucket.missing = set(range(len(bucket.members)))

    def arrived(self, v: int) -> None:
        """The gradient of a leaf is there."""
        bucket, i = self.place_of.get(v, (None, 0))
        make_dense(self.leaves[v])
        if not self.enabled and (bucket is None or bucket.stage < 2):
            return
        self._arm()
        if bucket is not None:
            self._take(bucket, i)
            if not bucket.missing:
                self._launch(bucket)

    def _take(self, bucket: Bucket, i: int) -> None:
        """Copy a gradient to its bucket and drop it: its memory serves the next one while it is warm. One that is alone is the bucket."""
        leaf = self.leaves[bucket.members[i]]
        grad, leaf.grad = leaf.grad, None
        if grad is not None and bucket.parts.whole and grad.dtype == bucket.dtype and grad.is_contiguous():
            bucket.missing.discard(i)
            self._make_room()
            bucket.rows = grad.view(bucket.parts.ranks, -1)
        else:
            self._put(bucket, i, grad)

    def _make_room(self) -> None:
        while len(self._scattered) >= IN_FLIGHT:
            self._collect(self._scattered[0])

    def _put(self, bucket: Bucket, i: int, grad: torch.Tensor | None) -> None:
        bucket.missing.discard(i)
        if bucket.rows is None:
            self._make_room()
            bucket.rows = bucket.parts.rows(bucket.dtype, self.rank.device)
        if grad is None:
            bucket.parts.clear(bucket.rows, i)
        else:
            bucket.parts.put(bucket.rows, i, grad)

    def _launch(self, bucket: Bucket) -> None:
        """Start the sum; members without a gradient on this rank add zeros."""
        for i in sorted(bucket.missing):
            self._take(bucket, i)
        if bucket.work is not None:  # a second backward before the end of the first
            self._collect(bucket)
        rows, bucket.rows = bucket.rows, None
        assert rows is not None
        if bucket.copies > 1:
            rows.div_(bucket.copies)
        if bucket.scatter:
            self.rank.count("reduce_scatter", bucket.scatter, rows)
            bucket.flat, bucket.work = self._exchange(bucket.scatter).start_reduce_scatter(rows)
            self._scattered.append(bucket)
        else:
            self.rank.count("all_reduce", bucket.rest, rows)
            bucket.flat, bucket.work = self._exchange(bucket.rest).start_all_reduce(rows.view(-1))

    def _exchange(self, axes: str) -> GroupExchange:
        exchange = self.rank.exchanges[axes]
        assert isinstance(exchange, GroupExchange)
        return exchange

    def _collect(self, bucket: Bucket) -> None:
        bucket.work.wait()
        bucket.total = bucket.flat if bucket.total is None else bucket.total.add_(bucket.flat)
        bucket.work = bucket.flat = None
        if bucket in self._scattered:
            self._scattered.remove(bucket)

    def _end(self) -> None:
        self._armed = False
        for bucket in self.buckets:
            if bucket.rows is not None:
                self._launch(bucket)
        for bucket in self.buckets:
            if bucket.work is not None:
                self._collect(bucket)
        if self.enabled:
            self._deliver()

    def complete(self) -> None:
        """Sum and deliver what backwards without a sum have left; nothing where the last one did."""
        for bucket in self.buckets:
            if bucket.stage < 2 and any(self.leaves[v].grad is not None for v in bucket.members):
                bucket.missing = set(range(len(bucket.members)))
                self._launch(bucket)
        for bucket in self.buckets:
            if bucket.work is not None:
                self._collect(bucket)
        self._deliver()

    def _deliver(self) -> None:
        self._sum_over_rest()
        for bucket in self.buckets:
            if bucket.total is not None:
                for v, part in zip(bucket.members, bucket.parts.own(self.rank.on_host(bucket.total))):
                    self.deliver(v, part)
                bucket.total = None
        for v, leaf in self.leaves.items():
            if leaf.grad is not None:
                self.deliver(v, self.rank.on_host(leaf.grad))
                leaf.grad = None

    def addends(self) -> Iterator[tuple[int, torch.Tensor, bool]]:
        """(parameter, this rank's addend of its gradient, whether that is of the stored part) between the backwards of a step.

        A tied parameter of stage 3 has one for each of its buckets.
        """
        for v, leaf in self.leaves.items():
            if leaf.grad is not None:
                yield v, leaf.grad, False
        for bucket in self.buckets:
            if bucket.total is not None:
                yield from ((v, part, True) for v, part in zip(bucket.members, bucket.parts.own(bucket.total)))

    def restart(self, members: Container[int]) -> None:
        """Zeros as the addends of these parameters, and of those that share a bucket with one; none for others."""
        for b in self.buckets:
            keep = b.stage >= 2 and any(v in members for v in b.members)
            b.total = torch.zeros(b.parts.total, dtype=b.dtype, device=self.rank.device) if keep else None
        for v, leaf in self.leaves.items():
            bucket, _ = self.place_of.get(v, (None, 0))
            apart = bucket is None or bucket.stage < 2
            leaf.grad = torch.zeros_like(leaf, requires_grad=False) if apart and v in members else None

    def _sum_over_rest(self) -> None:
        works = []
        for bucket in self.buckets:
            if bucket.total is not None and bucket.scatter and bucket.rest:
                self.rank.count("all_reduce", bucket.rest, bucket.total)
                works.append(self._exchange(bucket.rest).start_all_reduce(bucket.total)[1])
        for work in works:
            work.wait()
