"""What is in memory: bytes of the tensors that are alive in this process, by their storages; and how far two trainings are apart.

Imported by the memory examples beside it.
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode  # what torch's documentation names for observing operators (torch 2.13)

Storages = dict[int, int]
"""Address of a storage -> its bytes."""


def storages(tensors: Iterable[Tensor | None]) -> Storages:
    """The memory behind tensors and their gradients, counted once however many share it."""
    found: Storages = {}
    waiting = [x for x in tensors if x is not None]
    while waiting:
        x = waiting.pop()
        if isinstance(x, DTensor):
            waiting += [part for part in (x.to_local().detach(), None if x.grad is None else x.grad) if part is not None]
            continue
        if x.is_leaf and x.grad is not None:
            waiting.append(x.grad)
        if x.layout is torch.strided and x.untyped_storage().device.type != "meta":
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return found


def alive() -> Storages:
    """Every tensor that Python holds, whoever holds it: nothing can hide in a buffer of the runtime."""
    gc.collect()
    return storages(x for x in gc.get_objects() if issubclass(type(x), Tensor))


def bytes_of(found: Storages) -> int:
    return sum(found.values())


def of_training(module: nn.Module, optimizer: torch.optim.Optimizer) -> Storages:
    """Parameters, their gradients and the optimizer's state, as the user of a module sees them."""
    return storages([*module.parameters(), *_tensors(optimizer.state)])


def _tensors(state: Any) -> list[Tensor]:
    return [x for kept in state.values() for x in kept.values() if isinstance(x, Tensor)]


class Made(TorchDispatchMode):
    """Remembers the storages that operators make inside this context, and which of them are still there."""

    def __init__(self) -> None:
        super().__init__()
        self._there = alive()
        self._made: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self._there:
                storage = x.untyped_storage()
                self._made[id(storage)] = weakref.ref(storage)
        return result

    @property
    def alive_bytes(self) -> int:
        gc.collect()
        return sum(storage.nbytes() for storage in (ref() for ref in self._made.values()) if storage is not None)


def worst_difference(losses: Sequence[float], parameters: Mapping[str, Tensor], expected: Sequence[float], one_process: Mapping[str, Tensor]) -> float:
    """The largest relative difference of any loss, and of any parameter by the Frobenius norm."""
    errors = [abs(found - want) / abs(want) for found, want in zip(losses, expected, strict=True)]
    return max(*errors, *(float((parameters[name] - p).norm() / p.norm()) for name, p in one_process.items()))
