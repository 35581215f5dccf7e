"""What is kept of a block from its forward for when it is computed again, or instead of what its backward reads.

The emitted program says of every collective and of products with weights what becomes of the result (`autopar.core.again`): it is kept, made again, or read by
nothing that is made again. Of the last kind not even the values are there when a block is computed again: not-a-number stands for them, so that a program
which reads them after all is not trained on something plausible.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode  # what intercepts operators below autograd has no other name in torch 2.13

from autopar.core.again import AGAIN, KEPT
from autopar.errors import VerificationError
from autopar.runtime.rank import Rank, Stream

aten = torch.ops.aten
PRODUCTS = frozenset((aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default))
OTHER_PRODUCTS = frozenset((aten.convolution.default, aten._convolution.default, aten.linear.default))
"""Operators that products with weights are made of; what the others make has the shape of the whole result."""

Communicate = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


class Tape:
    """Results that a block which is computed again keeps, in order; of those that nothing reads only what they look like."""

    def __init__(self, stream: Stream) -> None:
        self.place = (stream.step, stream.microbatch)
        self.results: list[list[tuple[torch.Tensor, int]]] = []
        self.looks: list[list[tuple[torch.Size, torch.dtype, torch.device]]] = []

    def keep(self, becomes: str, results: Sequence[torch.Tensor]) -> None:
        if becomes == KEPT:
            self.results.append([(x.detach(), x._version) for x in results])
        else:
            self.looks.append([(x.shape, x.dtype, x.device) for x in results])

    def kept(self, becomes: str) -> list[torch.Tensor]:
        if becomes == KEPT:
            found = self.results.pop(0)
            if any(x._version != version for x, version in found):
                raise VerificationError("a result that a block keeps to be computed again was written to after it was made")
            return [x.detach() for x, _ in found]
        return [_unmade(shape, dtype, device) for shape, dtype, device in self.looks.pop(0)]

    def communicated(self, rank: Rank, becomes: str, xs: Sequence[torch.Tensor], communicate: Communicate) -> list[torch.Tensor]:
        if becomes == AGAIN:
            return communicate(xs)
        if rank.replaying:
            return self.kept(becomes)
        results = communicate(xs)
        self.keep(becomes, results)
        return results


class Dropped:
    """Tensors that a block which is not computed again does not keep for its backward, which fetches them again: gathered weights, results of all-gathers."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[StorageWeakRef, Callable[[], torch.Tensor]]] = {}

    def add(self, x: torch.Tensor, fetch: Callable[[], torch.Tensor]) -> None:
        if x.numel():
            memory = StorageWeakRef(x.untyped_storage())  # its number is given to no other memory as long as this is there
            self.found[memory.cdata] = memory, fetch

    def pack(self, x: torch.Tensor) -> Any:
        """What autograd keeps of a tensor: how to have it again where it is one of these, or a view of one."""
        entry = self.found.get(StorageWeakRef(x.untyped_storage()).cdata)
        return x if entry is None else (entry[1], x.size(), x.stride(), x.storage_offset())

    def communicated(self, rank: Rank, becomes: str, xs: Sequence[torch.Tensor], communicate: Communicate) -> list[torch.Tensor]:
        results = communicate(xs)
        if becomes == AGAIN:
            again = _Gathered([self.pack(x.detach()) for x in xs], communicate)
            for i, x in enumerate(results):
                self.add(x, lambda i=i: again()[i])
        return results


def unpack(kept: Any) -> torch.Tensor:
    """The tensor that `Dropped.pack` was given."""
    if isinstance(kept, torch.Tensor):
        return kept
    fetch, size, stride, offset = kept
    return fetch().as_strided(size, stride, offset)


class _Gathered:
    """Results of an all-gather once more, as long as something may still read them."""

    def __init__(self, sources: Sequence[Any], communicate: Communicate) -> None:
        self.sources, self.communicate = sources, communicate
        self.results: list[torch.Tensor] | None = None

    def __call__(self) -> list[torch.Tensor]:
        if self.results is None:
            with torch.no_grad():
                self.results = self.communicate([unpack(x) for x in self.sources])
            self.sources = ()
        return self.results


def communicated(rank: Rank, becomes: str, xs: Sequence[torch.Tensor], communicate: Communicate) -> list[torch.Tensor]:
    """Run a collective on `xs`, or have its results from where they were kept."""
    return communicate(xs) if rank.tape is None else rank.tape.communicated(rank, becomes, xs, communicate)


def product(function: Callable, becomes: str) -> Callable:
    """A product with a weight, of which `becomes` says what a block that is computed again does with the result; the mesh is a further, first argument."""

    def run(mesh: Rank, *args: Any, **kwargs: Any) -> torch.Tensor:
        tape = mesh.tape
        if not isinstance(tape, Tape):
            return function(*args, **kwargs)
        if not mesh.replaying:
            y = function(*args, **kwargs)
            tape.keep(becomes, [y])
            return y
        (y,) = tape.kept(becomes)
        with _Unmade(y.shape):
            reads = function(*args, **kwargs)  # for what autograd keeps of it
        return y.requires_grad_(reads.requires_grad)

    run.__name__ = run.__qualname__ = f"{becomes}_{getattr(function, '__name__', 'product').removesuffix('.default')}"
    run.__module__ = __name__
    return run


class _Unmade(TorchDispatchMode):
    """Products of the right shape that take neither time nor memory."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            left, right = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            return _unmade((*left.shape[:-1], right.shape[-1]), left.dtype, left.device)
        if func in OTHER_PRODUCTS:
            return _unmade(self.shape, args[0].dtype, args[0].device)
        return args[0] if func._schema.is_mutable else func(*args, **(kwargs or {}))


def _unmade(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((), math.nan if dtype.is_floating_point else 0, dtype=dtype, device=device).expand(shape)
