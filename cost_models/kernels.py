"""Seconds of the kernels behind an operator: matrix products by tiles and waves, attention, and passes over memory, forward and backward.

Matrix products. The result is cut into tiles; each multiprocessor computes one at a time, so the time is that of whole waves:

    waves = ceil(batch * ceil(m / tile_m) * ceil(n / tile_n) * split / multiprocessors)
    seconds = waves * 2 * tile_m * tile_n * (k / split + FILL) / (rate of a multiprocessor * share of the tile)

over the best of a few tiles and of splits of k, as the heuristics of vendor libraries choose, and never less than the bytes take. `FILL` is what a tile
costs beside its products, in steps of k: loading the first operands, writing the result. A device of unknown structure
(`num_multiprocessors` 0) reaches its efficiency at any shape, as the plain roofline of `compute.py` says. One that does not load ahead takes the
seconds of the products and those of the bytes: with few rows that is what makes a microbatch dear on a processor's core.

Rows of operands that do not begin at multiples of ALIGNMENT cannot be loaded for matrix units; such products run at the vector rate of float32.

Attention. A fused kernel does the share of the scores that its mask leaves, at `attention_efficiency` of the peak; its backward is 2.5 times the
work (five products for two), at a somewhat lower rate. Written out, attention is two batched products and SCORE_PASSES over the scores.

What was measured of a kind of kernel on a device (`autopar/core/kernel_rate.py`) takes the place of all this.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from autopar.core.device import Device
from autopar.core.kernel_rate import KernelRate

TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.95), (128, 64, 0.8), (64, 128, 0.8), (64, 64, 0.6))
"""(rows, columns, share of a multiprocessor's rate): smaller tiles read more per product. Source: the order of CUTLASS's default tiles."""

SPLITS = (1, 2, 4, 8)
FILL = 96
"""Source: three stages of 32 in flight before the first product (CUTLASS), and about as much again overlapped with the next tile's."""

ALIGNMENT = 8
"""Elements of 16 bits. Source: cuBLAS's documentation, 16 bytes for matrix units. Only the products of an attention that is written out are looked
at, whose rows are as long as a head is wide: other sizes are chosen to fit."""

ATTENTION_BACKWARD = 2.5
ATTENTION_BACKWARD_RATE = 0.8
"""Source: FlashAttention-2 (Dao 2023), figures 5 and 6: backward at about four fifths of the forward's rate."""

SCORE_PASSES = 6.0
"""Over the scores in a written-out forward: written, scaled and masked and normalised (read, written), dropped (read, written), read."""

ELEMENTARY_SCORE_PASSES = 14.0
ELEMENTARY_SCORE_LAUNCHES = 5
"""The same by elementary operators, without dropout: written, masked (read, written), widened, normalised and narrowed again in float32 (10), read; five
operators (widened, scaled, masked, normalised, narrowed) where there is one kernel."""


class Work(NamedTuple):
    """One operator on one device. `shape`: (batch, m, n, k) of a product, for attention (batch x heads, queries, keys, width of a head);
    `masked`: the share of an attention's scores that are needed; `reads_again`: its backward reads what it was computed from or has computed;
    `functions`: exponentials and the like that its forward evaluates; `evaluates_again`: its backward does too; `kind`: which measured rate is its own."""

    kernel: str  # product | attention | scores | pointwise | view
    flops: float
    num_bytes: float
    dtype: str
    shape: tuple[int, int, int, int] | None = None
    masked: float = 1.0
    is_weight: bool = False
    reads_again: bool = False
    functions: float = 0.0
    evaluates_again: bool = False
    kind: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What the kernels of a piece of software do differently from plain eager PyTorch.

    `product_dtype`: in which products with a weight are computed, None: in that of their operands; `product_share`: of the rate in that dtype that its
    way of scaling leaves. `fused`: chains of pointwise operators
    make one pass. `attention_share`: of what the best known attention kernel reaches on the device; `attention_before`: it was written for the
    generation of devices before. `score_passes`: over the scores of an attention that is written out. `host_s`: of the process that launches,
    per operator and direction; the device waits where the host is slower, and always where `launches_block`. `repeats_collectives`: recomputation communicates again;
    `stops_early`: it ends when the last of what the backward needs is there, as torch's checkpoint does, not with the block.
    `adds_gradients`: those of a further microbatch are added to the sum by a pass of their own, not by the product that makes them.
    `sums_whole`: ranks that keep a part of the optimizer's state get the sum of all gradients. `exchange_share`: of the bytes of an all-to-all
    that are sent, as a token for several experts of a node may travel once. `sends_parts`: ranks that hold the same activations send a part each
    to the next stage of a pipeline, whose ranks gather them. `softmax_batches`: one kernel scales, masks and normalises the scores of a multiple of so many
    heads (of all sequences of a microbatch); of other numbers elementary operators do. `loss_passes` (forward, backward): over the logits of a loss over
    classes, None: of one kernel, which are 2 (read, kept) and 3 (twice read, written); `loss_launches`: its operators and collectives.
    """

    product_dtype: str | None = None
    product_share: float = 1.0
    fused: bool = False
    attention_share: float = 1.0
    attention_before: bool = False
    score_passes: float = SCORE_PASSES
    host_s: float = 0.0
    repeats_collectives: bool = False
    adds_gradients: bool = False
    sums_whole: bool = False
    exchange_share: float = 1.0
    sends_parts: bool = False
    launches_block: bool = False
    stops_early: bool = True
    softmax_batches: int = 1
    loss_passes: tuple[float, float] | None = None
    loss_launches: tuple[int, int] = (1, 1)

    def passes_over_scores(self, heads: int) -> float:
        """Of a written-out attention's forward, over the scores of so many heads."""
        return ELEMENTARY_SCORE_PASSES if heads % self.softmax_batches else self.score_passes

    def launches(self, kernel: str, kind: str, heads: int) -> tuple[int, int]:
        """Operators and collectives that the host launches for one operator of a graph, forward and backward; one of `heads` heads, where it has heads."""
        if kind == "loss":
            return self.loss_launches
        elementary = kernel == "scores" and self.passes_over_scores(heads) == ELEMENTARY_SCORE_PASSES
        return (ELEMENTARY_SCORE_LAUNCHES,) * 2 if elementary else (1, 1)


CAST_BYTES = {"float8_e4m3fn": 4.0, "float8_e5m2": 4.0, "float4_e2m1fn": 5.125}
"""Per element of an operand that a product wants narrower: read in 16 bits, written twice, along rows for one product and along columns for another; in
float4 read once more for the largest value, and written with a scale of 8 bits for every 16. Source: Transformer Engine, cast and transpose fused."""

PLAIN = Kernels()


def forward_seconds(device: Device, work: Work, kernels: Kernels = PLAIN) -> float:
    """Seconds of one operator's forward."""
    if work.kernel == "view":
        return 0.0
    own = device.kernel(work.kind)
    if own is not None:
        return own.call_s + measured_seconds(device, own, work) + (_evaluating(device, work) if own.kind == "pointwise" else 0.0)
    casting = _casting(device, work, kernels, work.shape[0] * work.shape[1] * work.shape[3]) if work.kernel == "product" and work.shape is not None else 0.0
    return device.kernel_launch_s + _passes(work, kernels)[0] * _busy_seconds(device, work, kernels) + _evaluating(device, work) + casting


def measured_seconds(device: Device, own: KernelRate, work: Work) -> float:
    """Seconds of the flops and bytes of a kernel's forward at the rates that were measured of its kind."""
    peak = device.peak("float32" if work.kernel == "pointwise" else work.dtype)
    compute_s = work.flops * work.masked / (own.compute * peak) if own.compute else 0.0
    return compute_s + (work.num_bytes / (own.memory * device.memory_bytes_per_s) if own.memory else 0.0)


def _casting(device: Device, work: Work, kernels: Kernels, elements: int) -> float:
    """Seconds of making an operand of so many elements narrower, for a product with a weight; weights are kept narrow."""
    if not work.is_weight or kernels.product_dtype is None:
        return 0.0
    return elements * CAST_BYTES[kernels.product_dtype] / (device.memory_bytes_per_s * device.memory_efficiency)


def _evaluating(device: Device, work: Work) -> float:
    return work.functions * work.masked * device.function_s


def backward_seconds(device: Device, work: Work, kernels: Kernels = PLAIN) -> float:
    """Seconds of one operator's backward: two products for each of the forward's, or another pass over the same bytes."""
    return sum(backward_halves(device, work, kernels))


def backward_halves(device: Device, work: Work, kernels: Kernels = PLAIN) -> tuple[float, float]:
    """(gradient of the first operand, of the second) of a product; others have no halves and give 0 for the second."""
    launch = device.kernel_launch_s + (_evaluating(device, work) if work.evaluates_again else 0.0)
    if work.kernel == "view":
        return 0.0, 0.0
    own = device.kernel(work.kind)
    if own is not None and own.backward:
        busy = own.backward * measured_seconds(device, own, work)
        return (device.kernel_launch_s + busy / 2,) * 2 if work.kernel == "product" else (device.kernel_launch_s + busy, 0.0)
    if work.kernel == "product" and work.shape is not None:
        batch, m, n, k = work.shape
        turned = (batch, m, k, n), (batch, n, k, m)
        inputs, weights = (launch + _busy_seconds(device, work._replace(shape=shape), kernels) for shape in turned)
        return inputs + _casting(device, work, kernels, batch * m * n), weights
    if work.kernel == "product":
        return forward_seconds(device, work, kernels), forward_seconds(device, work, kernels)
    if work.kernel == "attention":
        return launch + ATTENTION_BACKWARD / ATTENTION_BACKWARD_RATE * _busy_seconds(device, work, kernels), 0.0
    if work.kernel == "scores":
        return 2 * forward_seconds(device, work, kernels), 0.0
    return launch + _passes(work, kernels)[1] * _busy_seconds(device, work, kernels), 0.0


def _passes(work: Work, kernels: Kernels) -> tuple[float, float]:
    """Over the bytes of an operator, forward and backward; those of a loss over classes are two numbers a logit."""
    if work.kind == "loss" and kernels.loss_passes is not None:
        return kernels.loss_passes[0] / 2, kernels.loss_passes[1] / 2
    return 1.0, 1.5 if work.reads_again else 1.0


def _busy_seconds(device: Device, work: Work, kernels: Kernels) -> float:
    moved = work.num_bytes / (device.memory_bytes_per_s * device.memory_efficiency)
    if work.kernel == "pointwise":
        return max(work.flops / (device.peak("float32") * device.matmul_efficiency), moved)
    if work.kernel == "attention":
        rate = device.peak(work.dtype) * (device.attention_efficiency or device.matmul_efficiency) * device.sustained_rate * kernels.attention_share
        rate *= device.previous_rate if kernels.attention_before else 1.0
        return max(work.flops * work.masked / rate, moved)
    if work.kernel == "scores" and work.shape is not None:
        batch, queries, keys, width = work.shape
        scores = kernels.passes_over_scores(batch) * batch * queries * keys * 2 / (device.memory_bytes_per_s * device.memory_efficiency)
        dtype = work.dtype if width % ALIGNMENT == 0 else "float32"
        products = product_seconds(device, (batch, queries, keys, width), dtype) + product_seconds(device, (batch, queries, width, keys), dtype)
        return max(products, moved) + scores
    narrow = kernels.product_dtype if work.is_weight else None
    dtype, share = (narrow, kernels.product_share) if narrow is not None else (work.dtype, 1.0)
    if work.shape is None or not device.num_multiprocessors:
        products = work.flops / (device.peak(dtype) * device.efficiency(dtype) * device.sustained_rate * share)
        return max(products, moved) if device.loads_ahead else products + moved
    return max(product_seconds(device, work.shape, dtype) / share, moved)


@lru_cache(maxsize=1 << 16)
def product_seconds(device: Device, shape: tuple[int, int, int, int], dtype: str) -> float:
    """Seconds that the multiprocessors compute on a batch of products [m, k] x [k, n]; without launch or bytes."""
    batch, m, n, k = shape
    rate = device.peak(dtype) * device.efficiency(dtype) * device.sustained_rate
    if not device.num_multiprocessors:
        return 2.0 * batch * m * n * k / rate
    of_one = rate / device.num_multiprocessors
    return min(_tiled(batch, m, n, k, tile, split, device.num_multiprocessors) / of_one for tile in TILES for split in SPLITS)


def _tiled(batch: int, m: int, n: int, k: int, tile: tuple[int, int, float], split: int, multiprocessors: int) -> float:
    """Flops that the busiest multiprocessor does, at the rate of the largest tile."""
    rows, columns, share = tile
    waves = math.ceil(batch * math.ceil(m / rows) * math.ceil(n / columns) * split / multiprocessors)
    return waves * 2.0 * rows * columns * (k / split + FILL) / share

