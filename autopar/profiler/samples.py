"""Which calls of single kernels are timed: a few shapes of each kind, forward and backward. What they call is in `calls.py`."""

from dataclasses import dataclass

from autopar.profiler.tasks import Task

BACKWARD = " backward"
"""Ends the name of the task that times the backward of a sample."""


@dataclass(frozen=True)
class Sample:
    """`by`: the counts, as the rule of the operator has them, that its seconds depend on. `backward`: whether that is timed too; of the others it is a
    pass or two, as the cost model has it. `once`: a model calls such a kernel once, and
    finds its code gone from the near caches, not block after block."""

    kind: str
    by: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    backward: bool = False
    once: bool = False


LINEAR = ((16, 64, 64), (160, 320, 96), (24, 640, 640), (64, 448, 1_280), (320, 320, 960), (640, 448, 640))
ROWS = ((8, 96), (64, 160), (320, 320), (700, 448))
HEADS = ((4, 2, 24, 32), (16, 2, 20, 64), (6, 4, 48, 64), (16, 4, 64, 32), (4, 4, 96, 64), (2, 4, 160, 64))
IMAGES = ((8, 8, 10), (24, 12, 16), (40, 16, 20))
SAMPLES = {
    "linear": Sample("product", ("flops", "bytes"), LINEAR, backward=True),
    "convolution": Sample("convolution", ("flops", "bytes"), ((4, 4, 8, 8, 3), (32, 16, 6, 16, 3), (16, 8, 16, 16, 3), (32, 16, 16, 32, 3), (16, 3, 48, 24, 5), (48, 32, 10, 32, 2)), backward=True),
    "attention": Sample("attention", ("flops", "bytes"), HEADS, backward=True),
    "causal attention": Sample("causal_attention", ("flops", "bytes"), HEADS, backward=True),
    "negative": Sample("pointwise", ("bytes", "functions"), ((50,), (6_000,), (60_000,), (200_000,), (800_000,))),
    "sum of two": Sample("pointwise", ("bytes", "functions"), ((50,), (6_000,), (150_000,), (600_000,))),
    "exponential": Sample("pointwise", ("bytes", "functions"), ((6_000,), (60_000,), (200_000,))),
    "quotient of two": Sample("scalar", (), ((),), once=True),
    "layer norm": Sample("normalisation", ("bytes",), ROWS, backward=True),
    "softmax": Sample("softmax", ("bytes",), ROWS, backward=True),
    "loss": Sample("loss", ("bytes",), ((40, 20), (300, 500), (160, 3_000), (600, 1_500)), backward=True, once=True),
    "mean": Sample("mean", ("bytes",), ROWS),
    "sum of all": Sample("reduction", ("bytes",), ((40,), (600,), (60_000,)), once=True),
    "sum of rows": Sample("reduction", ("bytes",), ROWS, once=True),
    "embedding": Sample("gather", ("flops",), ((500, 160, 48), (3, 320, 600), (1_000, 160, 700), (3_000, 320, 500)), once=True),
    "rows turned": Sample("copy", ("bytes",), ((2, 12, 3, 32), (6, 40, 4, 48), (10, 96, 5, 64))),
    "beside each other": Sample("copy", ("bytes",), ((2, 12, 96), (6, 40, 96), (10, 160, 160))),
    "largest of windows": Sample("max_pooling", ("flops",), IMAGES, backward=True),
    "mean of windows": Sample("average_pooling", ("flops",), IMAGES, backward=True),
}
"""By the name of a task, whose shape is (rows, inner, columns), (batch, channels, side, channels made, side of the window), (batch, heads, rows, width),
(elements,), (), (rows, columns), (rows of the table, width, rows picked) or (batch, channels, side)."""


def tasks() -> tuple[Task, ...]:
    forward = tuple(Task(name, shape) for name, sample in SAMPLES.items() for shape in sample.shapes)
    return (*forward, *(backward_of(task) for task in forward if SAMPLES[task.op].backward))


def backward_of(task: Task) -> Task:
    return Task(task.op + BACKWARD, task.shape, task.dtype)


def forward_of(task: Task) -> Task:
    """The task whose call this one times, forward or backward."""
    return Task(task.op.removesuffix(BACKWARD), task.shape, task.dtype)
