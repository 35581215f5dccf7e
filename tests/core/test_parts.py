"""Parts of a cluster: which there are, how they are called, and what fewer processes of one machine have more of."""

from dataclasses import replace

import pytest

from autopar.core.cluster import Cluster
from autopar.core.kernel_rate import KernelRate
from autopar.core.parts import part_of, parts


@pytest.mark.parametrize("text", ["h100-sxm:6", "h100-sxm:2x4", "a100-sxm", "local:4"])
def test_every_part_divides_the_cluster_and_its_name_means_it(text: str) -> None:
    cluster = Cluster.parse(text)
    found = parts(cluster)
    assert found[0] is cluster
    numbers = [part.num_devices for part in found]
    assert numbers == sorted(set(numbers), reverse=True) and numbers[-1] == 1
    for part in found:
        assert cluster.num_devices % part.num_devices == 0
        named = Cluster.parse(part.name)
        assert (named.num_nodes, named.devices_per_node) == (part.num_nodes, part.devices_per_node)
        assert part_of(cluster, part.num_devices) == part
    assert part_of(cluster, cluster.num_devices + 1) is None


def test_parts_of_accelerators_are_the_same_devices() -> None:
    cluster = Cluster.preset("h100-sxm", nodes=4)
    assert all(part.device == cluster.device and part.inter_node == cluster.inter_node for part in parts(cluster))


def test_a_cluster_of_a_file_lends_its_name() -> None:
    cluster = replace(Cluster.preset("h100-sxm", nodes=2), name="lab")
    assert [part.name for part in parts(cluster)][:2] == ["lab", "8 of the 16 devices of lab"]


def test_fewer_processes_share_the_same_processors() -> None:
    """Of four processes on two cores two have twice the rate each, and one no more than two; all have the memory of the rest."""
    local = Cluster.local(4)
    measured = replace(local.device, kernels=(KernelRate("loss", call_s=1e-5, memory=0.5),))
    four = replace(local, device=measured, host=replace(local.host, cores=2.0, action_s=4e-3))
    two, one = part_of(four, 2), part_of(four, 1)
    assert two is not None and one is not None
    for part in (two, one):
        assert part.device.peak("float32") == 2 * four.device.peak("float32")
        assert part.device.memory_bytes_per_s == 2 * four.device.memory_bytes_per_s
        assert part.device.kernel_launch_s == four.device.kernel_launch_s / 2
        assert part.device.kernels == (KernelRate("loss", call_s=5e-6, memory=0.5),)
        assert part.host.action_s == 2e-3
        assert part.intra_node.seconds(1e6) == pytest.approx(four.intra_node.seconds(1e6) / 2)
        assert part.device.memory_bytes * part.num_devices == pytest.approx(4 * four.device.memory_bytes, rel=1e-6)
