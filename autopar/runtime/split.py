"""Contractions with weights whose weight gradient can be put off: what lets a zero-bubble schedule split the backward.

The weight is no input of the autograd node: its gradient, computed with that of the inputs or later from what `Rank.deferred` has
kept, enters the graph at the weight itself, in a backward of its own, so that moves of the weight run once.
"""

from typing import Any

import torch
import torch.nn.functional as F

from autopar.errors import UsageError
from autopar.runtime.rank import Rank

_ANCHOR = torch.empty(0, requires_grad=True)
"""Makes the node part of the backward where neither input nor bias is."""


class _Product(torch.autograd.Function):
    """x @ w (w: [inner, outer]), the last dimension of x contracted; `held` hides the weight from autograd."""

    @staticmethod
    def forward(ctx: Any, rank: Rank, held: tuple[torch.Tensor, bool], x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        weight, transposed = held
        ctx.rank, ctx.held = rank, held
        ctx.save_for_backward(x)
        w = weight.detach()
        return F.linear(x, w) if transposed else x @ w

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        weight, transposed = ctx.held
        if ctx.rank.deferred is None:
            raise UsageError("this module splits its backward for a zero-bubble schedule; train it with train_step")
        w = weight.detach()
        dx = (grad @ w if transposed else grad @ w.t()) if ctx.needs_input_grad[2] else None
        ctx.rank.deferred.append((weight, x, grad, transposed))
        return None, None, dx, None


@torch.no_grad()
def weight_gradient(weight: torch.Tensor, x: torch.Tensor, grad: torch.Tensor, transposed: bool) -> torch.Tensor | None:
    """The half that was put off; None where it could be added to what earlier microbatches have left: that saves writing it and reading it again."""
    x, grad = x.flatten(0, -2), grad.flatten(0, -2)
    left, right = (grad.t(), x) if transposed else (x.t(), grad)
    if not weight.is_leaf or weight.grad is None:
        return left @ right
    weight.grad.addmm_(left, right)
    return None


def linear(rank: Rank, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`."""
    if not weight.requires_grad:
        return F.linear(x, weight, bias)
    y = _Product.apply(rank, (weight, True), x, _ANCHOR)
    return y if bias is None else y + bias


def addmm(rank: Rank, bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`torch.addmm`."""
    return torch.addmm(bias, x, weight) if not weight.requires_grad else bias + _Product.apply(rank, (weight, False), x, _ANCHOR)


def mm(rank: Rank, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`torch.mm`."""
    return torch.mm(x, weight) if not weight.requires_grad else _Product.apply(rank, (weight, False), x, _ANCHOR)
