"""Gradient reduction over the axes a parameter is replicated on: bucketed, overlapping the backward, once per step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from autopar.runtime.rank import Rank

BUCKET_BYTES = 25 << 20
"""Large enough that latency does not count, small enough that most of a backward can hide it (the size DDP uses)."""

MIN_BUCKET_BYTES = 1 << 20
"""Smaller ones would be all latency."""

MIN_BUCKETS = 2
"""Gradients that would fill fewer buckets are cut into about this many, so that a small model hides its reduction too."""


@dataclass
class Slot:
    """One parameter: its local leaf tensor and the axes its gradient is summed over ('' for none)."""

    leaf: torch.Tensor
    axes: str


@dataclass
class Bucket:
    """Slots whose gradients travel together. `missing`: those whose gradient has not arrived in this backward."""

    axes: str
    slots: list[int]
    missing: set[int] = field(default_factory=set)
    views: dict[int, torch.Tensor] = field(default_factory=dict)
    flat: torch.Tensor | None = None
    work: Any = None


class Reducer:
    """Collects gradients of leaves as the backward makes them and sums full buckets while it goes on.

    `finish` is called once at the end of a backward with every slot's gradient (None where there is none).
    """

    def __init__(self, slots: Sequence[Slot], rank: Rank, deliver: Any) -> None:
        self.slots, self.rank, self.deliver = list(slots), rank, deliver
        self.enabled = True
        self.buckets = _buckets(self.slots)
        self.bucket_of = {i: b for b in self.buckets for i in b.slots}
        self._armed = False
        for i, slot in enumerate(self.slots):
            if slot.leaf.requires_grad:
                slot.leaf.register_post_accumulate_grad_hook(lambda _, i=i: self._arrived(i))

    def _arrived(self, i: int) -> None:
        if not self.enabled:
            return
        if not self._armed:
            self._armed = True
            # Private but stable since torch 1.x: DDP and FSDP end their backward with the same callback (torch 2.13).
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
            for bucket in self.buckets:
                bucket.missing = set(bucket.slots)
        bucket = self.bucket_of.get(i)
        if bucket is not None:
            self._put(bucket, i)
            bucket.missing.discard(i)
            if not bucket.missing:
                self._launch(bucket)

    def _put(self, bucket: Bucket, i: int) -> None:
        """Copy a gradient to its place in the bucket and drop it: its memory serves the next one while it is warm."""
        leaf = self.slots[i].leaf
        if bucket.flat is None:
            sizes = [self.slots[k].leaf.numel() for k in bucket.slots]
            bucket.flat = leaf.detach().new_empty(sum(sizes))
            bucket.views = {k: part.view(self.slots[k].leaf.shape) for k, part in zip(bucket.slots, bucket.flat.split(sizes))}
        if leaf.grad is None:
            bucket.views[i].zero_()
        else:
            bucket.views[i].copy_(leaf.grad)
            leaf.grad = None

    def _launch(self, bucket: Bucket) -> None:
        """Start the sum of a bucket; members without a gradient on this rank add zeros."""
        for i in bucket.missing:
            self._put(bucket, i)
        assert bucket.flat is not None
        self.rank.count("all_reduce", bucket.axes, bucket.flat)
        exchange: Any = self.rank.exchanges[bucket.axes]
        bucket.work = dist.all_reduce(bucket.flat, group=exchange.group, async_op=True)

    def _end(self) -> None:
        self._armed = False
        for bucket in self.buckets:
            if bucket.flat is not None and bucket.missing:
                self._launch(bucket)
        results: list[torch.Tensor | None] = [slot.leaf.grad for slot in self.slots]
        for bucket in self.buckets:
            if bucket.work is None:
                continue
            bucket.work.wait()
            for i, part in bucket.views.items():
                results[i] = part
            bucket.work, bucket.flat, bucket.views = None, None, {}
        for slot in self.slots:
            slot.leaf.grad = None
        self.deliver(results)


def _buckets(slots: Sequence[Slot]) -> list[Bucket]:
    """Slots in reverse order of use, split by axes, dtype and size."""
    totals: dict[tuple[str, torch.dtype], int] = {}
    for slot in slots:
        if slot.axes and slot.leaf.requires_grad:
            key = (slot.axes, slot.leaf.dtype)
            totals[key] = totals.get(key, 0) + slot.leaf.numel() * slot.leaf.element_size()
    open_: dict[tuple[str, torch.dtype], Bucket] = {}
    sizes: dict[int, int] = {}
    found: list[Bucket] = []
    for i in range(len(slots) - 1, -1, -1):
        slot = slots[i]
        if not slot.axes or not slot.leaf.requires_grad:
            continue
        key = (slot.axes, slot.leaf.dtype)
        size = slot.leaf.numel() * slot.leaf.element_size()
        bucket = open_.get(key)
        full = min(BUCKET_BYTES, max(MIN_BUCKET_BYTES, totals[key] // MIN_BUCKETS))
        if bucket is None or sizes[id(bucket)] + size > full:
            bucket = Bucket(slot.axes, [])
            open_[key] = bucket
            sizes[id(bucket)] = 0
            found.append(bucket)
        bucket.slots.append(i)
        sizes[id(bucket)] += size
    return found
