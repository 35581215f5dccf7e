"""The moves of an emitted program: one function per (forward primitive, backward primitive).

`all_gather__reduce_scatter(x, mesh, "tp", dim=1)` gathers dimension 1 over axis tp and, backward, reduce-scatters the
gradient. The names are the whole semantics; the simulated mesh runs the same functions for all ranks at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autopar.core.again import KEPT
from autopar.core.moves import PRIMITIVES
from autopar.runtime.pieces import cut, embed, join
from autopar.runtime.rank import Rank, Work
from autopar.runtime.tape import communicated


@dataclass(frozen=True)
class Move:
    """Primitives and the digits they work on: `dim`/`outer` of the cut that comes or goes, `to_*` of an all-to-all's new cut. `becomes`: what a block that does not keep
    everything does with the result (`tape.py`)."""

    forward: str
    backward: str
    axis: str
    dim: int = 0
    outer: int = 1
    to_dim: int = 0
    to_outer: int = 1
    becomes: str = KEPT


def before(move: Move, x: torch.Tensor, size: int) -> Any:
    """What a rank puts into the exchange."""
    if move.forward == "reduce_scatter":
        return [p.contiguous() for p in cut(x, move.dim, move.outer, size)]
    if move.forward == "all_to_all":
        return [p.contiguous() for p in cut(x, move.to_dim, move.to_outer, size)]
    return x.contiguous()


def after(move: Move, received: Any) -> torch.Tensor:
    """What a rank makes of what it received."""
    if move.forward in ("all_gather", "all_to_all"):
        return join(received, move.dim, move.outer)
    return received


def local(move: Move, x: torch.Tensor, size: int, index: int) -> torch.Tensor:
    """The primitives without communication."""
    if move.forward == "slice":
        return cut(x, move.dim, move.outer, size)[index].contiguous()
    if move.forward == "embed":
        return embed(x, move.dim, move.outer, size, index)
    if move.forward == "mask":
        return x if index == 0 else torch.zeros_like(x)
    return x.view_as(x)


EXCHANGES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def perform(move: Move, x: torch.Tensor, rank: Rank) -> torch.Tensor:
    """Run the forward primitive of a move on a real rank."""
    if move.forward not in EXCHANGES:
        return local(move, x, rank.sizes[move.axis], rank.coordinates[move.axis])
    return communicated(rank, move.becomes, [x], lambda xs: [_exchange(move, xs[0], rank)])[0]


def _exchange(move: Move, x: torch.Tensor, rank: Rank) -> torch.Tensor:
    rank.count(move.forward, move.axis, x)
    sent = before(move, x, rank.sizes[move.axis])
    exchange = rank.exchanges[move.axis]
    received = exchange.all_reduce(sent, "sum") if move.forward == "all_reduce" else getattr(exchange, move.forward)(sent)
    return after(move, received)


class _Perform(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, move: Move, rank: Rank) -> torch.Tensor:
        ctx.move, ctx.rank = move, rank
        return perform(move, x, rank)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return perform(backward_of(ctx.move), grad, ctx.rank), None, None


def backward_of(move: Move) -> Move:
    """The move that carries the gradient back."""
    if move.forward == "all_to_all":
        return Move("all_to_all", "all_to_all", move.axis, move.to_dim, move.to_outer, move.dim, move.outer)
    return Move(move.backward, move.forward, move.axis, move.dim, move.outer)


def _define(forward: str, backward: str) -> Callable[..., torch.Tensor]:
    def function(x: torch.Tensor, mesh: Rank, axis: str, dim: int = 0, outer: int = 1, to_dim: int = 0, to_outer: int = 1, becomes: str = KEPT) -> torch.Tensor:
        return _Perform.apply(x, Move(forward, backward, axis, dim, outer, to_dim, to_outer, becomes), mesh)

    function.__name__ = function.__qualname__ = f"{forward}__{backward}"
    function.__module__ = __name__
    function.__doc__ = f"Forward {forward}, backward {backward}."
    return function


MOVES: dict[tuple[str, str], Callable[..., torch.Tensor]] = {pair: _define(*pair) for pair in sorted(set(PRIMITIVES.values()))}
PAIR_OF: dict[Callable[..., torch.Tensor], tuple[str, str]] = {function: pair for pair, function in MOVES.items()}


class _SumLate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rank: Rank, axis: str, late: list[Work]) -> torch.Tensor:
        rank.count("all_reduce", axis, x)
        total, work = rank.exchanges[axis].start_all_reduce(x.clone())
        late.append(work)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return grad, None, None, None


def late_all_reduce__identity(x: torch.Tensor, mesh: Rank, axis: str, becomes: str = KEPT) -> torch.Tensor:
    """Forward all_reduce, backward identity, at the end of a program: within `Rank.summing_late` nobody waits for the sum here, unless it is kept."""
    if mesh.late is None or mesh.tape is not None:
        return MOVES["all_reduce", "identity"](x, mesh, axis, becomes=becomes)
    return _SumLate.apply(x, mesh, axis, mesh.late)


PAIR_OF[late_all_reduce__identity] = ("all_reduce", "identity")


def all_reduce_max(x: torch.Tensor, mesh: Rank, axis: str) -> torch.Tensor:
    """Elementwise maximum over an axis; carries no gradient."""

    def largest(xs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        mesh.count("all_reduce", axis, xs[0])
        return [mesh.exchanges[axis].all_reduce(xs[0].detach().contiguous(), "max")]

    return communicated(mesh, KEPT, [x], largest)[0]


# The emitted code calls moves by name, so that it reads as a list of collectives.
globals().update({f"{forward}__{backward}": function for (forward, backward), function in MOVES.items()})
