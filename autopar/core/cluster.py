"""The machines a plan is made for: devices, links, nodes. Plain data; every number knows where it comes from.

A cluster is `num_nodes` equal nodes of `devices_per_node` equal devices. Inside a node a device talks over
`intra_node`, between nodes over `inter_node`; both bandwidths are per device and per direction. Rank r sits on
node r // devices_per_node.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from autopar.core.graph import DTYPE_BYTES
from autopar.core.toml_file import Table, parse_toml, read_toml
from autopar.core.units import BANDWIDTH, COMPUTE, DURATION, MEMORY, format_quantity, shown
from autopar.errors import UsageError

STATUSES = ("measured", "derived", "assumed")
"""measured: observed on such hardware. derived: from a published specification or by a stated formula. assumed: neither."""

MAX_NODES = 1_000_000
MAX_DEVICES_PER_NODE = 10_000
DEVICE_NUMBERS = ("memory", "memory_bandwidth", "peak", "matmul_efficiency", "memory_efficiency", "kernel_launch")
LINK_NUMBERS = ("latency", "bandwidth", "efficiency")
PEAK_DTYPES = (*DTYPE_BYTES, "tf32")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a number comes from: one of `STATUSES` and a sentence that lets a reader check it."""

    status: str
    text: str

    def __post_init__(self) -> None:
        if self.status not in STATUSES or not self.text.strip():
            raise UsageError(f"{shown(str(self))} is not a source; write 'measured: ...', 'derived: ...' or 'assumed: ...' and say from what")

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Source.parse("derived: vendor data sheet")."""
        status, _, rest = text.partition(":")
        return cls(status.strip(), rest.strip())

    def __str__(self) -> str:
        return f"{self.status}: {self.text}"


Sources = tuple[tuple[str, Source], ...]
"""(name of a number, its source); the entry "default" speaks for every number that has none of its own."""


def sources(default: str = "assumed: no source given", **numbers: str) -> Sources:
    """sources("derived: data sheet", latency="assumed: as its predecessor")."""
    return tuple((name, Source.parse(text)) for name, text in {"default": default, **numbers}.items())


UNSOURCED = sources()


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or one process's share of a CPU.

    `peak_flops_per_s` are dense matrix peaks, pairs (dtype, flops per second), float32 always among them and without
    TF32, which is its own entry. `memory_bytes` is what a process can allocate, not the number on the box.
    The efficiencies are the shares of peak and of memory bandwidth that large operators reach.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    peak_flops_per_s: tuple[tuple[str, float], ...]
    matmul_efficiency: float = 1.0
    memory_efficiency: float = 1.0
    kernel_launch_s: float = 0.0
    source: Sources = UNSOURCED

    def __post_init__(self) -> None:
        for dtype, value in self.peak_flops_per_s:
            if dtype not in PEAK_DTYPES:
                raise UsageError(f"device {self.name!r}: peak of unknown dtype {dtype!r}; known are {', '.join(PEAK_DTYPES)}")
            _check_number(self.name, f"peak of {dtype}", value)
        if "float32" not in dict(self.peak_flops_per_s):
            raise UsageError(f"device {self.name!r}: no float32 peak; add it, pointwise operators are priced by it")
        _check_number(self.name, "memory_bytes", self.memory_bytes)
        _check_number(self.name, "memory_bytes_per_s", self.memory_bytes_per_s)
        _check_number(self.name, "matmul_efficiency", self.matmul_efficiency, largest=1.0)
        _check_number(self.name, "memory_efficiency", self.memory_efficiency, largest=1.0)
        _check_number(self.name, "kernel_launch_s", self.kernel_launch_s, zero=True)

    def peak(self, dtype: str) -> float:
        """Dense peak in flops per second for matrix products of this dtype."""
        for name, value in self.peak_flops_per_s:
            if name == dtype:
                return value
        listed = ", ".join(name for name, _ in self.peak_flops_per_s)
        raise UsageError(f"device {self.name!r} has no {dtype} peak (it has {listed}); use one of these or add {dtype} to [device.peak]")

    def source_of(self, number: str) -> Source:
        """Source of one of `DEVICE_NUMBERS`."""
        return _source_of(self.source, number, DEVICE_NUMBERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One tier of the network: latency of a hop, bandwidth per device and direction, share of it that messages reach."""

    name: str
    latency_s: float
    bandwidth_bytes_per_s: float
    efficiency: float = 1.0
    source: Sources = UNSOURCED

    def __post_init__(self) -> None:
        _check_number(self.name, "latency_s", self.latency_s, zero=True)
        _check_number(self.name, "bandwidth_bytes_per_s", self.bandwidth_bytes_per_s)
        _check_number(self.name, "efficiency", self.efficiency, largest=1.0)

    @property
    def rate_bytes_per_s(self) -> float:
        """Bytes per second that a large message reaches."""
        return self.bandwidth_bytes_per_s * self.efficiency

    def seconds(self, num_bytes: float) -> float:
        """Seconds of one message of `num_bytes`."""
        return self.latency_s + num_bytes / self.rate_bytes_per_s

    def source_of(self, number: str) -> Source:
        """Source of one of `LINK_NUMBERS`."""
        return _source_of(self.source, number, LINK_NUMBERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal nodes of equal devices with two tiers of links."""

    name: str
    device: Device
    num_nodes: int
    devices_per_node: int
    intra_node: Link
    inter_node: Link

    def __post_init__(self) -> None:
        for key, value, largest in (("num_nodes", self.num_nodes, MAX_NODES), ("devices_per_node", self.devices_per_node, MAX_DEVICES_PER_NODE)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
                raise UsageError(f"cluster {self.name!r}: {key} is {shown(value)}; give a whole number from 1 to {largest}")

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.devices_per_node

    def link_between(self, rank: int, other: int) -> Link:
        """The tier over which two ranks talk."""
        same_node = rank // self.devices_per_node == other // self.devices_per_node
        return self.intra_node if same_node else self.inter_node

    @classmethod
    def preset(cls, name: str, nodes: int = 1, devices_per_node: int | None = None) -> "Cluster":
        """A cluster of `nodes` nodes of a known machine; `devices_per_node` for a node that is not full."""
        folder = files("autopar") / "cost_models" / "hardware"
        names = cls.preset_names()
        if name not in names:
            close = get_close_matches(name[:40], names, n=3, cutoff=0.4)
            raise UsageError(f"unknown cluster {shown(name)}; {'did you mean ' + ' or '.join(close) + '? ' if close else ''}known are {', '.join(names)}")
        one = _from_table(parse_toml((folder / f"{name}.toml").read_bytes(), f"{name}.toml"))
        if devices_per_node is None:
            return replace(one, name=f"{name}:{nodes}", num_nodes=nodes)
        return replace(one, name=f"{name}:{nodes}x{devices_per_node}", num_nodes=nodes, devices_per_node=devices_per_node)

    @classmethod
    def preset_names(cls) -> tuple[str, ...]:
        folder = files("autopar") / "cost_models" / "hardware"
        return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))

    @classmethod
    def load(cls, path: str | Path) -> "Cluster":
        """The cluster a TOML file describes; `cost_models/README.md` has the format."""
        return _from_table(read_toml(path))

    @classmethod
    def local(cls, num_processes: int) -> "Cluster":
        """`num_processes` processes on this machine that talk over loopback. Reads the number of cores and the memory.

        Under torchrun each of several processes computes with one thread, so a process has one core, or its share where
        there are more processes than cores. One process alone has them all.
        """
        if not isinstance(num_processes, int) or isinstance(num_processes, bool) or not 1 <= num_processes <= MAX_DEVICES_PER_NODE:
            raise UsageError(f"{shown(num_processes)} local processes; give a whole number from 1 to {MAX_DEVICES_PER_NODE}")
        cores = _num_cores()
        share = cores if num_processes == 1 else cores / max(num_processes, cores)
        loopback = Link(
            name="gloo over loopback",
            latency_s=3e-4 * max(1.0, num_processes / cores),
            bandwidth_bytes_per_s=1e9 * min(1.0, cores / num_processes),
            source=sources("assumed: 1 GB/s per core and 0.3 ms, longer by processes per core; gloo on a 2-core machine came near it"),
        )
        core_text = f"{share:.2g} of {cores} cores"
        device = Device(
            name=f"CPU process ({core_text})",
            memory_bytes=_physical_memory_bytes() // num_processes,
            memory_bytes_per_s=10e9 * share,
            # 2.5 GHz x two fused multiply-adds of 8 float32; half as many float64, and 16-bit types are widened first
            peak_flops_per_s=tuple((dtype, per_core * share) for dtype, per_core in (("float32", 80e9), ("float64", 40e9), ("bfloat16", 80e9), ("float16", 80e9))),
            matmul_efficiency=0.7,
            memory_efficiency=0.7,
            kernel_launch_s=5e-6,
            source=sources(f"assumed: {core_text}, each 80 GFLOP/s in float32 and 10 GB/s; 5 us per operator call", memory="measured: physical memory by processes"),
        )
        return cls(name=f"local:{num_processes}", device=device, num_nodes=1, devices_per_node=num_processes, intra_node=loopback, inter_node=loopback)

    @classmethod
    def parse(cls, text: str) -> "Cluster":
        """The cluster of a command line: `local:4`, `h100-sxm`, `h100-sxm:16` (nodes), `h100-sxm:16x4` (nodes x devices), `my.toml`."""
        if text.endswith(".toml") or "/" in text or os.sep in text:
            return cls.load(text)
        name, _, size = text.partition(":")
        match = re.fullmatch(r"([0-9]{1,7})(?:x([0-9]{1,5}))?", size or "1", flags=re.ASCII)
        if match is None or (name == "local" and (not size or match[2])):
            raise UsageError(f"{shown(text)} is not a cluster; write local:4, h100-sxm:16 (16 nodes), h100-sxm:16x4 (4 devices each) or the path of a .toml file")
        if name == "local":
            return cls.local(int(match[1]))
        return cls.preset(name, int(match[1]), int(match[2]) if match[2] else None)

    def to_toml(self) -> str:
        """The file that `load` reads back to an equal cluster."""
        import tomlkit  # here: it takes 60 ms to import, and only who writes a file should wait for it

        return tomlkit.dumps(_to_values(self))

    def __str__(self) -> str:
        def tier(link: Link) -> str:
            return f"{link.name} {format_quantity(float(f'{link.bandwidth_bytes_per_s:.3g}'), BANDWIDTH)}"

        inside = f"{self.name}: {self.num_devices} x {self.device.name}, {self.num_nodes} x {self.devices_per_node}, {tier(self.intra_node)} in a node"
        return inside if self.num_nodes == 1 else f"{inside}, {tier(self.inter_node)} between nodes"


def _from_table(table: Table) -> Cluster:
    table.check_keys(("name", "num_nodes", "devices_per_node", "device", "intra_node", "inter_node"))
    return Cluster(
        name=table.text("name"),
        num_nodes=table.count("num_nodes", MAX_NODES),
        devices_per_node=table.count("devices_per_node", MAX_DEVICES_PER_NODE),
        device=_device(table.table("device")),
        intra_node=_link(table.table("intra_node")),
        inter_node=_link(table.table("inter_node")),
    )


def _device(table: Table) -> Device:
    table.check_keys(("name", *DEVICE_NUMBERS), ("source",))
    peak = table.table("peak")
    peak.check_keys(("float32",), PEAK_DTYPES)
    memory = table.quantity("memory", MEMORY)
    if memory < 1:
        table.fail("memory", f"{shown(table.values['memory'])} is less than a byte; write a memory size such as '80 GB'")
    return Device(
        name=table.text("name"),
        memory_bytes=round(memory),
        memory_bytes_per_s=table.quantity("memory_bandwidth", BANDWIDTH),
        peak_flops_per_s=tuple((dtype, peak.quantity(dtype, COMPUTE)) for dtype in peak.values),
        matmul_efficiency=table.share("matmul_efficiency"),
        memory_efficiency=table.share("memory_efficiency"),
        kernel_launch_s=table.quantity("kernel_launch", DURATION, zero=True),
        source=_sources(table, DEVICE_NUMBERS),
    )


def _link(table: Table) -> Link:
    table.check_keys(("name", "latency", "bandwidth"), ("efficiency", "source"))
    return Link(
        name=table.text("name"),
        latency_s=table.quantity("latency", DURATION, zero=True),
        bandwidth_bytes_per_s=table.quantity("bandwidth", BANDWIDTH),
        efficiency=table.share("efficiency") if "efficiency" in table.values else 1.0,
        source=_sources(table, LINK_NUMBERS),
    )


def _sources(table: Table, numbers: tuple[str, ...]) -> Sources:
    """`source` is one text for the whole table, or a table with a text per number and a `default`."""
    if "source" not in table.values:
        return UNSOURCED
    if isinstance(table.values["source"], str):
        return (("default", _source(table, "source")),)
    given = table.table("source")
    given.check_keys((), ("default", *numbers))
    own = tuple((key, _source(given, key)) for key in given.values)
    return own if "default" in given.values else (*UNSOURCED, *own)


def _source(table: Table, key: str) -> Source:
    text = table.text(key)
    try:
        return Source.parse(text)
    except UsageError as error:
        table.fail(key, str(error))


def _to_values(cluster: Cluster) -> dict[str, object]:
    device = cluster.device
    return {
        "name": cluster.name,
        "num_nodes": cluster.num_nodes,
        "devices_per_node": cluster.devices_per_node,
        "device": {
            "name": device.name,
            "memory": format_quantity(device.memory_bytes, MEMORY),
            "memory_bandwidth": format_quantity(device.memory_bytes_per_s, BANDWIDTH),
            "matmul_efficiency": device.matmul_efficiency,
            "memory_efficiency": device.memory_efficiency,
            "kernel_launch": format_quantity(device.kernel_launch_s, DURATION),
            "peak": {dtype: format_quantity(value, COMPUTE) for dtype, value in device.peak_flops_per_s},
            "source": {name: str(source) for name, source in device.source},
        },
        "intra_node": _link_values(cluster.intra_node),
        "inter_node": _link_values(cluster.inter_node),
    }


def _link_values(link: Link) -> Mapping[str, object]:
    return {
        "name": link.name,
        "latency": format_quantity(link.latency_s, DURATION),
        "bandwidth": format_quantity(link.bandwidth_bytes_per_s, BANDWIDTH),
        "efficiency": link.efficiency,
        "source": {name: str(source) for name, source in link.source},
    }


def _check_number(owner: str, name: str, value: float, *, zero: bool = False, largest: float = math.inf) -> None:
    if not (math.isfinite(value) and value <= largest and (value > 0 or (zero and value == 0))):
        raise UsageError(f"{owner!r}: {name} is {value}; give a finite number {'of at least' if zero else 'above'} 0{'' if largest == math.inf else f' and up to {largest}'}")


def _source_of(given: Sources, number: str, numbers: tuple[str, ...]) -> Source:
    if number not in numbers:
        raise UsageError(f"unknown number {number!r}; known are {', '.join(numbers)}")
    found = dict(given)
    return found.get(number, found["default"])


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _physical_memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        raise UsageError("this system does not tell its memory size; describe the machine in a TOML file") from None
