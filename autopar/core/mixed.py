"""Clusters of different machines: groups, each of equal nodes of equal devices, and the link between groups. Plain data, as a `Cluster` is.

The devices of the first group have the first numbers, then those of the second, and so on.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autopar.core.cluster import Cluster, read_cluster
from autopar.core.device import PEAK_DTYPES, Device, Link, link_values, read_link
from autopar.core.host import Host
from autopar.core.toml_file import Table, read_toml
from autopar.core.units import BANDWIDTH, format_quantity, shown
from autopar.errors import FileFormatError, UsageError

MAX_GROUPS = 4
"""Pipelines are tried with the groups in every order."""

MIXED_KEYS = {"name": 'name = "my-cluster"', "group": "[[group]] and the keys of a cluster file below it, once for each group"}

TRAINED_IN = ("bfloat16", "float16", "float32")
"""The first of these dtypes that all devices have tells which of them is slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedCluster:
    """`between`: the link of any two devices of different groups, per device and direction."""

    name: str
    groups: tuple[Cluster, ...]
    between: Link

    def __post_init__(self) -> None:
        names = [group.name for group in self.groups]
        if not 2 <= len(names) <= MAX_GROUPS:
            raise UsageError(f"cluster {self.name!r}: {len(names)} groups; give 2 to {MAX_GROUPS}, or the cluster of one of them")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"cluster {self.name!r}: two groups are called {twice!r}; make them one group of more nodes, or give each its own name in a file")
        local = {group.is_local for group in self.groups}
        if len(local) > 1 or self.is_local not in local:
            raise UsageError(f"cluster {self.name!r}: groups {', '.join(names)}: all names of a cluster of local processes start with 'local:', and no others")

    @property
    def is_local(self) -> bool:
        """Whether all groups are processes of this machine."""
        return self.name.startswith("local:")

    @property
    def num_devices(self) -> int:
        return sum(group.num_devices for group in self.groups)

    def group(self, name: str) -> Cluster | None:
        """The group of this name."""
        return next((group for group in self.groups if group.name == name), None)

    def used_by(self, name: str) -> "Machines":
        """What a plan uses that names its cluster so: one group, all as slow as the slowest, or the groups as they are."""
        slowest = self.slowest
        return self.group(name) or (slowest if name == slowest.name else self)

    @property
    def slowest(self) -> Cluster:
        """All devices as if each were as slow, and had as little memory, as the slowest; nodes of a size that divides all, links as slow as the slowest.

        Every plan for it runs on these groups. The runtime takes for a pass what it takes on the slowest host, and no cores are free while others wait.
        """
        per_node = math.gcd(*(group.devices_per_node for group in self.groups))
        hosts = [group.host for group in self.groups]
        updates = [host.update_bytes_per_s for host in hosts if host.update_bytes_per_s is not None]
        host = Host(
            action_s=max(host.action_s for host in hosts), watch_s=max(host.watch_s for host in hosts), update_bytes_per_s=min(updates, default=None),
            source=hosts[0].source,
        )  # fmt: skip
        return Cluster(
            name=f"{self.name} as slow as its slowest", device=_slowest_device([group.device for group in self.groups]), num_nodes=self.num_devices // per_node,
            devices_per_node=per_node, intra_node=_slowest_link([group.intra_node for group in self.groups]),
            inter_node=_slowest_link([self.between, *(group.inter_node for group in self.groups)]), host=host,
        )  # fmt: skip

    @classmethod
    def of(cls, *groups: Cluster) -> "MixedCluster":
        """Groups by the names that they have; the slower of their links between nodes is that between them."""
        local = next((group.name for group in groups if group.is_local), None)
        if local is not None:
            raise UsageError(f"{local} in a cluster of groups: processes of this machine share its cores and memory; describe each group of them in a file, or write local:N")
        return cls(name="+".join(group.name for group in groups), groups=groups, between=_slowest_link([group.inter_node for group in groups]))

    @classmethod
    def load(cls, path: str | Path) -> "MixedCluster":
        """The groups that a TOML file describes; `cost_models/README.md` has the format."""
        return read_groups(read_toml(path))

    @classmethod
    def from_values(cls, values: Mapping[str, Any], where: str) -> "MixedCluster":
        """The cluster of such tables; raises FileFormatError with `where` in front."""
        return read_groups(Table(where, (), values))

    def to_values(self) -> dict[str, Any]:
        """What a file says of it, table by table."""
        return {"name": self.name, "group": [group.to_values() for group in self.groups], "between": link_values(self.between)}

    def to_toml(self) -> str:
        """The file that `load` reads back to an equal cluster."""
        import tomlkit  # here: it takes 60 ms to import, and only who writes a file should wait for it

        return tomlkit.dumps(self.to_values())

    def __str__(self) -> str:
        rate = format_quantity(float(f"{self.between.bandwidth_bytes_per_s:.3g}"), BANDWIDTH)
        head = f"{self.name}: {self.num_devices} devices in {len(self.groups)} groups, {self.between.name} {rate} between them"
        return "; ".join([head, *map(str, self.groups)])


