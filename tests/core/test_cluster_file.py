"""The cluster file: what is read, what is written, and everything that can be wrong with it."""

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autopar.core.cluster import Cluster, Device, Host, Link, Source, sources
from autopar.core.device import Measured
from autopar.core.kernel_rate import KernelRate
from autopar.core.toml_file import MAX_BYTES
from autopar.errors import AutoparError, FileFormatError, UsageError

VALID = """\
name = "mine"
num_nodes = 4
devices_per_node = 8

[device]
name = "some device"
memory = "80 GB"
memory_bandwidth = "3.35 TB/s"
matmul_efficiency = 0.8
memory_efficiency = 0.9
kernel_launch = "5 us"
source = "derived: data sheet"

[device.peak]
float32 = "67 TFLOP/s"
bfloat16 = "989 TFLOP/s"

[intra_node]
name = "fast"
latency = "2 us"
bandwidth = "450 GB/s"

[inter_node]
name = "slow"
latency = "4 us"
bandwidth = "400 Gb/s"
efficiency = 0.9

[inter_node.source]
default = "derived: data sheet"
latency = "measured: ping"
"""

# (text in VALID, what stands there instead, key path that the message must name, another part of the message)
MALFORMED = [
    ("", "", "", ""),  # the whole file, see `broken`
    ('name = "mine"\n', "", "name", "missing"),
    ("num_nodes = 4\n", "", "num_nodes", "missing"),
    ('bandwidth = "450 GB/s"\n', "", "intra_node.bandwidth", "missing"),
    ('memory = "80 GB"\n', "", "device.memory", "missing; write memory = \"80 GB\""),
    ('float32 = "67 TFLOP/s"\n', "", "device.peak.float32", "missing"),
    ('[inter_node]\nname = "slow"\nlatency = "4 us"\nbandwidth = "400 Gb/s"\nefficiency = 0.9\n\n', "", "inter_node.name", "missing"),
    ('"80 GB"', "80", "device.memory", "bare number"),
    ('"80 GB"', "80.5", "device.memory", "bare number"),
    ('"80 GB"', '"80"', "device.memory", "no unit"),
    ('"80 GB"', '"80 Gb"', "device.memory", "unknown unit 'Gb'; did you mean 'GB'?"),
    ('"80 GB"', '"80 gb"', "device.memory", "unknown unit"),
    ('"80 GB"', '"80 GB/s"', "device.memory", "unknown unit"),
    ('"80 GB"', '"eighty GB"', "device.memory", "a number and a unit"),
    ('"80 GB"', '""', "device.memory", "a number and a unit"),
    ('"80 GB"', '"-80 GB"', "device.memory", "negative"),
    ('"80 GB"', '"0 GB"', "device.memory", "is zero"),
    ('"80 GB"', '"1e-99 GB"', "device.memory", "less than a byte"),
    ('"80 GB"', '"1e400 GB"', "device.memory", "larger than any number"),
    ('"80 GB"', '"nan GB"', "device.memory", "a number and a unit"),
    ('"80 GB"', '"inf GB"', "device.memory", "a number and a unit"),
    ('"80 GB"', '"1_000 GB"', "device.memory", "a number and a unit"),
    ('"80 GB"', '"80 GB\\u2028x"', "device.memory", "a number and a unit"),
    ('"80 GB"', f'"{"9" * 100} GB"', "device.memory", "a number and a unit"),
    ('"80 GB"', '["80 GB"]', "device.memory", "an array"),
    ('"80 GB"', "{size = 80}", "device.memory", "a table"),
    ('"80 GB"', "true", "device.memory", "true"),
    ('"80 GB"', "1979-05-27", "device.memory", "datetime.date"),
    ('"80 GB"', "nan", "device.memory", "not a finite number"),
    ('"80 GB"', "0x" + "f" * 5000, "device.memory", "20000 bits"),
    ('"450 GB/s"', '"450 GBps"', "intra_node.bandwidth", "unknown unit 'GBps'"),
    ('"450 GB/s"', '"450 G"', "intra_node.bandwidth", "unknown unit"),
    ('"450 GB/s"', '"450 GB / s"', "intra_node.bandwidth", "a number and a unit"),
    ('"2 us"', '"2 min"', "intra_node.latency", "unknown unit"),
    ('"2 us"', '"2 µs"', "intra_node.latency", "did you mean 'us'?"),
    ('"2 us"', '"-2 us"', "intra_node.latency", "negative"),
    ('"2 us"', "2e-6", "intra_node.latency", "bare number"),
    ('"67 TFLOP/s"', '"67 TFLOPS"', "device.peak.float32", "did you mean 'TFLOP/s'?"),
    ("float32 =", "float32x =", "device.peak.float32x", "did you mean 'float32'?"),
    ("memory_bandwidth =", "memory_bandwith =", "device.memory_bandwith", "did you mean 'memory_bandwidth'?"),
    ("num_nodes =", "nodes =", "nodes", "did you mean 'num_nodes'?"),
    ("name =", '"na\\u001bme\\n" =', "'na\\x1bme\\n'", "unknown key"),
    ("[inter_node]", "[internode]", "internode", "did you mean 'inter_node'?"),
    ("num_nodes = 4", "num_nodes = 0", "num_nodes", "a whole number from 1 to"),
    ("num_nodes = 4", "num_nodes = -1", "num_nodes", "a whole number"),
    ("num_nodes = 4", "num_nodes = 4.0", "num_nodes", "a whole number"),
    ("num_nodes = 4", 'num_nodes = "4"', "num_nodes", "a whole number"),
    ("num_nodes = 4", "num_nodes = true", "num_nodes", "a whole number"),
    ("num_nodes = 4", "num_nodes = 1000001", "num_nodes", "a whole number"),
    ("devices_per_node = 8", "devices_per_node = 100000", "devices_per_node", "a whole number"),
    ("= 0.8", "= 1.2", "device.matmul_efficiency", "above 0 and up to 1"),
    ("= 0.8", "= 0", "device.matmul_efficiency", "above 0 and up to 1"),
    ("= 0.8", '= "80 %"', "device.matmul_efficiency", "above 0 and up to 1"),
    ("= 0.8", "= inf", "device.matmul_efficiency", "not a finite number"),
    ("= 0.8", "= -nan", "device.matmul_efficiency", "not a finite number"),
    ('name = "some device"', 'name = ""', "device.name", "blank"),
    ('name = "some device"', "name = 3", "device.name", "not text"),
    ('name = "some device"', 'name = "two\\nlines"', "device.name", "control characters"),
    ('name = "some device"', f'name = "{"x" * 2000}"', "device.name", "longer than"),
    ('source = "derived: data sheet"', 'source = "data sheet"', "device.source", "is not a source"),
    ('source = "derived: data sheet"', 'source = "guessed: me"', "device.source", "'measured: ...'"),
    ('source = "derived: data sheet"', 'source = "derived:"', "device.source", "is not a source"),
    ('source = "derived: data sheet"', "source = 1", "device.source", "not a table"),
    ("latency = \"measured: ping\"", "speed = \"measured: ping\"", "inter_node.source.speed", "unknown key"),
    ('[device.peak]\nfloat32 = "67 TFLOP/s"\nbfloat16 = "989 TFLOP/s"', "", "device.peak", "missing"),
    ('source = "derived: data sheet"', 'source = "derived: data sheet"\npeak = 3', "not valid TOML", "(at line"),
    ("num_nodes = 4", "num_nodes = 4\nnum_nodes = 5", "not valid TOML", "line 3"),
    ("[intra_node]", "[device]\n[intra_node]", "not valid TOML", "write each key once"),
    ("num_nodes = 4", "num_nodes 4", "not valid TOML", "line 2"),
    ("num_nodes = 4", "num_nodes = " + "9" * 5000, "not valid TOML", "thousands of digits"),
    ("num_nodes = 4", "num_nodes = " + "[" * 70 + "]" * 70, "nested deeper than 64", "plain tables"),
    ("num_nodes = 4", "num_nodes = " + "{a=" * 3000 + "1" + "}" * 3000, "nested deeper than 64", "plain tables"),
    ("num_nodes = 4", "a" + ".a" * 70 + " = 4", "line 2", "more than 64 dots"),
    ("num_nodes = 4", "num_nodes = [" + "1," * 30_000 + "]", "entries", "a few dozen"),
]  # fmt: skip


