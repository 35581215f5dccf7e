"""What is exchanged and updated once a step, or once a segment, in the groups in which it travels: bytes by collective, and seconds of the optimizer.

`work.py` prices every parameter by itself, which is what the search can see; here is what `held.py` says travels together, in the dtype in which it
is sent, so that one latency is paid for a bucket and not for a parameter.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from autopar.core.buckets import BUCKET_BYTES
from autopar.core.device import Device
from autopar.planner.held import Held, Holdings
from autopar.planner.states import Pricing
from autopar.program import Program

UPDATE_PASSES = 7.5
"""Over the stored parameters in an AdamW step, in float32 with a 16-bit copy: gradient, parameter and two moments read, the last three and
the copy written."""

Axes = tuple[int, ...]
Traffic = dict[tuple[str, Axes], float]
"""Bytes of one rank's input by collective and axes."""


@dataclass(frozen=True)
class Updates:
    """Of one program: what is gathered before a step, what is summed after it, what is gathered and summed for a ZeRO-3 segment; bytes."""

    gathers: Traffic = field(default_factory=dict)
    sums: Traffic = field(default_factory=dict)
    unit_gathers: Traffic = field(default_factory=dict)
    unit_sums: Traffic = field(default_factory=dict)
    stored_bytes: float = 0.0


def updates(program: Program) -> Updates:
    """The traffic of all parameters of a program."""
    gathers, sums, unit_gathers, unit_sums = (defaultdict(float) for _ in range(4))
    stored = 0.0
    for held in Holdings(program).parameters.values():
        stored += held.stored if held.trained else 0
        _, axes, rest, _ = held.key
        if held.stage:
            (unit_gathers if held.stage == 3 else gathers)["all_gather", axes] += held.part
        if held.trained:
            if held.stage:
                (sums if held.stage == 1 else unit_sums)["reduce_scatter", axes] += held.reduced * held.ranks
            if rest:
                sums["all_reduce", rest] += _summed_bytes(held)
    return Updates(dict(gathers), dict(sums), dict(unit_gathers), dict(unit_sums), stored)


def _summed_bytes(held: Held) -> float:
    return held.reduced if held.reduced_over > 1 else 0.0


def traffic_seconds(traffic: Traffic, pricing: Pricing, bucket_bytes: float = BUCKET_BYTES) -> float:
    """Seconds of collectives over this traffic in buckets, one after the other."""
    total = 0.0
    for (primitive, axes), num_bytes in traffic.items():
        if num_bytes:
            count = max(1, round(num_bytes / bucket_bytes))
            total += count * pricing.collective(primitive, axes, num_bytes / count)
    return total


def update_seconds(device: Device, stored_bytes: float) -> float:
    """Seconds of the optimizer on so many bytes of parameters in its dtype."""
    return UPDATE_PASSES * stored_bytes / (device.memory_bytes_per_s * device.memory_efficiency)
