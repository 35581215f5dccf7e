"""Ranks on `torch.distributed`: process groups for every set of mesh axes that a program communicates over."""

import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401  before any group: its defaults are the world of that moment, for good (torch 2.13)
from torch.distributed.device_mesh import DeviceMesh

from autopar.core.mesh import Mesh
from autopar.core.pipeline import PP
from autopar.errors import PlanMismatchError, UsageError
from autopar.runtime.rank import Counter, Rank, Stream, Work
from autopar.stages import Stages

# torch 2.13 renamed them and warns about the old names.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

SUM_TAG = 0x5EED
"""Keeps the messages of a sum apart from those of others."""

_MESHES: dict[tuple[str, Mesh, dist.ProcessGroup | None], DeviceMesh] = {}
"""What `device_mesh` made, by device, mesh and the processes that belong together."""

REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass(frozen=True)
class Summed:
    """A reduce-scatter made of messages and a sum: gloo's own sends and adds about twice as much (torch 2.13, 1 to 24 MB).

    `rows`: [members, n], of which `me` is this member's; `received`: that row of every other member.
    """

    rows: torch.Tensor
    me: int
    received: torch.Tensor
    result: torch.Tensor
    messages: Sequence[Work]

    def wait(self) -> None:
        for message in self.messages:
            message.wait()
        first, *others = self.received
        torch.add(self.rows[self.me], first, out=self.result)
        for row in others:
            self.result.add_(row)


@dataclass(frozen=True)
class Several:
    """Collectives that are waited for together."""

    works: tuple[Work, ...]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


