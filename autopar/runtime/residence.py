"""How a block is run when not everything stays: weights gathered for it and dropped after, activations computed again.

The same code drives one rank and, with all ranks' arguments side by side, a simulated mesh.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree  # the public alias lacks tree_map over tuples of mixed leaves in torch 2.11
from torch.utils.checkpoint import checkpoint

from autopar.core.residency import computes_again, gathers_again
from autopar.runtime.rank import Rank
from autopar.runtime.tape import Dropped, Tape, unpack


class Unit(Protocol):
    """ZeRO-3 parameters that are gathered for one block."""

    def gather(self, args: Sequence[Any]) -> tuple[list[Any], list[torch.Tensor]]:
        """(the arguments with whole weights in place of stored parts, those weights)."""
        ...

    def again(self, *, first: bool = False) -> list[torch.Tensor]:
        """The weights once more, for the backward; `first`: it has just begun, what is there is of another one."""
        ...


def run(function: Callable, args: Sequence[Any], ranks: Sequence[Rank], unit: Unit | None, recompute: str) -> Any:
    """A block under a mode of recomputation, with the weights of `unit` gathered where they are stored in parts."""
    if computes_again(recompute):
        return _checkpointed(function, args, ranks, unit)
    given, weights = (args, []) if unit is None else unit.gather(args)
    if not torch.is_grad_enabled() or (unit is None and not gathers_again(recompute)):
        return function(*given)
    dropped = Dropped()
    for i, weight in enumerate(weights):
        dropped.add(weight, lambda i=i: unit.again()[i])
    with active(ranks, dropped), torch.autograd.graph.saved_tensors_hooks(dropped.pack, unpack):
        results = function(*given)
    return results if unit is None else _ask_again(results, unit)


def _checkpointed(function: Callable, args: Sequence[Any], ranks: Sequence[Rank], unit: Unit | None) -> Any:
    """A block of which little is kept."""
    tape = Tape(ranks[0].stream)

    def whole(*given: Any) -> Any:
        return function(*(given if unit is None else unit.gather(given)[0]))

    def contexts() -> tuple[Any, Any]:
        return active(ranks, tape), _replaying(ranks, tape)

    return checkpoint(whole, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none", context_fn=contexts)


@contextmanager
def active(ranks: Sequence[Rank], tape: Tape | Dropped, *, replaying: bool = False) -> Iterator[None]:
    """While this runs, what becomes of results is up to `tape`."""
    before = [(rank.tape, rank.replaying) for rank in ranks]
    for rank in ranks:
        rank.tape, rank.replaying = tape, replaying
    try:
        yield
    finally:
        for rank, (was, replayed) in zip(ranks, before):
            rank.tape, rank.replaying = was, replayed


@contextmanager
def _replaying(ranks: Sequence[Rank], tape: Tape) -> Iterator[None]:
    stream = ranks[0].stream
    before = (stream.step, stream.microbatch)
    stream.step, stream.microbatch = tape.place
    try:
        with active(ranks, tape, replaying=True):
            yield
    finally:
        stream.step, stream.microbatch = before


class _Ask(torch.autograd.Function):
    """Identity whose backward, the first of a block, gathers the block's weights."""

    @staticmethod
    def forward(ctx: Any, unit: Unit, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.unit = unit
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        ctx.unit.again(first=True)
        return (None, *grads)


def _ask_again(results: Any, unit: Unit) -> Any:
    flat, spec = pytree.tree_flatten(results)
    where = [i for i, x in enumerate(flat) if isinstance(x, torch.Tensor) and x.requires_grad]
    if where:
        for i, x in zip(where, _Ask.apply(unit, *(flat[i] for i in where))):
            flat[i] = x
    return pytree.tree_unflatten(flat, spec)
