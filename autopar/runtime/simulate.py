"""A simulated mesh: runs an emitted program for all ranks in lockstep inside one process, with autograd through it.

Local operators run once per rank; a move runs for all ranks together, as one autograd node that joins their graphs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from autopar.core.mesh import Mesh
from autopar.runtime.block import run_block
from autopar.runtime.moves import EXCHANGES, PAIR_OF, Move, after, all_reduce_max, backward_of, before, local
from autopar.runtime.rank import Counter, Rank, Stream
from autopar.runtime.residence import Unit, run
from autopar.runtime.tape import communicated


def simulated_ranks(mesh: Mesh, *, seed: int = 0, device: str = "cpu") -> list[Rank]:
    """One `Rank` per position; rank 0 counts its communication, all share one random stream."""
    stream = Stream(seed)
    return [Rank(mesh, r, torch.device(device), stream=stream, counter=Counter(enabled=True)) for r in range(mesh.num_ranks)]


def _exchange(primitive: str, sent: Sequence[Any], op: str) -> list[Any]:
    """What every member of one group receives."""
    n = len(sent)
    if primitive == "all_reduce":
        total = sent[0].clone()
        for x in sent[1:]:
            total = torch.maximum(total, x) if op == "max" else total + x
        return [total if i == 0 else total.clone() for i in range(n)]
    if primitive == "all_gather":
        return [list(sent) for _ in range(n)]
    if primitive == "reduce_scatter":
        return [_sum([sent[j][i] for j in range(n)]) for i in range(n)]
    return [[sent[j][i] for j in range(n)] for i in range(n)]


def _sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    total = parts[0].clone()
    for x in parts[1:]:
        total = total + x
    return total


def perform_all(move: Move, xs: Sequence[torch.Tensor], ranks: Sequence[Rank], op: str = "sum") -> list[torch.Tensor]:
    """The forward primitive of a move, for all ranks."""
    mesh = ranks[0].mesh
    size = ranks[0].sizes[move.axis]
    if move.forward not in EXCHANGES:
        return [local(move, x, size, rank.coordinates[move.axis]) for x, rank in zip(xs, ranks)]

    def communicate(xs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        results: list[Any] = [None] * len(xs)
        for x, rank in zip(xs, ranks):
            rank.count(move.forward, move.axis, x)
        for group in mesh.groups([mesh.names.index(move.axis)]):
            received = _exchange(move.forward, [before(move, xs[r], size) for r in group], op)
            for r, item in zip(group, received):
                results[r] = after(move, item)
        return results

    return communicated(ranks[0], move.becomes, xs, communicate)


class _PerformAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, move: Move, ranks: Sequence[Rank], *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.move, ctx.ranks = move, ranks
        return tuple(perform_all(move, xs, ranks))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return (None, None, *perform_all(backward_of(ctx.move), grads, ctx.ranks))


def _move_all(function: Callable, args: Sequence[Sequence[Any]], kwargs: dict[str, Any], ranks: Sequence[Rank]) -> list[torch.Tensor]:
    xs, axis = [a[0] for a in args], args[0][2]
    if function is all_reduce_max:
        with torch.no_grad():
            return perform_all(Move("all_reduce", "identity", axis), [x.detach() for x in xs], ranks, op="max")
    forward, backward = PAIR_OF[function]
    return list(_PerformAll.apply(Move(forward, backward, axis, **kwargs), ranks, *xs))


class Simulation:
    """Runs emitted modules for all ranks of a mesh. `units`: what is gathered for each segment, for all ranks together."""

    def __init__(self, ranks: Sequence[Rank], units: Mapping[int, Unit] | None = None) -> None:
        self.ranks, self.units = ranks, units or {}

    def run(self, module: GraphModule, inputs: Sequence[Sequence[Any]]) -> list[Any]:
        """`inputs[r]` are the placeholders of rank r (without `mesh`); returns the outputs of every rank."""
        return self._run(module, [[rank, *given] for rank, given in zip(self.ranks, inputs)])

    def _run(self, module: GraphModule, inputs: Sequence[Sequence[Any]]) -> list[Any]:
        env: dict[Node, list[Any]] = {}
        given = [list(x) for x in inputs]
        n = len(self.ranks)
        last_use = _last_uses(module)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                env[node] = [given[r].pop(0) for r in range(n)]
            elif node.op == "output":
                return self._per_rank(node.args[0], env)
            elif node.op == "get_attr":
                env[node] = [module.get_submodule(node.target)] * n
            elif node.target is run_block:
                env[node] = self._run_block(node, env)
            elif node.op == "call_module":
                env[node] = self._run(module.get_submodule(node.target), self._per_rank(node.args, env))
            else:
                env[node] = self._call(node, env)
            for dead in last_use.get(node, ()):
                env.pop(dead, None)
        return []

    def _run_block(self, node: Node, env: dict[Node, list[Any]]) -> list[Any]:
        """`run_block` of all ranks at once: their arguments stand side by side."""
        rows = self._per_rank(node.args[2:], env)
        block, width = env[node.args[1]][0], len(node.args) - 2

        def together(*args: Any) -> list[Any]:
            return self._run(block, [args[r * width : (r + 1) * width] for r in range(len(self.ranks))])

        unit = self.units.get(node.kwargs.get("gather"))
        return run(together, [x for row in rows for x in row], self.ranks, unit, node.kwargs.get("recompute", "none"))

    def _call(self, node: Node, env: dict[Node, list[Any]]) -> list[Any]:
        args = self._per_rank(node.args, env)
        kwargs = self._per_rank(node.kwargs, env)
        if node.target is all_reduce_max or node.target in PAIR_OF:
            return _move_all(node.target, args, dict(kwargs[0]), self.ranks)
        return [node.target(*a, **k) for a, k in zip(args, kwargs)]

    def _per_rank(self, value: Any, env: dict[Node, list[Any]]) -> list[Any]:
        return [torch.fx.map_arg(value, lambda node, r=r: env[node][r]) for r in range(len(self.ranks))]


def _last_uses(module: GraphModule) -> dict[Node, list[Node]]:
    last: dict[Node, Node] = {}
    for node in module.graph.nodes:
        for used in node.all_input_nodes:
            last[used] = node
    found: dict[Node, list[Node]] = {}
    for used, node in last.items():
        found.setdefault(node, []).append(used)
    return found
