"""One rank's parameters: stored as DTensors that the optimizer updates, and used as the tensors that the program computes with.

The two are the same memory unless ZeRO, a master copy or offload puts something between them.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard  # private; the only DTensor form of a cut inside a cut (torch 2.13)

from autopar.core.buckets import IN_FLIGHT, chunks
from autopar.core.layout import I, Layout, Placement, S, U
from autopar.errors import LayoutError
from autopar.program import Program
from autopar.runtime.distributed import GroupExchange
from autopar.runtime.parts import Parts
from autopar.runtime.pieces import Cut
from autopar.runtime.rank import Rank
from autopar.runtime.reducer import Bucket
from autopar.runtime.units import ShardedUnit, Units, link
from autopar.runtime.weights import Weights, shard

HOST = torch.device("cpu")


def torch_placements(layout: Layout) -> list[TorchPlacement]:
    """A storage or output layout (S, U and I only) in torch's terms."""
    found: list[TorchPlacement] = []
    for p in layout:
        if p.kind in "SU":
            found.append(Shard(p.dim) if p.outer == 1 else _StridedShard(p.dim, split_factor=p.outer))
        elif p.kind == "I":
            found.append(Replicate())
        else:
            raise LayoutError(f"{layout} is not a layout that a tensor can be stored in")
    return found


