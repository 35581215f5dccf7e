"""Seconds of one operator on one device: a roofline with a fixed cost per launch.

    seconds = launch + max(flops / (peak * matmul_efficiency), bytes / (memory_bandwidth * memory_efficiency))

(Williams, Waterman, Patterson 2009, with achievable instead of nominal ceilings.) The launch term is also the
efficiency curve: with c = peak * matmul_efficiency, a contraction of f flops reaches the share f / (f + launch * c) of c.
"""

from typing import Any

import numpy as np

from autopar.core.cluster import Device
from autopar.errors import UsageError

KINDS = ("contract", "pointwise", "view")


def op_seconds(device: Device, flops: Any, num_bytes: Any, dtype: str, kind: str) -> Any:
    """Seconds of an operator that does `flops` and moves `num_bytes` through device memory; arrays in, array out.

    `kind`: "contract" runs at the matrix peak of `dtype`, "pointwise" at the float32 vector rate (16-bit types are
    computed in float32), "view" moves nothing and costs 0. Scalars give a float, arrays broadcast.
    """
    work, moved = np.broadcast_arrays(np.asarray(flops, dtype=float), np.asarray(num_bytes, dtype=float))
    if kind not in KINDS:
        raise UsageError(f"operator kind {kind!r} has no price; use one of {', '.join(KINDS)}")
    if not (np.all(work >= 0) and np.all(moved >= 0)):
        raise UsageError(f"a {kind} operator has negative or undefined flops or bytes; give numbers of at least 0")
    if kind == "view":
        return np.zeros(work.shape) if work.shape else 0.0
    flops_per_s = device.peak(dtype if kind == "contract" else "float32") * device.matmul_efficiency
    bytes_per_s = device.memory_bytes_per_s * device.memory_efficiency
    seconds = device.kernel_launch_s + np.maximum(work / flops_per_s, moved / bytes_per_s)
    return seconds if work.shape else float(seconds)


def bound_by(device: Device, flops: float, num_bytes: float, dtype: str, kind: str) -> str:
    """Which ceiling sets the time of an operator: "flops", "bytes", "launch" (more than half of it) or "nothing"."""
    if kind == "view":
        return "nothing"
    total = op_seconds(device, flops, num_bytes, dtype, kind)
    if total < 2 * device.kernel_launch_s:
        return "launch"
    return "flops" if op_seconds(device, flops, 0.0, dtype, kind) == total else "bytes"
