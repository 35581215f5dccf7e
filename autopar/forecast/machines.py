"""Names of devices as publications write them, to presets of `cost_models/hardware`."""

import re
from dataclasses import replace

from autopar.core.cluster import Cluster
from autopar.core.device import sources
from autopar.forecast.runs import Unpriced

PRESETS = {
    "A100": "a100-sxm", "A100-80GB": "a100-sxm", "A100-80GB-SXM": "a100-sxm", "Ampere": "a100-sxm", "A100-40GB": "a100-40g",
    "H100": "h100-sxm", "H100-80GB": "h100-sxm", "H100-80GB-SXM": "h100-sxm", "H100-96GB-HBM2e-500W": "h100-hbm2e-500w", "H100-94GB": "h100-hbm2e-500w", "H200": "h200-sxm",
    "B200": "b200", "B300": "b300", "GB200": "gb200", "GB300": "gb300", "L4": "l4",
    "V100-32GB": "v100-sxm", "V100-32GB-SXM3": "v100-sxm3", "V100-16GB": "v100-sxm-16g",
}  # fmt: skip

HOST_BYTES_PER_S = {"gb200": 225e9, "gb300": 225e9}
"""Between a device and its host, one direction, where that is fast enough to keep activations there. Source: derived, NVLink-C2C of 900 GB/s in both
directions, shared by the two devices of a Grace processor (NVIDIA GB200 and GB300 NVL72 specifications)."""

COMPUTERS = {("BigScience", "a100-sxm"): "a100-jean-zay", ("BigScience", "v100-sxm"): "v100-jean-zay"}
"""Named computers whose network is not that of the vendor's own node: (word of the source, preset of the device) -> preset."""


def machine(gpu: str, num_devices: int, per_node: int | None, source: str = "", notes: str = "") -> tuple[str, Cluster]:
    """(preset, cluster of at least so many of this device). `per_node`: devices of a node where it is not the preset's own; racks of one
    NVLink domain keep theirs. The network is the preset's unless notes name its rate."""
    preset = PRESETS.get(gpu)
    if preset is None or preset not in Cluster.preset_names():
        raise Unpriced(f"device {gpu[:40]!r}: no preset" if gpu else "device not published")
    preset = next((named for (word, device), named in COMPUTERS.items() if word in source and device == preset), preset)
    own = Cluster.preset(preset).devices_per_node
    size = per_node if per_node and per_node != own and own <= 16 else own
    if own > 16 and num_devices > own:  # of a rack a job takes a power of two, so that groups of ranks do not lie across racks
        size = 1 << (own.bit_length() - 1)
    cluster = Cluster.preset(preset, -(-num_devices // size), None if size == own else size)
    return preset, _with_network(cluster, notes)


def _with_network(cluster: Cluster, notes: str) -> Cluster:
    of_node = re.search(r"(?:(\d+)x [A-Za-z ]*)?\b(\d+) Gb/s (?:per node|RoCE between nodes)", notes)
    of_device = re.search(r"(\d+) Gb/s RDMA per GPU", notes)
    if not of_node and not of_device:
        return cluster
    bits_per_s = 1e9 * (int(of_device[1]) if of_device else int(of_node[1] or 1) * int(of_node[2]) / cluster.devices_per_node if of_node else 0)
    link = replace(cluster.inter_node, bandwidth_bytes_per_s=bits_per_s / 8, source=sources("derived: the network that the notes of the row name"))
    return replace(cluster, inter_node=link)
