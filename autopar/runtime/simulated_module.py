"""Training on a simulated mesh: what `Share` does on one rank, for all ranks of a mesh inside one process.

Written without buckets, prefetch or flat buffers: one parameter at a time, so that it is a check on those, not a copy.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from autopar.program import Program
from autopar.runtime.built import Built
from autopar.runtime.pieces import Cut
from autopar.runtime.rank import Rank
from autopar.runtime.reducer import make_dense
from autopar.runtime.simulate import Simulation, simulated_ranks
from autopar.runtime.weights import shard

Column = list[torch.Tensor]
"""One value on every rank."""

MakeOptimizer = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


class SimulatedModule:
    """Every rank's stored parameters and the program that trains them.

    `values`: whole parameters, buffers and constants by value number.
    """

    def __init__(
        self, program: Program, built: Built, values: Mapping[int, torch.Tensor], make: MakeOptimizer, seed: int = 0, *, splits: bool = False
    ) -> None:
        self.splits = splits
        self.program, self.built = program, built
        self.ranks: list[Rank] = simulated_ranks(program.mesh, seed=seed)
        graph = program.graph
        self.trained = [v for v in graph.params if graph.values[v].meta.requires_grad]
        self.stored: list[dict[int, torch.Tensor]] = [self._parts(values, rank) for rank in self.ranks]
        self.fixed: list[dict[int, torch.Tensor]] = [{v: x.clone() for v, x in values.items() if v not in program.storage} for _ in self.ranks]
        self.leaves = [{v: self._leaf(v, mine[v]) for v in graph.params} for mine in self.stored]
        self.optimizers = [make([mine[v] for v in self.trained]) for mine in self.stored]
        for rank in self.ranks:
            rank.offload = program.residency.offload
        units = {segment: _Units(self, segment, position) for segment, position in built.positions.items()}
        self.simulation = Simulation(self.ranks, units)

    def _parts(self, values: Mapping[int, torch.Tensor], rank: Rank) -> dict[int, torch.Tensor]:
        program = self.program
        found = {}
        for v in program.graph.params:
            part = shard(values[v], program.stored[v], program.mesh, program.mesh.coordinates(rank.rank))
            stored = getattr(torch, program.residency.precision.stored(program.graph.values[v].meta.dtype))
            found[v] = part.to(stored).requires_grad_(program.graph.values[v].meta.requires_grad)
        return found

    def used_as_stored(self, v: int) -> bool:
        """Whether the program computes with the optimizer's own tensor."""
        residency, dtype = self.program.residency, self.program.graph.values[v].meta.dtype
        same = self.program.stored[v] == self.program.storage[v] and residency.precision.stored(dtype) == dtype and not residency.offload
        return same or self.stage(v) == 3

    def stage(self, v: int) -> int:
        """The ZeRO stage of a parameter; 0 where it is too small to be cut."""
        return self.program.residency.stage(v) if self.program.stored[v] != self.program.storage[v] else 0

    def _leaf(self, v: int, part: torch.Tensor) -> torch.Tensor:
        if self.used_as_stored(v):
            return part
        meta = self.program.graph.values[v].meta
        shape = self.program.local_shape(v, self.program.storage[v])
        return torch.empty(shape, dtype=getattr(torch, meta.dtype)).requires_grad_(meta.requires_grad)

    def cut(self, v: int, rank: int) -> Cut:
        zero = self.program.residency.zero[v]
        return Cut.of(self.program.graph.values[v].meta.shape, self.program.storage[v], self.program.stored[v], self.program.mesh, rank, zero.axes)

    def gather(self, v: int) -> list[torch.Tensor]:
        """The working tensor of a parameter on every rank, from the stored parts; counted."""
        program, dtype = self.program, getattr(torch, self.program.graph.values[v].meta.dtype)
        sent = [mine[v].detach().to(dtype) for mine in self.stored]
        if program.residency.offload:
            for rank in self.ranks:
                rank.counter.add("to_device", "host", 1, self._padded(v, rank.rank) * self.stored[0][v].element_size())
        if self.stage(v) == 0:
            return [x.clone() for x in sent]
        axes = program.residency.zero[v].axes
        whole: list[torch.Tensor] = [sent[0]] * len(sent)
        for group in program.mesh.groups(axes):
            for r in group:
                cut = self.cut(v, r)
                self.ranks[r].counter.add("all_gather", *_key(program, axes), cut.padded * sent[r].element_size())
                whole[r] = cut.join([sent[m].reshape(-1) for m in group]).clone()
        return whole

    def scatter(self, v: int, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Every rank's part of the sum of working gradients over the ZeRO axes; counted."""
        program = self.program
        dtype = self._reduction(v)
        axes = program.residency.zero[v].axes
        found: list[torch.Tensor] = [grads[0]] * len(grads)
        for group in program.mesh.groups(axes):
            rows = [self.cut(v, r).split(grads[r].to(dtype) / program.copies(v)) for r in group]
            for place, r in enumerate(group):
                cut = self.cut(v, r)
                self.ranks[r].counter.add("reduce_scatter", *_key(program, axes), cut.padded * len(group) * rows[0][0].element_size())
                found[r] = sum(row[place] for row in rows[1:]) + rows[0][place]
        return found

    def _reduction(self, v: int) -> torch.dtype:
        return getattr(torch, self.program.residency.precision.reduced(self.program.graph.values[v].meta.dtype))

    def start(self) -> None:
        """Begin a step: take over what the optimizers left, and compute what is the same for all microbatches."""
        self._refresh()
        with torch.no_grad():
            self.once = self.simulation.run(self.built.once, [[fixed[v] for v in self.built.once_inputs] for fixed in self.fixed])
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def compute(self, microbatch: int, given: Mapping[int, Column]) -> list[Column]:
        """The program's outputs from what is neither parameter nor buffer, by value number."""
        self.ranks[0].stream.microbatch = microbatch
        rows = [
            [leaves[v] if v in leaves else fixed[v] if v in fixed else given[v][r] for v in self.built.inputs] + list(self.once[r])
            for r, (leaves, fixed) in enumerate(zip(self.leaves, self.fixed))
        ]
        results = self.simulation.run(self.built.module, rows)
        self._update_buffers([updates for _, updates in results])
        return [list(column) for column in zip(*(outputs for outputs, _ in results))]

    def differentiate(self, tensors: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], *, last: bool) -> None:
        """One backward, of all ranks together."""
        if tensors:
            torch.autograd.backward(tensors, grads)
        for leaves in self.leaves:
            for leaf in leaves.values():
                make_dense(leaf)
        self._scatter_appeared()

    def gradients(self) -> list[list[torch.Tensor | None]]:
        """Every rank's gradients of its stored parameters."""
        return [[None if (g := mine[v].grad) is None else g.clone() for v in self.program.graph.params] for mine in self.stored]

    def update(self) -> None:
        """The optimizer steps, and the end of the step."""
        for optimizer in self.optimizers:
            optimizer.step()
        self.ranks[0].stream.microbatch = 0
        self.ranks[0].stream.step += 1

    def _refresh(self) -> None:
        for v in self.program.graph.params:
            if not self.used_as_stored(v):
                for leaves, whole in zip(self.leaves, self.gather(v)):
                    leaves[v].detach().copy_(whole)
                    leaves[v].grad = None

    def _scatter_appeared(self) -> None:
        """Stage 2: no whole gradient outlives a backward."""
        for v in self._live(2):
            self._add(v, self.scatter(v, [self._grad(leaves[v]) for leaves in self.leaves]))
            for leaves in self.leaves:
                leaves[v].grad = None

    def _live(self, *stages: int) -> Iterator[int]:
        live = self.program.graph.differentiated
        yield from (v for v in self.trained if v in live and self.stage(v) in stages)

    @staticmethod
    def _grad(leaf: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

    def _add(self, v: int, parts: Sequence[torch.Tensor]) -> None:
        for mine, part in zip(self.stored, parts):
            part = part.to(mine[v].dtype)
            mine[v].grad = part if mine[v].grad is None else mine[v].grad + part

    def finish(self) -> None:
        """What is summed once per step."""
        for v in self._live(1):
            self._add(v, self.scatter(v, [self._grad(leaves[v]) for leaves in self.leaves]))
        for v in self._live(0):
            if not self.used_as_stored(v):
                self._add(v, [self._grad(leaves[v]).to(self._reduction(v)) for leaves in self.leaves])
        for v in self._live(0, 1, 2, 3):
            zero = self.program.residency.zero.get(v)
            done = zero.axes if zero is not None and self.stage(v) else ()
            self._all_reduce(v, tuple(a for a in self.program.deferred[v] if a not in done))
            for rank, mine in zip(self.ranks, self.stored):
                if mine[v].grad is not None and rank.offload:
                    rank.counter.add("to_host", "host", 1, self._sums(v) * self._padded(v, rank.rank) * self._reduction(v).itemsize)

    def _all_reduce(self, v: int, axes: tuple[int, ...]) -> None:
        if not axes:
            return
        for group in self.program.mesh.groups(axes):
            parts = [self._grad(self.stored[r][v]).to(self._reduction(v)) for r in group]
            total = sum(parts[1:]) + parts[0]
            for r in group:
                self.ranks[r].counter.add("all_reduce", *_key(self.program, axes), self._sums(v) * self._padded(v, r) * total.element_size())
                self.stored[r][v].grad = total.to(self.stored[r][v].dtype).clone()

    def _sums(self, v: int) -> int:
        """In how many pieces a gradient is completed: every unit that gathers a parameter completes its own."""
        return sum(v in taken for taken in self.program.gathered) if self.stage(v) == 3 else 1

    def _padded(self, v: int, rank: int) -> int:
        """Elements that travel for a stored part."""
        return self.cut(v, rank).padded if self.stage(v) else self.stored[rank][v].numel()

    def _update_buffers(self, updates: Sequence[Sequence[torch.Tensor]]) -> None:
        for fixed, new in zip(self.fixed, updates):
            with torch.no_grad():
                for (buffer, _), x in zip(self.program.graph.updates, new):
                    fixed[buffer].copy_(x)


def _key(program: Program, axes: Sequence[int]) -> tuple[str, int]:
    _, names, size = program.key("", tuple(axes))
    return names, size


class _Units:
    """The ZeRO-3 parameters of one segment, for all ranks: their arguments stand side by side."""

    def __init__(self, owner: SimulatedModule, segment: int, position: Mapping[int, int]) -> None:
        self.owner, self.segment, self.position = owner, segment, dict(position)
        self._again: list[torch.Tensor] | None = None

    def gather(self, args: Sequence[Any]) -> tuple[list[Any], list[torch.Tensor]]:
        self._again = None
        ranks = len(self.owner.ranks)
        width = len(args) // ranks
        given, weights = list(args), []
        for v, p in self.position.items():
            whole = _GatherAll.apply(self, v, *(args[r * width + p] for r in range(ranks)))
            for r, w in enumerate(whole):
                given[r * width + p] = w
            weights += list(whole)
        return given, weights

    def again(self, *, first: bool = False) -> list[torch.Tensor]:
        if first or self._again is None:
            with torch.no_grad():
                self._again = [w for v in self.position for w in self.owner.gather(v)]
        return self._again


class _GatherAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unit: _Units, v: int, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.unit, ctx.v = unit, v
        return tuple(unit.owner.gather(v))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        owner = ctx.unit.owner
        parts = owner.scatter(ctx.v, grads)
        return (None, None, *(g.to(mine[ctx.v].dtype) for g, mine in zip(parts, owner.stored)))