def broken(old: str, new: str) -> str:
    if not old:
        return ""
    assert old in VALID
    return VALID.replace(old, new, 1)


def load(tmp_path: Path, text: str | bytes) -> Cluster:
    path = tmp_path / "cluster.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Cluster.load(path)


def assert_one_line(error: AutoparError, *parts: str) -> None:
    message = str(error)
    assert len(message.splitlines()) == 1 and message.isprintable() and len(message) < 600, message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(("old", "new", "key", "part"), MALFORMED, ids=lambda v: v[:30] if isinstance(v, str) else "")
def test_a_malformed_file_is_refused_in_one_line_that_names_the_key(tmp_path: Path, old: str, new: str, key: str, part: str) -> None:
    with pytest.raises(FileFormatError) as caught:
        load(tmp_path, broken(old, new))
    assert type(caught.value) is FileFormatError
    assert_one_line(caught.value, "cluster.toml: ", key, part)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"#" * (MAX_BYTES + 1), "larger than"),
        (b"#" * ((4 << 20) + 1), "larger than"),
        (b'name = "\xff"', "byte 8 is not UTF-8"),
        (VALID.encode("utf-16"), "not UTF-8"),
        (b"\xef\xbb\xbf" + VALID.encode(), "not valid TOML"),
        (b"\x00", "not valid TOML"),
        (b"\r" * 1000, "not valid TOML"),
    ],
)
def test_bytes_that_are_no_text_of_a_cluster(tmp_path: Path, data: bytes, part: str) -> None:
    with pytest.raises(FileFormatError) as caught:
        load(tmp_path, data)
    assert_one_line(caught.value, "cluster.toml: ", part)


