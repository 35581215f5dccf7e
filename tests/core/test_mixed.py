"""Groups of different machines: what a command line and a file say of them, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

import autopar
from autopar.core.cluster import Cluster
from autopar.core.device import Link, sources
from autopar.core.mixed import MixedCluster, load_machines, parse_machines
from autopar.errors import AutoparError, FileFormatError, UsageError

A100, H100 = Cluster.preset("a100-sxm", 2), Cluster.preset("h100-sxm", 2, 4)
ETHERNET = Link(name="Ethernet", latency_s=3e-5, bandwidth_bytes_per_s=1.25e10, source=sources("assumed: 100 Gb/s"))


def test_the_command_line_form() -> None:
    found = parse_machines("a100-sxm:2+h100-sxm:2x4")
    assert isinstance(found, autopar.MixedCluster)
    assert (found.name, found.groups, found.num_devices, found.is_local) == ("a100-sxm:2+h100-sxm:2x4", (A100, H100), 24, False)
    assert found.between == A100.inter_node, "the slower link between nodes"
    assert found.group("h100-sxm:2x4") == H100 and found.group("l4:1") is None
    assert str(found).startswith("a100-sxm:2+h100-sxm:2x4: 24 devices in 2 groups, InfiniBand 25 GB/s between them; a100-sxm:2: 16 x NVIDIA A100")
    assert parse_machines("h100-sxm:2x4") == H100, "one group is a cluster as ever"


def test_a_file_says_the_same(tmp_path: Path) -> None:
    mixed = replace(MixedCluster.of(A100, H100), between=ETHERNET)
    path = tmp_path / "lab.toml"
    path.write_text(mixed.to_toml())
    assert load_machines(path) == MixedCluster.load(path) == parse_machines(str(path)) == mixed
    assert MixedCluster.from_values(mixed.to_values(), "values") == mixed
    assert hash(mixed) == hash(MixedCluster.load(path))
    path.write_text(A100.to_toml())
    assert load_machines(path) == A100


def test_groups_of_presets_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lab.toml"
    path.write_text('name = "lab"\n[[group]]\ncluster = "a100-sxm:2"\n[[group]]\ncluster = "a100-sxm:1x4"\nname = "old rack"\n')
    found = load_machines(path)
    assert isinstance(found, MixedCluster)
    assert found.groups == (A100, replace(Cluster.preset("a100-sxm", 1, 4), name="old rack"))


def test_as_slow_as_the_slowest() -> None:
    slowest = MixedCluster.of(A100, H100).slowest
    assert slowest.device == A100.device, "an A100 is no faster than an H100 at anything"
    assert (slowest.num_nodes, slowest.devices_per_node) == (6, 4), "nodes of a size that divides 8 and 4"
    assert (slowest.intra_node, slowest.inter_node) == (A100.intra_node, A100.inter_node)
    lean = replace(H100, device=replace(H100.device, memory_bytes=10**10, memory_bytes_per_s=1e11))
    device = replace(MixedCluster.of(A100, lean), between=ETHERNET).slowest.device
    assert device.memory_bytes == 10**10
    assert device.memory_bytes_per_s * device.memory_efficiency == pytest.approx(1e11 * H100.device.memory_efficiency)
    assert device.peak_flops_per_s == A100.device.peak_flops_per_s
    assert replace(MixedCluster.of(A100, H100), between=ETHERNET).slowest.inter_node.bandwidth_bytes_per_s == 1.25e10


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a100-sxm:2+", "unknown cluster ''"),
        ("a100-sxm:2+h100", "did you mean h100-sxm"),
        ("l4:2+l4:2", "two groups are called 'l4:2'"),
        ("l4:1+l4:2+l4:3+l4:4+l4:5", "5 groups; give 2 to 4"),
        ("local:2+local:3", "share its cores and memory"),
        ("l4+local:2", "share its cores and memory"),
        ("l4+lab.toml", "is not a cluster|no such file"),
    ],
)
def test_what_is_no_cluster_of_groups(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_machines(text)
    assert_one_line(caught.value)


GROUPS = 'name = "lab"\n[[group]]\ncluster = "a100-sxm:2"\n[[group]]\ncluster = "h100-sxm:2"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('name = "lab"\ngroup = 3\n', "group: '?3'? is not a list of tables"),
        ('name = "lab"\ngroup = [1, 2]\n', "is not a list of tables"),
        ('name = "lab"\n[group]\ncluster = "l4"\n', "is not a list of tables"),
        (GROUPS.replace('name = "lab"\n', ""), "name: missing"),
        (GROUPS.replace("a100", "a101"), r"group\.0\.cluster: unknown cluster 'a101-sxm'"),
        (GROUPS.replace('"a100-sxm:2"', "2"), r"group\.0\.cluster: '?2'? is not text"),
        (GROUPS + "nodes = 3\n", r"group\.1\.nodes: unknown key"),
        (GROUPS + '[between]\nname = "x"\nlatency = "1 us"\n', r"between\.bandwidth: missing"),
        ('name = "lab"\n[[group]]\ncluster = "a100-sxm:2"\n', "1 groups; give 2 to 4"),
        ('name = "lab"\ngroup = []\n', "give at least two|give 2 to 4"),
        ('name = "lab"\n[[group]]\nnum_nodes = 2\n[[group]]\ncluster = "l4"\n', r"group\.0\.name: missing"),
        (GROUPS.replace("h100-sxm:2", "a100-sxm:2"), "two groups are called 'a100-sxm:2'"),
        (GROUPS.replace('"lab"', '"local:lab"'), "start with 'local:'"),
        (GROUPS.replace("a100-sxm:2", "local:2"), r"group\.0\.cluster: local:2: processes of this machine share"),
        (GROUPS + "[[host]]\n", "host: unknown key"),
    ],
)
def test_what_a_file_must_not_say(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "lab.toml"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=words) as caught:
        load_machines(path)
    assert_one_line(caught.value)
    with pytest.raises(FileFormatError, match="MixedCluster.load"):
        Cluster.load(path)


def assert_one_line(error: AutoparError) -> None:
    assert str(error).isprintable() and len(str(error)) < 600, str(error)
