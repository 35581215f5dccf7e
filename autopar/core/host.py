"""What the host adds to the numbers of a device: cores that processes share, time the runtime spends per pass, the optimizer's rate."""

import math
from dataclasses import dataclass

from autopar.core.device import UNSOURCED, Source, Sources, read_sources, source_in
from autopar.core.toml_file import Table
from autopar.core.units import BANDWIDTH, DURATION, format_quantity
from autopar.errors import UsageError

HOST_NUMBERS = {
    "cores": "cores = 2.0 (processors that the devices of a node share)",
    "action": 'action = "1 ms" (the runtime\'s own time for one forward or backward of a microbatch)',
    "watch": 'watch = "40 us"  (what keeping its result adds to a product under selective recomputation, forward and again)',
    "update_bandwidth": 'update_bandwidth = "10 GB/s" (bytes of parameters, gradients and state that the optimizer passes over)',
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """`cores`: processors that the devices of a node share, where devices are processes of a CPU; None where each computes on its own.
    The numbers of such a device hold while all devices of its node compute. `action_s`: what the runtime itself takes for a forward or a
    backward of a microbatch, however small. `watch_s`: what it adds to a product whose result a block keeps that is otherwise computed
    again, forward and again. `update_bytes_per_s`: how fast the optimizer passes over what it reads and writes; None: its
    step is not priced."""

    cores: float | None = None
    action_s: float = 0.0
    watch_s: float = 0.0
    update_bytes_per_s: float | None = None
    source: Sources = UNSOURCED

    def __post_init__(self) -> None:
        for name, value in (("cores", self.cores), ("update_bytes_per_s", self.update_bytes_per_s)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"host: {name} is {value}; give a finite number above 0")
        for name, value in (("action_s", self.action_s), ("watch_s", self.watch_s)):
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"host: {name} is {value}; give a finite number of at least 0")

    def crowding(self, num_devices: int) -> float:
        """How much faster one of the devices of a node computes while the others wait."""
        return 1.0 if self.cores is None else max(1.0, num_devices / self.cores)

    def source_of(self, number: str) -> Source:
        """Source of one of `HOST_NUMBERS`."""
        return source_in(self.source, number, HOST_NUMBERS)


OWN = Host()
"""Devices with cores of their own and a runtime that costs nothing: what a file without a `[host]` table says."""


def read_host(table: Table) -> Host:
    """The host that the `[host]` table of a file describes; all its numbers are optional."""
    table.check_keys({}, (*HOST_NUMBERS, "source"))
    given = table.values
    return Host(
        cores=table.number("cores") if "cores" in given else None,
        action_s=table.quantity("action", DURATION, zero=True) if "action" in given else 0.0,
        watch_s=table.quantity("watch", DURATION, zero=True) if "watch" in given else 0.0,
        update_bytes_per_s=table.quantity("update_bandwidth", BANDWIDTH) if "update_bandwidth" in given else None,
        source=read_sources(table, HOST_NUMBERS),
    )


def host_values(host: Host) -> dict[str, object]:
    """The table that `read_host` reads back."""
    values: dict[str, object] = {"action": format_quantity(host.action_s, DURATION)}
    if host.watch_s:
        values["watch"] = format_quantity(host.watch_s, DURATION)
    if host.cores is not None:
        values["cores"] = host.cores
    if host.update_bytes_per_s is not None:
        values["update_bandwidth"] = format_quantity(host.update_bytes_per_s, BANDWIDTH)
    return values | {"source": {name: str(source) for name, source in host.source}}
