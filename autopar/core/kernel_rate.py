"""What kernels of one kind reach on a device, where that was measured: a table of a cluster file, and its numbers."""

import math
from dataclasses import dataclass

from autopar.core.toml_file import Table
from autopar.core.units import DURATION, format_quantity, shown
from autopar.errors import UsageError

KERNEL_KINDS = (
    "product", "convolution", "attention", "causal_attention", "pointwise", "scalar", "normalisation", "softmax", "loss", "reduction", "mean", "gather", "copy", "max_pooling",
    "average_pooling",
)  # fmt: skip
"""What a rule may say that an operator is; the others are what `cost` and `kernel` of their rule say."""

RATE_NUMBERS = {"call": 'call = "10 us"', "compute": "compute = 0.8", "memory": "memory = 0.9", "backward": "backward = 2.0"}


@dataclass(frozen=True, slots=True)
class KernelRate:
    """A forward takes `call_s` + flops / (compute x peak) + bytes / (memory x bandwidth) seconds, a term whose share is 0 none; a backward `backward` times
    these flops and bytes, 0: what the general numbers of the device say.

    Shares are of the device's peak and memory bandwidth, above 1 where caches give more. What evaluating exponentials takes is in them, but for
    pointwise operators, which evaluate different ones.
    """

    kind: str
    call_s: float = 0.0
    compute: float = 0.0
    memory: float = 0.0
    backward: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KERNEL_KINDS:
            raise UsageError(f"kernels of kind {shown(self.kind)} are unknown; known are {', '.join(KERNEL_KINDS)}")
        for name, value in (("call_s", self.call_s), ("compute", self.compute), ("memory", self.memory), ("backward", self.backward)):
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"kernels of kind {self.kind}: {name} is {value}; give a finite number of at least 0")


def read_kernels(table: Table) -> tuple[KernelRate, ...]:
    """The rates that the `[device.kernels]` table of a file describes, one table for each kind."""
    table.check_keys({}, KERNEL_KINDS)
    found = []
    for kind in table.values:
        own = table.table(kind)
        own.check_keys({"call": RATE_NUMBERS["call"]}, RATE_NUMBERS)
        found.append(KernelRate(kind, own.quantity("call", DURATION, zero=True), *(own.number(key) if key in own.values else 0.0 for key in ("compute", "memory", "backward"))))
    return tuple(found)


def kernel_values(rates: tuple[KernelRate, ...]) -> dict[str, dict[str, object]]:
    """The table that `read_kernels` reads back."""
    return {
        rate.kind: {"call": format_quantity(rate.call_s, DURATION)} | {key: value for key in ("compute", "memory", "backward") if (value := getattr(rate, key))}
        for rate in rates
    }