def layout_of(x: DTensor) -> Layout:
    """The inverse of `torch_placements`; a cut that does not divide is U, and so are those inside it."""
    left, uneven = list(x.shape), set()
    found: list[Placement] = []
    for p, ranks in zip(x.placements, x.device_mesh.shape):
        if isinstance(p, _StridedShard):
            found.append(S(p.dim, int(p.split_factor)))
        elif isinstance(p, Shard):
            if left[p.dim] % ranks:
                uneven.add(p.dim)
            left[p.dim] = -(-left[p.dim] // ranks)
            found.append(U(p.dim) if p.dim in uneven else S(p.dim))
        elif isinstance(p, Replicate):
            found.append(I)
        else:
            raise LayoutError(f"{p} is not a placement that a tensor can be stored in")
    return tuple(found)


def as_dtensor(local: torch.Tensor, layout: Layout, mesh: DeviceMesh, shape: Sequence[int]) -> DTensor:
    """A local part as the DTensor it is part of."""
    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(local, mesh, torch_placements(layout), run_check=False, shape=torch.Size(shape), stride=stride)


@dataclass(frozen=True, slots=True)
class Kind:
    """What parameters of one flat buffer share."""

    stage: int
    segment: int
    axes: tuple[int, ...]
    rest: tuple[int, ...]
    dtype: torch.dtype
    stored: torch.dtype
    trained: bool
    copies: int


@dataclass(frozen=True)
class Flat:
    """Parameters that are gathered together. Their stored parts lie side by side in `buffer`, or, where it is None, inside the
    working tensors themselves: a stage 1 or 2 without a master copy keeps nothing twice."""

    kind: Kind
    members: tuple[int, ...]
    parts: Parts
    buffer: torch.Tensor | None

    @property
    def in_place(self) -> bool:
        """Whether the working tensor is itself the rows of its gather."""
        return self.kind.stage < 3 and self.parts.whole


class Store:
    """Makes the stored parameters of a rank and keeps what the program computes with up to date.

    `leaves[v]` enters the emitted program: the working tensor, or for stage 3 the stored part.
    """

    def __init__(self, program: Program, weights: Weights, rank: Rank, device_mesh: DeviceMesh) -> None:
        self.program, self.rank, self.mesh = program, rank, program.mesh
        self.host = HOST if program.residency.offload else rank.device
        self.device_mesh = device_mesh
        self.parameters: dict[int, nn.Parameter] = {}
        self.leaves: dict[int, torch.Tensor] = {}
        self.flats = [self._flat(kind, members) for kind, members in self._kinds()]
        self._flat_of = {v: (flat, i) for flat in self.flats for i, v in enumerate(flat.members)}
        self._arriving: deque[tuple[Flat, torch.Tensor, Any]] = deque()
        for v in program.graph.params:
            self._add(v, weights)

    def _kinds(self) -> Iterator[tuple[Kind, list[int]]]:
        """Groups of parameters that are not used as they are stored, cut at the size of a bucket."""
        found: dict[Kind, list[int]] = {}
        first = {v: s for s, taken in reversed(list(enumerate(self.program.gathered))) for v in taken}
        in_order_of_use = (v for taken in self.program.gathered for v in taken)  # a unit's parts lie as they are gathered: no copy
        for v in dict.fromkeys((*in_order_of_use, *self.program.graph.params)):
            kind = self.kind(v, first.get(v, -1))
            if kind.stage or kind.dtype != kind.stored or self.program.residency.offload:
                found.setdefault(kind, []).append(v)
        for kind, members in found.items():
            for chunk in [members] if kind.stage == 3 else chunks(members, self._bytes, gathered=True):
                yield kind, chunk

    def kind(self, v: int, segment: int = -1) -> Kind:
        residency, meta = self.program.residency, self.program.graph.values[v].meta
        zero = residency.zero.get(v)
        cut = zero is not None and self.program.stored[v] != self.program.storage[v]
        axes = zero.axes if zero is not None and cut else ()
        rest = tuple(a for a in self.program.deferred[v] if a not in axes)
        dtype, stored = getattr(torch, meta.dtype), getattr(torch, residency.precision.stored(meta.dtype))
        stage = zero.stage if zero is not None and cut else 0
        return Kind(stage, segment if stage == 3 else -1, axes, rest, dtype, stored, v in self.program.graph.differentiated, self.program.copies(v) if stage else 1)

    def _bytes(self, v: int) -> int:
        return self.program.local_bytes(v, self.program.storage[v])

    def cut(self, v: int, axes: Sequence[int]) -> Cut:
        shape = self.program.graph.values[v].meta.shape
        return Cut.of(shape, self.program.storage[v], self.program.stored[v], self.mesh, self.rank.rank, axes)

    def parts(self, members: Sequence[int], axes: Sequence[int]) -> Parts:
        return Parts([self.cut(v, axes) for v in members], self.mesh.group(self.rank.rank, axes).index(self.rank.rank))

    def names(self, axes: Sequence[int]) -> str:
        return "+".join(self.mesh.names[a] for a in axes if self.mesh.sizes[a] > 1)

    def _flat(self, kind: Kind, members: Sequence[int]) -> Flat:
        parts = self.parts(members, kind.axes)
        inside = kind.stage in (1, 2) and kind.dtype == kind.stored and not self.rank.offload and all(cut.outer == 1 for cut in parts.cuts)
        return Flat(kind, tuple(members), parts, None if inside else torch.zeros(parts.total, dtype=kind.stored, device=self.host))

    def _add(self, v: int, weights: Weights) -> None:
        value = self.program.graph.values[v]
        local = shard(weights.get(value.source[0]), self.program.stored[v], self.mesh, self.mesh.coordinates(self.rank.rank))
        flat, i = self._flat_of.get(v, (None, 0))
        leaf = None
        if flat is not None and flat.kind.stage < 3:
            leaf = torch.empty(self.program.local_shape(v, self.program.storage[v]), dtype=flat.kind.dtype, device=self.rank.device)
        if flat is None:
            local = local.to(self.rank.device)
        else:
            view = flat.parts.cuts[i].split(leaf)[flat.parts.me] if flat.buffer is None else flat.parts.own(flat.buffer)[i]
            local = view.copy_(local)
        parameter = nn.Parameter(as_dtensor(local, self.program.stored[v], self.device_mesh, value.meta.shape), requires_grad=value.meta.requires_grad)
        self.parameters[v] = parameter
        if leaf is None:
            with torch.no_grad():
                leaf = parameter.to_local().detach()
        self.leaves[v] = leaf.requires_grad_(value.meta.requires_grad)

    def refresh(self) -> None:
        """Bring working copies up to date with what the optimizer left, in one gather a buffer, a few at a time."""
        self._start(IN_FLIGHT)
        self.end_refresh()

    def begin_refresh(self) -> None:
        """`refresh` with all gathers under way at a time: what is not gathered in place lies in rows until `end_refresh`."""
        self._start(len(self.flats))

    def end_refresh(self) -> None:
        """Wait for what is under way."""
        while self._arriving:
            self._take_in()

    def _start(self, at_a_time: int) -> None:
        self.end_refresh()  # of a step that was given up
        for flat in self.flats:
            if flat.kind.stage < 3:
                if len(self._arriving) == at_a_time:
                    self._take_in()
                self._arriving.append((flat, *self._gather(flat)))

    def _take_in(self) -> None:
        flat, rows, work = self._arriving.popleft()
        if work is not None:
            work.wait()
        if not flat.in_place:
            flat.parts.unpack_into(rows, [self.leaves[v].detach() for v in flat.members])

    def _gather(self, flat: Flat) -> tuple[torch.Tensor, Any]:
        """(rows of all ranks, what to wait for)."""
        axes = self.names(flat.kind.axes)
        rows, row = self._in_place(flat) if flat.in_place else (None, self._row(flat))
        if flat.parts.ranks == 1:
            return row.view(1, -1), None
        exchange = self.rank.gathers.get(axes) or self.rank.exchanges[axes]
        self.rank.count("all_gather", axes, row)
        assert isinstance(exchange, GroupExchange)
        return exchange.start_all_gather(row) if rows is None else (rows, exchange.start_filling(rows))

    def _in_place(self, flat: Flat) -> tuple[torch.Tensor, torch.Tensor]:
        """(the working tensor as rows, this rank's with what is stored)."""
        rows = self.leaves[flat.members[0]].detach().view(flat.parts.ranks, -1)
        row = rows[flat.parts.me]
        if flat.buffer is not None:
            row.copy_(self.rank.on_device(flat.buffer))
        return rows, row

    def _row(self, flat: Flat) -> torch.Tensor:
        """What this rank sends."""
        if flat.buffer is not None:
            return self.rank.on_device(flat.buffer).to(flat.kind.dtype)
        row = torch.zeros(flat.parts.total, dtype=flat.kind.dtype, device=self.rank.device)
        for v, cut, there in zip(flat.members, flat.parts.cuts, flat.parts.own(row)):
            there.copy_(cut.split(self.leaves[v].detach())[flat.parts.me])
        return row

    def buckets(self) -> list[Bucket]:
        """How gradients travel: the flat buffers of stage 1 to 3, and stage 0 cut at the size of a bucket."""
        found = []
        plain: dict[Kind, list[int]] = {}
        for v in reversed(self.program.graph.params):
            kind = self.kind(v)
            if kind.stage == 0 and kind.trained and self.names(kind.rest):
                plain.setdefault(kind, []).append(v)
        for kind, members in plain.items():
            for chunk in chunks(members, self._bytes):
                found.append(self._bucket(kind, chunk, self.parts(chunk, ())))
        for flat in reversed(self.flats):
            if flat.kind.trained and flat.kind.stage in (1, 2):
                found.append(self._bucket(flat.kind, flat.members, flat.parts))
        return found

    def _bucket(self, kind: Kind, members: Sequence[int], parts: Parts) -> Bucket:
        dtype = getattr(torch, self.program.residency.precision.reduced(str(kind.dtype).removeprefix("torch.")))
        return Bucket(kind.stage, tuple(members), parts, self.names(kind.axes), self.names(kind.rest), dtype, kind.copies)

    def units(self, positions: Mapping[int, Mapping[int, int]], scatter: Callable[[Bucket, Sequence[torch.Tensor]], None]) -> tuple[dict[int, Units], list[Bucket]]:
        """What is gathered for every segment, and how the gradients of that travel (`scatter` is told with which bucket)."""
        found: dict[int, Units] = {}
        buckets: list[Bucket] = []
        for segment, position in sorted(positions.items()):
            kinds: dict[Kind, list[int]] = {}
            for v in position:
                kinds.setdefault(self.kind(v, segment), []).append(v)
            units = []
            for kind, members in kinds.items():
                flat = self._flat_of[members[0]][0]
                alone = flat.members == tuple(members)
                parts = flat.parts if alone else self.parts(members, kind.axes)
                bucket = self._bucket(kind, members, parts)
                buckets.append(bucket)
                leaves = [self.leaves[v] for v in members]
                units.append(ShardedUnit(self.rank, self.names(kind.axes), parts, [position[v] for v in members], leaves, flat.buffer if alone else None, kind.dtype,
                                         partial(scatter, bucket)))  # fmt: skip
            found[segment] = Units(units)
        link(found, self.program.backward_segments)
        return found, buckets
