"""A number that is still being summed over ranks.

A training step needs the sum of its loss only to show it: the backward starts from the loss without looking at it. So the sum is started where the
program has it, and waited for by whoever reads it; ranks that wait for each other there wait again at the end of the backward.
"""

from typing import Any

import torch
import torch.utils._pytree as pytree  # the public form exists only for optree-free trees; stable since torch 2.1

from autopar.runtime.rank import Work

UNREAD = frozenset({
    torch.autograd.backward, torch.autograd.grad, torch.Tensor.as_subclass, torch.Tensor.backward, torch.Tensor.numel, torch.Tensor.register_hook, torch.Tensor.retain_grad, torch.ones_like,
    *(getattr(torch.Tensor, name).__get__ for name in ("device", "dtype", "grad", "grad_fn", "is_leaf", "layout", "ndim", "requires_grad", "shape")),
})  # fmt: skip
"""What may be asked of a number that is not there yet: all that a backward asks."""


class Pending(torch.Tensor):
    """A tensor that lies where a collective under way will leave its result. Every function of torch but those in `UNREAD` waits and gets a plain tensor."""

    work: Work | None

    @classmethod
    def of(cls, x: torch.Tensor, work: Work) -> "Pending":
        pending = x.as_subclass(cls)
        pending.work = work
        return pending

    def settled(self) -> torch.Tensor:
        """The same tensor, of the plain type, with its value."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in UNREAD:
            with torch._C.DisableTorchFunctionSubclass():  # as `torch.overrides` documents (torch 2.13)
                return function(*args, **kwargs or {})
        args, kwargs = pytree.tree_map_only(cls, cls.settled, (args, kwargs or {}))
        return function(*args, **kwargs)
