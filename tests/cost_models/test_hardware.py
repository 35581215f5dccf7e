"""The presets: every file loads, carries its own name and has numbers of a plausible size; the README's file loads."""

from pathlib import Path

import pytest

from autopar.core.cluster import Cluster

FOLDER = Path(__file__).parents[2] / "cost_models"
NAMES = Cluster.preset_names()


def test_the_expected_presets_are_there() -> None:
    assert {"v100-sxm", "v100-sxm-16g", "a100-40g", "a100-sxm", "h100-sxm", "h200-sxm", "b200", "gb200", "l4"} <= set(NAMES)
    assert {path.stem for path in (FOLDER / "hardware").glob("*.toml")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_sane(name: str) -> None:
    cluster = Cluster.load(FOLDER / "hardware" / f"{name}.toml")
    assert cluster.name == name and cluster.num_nodes == 1
    device = cluster.device
    assert 15e9 < device.memory_bytes < 320e9
    assert 0.2e12 < device.memory_bytes_per_s < 20e12
    assert 10e12 < device.peak("float32") < device.peak("float16") < 10e15
    peaks = dict(device.peak_flops_per_s)
    assert peaks["float64"] <= peaks["float32"]
    if "tf32" in peaks:
        assert peaks["bfloat16"] == peaks["float16"] == pytest.approx(2 * peaks["tf32"], rel=0.02)
    if "float8_e4m3fn" in peaks:
        assert peaks["float8_e4m3fn"] == peaks["float8_e5m2"] == pytest.approx(2 * peaks["bfloat16"], rel=0.01)
    # the machine balance of accelerators: 100 to 1000 flops in 16 bits for every byte of memory traffic
    assert 100 < device.peak("float16") / device.memory_bytes_per_s < 1000
    assert cluster.inter_node.rate_bytes_per_s < cluster.intra_node.rate_bytes_per_s < device.memory_bytes_per_s
    assert cluster.intra_node.latency_s < cluster.inter_node.latency_s


def test_generations_are_ordered() -> None:
    v100, a100, h100, h200, b200, gb200 = (
        Cluster.preset(n).device for n in ("v100-sxm", "a100-sxm", "h100-sxm", "h200-sxm", "b200", "gb200")
    )
    assert [d.peak("float16") for d in (v100, a100, h100, b200, gb200)] == [125e12, 312e12, 989.4e12, 2250e12, 2500e12]
    assert h100.memory_bytes < h200.memory_bytes < b200.memory_bytes < gb200.memory_bytes


def test_the_file_in_the_readme_loads(tmp_path: Path) -> None:
    text = (FOLDER / "README.md").read_text().split("```toml\n")[1].split("```")[0]
    (tmp_path / "cluster.toml").write_text(text)
    cluster = Cluster.load(tmp_path / "cluster.toml")
    assert cluster.num_devices == 32 and cluster.inter_node.bandwidth_bytes_per_s == 50e9
