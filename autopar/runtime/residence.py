"""How a block is run when not everything stays: weights gathered for it and dropped after, activations computed again.

The same code drives one rank and, with all ranks' arguments side by side, a simulated mesh.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree  # the public alias lacks tree_map over tuples of mixed leaves in torch 2.11
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from autopar.core.residency import gathers_again, keeps_contractions
from autopar.runtime.rank import Rank

aten = torch.ops.aten
KEPT_BY_SELECTIVE = frozenset((aten.mm.default, aten.addmm.default, aten.convolution.default, aten._convolution.default, aten.linear.default))
"""Results that selective recomputation keeps: contractions with weights. Attention and everything elementwise is computed again."""


class Unit(Protocol):
    """ZeRO-3 parameters that are gathered for one block."""

    def gather(self, args: Sequence[Any]) -> tuple[list[Any], list[torch.Tensor]]:
        """(the arguments with whole weights in place of stored parts, those weights)."""
        ...

    def again(self, *, first: bool = False) -> list[torch.Tensor]:
        """The weights once more, for the backward; `first`: it has just begun, what is there is of another one."""
        ...


class Tape:
    """Results of collectives, kept while a block runs forward and played back when it is computed again; of all-gathers unless they are repeated."""

    def __init__(self, ranks: Sequence[Rank], *, gathers_again: bool) -> None:
        self.ranks, self.gathers_again = ranks, gathers_again
        self.results: list[Any] = []
        self.place = (ranks[0].stream.step, ranks[0].stream.microbatch)

    @contextmanager
    def recording(self) -> Iterator[None]:
        with self._active(replaying=False):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        stream = self.ranks[0].stream
        before = (stream.step, stream.microbatch)
        stream.step, stream.microbatch = self.place
        try:
            with self._active(replaying=True):
                yield
        finally:
            stream.step, stream.microbatch = before

    @contextmanager
    def _active(self, *, replaying: bool) -> Iterator[None]:
        rank = self.ranks[0]
        before = (rank.tape, rank.replaying)
        rank.tape, rank.replaying = self, replaying
        try:
            yield
        finally:
            rank.tape, rank.replaying = before


def taped(rank: Rank, primitive: str, communicate: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """Run a collective, or play its results back."""
    if rank.tape is None or (primitive == "all_gather" and rank.tape.gathers_again):
        return communicate()
    if rank.replaying:
        return [x.detach() for x in rank.tape.results.pop(0)]
    results = communicate()
    rank.tape.results.append([x.detach() for x in results])
    return results


def run(function: Callable, args: Sequence[Any], ranks: Sequence[Rank], unit: Unit | None, recompute: str) -> Any:
    """A block under a mode of recomputation, with the weights of `unit` gathered where they are stored in parts."""
    if recompute != "none":
        return _checkpointed(function, args, ranks, unit, recompute)
    if unit is None:
        return function(*args)
    given, weights = unit.gather(args)
    if not torch.is_grad_enabled():
        return function(*given)
    with _dropping(weights, unit):
        results = function(*given)
    return _ask_again(results, unit)


def _checkpointed(function: Callable, args: Sequence[Any], ranks: Sequence[Rank], unit: Unit | None, recompute: str) -> Any:
    """A block of which little is kept. Weights are gathered outside what selective recomputation watches: it numbers operators, and
    the second gather fetches other neighbours than the first."""
    tape = Tape(ranks, gathers_again=gathers_again(recompute))
    first, again = selective_contexts() if keeps_contractions(recompute) else (nullcontext(), nullcontext())

    def whole(*given: Any) -> Any:
        given = given if unit is None else tuple(unit.gather(given)[0])
        with again if ranks[0].replaying else first:
            return function(*given)

    return checkpoint(whole, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none", context_fn=lambda: (tape.recording(), tape.replaying()))


def selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What a block runs in, and what it is computed again in: both watch every operator."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT_BY_SELECTIVE else CheckpointPolicy.PREFER_RECOMPUTE


def _dropping(weights: Sequence[torch.Tensor], unit: Unit) -> Any:
    """Saved tensors that are gathered weights, or views of them, are not kept: the backward gathers them again."""
    index = {w.untyped_storage().data_ptr(): i for i, w in enumerate(weights) if w.numel()}

    def pack(t: torch.Tensor) -> Any:
        i = index.get(t.untyped_storage().data_ptr())
        return t if i is None else (i, t.size(), t.stride(), t.storage_offset())

    def unpack(saved: Any) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        i, size, stride, offset = saved
        return unit.again()[i].as_strided(size, stride, offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


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