@pytest.mark.parametrize(
    "data",
    [
        b"a=[" + b"1," * 500_000 + b"]",
        b"a." * 500_000 + b"a=1",
        b"a=" + b"[" * 100_000,
        b"[[a]]\n" * 150_000,
        b"a=" + b"9" * 1_000_000,
        b'a="""' + b"\\\n" * 400_000 + b'"""',
    ],
    ids=["array", "dots", "brackets", "tables", "digits", "continued lines"],
)
def test_a_bomb_is_refused_quickly(tmp_path: Path, data: bytes) -> None:
    start = time.process_time()
    with pytest.raises(FileFormatError):
        load(tmp_path, data)
    assert time.process_time() - start < 3  # seconds; about 0.5 at most on a free core


@pytest.mark.parametrize("path", ["nowhere.toml", ".", "a\0b.toml", "x" * 5000 + ".toml", "new\nline.toml"])
def test_a_path_that_cannot_be_read_is_a_usage_error(path: str) -> None:
    with pytest.raises(UsageError) as caught:
        Cluster.load(path)
    assert_one_line(caught.value)


def test_a_file_is_read_into_base_units(tmp_path: Path) -> None:
    cluster = load(tmp_path, VALID)
    assert cluster == Cluster(
        name="mine",
        num_nodes=4,
        devices_per_node=8,
        device=Device(
            name="some device",
            memory_bytes=80_000_000_000,
            memory_bytes_per_s=3.35e12,
            peak_flops_per_s=(("float32", 67e12), ("bfloat16", 989e12)),
            matmul_efficiency=0.8,
            memory_efficiency=0.9,
            kernel_launch_s=5e-6,
            source=sources("derived: data sheet"),
        ),
        intra_node=Link(name="fast", latency_s=2e-6, bandwidth_bytes_per_s=450e9),
        inter_node=Link(
            name="slow",
            latency_s=4e-6,
            bandwidth_bytes_per_s=50e9,
            efficiency=0.9,
            source=sources("derived: data sheet", latency="measured: ping"),
        ),
    )
    assert cluster.num_devices == 32
    assert cluster.inter_node.rate_bytes_per_s == pytest.approx(45e9)
    assert cluster.inter_node.seconds(45e9) == pytest.approx(1 + 4e-6)


def test_sources_of_a_file(tmp_path: Path) -> None:
    cluster = load(tmp_path, VALID)
    assert str(cluster.inter_node.source_of("latency")) == "measured: ping"
    assert str(cluster.inter_node.source_of("bandwidth")) == "derived: data sheet"
    assert cluster.intra_node.source_of("latency") == Source("assumed", "no source given")


@pytest.mark.parametrize("text", [*Cluster.preset_names(), "local:1", "local:3", "local:7", "h200-sxm:3x5"])
def test_a_written_file_is_read_back_equal(tmp_path: Path, text: str) -> None:
    cluster = Cluster.parse(text)
    assert load(tmp_path, cluster.to_toml()) == cluster


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.floats(1e-30, 1e30), min_size=4, max_size=4),
    memory=st.integers(1, 2**53),
    text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(lambda t: t.isprintable() and t.strip()),
)
def test_any_cluster_survives_its_file(tmp_path: Path, values: list[float], memory: int, text: str) -> None:
    base = Cluster.local(2)
    device = replace(
        base.device,
        name=text,
        memory_bytes=memory,
        memory_bytes_per_s=values[0],
        peak_flops_per_s=(("float32", values[1]), ("tf32", values[0])),
    )
    link = replace(base.intra_node, latency_s=values[2], bandwidth_bytes_per_s=values[3])
    cluster = replace(base, device=device, inter_node=link)
    back = load(tmp_path, cluster.to_toml())
    assert back == cluster


