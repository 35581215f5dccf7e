"""Clusters: presets, the local machine, the command-line form, and what refuses to exist wrongly."""

import math
import os
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.core.cluster import Cluster
from autopar.core.device import DEVICE_NUMBERS, LINK_NUMBERS, STATUSES
from autopar.errors import AutoparError, UsageError


def assert_one_line(error: AutoparError, *parts: str) -> None:
    message = str(error)
    assert len(message.splitlines()) == 1 and message.isprintable() and len(message) < 600, message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("text", [*Cluster.preset_names(), "local:2"])
def test_every_number_has_a_source(text: str) -> None:
    cluster = Cluster.parse(text)
    found = [cluster.device.source_of(number) for number in DEVICE_NUMBERS]
    found += [link.source_of(number) for link in (cluster.intra_node, cluster.inter_node) for number in LINK_NUMBERS]
    assert all(source.status in STATUSES and source.text != "no source given" for source in found)
    with pytest.raises(UsageError, match="known are latency"):
        cluster.intra_node.source_of("speed")


def test_presets_place_ranks_on_nodes() -> None:
    cluster = Cluster.preset("h100-sxm", nodes=16)
    assert (cluster.name, cluster.num_nodes, cluster.devices_per_node, cluster.num_devices) == ("h100-sxm:16", 16, 8, 128)
    assert cluster.link_between(0, 7) == cluster.intra_node
    assert cluster.link_between(7, 8) == cluster.inter_node
    assert Cluster.preset("gb200").devices_per_node == 72
    assert str(cluster) == "h100-sxm:16: 128 x NVIDIA H100 SXM5 80GB, 16 x 8, NVLink 4 450 GB/s in a node, InfiniBand 50 GB/s between nodes"
    assert hash(cluster) == hash(Cluster.preset("h100-sxm", nodes=16))


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("h100", "h100-sxm"),
        ("a100", "a100-"),
        ("H100-SXM", "known are"),
        ("../hardware/l4", "known are"),
        ("l4.toml", "l4"),
        ("", "known are"),
        ("x" * 9999, "known are"),
    ],
)
def test_an_unknown_preset_lists_the_close_ones(name: str, close: str) -> None:
    with pytest.raises(UsageError) as caught:
        Cluster.preset(name)
    assert type(caught.value) is UsageError
    assert_one_line(caught.value, close, "v100-sxm")


@pytest.mark.parametrize("nodes", [0, -1, 1.0, True, "4", 10**7])
def test_a_cluster_has_a_sensible_number_of_nodes(nodes: object) -> None:
    with pytest.raises(UsageError, match="num_nodes"):
        Cluster.preset("l4", nodes=nodes)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["h100-sxm:16", "h100-sxm:16x4", "local:4", "v100-sxm-16g:2"])
def test_the_name_of_a_cluster_is_its_command_line_form(text: str) -> None:
    assert Cluster.parse(text).name == text
    assert Cluster.parse("l4") == Cluster.preset("l4")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "local",
        "local:",
        "local:0",
        "local:4x2",
        "local:-1",
        "l4:",
        "l4:0",
        "l4:2x0",
        "l4:2x",
        "l4:x",
        "l4:1.5",
        "l4:٣",
        "h100",
        "l4:1:1",
        "mine.toml",
        "./l4",
        "local:99999999",
    ],
)
def test_a_malformed_command_line_form_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Cluster.parse(text)
    assert_one_line(caught.value)


def test_local_processes_share_the_machine() -> None:
    one, two, many = (Cluster.local(n) for n in (1, 2, 10_000))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for cluster, n in ((one, 1), (two, 2), (many, 10_000)):
        assert (cluster.num_nodes, cluster.devices_per_node) == (1, n)
        assert cluster.device.memory_bytes == memory // n
        assert n * cluster.device.peak("float32") <= one.device.peak("float32") * (1 + 1e-12)
        assert cluster.device.peak("float64") * 2 == pytest.approx(cluster.device.peak("float32"))
        assert cluster.device.source_of("peak").status == "assumed"
    # processes beyond the cores divide all of it, and none is lost
    assert 10_000 * many.device.peak("float32") == pytest.approx(one.device.peak("float32"))
    assert many.intra_node.rate_bytes_per_s < two.intra_node.rate_bytes_per_s


@pytest.mark.parametrize(
    "change",
    [
        {"memory_bytes": 0},
        {"memory_bytes_per_s": math.inf},
        {"memory_bytes_per_s": math.nan},
        {"matmul_efficiency": 1.1},
        {"kernel_launch_s": -1.0},
        {"peak_flops_per_s": ()},
        {"peak_flops_per_s": (("float33", 1.0),)},
    ],
    ids=str,
)
def test_a_device_refuses_to_exist_wrongly(change: dict) -> None:
    with pytest.raises(UsageError) as caught:
        replace(Cluster.preset("l4").device, **change)
    assert_one_line(caught.value, "NVIDIA L4")


def test_a_peak_that_is_not_listed_is_an_error_that_lists_the_others() -> None:
    with pytest.raises(UsageError, match=r"no bfloat16 peak \(it has float64, float32, float16\)"):
        Cluster.preset("v100-sxm").device.peak("bfloat16")


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30).filter(lambda t: not t.endswith(".toml") and "/" not in t))
def test_no_command_line_text_raises_anything_but_our_errors(text: str) -> None:
    try:
        Cluster.parse(text)
    except AutoparError as error:
        assert_one_line(error)