@dataclass(frozen=True)
class GroupExchange:
    """Collectives of one process group."""

    group: dist.ProcessGroup
    size: int
    gloo: bool = False

    def all_reduce(self, x: torch.Tensor, op: str) -> torch.Tensor:
        result = x.clone()
        dist.all_reduce(result, REDUCE_OPS[op], group=self.group)
        return result

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        rows, work = self.start_all_gather(x.view(-1))
        work.wait()
        return list(rows.view(self.size, *x.shape).unbind(0))

    def reduce_scatter(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        row, work = self.start_reduce_scatter(torch.stack(pieces).view(self.size, -1))
        work.wait()
        return row.view(pieces[0].shape)

    def start_all_gather(self, row: torch.Tensor) -> tuple[torch.Tensor, Work]:
        """(rows of all members, the work to wait for)."""
        rows = row.new_empty((self.size, row.numel()))
        if self.gloo:
            rows[dist.get_rank(self.group)].copy_(row)
            return rows, self.start_filling(rows)
        return rows, ALL_GATHER(rows.view(-1), row, group=self.group, async_op=True)

    def start_filling(self, rows: torch.Tensor) -> Work:
        """An all-gather in place: of rows [members, n], contiguous, this member's own is there and the others come.

        Over gloo it is made of broadcasts from place to place: its own all-gather copies everything once more (torch 2.13, 1 to 24 MB).
        """
        if self.gloo:
            return Several(tuple(dist.broadcast(row, group=self.group, group_src=n, async_op=True) for n, row in enumerate(rows)))
        return ALL_GATHER(rows.view(-1), rows[dist.get_rank(self.group)], group=self.group, async_op=True)

    def start_reduce_scatter(self, rows: torch.Tensor) -> tuple[torch.Tensor, Work]:
        """(this member's row summed over all members, the work to wait for)."""
        row = rows.new_empty(rows.shape[1])
        if self.gloo and self.size > 1:
            return row, self._start_sum(rows, row)
        return row, REDUCE_SCATTER(row, rows.view(-1), group=self.group, async_op=True)

    def _start_sum(self, rows: torch.Tensor, result: torch.Tensor) -> Summed:
        me = dist.get_rank(self.group)
        received = rows.new_empty((self.size - 1, rows.shape[1]))
        messages = []
        for k in range(1, self.size):
            to, source = (me + k) % self.size, (me - k) % self.size
            messages.append(dist.isend(rows[to], group=self.group, group_dst=to, tag=SUM_TAG))
            messages.append(dist.irecv(received[k - 1], group=self.group, group_src=source, tag=SUM_TAG))
        return Summed(rows, me, received, result, messages)

    def start_all_reduce(self, x: torch.Tensor) -> tuple[torch.Tensor, Work]:
        """Sum in place."""
        return x, dist.all_reduce(x, group=self.group, async_op=True)

    def all_to_all(self, pieces: list[torch.Tensor]) -> list[torch.Tensor]:
        sent = torch.stack(pieces)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return list(received.unbind(0))


def connect(mesh: Mesh, axis_sets: Iterable[tuple[int, ...]], device: torch.device, *, seed: int = 0) -> Rank:
    """This process as a rank of the mesh, with a group for each axis and each given set of axes.

    Every process must call this with the same arguments: creating groups is collective.
    """
    if not dist.is_initialized():
        raise UsageError("no process group: start under torchrun, or call torch.distributed.init_process_group first")
    if dist.get_world_size() != mesh.num_ranks:
        raise PlanMismatchError(f"the plan is for {mesh.num_ranks} processes ({mesh}), {dist.get_world_size()} are running; start {mesh.num_ranks} or plan again")
    sets = {(a,) for a in range(len(mesh.axes))} | {tuple(s) for s in axis_sets if s}
    return Rank(mesh, dist.get_rank(), device, _exchanges(mesh, sets), Stream(seed))


def _exchanges(mesh: Mesh, axis_sets: Iterable[tuple[int, ...]], purpose: str = "") -> dict[str, GroupExchange]:
    """This process's groups over these sets of axes."""
    found: dict[str, GroupExchange] = {}
    for axes in sorted(axis_sets):
        for ranks in mesh.groups(axes):
            group = group_of(ranks, purpose)
            if dist.get_rank() in ranks:
                found["+".join(mesh.names[a] for a in axes)] = GroupExchange(group, len(ranks), dist.get_backend(group) == "gloo")
    return found


@dataclass(frozen=True)
class Places:
    """A process among the stages of a pipeline: its rank in the pipeline and in its stage's mesh, the processes with the same place in
    other stages (`peers`, by rank of the pipeline), and what it communicates through. `gathers`: see `Rank`; `up` and `down`: groups for messages to higher and to
    lower ranks of the pipeline; `shared`: groups for weights of several stages."""

    rank: int
    stage_rank: int
    peers: tuple[int, ...]
    exchanges: Mapping[str, GroupExchange]
    gathers: Mapping[str, GroupExchange]
    up: dist.ProcessGroup
    down: dist.ProcessGroup
    shared: Mapping[tuple[int, ...], dist.ProcessGroup]
    whole: DeviceMesh
    device: torch.device
    stream: Stream
    counter: Counter

    def stage_rank_of(self, mesh: Mesh) -> Rank:
        """This process as a rank of a stage; every stage has units of its own, all share the counter and the random stream."""
        return Rank(mesh, self.stage_rank, self.device, self.exchanges, self.stream, self.counter, gathers=self.gathers)


def _own_group(lines: Iterable[tuple[int, ...]], me: int, purpose: str = "") -> dist.ProcessGroup:
    """A group for every line of ranks; that of this process."""
    return next(group for line, group in [(line, group_of(line, purpose)) for line in lines] if me in line)


def group_of(ranks: tuple[int, ...], purpose: str = "") -> dist.ProcessGroup:
    """A group of these processes, the same one for all modules: each group of gloo has threads that wake a hundred times a second (torch 2.13).
    Another `purpose` has another group. Every process must ask for the same groups in the same order."""
    world = dist.group.WORLD
    assert world is not None
    return world if len(ranks) == world.size() and not purpose else _group(ranks, purpose, world)


@cache
def _group(ranks: tuple[int, ...], purpose: str, world: dist.ProcessGroup) -> dist.ProcessGroup:
    """`world`: all processes, as long as they belong together."""
    return dist.new_group(list(ranks))


def leave() -> None:
    """End this process's groups, and with them their threads.

    gloo's threads end only with the last reference to their group (torch 2.13), and one that drops its last tensor while the
    interpreter is already ending aborts the process. What torch remembers of DTensors holds meshes for good, so these let go of their groups.
    """
    _group.cache_clear()
    for mesh in _MESHES.values():
        getattr(mesh, "_pg_registry", {}).clear()  # private, torch 2.13
    _MESHES.clear()
    gc.collect()  # modules are in cycles
    dist.destroy_process_group()


def connect_stages(stages: Stages, device: torch.device, *, seed: int = 0) -> Places:
    """This process among stages. Every process must call this with the same arguments."""
    mesh, pipeline, shared = stages.whole.mesh, stages.pipeline, map(stages.ranks_of, stages.shared.values())
    whole = pipeline.whole_mesh(mesh)
    axis = whole.names.index(PP)

    def of_whole(axis_sets: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [tuple(whole.names.index(mesh.names[a]) for a in axes) for axes in axis_sets]

    rank = connect(whole, of_whole(stages.whole.groups), device, seed=seed)
    gathers = _exchanges(whole, of_whole(stages.gathered_ahead), "gathers")
    # One group a direction: NCCL runs what two ranks exchange in one group in turn, and they would wait for each other's receives.
    up, down = (_own_group(whole.groups((axis,)), rank.rank, purpose) for purpose in ("up", "down"))
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for ranks in sorted({tuple(ranks) for ranks in shared if len(ranks) > 1}):
        for line in whole.groups((axis,)):
            members = [line[r] for r in ranks]
            group = group_of(tuple(members), "shared")
            if rank.rank in members:
                groups[ranks] = group
    place = whole.coordinates(rank.rank)
    inside = [c for a, c in enumerate(place) if a != axis]
    stage_rank = sum(c * stride for c, stride in zip(inside, mesh.strides))
    exchanges = {name: x for name, x in rank.exchanges.items() if isinstance(x, GroupExchange)}
    return Places(place[axis], stage_rank, whole.group(rank.rank, (axis,)), exchanges, gathers, up, down, groups, device_mesh(whole, device), device, rank.stream, rank.counter)


def device_mesh(mesh: Mesh, device: torch.device) -> DeviceMesh:
    """The same mesh as torch's own type, for DTensors, over the groups that `connect` uses; one for all modules on it.

    Every process must call this with the same arguments.
    """
    world = dist.group.WORLD
    key = (device.type, mesh, world)
    if key not in _MESHES:
        me = dist.get_rank()
        groups = [_own_group(mesh.groups((axis,)), me) for axis in range(len(mesh.axes))]
        _MESHES[key] = DeviceMesh.from_group(groups, device.type, torch.arange(mesh.num_ranks).view(mesh.sizes), mesh_dim_names=mesh.names)
    return _MESHES[key]