LINES = VALID.splitlines(keepends=True)
FRAGMENT = st.sampled_from(
    [
        *LINES,
        "=",
        "[",
        "]",
        "{",
        "}",
        '"',
        "'",
        "\n",
        ".",
        "\\",
        "0x",
        "1e999",
        "nan",
        "-inf",
        '"1 GB"',
        '"400 Gb/s"',
        "device",
        "\x00",
        "é",
        "'''",
        "_",
        "1979-05-27T00:00:00Z",
    ]
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(VALID)), st.integers(0, 40), st.one_of(FRAGMENT, st.text(max_size=8))), min_size=1, max_size=4
    )
)
def test_no_mutation_of_a_file_raises_anything_but_our_errors(tmp_path: Path, edits: list[tuple[int, int, str]]) -> None:
    text = VALID
    for start, length, new in edits:
        text = text[:start] + new + text[start + length :]
    try:
        cluster = load(tmp_path, text.encode("utf-8", errors="replace"))
    except AutoparError as error:
        assert type(error) is FileFormatError
        assert_one_line(error, "cluster.toml: ")
    else:
        assert math.isfinite(cluster.intra_node.rate_bytes_per_s) and cluster.device.memory_bytes > 0


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_no_bytes_raise_anything_but_our_errors(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(FileFormatError) as caught:
        load(tmp_path, data)
    assert_one_line(caught.value)


MEASURED = Cluster(
    name="local:4",
    device=replace(Cluster.local(4).device, kernels=(KernelRate("product", 1e-5, 1.02, 1.5, 2.25), KernelRate("gather", 4e-5, 0.05), KernelRate("mean", 0.0, 0.0, 1.3))),
    num_nodes=1,
    devices_per_node=4,
    intra_node=Link(name="l", latency_s=1e-4, bandwidth_bytes_per_s=1e9, collectives=(Measured("all_reduce", 0.0, 2e-4, 3e8), Measured("send", 1e-3, 0.0, 1e9))),
    inter_node=Link(name="l", latency_s=1e-4, bandwidth_bytes_per_s=1e9),
    host=Host(cores=2.0, action_s=1e-3, update_bytes_per_s=8e9, source=sources("measured: here", action="assumed: a test")),
)


def test_a_measured_cluster_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(MEASURED.to_toml())
    assert Cluster.load(path) == MEASURED
    assert MEASURED.crowding == 2.0 and MEASURED.host.source_of("action").status == "assumed" and MEASURED.host.source_of("cores").status == "measured"


def test_a_file_without_a_host_shares_nothing() -> None:
    cluster = Cluster.preset("h100-sxm")
    assert cluster.device.kernels == () and "[device.kernels" not in cluster.to_toml()
    assert cluster.crowding == 1.0 and "[host]" not in cluster.to_toml() and "collectives" not in cluster.to_toml()


@pytest.mark.parametrize(
    "old,new,words",
    [
        ("cores = 2.0", "cores = 0", ("host.cores", "above 0")),
        ("cores = 2.0", 'cores = "two"', ("host.cores", "2.0")),
        ("cores = 2.0", "kores = 2.0", ("host.kores", "cores")),
        ('action = "1 ms"', "action = 1", ("host.action", "unit")),
        ("collectives.all_reduce", "collectives.all_reduced", ("all_reduced", "all_reduce")),
        ('start = "0 s"', 'begin = "0 s"', ("begin",)),
        ("kernels.product", "kernels.produce", ("device.kernels.produce", "product")),
        ("compute = 1.02", "compute = 0", ("device.kernels.product.compute", "above 0")),
        ("compute = 1.02", "computed = 1.02", ("device.kernels.product.computed", "compute")),
        ('call = "40 us"', 'call = "40 B"', ("device.kernels.gather.call",)),
        ('bandwidth = "300 MB/s"', 'bandwidth = "0 MB/s"', ("all_reduce.bandwidth", "zero")),
    ],
)
def test_faults_of_measured_numbers_are_one_line(old: str, new: str, words: tuple[str, ...], tmp_path: Path) -> None:
    text = MEASURED.to_toml()
    assert old in text
    path = tmp_path / "machine.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(FileFormatError) as raised:
        Cluster.load(path)
    assert "\n" not in str(raised.value) and all(word in str(raised.value) for word in words)
