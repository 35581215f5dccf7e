"""`autopar clusters`: the machines that can be named."""

from typing import Any

from autopar.cli.console import output, print_json
from autopar.cli.options import Debug, Json
from autopar.cli.units import size
from autopar.core.cluster import Cluster, Link


def clusters(json: Json = False, debug: Debug = False) -> None:
    """List the machines that can be named without a file; `local:N` is N processes on this one."""
    found = [(name, Cluster.preset(name)) for name in Cluster.preset_names()]
    if json:
        print_json({"clusters": [_row(name, cluster) for name, cluster in found]})
        return
    from rich.table import Table

    table = Table("CLUSTER", "DEVICES IN A NODE", "MEMORY EACH", "IN A NODE", "BETWEEN NODES", box=None, pad_edge=False)
    for name, cluster in found:
        device = f"{cluster.devices_per_node} x {cluster.device.name}"
        table.add_row(name, device, size(cluster.device.memory_bytes), _link(cluster.intra_node), _link(cluster.inter_node))
    table.add_row("local:N", "N processes on this machine", "its memory / N", "loopback", "-")
    page = output()
    page.print(table)
    page.print("NAME:16 is 16 nodes, NAME:16x4 are 16 nodes of 4 devices, NAME:2+OTHER:2 are groups of different machines, and FILE.toml describes a machine of your own", style="dim")


def _link(link: Link) -> str:
    return f"{link.name}, {link.bandwidth_bytes_per_s / 1e9:.4g} GB/s"


def _row(name: str, cluster: Cluster) -> dict[str, Any]:
    return {
        "name": name,
        "device": cluster.device.name,
        "devices_per_node": cluster.devices_per_node,
        "memory_bytes": cluster.device.memory_bytes,
        "memory_bytes_per_s": cluster.device.memory_bytes_per_s,
        "peak_flops_per_s": dict(cluster.device.peak_flops_per_s),
        "intra_node": _tier(cluster.intra_node),
        "inter_node": _tier(cluster.inter_node),
    }


def _tier(link: Link) -> dict[str, Any]:
    return {"name": link.name, "latency_s": link.latency_s, "bandwidth_bytes_per_s": link.bandwidth_bytes_per_s}
