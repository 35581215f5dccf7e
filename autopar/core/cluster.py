"""The machines a plan is made for: devices, links, nodes. Plain data; every number knows where it comes from.

A cluster is `num_nodes` equal nodes of `devices_per_node` equal devices. Inside a node a device talks over
`intra_node`, between nodes over `inter_node`; both bandwidths are per device and per direction. Rank r sits on
node r // devices_per_node.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from autopar.core.device import Device, Link, Source, device_values, link_values, read_device, read_link, sources
from autopar.core.host import OWN, Host, host_values, read_host
from autopar.core.toml_file import Table, parse_toml, read_toml
from autopar.core.units import BANDWIDTH, format_quantity, shown
from autopar.errors import UsageError

__all__ = ["Cluster", "Device", "Host", "Link", "Source", "sources"]

MAX_NODES = 1_000_000
MAX_DEVICES_PER_NODE = 10_000
CLUSTER_KEYS = {
    "name": 'name = "my-cluster"',
    "num_nodes": "num_nodes = 4",
    "devices_per_node": "devices_per_node = 8",
    "device": "[device] and its keys below it",
    "intra_node": "[intra_node] with latency and bandwidth between devices of a node",
    "inter_node": "[inter_node] with latency and bandwidth between nodes, also for a single node",
}
"""Keys of a cluster file with the line to write where one is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal nodes of equal devices with two tiers of links. `host`: what the devices share, and what the runtime takes."""

    name: str
    device: Device
    num_nodes: int
    devices_per_node: int
    intra_node: Link
    inter_node: Link
    host: Host = OWN

    def __post_init__(self) -> None:
        for key, value, largest in (
            ("num_nodes", self.num_nodes, MAX_NODES),
            ("devices_per_node", self.devices_per_node, MAX_DEVICES_PER_NODE),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
                raise UsageError(f"cluster {self.name!r}: {key} is {shown(value)}; give a whole number from 1 to {largest}")

    @property
    def is_local(self) -> bool:
        """Whether it is processes of this machine, which compute on its CPU and talk over gloo."""
        return self.name.startswith("local:")

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.devices_per_node

    @property
    def groups(self) -> "tuple[Cluster, ...]":
        """One: what several are is a `MixedCluster`."""
        return (self,)

    @property
    def crowding(self) -> float:
        """How much faster a device computes while the others of its node wait; 1 where they share nothing."""
        return self.host.crowding(self.devices_per_node)

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
            raise UsageError(
                f"unknown cluster {shown(name)}; {'did you mean ' + ' or '.join(close) + '? ' if close else ''}known are {', '.join(names)}"
            )
        one = read_cluster(parse_toml((folder / f"{name}.toml").read_bytes(), f"{name}.toml"))
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
        return read_cluster(read_toml(path))

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
            peak_flops_per_s=tuple(
                (dtype, per_core * share)
                for dtype, per_core in (("float32", 80e9), ("float64", 40e9), ("bfloat16", 80e9), ("float16", 80e9))
            ),
            matmul_efficiency=0.7,
            memory_efficiency=0.7,
            kernel_launch_s=5e-6,
            loads_ahead=False,
            source=sources(
                f"assumed: {core_text}, each 80 GFLOP/s in float32 and 10 GB/s; 5 us per operator call",
                memory="measured: physical memory by processes",
            ),
        )
        return cls(
            name=f"local:{num_processes}",
            device=device,
            num_nodes=1,
            devices_per_node=num_processes,
            intra_node=loopback,
            inter_node=loopback,
            host=Host(cores=float(cores), source=sources("measured: processors that this process may use")),
        )

    @classmethod
    def parse(cls, text: str) -> "Cluster":
        """The cluster of a command line: `local:4`, `h100-sxm`, `h100-sxm:16` (nodes), `h100-sxm:16x4` (nodes x devices), `my.toml`."""
        if text.endswith(".toml") or "/" in text or os.sep in text:
            return cls.load(text)
        return cls.named(text)

    @classmethod
    def named(cls, text: str) -> "Cluster":
        """The cluster of such a name that is no file."""
        name, colon, size = text.partition(":")
        match = re.fullmatch(r"([0-9]{1,7})(?:x([0-9]{1,5}))?", size if colon else "1")
        if match is None or (name == "local" and (not colon or match[2])):
            raise UsageError(
                f"{shown(text)} is not a cluster; write local:4, h100-sxm:16 (16 nodes), h100-sxm:16x4 (4 devices each) or the path of a .toml file"
            )
        if name == "local":
            return cls.local(int(match[1]))
        return cls.preset(name, int(match[1]), int(match[2]) if match[2] else None)

    def to_toml(self) -> str:
        """The file that `load` reads back to an equal cluster."""
        import tomlkit  # here: it takes 60 ms to import, and only who writes a file should wait for it

        return tomlkit.dumps(self.to_values())

    def to_values(self) -> dict[str, Any]:
        """What a file says of it, table by table."""
        return {
            "name": self.name,
            "num_nodes": self.num_nodes,
            "devices_per_node": self.devices_per_node,
            "device": device_values(self.device),
            "intra_node": link_values(self.intra_node),
            "inter_node": link_values(self.inter_node),
            **({} if self.host == OWN else {"host": host_values(self.host)}),
        }

    @classmethod
    def from_values(cls, values: Mapping[str, Any], where: str) -> "Cluster":
        """The cluster of such tables; raises FileFormatError with `where` in front."""
        return read_cluster(Table(where, (), values))

    def __str__(self) -> str:
        def tier(link: Link) -> str:
            return f"{link.name} {format_quantity(float(f'{link.bandwidth_bytes_per_s:.3g}'), BANDWIDTH)}"

        inside = f"{self.name}: {self.num_devices} x {self.device.name}, {self.num_nodes} x {self.devices_per_node}, {tier(self.intra_node)} in a node"
        return inside if self.num_nodes == 1 else f"{inside}, {tier(self.inter_node)} between nodes"


def read_cluster(table: Table) -> Cluster:
    """The cluster that the top table of a file, or one of its groups, describes."""
    if "group" in table.values:
        table.fail("group", "a cluster of several groups; load it with autopar.MixedCluster.load")
    table.check_keys(CLUSTER_KEYS, ("host",))
    return Cluster(
        name=table.text("name"),
        num_nodes=table.count("num_nodes", MAX_NODES),
        devices_per_node=table.count("devices_per_node", MAX_DEVICES_PER_NODE),
        device=read_device(table.table("device")),
        intra_node=read_link(table.table("intra_node")),
        inter_node=read_link(table.table("inter_node")),
        host=read_host(table.table("host")) if "host" in table.values else OWN,
    )


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _physical_memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        raise UsageError("this system does not tell its memory size; describe the machine in a TOML file") from None