Machines = Cluster | MixedCluster
"""What a plan can be made for."""


def load_machines(path: str | Path) -> Machines:
    """The cluster or the groups that a TOML file describes."""
    table = read_toml(path)
    return read_groups(table) if "group" in table.values else read_cluster(table)


def parse_machines(text: str) -> Machines:
    """As `Cluster.parse`, and groups: `a100-sxm:2+h100-sxm:2`, or a file with `[[group]]` tables."""
    if text.endswith(".toml") or "/" in text or os.sep in text:
        return load_machines(text)
    names = text.split("+")
    return Cluster.parse(text) if len(names) == 1 else MixedCluster.of(*map(Cluster.named, names))


def read_groups(table: Table) -> MixedCluster:
    """The groups of the top table of a file. A group is described as in a cluster file, or named: `cluster = "a100-sxm:2"`."""
    table.check_keys(MIXED_KEYS, ("between",))
    found = table.values["group"]
    if not isinstance(found, list) or not all(isinstance(values, dict) for values in found):
        table.fail("group", f"{shown(found)} is not a list of tables; write [[group]] and the keys of a cluster file below it, once for each group")
    groups = tuple(_read_group(Table(table.file, ("group", str(n)), values)) for n, values in enumerate(found))
    between = read_link(table.table("between")) if "between" in table.values else None
    name = table.text("name")
    try:
        return MixedCluster(name=name, groups=groups, between=between or _slowest_link([group.inter_node for group in groups]))
    except UsageError as error:
        raise FileFormatError(f"{table.file}: group: {error}") from None


def _read_group(table: Table) -> Cluster:
    if "cluster" not in table.values:
        return read_cluster(table)
    table.check_keys({"cluster": 'cluster = "a100-sxm:2"'}, ("name",))
    text = table.text("cluster")
    try:
        group = Cluster.named(text)
    except UsageError as error:
        table.fail("cluster", str(error))
    if group.is_local:
        table.fail("cluster", f"{text}: processes of this machine share its cores and memory; write what each group has of them, as `autopar calibrate` does")
    return replace(group, name=table.text("name")) if "name" in table.values else group


def _slowest_link(links: list[Link]) -> Link:
    """The one of least bandwidth, with the longest latency of all."""
    slow = min(links, key=lambda link: link.rate_bytes_per_s, default=None)
    if slow is None:
        raise UsageError("no groups; give at least two")
    return replace(slow, latency_s=max(link.latency_s for link in links))


def _slowest_device(devices: list[Device]) -> Device:
    """The device that multiplies slowest, with every other number no better than that of any other device."""
    common = [dtype for dtype in PEAK_DTYPES if all(dtype in dict(device.peak_flops_per_s) for device in devices)]
    dtype = next(dtype for dtype in TRAINED_IN if dtype in common)  # float32 is always there
    slow = min(devices, key=lambda device: _rate(device, dtype))
    return replace(
        slow, memory_bytes=min(device.memory_bytes for device in devices),
        memory_bytes_per_s=min(device.memory_bytes_per_s * device.memory_efficiency for device in devices) / slow.memory_efficiency,
        peak_flops_per_s=tuple((d, min(_rate(device, d) for device in devices) / (slow.efficiency(d) * slow.sustained_rate)) for d, _ in slow.peak_flops_per_s if d in common),
        kernel_launch_s=max(device.kernel_launch_s for device in devices), function_s=max(device.function_s for device in devices),
    )  # fmt: skip


def _rate(device: Device, dtype: str) -> float:
    """Flops per second of large products."""
    return device.peak(dtype) * device.efficiency(dtype) * device.sustained_rate
