"""Parts of a cluster: fewer of its nodes, or some devices of one, for those who need not use all that is offered."""

import re
from dataclasses import replace

from autopar.core.cluster import Cluster
from autopar.core.device import Device, Link
from autopar.core.mixed import Machines, MixedCluster

NAMED = re.compile(r"(?P<machine>[^:]+):\d+(x\d+)?")
"""Names that say how large a cluster is: `local:4`, `h100-sxm:16`, `h100-sxm:16x4`."""


def parts(cluster: Machines) -> tuple[Machines, ...]:
    """The cluster, then every smaller one that divides it: whole nodes, and behind them equal parts of one node. From most devices to fewest. Of groups:
    all of them, then the parts of each."""
    if isinstance(cluster, MixedCluster):
        of_groups = [part for group in cluster.groups for part in _parts(group)]
        return (cluster, *sorted(of_groups, key=lambda part: -part.num_devices))
    return _parts(cluster)


def _parts(cluster: Cluster) -> tuple[Cluster, ...]:
    nodes = [replace(cluster, num_nodes=n) for n in range(cluster.num_nodes, 0, -1) if cluster.num_nodes % n == 0]
    full = cluster.devices_per_node
    of_one = [_of_one_node(nodes[-1], n) for n in range(full - 1, 0, -1) if full % n == 0]
    return tuple(_named(part, cluster) for part in (*nodes, *of_one))


def part_of(cluster: Machines, num_devices: int) -> Machines | None:
    """The part of so many devices; None where there is none."""
    return next((part for part in parts(cluster) if part.num_devices == num_devices), None)


def _of_one_node(node: Cluster, num_devices: int) -> Cluster:
    """Where devices are processes that share processors and memory, fewer of them have more of both."""
    part = replace(node, devices_per_node=num_devices)
    if node.host.cores is None:
        return part
    faster = node.crowding / part.crowding
    host = replace(node.host, action_s=node.host.action_s / faster, watch_s=node.host.watch_s / faster)
    device = _faster(node.device, faster, node.devices_per_node / num_devices)
    return replace(part, device=device, host=host, intra_node=_faster_link(node.intra_node, faster), inter_node=_faster_link(node.inter_node, faster))


def _faster(device: Device, factor: float, memory: float) -> Device:
    return replace(
        device, memory_bytes=int(device.memory_bytes * memory), memory_bytes_per_s=device.memory_bytes_per_s * factor,
        peak_flops_per_s=tuple((dtype, rate * factor) for dtype, rate in device.peak_flops_per_s),
        kernel_launch_s=device.kernel_launch_s / factor, function_s=device.function_s / factor,
        kernels=tuple(replace(rate, call_s=rate.call_s / factor) for rate in device.kernels),
    )  # fmt: skip


def _faster_link(link: Link, factor: float) -> Link:
    own = tuple(
        replace(c, latency_s=c.latency_s / factor, bandwidth_bytes_per_s=c.bandwidth_bytes_per_s * factor, start_s=c.start_s / factor) for c in link.collectives
    )
    return replace(link, latency_s=link.latency_s / factor, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * factor, collectives=own)


def _named(part: Cluster, whole: Cluster) -> Cluster:
    if part.num_devices == whole.num_devices:
        return whole
    match = NAMED.fullmatch(whole.name)
    if match is None:
        return replace(part, name=f"{part.num_devices} of the {whole.num_devices} devices of {whole.name}")
    if part.is_local:
        return replace(part, name=f"{match['machine']}:{part.num_devices}")
    return replace(part, name=f"{match['machine']}:{part.num_nodes}" + (f"x{part.devices_per_node}" if match[2] or part.devices_per_node < whole.devices_per_node else ""))
