"""Where the elements of a tensor lie in memory: which operators share the memory of their operand, and which must copy."""

import math
from collections.abc import Sequence

Strides = tuple[int, ...]


def row_major(shape: Sequence[int]) -> Strides:
    """Strides in elements of a tensor whose last dimension is dense."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def is_row_major(shape: Sequence[int], strides: Strides) -> bool:
    return all(n == 1 or here == dense for n, here, dense in zip(shape, strides, row_major(shape)))


def dense_like(shape: Sequence[int], strides: Strides) -> Strides:
    """What an elementwise operator makes of an operand of these strides: dense, dimensions in the same order of memory."""
    order = sorted(range(len(shape)), key=lambda d: (-strides[d], d))
    found = [0] * len(shape)
    step = 1
    for d in reversed(order):
        found[d] = step
        step *= max(shape[d], 1)
    return tuple(found)


def view_strides(shape: Sequence[int], strides: Strides, wanted: Sequence[int]) -> Strides | None:
    """Strides of the same memory seen as `wanted`; None where it must be copied.

    Runs of dimensions that lie densely in each other can be cut anew, others cannot be merged (`torch.Tensor.view`).
    """
    if math.prod(wanted) == 0:
        return row_major(wanted)
    runs: list[list[int]] = []  # elements, step of the last
    for n, step in zip(shape, strides):
        if n == 1:
            continue
        if runs and runs[-1][1] == n * step:
            runs[-1] = [runs[-1][0] * n, step]
        else:
            runs.append([n, step])
    found: list[int] = []
    left, step = runs.pop() if runs else (1, 1)
    for n in reversed(wanted):
        if n == 1:
            found.append(step)
            continue
        if left == 1 and runs:
            left, step = runs.pop()
        if left % n:
            return None
        found.append(step)
        left, step = left // n, step * n
    return tuple(reversed(found))
