"""Calls of single kernels, as the operators of a model make them.

All take turns, in another order each time, and each turn begins with a matrix product, as most operators of a model have one not far before them: behind one
of a millisecond a short call takes ten times as long as one over and over, and a pass over a megabyte up to three times. What counts is the mean of a call
right behind the product and of the next; of kernels that a model calls once the first alone. Operands are what an operator before has just made, or come from
memory, as weights do; results go to memory that was not in use.
"""

import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from autopar.profiler.samples import SAMPLES, backward_of, forward_of
from autopar.profiler.tasks import Task

ROUNDS, WARM_UP = 16, 2
"""Turns of each, of which the lower quartile counts, and those before."""

BEHIND, BEHIND_ONCE = (160, 256, 320), (320, 320, 640)
"""Rows, inner side and columns of the product that a turn begins with: a quarter of a millisecond on a core, and one for kernels that a model calls once, as
behind its head."""

KEPT_BYTES = 64 << 20
"""More than the caches of a processor hold."""


class Operand(NamedTuple):
    """A tensor of normal numbers, or of whole numbers below `below`."""

    shape: tuple[int, ...]
    below: int = 0

    def on(self, device: str) -> torch.nn.Parameter:
        x = torch.randint(self.below, self.shape, device=device) if self.below else torch.randn(self.shape, device=device)
        return torch.nn.Parameter(x, requires_grad=not self.below)


class Call(NamedTuple):
    """`operands`: of the digits of a task's shape."""

    function: Callable[..., torch.Tensor]
    operands: Callable[..., tuple[Operand, ...]]


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def _alike(number: int) -> Callable[..., tuple[Operand, ...]]:
    return lambda *shape: (Operand(shape),) * number


CALLS = {
    "linear": Call(F.linear, lambda rows, inner, columns: (Operand((rows, inner)), Operand((columns, inner)), Operand((columns,)))),
    "convolution": Call(F.conv2d, lambda batch, i, side, o, window: (Operand((batch, i, side, side)), Operand((o, i, window, window)), Operand((o,)))),
    "attention": Call(F.scaled_dot_product_attention, _alike(3)),
    "causal attention": Call(partial(F.scaled_dot_product_attention, is_causal=True), _alike(3)),
    "negative": Call(torch.neg, _alike(1)),
    "sum of two": Call(torch.add, _alike(2)),
    "exponential": Call(torch.exp, _alike(1)),
    "quotient of two": Call(torch.div, _alike(2)),
    "layer norm": Call(_layer_norm, lambda rows, width: (Operand((rows, width)), Operand((width,)), Operand((width,)))),
    "softmax": Call(partial(torch.softmax, dim=-1), _alike(1)),
    "loss": Call(partial(F.cross_entropy, reduction="none"), lambda rows, classes: (Operand((rows, classes)), Operand((rows,), classes))),
    "mean": Call(partial(torch.mean, dim=-1), _alike(1)),
    "sum of all": Call(torch.sum, _alike(1)),
    "sum of rows": Call(partial(torch.sum, dim=-1), _alike(1)),
    "embedding": Call(F.embedding, lambda rows, width, picked: (Operand((picked,), rows), Operand((rows, width)))),
    "rows turned": Call(lambda x: x.transpose(1, 2).contiguous(), _alike(1)),
    "beside each other": Call(lambda x, y: torch.cat([x, y], -1), _alike(2)),
    "largest of windows": Call(lambda x: F.max_pool2d(x, 3, 2), lambda batch, channels, side: (Operand((batch, channels, side, side)),)),
    "mean of windows": Call(lambda x: F.avg_pool2d(x, 3, 2), lambda batch, channels, side: (Operand((batch, channels, side, side)),)),
}
"""By the name of a sample."""


class Called(torch.nn.Module):
    """One call, whose operands are parameters."""

    def __init__(self, task: Task, device: str) -> None:
        super().__init__()
        self.function, operands = CALLS[task.op]
        self.given = torch.nn.ParameterList(operand.on(device) for operand in operands(*task.shape))

    def forward(self) -> torch.Tensor:
        return self.function(*self.given)

    def seconds(self, kept: deque[torch.Tensor]) -> tuple[float, float]:
        """Processor seconds of the forward and of the backward, once; what they work on is added to `kept`, so that the next call gets other memory."""
        first, *rest = self.given
        operands = [first.clone(), *rest]
        start = time.process_time()
        result = self.function(*operands)
        forward_s = time.process_time() - start
        gradient, wanted = torch.ones_like(result), [x for x in operands if x.requires_grad]
        start = time.process_time()
        gradients = torch.autograd.grad(result, wanted, gradient)
        backward_s = time.process_time() - start
        kept += (operands[0], result, gradient, *gradients)
        return forward_s, backward_s


class Row(torch.nn.Module):
    """Calls one after the other."""

    def __init__(self, tasks: Sequence[Task], device: str) -> None:
        super().__init__()
        self.calls = torch.nn.ModuleList(Called(task, device) for task in tasks)

    def forward(self) -> list[torch.Tensor]:
        return [call() for call in self.calls]


class Turn(NamedTuple):
    """Calls of a sample, of operands of their own, and the factors of the product before them."""

    task: Task
    factors: tuple[torch.Tensor, torch.Tensor]
    calls: tuple[Called, ...]

    @classmethod
    def of(cls, task: Task) -> "Turn":
        once = SAMPLES[task.op].once
        rows, inner, columns = BEHIND_ONCE if once else BEHIND
        return cls(task, (torch.randn(rows, inner), torch.randn(inner, columns)), tuple(Called(task, "cpu") for _ in range(1 if once else 2)))


def in_turns(wanted: Sequence[Task]) -> dict[Task, float]:
    """Processor seconds of the call that each task stands for."""
    turns, drawn = [Turn.of(task) for task in dict.fromkeys(map(forward_of, wanted))], random.Random(0)
    found: dict[Task, list[tuple[float, ...]]] = {one: [] for turn in turns for one in (turn.task, backward_of(turn.task))}
    kept: deque[torch.Tensor] = deque()
    for _ in range(WARM_UP + ROUNDS):
        drawn.shuffle(turns)
        for turn in turns:
            torch.mm(*turn.factors)
            there, back = zip(*[call.seconds(kept) for call in turn.calls])
            found[turn.task].append(there)
            found[backward_of(turn.task)].append(back)
            while sum(x.nbytes for x in kept) > KEPT_BYTES:
                kept.popleft()
    return {task: statistics.mean(map(_quartile, zip(*found[task][WARM_UP:]))) for task in wanted}


def _quartile(seconds: Sequence[float]) -> float:
    """The lower one: what disturbs only adds."""
    return max(sorted(seconds)[len(seconds) // 4], 1e-9)
